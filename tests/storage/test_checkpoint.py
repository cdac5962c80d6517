"""What a checkpoint is on disk: when it gets its name, what is checked, what is passed over."""

import enum
import errno
import itertools
import json
import os
import pathlib
import pickle
import shutil
import sys
import threading
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fsdp
from storage import errors
from storage.checkpoint import Checkpoints
from storage.errors import InputError
from storage.files import temporary_folder


@pytest.fixture(autouse=True)
def process_group():
    """Checkpoints are made in a process group, here of this process alone."""
    fsdp.start("cpu")
    yield
    dist.destroy_process_group()


def model_and_optimizer(value):
    """Return a model whose weights are all `value`, and its optimizer."""
    model = torch.nn.Linear(4, 4)
    torch.nn.init.constant_(model.weight, value)
    return model, torch.optim.AdamW(model.parameters())


def save(checkpoints, step):
    """Write a checkpoint whose weights are the number of its step."""
    checkpoints.save(*model_and_optimizer(step), step)
    checkpoints.finish()


def load(checkpoints):
    """Load the newest checkpoint, and return its step and the warnings of damage.

    Its weights must be those of its step.
    """
    model, optimizer = model_and_optimizer(0)
    errors._warnings.clear()
    step = checkpoints.load(model, optimizer)
    assert bool((model.weight == step).all())
    return step, [line for line in errors._warnings if "damaged" in line]


def fail_with(number):
    """Return a function that fails as a system call does, with this error number."""

    def fail(*arguments, **others):
        raise OSError(number, os.strerror(number))

    return fail


def names(folder):
    """Return the names of what is in a folder."""
    return {path.name for path in folder.iterdir()}


def test_a_checkpoint_has_its_name_only_when_it_is_on_disk(tmp_path, monkeypatch):
    """Every file and the folder are on disk before the rename.

    The name is on disk before an older checkpoint goes.
    """
    happened = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor):
        happened.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_rename(path, to):
        happened.append(("rename", str(to)))
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    folder = tmp_path / "c"
    checkpoints = Checkpoints(folder, {}, 1)
    save(checkpoints, 1)
    happened.clear()
    save(checkpoints, 2)
    named = happened.index(("rename", str(folder / "step-2")))
    on_disk = {path for what, path in happened[:named] if what == "sync"}
    (aside,) = (path for path in on_disk if Path(path).name.startswith("step-2."))
    assert on_disk >= {f"{aside}/{name}" for name in names(folder / "step-2")}
    after = happened[named:]
    (older_goes,) = (
        i for i, (what, path) in enumerate(after) if what == "rename" and path.endswith("/step-1")
    )
    assert after.index(("sync", str(folder))) < older_goes
    assert names(folder) == {"step-2"}


def test_none_is_due_while_one_is_written(tmp_path, monkeypatch):
    """Training would wait for it."""
    may_end, complete = threading.Event(), Checkpoints._complete

    def complete_later(*given):
        may_end.wait()
        complete(*given)

    monkeypatch.setattr(Checkpoints, "_complete", complete_later)
    checkpoints = Checkpoints(tmp_path, {}, 1)
    assert checkpoints.is_due(1e-9) and not checkpoints.is_due(1)
    checkpoints.save(*model_and_optimizer(1), 1)
    assert not checkpoints.is_due(1e-9)
    may_end.set()
    checkpoints.finish()
    assert checkpoints.is_due(1e-9) and not checkpoints.is_due(0)


def test_a_damaged_checkpoint_never_pushes_out_a_good_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, {}, 2)
    save(checkpoints, 3)
    save(checkpoints, 6)
    (tmp_path / "step-6" / "__0_0.distcp").write_bytes(b"")
    left_over = temporary_folder(tmp_path / "step-5")  # what a kill leaves
    (left_over / "__0_0.distcp").write_bytes(b"half")
    of_a_user = {"step-4.backup", "step-5.tmp", "notes"}
    for name in of_a_user:
        (tmp_path / name).mkdir()
    checkpoints = Checkpoints(tmp_path, {}, 1)
    step, said = load(checkpoints)
    assert step == 3 and "step-6 is damaged (__0_0.distcp" in said[0]
    assert names(tmp_path) == {"step-3", "step-6"} | of_a_user
    save(checkpoints, 4)
    assert names(tmp_path) == {"step-4"} | of_a_user
    assert load(checkpoints) == (4, [])


