"""Products in float8 are those of the rounded numbers, in every way to train; and what cannot is refused."""

import argparse
import dataclasses
import json

import pytest
import torch
from conftest import losses, needs_gpu
from torch.utils._python_dispatch import TorchDispatchMode

import float8
import fsdp
import model as decoder
from storage.errors import InputError
from tasks import plan

FRACTION_BITS, LEAST_EXPONENT, LARGEST = 3, -6, 448.0  # of e4m3


def rounded(x, dim):
    """Return x, float64, as it is when its largest numbers along dim are brought to float8's largest."""
    scale = x.abs().amax(dim, keepdim=True) / LARGEST
    exponent = (x / scale).abs().log2().floor().clamp(min=LEAST_EXPONENT)
    step = 2 ** (exponent - FRACTION_BITS)
    return torch.round(x / scale / step) * step * scale  # ties to even


def distance(a, b):
    """Return how far a is from b, in norms of b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture
def factors():
    """Return x (T, K), weight (N, K) and the gradient (T, N) of their product, with tokens of many sizes."""
    torch.manual_seed(0)
    x, weight, grad = torch.randn(96, 64), torch.randn(48, 64), 1e-6 * torch.randn(96, 48)
    x *= 2 ** torch.linspace(-4, 12, 96)[:, None]
    return [tensor.bfloat16() for tensor in (x, weight, grad)]


def three_products(factors, linear):
    """Return the result of a linear layer and the gradients of its input and weight."""
    x, weight, grad = factors
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = linear(x[None], weight)[0]
    y.backward(grad)
    return y, x.grad, weight.grad


def test_products_are_those_of_rounded_numbers(factors):
    """Summed in float64, with a scale for each row or column that is summed over.

    What is left is bfloat16's rounding of the result. Float8's own is twenty times as large.
    """
    x, weight, grad = (tensor.double() for tensor in factors)
    expected = (
        rounded(x, 1) @ rounded(weight, 1).T,
        rounded(grad, 1) @ rounded(weight, 0),
        rounded(grad, 0).T @ rounded(x, 0),
    )
    exact = x @ weight.T, grad @ weight, grad.T @ x
    found = three_products(factors, float8.linear)
    for ours, theirs, unrounded in zip(found, expected, exact):
        assert ours.dtype == torch.bfloat16
        assert distance(ours, theirs) < 0.003
        assert 0.02 < distance(ours, unrounded) < 0.08


def test_a_token_blurs_no_other_one(factors):
    """However large it is. With a scale for a whole tensor it would leave little of the others."""
    x, weight, _ = factors
    alone = float8.linear(x[1:].requires_grad_(), weight)
    x = x.detach().clone()
    x[0] = 1e6
    assert torch.equal(float8.linear(x.requires_grad_(), weight)[1:], alone)


def test_zeros_stay_zeros_and_what_is_not_finite_shows(factors):
    x, weight, grad = factors
    empty = torch.zeros_like(grad)
    _, d_x, d_weight = three_products((x, weight, empty), float8.linear)
    assert not d_x.any() and not d_weight.any()
    for bad in (torch.inf, torch.nan):
        x[3, 5] = bad
        y, _, d_weight = three_products((x, weight, grad), float8.linear)
        assert not y[3].isfinite().any() and y[:3].isfinite().all()
        assert not d_weight.isfinite().all()


def test_without_gradients_it_is_bfloat16(factors):
    x, weight, _ = factors
    bias = weight[:, 0]
    with torch.no_grad():
        assert torch.equal(float8.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


# ---------------------------------------------------------------- in a model

CONFIG = decoder.Config(320, 64, 176, 2, 4, 2, 32, 64, qkv_bias=True)


def gradients(mode="none", in_float8=True, lora_rank=0):
    """Return {parameter: its gradient} after one step of a small random model."""
    torch.manual_seed(0)
    model = decoder.Transformer(CONFIG)
    if lora_rank:
        decoder.add_adapters(model, lora_rank, lora_rank, decoder.linear_layers(CONFIG))
        for module in model.modules():
            if isinstance(module, decoder.Adapter):
                torch.nn.init.normal_(module.a, 0, 0.1)
                torch.nn.init.normal_(module.b, 0, 0.1)
    if in_float8:
        decoder.multiply_in_float8(model)
    model.compute_dtype = torch.bfloat16
    for block in model.blocks:
        fsdp.checkpoint_activations(block, mode)
    tokens, targets = torch.randint(CONFIG.vocab_size, (2, 2, 48))
    model(tokens, None, targets).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_gradients_are_near_those_of_bfloat16_however_memory_is_saved(lora_rank):
    """Those of the blocks' matrices are off by more than bfloat16's rounding, none by more than float8's."""
    plain = gradients(in_float8=False, lora_rank=lora_rank)
    ours = gradients(lora_rank=lora_rank)
    assert ours.keys() == plain.keys()
    for name, gradient in ours.items():
        least = 0.02 if "blocks" in name and gradient.dim() == 2 else 0
        assert least < distance(gradient, plain[name]) < 0.15, name
    for mode in ("selective", "full"):
        again = gradients(mode, lora_rank=lora_rank)
        assert all(torch.equal(again[name], gradient) for name, gradient in ours.items())


