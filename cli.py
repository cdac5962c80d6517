"""Command lines: options and their checks, completion by defaults, one-line errors, signals, exit codes.

Options have their types and ranges here; what depends on several of them, or on the model, is checked when
they are completed. Exit codes: 0 done, 2 input that cannot be used (one line on stderr says what, where,
and what to do), 130 interrupted; and a training run that a signal has stopped ends with 128 + its number.
"""

import argparse
import contextlib
import copy
import errno
import importlib.util
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import float8
import pose
import rope
from hf import families
from model import TRAINED_BESIDE, linear_layers
from storage.errors import InputError, LocalError, is_process_0, printable, warn
from storage.files import is_stream, only_one_process
from storage.log import is_finished, is_half_trained
from storage.values import describe_changes, read_json
from tasks import plan

LARGEST = 2**31  # length in tokens, or factor
LARGEST_SEED = 2**63 - 1
LARGEST_LR = 1  # AdamW moves every weight by about so much in a step
LARGEST_BATCH_TOKENS = 2**28  # in a step, over all processes
LORA_LR = 10  # the learning rate of adapters, in learning rates of whole weights
MICRO_BATCH_TOKENS = 32768  # tokens that a process takes through the model at once, unless told otherwise


# ---------------------------------------------------------------- parsers and types of options


class ArgumentParser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError for a mistake, in one line without the usage text."""

    def error(self, message):
        command = self.prog if self.prog.startswith("python ") else f"python {self.prog}"
        raise InputError(f"{message.removeprefix('argument ')}; see {command} --help")


def path_name(text):
    """Return the text of an option that names a file or a folder. It must not be empty or hold a NUL."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"must name a file or a folder, not be {text!r}")
    return text


def as_path(text):
    """Return the Path of an option that names a file or a folder."""
    return Path(path_name(text))


