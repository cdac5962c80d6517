"""Checkpoints of a run: sharded, written in the background, checked when they are read.

Notable choices:
- torch.distributed.checkpoint writes into a temporary folder, which is renamed to step-N when all of it is on
  disk. No file names the newest checkpoint: it is the folder with the largest N.
- checkpoint.json beside its files records what the run was started with, and a checksum of each file.
- It holds what is trained. Frozen weights are read again from where they came.
- A checkpoint is data. PyTorch reads its .metadata with pickle, which would run code that somebody put there.
  So only METADATA_CLASSES, tensors and plain values are read.
"""

import contextlib
import dataclasses
import errno
import json
import os
import pickle
import resource
import shutil
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from storage.errors import InputError, naming, warn
from storage.files import MARK, remove_folder, remove_left_overs, replace_folder, temporary_folder
from storage.values import describe_changes, read_record

MANIFEST = "checkpoint.json"

METADATA_CLASSES = {  # {module: the names in it that a .metadata may use}
    "pathlib": ("PosixPath",),
    "torch": ("Size", "bfloat16", "float32"),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
}  # fmt: skip


class Checkpoints:
    """The checkpoints of a run, folder/step-N. All processes call every method."""

    def __init__(self, folder, record, keep):
        """Prepare to write into `folder`, and start the background thread.

        record: what the run was started with, {setting: value}. keep: how many checkpoints, the newest, stay.
        """
        self.folder, self.record, self.keep = Path(folder), record, keep
        self.newest = 0  # the step of the newest checkpoint that is complete
        self.writing = None  # the future of the checkpoint that is being written
        self.aside = None  # the temporary folder into which it is written
        self.is_optional = False  # whether the run goes on where it cannot be written
        self.began = time.monotonic()  # when the last checkpoint began, or this run
        self.background = ThreadPoolExecutor(1)
        # The background thread's collectives must not meet those of training, so they have a group of
        # their own.
        self.group = dist.new_group(backend="gloo")

    # ------------------------------------------------------------ saving

    def save(self, model, optimizer, step, is_optional=False):
        """Copy the state and begin to write it. Training may go on at once.

        is_optional: where it cannot be written, because the disk is full or gone, a warning says so and that
        is all. Otherwise raise OSError, here or in `finish`.
        """
        self.finish()  # one at a time
        self.is_optional, self.began = is_optional, time.monotonic()
        try:
            self.aside = _of_process_0(lambda: temporary_folder(self.folder / f"step-{step}"))
        except OSError as error:
            return self._fail(error)
        state = _trained_state(model, optimizer)
        written = dcp.async_save(state, checkpoint_id=self.aside, process_group=self.group)
        self.writing = self.background.submit(self._complete, written, self.aside, step)

    def _complete(self, written, aside, step):
        """Wait until all processes have written their parts. Then give the folder its name."""
        written.result()
        try:
            mine = {path.name: _checksum(path) for path in aside.glob(f"__{dist.get_rank()}_*.distcp")}
        except OSError as error:
            mine = error  # the others must hear of it, as they would wait
        from_all = [None] * dist.get_world_size()
        dist.all_gather_object(from_all, mine, group=self.group)
        for part in from_all:
            if isinstance(part, OSError):
                raise part
        _of_process_0(lambda: self._give_name(aside, step, from_all), self.group)
        self.newest = step

    def _give_name(self, aside, step, parts):
        """Write checkpoint.json into the folder `aside`, rename it, and remove checkpoints that do not stay.

        parts: {name of a file: its checksum} from each process.
        """
        checksums = {".metadata": _checksum(aside / ".metadata")}
        for part in parts:
            checksums |= part
        manifest = {"run": self.record, "crc32": checksums}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2))
        folder = self.folder / f"step-{step}"
        if folder.exists():  # It is damaged: else this run would have gone on from it.
            remove_folder(folder)
        # The new checkpoint must be on disk before an older one is removed.
        replace_folder(aside, folder)
        self._remove_all_but_newest(step)

    def _remove_all_but_newest(self, step):
        """Remove all checkpoints but the newest `keep` up to this step.

        Later ones are damaged: else this run would have gone on from them.
        """
        steps = self._steps()
        staying = [other for other in steps if other <= step][: self.keep]
        for other in set(steps) - set(staying):
            remove_folder(self.folder / f"step-{other}")

    def is_due(self, minutes):
        """Return whether so many minutes have gone by since the last checkpoint began. 0 means never.

        While one is still being written, which may take longer on a slow disk, none is due: training would
        wait for it. Each process has its own clock, so that they must agree on it.
        """
        is_writing = self.writing is not None and not self.writing.done()
        return minutes > 0 and not is_writing and time.monotonic() - self.began >= 60 * minutes

    def raise_if_failed(self):
        """Raise what `finish` raises if writing has failed so far. Do not wait."""
        if self.writing is not None and self.writing.done():
            self.finish()

    def finish(self):
        """Wait until the checkpoint is written. Raise OSError if it cannot be, unless it is optional."""
        if self.writing is None:
            return
        future, self.writing = self.writing, None
        try:
            with naming(self.folder):
                future.result()
        except (Exception, dcp.api.CheckpointException) as error:  # CheckpointException is no Exception
            if (self.aside / MARK).exists():  # it is not complete
                shutil.rmtree(self.aside, ignore_errors=True)
            for cause, _ in getattr(error, "failures", {}).values():  # one for each process that failed
                if number := _errno_of(cause):
                    return self._fail(OSError(number, os.strerror(number), str(self.folder)))
            if isinstance(error, OSError):
                return self._fail(error)
            raise

    def _fail(self, error):
        """Raise the OSError of a checkpoint that cannot be written; warn of it if it is optional."""
        if not self.is_optional:
            raise error from None
        if dist.get_rank() == 0:
            reason = error.strerror or error
            warn(f"{self.folder}: no checkpoint could be written ({reason}); free some space; going on")

    def remove_all(self):
        """Remove all checkpoints, since nothing will go on from them."""
        if dist.get_rank() == 0:
            for step in self._steps():
                remove_folder(self.folder / f"step-{step}")
            with contextlib.suppress(OSError):  # it may hold other files, or never have been made
                self.folder.rmdir()

    # ------------------------------------------------------------ resuming

    def load(self, model, optimizer):
        """Restore the newest checkpoint that is whole, and return its step. Return 0 if there are none.

        Warn of each damaged one, which is passed over. Raise InputError if all are damaged or if it is of
        another run.
        """
        if dist.get_rank() == 0:
            remove_left_overs(self.folder, "step-*")
        found = self._found()
        for step, manifest in found:
            folder = self.folder / f"step-{step}"
            damaged = MANIFEST if manifest is None else self._damaged_file(folder, manifest["crc32"])
            if damaged:
                reason = f"{damaged} is missing or not what was written"
                warn(f"{folder} is damaged ({reason}); it is passed over", shared=True)
                continue
            # A checkpoint of an earlier version lacks newer settings. They were compared with args.json.
            comparable = {key: value for key, value in self.record.items() if key in manifest["run"]}
            if changed := describe_changes(manifest["run"], comparable):
                raise InputError(f"{folder} is of another run: {changed}; start again with another folder")
            state = _trained_state(model, optimizer)
            read_as_data(state, folder, manifest["crc32"])  # into the parameters themselves
            set_optimizer_state_dict(model, optimizer, state["optimizer"])
            self.newest = step
            return step
        if found:
            raise InputError(f"{self.folder}: no checkpoint there is whole; start again with another folder")
        return 0

    def _found(self):
        """Return (step, manifest or None) of each checkpoint, the newest first.

        All processes take process 0's view, since that of another machine may lag behind.
        """
        return _of_process_0(lambda: [(step, self._manifest(step)) for step in self._steps()])

    def _damaged_file(self, folder, checksums):
        """Return the name of a file that differs from its checksum, or None. The processes share the work."""
        mine = sorted(checksums)[dist.get_rank() :: dist.get_world_size()]
        damaged = []
        for name in mine:
            if not (folder / name).is_file() or _checksum(folder / name) != checksums[name]:
                damaged.append(name)
        from_all = [None] * dist.get_world_size()
        dist.all_gather_object(from_all, damaged)
        return next((name for part in from_all for name in part), None)

    def _manifest(self, step):
        """Return the content of a checkpoint's checkpoint.json, None if it is not what _give_name writes."""
        try:
            manifest = read_record(self.folder / f"step-{step}" / MANIFEST)
            names = set(manifest["crc32"])
            is_whole = ".metadata" in names and all(Path(name).name == name for name in names)
            return {"run": dict(manifest["run"]), "crc32": dict(manifest["crc32"])} if is_whole else None
        except (ValueError, TypeError, KeyError):
            return None

    def _steps(self):
        """Return the steps of all checkpoints, the newest first."""
        numbers = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)


