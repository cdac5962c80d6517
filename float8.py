"""The matrix products of linear layers in float8, which an H100 multiplies twice as fast as bfloat16.

Float8 (e4m3) has three bits of fraction, and its largest number is 230,000 times its smallest. So each factor
of a product is first divided by a scale that brings its largest number to the largest of float8, and rounded.
The tensor core multiplies and sums these numbers, and multiplies the sum by both scales.

Notable choices:
- All three products of a layer are in float8: the result and, backward, the gradients of input and weight.
- A scale is computed from the numbers at hand, right before their product: nothing is remembered between
  steps, and no number is ever too large.
- Each row or column that a product sums over has a scale of its own. A few tokens of a trained LLaMA, the
  first one above all, have activations thousands of times the others' (Sun et al. 2024). One scale for a
  whole tensor would leave the others near the smallest float8 numbers, with fewer digits or none.
- Sums stay in the tensor core's own 22 bits (use_fast_accum), instead of moving to float32 every 128 terms.
  For LLaMA-7B's products on an H200 this saves a tenth of the time. It puts results off by 0.1 to 0.3%,
  where float8 itself puts them off by 3.7%.
- Gradients are e4m3 too, as in torchao and torchtitan. The larger span of e5m2, which has two bits of
  fraction (Micikevicius et al. 2022, section 3), is needed where one scale does for a whole tensor.
- Input and weight are kept for the backward pass as without float8, and rounded once more there, since the
  gradients sum over other dimensions. Compiled, much of that is not kept but made again (see tasks/plan.py).
- Without gradients the products are in bfloat16: validation measures the model as it will be written.

The cost is reading each factor twice, for its largest number and to round it, and writing it in the order
that the tensor core wants. torch.compile makes one or two kernels of that; without it most of the gain is
lost.
"""

import torch
import torch.nn.functional as F

from storage.errors import InputError
from storage.processes import local_rank

MULTIPLE = 16  # All sizes of a product must be multiples of it.
LEAST = 1e-30  # the scale where all numbers are 0
REMEDY = "multiply in bfloat16"


def linear(x, weight, bias=None):
    """Return what F.linear does: x (..., K), weight (N, K), bias (N,) or None -> (..., N), all bfloat16."""
    if not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    y = Products.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


class Products(torch.autograd.Function):
    """x @ weight.T in float8, x (T, K) and weight (N, K) -> (T, N), and both gradients."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        x8, x_scale = quantise(x, 1)
        weight8, weight_scale = quantise(weight, 1)
        return product(x8, weight8.t(), x_scale, weight_scale)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:  # a sum over the N results
            grad8, grad_scale = quantise(grad, 1)
            weight8, weight_scale = quantise(weight, 0)
            d_x = product(grad8, weight8, grad_scale, weight_scale)
        if ctx.needs_input_grad[1]:  # a sum over the T tokens
            grad8, grad_scale = quantise(grad, 0)
            x8, x_scale = quantise(x, 0)
            d_weight = product(grad8.t(), x8, grad_scale, x_scale)
        return d_x, d_weight


def quantise(x, dim):
    """Return x (R, S) divided by scales and rounded to float8, and the scales, float32.

    dim: the dimension that a product sums over, 1 or 0. The numbers along it share a scale.
    """
    largest = x.abs().amax(dim, keepdim=True).float()
    scale = (largest / torch.finfo(torch.float8_e4m3fn).max).clamp(min=LEAST)
    return (x / scale).to(torch.float8_e4m3fn), scale  # bfloat16 over float32 is float32


def product(a, b, scale_a, scale_b):
    """Return a (M, S) @ b (S, N), both float8, times their scales: bfloat16 (M, N).

    The tensor core reads the first factor by rows and the second one by columns. What lies otherwise is
    copied, a byte a number; compiled, it is written in that order at once.
    """
    factors = a.contiguous(), b.t().contiguous().t()
    scales = scale_a.reshape(-1, 1), scale_b.reshape(1, -1)
    return torch._scaled_mm(*factors, *scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def check(config, tokens, kind):
    """Raise InputError unless a model of this Config can be trained in float8.

    tokens: in a forward pass of a process. kind: of the device that computes, "cuda" or "cpu".
    """
    of_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    for size in (config.hidden_dim, config.intermediate_dim, *of_heads):
        if size % MULTIPLE:
            raise InputError(
                f"float8 needs layers with multiples of {MULTIPLE}, and one has {size}; {REMEDY}"
            )
    if tokens % MULTIPLE:
        raise InputError(
            f"float8 needs a multiple of {MULTIPLE} tokens in a forward pass, not {tokens}; choose another "
            "length of the examples, or more of them at once"
        )
    # Each process tries its own GPU, since a tensor on another one would take half a GiB there.
    place = torch.device(kind, local_rank()) if kind == "cuda" else kind
    ones = torch.ones(MULTIPLE, MULTIPLE, device=place).to(torch.float8_e4m3fn)
    scales = torch.ones(MULTIPLE, device=place)
    try:
        product(ones, ones, scales, scales)
    except (RuntimeError, ValueError):
        raise InputError(f"float8 takes an H100 or a later GPU, which this device is not; {REMEDY}") from None