def whole_number(least, most=LARGEST):
    """Return the type of an option that takes whole numbers from `least` to `most`."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text[:40]!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, not {value}")
        return value

    return parse


def number(least, most=math.inf):
    """Return the type of an option that takes finite numbers from `least` to `most`."""
    allowed = f"a number that is at least {least}" if most == math.inf else f"a number from {least} to {most}"

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {allowed}, not {text[:40]!r}") from None
        if not (math.isfinite(value) and least <= value <= most):
            raise argparse.ArgumentTypeError(f"must be {allowed}, not {text[:40]}")
        return value

    return parse


def token_counts(least=1):
    """Return the type of an option such as 4096,2048: numbers of tokens, each once, in ascending order."""

    def parse(text):
        try:
            lengths = sorted({int(length) for length in text.split(",")})
        except ValueError:
            expected = "must be whole numbers of tokens, comma-separated, such as 2048,4096"
            raise argparse.ArgumentTypeError(f"{expected}, not {text[:40]!r}") from None
        if lengths[0] < least or lengths[-1] > LARGEST:
            raise argparse.ArgumentTypeError(f"each must be from {least} to {LARGEST} tokens, not {text}")
        return lengths

    return parse


def names_of(*known):
    """Return the type of an option such as q,v: some of the known names, comma-separated.

    The value is a text too, with each name once and in the order in which they are known.
    """

    def parse(text):
        named = text.split(",")
        for name in named:
            if name not in known:
                raise argparse.ArgumentTypeError(f"must be some of {','.join(known)}, not {name[:40]!r}")
        return ",".join(name for name in known if name in named)

    return parse


def output_file(*suffixes):
    """Return the type of an option that names a file to write, with one of the suffixes if any are given.

    It refuses a file that could not be written, so that this is known before hours of work.
    """

    def parse(text):
        path = as_path(text)
        target = Path(os.path.realpath(path))  # where a link leads, which is what will be written
        if suffixes and path.suffix not in suffixes:
            expected = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
            raise argparse.ArgumentTypeError(f"must end in {expected}, not be {path}")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{path} is a folder; name a file")
        if is_stream(path):
            return path
        if not target.parent.is_dir():
            raise argparse.ArgumentTypeError(f"the folder of {path} does not exist; make it first")
        if not os.access(target.parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"the folder of {path} cannot be written to; name another")
        return path

    return parse


plot_file = output_file(".png", ".pdf", ".svg")


def refuse_one_file_for_two(args):
    """Raise InputError if --json and --plot name the same file."""
    if args.json is None or args.plot is None or is_stream(args.plot):
        return
    if os.path.realpath(args.json) == os.path.realpath(args.plot):
        raise InputError(f"--plot {args.plot}: --json is written there; name another file")


@contextlib.contextmanager
def own_results(path):
    """Keep other processes from writing the file of --json while the body runs. None stands for no file.

    Raise InputError if another process writes it.
    """
    if path is None or is_stream(path):
        yield
        return
    busy = f"--json {path}: another process writes there; wait for its end, or name another file"
    target = Path(os.path.realpath(path))
    with only_one_process(target.with_name(f".{target.name}.lock"), busy):
        yield


def refuse_options_of_other_tasks(args, belongs):
    """Raise InputError for an option that is given although it belongs to another --task.

    belongs: {option: its tasks}. The default of these options must be None, False or an empty list.
    """
    for option, tasks in belongs.items():
        value = getattr(args, option)
        is_given = not (value is None or value is False or value == [])
        if is_given and args.task not in tasks:
            raise InputError(f"--{option} belongs to --task {' or '.join(tasks)}; leave it out")


def warn_if_half_trained(model):
    """Warn if a model, a path or a built-in name, is what an interrupted run wrote."""
    if is_half_trained(model):
        out = Path(model).parent
        going_on = shlex.join(["python", "train.py", "--resume", "--out", str(out)])
        warn(f"{model} is half-trained, its run was interrupted; it goes on with: {going_on}")


def device(named):
    """Return the device that --device names, "cuda" or "cpu". None stands for cuda if there is one.

    Raise InputError if CUDA is named and absent, or has fewer devices than there are processes.
    """
    if named == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device here; leave it out to run on the CPU")
    kind = named or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
        raise InputError(
            f"more processes than GPUs: this machine has {torch.cuda.device_count()}; lower --nproc_per_node"
        )
    return kind


def compute_dtype(kind, in_float8=False):
    """Return the name of the dtype in which a model computes on "cuda" or "cpu", unless told otherwise.

    in_float8: whether its products are in float8, whose results are bfloat16.
    """
    return "bfloat16" if kind == "cuda" or in_float8 else "float32"


def process_count():
    """Return how many processes torchrun started, 1 without it. There need not be a process group yet."""
    return int(os.environ.get("WORLD_SIZE", 1))


def split_batch(batch_size, micro_batch_size, tokens, world=None):
    """Return (examples of each process in a step, examples in one forward pass).

    tokens: in an example. micro_batch_size: None for as many examples as make about MICRO_BATCH_TOKENS.
    world: the number of processes, by default process_count(). Raise InputError for a batch that cannot be
    split evenly or that is too large.
    """
    world = world or process_count()
    if batch_size * tokens > LARGEST_BATCH_TOKENS:
        raise InputError(
            f"--batch_size {batch_size} with {tokens} tokens in an example: a step takes at most "
            f"{LARGEST_BATCH_TOKENS} tokens; lower one of the two"
        )
    if batch_size % world:
        raise InputError(
            f"--batch_size {batch_size} does not divide over {world} processes; make it a multiple"
        )
    share = batch_size // world
    if micro_batch_size is None:
        micro_batch_size = min(share, max(1, MICRO_BATCH_TOKENS // tokens))
        while share % micro_batch_size:
            micro_batch_size -= 1
    elif share % micro_batch_size:
        raise InputError(
            f"--micro_batch_size {micro_batch_size} does not divide the {share} examples of each process; "
            "choose a divisor"
        )
    return share, micro_batch_size


# ---------------------------------------------------------------- errors, exit codes, signals


def run(main):
    """Call main(). End with one line and exit code 2 after an error that is no bug: see one_line."""
    if sys.stdout:  # None where it is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without ± shows \xb1, as on stderr
    try:
        main()
        print(end="", flush=True)  # here, where an error can still be reported
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = one_line(error)
        if message is None:
            raise
        # Under torchrun every process meets the same mistake of the user. One on each machine reports it.
        is_shared = isinstance(error, InputError) and not isinstance(error, LocalError)
        is_reported_here = not is_shared or os.environ.get("LOCAL_RANK", "0") == "0"
        if not is_reported_here and "TORCHELASTIC_RUN_ID" in os.environ:
            # The process that reports it ends, and then torchrun ends this one. If that does not happen, this
            # process has met the error alone, as the one that tokenises does while others wait for it.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(20)
            is_reported_here = True
        if is_reported_here:
            print(f"error: {printable(message)}", file=sys.stderr)
        sys.exit(2)


DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
REMEDIES = {  # for errors of the system
    errno.EFBIG: "files may not be so large here; raise the limit (ulimit -f) or take another disk",
    errno.EIO: "the disk, or the way to it, has failed; take another one",
    errno.EPIPE: "its reader has gone",
}


def one_line(error):
    """Return the line for an error that is no bug, None for a bug.

    No bugs are a user's mistake, a file that cannot be used or written, full memory, and the end of another
    process.
    """
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, BrokenPipeError) and not error.filename:
        # Python would write the rest when it ends, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        error.filename = "standard output"
    if isinstance(error, OSError):
        where = error.filename or "reading or writing"
        reason = error.strerror or str(error)
        if error.errno in DISK_IS_FULL:
            where = f"{where}: {reason}"
            return f"the disk is full ({where}): free some space and run again; earlier files are whole"
        return f"{where}: {reason}; {REMEDIES.get(error.errno, 'check the path and its permissions')}"
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the GPU's memory is full: training, lower --micro_batch_size or --train_len, or add "
            "--activation_checkpointing full, or --lora_rank 16 to train adapters alone; validating, lower "
            "--eval_lengths; evaluating, lower --lengths; asking, shorten the text"
        )
    # PyTorch has no types of its own for a CPU that is out of memory, and for the end of another process.
    reason = str(error) if isinstance(error, RuntimeError) else ""
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in reason:
        return "this machine's memory is full: lower the lengths or the batch, or take a larger machine"
    if "Connection closed by peer" in reason or "Connection reset by peer" in reason:
        return "another process of this run has ended: look for its error, or for what has killed it"
    return None


class LastingStderr:
    """sys.stderr whose end is no error: a closed terminal, or a pipe that nobody reads any more.

    What is written after that is lost. Hours of work must not be lost with it.
    """

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        self._outlive(self._stream.write, text)
        return len(text)

    def flush(self):
        self._outlive(self._stream.flush)

    def _outlive(self, action, *arguments):
        """Call an action. If it cannot write any more, all that writes into descriptor 2 loses its lines."""
        try:
            action(*arguments)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def run_distributed(main):
    """Call main() as `run` does and end this process. For commands that join a process group."""
    sys.stderr = LastingStderr(sys.stderr or open(os.devnull, "w"))  # None where it is closed
    try:
        run(main)
    except SystemExit as end:
        leave(end.code)
    leave(0)


def leave(code):
    """End the process at once, without an interpreter shutdown.

    gloo's threads may still hold tensors then, and abort one run in several (pytorch/pytorch#179291).
    """
    if dist.is_initialized() and code == 0:
        dist.barrier()
        dist.destroy_process_group()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(code)


def catch_signals(checkpoints):
    """Catch SIGINT, SIGTERM and SIGHUP from here on, and return the list to which each adds its number.

    They do not end the process, but a second Ctrl-C does. checkpoints: the storage.checkpoint.Checkpoints
    that tell what that would cost.
    """
    caught = []
    speaks = dist.get_rank() == 0
    # torchrun passes signals on several times, and kills after a while itself.
    may_end_at_once = "TORCHELASTIC_RUN_ID" not in os.environ

    def tell(line):
        if speaks:
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, f"\n{line}\n".encode())  # print may be in the middle of something

    def catch(number, frame):
        lost = f"what came after step {checkpoints.newest}" if checkpoints.newest else "all steps so far"
        if number == signal.SIGINT and number in caught and may_end_at_once:
            tell(f"ended at once; {lost} is discarded")
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        caught.append(number)
        at_once = ""
        if number == signal.SIGINT and may_end_at_once:
            at_once = f"; a second Ctrl-C ends it at once and discards {lost}"
        tell(f"stopping after this step and saving{at_once}")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        is_nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
        if not is_nohup:  # which asks for a run that outlives its terminal
            signal.signal(number, catch)
    return caught


# ---------------------------------------------------------------- the command line of train.py


@dataclass(frozen=True)
class Recipe:
    """The defaults of those training options that depend on the model. The values here are section 4.1's."""

    steps: int = 1000
    tokens_per_step: int = 131072  # the paper's 64 examples of 2,048 tokens, whatever the model's window
    lr: float = 2e-5
    warmup_steps: int = 10
    target_windows: int = 16  # target_len, in windows of the model
    train_windows: int = 1  # train_len, in windows of the model
    rope: str = "yarn"
    headroom: float = 1.0  # the interpolation is made for target_len times this
    beta_fast: float | None = None  # None: rope.py's
    overshoot: float = 1.0  # positions are drawn from a window of target_len times this
    llama_4_scaling_beta: float = 0.0
    retrieval: float = 0.0  # share of the examples that are retrieval episodes


