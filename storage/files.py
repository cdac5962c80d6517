"""Files and folders, written whole or not at all.

Notable choices:
- A file or folder is written under a temporary name and then renamed. So a full disk or a kill leaves the
  earlier one whole. What is complete is never removed because something fails afterwards.
- A temporary folder holds the file MARK until it is complete. Only folders that hold it are ever cleaned up.
- Syncing a folder and removing what is no longer needed are best effort: a failure is a warning, given once.
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

from storage.errors import InputError, best_effort, naming, warn

MARK = ".temporary"  # a file in each folder that may be removed
MOST_ATTEMPTS = 10_000  # to open a lock file that others keep removing
DATA_IS_LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)  # errors of fsync after which a file is not on disk


def cache_dir():
    """Return the folder for converted models and tokenised texts: $POSE_CACHE, else one in the user's cache.

    Raise InputError if there is neither.
    """
    if os.environ.get("POSE_CACHE"):
        return Path(os.environ["POSE_CACHE"])
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pose-pytorch"
    except RuntimeError:
        raise InputError("this user has no home folder for a cache; name one in POSE_CACHE") from None


def existing_folder(path):
    """Return the inmost folder of a path that is there already, the path itself if it is."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


# ---------------------------------------------------------------- locks


@contextlib.contextmanager
def only_one_process(path, busy=None):
    """Hold a lock on the file `path` while the body runs.

    Where another process holds it, wait; with `busy`, raise InputError with that message instead. At the end
    the file is removed, and so are folders that were made for it, unless something was put there.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        with _open_locked(path, busy):
            try:
                yield
            finally:
                with best_effort("removing a lock file"):
                    path.unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def _open_locked(path, busy):
    """Return the lock file, opened, once this process holds its lock. It is made if need be."""
    attempts = 0
    while True:
        attempts += 1
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                file = stack.enter_context(open(descriptor, "wb"))
                has_locks = _lock(file, path, wait=busy is None)
                if not has_locks or os.path.samestat(os.fstat(descriptor), path.stat()):
                    stack.pop_all()
                    return file
            except BlockingIOError:
                raise InputError(busy) from None
            except FileNotFoundError:
                # Whoever held the lock has removed the file, perhaps with its folder, and a new one must be
                # made. Where nobody can make files, as in /proc, that fails every time.
                if attempts >= MOST_ATTEMPTS:
                    raise


def _lock(file, path, wait):
    """Lock an open file. Return whether its file system has locks; warn if it has none.

    Raise BlockingIOError if another process holds the lock, unless this one is to wait.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        raise
    except OSError as error:
        reason = f"the file system has no locks ({error.strerror})"
        warn(f"{path.parent}: {reason}; see to it that only one process at a time works there")
        return False


# ---------------------------------------------------------------- files


def write_json(path, value):
    """Write a value to a file as JSON, in the way of write_file."""
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def write_file(path, content):
    """Write bytes to a file. An earlier file stays whole until the new one is complete.

    A link stays, and the file that it leads to is replaced. A device, a pipe or an open file is written into,
    see is_stream. Raise InputError for a pipe that nobody reads.
    """
    if is_stream(path):
        _write_into(path, content)
        return
    target = Path(os.path.realpath(path))
    aside = _temporary_name(target)
    try:
        with naming(path, aside):
            aside.write_bytes(content)
            _wait_until_on_disk(aside)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    with naming(path, aside, stays=True):
        aside.replace(target)


def is_stream(path):
    """Return whether a path is a device, a pipe or an open file, which must not be replaced by a new file."""
    path = Path(path)
    is_open_file = str(path.absolute()).startswith(("/dev/std", "/dev/fd/", "/proc/"))
    return is_open_file or (path.exists() and not path.is_file() and not path.is_dir())


def _write_into(path, content):
    """Write bytes to a device, a pipe or an open file."""
    try:  # Without O_NONBLOCK, opening a pipe would wait for a reader, for ever if none comes.
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
    """Yield an empty temporary folder beside `path` to write into.

    At the end it becomes `path`, see replace_folder. After an error in the body it is removed.
    """
    remove_left_overs(path.parent, glob.escape(path.name))
    aside = temporary_folder(path)
    with open(aside / MARK, "ab") as mark:
        _lock(mark, path, wait=False)  # so that nobody takes it for a left-over
        try:
            with naming(path, aside):
                yield aside
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, InputError):  # its message may name the temporary folder
                raise InputError(str(error).replace(str(aside), str(path))) from None
            raise
        replace_folder(aside, path, is_ours)


def temporary_folder(path):
    """Make a folder beside `path` that holds nothing but MARK, and return it."""
    folder = _temporary_name(path)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
    return folder


def _temporary_name(path):
    """Return a path beside `path` that nobody else uses."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


def remove_left_overs(parent, name):
    """Remove the temporary folders in `parent` that a kill has left.

    name: a glob pattern of the name that they would have got.
    """
    for folder in parent.glob(f"{name}.*.tmp"):
        with best_effort("removing a left-over"):
            if (folder / MARK).is_file() and not _is_in_use(folder):
                _remove_temporary(folder)


def _remove_temporary(folder):
    """Remove a temporary folder. MARK goes last, so that what a kill leaves can still be told by it."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()
    shutil.rmtree(folder)


def _is_in_use(temporary):
    """Return whether a process may be writing a temporary folder. Without locks nobody can tell."""
    with open(temporary / MARK, "ab") as mark:
        try:
            return not _lock(mark, temporary, wait=False)
        except BlockingIOError:
            return True


def replace_folder(new, old, is_ours=None):
    """Rename the complete folder `new` to `old` once its files are on disk. After an error `new` stays.

    is_ours: a function that tells from a file's name whether this code writes such files, or None. With None,
    an earlier folder `old` is an OSError. Otherwise it stays whole until the last moment and is then removed,
    but if it holds a file that is not ours, it is kept under another name, with a warning.
    """
    earlier = _temporary_name(old)
    with naming(old, new, stays=True):
        for path in (*new.rglob("*"), new):
            _wait_until_on_disk(path)
        (new / MARK).unlink(missing_ok=True)
        has_earlier = is_ours is not None and old.exists()
        if has_earlier:
            old.rename(earlier)
        try:
            new.rename(old)
        except BaseException:
            if has_earlier:
                earlier.rename(old)
            raise
    _wait_until_on_disk(old.parent)
    if has_earlier:
        others = sorted(path.name for path in earlier.iterdir() if not is_ours(path.name))
        if others:
            warn(f"{old} was replaced; the earlier one lies in {earlier}, for it holds {others[0]}")
        else:
            remove_folder(earlier)


def remove_folder(path):
    """Remove a folder, if that is possible. A kill leaves it whole, or in a temporary folder."""
    with best_effort("removing a folder that is not needed"):
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
