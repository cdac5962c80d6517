"""LoRA: what adapters compute and learn, what is kept for it, what a run writes.

The reference is a plain model whose weights are W + alpha / rank * B A, computed whole.
"""

import dataclasses
import json
import shutil

import pytest
import torch
import transformers
from conftest import losses, metrics, needs_gpu
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import data
import model as decoder
from hf import adapter, families, scaling, tokenizer, weights
from hf.builtin import open_model
from hf.folder import CheckpointFolder
from storage.errors import InputError
from storage.files import cache_dir

ATTENTION, MLP = (
    ("attention.q", "attention.k", "attention.v", "attention.o"),
    ("mlp.gate", "mlp.up", "mlp.down"),
)


def plain_adapters(config, layers, rank, seed=0):
    """Return {weight of ours: (A, B)} as a run begins with: A as PEFT draws it, B zero. float32, leaves."""
    generator = torch.Generator().manual_seed(seed)
    parameters = families.stored_parameters(config)
    adapters = {}
    for name, parameter in parameters.items():
        if name.endswith(tuple(f".{layer}.weight" for layer in layers)):
            out_features, in_features = parameter.shape
            a, b = torch.empty(rank, in_features), torch.zeros(out_features, rank)
            torch.nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator)
            adapters[name] = (a.requires_grad_(), b.requires_grad_())
    return adapters


def with_changes(plain, adapters, scale):
    """Return {name: W + scale * B A} of the adapted weights of a plain model."""
    return {name: plain.get_parameter(name) + scale * b @ a for name, (a, b) in adapters.items()}


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