RECIPES = {
    "paper": Recipe(),
    # What was found for smollm2-135m: minutes on one GPU, and codes are found far back.
    "fast": Recipe(
        steps=300,
        lr=4e-4,
        train_windows=4,
        retrieval=0.5,
        rope="ntk",
        headroom=1.188,
        overshoot=1.25,
        llama_4_scaling_beta=0.1,
    ),
    # For the model of that name, on a laptop.
    "tiny": Recipe(
        steps=150,
        tokens_per_step=8192,
        lr=2e-4,
        target_windows=8,
        headroom=2,
        beta_fast=8,
    ),
}
RECIPE_OF_MODEL = {"smollm2-135m": "fast", "tiny": "tiny"}  # of others it is the paper's

# Options that records of earlier versions lack, and their value when such a run goes on. (All that a recipe
# says is recorded as well. Those runs wrote no timed checkpoints, but nobody minds some.)
NEWER = {
    "retrieval": 0.0, "recipe": None, "save_minutes": 10.0, "text_key": "text", "loss_on": "answers",
    "lora_rank": 0, "lora_alpha": None, "lora_targets": None, "lora_train": None, "adapter": False,
    "float8": False,
}  # fmt: skip
NOT_RECORDED = ("out", "resume", "dry_run")  # options that belong to one call
BY_CONTENT = ("model", "data")  # paths: a resumed run may have others, with the same model and texts there
# Options that a resumed run may change: speed, and what is shown or kept.
MAY_CHANGE = (
    "micro_batch_size", "device", "compile", "activation_checkpointing", "cpu_offload", "save_every",
    "save_minutes", "keep", "tensorboard", "eval_every", "eval_data", "eval_lengths", "adapter",
)  # fmt: skip


