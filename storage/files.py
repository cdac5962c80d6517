"""Files and folders: read with one-line errors, and written whole or not at all.

Notable choices:
- Whatever comes from outside and cannot be used raises InputError, so that a mistake of the user and a
  bug of ours stay apart.
- A file or folder is written aside and renamed: a full disk or a kill leaves the earlier one whole.
"""

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path


class InputError(ValueError):
    """Something from outside cannot be used. The message says in one line what, where, and what to do."""


def cache_dir():
    """Return the folder for converted models and tokenised texts.

    It is $POSE_CACHE, else one in the user's cache folder.
    """
    if os.environ.get("POSE_CACHE"):
        return Path(os.environ["POSE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pose-pytorch"


def read_json(path):
    """Return the JSON object in a file as a dict.

    Raise InputError if the file cannot be read or holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object; copy it again")
    return content


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
