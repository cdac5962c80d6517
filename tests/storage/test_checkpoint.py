"""What a checkpoint is on disk: when it gets its name, what is checked, what is passed over."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fsdp
from storage.checkpoint import Checkpoints
from storage.files import InputError, temporary_folder


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
    """Load the newest checkpoint, and return its step and the lines that were said.

    Its weights must be those of its step.
    """
    model, optimizer = model_and_optimizer(0)
    said = []
    step = checkpoints.load(model, optimizer, said.append)
    assert bool((model.weight == step).all())
    return step, said


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


def test_what_differs_from_the_run_of_a_checkpoint_is_named(tmp_path):
    save(Checkpoints(tmp_path, {"lr": 1.0, "seed": 0}, 2), 3)
    with pytest.raises(InputError, match="step-3 is of another run: lr was 1.0, now 2.0;"):
        load(Checkpoints(tmp_path, {"lr": 2.0, "seed": 0}, 2))