def training_parser():
    """Return the parser of train.py.

    Defaults that depend on the model or the machine are None: see complete_training.
    """
    p = ArgumentParser(description="Extend a model's context window with PoSE.")
    # fmt: off
    p.add_argument("--model", type=path_name,
        help="a Hugging Face folder, or tiny or smollm2-135m (default: smollm2-135m with a GPU, else tiny)")
    p.add_argument("--data", type=path_name, nargs="+", action="extend", default=[], metavar="FILE",
        help="texts: .txt, .md, .jsonl, .ndjson, .json files (.gz and .zst too), .parquet, folders of them, "
        "or - for standard input (default: Python's standard library)")
    p.add_argument("--text_key", default="text", metavar="KEY",
        help="key of the text in JSON and Parquet (default: text); objects without it may have messages, or "
        "prompt and completion")
    p.add_argument("--out", type=as_path, default=Path("out"), metavar="DIR",
        help="a new folder for this run (default: out)")
    p.add_argument("--target_len", type=whole_number(1),
        help="tokens in the new window (default: 16 times the model's window, 8 times with tiny)")
    p.add_argument("--recipe", choices=RECIPES,
        help="defaults of the other options. paper: section 4.1's, 131 million tokens with YaRN. fast: 39 "
        "million tokens with ntk, half of the examples retrieval episodes, measured on smollm2-135m alone; a "
        "larger model may want a lower --lr than its 4e-4. tiny: that model's (default: fast with "
        "smollm2-135m, tiny with tiny, else paper)")
    p.add_argument("--dry_run", action="store_true",
        help="say what the run will need, tokens, memory and disk, and stop; --out is left alone")
    # fmt: on
    add_method(p.add_argument_group("the method"))
    add_schedule(p.add_argument_group("training"))
    add_lora(p.add_argument_group("adapters (LoRA)"))
    add_interruptions(p.add_argument_group("interruptions"))
    add_watching(p.add_argument_group("watching"))
    add_speed(p.add_argument_group("speed and memory"))
    return p


# Each of these adds the options of one group to it.


# fmt: off
def add_method(g):
    g.add_argument("--method", choices=pose.METHODS, default="pose",
        help="what an example is. pose: chunks of a short window with skips between their positions. full: "
        "a window of target_len. pi: a plain short window. randpos: a short text at random positions "
        "(default: pose)")
    g.add_argument("--train_len", type=whole_number(1),
        help="tokens in an example (default: the model's window; with --method full target_len; with the "
        "fast recipe and --data four windows, at most 32,768 tokens)")
    g.add_argument("--chunks", type=whole_number(1), default=2,
        help="pose: chunks in an example (default: 2)")
    g.add_argument("--offset", choices=pose.OFFSETS, default="uniform",
        help="pose: where a chunk's text is taken from. uniform: anywhere behind the one before. zero: "
        "right behind it. skip: as far behind as its positions say (default: uniform)")
    g.add_argument("--overshoot", type=number(1, LARGEST), metavar="X",
        help="pose, randpos: draw positions from a window of X times target_len; otherwise its last "
        "stretch is met rarely (default: 1; 1.25 with the fast recipe and ntk)")
    g.add_argument("--retrieval", type=number(0, 1), metavar="SHARE",
        help="pose, pi: share of the examples that are episodes: texts with facts and, behind a skip, "
        "questions about them, in which the answers count most; they have chunks and skips of their own "
        "(default: 0; 0.5 with the fast recipe and pose)")
    g.add_argument("--episode_len", type=whole_number(1),
        help="tokens in an episode; an example holds as many as fit (default: the model's window)")
    g.add_argument("--rope", choices=rope.EXTENSIONS,
        help="interpolation (default: yarn; ntk with the fast recipe)")
    g.add_argument("--factor", type=number(1, LARGEST),
        help="factor of the interpolation (default: target_len / window, and twice that with tiny and "
        "yarn; for ntk the factor that slows the critical pair by target_len / window, or by 1.188 times "
        "that with the fast recipe, see rope.ntk_factor; for dynamic 1)")
    g.add_argument("--beta_fast", type=number(1, LARGEST),
        help="yarn: pairs that turn at least so often in the window stay as they are (default: 32; 8 with "
        "tiny)")
    g.add_argument("--llama_4_scaling_beta", type=number(0, 100), metavar="BETA",
        help="multiply the queries of token i by 1 + BETA ln(1 + floor(i / window)), as Llama 4 does "
        "(default: what the model has, else 0, which is not at all; 0.1 with the fast recipe and ntk, for "
        "LLaMA and Mistral)")


