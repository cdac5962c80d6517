"""One code path for 1 and N processes: process group, FSDP2, activation checkpointing, CPU offload, sharded checkpoints.

Notable choices:
- `fully_shard` always, on one process too: it is what gives float32 master weights with bfloat16 compute.
- Order: activation checkpointing inside, torch.compile around it, fully_shard outermost. Parameter names stay as in model.py.
- A checkpoint is written in the background, aside, and renamed when it is whole: the newest one on disk is never half a checkpoint.
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

import model as decoder
from errors import UserError

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bfloat16, for MFU


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


def leave(code=0):
    """End the process with an exit code. Without an interpreter shutdown: gloo's threads may still hold tensors then, and abort one run in several
    (pytorch/pytorch#179291)."""
    if dist.is_initialized() and code == 0:
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def shard(model, device, compute_dtype, param_dtype=torch.float32, activation_checkpointing="none", cpu_offload=False, compile=False):
    """Shard each block and then the rest over all processes, of a model on the meta device: only then is memory for a process's own rows
    taken, uninitialised. The master weights (and with them AdamW's state) are of param_dtype, compute happens in compute_dtype, gradients
    are reduced in float32 and averaged over processes. A single process has nothing to shard: its weights are rounded to compute_dtype by the
    model, where they are used, without FSDP's copies (which cost SmolLM2 a third of its speed on an H100)."""
    model.to(param_dtype)
    model.compute_dtype = compute_dtype
    alone = dist.get_world_size() == 1 and not cpu_offload
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # cast_forward_inputs would round the float32 cos and sin.
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
    for block in model.blocks:
        if activation_checkpointing == "full":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        elif activation_checkpointing == "selective":
            contexts = partial(create_selective_checkpoint_contexts, _save_matrix_products)
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
        if compile:
            block.forward = torch.compile(block.forward, fullgraph=True)
        if not alone:
            fully_shard(block, mesh=mesh, mp_policy=precision, offload_policy=offload)
    if compile:
        model.cross_entropy = torch.compile(decoder.cross_entropy_and_gradient)
    if not alone:
        fully_shard(model, mesh=mesh, mp_policy=precision, offload_policy=offload)
    model.to_empty(device="cpu" if cpu_offload else device)
    if model.config.tie_embeddings:
        model.head.weight = model.embed.weight  # to_empty takes plain ones apart


def _save_matrix_products(context, op, *args, **kwargs):
    """Selective checkpointing: keep what the matrix products and the attention kernel made, recompute the rest."""
    name = op.overloadpacket.__name__ if hasattr(op, "overloadpacket") else str(op)
    return CheckpointPolicy.MUST_SAVE if name in ("mm", "addmm") or "scaled_dot_product" in name else CheckpointPolicy.PREFER_RECOMPUTE


def update(model, optimizer, batch, micro_batch_size, tokens_per_step):
    """One optimizer step on this process's share of a batch: tokens, positions, targets, each int64 (share, T). tokens_per_step: of all
    processes. -> (the share's part of the mean loss in nats a token, norm of the whole gradient), still on the device: nothing here waits
    for it. An update whose gradient is not finite is left out."""
    loss = torch.zeros((), device=batch[0].device)
    for piece in zip(*(x.split(micro_batch_size) for x in batch)):
        part = model(*piece) / tokens_per_step
        (part * dist.get_world_size()).backward()  # FSDP averages gradients over processes; the loss is a mean over the global batch
        loss += part.detach()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
    optimizer.found_inf = (~grad_norm.isfinite()).float()  # as torch.amp.GradScaler tells the fused kernel to skip a step
    optimizer.step()
    optimizer.zero_grad()
    return loss, grad_norm


# ---------------------------------------------------------------- checkpoints


class Checkpoints:
    """The checkpoints of a run, folder/step-N: weights, optimizer, and what `record` says of the run. They are written in the background,
    and the newest `keep` that are whole on disk are kept. All processes call every method."""

    def __init__(self, folder, record, keep):
        self.folder, self.record, self.keep = Path(folder), json.dumps(record, indent=2) + "\n", keep
        self.writing = None  # (step, future)
        self.background = ThreadPoolExecutor(1)
        self.group = dist.new_group(backend="gloo")  # of the background thread, whose collectives must not meet those of training

    def save(self, model, optimizer, step):
        """Copy the state and begin to write it. Training may go on at once."""
        self.finish()  # one at a time
        aside = self._aside(step)
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            (aside / "args.json").write_text(self.record)
        dist.barrier()
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        written = dcp.async_save(state, checkpoint_id=aside, process_group=self.group)
        self.writing = step, self.background.submit(self._seal, written, aside)

    def _seal(self, written, folder):
        """Leave a checksum beside each file of this process, and wait for those of the others."""
        written.result()
        for path in folder.glob(f"__{dist.get_rank()}_*.distcp"):
            path.with_suffix(".crc32").write_text(str(_checksum(path)))
        dist.barrier(self.group)

    def finish(self, wait=True):
        """Give the checkpoint in the background its name once it is whole. OSError if the disk is full."""
        if self.writing is None or not (wait or self.writing[1].done()):
            return
        (step, future), self.writing = self.writing, None
        aside = self._aside(step)
        try:
            future.result()  # done on one process means written by all
        except dcp.api.CheckpointException as error:  # it wraps the system's error; PyTorch's zip writer turns that into "unexpected pos"
            if any(getattr(e, "errno", 0) in (errno.ENOSPC, errno.EDQUOT) or "unexpected pos" in str(e) for e, _ in error.failures.values()):
                shutil.rmtree(aside, ignore_errors=True)
                raise OSError(errno.ENOSPC, "no space left", str(aside)) from None
            raise
        if dist.get_rank() == 0:
            final = self.folder / f"step-{step}"
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            descriptor = os.open(self.folder, os.O_RDONLY)
            os.fsync(descriptor)  # the name is on disk before an older checkpoint goes
            os.close(descriptor)
            for old in self._steps()[self.keep :]:
                shutil.rmtree(self.folder / f"step-{old}")

    def load(self, model, optimizer, say):
        """Restore the newest checkpoint that is whole -> its step; 0 if there is none at all. UserError if none is usable.
        say(line): called for each that is passed over."""
        steps = self._steps()
        for step in steps:
            folder = self.folder / f"step-{step}"
            weights, moments = get_state_dict(model, optimizer)
            try:
                if (folder / "args.json").read_text() != self.record:
                    raise UserError(f"{folder} is of another run; remove it, or start again with another --out")
                self._check(folder)
                dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
            except (dcp.api.CheckpointException, OSError) as error:
                reason = next(iter(error.failures.values()))[0] if isinstance(error, dcp.api.CheckpointException) else error
                say(f"{folder} is damaged ({type(reason).__name__}: {str(reason).splitlines()[0]}); going on from the one before")
                continue
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
            return step
        if steps:
            raise UserError(f"{self.folder}: no checkpoint there is whole; start again with another --out")
        return 0

    def _check(self, folder):
        """OSError if a file is not what was written. Each process reads a part of the files."""
        mine = sorted(folder.glob("*.distcp"))[dist.get_rank() :: dist.get_world_size()]
        bad = [path.name for path in mine if path.with_suffix(".crc32").read_text() != str(_checksum(path))]
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, bad)
        if found := sum(everyones, []):
            raise OSError(f"{found[0]} does not have its checksum")

    def _aside(self, step):
        return self.folder / f"step-{step}.tmp"

    def _steps(self):
        """Of the checkpoints that are there, the newest first."""
        return sorted((int(path.name[5:]) for path in self.folder.glob("step-*") if path.name[5:].isdigit()), reverse=True)


def _checksum(path):
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(2**24):
            crc = zlib.crc32(block, crc)
    return crc