def _trained_state(model, optimizer):
    """Return what a checkpoint holds: the trained parameters by name, and the optimizer's state of them.

    The tensors share their memory with the parameters. One with two names, as a tied head has, is there once.
    """
    state = model.state_dict()  # FSDP shards again here what a validation has left whole
    trained = {name: state[name] for name, p in model.named_parameters() if p.requires_grad}
    return {"model": trained, "optimizer": get_optimizer_state_dict(model, optimizer)}


def _of_process_0(action, group=None):
    """Return, in all processes, what action() returns in process 0. Raise its OSError in all of them."""
    outcome = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [action()]
        except OSError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, group=group)
    if isinstance(outcome[0], OSError):
        raise outcome[0]
    return outcome[0]


# ---------------------------------------------------------------- a checkpoint is data


def read_as_data(state, folder, names):
    """Read a checkpoint into `state`, nested dicts of tensors and values.

    names: the names of its files. Raise InputError if it holds anything but tensors and plain values, or
    leads to other files.
    """
    try:
        dcp.load(state, storage_reader=DataReader(folder, names), planner=DataPlanner())
    except dcp.api.CheckpointException as error:
        # Its checksums are right, so it is not damaged: somebody else, or other code, wrote it.
        cause = next(cause for cause, _ in error.failures.values())
        reason = f"{type(cause).__name__}: {str(cause).splitlines()[0]}" if str(cause) else repr(cause)
        raise InputError(f"{folder} is no checkpoint of this run ({reason}); do not use it") from None