def add_schedule(g):
    g.add_argument("--steps", type=whole_number(0),
        help="optimizer steps; 0 writes the untrained model with its interpolation (default: 1000; 150 "
        "with tiny's recipe, 300 with the fast one)")
    g.add_argument("--batch_size", type=whole_number(1),
        help="examples in a step, over all processes (default: as many as make 131,072 tokens; "
        "8,192 with tiny's recipe)")
    g.add_argument("--lr", type=number(0, LARGEST_LR),
        help="peak learning rate of AdamW (default: 2e-5; 2e-4 with tiny, 4e-4 with the fast recipe; with "
        f"--lora_rank {LORA_LR} times that)")
    g.add_argument("--warmup_steps", type=whole_number(0),
        help="steps of linear warm-up, before linear decay to 0 (default: 10)")
    g.add_argument("--seed", type=whole_number(0, LARGEST_SEED), default=0,
        help="seed of the examples (default: 0)")
    g.add_argument("--loss_on", choices=("answers", "all"), default="answers",
        help="what counts in conversations and completions: what the assistant says, or all. Of plain texts "
        "all counts (default: answers)")


def add_lora(g):
    g.add_argument("--lora_rank", type=whole_number(0), default=0, metavar="R",
        help="train low-rank adapters beside frozen weights: 16 is usual (default: 0, which trains all "
        "weights)")
    g.add_argument("--lora_alpha", type=whole_number(1), metavar="ALPHA",
        help="adapters count ALPHA / R times (default: 2 R, so that a higher rank changes nothing else)")
    g.add_argument("--lora_targets", type=names_of("q", "k", "v", "o", "gate", "up", "down"), metavar="q,v,…",
        help="linear layers that get an adapter, of q,k,v,o,gate,up,down (default: all)")
    g.add_argument("--lora_train", type=names_of(*TRAINED_BESIDE), metavar="embed,norm",
        help="train the embedding, the norms or both as well, which LongLoRA found to be needed at 100,000 "
        f"tokens; their learning rate is a {LORA_LR}th of --lr (default: neither)")
    g.add_argument("--adapter", action=argparse.BooleanOptionalAction, default=False,
        help="also write the adapters by themselves, for PEFT, into OUT/adapter; OUT/model has them merged")


def add_interruptions(g):
    g.add_argument("--save_every", type=whole_number(0), default=0, metavar="N",
        help="write a checkpoint every N steps, and keep them when the run has ended (default: 0, never)")
    g.add_argument("--save_minutes", type=number(0, 100_000), default=10.0, metavar="M",
        help="write a checkpoint every M minutes; these go when the model is written (default: 10; 0: never)")
    g.add_argument("--keep", type=whole_number(1), metavar="N",
        help="keep the newest N checkpoints (default: 1, 2 with --save_every)")
    g.add_argument("--resume", action="store_true",
        help="go on from the newest checkpoint in --out, or begin where there is none; options that are not "
        "given stay as they were")


def add_watching(g):
    g.add_argument("--eval_every", type=whole_number(0), default=0, metavar="N",
        help="measure the validation loss before the first step, every N steps and after the last "
        "(default: never)")
    g.add_argument("--eval_data", type=path_name, nargs="+", action="extend", default=[], metavar="FILE",
        help="texts for validation, as for --data")
    g.add_argument("--eval_lengths", type=token_counts(), metavar="TOKENS,…",
        help="windows of validation; all of them score the same last tokens, as many as the shortest holds "
        "(default: train_len)")
    g.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=False,
        help="also write TensorBoard events into OUT/tensorboard")


def add_speed(g):
    dtypes = ("float32", "bfloat16")
    g.add_argument("--micro_batch_size", type=whole_number(1),
        help="examples in one forward pass of a process (default: about 32,768 tokens)")
    g.add_argument("--activation_checkpointing", choices=("none", "selective", "full"), default="none",
        help="compute activations twice to save memory: all of a block (full), or all but its matrix "
        "products and attention (selective) (default: none)")
    g.add_argument("--cpu_offload", action=argparse.BooleanOptionalAction, default=False,
        help="keep weights and optimizer in host memory")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile each block (default: on a GPU)")
    g.add_argument("--dtype", choices=dtypes,
        help="dtype of the computation (default: bfloat16 on a GPU)")
    g.add_argument("--param_dtype", choices=dtypes, default="float32",
        help="dtype of master weights, gradients and optimizer state. bfloat16 halves their memory, but "
        "rounds each update to 3 digits of the weight, so that small ones are lost (default: float32)")
    g.add_argument("--float8", action=argparse.BooleanOptionalAction, default=False,
        help="multiply in float8 in the linear layers of the blocks, which takes an H100 or a later GPU")
    g.add_argument("--device", choices=("cuda", "cpu"),
        help="where to compute (default: cuda if there is one)")
# fmt: on


@contextlib.contextmanager
def own_out(out):
    """Keep other runs from the folder of --out while the body runs. Process 0 holds a lock there.

    Raise InputError if another run uses it, if it cannot be a folder, or if it is inside another run's.
    """
    check_out(out)
    busy = f"--out {out}: another run is using it; wait for its end, or name another folder"
    with only_one_process(out / ".lock", busy) if is_process_0() else contextlib.nullcontext():
        yield


