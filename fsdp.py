"""Spread training over processes and save memory: FSDP2, activation checkpointing, CPU offload.

Notable choices:
- There is one code path for 1 and N processes, but a single process without offload is not sharded: it has
  nothing to shard, and FSDP's copies would cost SmolLM2 a third of its speed on an H100.
- Master weights are float32, computation is bfloat16. Several processes get that from FSDP's mixed
  precision, a single one from model.py, which rounds weights where it uses them.
- Each process keeps all vectors (weights of norms, biases), a ten-thousandth of the model, outside of FSDP,
  which would round them. Near 1, bfloat16 has steps of 0.4 to 0.8%, and a norm's small updates would show
  only after many of them.
- FSDP gathers the weights of several small blocks together, of SmolLM2 all at once: what it does on the CPU
  for each group would take longer than the GPU needs for a block.
- The order is: activation checkpointing inside, torch.compile around it, fully_shard outermost. The
  names of the parameters stay.
"""

import math
import os
import resource
import sys
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from storage.errors import InputError
from storage.processes import is_distributed, local_rank, local_world_size, missing_variables, restarts

SMALLEST_GROUP = 2**27  # parameters that FSDP gathers together at least; a block of LLaMA-7B has more
NARROW = 8  # A matrix product is an adapter's if its result is so many times as wide as its first factor.

# Dense bfloat16 operations a second by the makers' data sheets. A card takes the first entry whose name
# is part of its own, so longer names come first.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
}


