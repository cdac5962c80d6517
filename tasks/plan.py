"""What a training run will need, known before it begins: memory of a process, disk, how often texts are read.

Notable choices:
- Memory is a sum of a few terms, each with its reason beside it. It is the peak of what PyTorch allocates in
  one step from the second one on, without PyTorch itself (on a GPU the CUDA context, about 0.5 GiB).
- A step has its peak at one of four moments: in the loss, when all activations are there and the loss's own
  logits; when the backward pass begins, with the last block; when it reaches the first block, with all
  gradients; or behind it, when FSDP reduces the gradients of embedding and head together. Which one depends
  on the shape, so all four are added up and the largest counts.
- Small change is left out: vectors that a block keeps, the ids of the next batch, a block's smaller products.
"""

import contextlib
import itertools
import math
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import fsdp
from model import loss_chunk_tokens
from storage.files import existing_folder
from storage.processes import local_rank, local_world_size


@dataclass(frozen=True)
class Way:
    """How a process computes a step: what memory depends on besides the model's Config.

    examples: in one forward pass, each of train_len tokens. micro_batches: forward passes in a step.
    param_bytes, compute_bytes: of a number in the master weights and in the computation. The others are
    fsdp.shard's.
    """

    train_len: int
    examples: int = 1
    micro_batches: int = 1
    processes: int = 1
    param_bytes: int = 4
    compute_bytes: int = 4
    activation_checkpointing: str = "none"
    cpu_offload: bool = False
    compiled: bool = False
    float8: bool = False  # the products of trained weights are, see float8.py

    @property
    def tokens(self):
        """Tokens in one forward pass."""
        return self.examples * self.train_len

    @property
    def is_sharded(self):
        """Whether FSDP holds the matrices, see fsdp.shard."""
        return self.processes > 1 or self.cpu_offload

    @property
    def rounds_again(self):
        """Whether the backward pass makes the factors of products again instead of finding them kept.

        The compiler does so in float8: it takes few operations to round them from what is kept anyway.
        """
        return self.float8 and self.compiled


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its peak, by what takes them, on the device that computes.

    host: with cpu_offload, bytes of host memory besides.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int  # and what else a step makes and drops again
    host: int = 0

    @property
    def total(self):
        """All bytes on the device that computes."""
        return self.weights + self.gradients + self.optimizer + self.activations


CUDA_CONTEXT = 2**29  # bytes that CUDA takes on a GPU besides PyTorch's tensors, roughly
LOADED_LATER = 2**26  # bytes of Python and PyTorch that the first step loads, roughly


class Shape:
    """A model's Config, and how many numbers its parameters hold.

    group: in blocks that FSDP gathers together, 0 if there are too few for a group. root: in all that it
    gathers besides. trained, trained_in_group and so on: how many of them are trained.
    """

    def __init__(self, model):
        """Count the parameters of a Transformer, with its adapters if it has some. They need no values."""
        self.config = model.config
        every = list(model.parameters())  # a tied head is there once
        trained = [parameter for parameter in every if parameter.requires_grad]
        of_block = list(model.blocks[0].parameters())
        self.parameters, self.trained = count(every), count(trained)
        self.vectors = count(p for p in every if p.dim() == 1)
        self.trained_vectors = count(p for p in trained if p.dim() == 1)
        self.matrices = self.parameters - self.vectors
        self.trained_matrices = self.trained - self.trained_vectors
        self.trained_in_block = count(p for p in of_block if p.requires_grad)
        groups = fsdp.groups_of_blocks(model)  # which are equally long
        n_together = len(groups[0]) if groups else 0
        self.group, self.trained_in_group = n_together * count(of_block), n_together * self.trained_in_block
        self.root = self.parameters - len(groups) * self.group
        self.trained_in_root = self.trained - len(groups) * self.trained_in_group
        self.trained_head = count([model.head.weight]) if model.head.weight.requires_grad else 0


def count(parameters):
    """Return how many numbers some parameters hold."""
    return sum(parameter.numel() for parameter in parameters)


# ---------------------------------------------------------------- the terms, in bytes