def training_arguments(args):
    """Return the options of a run. With --resume, those that are not given are the earlier run's.

    args: the options as given. Raise InputError for an --out that holds another run, and for a resumed run
    whose options differ.
    """
    # torchrun --max_restarts gives the same command again after a process has died: then the run goes on.
    is_restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if (args.resume or is_restarted) and (args.out / "args.json").exists():
        return options_of_earlier_run(args)
    has_metrics = (args.out / "metrics.jsonl").is_file()
    holds_a_run = has_metrics or any(
        (args.out / name).exists() for name in ("args.json", "checkpoints", "model")
    )
    if holds_a_run and not args.dry_run:
        raise InputError(
            f"--out {args.out} already holds a run; name another folder, remove it, or add --resume"
        )
    if args.resume and is_process_0():  # in case that another folder was meant
        warn(f"--resume: {args.out} holds no run yet; beginning one")
    args.resume = False
    return args


def check_out(out):
    """Raise InputError if --out cannot be a folder, or lies inside what another run writes and removes."""
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise InputError(f"--out {out}: {path} is a file; name a folder")
    resolved = out.resolve()
    for path in (resolved, *resolved.parents):
        if path.name in ("checkpoints", "model", "adapter") and (path.parent / "args.json").exists():
            raise InputError(f"--out {out}: {path.parent} is another run's; name a folder outside of it")


def options_of_earlier_run(given):
    """Return the options of the run in --out, replaced by those that are given.

    given: the options as given. Raise InputError if the run is finished and more steps are asked for, or
    if an option differs that must not change.
    """
    parser = training_parser()
    out, record = given.out, given.out / "args.json"
    try:
        earlier = NEWER | read_json(record)
    except InputError:
        raise InputError(f"--resume: {record} is not readable; start again with another --out") from None
    recorded = [word for option, value in earlier.items() for word in words_of(option, value, given)]
    try:
        parser.parse_args(recorded)
    except InputError as error:
        raise InputError(f"--resume: {record} is not a run's ({error}); start with another --out") from None
    args = parser.parse_args([*recorded, *sys.argv[1:]])
    args.resume = True
    if not args.eval_every:  # validation is switched off: the run's own texts and lengths go too
        args.eval_data, args.eval_lengths = given.eval_data, given.eval_lengths
    if is_finished(out) and describe_changes(earlier, {"steps": args.steps}):
        raise InputError(
            f"--resume: the run in {out} is finished, and its learning rate has fallen to 0. Train its "
            f"model in a run of its own: {command_for_more_steps(args, earlier)}"
        )
    not_compared = NOT_RECORDED + MAY_CHANGE
    options = {option: value for option, value in vars(args).items() if option not in not_compared}
    must_match = {option: value for option, value in options.items() if option not in BY_CONTENT}
    if describe_changes(earlier, must_match):
        changed = describe_changes(earlier, options)
        raise InputError(f"--resume: the run in {out} had other arguments: {changed}")
    has_checkpoint = any((out / "checkpoints").glob("step-*"))
    if (out / "model").exists() and not has_checkpoint and not is_finished(out):
        reason = f"{out} has a model but no checkpoint to go on from; starting anew would replace the model"
        raise InputError(f"--resume: {reason}; name another --out")
    return args


def command_for_more_steps(args, earlier):
    """Return the command that trains a finished run's model on, with the same settings and its window.

    args: the options, with the new number of steps. earlier: the finished run's, {option: value}.
    """
    out = args.out
    settings = earlier | {"model": str(out / "model"), "out": f"{out}-more", "rope": "default"}
    settings["steps"] = max(1, args.steps - earlier["steps"])
    # Those of the interpolation are in the model. Its recipe is spelt out.
    for option in ("factor", "beta_fast", "llama_4_scaling_beta", "recipe"):
        settings.pop(option, None)
    parser = training_parser()
    nothing_given = parser.parse_args([])
    words = ["python", "train.py"]
    for option, value in settings.items():
        if value != parser.get_default(option):
            words += words_of(option, value, nothing_given)
    return shlex.join(words)


def words_of(option, value, given):
    """Return a recorded option as words of a command line, so that it is checked like one.

    given: the options as given. Return no words for a list that is given too, since argparse would add to it.
    """
    if option not in vars(given) or value is None:
        return []
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    if not isinstance(value, list):
        return [f"--{option}={value}"]
    if not value or getattr(given, option):
        return []
    if all(isinstance(part, int) for part in value):
        return [f"--{option}={','.join(map(str, value))}"]
    return [f"--{option}={part}" for part in value]


def complete_training(args, config):
    """Fill in the options of train.py that depend on the model and the machine.

    config: the model's Config. Raise InputError for options that cannot work together.
    """
    args.recipe = args.recipe or RECIPE_OF_MODEL.get(args.model, "paper")
    recipe = RECIPES[args.recipe]
    window = config.max_position_embeddings
    for option in ("steps", "warmup_steps", "rope"):
        if getattr(args, option) is None:
            setattr(args, option, getattr(recipe, option))
    if args.lr is None:
        args.lr = LORA_LR * recipe.lr if args.lora_rank else recipe.lr
    complete_lora(args, config)
    complete_lengths(args, window, recipe)
    complete_episodes(args, window, recipe)
    complete_batch(args, window, recipe)
    # The factor, the overshoot and the scale of the queries were found for one interpolation and need not
    # suit another: with another one they are the paper's.
    complete_interpolation(args, config, recipe if args.rope == recipe.rope else RECIPES["paper"])
    if args.beta_fast is None and args.rope in rope.RAMPED:
        args.beta_fast = recipe.beta_fast  # it suits the model's size, not one interpolation
    refuse_contradictions(args)
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    args.dtype = args.dtype or compute_dtype(args.device, args.float8)
    if args.float8 and args.dtype != "bfloat16":
        raise InputError("--float8: its results are bfloat16; leave --dtype out")
    if args.float8:
        float8.check(config, args.micro_batch_size * args.train_len, args.device)
    args.keep = args.keep or (2 if args.save_every else 1)


