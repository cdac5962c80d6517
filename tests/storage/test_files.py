"""Files and folders are written whole or not at all, and nobody else's are removed."""

import errno
import fcntl
import json
import os
import threading
from pathlib import Path

import pytest

from storage import errors, files
from storage.errors import InputError, naming, printable
from storage.files import MARK, new_folder, only_one_process, temporary_folder, write_file, write_json


@pytest.fixture(autouse=True)
def warnings(monkeypatch):
    """The warnings of a test, each of which is said once in a process."""
    monkeypatch.setattr(errors, "_warnings", set())
    return errors._warnings


def failing(number):
    """Return a function that fails as a system call does, with this error number."""

    def fail(*arguments, **others):
        raise OSError(number, os.strerror(number))

    return fail


def contents(folder):
    """Return {name: text, or contents of a folder} of all that is in a folder."""
    return {path.name: contents(path) if path.is_dir() else path.read_text() for path in folder.iterdir()}


# ---------------------------------------------------------------- files


def test_a_json_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"first": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", failing(errno.ENOSPC))
        with pytest.raises(OSError) as told:
            write_json(path, {"second": 2})
    assert told.value.filename == str(path) and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(Path, "replace", failing(errno.EBUSY))  # such as a file that Docker mounted there
    with pytest.raises(OSError, match="stays in ") as told:
        write_json(path, {"second": 2})
    assert json.loads(path.read_text()) == {"first": 1}
    assert json.loads(Path(str(told.value).split("stays in ")[1].split(":")[0]).read_text()) == {"second": 2}


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "r.json", tmp_path / "elsewhere" / "r.json"
    link.symlink_to(target)
    for content in (b"first", b"second"):
        write_file(link, content)
        assert link.is_symlink() and target.read_bytes() == content
    assert list(target.parent.iterdir()) == [target]


def test_a_device_is_written_into(tmp_path):
    """As root, renaming a file to /dev/null would replace it for the whole machine."""
    link = tmp_path / "nowhere"
    link.symlink_to(os.devnull)
    write_file(link, b"text")
    write_file(os.devnull, b"text")
    assert link.is_symlink() and Path(os.devnull).is_char_device() and list(tmp_path.iterdir()) == [link]


def test_a_pipe_gets_all_and_is_refused_without_a_reader(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="nobody reads"):
        write_file(pipe, b"text")
    content, read = os.urandom(2**18), []  # more than a pipe holds
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    while True:
        try:
            write_file(pipe, content)
            break
        except InputError:  # until the thread has opened it
            pass
    reader.join()
    assert read == [content] and pipe.is_fifo()


def test_an_open_file_is_added_to_and_not_replaced(tmp_path):
    """Such as /dev/stdout where a shell has redirected it."""
    path = tmp_path / "log"
    with open(path, "wb", buffering=0) as log:
        log.write(b"earlier\n")
        write_file(f"/dev/fd/{log.fileno()}", b"text\n")
    assert path.read_text() == "earlier\ntext\n"


# ---------------------------------------------------------------- folders


def is_ours(name):
    return name == "weights"


def make(path, content, is_ours=is_ours):
    """Write a folder that holds the one file `weights`."""
    with new_folder(path, is_ours) as aside:
        (aside / "weights").write_text(content)


@pytest.mark.parametrize("replace", [is_ours, None])
def test_a_folder_is_there_when_it_is_whole(tmp_path, replace):
    path = tmp_path / "model"
    with pytest.raises(InputError, match=rf"^{path}/weights: no$"):  # and not the name of what is gone
        with new_folder(path, replace) as aside:
            (aside / "weights").write_text("half")
            assert not path.exists()
            raise InputError(f"{aside / 'weights'}: no")
    assert contents(tmp_path) == {}
    make(path, "whole", is_ours=replace)
    assert contents(tmp_path) == {"model": {"weights": "whole"}}
    if replace:
        make(path, "new", is_ours)
        assert contents(tmp_path) == {"model": {"weights": "new"}}
    else:
        with pytest.raises(OSError, match="stays in "):
            make(path, "new", None)
        assert contents(path) == {"weights": "whole"}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path, monkeypatch, warnings, number):
    fsync = os.fsync

    def fsync_files_alone(descriptor):
        return failing(number)() if os.path.isdir(f"/proc/self/fd/{descriptor}") else fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_files_alone)
    for content in ("first", "second"):
        make(tmp_path / "model", content)
        assert contents(tmp_path) == {"model": {"weights": content}}
    assert len(warnings) == 1


def test_a_file_that_did_not_reach_the_disk_is_told_and_kept(tmp_path, monkeypatch):
    make(tmp_path / "model", "first")
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="stays in ") as told:
        make(tmp_path / "model", "second")
    assert told.value.errno == errno.EIO and told.value.filename == str(tmp_path / "model" / "weights")
    assert contents(tmp_path / "model") == {"weights": "first"}
    (aside,) = tmp_path.glob("model.*")
    assert (aside / "weights").read_text() == "second" and str(aside) in str(told.value)


