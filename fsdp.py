"""One code path for 1 and N processes: process group, FSDP2, activation checkpointing, CPU offload, sharded checkpoints.

Notable choices:
- float32 master weights with bfloat16 compute: several processes get them from FSDP's mixed precision, a single one, which has nothing to
  shard, from model.py, which rounds weights where it uses them. FSDP's copies would cost SmolLM2 a third of its speed on an H100.
- Each process keeps all vectors (weights of norms, biases), a ten-thousandth of the model, outside of FSDP, which would round them: bfloat16
  has steps of 0.4 to 0.8% near 1, and a norm's small updates would show only after many of them.
- Order: activation checkpointing inside, torch.compile around it, fully_shard outermost. Parameter names stay as in model.py.
- A checkpoint is written in the background, aside, and renamed when all of it is on disk: the newest folder is the pointer to it.
"""
import errno
import json
import os
import shutil
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import errors
from errors import UserError
from weights import replace_folder

# Dense bfloat16, for MFU; the first that is in a card's name counts.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def peak_flops(device):
    """Operations a second that the card's maker names; None for one not listed, and for a CPU."""
    return next((v for k, v in PEAK_FLOPS.items() if device.type == "cuda" and k in torch.cuda.get_device_name(device)), None)


def start(device_type):
    """Join torchrun's process group, or make one of a single process -> this process's device."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device(device_type)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"  # gloo too: offloaded weights and checkpoints live on the CPU
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def run(main):
    """errors.run for a command that calls `start`: its last line."""
    try:
        errors.run(main)
    except SystemExit as end:
        leave(end.code)
    leave()


def leave(code=0):
    """End the process with an exit code. Without an interpreter shutdown: gloo's threads may still hold tensors then, and abort one run in several
    (pytorch/pytorch#179291)."""
    if dist.is_initialized() and code == 0:
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def split_batch(batch_size, micro_batch_size, tokens):
    """-> (examples of each process in a step, those of them in one forward pass). micro_batch_size None: as many of `tokens` tokens each as
    make about 32,768. UserError if one does not divide the other."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if batch_size % world:
        raise UserError(f"--batch_size {batch_size} does not divide over {world} processes; make it a multiple")
    share = batch_size // world
    if micro_batch_size is None:
        micro_batch_size = max(n for n in range(1, share + 1) if share % n == 0 and (n == 1 or n * tokens <= 32768))
    if micro_batch_size < 1 or share % micro_batch_size:
        raise UserError(f"--micro_batch_size {micro_batch_size} does not divide the {share} examples of each process; choose a divisor")
    return share, micro_batch_size


def shard(model, device, compute_dtype, param_dtype=torch.float32, activation_checkpointing="none", cpu_offload=False, compile=False):
    """Shard each block and then the rest over all processes, of a model on the meta device: only then is memory for a process's own rows
    taken, uninitialised. The master weights (and with them AdamW's state) are of param_dtype, compute happens in compute_dtype, gradients
    are reduced in float32 and averaged over processes. A single process keeps plain parameters, unless cpu_offload asks for FSDP."""
    model.to(param_dtype)
    vectors = split_parameters(model)[1]
    model.compute_dtype = compute_dtype
    for block in model.blocks:
        if activation_checkpointing == "full":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        elif activation_checkpointing == "selective":
            contexts = partial(create_selective_checkpoint_contexts, _save_matrix_products)
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
        if compile:
            block.forward = torch.compile(block.forward, fullgraph=True)
    if compile:
        model.cross_entropy = torch.compile(model.cross_entropy)
    if dist.get_world_size() > 1 or cpu_offload:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        # cast_forward_inputs would round the float32 cos and sin.
        precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh, mp_policy=precision, offload_policy=offload, ignored_params={*vectors})
    model.to_empty(device="cpu" if cpu_offload else device)
    if cpu_offload:
        for vector in split_parameters(model)[1]:
            vector.data = vector.data.to(device)
        # AdamW works on the CPU then, and torchrun leaves each process one thread.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def split_parameters(model):
    """-> (the matrices, the vectors)."""
    parameters = list(model.parameters())
    return [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() == 1]


def _save_matrix_products(context, op, *args, **kwargs):
    """Selective checkpointing: keep what the matrix products and the attention kernel made, recompute the rest."""
    name = op.overloadpacket.__name__ if hasattr(op, "overloadpacket") else str(op)
    return CheckpointPolicy.MUST_SAVE if name in ("mm", "addmm") or "scaled_dot_product" in name else CheckpointPolicy.PREFER_RECOMPUTE


def adamw(model, lr):
    """The optimizer, without weight decay. Matrices and vectors are groups of their own: where the ones are sharded, the others are not."""
    return torch.optim.AdamW([{"params": group} for group in split_parameters(model)], lr=lr, weight_decay=0.0, fused=True)


def update(model, optimizer, batch, micro_batch_size, tokens_per_step):
    """One optimizer step on this process's share of a batch: tokens, positions, targets, each int64 (share, T). tokens_per_step: of all
    processes. -> (mean loss in nats a token, norm of the gradient), of the whole batch and still on the device: nothing here waits for it.
    An update whose loss or gradient is not finite is left out."""
    loss = torch.zeros((), device=batch[0].device)
    for piece in zip(*(x.split(micro_batch_size) for x in batch)):
        part = model(*piece) / tokens_per_step
        (part * dist.get_world_size()).backward()  # gradients are averaged over processes; the loss is a mean over the global batch
        loss += part.detach()
    dist.all_reduce(loss)
    average_vectors(model)
    groups = split_parameters(model)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group]) for group in groups]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    grad_norm = torch.stack([norm.to(loss.device) for norm in norms]).norm()
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, 1.0, grad_norm)
    # As torch.amp.GradScaler tells the fused kernel to skip a step; beside offloaded weights now, the kernel would not wait for the copy.
    optimizer.found_inf = (~(loss.isfinite() & grad_norm.isfinite())).float().to(groups[0][0].device)
    optimizer.step()
    optimizer.zero_grad()
    return loss, grad_norm


def average_vectors(model):
    """Average the vectors' gradients over processes, in float32; FSDP has done so with the matrices'."""
    gradients = [p.grad for p in split_parameters(model)[1]]
    together = torch.cat([g.float() for g in gradients])
    dist.all_reduce(together)
    together /= dist.get_world_size()
    torch._foreach_copy_(gradients, together.split([len(g) for g in gradients]))


# ---------------------------------------------------------------- checkpoints


MANIFEST = "checkpoint.json"


class Checkpoints:
    """The checkpoints of a run, folder/step-N: weights and optimizer as torch.distributed.checkpoint writes them, and checkpoint.json, which
    holds what `record` says of the run and a checksum of each file. They are written in the background; the newest `keep` stay.
    All processes call every method."""

    def __init__(self, folder, record, keep):
        self.folder, self.record, self.keep = Path(folder), record, keep
        self.writing = None  # a future
        self.background = ThreadPoolExecutor(1)
        self.group = dist.new_group(backend="gloo")  # of the background thread, whose collectives must not meet those of training

    def save(self, model, optimizer, step):
        """Copy the state and begin to write it. Training may go on at once."""
        self.finish()  # one at a time
        aside = self.folder / f"step-{step}.tmp"
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        dist.barrier()
        weights, moments = get_state_dict(model, optimizer)
        written = dcp.async_save({"model": weights, "optimizer": moments}, checkpoint_id=aside, process_group=self.group)
        self.writing = self.background.submit(self._seal, written, aside, step)

    def _seal(self, written, aside, step):
        """Once every process has written its part, give the folder its name and remove the checkpoints that are not kept."""
        written.result()
        everyones = [None] * dist.get_world_size()
        mine = {path.name: _checksum(path) for path in aside.glob(f"__{dist.get_rank()}_*.distcp")}
        dist.all_gather_object(everyones, mine, group=self.group)
        if dist.get_rank() == 0:
            checksums = {name: crc for part in everyones for name, crc in part.items()} | {".metadata": _checksum(aside / ".metadata")}
            (aside / MANIFEST).write_text(json.dumps({"run": self.record, "crc32": checksums}, indent=2))
            replace_folder(aside, self.folder / f"step-{step}")  # it is on disk before an older one goes
            older = [other for other in self._steps() if other <= step]
            for other in set(self._steps()) - set(older[: self.keep]):  # later ones: damaged, or this run would have begun there
                gone = self.folder / f"step-{other}.old"
                (self.folder / f"step-{other}").rename(gone)  # what has its name is whole
                shutil.rmtree(gone)
        dist.barrier(self.group)

    def finish(self, wait=True):
        """Wait for the checkpoint in the background, or only look whether it failed. OSError if the disk is full."""
        if self.writing is None or not (wait or self.writing.done()):
            return
        future, self.writing = self.writing, None
        try:
            future.result()
        except dcp.api.CheckpointException as error:  # it wraps the system's error; PyTorch's zip writer turns that into "unexpected pos"
            if any(getattr(e, "errno", 0) in (errno.ENOSPC, errno.EDQUOT) or "unexpected pos" in str(e) for e, _ in error.failures.values()):
                for half in self.folder.glob("step-*.tmp"):
                    shutil.rmtree(half, ignore_errors=True)
                raise OSError(errno.ENOSPC, "no space left", str(self.folder)) from None
            raise

    def load(self, model, optimizer, say):
        """Restore the newest checkpoint that is whole -> its step; 0 if there is none at all. UserError if none is usable, or if it is of
        another run. say(line): called for each that is passed over."""
        found = [None]
        if dist.get_rank() == 0:  # one view of the folder: that of another machine may lag behind
            for left in self.folder.glob("step-*.*"):  # by a kill: half written, or half removed
                shutil.rmtree(left)
            found = [[(step, self._manifest(step)) for step in self._steps()]]
        dist.broadcast_object_list(found)
        for step, manifest in found[0]:
            folder = self.folder / f"step-{step}"
            if damaged := MANIFEST if manifest is None else self._damaged(folder, manifest["crc32"]):
                say(f"{folder} is damaged ({damaged} is missing or not what was written); going on from the one before")
                continue
            if changed := errors.changes(manifest["run"], self.record):
                raise UserError(f"{folder} is of another run: {changed}; start again with another --out")
            weights, moments = get_state_dict(model, optimizer)
            dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
            return step
        if found[0]:
            raise UserError(f"{self.folder}: no checkpoint there is whole; start again with another --out")
        return 0

    def _damaged(self, folder, checksums):
        """The name of a file that is not what was written, or None. Each process reads a part of the files."""
        mine = sorted(checksums)[dist.get_rank() :: dist.get_world_size()]
        bad = [name for name in mine if not (folder / name).is_file() or _checksum(folder / name) != checksums[name]]
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, bad)
        return next(iter(sum(everyones, [])), None)

    def _manifest(self, step):
        try:
            return json.loads((self.folder / f"step-{step}" / MANIFEST).read_text())
        except (OSError, ValueError):
            return None

    def _steps(self):
        """Of the checkpoints that are there, the newest first."""
        return sorted((int(path.name[5:]) for path in self.folder.glob("step-*") if path.name[5:].isdigit()), reverse=True)


def _checksum(path):
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(2**24):
            crc = zlib.crc32(block, crc)
    return crc