def complete_lora(args, config):
    """Fill in lora_alpha and lora_targets where there are adapters. config: the model's Config."""
    if not args.lora_rank:
        for option in ("lora_alpha", "lora_targets", "lora_train", "adapter"):
            if getattr(args, option):
                raise InputError(f"--{option} belongs to --lora_rank; leave it out or give a rank")
        return
    if args.lora_rank > config.hidden_dim:
        raise InputError(
            f"--lora_rank {args.lora_rank}: this model's weights have at most rank {config.hidden_dim}; "
            "lower it, or leave it out to train them all"
        )
    if args.lora_alpha is None:
        args.lora_alpha = 2 * args.lora_rank
    layers = ",".join(linear_layers(config))
    if args.lora_targets is None:
        args.lora_targets = layers
    for target in args.lora_targets.split(","):
        if target not in layers.split(","):
            raise InputError(f"--lora_targets: this model has no {target}; choose of {layers}")


def complete_lengths(args, window, recipe):
    """Fill in target_len and train_len. window: the model's, in tokens."""
    if args.target_len is None:
        args.target_len = recipe.target_windows * window
    if args.target_len > LARGEST:
        raise InputError(f"--target_len {args.target_len}: at most {LARGEST}")
    if args.target_len < window:
        raise InputError(
            f"--target_len {args.target_len} is smaller than the model's window of {window}; raise it"
        )
    if args.train_len is None and args.method == "full":
        args.train_len = args.target_len
    elif args.train_len is None:
        # Few files of the standard library are longer than one window.
        windows = recipe.train_windows if args.data else 1
        # A quarter of the target leaves room for skips, a quarter of a step for different texts in it.
        longest = max(window, min(args.target_len, recipe.tokens_per_step) // 4)
        args.train_len = min(windows * window, longest)
    if args.target_len < args.train_len:
        raise InputError(
            f"--target_len {args.target_len} is smaller than the train window of {args.train_len}; raise "
            "it or lower --train_len"
        )
    if args.method == "full" and args.train_len != args.target_len:
        raise InputError(
            f"--method full trains on whole windows: leave --train_len out or make it {args.target_len}"
        )


def complete_episodes(args, window, recipe):
    """Fill in retrieval, and episode_len where there are episodes. window: the model's, in tokens."""
    if args.retrieval is None:
        args.retrieval = recipe.retrieval if args.method == "pose" else 0.0
    if args.retrieval and args.method not in ("pose", "pi"):
        raise InputError(f"--retrieval belongs to --method pose and pi; leave it out with {args.method}")
    if not args.retrieval:
        if args.episode_len is not None:
            raise InputError("--episode_len belongs to --retrieval; leave it out or give a share above 0")
        return
    if args.episode_len is None:
        args.episode_len = args.train_len if args.train_len % window else window
    if args.train_len % args.episode_len:
        raise InputError(
            f"--episode_len {args.episode_len} does not divide the {args.train_len} tokens of an example; "
            "choose a divisor"
        )


def complete_batch(args, window, recipe):
    """Fill in batch_size and micro_batch_size. window: the model's, in tokens."""
    if args.batch_size is None:
        # A step has as many tokens whatever the length of an example, as near as the number of processes
        # divides them. (With full it has as many examples as there would be windows.)
        length = window if args.method == "full" else args.train_len
        world = process_count()
        args.batch_size = world * max(1, round(recipe.tokens_per_step / length / world))
    if takes_single_examples(args):
        if args.micro_batch_size not in (None, 1):
            raise InputError(
                f"--micro_batch_size {args.micro_batch_size}: examples go one at a time where episodes are "
                f"shorter than plain windows; leave it out, or give --episode_len {args.train_len}"
            )
        args.micro_batch_size = 1
    _, args.micro_batch_size = split_batch(args.batch_size, args.micro_batch_size, args.train_len)


def takes_single_examples(args):
    """Return whether examples go through the model one at a time.

    Plain windows and shorter episodes do not go through it together, and all processes must make the same
    number of forward passes.
    """
    return 0 < args.retrieval < 1 and args.episode_len < args.train_len


def complete_interpolation(args, config, recipe):
    """Fill in factor, llama_4_scaling_beta and overshoot."""
    window = config.max_position_embeddings
    if args.factor is None and args.rope not in ("default", "dynamic"):
        ratio = recipe.headroom * args.target_len / window
        args.factor = ratio
        if args.rope == "ntk":
            of_model = config.rotary_dim, config.rope_theta, config.rope_scaling
            factor = rope.ntk_factor(*of_model, window, ratio)
            args.factor = float(f"{factor:.3g}")  # rounded to three digits
    if args.llama_4_scaling_beta is None:
        own = (config.rope_scaling or {}).get("llama_4_scaling_beta")
        of_recipe = recipe.llama_4_scaling_beta if families.can_scale_queries(config) else 0.0
        args.llama_4_scaling_beta = of_recipe if own is None else own
    if args.overshoot is None:
        args.overshoot = recipe.overshoot if args.method in ("pose", "randpos") else 1.0


def refuse_contradictions(args):
    """Raise InputError for options that do not go together."""
    if args.eval_lengths and not args.eval_every:
        raise InputError("--eval_lengths belongs to --eval_every and --eval_data; leave it out or add them")
    if bool(args.eval_every) != bool(args.eval_data):
        raise InputError("--eval_every and --eval_data belong together: give both or neither")
    if args.beta_fast is not None and args.rope not in rope.RAMPED:
        raise InputError(f"--beta_fast: --rope {args.rope} does not have it; leave it out or choose yarn")
    if args.factor is not None and args.rope == "default":
        raise InputError("--factor: --rope default interpolates nothing; leave it out or choose a mode")
    if args.method != "pose" and (args.chunks != 2 or args.offset != "uniform"):
        raise InputError(f"--chunks and --offset belong to --method pose; leave them out with {args.method}")
    # An overshoot of 1 is what a run without skips records, and what --resume gives back.
    if args.method not in ("pose", "randpos") and args.overshoot != 1:
        raise InputError(f"--overshoot belongs to --method pose and randpos; leave it out with {args.method}")
    if args.factor is not None and args.factor > LARGEST:
        raise InputError(f"--factor {args.factor:g}: must be a number from 1 to {LARGEST}")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard: not installed here; pip install tensorboard")


def training_record(args, as_given):
    """Return the record of a run for args.json, {option: value}.

    as_given: the options before they were completed. Those of MAY_CHANGE are recorded as given, since their
    defaults depend on the machine.
    """
    record = {option: value for option, value in vars(args).items() if option not in NOT_RECORDED}
    for option in MAY_CHANGE:
        record[option] = getattr(as_given, option)
    return record


def what_stays(record):
    """Return what a checkpoint must have in common with the run of a record, {option or hash: value}."""
    return {key: value for key, value in record.items() if key not in MAY_CHANGE + BY_CONTENT}


def check_same_model_and_texts(out, record):
    """Raise InputError if the run in `out` began with other weights or texts, whatever their paths."""
    earlier = read_json(out / "args.json")
    hashes = {key: value for key, value in record.items() if key.endswith("_sha256")}
    if changed := describe_changes(earlier, hashes):
        paths = describe_changes(earlier, {key: record[key] for key in BY_CONTENT})
        changed = "; ".join(filter(None, (changed, paths)))
        raise InputError(f"--resume: {out} is of another run: {changed}; start again with another --out")


def check_agreement(record):
    """Raise InputError if the processes were started with different arguments."""
    records = [None] * dist.get_world_size()
    dist.all_gather_object(records, record)
    for key in record:
        values = [other.get(key) for other in records]
        if any(value != record[key] for value in values):
            raise InputError(
                f"{key} differs between processes: {values}; start all with the same arguments, texts and "
                "model"
            )


# ---------------------------------------------------------------- what options mean for the plan of a run


def way_of(args, processes):
    """Return the plan.Way of a run with these completed options on so many processes."""
    return plan.Way(
        train_len=args.train_len,
        examples=args.micro_batch_size,
        micro_batches=args.batch_size // processes // args.micro_batch_size,
        processes=processes,
        param_bytes=getattr(torch, args.param_dtype).itemsize,
        compute_bytes=getattr(torch, args.dtype).itemsize,
        activation_checkpointing=args.activation_checkpointing,
        cpu_offload=args.cpu_offload,
        compiled=args.compile,
        float8=args.float8 and not args.lora_rank,
    )


def ways_on_gpus(args, as_given):
    """Return {number of GPUs: plan.Way} of the same batches on 1, 2, 4 and 8 GPUs.

    args, as_given: the options as completed and before. Numbers that do not share a batch evenly are left
    out.
    """
    on_gpu = copy.copy(args)
    on_gpu.dtype = as_given.dtype or compute_dtype("cuda")
    on_gpu.compile = as_given.compile is not False
    micro_batch_size = 1 if takes_single_examples(args) else as_given.micro_batch_size
    ways = {}
    for n in (1, 2, 4, 8):
        with contextlib.suppress(InputError):
            _, on_gpu.micro_batch_size = split_batch(args.batch_size, micro_batch_size, args.train_len, n)
            ways[n] = way_of(on_gpu, n)
    return ways


def as_options(values):
    """Return {option: value} as words of a command line. An option that is True has no value there."""
    words = []
    for option, value in values.items():
        words.append(f"--{option}" if value is True else f"--{option} {value}")
    return " ".join(words)