class DataReader(dcp.FileSystemReader):
    """A FileSystemReader that reads .metadata with MetadataUnpickler."""

    def __init__(self, folder, names):
        """Read .metadata. Raise InputError if it is none, or leads to files that are not in `names`."""
        super().__init__(folder)
        path = folder / ".metadata"
        try:
            with open(path, "rb") as f:
                self.metadata = MetadataUnpickler(f).load()
            strange = {part.relative_path for part in self.metadata.storage_data.values()} - set(names)
        except OSError:
            raise
        except Exception as error:  # a pickle that was made by hand can raise anything
            raise InputError(f"{path}: not of a checkpoint ({error!r}); do not use it") from None
        if strange:
            other = min(map(repr, strange))  # as text, since not all values can be compared
            raise InputError(f"{path}: leads to {other}, not one of its files; do not use it")

    def read_metadata(self, *args, **kwargs):
        """Return the Metadata that was read, with the number by which dcp knows this load."""
        self.metadata.storage_meta.load_id = self.load_id
        return self.metadata


class MetadataUnpickler(pickle._Unpickler):
    """An unpickler that finds METADATA_CLASSES alone, and that changes none of them.

    What a pickle runs, it has to find first. This is Python's unpickler that is written in Python, because
    the one in C would not call load_build.
    """

    dispatch = pickle._Unpickler.dispatch.copy()

    def load_build(self):
        """Set attributes of the newest object, which must be an instance of a dataclass.

        Those of a class itself would hold in the whole process: its paths could lead elsewhere from there on.
        """
        if isinstance(self.stack[-2], type) or not dataclasses.is_dataclass(self.stack[-2]):
            raise pickle.UnpicklingError(f"it changes {self.stack[-2]!r}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module, name):
        if module == "pathlib._local":  # where Python 3.13, and no other, has its paths
            module = "pathlib"
        if (module, name) == ("builtins", "getattr"):  # with which Python 3.11.2 pickles a member of an enum
            return lambda enum, member: enum.__members__[member]
        if name not in METADATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


class DataPlanner(dcp.DefaultLoadPlanner):
    """A DefaultLoadPlanner that reads values other than tensors with weights_only=True first."""

    def load_bytes(self, read_item, value):
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


# ---------------------------------------------------------------- files


def _errno_of(error):
    """Return the errno of the system's error behind an exception of dcp's writer, 0 if there is none.

    PyTorch's zip writer hides it. Its "unexpected pos" means that a write came out short, because the disk is
    full or files may not be so large.
    """
    if isinstance(error, OSError):
        return error.errno
    if "unexpected pos" not in str(error):
        return 0
    has_limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
    return errno.EFBIG if has_limit else errno.ENOSPC


def _checksum(path):
    """Return the CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(2**24):
            crc = zlib.crc32(block, crc)
    return crc
