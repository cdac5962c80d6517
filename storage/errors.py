"""Errors and warnings for users: one line that says what, where, and what to do.

Whatever comes from outside and cannot be used raises InputError. So a mistake of the user and a bug of ours
stay apart.
"""

import contextlib
import sys

from storage.processes import is_process_0


class InputError(ValueError):
    """Something from outside cannot be used. The message says in one line what, where, and what to do."""


class LocalError(InputError):
    """An InputError that the other processes of a run need not meet, so that each process prints its own."""


def printable(text):
    """Return the text with control characters escaped, because a name in a file must not steer a terminal.

    The middle of a long text is left out.
    """
    if len(text) > 1000:
        text = f"{text[:600]} ... {text[-300:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_warnings = set()


def warn(line, shared=False):
    """Print a warning on stderr, unless this process has printed the same one before.

    shared: all processes of a run meet the same, so that process 0 alone prints it.
    """
    if line not in _warnings and (is_process_0() or not shared):
        _warnings.add(line)
        print(f"warning: {printable(line)}", file=sys.stderr)


@contextlib.contextmanager
def best_effort(action):
    """Turn an OSError of the body into a warning that the action, given in words, is not possible here."""
    try:
        yield
    except OSError as error:
        warn(f"{action} is not possible here ({error.strerror or error}); going on without")


@contextlib.contextmanager
def naming(path, aside=None, stays=False):
    """Make an OSError of the body name `path`, the one that the user knows.

    It takes the place of the temporary name `aside`, and is added where an error names no file, as errors of
    open files do not. stays: say, too, that what was written stays in `aside`.
    """
    try:
        yield
    except OSError as error:
        error.filename = str(error.filename or path)
        if aside:
            error.filename = error.filename.replace(str(aside), str(path))
        if stays:
            error.strerror = f"{error.strerror or error}; what was written stays in {aside}"
        raise
