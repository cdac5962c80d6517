"""Files and folders: read with one-line errors, and written whole or not at all.

Notable choices:
- Whatever comes from outside and cannot be used raises InputError, so that a mistake of the user and a
  bug of ours stay apart.
- A file or folder is written aside and renamed: a full disk or a kill leaves the earlier one whole.
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
import sys
from pathlib import Path


class InputError(ValueError):
    """Something from outside cannot be used. The message says in one line what, where, and what to do."""


class LocalError(InputError):
    """An InputError that the other processes of a run need not meet, so that each says its own."""


def cache_dir():
    """Return the folder for converted models and tokenised texts.

    It is $POSE_CACHE, else one in the user's cache folder.
    """
    if os.environ.get("POSE_CACHE"):
        return Path(os.environ["POSE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pose-pytorch"


# ---------------------------------------------------------------- what is said of errors


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


# ---------------------------------------------------------------- JSON and the numbers in it

MAX_JSON_BYTES = 2**28
MAX_DEPTH = 100  # of lists and objects inside each other
MAX_DIGITS = 400  # of a whole number


def read_json(path):
    """Return the JSON object in a file as a dict.

    Raise InputError if the file cannot be read or holds something else, see parse_object.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'not a regular file' if path.exists() else 'missing'}; copy it again")
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES:,} bytes")
        return parse_object(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror}); check its permissions") from None
    except ValueError as error:
        raise InputError(f"{path}: not readable ({error}); copy it again") from None


def parse_object(content):
    """Return the JSON object in bytes as a dict.

    Raise ValueError if they hold something else, or what no program can use: numbers that are not finite or
    have thousands of digits, halves of characters, lists inside lists without end.
    """
    parsed = parse_json(content)
    if not isinstance(parsed, dict):
        raise ValueError("not a JSON object")
    level = [parsed]
    for _ in range(MAX_DEPTH):
        inside = []
        for value in level:
            if isinstance(value, dict):
                inside += [*value, *value.values()]
            elif isinstance(value, list):
                inside += value
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError("a number that is NaN or infinite")
            elif isinstance(value, str):
                check_characters(value)
        if not inside:
            return parsed
        level = inside
    raise ValueError("nested too deeply")


def parse_json(content):
    """Return the value that JSON in UTF-8 bytes describes. Raise ValueError if they are something else."""
    try:
        return json.loads(content.decode("utf-8-sig"), parse_int=_whole_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON at character {error.pos}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_characters(text):
    """Raise ValueError for half a character: a surrogate alone, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half a character, which is no text") from None


def _whole_number(digits):
    """Return the int that digits spell. Raise ValueError if there are more than MAX_DIGITS."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def positive(values, key, kind=float, most=1e30, default=None):
    """Return the positive number under a key of a dict that was read from a file.

    kind: int for whole numbers alone, float for any. default: for a key that is absent or null. Raise
    ValueError if there is no number, or one that is not positive or larger than `most`.
    """
    value = values.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"{key} is missing")
    allowed = (int,) if kind is int else (int, float)
    if type(value) not in allowed or not 0 < value:
        raise ValueError(f"{key} is {value!r}, not a positive {'whole ' if kind is int else ''}number")
    if value > most:
        raise ValueError(f"{key} is {value}, more than the {most:,} that a model may have")
    return kind(value)


# ---------------------------------------------------------------- writing


def write_json(path, value):
    """Write a value as JSON. The earlier file stays whole until the new one is complete."""
    aside = path.with_name(path.name + ".part")
    try:
        aside.write_text(json.dumps(value, indent=2) + "\n")
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def describe_changes(earlier, now):
    """Return in words where two records {setting: value} differ, "" where they do not.

    Settings that `now` lacks are not compared.
    """
    differences = []
    for key, value in now.items():
        if earlier.get(key) != value:
            differences.append(f"{key} was {earlier.get(key)}, now {value}")
    return "; ".join(differences)


@contextlib.contextmanager
def only_one_process(path):
    """Hold a lock on the file `path` while the body runs: one process of this machine at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def new_folder(path):
    """Yield an empty folder beside `path` to write into.

    At the end it becomes `path`; after an error it is removed.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        replace_folder(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def replace_folder(new, old):
    """Rename the folder `new` to `old` once its files are on disk.

    What was there stays whole until the last moment.
    """
    before = old.with_name(old.name + ".before")
    shutil.rmtree(before, ignore_errors=True)
    for path in (*new.rglob("*"), new):
        _wait_until_on_disk(path)
    if old.exists():
        old.rename(before)
    new.rename(old)
    _wait_until_on_disk(old.parent)
    shutil.rmtree(before, ignore_errors=True)


def _wait_until_on_disk(path):
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
