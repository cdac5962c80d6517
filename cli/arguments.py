"""Options of every command: a parser, types that check a value, and checks of several options.

Types and ranges stand here, so that what a library function gets is in order. What depends on the model is
checked where train.py's options are completed, in completion.py.
"""

import argparse
import os
import shlex
from pathlib import Path

from storage.errors import InputError, warn
from storage.files import is_stream
from storage.log import half_trained_run

LARGEST = 2**31  # length in tokens, or factor
LARGEST_SEED = 2**63 - 1
LARGEST_LR = 1  # AdamW moves every weight by about so much in a step


class ArgumentParser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError for a mistake, in one line without the usage text."""

    def error(self, message):
        command = self.prog if self.prog.startswith("python ") else f"python {self.prog}"
        raise InputError(f"{message.removeprefix('argument ')}; see {command} --help")


# ---------------------------------------------------------------- types


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


def number(least, most):
    """Return the type of an option that takes numbers from `least` to `most`."""
    allowed = f"a number from {least} to {most}"

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {allowed}, not {text[:40]!r}") from None
        if not least <= value <= most:  # NaN is in no range
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


def doubling(first, end):
    """Return first, 2 * first, 4 * first and so on, as far as they are below `end`, a list."""
    numbers = []
    while first < end:
        numbers.append(first)
        first *= 2
    return numbers


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


# ---------------------------------------------------------------- several options


def refuse_one_file_for_two(args):
    """Raise InputError if --json and --plot name the same file."""
    if args.json is None or args.plot is None or is_stream(args.plot):
        return
    if os.path.realpath(args.json) == os.path.realpath(args.plot):
        raise InputError(f"--plot {args.plot}: --json is written there; name another file")


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
    if out := half_trained_run(model):
        going_on = shlex.join(["python", "train.py", "--resume", "--out", str(out)])
        warn(f"{model} is half-trained, its run was interrupted; it goes on with: {going_on}")


def as_words(values):
    """Return {option: value} as the words of a command line, a list.

    True stands for an option without a value, a list for all of its values. None and [] are left out.
    """
    words = []
    for option, value in values.items():
        if value is True:
            words.append(f"--{option}")
        elif value not in (None, []):
            words += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    return words


def as_options(values):
    """Return {option: value} as a piece of a command line, a text."""
    return " ".join(as_words(values))