class CountProducts(TorchDispatchMode):
    """Counts the products in float8."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op is torch.ops.aten._scaled_mm.default
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "lora_rank, mode, products", [(0, "none", 3), (0, "selective", 3), (0, "full", 4), (4, "none", 2)]
)
def test_each_layer_multiplies_in_float8(lora_rank, mode, products):
    """Three times, or twice beside an adapter; full checkpointing once more, and selective not.

    Beside adapters nobody needs the gradient of the first block's input, which q, k and v share.
    """
    with CountProducts() as products_of:
        gradients(mode, lora_rank=lora_rank)
    assert products_of.count == products * 7 * CONFIG.n_layers - (3 if lora_rank else 0)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_compiled_it_computes_the_same_and_keeps_what_is_planned(mode):
    """One graph for the block. Without checkpointing the compiler decides what is kept: no float8 weight.

    PyTorch 2.11 would keep more with checkpointing, but for what multiply_in_float8 allows; 2.13 would not.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = decoder.Transformer(CONFIG)
    decoder.multiply_in_float8(model)
    block, x = model.blocks[0], torch.randn(2, 48, CONFIG.hidden_dim).bfloat16().requires_grad_()
    cos, sin, _ = model.rotations(torch.arange(48).expand(2, 48), 0, 48)
    (block(x, cos, sin) * x.detach()).sum().backward()
    expected = {name: p.grad for name, p in block.named_parameters()}
    model.zero_grad()

    own = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor
        return tensor

    fsdp.checkpoint_activations(block, mode)
    compiled = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = compiled(x, cos, sin)
    # Checkpointing keeps the state of the random numbers too, which is of uint8.
    bytes_kept = sum(tensor.nbytes for tensor in kept.values() if tensor.dtype != torch.uint8)
    (y * x.detach()).sum().backward()
    for name, p in block.named_parameters():
        assert distance(p.grad, expected[name]) < 0.01, name

    tokens = 2 * 48
    of_angles_and_norms = 4 * (CONFIG.rotary_dim + (2 if mode == "none" else 0)) * tokens
    way = plan.Way(48, 2, compute_bytes=2, activation_checkpointing=mode, compiled=True)
    planned = plan.kept_by_block(CONFIG, dataclasses.replace(way, float8=True)) * tokens
    assert bytes_kept - of_angles_and_norms == pytest.approx(planned, rel=0.02)
    if mode == "none":
        assert planned < 0.8 * plan.kept_by_block(CONFIG, way) * tokens


# ---------------------------------------------------------------- runs


def test_a_run_in_float8(train, call, short, tmp_path):
    """It is near one in bfloat16, is recorded, and goes on in float8 alone."""
    in_bfloat16 = losses(train("bfloat16", "--steps", 2, "--dtype", "bfloat16"))
    ours = losses(train("float8", "--steps", 2, "--float8", "--save_every", 1))
    torch.testing.assert_close(ours, in_bfloat16, rtol=0.01, atol=0)
    assert not torch.equal(ours, in_bfloat16)
    record = json.loads((tmp_path / "float8" / "args.json").read_text())
    assert record["float8"] is True and record["dtype"] == "bfloat16"
    done = call("train", *short, "--steps", 2, "--out", tmp_path / "float8", "--resume", "--no-float8")
    assert done.returncode == 2 and "float8" in done.stderr


@needs_gpu
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_gpu_trains_in_float8(train, mode):
    how = ("--device", "cuda", "--steps", 2, "--activation_checkpointing", mode)
    in_bfloat16 = losses(train("bfloat16", *how))
    ours = losses(train("float8", *how, "--float8"))
    torch.testing.assert_close(ours, in_bfloat16, rtol=0.01, atol=0)
    assert not torch.equal(ours, in_bfloat16)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--dtype", "float32"], "--float8"),
        (["--train_len", 60, "--micro_batch_size", 2], "multiple of 16 tokens in a forward pass, not 120"),
    ],
    ids=["results in float32", "odd number of tokens"],
)
def test_what_cannot_be_in_float8_is_refused(call, short, tmp_path, arguments, says):
    done = call("train", *short, "--float8", "--out", tmp_path / "run", *arguments)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and says in line
    assert not (tmp_path / "run" / "args.json").exists()


def test_a_device_that_cannot_multiply_float8_is_refused(call, short, tmp_path, monkeypatch):
    def old_card(*arguments, **more):
        raise RuntimeError("torch._scaled_mm is only supported on devices with compute capability >= 9.0")

    monkeypatch.setattr(torch, "_scaled_mm", old_card)
    done = call("train", *short, "--float8", "--out", tmp_path / "run")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "H100" in line
    assert not (tmp_path / "run" / "args.json").exists()


@pytest.mark.parametrize("field", ["hidden_dim", "intermediate_dim", "n_heads", "n_kv_heads"])
def test_odd_widths_are_refused(field):
    config = argparse.Namespace(hidden_dim=64, intermediate_dim=96, n_heads=2, n_kv_heads=2, head_dim=8)
    float8.check(config, 32, "cpu")
    setattr(config, field, 5)
    with pytest.raises(InputError, match=f"multiples of 16, and one has {5 if 'dim' in field else 40}"):
        float8.check(config, 32, "cpu")
