"""What is said of errors: one line that says what, where, and what to do.

Whatever comes from outside and cannot be used raises InputError, so that a mistake of the user and a bug of
ours stay apart.
"""

import contextlib
import sys


class InputError(ValueError):
    """Something from outside cannot be used. The message says in one line what, where, and what to do."""


class LocalError(InputError):
    """An InputError that the other processes of a run need not meet, so that each says its own."""


def printable(text):
    """Return a text in which control characters are escaped: a name in a file must not steer a terminal.

    Of a long one the middle is left out.
    """
    if len(text) > 1000:
        text = f"{text[:600]} ... {text[-300:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_warnings = set()


def warn(line):
    """Print a warning on stderr, each one once in a process."""
    if line not in _warnings:
        _warnings.add(line)
        print(f"warning: {printable(line)}", file=sys.stderr)


@contextlib.contextmanager
def good_to_have(action):
    """Try the body. An OSError there is a warning with what was tried (once), and not the end of the work."""
    try:
        yield
    except OSError as error:
        warn(f"{action} is not possible here ({error.strerror or error}); going on without")


@contextlib.contextmanager
def naming(path, aside=None):
    """Have an OSError of the body name `path` where it names no file, as those of open files, or `aside`.

    aside: the temporary name of `path`.
    """
    try:
        yield
    except OSError as error:
        error.filename = str(error.filename or path)
        if aside:
            error.filename = error.filename.replace(str(aside), str(path))
        raise


@contextlib.contextmanager
def keeping(written):
    """Have an OSError of the body say where that lies which was written before."""
    try:
        yield
    except OSError as error:
        error.strerror = f"{error.strerror or error}; what was written stays in {written}"
        raise