# ---------------------------------------------------------------- what adapters compute


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Phi"])
@pytest.mark.parametrize(
    "layers, train", [(ATTENTION + MLP, ()), (("attention.q", "mlp.down"), ("embed", "norm"))]
)
def test_adapters_compute_and_learn_as_whole_weights_do(make_llama, family, layers, train):
    """Also with biases, with GELU, and beside a trained embedding and norms. Nothing else has a gradient."""
    more = {"layer_norm_eps": 1e-5} if family == "Phi" else {}
    folder, _ = make_llama(family=family, **more)
    plain, ours = (weights.load(folder, dtype=torch.float32) for _ in range(2))
    layers = [layer for layer in layers if hasattr(plain.blocks[0].mlp, "gate") or layer != "mlp.gate"]
    decoder.add_adapters(ours, 3, 5, [layer.rpartition(".")[2] for layer in layers], train)
    adapters = plain_adapters(plain.config, layers, 3)
    assert len(adapters) == 2 * len(layers)
    with torch.no_grad():
        for name, (a, b) in adapters.items():
            b.normal_()
            beside = ours.get_submodule(name.removesuffix(".weight")).adapter
            beside.a.copy_(a)
            beside.b.copy_(b)

    tokens, targets = torch.randint(0, 320, (2, 2, 40))
    expected = functional_call(plain, with_changes(plain, adapters, 5 / 3), (tokens,))
    found = ours(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    ours(tokens, targets=targets).backward()
    for name, (a, b) in adapters.items():
        beside = ours.get_submodule(name.removesuffix(".weight")).adapter
        assert relative_error(beside.a.grad, a.grad) < 1e-4 and relative_error(beside.b.grad, b.grad) < 1e-4
    for name, parameter in ours.named_parameters():
        if "adapter" in name:
            continue
        learns = ("embed" in name and "embed" in train) or ("norm" in name and "norm" in train)
        assert (parameter.grad is not None) == parameter.requires_grad == learns, name
        if learns:
            assert relative_error(parameter.grad, plain.get_parameter(name).grad) < 1e-4, name


def test_a_frozen_weight_costs_two_products_of_three(make_llama):
    """The gradient of what it is multiplied with is computed, its own is not. The head's is none either."""
    ours = weights.load(make_llama()[0], dtype=torch.float32)
    decoder.add_adapters(ours, 1, 1, (), ("norm",))  # no adapters: norms alone
    products = sum(m.weight.numel() for m in ours.modules() if isinstance(m, torch.nn.Linear))
    tokens, targets = torch.randint(0, 320, (2, 1, 48))
    with FlopCounterMode(display=False) as counter:
        ours(tokens, targets=targets).backward()
    by_kernel = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert by_kernel["aten.mm"] == 4 * products * 48
    config = ours.config
    assert config.flops_per_token(48) - config.flops_per_token(48, frozen=True) == 2 * products


def saved_numbers(model, forward):
    """Return how many numbers, float32, autograd keeps for the backward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes() // 4, tensor)  # the tensor keeps its address taken
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("targets", [(), ("gate",), ("gate", "up"), ("gate", "up", "down")])
def test_only_what_an_adapter_learns_from_is_kept(targets):
    """SwiGLU needs three tensors of its width. An adapter needs the layer's input, once for gate and up, and
    its own narrow result."""
    config = decoder.Config(320, 64, 96, 1, 4, 4, 16, 64)
    model = decoder.Transformer(config)
    decoder.add_adapters(model, 4, 8, targets)
    T = 50
    x = torch.randn(1, T, 64, requires_grad=True)
    inputs = (64 if targets else 0) + (96 if "down" in targets else 0)
    expected = T * (3 * 96 + inputs + 4 * len(targets))
    assert saved_numbers(model, lambda: model.blocks[0].mlp(x)) == expected


def test_the_loss_keeps_no_gradient_of_a_frozen_head():
    model = decoder.Transformer(decoder.Config(320, 64, 96, 1, 4, 4, 16, 64))
    hidden = torch.randn(50, 64, requires_grad=True)
    targets = torch.randint(0, 320, (50,))
    everything = saved_numbers(model, lambda: model.loss(hidden, targets))
    model.requires_grad_(False)
    assert saved_numbers(model, lambda: model.loss(hidden, targets)) == everything - 320 * 64 == 50 * 64


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of `tiny` in float32, so that an export rounds nothing."""
    folder = tmp_path_factory.mktemp("bases") / "base"
    model = weights.load("tiny", dtype=torch.float32)
    model.config.dtype = "float32"
    weights.save(model, open_model("tiny").load_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def options(base):
    """The arguments by which a run of `short` becomes one with adapters on all layers of `base`."""
    return ("--model", base, "--target_len", 2048, "--beta_fast", 8, "--lora_rank", 4)


@pytest.fixture(scope="module")
def four_steps(train_into, options, tmp_path_factory):
    """The folder of a run of four steps with adapters, with checkpoints and all else that is written."""
    out = tmp_path_factory.mktemp("runs") / "lora"
    train_into(out, *options, "--steps", 4, "--save_every", 2, "--adapter")
    return out


@pytest.fixture(scope="module")
def sharded(train_into, options, tmp_path_factory):
    """The folder of such a run of two processes that save memory. (Every way to save it: test_fsdp.py.)"""
    out = tmp_path_factory.mktemp("runs") / "sharded"
    savers = ("--micro_batch_size", 1, "--activation_checkpointing", "full", "--cpu_offload")
    train_into(out, *options, "--steps", 4, "--save_every", 2, "--adapter", *savers, processes=2)
    return out


LRS = [0.5e-3, 1e-3, 1e-3, 0.5e-3]  # what `short` asks for in a run of four steps


@pytest.fixture(scope="module")
def plain_run(base, texts):
    """Train A and B of whole weights W + B A on the same examples with a plain loop.

    Return the losses, the gradient norms, and the model at the end."""
    plain = weights.load(base).requires_grad_(False)
    plain.config = scaling.extend(plain.config, "yarn", 2048, factor=8, beta_fast=8)
    adapters = plain_adapters(plain.config, ATTENTION + MLP, 4)
    learning = [part for pair in adapters.values() for part in pair]
    documents = data.tokenised([texts], tokenizer.load(base), cache_dir())
    sampling = {"method": "pose", "target_len": 2048, "chunks": 2, "offset": "uniform"}
    bos = open_model(base).load_tokenizer().bos_id
    batches = data.Batches(documents, 0, bos, train_len=64, **sampling)
    optimizer = torch.optim.AdamW(learning, weight_decay=0.0)
    nats, norms = [], []
    for step, lr in enumerate(LRS):
        tokens, positions, targets = (
            torch.cat([torch.from_numpy(example[i]) for example in batches(step, range(4))]) for i in range(3)
        )
        logits = functional_call(plain, with_changes(plain, adapters, 2), (tokens, positions))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(learning, 1.0).item())
        nats.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for name, weight in with_changes(plain, adapters, 2).items():
            plain.get_parameter(name).copy_(weight)
    return nats, norms, plain


def check_curve(lines, plain_run):
    for line, loss, norm in zip(lines, *plain_run[:2], strict=True):
        assert line["loss"] == pytest.approx(loss, rel=1e-4)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_the_curve_is_that_of_a_plain_loop(four_steps, sharded, plain_run):
    check_curve(metrics(four_steps), plain_run)
    check_curve(metrics(sharded), plain_run)


@needs_gpu
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_gives_the_curve_of_a_plain_loop(train, options, plain_run, dtype, mode):
    """Compiled. On the GPU bfloat16 rounds the frozen weights when they are read."""
    how = ("--device", "cuda", "--dtype", dtype, "--activation_checkpointing", mode)
    lines = train("gpu", *options, "--steps", 4, *how)
    loss_error, norm_error = (1e-4, 1e-3) if dtype == "float32" else (1e-2, 5e-2)
    for line, loss, norm in zip(lines, *plain_run[:2], strict=True):
        assert line["loss"] == pytest.approx(loss, rel=loss_error)
        assert line["grad_norm"] == pytest.approx(norm, rel=norm_error)


def test_the_adapters_are_merged_into_the_model(four_steps, plain_run, base):
    """What was frozen is as it was, to the last bit."""
    tokens = torch.randint(0, 2048, (1, 600))
    merged = weights.load(four_steps / "model")
    with torch.no_grad():
        expected = plain_run[2](tokens)
        torch.testing.assert_close(merged(tokens), expected, rtol=0, atol=2e-3)
        base_model = weights.load(base)
        base_model.config = merged.config
        assert (base_model(tokens) - expected).abs().max() > 0.1  # it learned something
    before, after = (load_file(folder / "model.safetensors") for folder in (base, four_steps / "model"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "proj" not in name}


def test_only_what_is_named_is_trained(train, options, base, tmp_path):
    """AdamW's first step moves a number by the learning rate, here 5e-4. Whole weights have a tenth of it."""
    others = ("--lora_train", "norm,embed", "--lora_targets", "q,up", "--lora_alpha", 6)
    train("run", *options, *others, "--steps", 1)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "run" / "model"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    frozen = ("k_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
    assert same == {name for name in before if any(part in name for part in frozen)}
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert (after[name] - before[name]).abs().max() == pytest.approx(0.5e-4, rel=0.01)


def test_untrained_adapters_change_nothing(call, options, short, base, tmp_path):
    done = call("train", *short, *options, "--steps", 0, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "run" / "model"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_checkpoint_holds_what_is_trained_and_no_more(four_steps):
    stored = FileSystemReader(four_steps / "checkpoints" / "step-2").read_metadata().state_dict_metadata
    layers = [
        f"blocks.{i}.{layer}.adapter.{part}" for i in range(4) for layer in ATTENTION + MLP for part in "ab"
    ]
    assert {key for key in stored if key.startswith("model.")} == {f"model.{layer}" for layer in layers}
    moments = {key.removeprefix("optimizer.state.") for key in stored if key.startswith("optimizer.state.")}
    assert moments == {f"{layer}.{part}" for layer in layers for part in ("step", "exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize("which", ["four_steps", "sharded"])
def test_a_run_that_goes_on_is_the_same(request, call, tmp_path, which):
    """To the last bit, if as many processes go on."""
    whole, out = request.getfixturevalue(which), tmp_path / "run"
    shutil.copytree(whole, out, symlinks=True)
    for name in ("model", "checkpoints/step-4"):
        shutil.rmtree(out / name)
    (out / "finished.json").unlink()
    (out / "adapter" / "adapter_model.safetensors").write_bytes(b"of an interrupted run, and replaced")
    done = call("train", "--resume", "--out", out, "--no-cpu_offload")
    assert done.returncode == 0 and "going on after step 2" in done.stderr, done.stderr
    error = 1e-5 if which == "sharded" else 0
    torch.testing.assert_close(losses(metrics(out)), losses(metrics(whole)), rtol=error, atol=0)
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        found, expected = load_file(out / file), load_file(whole / file)
        assert found.keys() == expected.keys()
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=100 * error)


# ---------------------------------------------------------------- PEFT


def test_peft_and_transformers_load_the_adapters(four_steps, base):
    """By each way to load them, on the extended base, they are the model of OUT/model."""
    from peft import AutoPeftModelForCausalLM, PeftModel

    own = four_steps / "adapter"
    how = {"dtype": torch.float32}
    stock = transformers.AutoModelForCausalLM
    tokens = torch.randint(0, 2048, (1, 600))
    on_base = stock.from_pretrained(own / "base", **how)
    with torch.no_grad():
        expected = weights.load(four_steps / "model")(tokens)
        assert (on_base(tokens).logits - expected).abs().max() > 0.1
        for loaded in (
            AutoPeftModelForCausalLM.from_pretrained(own, **how),
            stock.from_pretrained(own, **how),
            PeftModel.from_pretrained(on_base, own),  # it changes on_base
        ):
            torch.testing.assert_close(loaded(tokens).logits, expected, rtol=0, atol=2e-3)
    assert {path.name for path in own.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "base",
    }
    assert (own / "base" / "model.safetensors").resolve() == (base / "model.safetensors").resolve()
    assert json.loads((own / "adapter_config.json").read_text())["modules_to_save"] is None


@pytest.mark.parametrize(
    "family, beta, tied", [("Phi", 0, False), ("Llama", 0.2, False), ("Llama", 0, True), ("Phi", 0, True)]
)
def test_peft_finds_all_that_was_trained_in_the_family_that_is_written(
    make_llama, tmp_path, family, beta, tied
):
    """Also embedding and norms. Phi has other names, and with scaled queries another class reads LLaMA's.

    A head that is tied to a trained embedding is trained with it. Phi's has a bias, which stays.
    """
    from peft import AutoPeftModelForCausalLM

    more = {"layer_norm_eps": 1e-5, "partial_rotary_factor": 1.0} if family == "Phi" else {}
    folder, _ = make_llama(family=family, tie_word_embeddings=tied, **more)
    ours = weights.load(folder)
    ours.config = scaling.extend(ours.config, "yarn", 512, beta)
    decoder.add_adapters(ours, 3, 5, decoder.linear_layers(ours.config), ("embed", "norm"))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                before = 0 if "adapter" in name else parameter
                parameter.copy_(before + 0.1 * torch.randn_like(parameter))
    adapter.check(ours.config)
    adapter.save(ours, CheckpointFolder(folder), open_model("tiny").load_tokenizer(), tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    tokens = torch.randint(0, 320, (1, 200))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, ours(tokens), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "model_type, reason",
    [
        ("gptj", "those of phi"),
        ("baichuan", "those of llama"),
        ("phi3", "one layer"),
        ("gpt_neox", "one layer"),
    ],
)
def test_adapters_that_would_fit_no_stock_model_are_refused(model_type, reason):
    config = decoder.Config(320, 64, 96, 2, 4, 4, 16, 64, model_type=model_type)
    config = dataclasses.replace(config, **families.FAMILIES[model_type].block)
    with pytest.raises(InputError, match=f"adapters of {model_type} .* {reason}"):
        adapter.check(config)
