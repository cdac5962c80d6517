"""A user's mistake is one line on stderr and exit code 2, never a stack trace; and the checks of input, and the JSON files, that several
commands share."""
import argparse
import errno
import json
import os
import sys
import time

import torch


class UserError(Exception):
    """What is wrong, where, and what to do, in one line. Raise it where a user's input comes in."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but for a mistake: a UserError, so one line and no usage before it, and told once under torchrun."""

    def error(self, message):
        raise UserError(f"{message}; see python {self.prog} --help")


def token_counts(option, text, least=1):
    """The numbers of tokens in "4096,2048", the text of a command-line option, in ascending order and each once."""
    try:
        lengths = sorted({int(n) for n in text.split(",")})
    except ValueError:
        raise UserError(f"{option} {text}: give whole numbers of tokens, comma-separated, such as 2048,4096") from None
    if lengths[0] < least or lengths[-1] > 2**31:
        raise UserError(f"{option} {text}: a length is at least {least} and at most {2**31} tokens")
    return lengths


def changes(earlier, now):
    """Where two records {setting: value} differ, in words; "" where they do not. What `now` does not have is not compared."""
    return "; ".join(f"{key} was {earlier.get(key)}, now {value}" for key, value in now.items() if earlier.get(key) != value)


def write_json(path, value):
    """Aside, then renamed: a kill leaves the earlier file whole."""
    aside = path.with_name(path.name + ".part")
    try:
        aside.write_text(json.dumps(value, indent=2) + "\n")
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def at_least(args, least, *keys):
    """Refuse options whose number is given and smaller."""
    for key in keys:
        if getattr(args, key) is not None and getattr(args, key) < least:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least {least}")


def check_task(args, belongs):
    """Refuse options of another --task. belongs: {option: its tasks}."""
    for key, tasks in belongs.items():
        if args.task not in tasks and getattr(args, key) not in (None, False, [], "none", "float32"):  # what stands where none is given
            raise UserError(f"--{key} belongs to --task {' or '.join(tasks)}; leave it out")


def device(named):
    """The device that --device names, "cuda" or "cpu"; without one (None) cuda if there is one."""
    if named == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; leave it out to run on the CPU")
    kind = named or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
        raise UserError(f"more processes than GPUs: this machine has {torch.cuda.device_count()}; lower --nproc_per_node")
    return kind


def check_outputs(results, plot):
    """Refuse, before hours of work, paths (or None) of a JSON file and of a plot that could not be written after it."""
    if plot and plot.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot {plot}: name a .png, .pdf or .svg file")
    for path in (results, plot):
        if path and path.is_dir():
            raise UserError(f"{path}: is a folder; name a file")
        if path and not path.absolute().parent.is_dir():
            raise UserError(f"{path}: its folder does not exist; make it first")
        if path and not os.access(path.absolute().parent, os.W_OK):
            raise UserError(f"{path}: its folder cannot be written to; name another")


def run(main):
    """Call `main()` and turn a UserError, a file that cannot be used or full memory into one line and exit code 2."""
    try:
        main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        caught, message = error, str(error)
    except OSError as error:
        caught = error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"the disk is full ({error.filename or 'while writing'}): free some space and run again; earlier files are whole"
        elif error.filename:
            message = f"{error.filename}: {error.strerror}; check the path and its permissions"
        else:
            raise
    except torch.OutOfMemoryError as error:
        caught = error
        training = "lower --micro_batch_size or --train_len, or add --activation_checkpointing full"
        message = f"the GPU's memory is full: training, {training}; validating, lower --eval_lengths; evaluating, lower --lengths"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):  # PyTorch's word for it
            raise
        caught, message = error, "this machine's memory is full: lower the lengths or the batch, or take a larger machine"
    else:
        return
    everywhere = isinstance(caught, UserError)  # under torchrun every process meets the same mistake: say it once a machine
    if os.environ.get("LOCAL_RANK", "0") == "0" or not everywhere:
        print(f"error: {message}", file=sys.stderr)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(10)  # torchrun ends all processes when the first one ends: that shall be the one that says it
    sys.exit(2)
