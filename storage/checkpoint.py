"""Checkpoints of a run: sharded, written in the background, checked when they are read.

Notable choices:
- A checkpoint is written aside by torch.distributed.checkpoint, and renamed when all of it is on disk. The
  newest folder is the pointer to it.
- checkpoint.json beside its files records what the run was started with, and a checksum of each file.
"""

import errno
import json
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from storage.files import InputError, describe_changes, read_json, replace_folder

MANIFEST = "checkpoint.json"


class Checkpoints:
    """The checkpoints of a run, folder/step-N. All processes call every method."""

    def __init__(self, folder, record, keep):
        """Prepare to write into `folder`, and start the background thread.

        record: what the run was started with, {setting: value}. keep: how many checkpoints stay, the
        newest.
        """
        self.folder, self.record, self.keep = Path(folder), record, keep
        self.writing = None  # the future of the checkpoint that is being written
        self.background = ThreadPoolExecutor(1)
        # The background thread's collectives must not meet those of training, so they have a group of
        # their own.
        self.group = dist.new_group(backend="gloo")

    # ------------------------------------------------------------ saving

    def save(self, model, optimizer, step):
        """Copy the state and begin to write it. Training may go on at once."""
        self.finish()  # one at a time
        aside = self.folder / f"step-{step}.tmp"
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        dist.barrier()
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        written = dcp.async_save(state, checkpoint_id=aside, process_group=self.group)
        self.writing = self.background.submit(self._complete, written, aside, step)

    def _complete(self, written, aside, step):
        """Once all processes have written their parts, give the folder its name.

        The checkpoints that do not stay are removed then.
        """
        written.result()
        mine = {path.name: _checksum(path) for path in aside.glob(f"__{dist.get_rank()}_*.distcp")}
        from_all = [None] * dist.get_world_size()
        dist.all_gather_object(from_all, mine, group=self.group)
        if dist.get_rank() == 0:
            checksums = {}
            for part in from_all:
                checksums |= part
            checksums[".metadata"] = _checksum(aside / ".metadata")
            manifest = {"run": self.record, "crc32": checksums}
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=2))
            # The new checkpoint must be on disk before an older one is removed.
            replace_folder(aside, self.folder / f"step-{step}")
            self._remove_all_but_newest(step)
        dist.barrier(self.group)

    def _remove_all_but_newest(self, step):
        """Remove all checkpoints but the newest `keep` up to this step.

        Later ones are damaged: else this run would have gone on from them.
        """
        steps = self._steps()
        staying = [other for other in steps if other <= step][: self.keep]
        for other in set(steps) - set(staying):
            removed = self.folder / f"step-{other}.old"
            # A kill must not leave half a checkpoint under the name of a whole one.
            (self.folder / f"step-{other}").rename(removed)
            shutil.rmtree(removed)

    def raise_if_failed(self):
        """Raise what `finish` raises if writing in the background has failed. Does not wait."""
        if self.writing is not None and self.writing.done():
            self.finish()

    def finish(self):
        """Wait until the checkpoint in the background is written. Raise OSError if the disk is full."""
        if self.writing is None:
            return
        future, self.writing = self.writing, None
        try:
            future.result()
        except dcp.api.CheckpointException as error:
            if any(_is_full_disk(cause) for cause, _ in error.failures.values()):
                for half_written in self.folder.glob("step-*.tmp"):
                    shutil.rmtree(half_written, ignore_errors=True)
                raise OSError(errno.ENOSPC, "no space left", str(self.folder)) from None
            raise

    # ------------------------------------------------------------ resuming

    def load(self, model, optimizer, say):
        """Restore the newest checkpoint that is whole, and return its step; 0 if there is none at all.

        say(line) is called for each one that is passed over. Raise InputError if none can be used, or
        if it is of another run.
        """
        self._remove_left_overs()
        found = self._found()
        for step, manifest in found:
            folder = self.folder / f"step-{step}"
            damaged = MANIFEST if manifest is None else self._damaged_file(folder, manifest["crc32"])
            if damaged:
                say(
                    f"{folder} is damaged ({damaged} is missing or not what was written); going on from "
                    "the one before"
                )
                continue
            if changed := describe_changes(manifest["run"], self.record):
                raise InputError(f"{folder} is of another run: {changed}; start again with another folder")
            weights, moments = get_state_dict(model, optimizer)
            dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
            return step
        if found:
            raise InputError(f"{self.folder}: no checkpoint there is whole; start again with another folder")
        return 0

    def _remove_left_overs(self):
        """Remove the folders that a kill left half written or half removed."""
        if dist.get_rank() == 0:
            for left_over in self.folder.glob("step-*.*"):
                shutil.rmtree(left_over)

    def _found(self):
        """Return (step, manifest or None) of each checkpoint, the newest first.

        All processes take process 0's view, since that of another machine may lag behind.
        """
        found = [None]
        if dist.get_rank() == 0:
            found = [[(step, self._manifest(step)) for step in self._steps()]]
        dist.broadcast_object_list(found)
        return found[0]

    def _damaged_file(self, folder, checksums):
        """Return the name of a file that is not what was written, or None. Each process reads some files."""
        mine = sorted(checksums)[dist.get_rank() :: dist.get_world_size()]
        damaged = []
        for name in mine:
            if not (folder / name).is_file() or _checksum(folder / name) != checksums[name]:
                damaged.append(name)
        from_all = [None] * dist.get_world_size()
        dist.all_gather_object(from_all, damaged)
        return next((name for part in from_all for name in part), None)

    def _manifest(self, step):
        """Return the content of a checkpoint's checkpoint.json, None if it is not what `_complete` writes."""
        try:
            manifest = read_json(self.folder / f"step-{step}" / MANIFEST)
            names = set(manifest["crc32"])
            is_whole = ".metadata" in names and all(Path(name).name == name for name in names)
            return {"run": dict(manifest["run"]), "crc32": dict(manifest["crc32"])} if is_whole else None
        except (ValueError, TypeError, KeyError):
            return None

    def _steps(self):
        """Return the steps of the checkpoints that are there, the newest first."""
        numbers = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted((int(number) for number in numbers if number.isdigit()), reverse=True)


def _is_full_disk(error):
    """Return whether writing failed for want of space, which PyTorch's zip writer hides in its own error."""
    return getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT) or "unexpected pos" in str(error)


def _checksum(path):
    """Return the CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(2**24):
            crc = zlib.crc32(block, crc)
    return crc