def kept_by_block(config, way, mode=None):
    """Return the bytes that a block keeps for its backward pass, per token.

    mode: of activation checkpointing, by default the way's own.
    """
    mode = mode or way.activation_checkpointing
    c = way.compute_bytes
    C, inner = config.hidden_dim, config.intermediate_dim
    q = config.n_heads * config.head_dim  # numbers in a token's queries; the output of attention has as many
    kv = 2 * config.n_kv_heads * config.head_dim
    n_wide = 2 if config.mlp == "swiglu" else 1  # products of width `inner`: gate and up, or up alone
    attention = c * (q + kv + q) + 4 * config.n_heads  # what its backward pass reads, and float32 log-sums
    if mode == "full":
        return c * C  # its input
    if mode == "selective":
        # Its input, and the results of all products and of attention. The compiler sees that nobody needs the
        # result of the last product again.
        results = C + n_wide * inner + (0 if way.compiled else C)
        return c * C + attention + c * results
    # The normed inputs of attention and MLP, and what the last product reads.
    read = 2 * C + inner
    if way.rounds_again:
        # The inputs of both norms, what the activation function reads, and in float8, a byte a number, what
        # attention's last product multiplies.
        return attention + q + c * (2 * C + n_wide * inner)
    if way.compiled:
        # The inputs of both norms, which are computed again from them. So is the activation function.
        return attention + c * (read + 2 * C + n_wide * inner)
    # An RMSNorm keeps its input and what it multiplies by the weight, in float32 (on a GPU its input alone).
    # SwiGLU keeps silu(gate) besides gate and up.
    by_norm = 2 * 4 if config.norm == "rms" else way.param_bytes
    n_by_mlp = 3 if config.mlp == "swiglu" else 1
    return attention + c * (read + n_by_mlp * inner) + 2 * by_norm * C


def kept_outside(config, way):
    """Return the bytes that are kept outside of the blocks, per token.

    Those are what the last norm keeps, the gradient of its output, which the loss computes at once, cos and
    sin, and the ids, positions, targets and weights of the tokens.
    """
    # On a GPU, where blocks are compiled, the norm's kernel keeps its input alone.
    of_norm = (way.param_bytes if way.compiled else 2 * 4) * config.hidden_dim
    return of_norm + way.compute_bytes * config.hidden_dim + 4 * config.rotary_dim + 3 * 8 + 4


def rounded_weights(n, way):
    """Return the bytes of n weights as they are used, if they are held in another dtype and not sharded.

    (FSDP's own copies are in `gathered`.)
    """
    return 0 if way.is_sharded or way.param_bytes == way.compute_bytes else way.compute_bytes * n


def gathered(shape, way):
    """Return the bytes of FSDP's copies in the backward pass.

    Of the groups, one is gathered; its gradients are whole, and once more in float32, in which they are
    reduced.
    """
    if not way.is_sharded:
        return 0
    c = way.compute_bytes
    return gathered_for_loss(shape, way) + c * shape.group + (c + 4) * shape.trained_in_group


def gathered_for_loss(shape, way):
    """Return the bytes of FSDP's copies when the loss is computed.

    Embedding, head and blocks without a group stay gathered from the forward pass on. The buffer in which a
    group arrived, or all of that where there are no groups, stays until the next one arrives.
    """
    return way.compute_bytes * (shape.root + (shape.group or shape.root)) if way.is_sharded else 0


def loss_work(shape, way):
    """Return the bytes that the loss takes besides what it leaves (ChunkedCrossEntropy)."""
    config, c = shape.config, way.compute_bytes
    logits = config.vocab_size * min(way.tokens, loss_chunk_tokens(config.vocab_size))
    # Logits and their gradient. Without the compiler that is float32, and one-hot targets stand beside it, as
    # bools and as float32.
    of_logit = 2 * c if way.compiled else c + 4 + 1 + 4
    # Its gradient is summed in float32.
    head = 4 * shape.trained_head + rounded_weights(shape.trained_head, way)
    return of_logit * logits + head + c * config.hidden_dim * way.tokens


def backward_work(shape, way):
    """Return the bytes that the backward pass of one block takes besides what the forward pass kept."""
    config, c, w = shape.config, way.compute_bytes, way.param_bytes
    again = 0  # computed again
    if way.activation_checkpointing != "none":
        again = way.tokens * (kept_by_block(config, way, "none") - kept_by_block(config, way))
        again += rounded_weights(shape.trained_in_block, way)
    # The gradients of the residual stream and of the MLP's inner activations, less what they replace.
    n_inner = 2 if config.mlp == "swiglu" and not way.compiled else 1
    of_activations = c * way.tokens * (n_inner * config.intermediate_dim + 2 * config.hidden_dim)
    if way.rounds_again:  # a gradient in float8, once by rows and once by columns
        of_activations += 2 * way.tokens * config.intermediate_dim
    # Gradients of weights arrive in the dtype of the computation. Compiled, those of a block come together.
    n_together = shape.trained_in_block
    if not way.compiled:
        n_together = min(n_together, config.intermediate_dim * config.hidden_dim)
    of_weights = 0 if way.is_sharded else (c if c != w else 0) * n_together
    if way.micro_batches > 1 and not way.is_sharded:
        of_weights += w * n_together  # which are then added to those of the micro-batches before
    return again + of_activations + of_weights


# ---------------------------------------------------------------- the sum