def start(device_type):
    """Join the process group that torchrun set up, or make one of a single process.

    Return this process's device. Raise InputError if the environment has only some of torchrun's variables.
    """
    if device_type == "cuda":
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # gloo too, since offloaded weights and checkpoints live on the CPU
    else:
        device = torch.device(device_type)
        backend = "gloo"
    if is_distributed():
        if missing := missing_variables():
            raise InputError(f"RANK is set, but not {', '.join(missing)}; start with torchrun, or unset RANK")
        store, rank, world_size = next(dist.rendezvous("env://"))
        # torchrun --max_restarts gives processes that it starts again the store of those that died.
        store = dist.PrefixStore(str(restarts()), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def peak_flops(device):
    """Return the card's peak in operations a second (see PEAK_FLOPS), None for other cards and for a CPU."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for card, flops in PEAK_FLOPS.items():
            if card in name:
                return flops
    return None


def peak_memory(device):
    """Return this process's peak memory so far, in bytes: the GPU's if it computes there, else the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---------------------------------------------------------------- the model


def shard(
    model,
    device,
    compute_dtype,
    param_dtype=torch.float32,
    activation_checkpointing="none",
    cpu_offload=False,
    compile=False,
):
    """Prepare a model on the meta device for training, with memory for this process's share of it.

    The memory is uninitialised. Groups of blocks, and then the rest, are sharded over all processes. A single
    process keeps plain parameters, unless cpu_offload asks for FSDP. The master weights, and with them
    AdamW's state, are of param_dtype; computation happens in compute_dtype, which frozen matrices have;
    gradients are reduced in float32 and averaged over processes. activation_checkpointing: "none",
    "selective" or "full".
    """
    for parameter in model.parameters():
        is_frozen_matrix = parameter.dim() > 1 and not parameter.requires_grad
        parameter.data = parameter.data.to(compute_dtype if is_frozen_matrix else param_dtype)
    model.compute_dtype = compute_dtype
    for block in model.blocks:
        checkpoint_activations(block, activation_checkpointing)
        if compile:
            block.forward = torch.compile(block.forward, fullgraph=True)
    if compile:
        model.cross_entropy = torch.compile(model.cross_entropy)

    if dist.get_world_size() > 1 or cpu_offload:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        precision = MixedPrecisionPolicy(
            param_dtype=compute_dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # it would round the float32 cos and sin
        )
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
        kept_whole = {parameter for parameter in model.parameters() if parameter.dim() == 1}
        for group in (*groups_of_blocks(model), model):
            fully_shard(
                group, mesh=mesh, mp_policy=precision, offload_policy=offload, ignored_params=kept_whole
            )

    model.to_empty(device="cpu" if cpu_offload else device)
    if cpu_offload:
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data = parameter.data.to(device)
        use_all_cores()  # AdamW works on the CPU then


def groups_of_blocks(model):
    """Return the runs of blocks that FSDP gathers together, each as short as SMALLEST_GROUP allows.

    Blocks at the end that make no whole run are left out. They belong to the rest of the model.
    """
    blocks = list(model.blocks)
    n = math.ceil(SMALLEST_GROUP / sum(parameter.numel() for parameter in blocks[0].parameters()))
    return [blocks[i : i + n] for i in range(0, len(blocks) - n + 1, n)]


def use_all_cores():
    """Share the machine's cores among its processes. (torchrun leaves each process one thread.)"""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS
    torch.set_num_threads(max(1, cores // local_world_size()))


def checkpoint_activations(block, mode):
    """Make a block keep fewer activations, and compute the others again in the backward pass.

    mode: what it keeps. "full": its input alone. "selective": its input and the results of matrix products
    and attention. "none": everything.
    """
    if mode == "full":
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    elif mode == "selective":
        contexts = partial(create_selective_checkpoint_contexts, save_matrix_products)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def save_matrix_products(context, op, *args, **kwargs):
    """Return what selective checkpointing does with the result of an operation."""
    name = op.overloadpacket.__name__ if hasattr(op, "overloadpacket") else str(op)
    if name == "mm" and args[0].shape[1] * NARROW <= args[1].shape[1]:
        # It is an adapter's second product: as much to keep as the layer's own, nearly nothing to compute.
        return CheckpointPolicy.PREFER_RECOMPUTE
    if name in ("mm", "addmm", "_scaled_mm") or "scaled_dot_product" in name:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def matrices(model):
    """Return the trained parameters that have rows and columns."""
    return [p for p in model.parameters() if p.requires_grad and p.dim() > 1]


def vectors(model):
    """Return the other trained parameters: biases and the weights of norms, often none beside adapters."""
    return [p for p in model.parameters() if p.requires_grad and p.dim() == 1]


def own_part(parameter):
    """Return what this process holds of a parameter, a plain tensor, and the slice of rows that it is.

    Of a DTensor sharded by fully_shard the processes hold equal runs of rows, of which the last ones are
    shorter or empty.
    """
    if not isinstance(parameter, DTensor):
        return parameter, slice(0, len(parameter))
    run = math.ceil(len(parameter) / parameter.device_mesh.size())
    first = min(parameter.device_mesh.get_local_rank() * run, len(parameter))
    return parameter.to_local(), slice(first, min(first + run, len(parameter)))


def whole(tensor):
    """Return a tensor of which each process may hold some rows. Every process takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def set_whole(parameter, values):
    """Copy a tensor into a parameter of its shape, of which this process may hold only some rows."""
    local, rows = own_part(parameter)
    local.copy_(values[rows])


# ---------------------------------------------------------------- the step


def adamw(model, lr, share_beside_adapters=1.0):
    """Return the optimizer of what is trained, without weight decay.

    Matrices and vectors must be groups of their own, because only the matrices may be sharded.
    share_beside_adapters: the share of the learning rate for all that is no adapter. The optimizer's
    lr_shares has that of each group.
    """
    groups = {}  # {(whether matrices, whether of adapters): parameters}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((parameter.dim() > 1, ".adapter." in name), []).append(parameter)
    kinds = sorted(groups, reverse=True)  # matrices first
    parameters = [{"params": groups[kind]} for kind in kinds]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
    optimizer.lr_shares = [1.0 if of_adapters else share_beside_adapters for _, of_adapters in kinds]
    return optimizer


def own_examples(batch_size):
    """Return the indices of this process's examples in every global batch."""
    share = batch_size // dist.get_world_size()
    first = dist.get_rank() * share
    return range(first, first + share)


def average_vector_gradients(model):
    """Average the gradients of the vectors over processes, in float32. FSDP averages the others."""
    gradients = [p.grad for p in vectors(model)]
    if not gradients:
        return
    together = torch.cat([gradient.float() for gradient in gradients])
    dist.all_reduce(together)
    together /= dist.get_world_size()
    torch._foreach_copy_(gradients, together.split([len(gradient) for gradient in gradients]))


def clip_gradients(model, max_norm):
    """Scale all gradients so that their norm is at most max_norm. Return the norm before, on the device."""
    groups = [parameters for parameters in (matrices(model), vectors(model)) if parameters]
    norms = []
    for group in groups:
        norms.append(whole(torch.nn.utils.get_total_norm([p.grad for p in group])))
    device = model.norm.weight.device  # that of the computation; offloaded matrices are elsewhere
    grad_norm = torch.stack([norm.to(device) for norm in norms]).norm()
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, grad_norm)
    return grad_norm


def skip_update_unless_finite(optimizer, loss, grad_norm):
    """Make the optimizer's next step change nothing if the loss or the gradient's norm is not finite.

    torch.amp.GradScaler tells the fused kernel to skip a step in the same way: nothing waits for the device.
    Call it before each step.
    """
    is_bad = ~(loss.isfinite() & grad_norm.isfinite())
    a_matrix = optimizer.param_groups[0]["params"][0]
    optimizer.found_inf = is_bad.float().to(a_matrix.device)