def test_a_name_that_cannot_be_given_costs_neither_folder(tmp_path, monkeypatch):
    make(tmp_path / "model", "first")
    rename = Path.rename

    def rename_all_but_the_new_one(path, to):
        is_new = (path / "weights").read_text() == "second"
        return failing(errno.EBUSY)() if is_new else rename(path, to)

    monkeypatch.setattr(Path, "rename", rename_all_but_the_new_one)
    with pytest.raises(OSError, match="stays in ") as told:
        make(tmp_path / "model", "second")
    assert contents(tmp_path / "model") == {"weights": "first"}
    (aside,) = tmp_path.glob("model.*")
    assert contents(aside) == {"weights": "second"} and str(aside) in str(told.value)


def test_an_earlier_folder_that_cannot_be_removed_is_no_failure(tmp_path, monkeypatch, warnings):
    """As on NFS, while somebody has a file of it open."""
    make(tmp_path / "model", "first")
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", failing(errno.ENOTEMPTY))
        make(tmp_path / "model", "second")
    assert contents(tmp_path / "model") == {"weights": "second"} and len(warnings) == 1
    make(tmp_path / "model", "third")  # later it can be, and what stayed goes too
    assert contents(tmp_path) == {"model": {"weights": "third"}}


def test_what_somebody_put_into_a_folder_stays(tmp_path, warnings):
    make(tmp_path / "model", "first")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    make(tmp_path / "model", "second")
    assert contents(tmp_path / "model") == {"weights": "second"}
    (warning,) = warnings
    earlier = Path(warning.split("lies in ")[1].split(",")[0])
    assert contents(earlier) == {"weights": "first", "notes.txt": "mine"}
    make(tmp_path / "model", "third")
    assert contents(earlier) == {"weights": "first", "notes.txt": "mine"}


def test_only_left_overs_of_ours_are_removed(tmp_path):
    for name in ("model.tmp", "model.before", "model.0123abcd.tmp", "model.backup"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_text("a user's")
    users = contents(tmp_path)
    left_over, live = temporary_folder(tmp_path / "model"), temporary_folder(tmp_path / "model")
    (left_over / "weights").write_text("half")
    with open(live / MARK, "ab") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)  # as the process that writes it does
        make(tmp_path / "model", "whole")
    assert not left_over.exists() and live.exists()
    make(tmp_path / "model", "whole")
    assert contents(tmp_path) == users | {"model": {"weights": "whole"}}


# ---------------------------------------------------------------- locks


def test_one_process_at_a_time(tmp_path):
    lock = tmp_path / "lock"
    with only_one_process(lock, "busy"):
        for _ in range(2):
            with pytest.raises(InputError, match="busy"):
                with only_one_process(lock, "busy"):
                    pass
        entered = []

        def wait():
            with only_one_process(lock):
                entered.append(lock.exists())

        other = threading.Thread(target=wait)
        other.start()
        other.join(0.2)
        assert not entered
    other.join()
    # The file was removed while the other one waited for it, so it made a new one.
    assert entered == [True] and list(tmp_path.iterdir()) == []


def test_a_folder_that_was_made_for_a_lock_goes_unless_something_is_in_it(tmp_path):
    with only_one_process(tmp_path / "a" / "b" / "lock", "busy"):
        pass
    assert contents(tmp_path) == {}
    with only_one_process(tmp_path / "a" / "b" / "lock", "busy"):
        (tmp_path / "a" / "data").write_text("text")
    assert contents(tmp_path) == {"a": {"data": "text"}}


def test_a_lock_where_no_file_can_be_made(tmp_path, monkeypatch):
    """As in /proc, where that is "No such file or directory"."""
    monkeypatch.setattr(os, "open", failing(errno.ENOENT))
    with pytest.raises(FileNotFoundError):
        with only_one_process(tmp_path / "lock", "busy"):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(fcntl, "flock", failing(number))
    for _ in range(2):
        with only_one_process(tmp_path / "lock", "busy"):
            pass
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"{tmp_path}: the file system has no locks" in told
    left_over = temporary_folder(tmp_path / "model")
    make(tmp_path / "model", "whole")
    assert left_over.exists()  # it could be another process's


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize("name", [None, "part.1a2b.tmp/weights", "elsewhere"])
def test_an_error_of_the_system_names_the_path_of_the_user(name):
    with pytest.raises(OSError) as told:
        with naming("part", "part.1a2b.tmp"):
            raise OSError(errno.EIO, "Input/output error", name)
    assert told.value.filename == {None: "part", "elsewhere": "elsewhere"}.get(name, "part/weights")


@pytest.mark.parametrize("text", ["\x1b[2Jname", "two\nlines", "\x07", "\u202etxt.exe", "\x9b31m", "\udcff"])
def test_control_characters_are_escaped(text):
    shown = printable(text)
    assert shown.isprintable() and shown.encode().decode("unicode_escape") == text
    assert printable("Grüße, 50 ± 3 …") == "Grüße, 50 ± 3 …"


@pytest.mark.parametrize("rank, told", [("0", "of its own, of all, of all again"), ("1", "of its own")])
def test_what_all_processes_meet_is_said_by_the_first(capsys, monkeypatch, rank, told):
    """And once by each process."""
    monkeypatch.setenv("RANK", rank)
    errors.warn("of its own")
    errors.warn("of its own")
    errors.warn("of all", shared=True)
    errors.warn("of all again", shared=True)
    assert capsys.readouterr().err == "".join(f"warning: {line}\n" for line in told.split(", "))