def memory(shape, way):
    """Return the Memory that a process needs for training steps of a model of this Shape."""
    config, w = shape.config, way.param_bytes
    trained, frozen = shape.trained_matrices, shape.matrices - shape.trained_matrices
    # What a process holds of them; frozen matrices have the dtype of the computation.
    of_trained, of_frozen = w * trained / way.processes, way.compute_bytes * frozen / way.processes
    host = 4 * of_trained + of_frozen if way.cpu_offload else 0
    if way.cpu_offload:
        of_trained = of_frozen = 0
    weights = of_trained + of_frozen + w * shape.vectors
    state = of_trained + w * shape.trained_vectors  # of gradients; AdamW's moments take twice as much

    kept = kept_by_block(config, way) * way.tokens
    outside = kept_outside(config, way) * way.tokens
    all_kept = config.n_layers * kept + outside
    if way.activation_checkpointing == "none" and not way.rounds_again:
        all_kept += rounded_weights(config.n_layers * shape.trained_in_block, way)
    of_head = 2 * way.compute_bytes + (0 if way.is_sharded else way.param_bytes)  # of its weight's gradient
    work = backward_work(shape, way) + gathered(shape, way)
    # The root's gradients stay whole until the last of them, the embedding's, is there. Then they are reduced
    # in float32, and no weights are gathered any more.
    of_root = shape.trained_in_root if way.is_sharded else 0

    earlier = state if way.micro_batches > 1 else 0  # gradients of earlier micro-batches
    moments = [  # (gradients, everything else that comes and goes)
        (earlier, all_kept + gathered_for_loss(shape, way) + loss_work(shape, way)),
        (earlier, all_kept + of_head * shape.trained_head + work),
        (state, kept + outside + work + way.compute_bytes * of_root),
        (state, (way.compute_bytes + 4) * of_root),
    ]
    gradients, activations = max(moments, key=sum)
    return Memory(round(weights), round(gradients), round(2 * state), round(activations), round(host))


# ---------------------------------------------------------------- a place to run


@dataclass(frozen=True)
class Room:
    """What there is for a run, in bytes.

    memory: of one process, on the device that computes. beside: what it takes of that besides a step's
    tensors. disk: free. on_cpu: whether the device is the CPU. host: a process's share of the host's memory.
    """

    memory: float
    beside: float
    disk: int
    on_cpu: bool
    host: float = math.inf


def room_for(device, out):
    """Return the Room of a process that computes on "cuda" or "cpu" and writes into the folder `out`.

    The folder need not exist yet. On a CPU the processes of this machine share its memory.
    """
    disk = shutil.disk_usage(existing_folder(out)).free
    host = host_memory() / local_world_size()
    if device == "cuda":
        of_gpu = torch.cuda.get_device_properties(local_rank())
        return Room(of_gpu.total_memory, CUDA_CONTEXT, disk, on_cpu=False, host=host)
    beside = fsdp.peak_memory(torch.device(device)) + LOADED_LATER
    return Room(host, beside, disk, on_cpu=True, host=host)


def host_memory():
    """Return the bytes of memory of this machine, or what its container may have of them."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max" in it
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory


def of_process(shape, way, room):
    """Return the bytes of a whole process on the device that computes.

    On a CPU the heap keeps room for what was freed: measured with glibc, 0.4 of what a step makes and drops,
    or 0.1 where most tensors have more than 32 MiB, which it gives back.
    """
    need = memory(shape, way)
    bytes_of_a_tensor = way.compute_bytes * way.tokens * shape.config.hidden_dim
    heap = (0.4 if bytes_of_a_tensor < 2**25 else 0.1) * need.activations if room.on_cpu else 0
    offloaded = need.host if room.on_cpu else 0  # to the same memory
    return need.total + offloaded + room.beside + heap


def way_that_fits(shape, way, room):
    """Return the Way nearest to `way` with which a process has room, None if there is none.

    What costs nothing but speed is tried first: fewer examples at once, then recomputing. Then come weights
    in bfloat16, which cost precision, and for a GPU the host's memory, which is slow.
    """
    choices = itertools.product(
        (way.cpu_offload,) if room.on_cpu or way.cpu_offload else (False, True),
        (way.param_bytes, 2),
        (way.activation_checkpointing, "full"),
        [n for n in range(way.examples, 0, -1) if way.examples % n == 0],
    )
    for cpu_offload, param_bytes, checkpointing, examples in choices:
        other = replace(
            way,
            examples=examples,
            micro_batches=way.micro_batches * (way.examples // examples),
            param_bytes=param_bytes,
            activation_checkpointing=checkpointing,
            cpu_offload=cpu_offload,
        )
        if of_process(shape, other, room) <= room.memory:
            return other
    return None
