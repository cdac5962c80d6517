"""Files and folders, written whole or not at all.

Notable choices:
- A file or folder is written under a name that nobody else has, and renamed: a full disk or a kill leaves
  the earlier one whole. What is complete is never removed because something fails afterwards.
- A temporary folder holds the file MARK until it is complete. Only what has it is ever cleaned up.
- What is merely good to have (that a folder's names are on disk, permissions, the removal of what is no
  longer needed) is tried, and a failure is said once.
"""

import contextlib
import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
from pathlib import Path

from storage.errors import InputError, good_to_have, keeping, naming, warn

MARK = ".temporary"  # a file in each folder that may be removed
DATA_IS_LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)  # what fsync says then


def cache_dir():
    """Return the folder for converted models and tokenised texts.

    It is $POSE_CACHE, else one in the user's cache folder. Raise InputError if there is neither.
    """
    if os.environ.get("POSE_CACHE"):
        return Path(os.environ["POSE_CACHE"])
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pose-pytorch"
    except RuntimeError:
        raise InputError("this user has no home folder for a cache; name one in POSE_CACHE") from None


# ---------------------------------------------------------------- locks


@contextlib.contextmanager
def only_one_process(path, busy=None):
    """Hold a lock on the file `path` while the body runs, and remove the file then.

    Another process waits for it. With `busy`, a message, it raises InputError instead. Folders that had to be
    made for the file are removed too, unless something was put there.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        descriptor = _open_locked(path, busy)
        try:
            yield
        finally:
            with good_to_have("removing a lock file"):
                path.unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def _open_locked(path, busy):
    """Return the descriptor of a lock file, made if need be, once this process holds its lock."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whoever held it may remove the file, and its folder, at any moment: then a new one is made.
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            is_held = False
            try:
                has_locks = _lock(descriptor, path, wait=busy is None)
                is_held = not has_locks or os.path.samestat(os.fstat(descriptor), path.stat())
            except BlockingIOError:
                raise InputError(busy) from None
            finally:
                if not is_held:
                    os.close(descriptor)
            if is_held:
                return descriptor


def _lock(descriptor, path, wait):
    """Lock an open file, and return whether its file system has locks; one without is said once.

    Raise BlockingIOError if another process holds it and this one is not to wait.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        raise
    except OSError as error:
        reason = f"the file system has no locks ({error.strerror})"
        warn(f"{path.parent}: {reason}; see to it that only one process at a time works there")
        return False


# ---------------------------------------------------------------- files


def write_json(path, value):
    """Write a value as JSON, as write_file does."""
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def write_file(path, content):
    """Write bytes to a file. The earlier file stays whole until the new one is complete.

    Where `path` is a link, it stays, and what it leads to is written. A device or a pipe is written into.
    Raise InputError for a pipe that nobody reads.
    """
    if is_stream(path):
        _write_into(path, content)
        return
    target = Path(os.path.realpath(path))
    aside = _new_name(target)
    try:
        with naming(path, aside):
            aside.write_bytes(content)
            _wait_until_on_disk(aside)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    with keeping(aside), naming(path, aside):
        aside.replace(target)


def is_stream(path):
    """Return whether a path is a device, a pipe or an open file: written into, never replaced or read."""
    path = Path(path)
    is_open_file = str(path.absolute()).startswith(("/dev/std", "/dev/fd/", "/proc/"))
    return is_open_file or (path.exists() and not path.is_file() and not path.is_dir())


def _write_into(path, content):
    """Write bytes to a device or a pipe."""
    try:  # without O_NONBLOCK a pipe would wait for a reader, for ever if none comes
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise InputError(f"{path}: nobody reads this pipe; start its reader first") from None
        raise
    with naming(path), open(descriptor, "wb") as stream:
        os.set_blocking(descriptor, True)
        stream.write(content)


# ---------------------------------------------------------------- folders


@contextlib.contextmanager
def new_folder(path, is_ours=None):
    """Yield an empty folder beside `path` to write into.

    At the end it becomes `path`, see replace_folder; after an error in the body it is removed.
    """
    remove_left_overs(path.parent, glob.escape(path.name))
    aside = temporary_folder(path)
    with open(aside / MARK, "ab") as mark:
        _lock(mark.fileno(), path, wait=False)  # so that nobody takes it for a left-over
        try:
            with naming(path, aside):
                yield aside
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, InputError):  # it may name the folder that is gone
                raise InputError(str(error).replace(str(aside), str(path))) from None
            raise
        replace_folder(aside, path, is_ours)


def temporary_folder(path):
    """Make an empty folder beside `path`, of a name that nobody has, and return it. MARK is in it."""
    folder = _new_name(path)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
    return folder


def _new_name(path):
    """Return a path beside `path` at which there is nothing."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


def remove_left_overs(parent, name):
    """Remove the temporary folders that a kill has left. name: of what they would have become, a pattern."""
    for folder in parent.glob(f"{name}.*.tmp"):
        with good_to_have("removing a left-over"):
            if (folder / MARK).is_file() and not _is_in_use(folder):
                _remove_temporary(folder)


def _remove_temporary(folder):
    """Remove a temporary folder, and MARK last, so that a kill leaves one that is known as such."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()
    shutil.rmtree(folder)


def _is_in_use(temporary):
    """Return whether a process is writing a temporary folder, or might be: without locks nobody can tell."""
    with open(temporary / MARK, "ab") as mark:
        try:
            return not _lock(mark.fileno(), temporary, wait=False)
        except BlockingIOError:
            return True


def replace_folder(new, old, is_ours=None):
    """Rename the complete folder `new` to `old` once its files are on disk.

    is_ours: None, or a function that tells from a name whether this code writes such a file. Without it, a
    folder that is there is an OSError. With it, that one stays whole until the last moment, and is removed
    then; one with other files stays under another name, which is said. After an error `new` stays.
    """
    before = _new_name(old)
    with keeping(new), naming(old, new):
        for path in (*new.rglob("*"), new):
            _wait_until_on_disk(path)
        (new / MARK).unlink(missing_ok=True)
        has_earlier = is_ours is not None and old.exists()
        if has_earlier:
            old.rename(before)
        try:
            new.rename(old)
        except BaseException:
            if has_earlier:
                before.rename(old)
            raise
    _wait_until_on_disk(old.parent)
    if has_earlier:
        others = sorted(path.name for path in before.iterdir() if not is_ours(path.name))
        if others:
            warn(f"{old} was replaced; the earlier one lies in {before}, for it holds {others[0]}")
        else:
            remove_folder(before)


def remove_folder(path):
    """Remove a folder, if that is possible. A kill leaves it whole or in a temporary folder."""
    with good_to_have("removing a folder that is not needed"):
        aside = temporary_folder(path)
        path.rename(aside / path.name)
        _remove_temporary(aside)


def _wait_until_on_disk(path):
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in DATA_IS_LOST and not path.is_dir():
            raise OSError(error.errno, error.strerror, str(path)) from None
        warn(f"waiting until files are on disk is not possible here ({error.strerror}); going on without")
