"""A command as a process: its device, one-line errors, exit codes, signals, and the files it alone may write.

Exit codes: 0 done, 2 input that cannot be used (one line on stderr says what, where, and what to do), 130
interrupted; and a training run that a signal has stopped ends with 128 + its number.
"""

import contextlib
import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from storage.errors import InputError, LocalError, printable
from storage.files import existing_folder, is_stream, only_one_process
from storage.processes import is_process_0, is_under_torchrun, local_rank

# ---------------------------------------------------------------- devices


def device(named):
    """Return the device that --device names, "cuda" or "cpu". None stands for cuda if there is one.

    Raise InputError if CUDA is named and absent, or has fewer devices than there are processes.
    """
    if named == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device here; leave it out to run on the CPU")
    kind = named or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and local_rank() >= torch.cuda.device_count():
        raise InputError(
            f"more processes than GPUs: this machine has {torch.cuda.device_count()}; lower --nproc_per_node"
        )
    return kind


def compute_dtype(kind, in_float8=False):
    """Return the name of the dtype in which a model computes on "cuda" or "cpu", unless told otherwise.

    in_float8: whether its products are in float8, whose results are bfloat16.
    """
    return "bfloat16" if kind == "cuda" or in_float8 else "float32"


# ---------------------------------------------------------------- errors and exit codes


def run(main):
    """Call main(). End with one line and exit code 2 after an error that is no bug: see one_line."""
    open_closed_streams()
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
        is_reported_here = not is_shared or local_rank() == 0
        if not is_reported_here and is_under_torchrun():
            # The process that reports it ends, and then torchrun ends this one. If that does not happen, this
            # process has met the error alone, as the one that tokenises does while others wait for it.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(20)
            is_reported_here = True
        if is_reported_here:
            line = f"error: {printable(message)}"
            print(line, file=sys.stderr)
            tell_torchrun(line)
        sys.exit(2)


def tell_torchrun(line):
    """Let torchrun's own report of a failure, dozens of lines after ours, end with this line as the cause.

    torchrun names a file for that in the environment, see torch.distributed.elastic.multiprocessing.errors.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):  # the line itself is on stderr already
            Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))


def open_closed_streams():
    """Open /dev/null in the place of each standard stream that was closed when the program began.

    Python has None for it: what is printed to such a stderr would go to stdout. The next file to be opened
    would get the stream's descriptor, into which libraries write. sys.stdin stays None: nothing is piped in.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number, which is this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))  # as Python's own stderr


DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
REMEDIES = {  # for errors of the system
    errno.EFBIG: "files may not be so large here; raise the limit (ulimit -f) or take another disk",
    errno.EIO: "the disk, or the way to it, has failed; take another one",
    errno.EPIPE: "its reader has gone",
}


def one_line(error):
    """Return the line for an error that is no bug, None for a bug.

    What is no bug: a mistake of the user, a file that cannot be used or written, full memory, and the end of
    another process.
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
    open_closed_streams()
    sys.stderr = LastingStderr(sys.stderr)
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
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


# ---------------------------------------------------------------- signals


def catch_signals(checkpoints):
    """Catch SIGINT, SIGTERM and SIGHUP from here on, and return the list to which each adds its number.

    They do not end the process, but a second Ctrl-C does. checkpoints: the storage.checkpoint.Checkpoints
    that tell what that would cost.
    """
    caught = []
    speaks = dist.get_rank() == 0
    # torchrun passes signals on several times, and kills after a while itself.
    may_end_at_once = not is_under_torchrun()

    def tell(line):
        if speaks:
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, f"\n{line}\n".encode())  # print may be in the middle of something

    def catch(number, frame):
        lost = f"what came after step {checkpoints.newest}" if checkpoints.newest else "all steps so far"
        if number == signal.SIGINT and number in caught and may_end_at_once:
            tell(f"ended at once and discarded {lost}")
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


# ---------------------------------------------------------------- files that one process alone may write


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


@contextlib.contextmanager
def own_out(out):
    """Keep other runs from the folder of --out while the body runs. Process 0 holds a lock there.

    Raise InputError if another run uses it.
    """
    busy = f"--out {out}: another run is using it; wait for its end, or name another folder"
    with only_one_process(out / ".lock", busy) if is_process_0() else contextlib.nullcontext():
        yield


def check_out(out):
    """Raise InputError if --out cannot be a folder, or lies inside what another run writes and removes."""
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise InputError(f"--out {out}: {path} is a file; name a folder")
    folder = existing_folder(out)
    if not os.access(folder, os.W_OK):
        raise InputError(f"--out {out}: {folder} cannot be written to; name another folder")
    resolved = out.resolve()
    for path in (resolved, *resolved.parents):
        if path.name in ("checkpoints", "model", "adapter") and (path.parent / "args.json").exists():
            raise InputError(f"--out {out}: {path.parent} is another run's; name a folder outside of it")
