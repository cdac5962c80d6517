"""One code path for 1 and N processes: process group, FSDP2, activation checkpointing, CPU offload, sharded checkpoints.

Notable choices:
- `fully_shard` always, on one process too: it is what gives float32 master weights with bfloat16 compute.
- Order: activation checkpointing inside, torch.compile around it, fully_shard outermost. Parameter names stay as in model.py.
- A checkpoint is written aside and renamed when it is whole, so the newest one on disk is never half a checkpoint.
"""
import errno
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import model as decoder


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


def leave():
    """End the process. Without an interpreter shutdown: gloo's threads may still hold tensors then, and abort one run in several
    (pytorch/pytorch#179291)."""
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def shard(model, device, compute_dtype, activation_checkpointing="none", cpu_offload=False, compile=False):
    """Shard each block and then the rest over all processes. The master weights become float32, compute happens in
    compute_dtype, gradients are reduced in float32 and averaged over processes."""
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
        fully_shard(block.float(), mesh=mesh, mp_policy=precision, offload_policy=offload)
    if compile:
        model.cross_entropy = torch.compile(decoder.cross_entropy_sum)
    for rest in (model.embed, model.norm, model.head):
        rest.float()
    fully_shard(model, mesh=mesh, mp_policy=precision, offload_policy=offload)


def _save_matrix_products(context, op, *args, **kwargs):
    """Selective checkpointing: keep what the matrix products and the attention kernel made, recompute the rest."""
    name = op.overloadpacket.__name__ if hasattr(op, "overloadpacket") else str(op)
    return CheckpointPolicy.MUST_SAVE if name in ("mm", "addmm") or "scaled_dot_product" in name else CheckpointPolicy.PREFER_RECOMPUTE


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(folder, model, optimizer, step):
    """Write folder/step-N (model, optimizer) and remove the older ones. All processes call it."""
    folder = Path(folder)
    aside, final = folder / "tmp", folder / f"step-{step}"
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    weights, moments = get_state_dict(model, optimizer)
    try:
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=aside)
    except dcp.api.CheckpointException as error:  # it wraps the system's error; PyTorch's zip writer turns that into "unexpected pos"
        if any(getattr(e, "errno", 0) in (errno.ENOSPC, errno.EDQUOT) or "unexpected pos" in str(e) for e, _ in error.failures.values()):
            shutil.rmtree(aside, ignore_errors=True)
            raise OSError(errno.ENOSPC, "no space left", str(aside)) from None
        raise
    if dist.get_rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in folder.glob("step-*"):
            if old != final:
                shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(folder, model, optimizer):
    """Restore the newest checkpoint -> its step; 0 if there is none."""
    steps = [int(path.name.removeprefix("step-")) for path in Path(folder).glob("step-*")]
    if not steps:
        return 0
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=Path(folder) / f"step-{max(steps)}")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return max(steps)