def test_every_file_of_a_checkpoint_is_checked(tmp_path):
    checkpoints = Checkpoints(tmp_path, {}, 2)
    save(checkpoints, 3)
    save(checkpoints, 6)
    for path in (tmp_path / "step-6").iterdir():
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        step, said = load(checkpoints)
        assert step == 3 and path.name in said[0]
        path.write_bytes(content)
    assert load(checkpoints) == (6, [])


@pytest.mark.parametrize("name", ["rename", "rmtree"])
def test_a_checkpoint_that_cannot_be_removed_is_no_failure(tmp_path, monkeypatch, name):
    def fail(path, *arguments, **others):
        if "step-3" in str(path):
            fail_with(errno.ENOTEMPTY)()
        return real(path, *arguments, **others)

    checkpoints = Checkpoints(tmp_path, {}, 1)
    save(checkpoints, 3)
    place = Path if name == "rename" else shutil
    real = getattr(place, name)
    monkeypatch.setattr(place, name, fail)
    save(checkpoints, 6)
    assert load(checkpoints) == (6, [])


def test_half_a_checkpoint_does_not_stay_on_a_full_disk(tmp_path, monkeypatch):
    """Full at its last file, checkpoint.json, which is small."""
    checkpoints = Checkpoints(tmp_path, {}, 2)
    save(checkpoints, 3)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail_with(errno.ENOSPC))
        with pytest.raises(OSError) as told:
            save(checkpoints, 6)
    assert told.value.errno == errno.ENOSPC and names(tmp_path) == {"step-3"}


def test_the_newest_checkpoint_stays_when_a_later_one_cannot_be_written(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, {}, 2)
    save(checkpoints, 3)
    rename = Path.rename

    def fail_for_the_new_one(path, to):
        if path.name.startswith("step-6."):
            fail_with(errno.EBUSY)()
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_for_the_new_one)
        with pytest.raises(OSError, match="stays in "):
            save(checkpoints, 6)
    assert load(checkpoints) == (3, [])
    (written,) = tmp_path.glob("step-6.*.tmp")  # whole, and so not taken for a left-over
    written.rename(tmp_path / "step-6")
    assert load(checkpoints) == (6, [])


# ---------------------------------------------------------------- a checkpoint is data


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("is_by_name", [False, True])
def test_a_checkpoint_of_any_python_is_read(tmp_path, monkeypatch, module, is_by_name):
    """A .metadata holds a path and a member of an enum.

    Python 3.13 alone has the classes of paths in pathlib._local. The first releases of 3.11 pickle members
    of enums by name.
    """

    def reduce(member, protocol):
        kind = type(member)
        return (getattr, (kind, member.name)) if is_by_name else (kind, (member.value,))

    checkpoints = Checkpoints(tmp_path, {}, 2)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module, pathlib)
        patch.setattr(pathlib.PosixPath, "__module__", module)
        patch.setattr(enum.Enum, "__reduce_ex__", reduce)
        save(checkpoints, 3)
    written = (tmp_path / "step-3" / ".metadata").read_bytes()
    assert module.encode() in written and (b"getattr" in written) == is_by_name
    assert load(checkpoints) == (3, [])


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def plant(folder, change):
    """Change the Metadata of a checkpoint, and give it the checksum that it has then."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    note_checksum(path)


def note_checksum(path):
    """Enter the checksum of a file into the checkpoint.json beside it."""
    manifest = json.loads((path.parent / "checkpoint.json").read_text())
    manifest["crc32"][path.name] = zlib.crc32(path.read_bytes())
    (path.parent / "checkpoint.json").write_text(json.dumps(manifest))


def test_a_metadata_file_cannot_run_code(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", {}, 2)
    save(checkpoints, 3)
    sprung = tmp_path / "sprung"

    def set_trap(metadata):
        metadata.planner_data = Trap(sprung)

    plant(tmp_path / "c" / "step-3", set_trap)
    before = set((tmp_path / "c" / "step-3").iterdir())
    with pytest.raises(InputError, match=r"step-3/.metadata: .*asks for \w+.open.*; do not use it"):
        load(checkpoints)
    assert not sprung.exists() and set((tmp_path / "c" / "step-3").iterdir()) == before


@pytest.mark.parametrize("name", ["pathlib\nPosixPath", "torch.serialization\n_get_layout"])
def test_a_metadata_file_cannot_change_classes_and_functions(tmp_path, name):
    """With other methods, paths of this process could lead where a stranger likes."""
    checkpoints = Checkpoints(tmp_path, {}, 2)
    save(checkpoints, 3)
    content = f"c{name}\n(N}}S'changed'\nNstb."  # setattr(name, "changed", None)
    (tmp_path / "step-3" / ".metadata").write_text(content)
    note_checksum(tmp_path / "step-3" / ".metadata")
    with pytest.raises(InputError, match=r"step-3/.metadata: .*it changes .*; do not use it"):
        load(checkpoints)
    for found in (pathlib.PosixPath, torch.serialization._get_layout):
        assert not hasattr(found, "changed")


def test_a_value_in_a_checkpoint_cannot_run_code(tmp_path):
    """What is no tensor, such as the learning rate, is a pickle too."""
    checkpoints = Checkpoints(tmp_path / "c", {}, 2)
    save(checkpoints, 3)
    folder, sprung = tmp_path / "c" / "step-3", tmp_path / "sprung"
    stored = folder / "__0_0.distcp"

    def set_trap(metadata):
        for name, part in metadata.storage_data.items():
            if name.fqn == "optimizer.param_groups.0.lr":
                part.offset = stored.stat().st_size
                with open(stored, "ab") as f:
                    torch.save(Trap(sprung), f)
                part.length = stored.stat().st_size - part.offset

    plant(folder, set_trap)
    note_checksum(stored)
    with pytest.raises(InputError, match="step-3 is no checkpoint of this run .*; do not use it"):
        load(checkpoints)
    assert not sprung.exists()


@pytest.mark.parametrize("names", [["../secret.distcp"], ["/etc/passwd"], ["__9_9.distcp"], [1, "x"]])
def test_a_metadata_file_leads_to_files_of_its_checkpoint_alone(tmp_path, names):
    checkpoints = Checkpoints(tmp_path / "c", {}, 2)
    save(checkpoints, 3)

    def lead_away(metadata):
        for part, name in zip(metadata.storage_data.values(), itertools.cycle(names)):
            part.relative_path = name

    plant(tmp_path / "c" / "step-3", lead_away)
    with pytest.raises(InputError, match="leads to .*; do not use it"):
        load(checkpoints)


@pytest.mark.parametrize("content", [b"", b"cos\nsystem\n(S'true'\ntR.", pickle.dumps({}), b"\x80\x04", b"."])
def test_a_metadata_file_that_is_none(tmp_path, content):
    checkpoints = Checkpoints(tmp_path, {}, 2)
    save(checkpoints, 3)
    (tmp_path / "step-3" / ".metadata").write_bytes(content)
    note_checksum(tmp_path / "step-3" / ".metadata")
    with pytest.raises(InputError, match=r"step-3/.metadata: .*; do not use it"):
        load(checkpoints)


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "{}",
        '{"run": 1, "crc32": {".metadata": 1}}',
        '{"run": {}, "crc32": {".metadata": 1, "../x": 1}}',
    ],
)
def test_a_manifest_that_is_none(tmp_path, manifest):
    checkpoints = Checkpoints(tmp_path, {}, 2)
    save(checkpoints, 3)
    save(checkpoints, 6)
    (tmp_path / "step-6" / "checkpoint.json").write_text(manifest)
    step, said = load(checkpoints)
    assert step == 3 and "step-6 is damaged (checkpoint.json" in said[0]


def test_what_differs_from_the_run_of_a_checkpoint_is_named(tmp_path):
    save(Checkpoints(tmp_path, {"lr": 1.0, "seed": 0}, 2), 3)
    with pytest.raises(InputError, match="step-3 is of another run: lr was 1.0, now 2.0;"):
        load(Checkpoints(tmp_path, {"lr": 2.0, "seed": 0}, 2))
