"""GPT-J, Phi and Baichuan, and every family's logits and gradients under every interpolation.

The oracles: transformers for LLaMA, Mistral, Qwen2, Phi and GPT-J, given the frequencies of an
interpolation that a class does not know. Baichuan is code of its own, so it is written down here from
its description, and for scaling it is stock LLaMA with W_pack cut in three.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import hf_logits, scaling_of
from safetensors.torch import load_file, save_file
from test_model import pose_positions
from test_rope import by_hand
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import rope
from hf import convert, tokenizer, weights
from storage.files import InputError

TINY = Path(__file__).parent.parent / "assets" / "tiny"
T, HEADS, HEAD_DIM, ROTARY, VOCAB = 40, 4, 16, 8, 320
TOKENS = torch.randint(0, VOCAB, (2, T), generator=torch.Generator().manual_seed(7))
TARGETS = torch.randint(0, VOCAB, (2, T), generator=torch.Generator().manual_seed(8))
NEAR = torch.arange(T).expand(2, T)
FAR = NEAR + 460 * (NEAR >= 15)
GPTJ = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": HEADS,
    "n_positions": 64,
    "n_inner": None,
    "rotary_dim": ROTARY,
}
PHI = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}  # fmt: skip
BAICHUAN = PHI | {
    "model_type": "baichuan",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def randomised(model):
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.12)
    return model.eval()


class Baichuan(torch.nn.Module):
    """Its forward pass in plain matrix products, with the published names of the weights."""

    def __init__(self, config):
        super().__init__()
        self.normalised = "z_loss_weight" in config
        C, V, M = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
        shapes = {"model.embed_tokens": (V, C), "model.norm": (C,), "lm_head": (V, C)}
        for i in range(config["num_hidden_layers"]):
            inside = {
                "self_attn.W_pack": (3 * C, C),
                "self_attn.o_proj": (C, C),
                "input_layernorm": (C,),
                "post_attention_layernorm": (C,),
            }
            inside |= {"mlp.gate_proj": (M, C), "mlp.up_proj": (M, C), "mlp.down_proj": (C, M)}
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in inside.items()}
        self.w = {f"{name}.weight": torch.nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}

    def parameters(self):
        return self.w.values()

    def named_parameters(self):
        return self.w.items()

    def state_dict(self):
        return {name: p.detach() for name, p in self.w.items()}

    def forward(self, tokens, positions):
        w = {name.removesuffix(".weight"): p for name, p in self.w.items()}
        angles = positions[:, None, :, None].double() * 10000.0 ** (
            -torch.arange(HEAD_DIM // 2) / (HEAD_DIM / 2)
        )  # (B, 1, T, D/2)
        turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
        hidden_from = torch.full((T, T), -math.inf).triu(1)

        def norm(x, weight):
            return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

        def rotated(x):
            y = torch.complex(x[..., : HEAD_DIM // 2], x[..., HEAD_DIM // 2 :]) * turn
            return torch.cat((y.real, y.imag), -1)

        x = w["model.embed_tokens"][tokens]
        for i in range(2):
            layer = {name.removeprefix(f"model.layers.{i}."): p for name, p in w.items()}
            packed = norm(x, layer["input_layernorm"]) @ layer["self_attn.W_pack"].T
            q, k, v = (part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for part in packed.split(64, -1))
            scores = rotated(q) @ rotated(k).transpose(2, 3) / HEAD_DIM**0.5 + hidden_from
            x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ layer["self_attn.o_proj"].T
            h = norm(x, layer["post_attention_layernorm"])
            gate = h @ layer["mlp.gate_proj"].T
            x = x + (gate * gate.sigmoid() * (h @ layer["mlp.up_proj"].T)) @ layer["mlp.down_proj"].T
        head = w["lm_head"]
        if self.normalised:
            head = head / head.square().sum(1, keepdim=True).sqrt()
        return norm(x, w["model.norm"]) @ head.T


class BaichuanAsLlama(Baichuan):
    """The same weights computed by stock LLaMA, which knows scaling."""

    def __init__(self, config):
        super().__init__(config)
        settings = {
            key: value
            for key, value in config.items()
            if key not in ("model_type", "torch_dtype", "z_loss_weight")
        }
        self.llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()

    def forward(self, tokens, positions):
        state = {}
        for name, p in self.w.items():
            if "W_pack" in name:
                state |= {
                    name.replace("W_pack", f"{x}_proj"): p[64 * i : 64 * (i + 1)] for i, x in enumerate("qkv")
                }
            else:
                state[name] = (
                    p / p.norm(dim=1, keepdim=True) if name == "lm_head.weight" and self.normalised else p
                )
        inputs = {"attention_mask": torch.ones_like(tokens), "position_ids": positions}
        return torch.func.functional_call(self.llama, state, (tokens,), inputs).logits


OURS = (
    "ntk",
    "ntk_by_parts",
    "yarn_revised",
)  # transformers has no functions for these: the equations are written down in test_rope.py


def frequencies(scaling, dim, n):
    """Frequencies and the factor on cos and sin, for n tokens, from transformers' own functions or from
    the equations."""
    mode = scaling["rope_type"]
    if mode in OURS:
        inv_freq, factor = by_hand(mode, 10000.0, dim, scaling["factor"], 64, n)
        return torch.tensor(inv_freq), factor
    like = transformers.LlamaConfig(
        head_dim=dim, max_position_embeddings=64, rope_parameters={"rope_theta": 10000.0} | scaling
    )
    return ROPE_INIT_FUNCTIONS[mode](like, "cpu", seq_len=n)


def stretch(model, scaling, positions):
    """Give a stock model frequencies that its own class does not compute: GPT-J's knows no scaling, the
    others not every one."""
    n = int(positions.max()) + 1
    for module in model.modules():
        if hasattr(module, "embed_positions"):  # GPT-J's tables
            inv_freq, factor = frequencies(scaling, ROTARY, n)
            angles = torch.arange(n)[:, None] * inv_freq
            module.embed_positions = torch.cat((angles.sin(), angles.cos()), 1) * factor
        elif hasattr(module, "inv_freq") and scaling["rope_type"] in OURS:
            module.inv_freq, module.attention_scaling = frequencies(scaling, 2 * len(module.inv_freq), n)


@pytest.fixture
def make(make_llama, tmp_path):
    """make(family, scaling=None, **config) -> a folder in the published layout with random weights, and
    oracle(tokens, positions) -> logits, a module with the published names."""

    def make(family, scaling=None, **changes):
        own = scaling is not None and (
            family == "gptj" or scaling["rope_type"] in OURS
        )  # written into config.json afterwards
        rope = {"rope_parameters": {"rope_theta": 10000.0} | scaling} if scaling and not own else {}
        folder = tmp_path / family
        if family in ("llama", "mistral", "qwen2"):
            classes = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
            folder, model = make_llama(
                family,
                classes[family],
                **({"sliding_window": None} if family == "mistral" else {}) | rope | changes,
            )
        elif family.startswith("baichuan"):
            config = BAICHUAN | rope | changes | ({"z_loss_weight": 0} if family == "baichuan2" else {})
            model = randomised((BaichuanAsLlama if scaling else Baichuan)(config))
            folder.mkdir()
            save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "config.json").write_text(json.dumps(config))
        elif family == "phi":
            model = randomised(transformers.PhiForCausalLM(transformers.PhiConfig(**PHI | rope | changes)))
            model.save_pretrained(folder)
        else:
            model = randomised(
                transformers.GPTJForCausalLM(
                    transformers.GPTJConfig(**GPTJ | {"n_positions": 2048} | changes)
                )
            )
            model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        if family == "gptj":
            config |= {"n_positions": 64} | changes  # the oracle's tables reach further
        if own:
            partial = {"partial_rotary_factor": 0.5} if family == "phi" else {}
            config |= {"rope_scaling": scaling, "rope_parameters": partial | {"rope_theta": 10000.0}}
        (folder / "config.json").write_text(json.dumps(config))

        def oracle(tokens, positions):
            if own:
                stretch(model, scaling, positions)
            return (
                model(tokens, positions)
                if isinstance(model, Baichuan)
                else hf_logits(model, tokens, positions)
            )

        model.oracle = oracle
        return folder, model

    return make


def published_gradients(model):
    """{published name: gradient in the published layout}"""
    config, grads = model.config, {}
    for name, p in model.named_parameters():
        grad = p.grad
        if config.model_type == "gptj" and name.split(".")[-2] in ("q", "k"):
            rotary = config.rotary_dim
            places = [place for j in range(rotary // 2) for place in (j, j + rotary // 2)] + list(
                range(rotary, HEAD_DIM)
            )
            grad = grad[[head * HEAD_DIM + place for head in range(HEADS) for place in places]]
        grads.setdefault(weights.hf_name(name, config.model_type), []).append(grad)
    return {name: torch.cat(parts) for name, parts in grads.items()}


def assert_same_logits_and_gradients(folder, theirs, every_positions):
    ours = weights.load(folder)
    for positions in every_positions:
        expected = theirs.oracle(TOKENS, positions)
        assert expected.std() > 0.3  # else any model would agree
        torch.testing.assert_close(
            ours(TOKENS, positions), expected, rtol=0, atol=1e-4
        )  # the exact GELU is 6e-4 away
        ours.zero_grad()
        theirs.zero_grad()
        ours(TOKENS, positions, TARGETS).backward()
        F.cross_entropy(expected.flatten(0, 1), TARGETS.flatten(), reduction="sum").backward()
        grads = published_gradients(ours)
        parameters = dict(theirs.named_parameters())
        assert set(grads) == set(parameters)
        for name, p in parameters.items():
            torch.testing.assert_close(
                grads[name],
                p.grad,
                rtol=1e-3,
                atol=1e-3 * p.grad.abs().max().item(),
                msg=lambda m, name=name: f"{name}: {m}",
            )


NEW = {
    "gptj": {}, "gptj, all of a head": {"rotary_dim": HEAD_DIM}, "gptj, n_inner": {"n_inner": 96}, "phi": {},
    "phi, grouped": {"num_key_value_heads": 2, "partial_rotary_factor": 0.25}, "phi, whole": {"partial_rotary_factor": 1.0},
    "baichuan": {}, "baichuan2": {},
}  # fmt: skip


@pytest.mark.parametrize("shape", NEW)
def test_logits_and_gradients(make, shape):
    folder, theirs = make(shape.split(",")[0], **NEW[shape])
    assert_same_logits_and_gradients(folder, theirs, (NEAR, pose_positions(T, 2048, 2)))


FAMILIES = ("llama", "mistral", "qwen2", "phi", "gptj", "baichuan", "baichuan2")


def pairs_of(family):
    return (ROTARY if family in ("phi", "gptj") else HEAD_DIM) // 2


@pytest.mark.parametrize("mode", rope.MODES[1:])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_under_every_interpolation(make, family, mode):
    folder, theirs = make(family, scaling_of(mode, pairs_of(family)))
    assert_same_logits_and_gradients(folder, theirs, (NEAR, pose_positions(T, 512, 2)))


# ---------------------------------------------------------------- writing


@torch.no_grad()
def stock(folder, positions):
    return hf_logits(
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        TOKENS,
        positions,
    )


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


WRITTEN_AS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
WRITTEN_AS |= {
    "gptj": "PhiForCausalLM",
    "phi": "PhiForCausalLM",
    "baichuan": "LlamaForCausalLM",
    "baichuan2": "LlamaForCausalLM",
}


def extended(config, mode):
    if mode != "longrope":
        return weights.extend(config, mode, 512)
    return dataclasses.replace(
        config, max_position_embeddings=512, rope_scaling=scaling_of(mode, config.rotary_dim // 2)
    )


@pytest.mark.parametrize("mode", rope.MODES)
@pytest.mark.parametrize("family", WRITTEN_AS)
def test_what_we_write_stock_loaders_compute(make, tmp_path, family, mode):
    folder, theirs = make(
        family, **({"rotary_dim": 4} if family == "gptj" else {})
    )  # not the half that Phi's class assumes
    model = weights.load(folder)
    model.config = extended(model.config, mode)
    weights.save(model, tokenizer.load(TINY), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [WRITTEN_AS[family]]
    again = weights.load(tmp_path / "out")
    with torch.no_grad():
        for positions in (NEAR, FAR):
            expected = model(TOKENS, positions)
            if mode == "default":  # and that is what the published model computes
                torch.testing.assert_close(
                    theirs.oracle(TOKENS, positions),
                    expected,
                    rtol=0,
                    atol=1e-4 * expected.abs().max().item(),
                )
            torch.testing.assert_close(
                stock(tmp_path / "out", positions), expected, rtol=0, atol=1e-4 * expected.abs().max().item()
            )
            torch.testing.assert_close(
                again(TOKENS, positions), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
            )
        if mode != "default":  # the interpolation is really there
            assert (stock(tmp_path / "out", FAR) - theirs.oracle(TOKENS, FAR)).abs().max() > 0.1
    weights.save(again, tokenizer.load(tmp_path / "out"), tmp_path / "again")
    assert files(tmp_path / "out") == files(tmp_path / "again")


def test_shards_of_what_we_write(make, tmp_path, monkeypatch):
    """The index names the weights as they are written: the zero biases of GPT-J too."""
    monkeypatch.setattr(weights, "SHARD_BYTES", 100_000)
    folder, theirs = make("gptj")
    weights.save(weights.load(folder), tokenizer.load(TINY), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {name: load_file(tmp_path / "out" / file)[name] for name, file in index["weight_map"].items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    biases = [found[f"model.layers.1.self_attn.{x}.bias"] for x in ("q_proj", "k_proj", "v_proj", "dense")]
    assert [b.shape for b in biases] == [(64,)] * 4 and not any(b.any() for b in biases)
    with torch.no_grad():
        torch.testing.assert_close(
            stock(tmp_path / "out", FAR), theirs.oracle(TOKENS, FAR), rtol=0, atol=1e-3
        )


@pytest.fixture
def with_own_tokenizer(make, tmp_path):
    """-> a Baichuan2 exported from a folder whose tokenizer points to Baichuan's code, and its tokenizer."""
    folder, _ = make("baichuan2", vocab_size=2048)
    shutil.copy(TINY / "tokenizer.model", folder)
    own = {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]}
    settings = {
        "auto_map": own,
        "tokenizer_class": "BaichuanTokenizer",
        "add_bos_token": False,
        "bos_token": "<s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    weights.save(weights.load(folder), tokenizer.load(folder), tmp_path / "out")
    return tmp_path / "out", tokenizer.load(folder)


def test_the_exported_tokenizer_names_no_code(with_own_tokenizer):
    out, ours = with_own_tokenizer
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings == {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "bos_token": "<s>",
        "unk_token": "<unk>",
    }
    assert (out / "tokenizer.model").read_bytes() == (TINY / "tokenizer.model").read_bytes()
    assert tokenizer.load(out).bos_id is None and ours.bos_id is None  # add_bos_token travels


def test_stock_loaders_read_the_exported_tokenizer(with_own_tokenizer):
    out, ours = with_own_tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    for text in ("The cat sat on the mat.", "def f(x):\n    return x + 12", "naïve 😀"):
        assert theirs(text).input_ids == ours.encode(text)


# ---------------------------------------------------------------- the rest


def test_baichuan2s_head_learns_after_an_evaluation(make):
    """Baichuan's own code replaces the weight by its normalised form in evaluation; the optimizer holds
    the old one from then on."""
    folder, _ = make("baichuan2")
    model = weights.load(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.no_grad():
        first, before = model.eval()(TOKENS), model.head.weight.clone()
    assert (
        before.norm(dim=1) - 1
    ).abs().max() > 0.01  # the weight is what was published, not its normalised form
    losses = []
    for step in range(3):
        model.train()
        loss = model(TOKENS, NEAR, TARGETS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        with torch.no_grad():
            after, before = before, model.head.weight.clone()
            assert (after - before).abs().mean() > 1e-3
            logits = model.eval()(TOKENS)
            expected = (
                model.hidden(TOKENS) @ (model.head.weight / model.head.weight.norm(dim=1, keepdim=True)).T
            )
            torch.testing.assert_close(logits, expected)
    assert losses[2] < losses[0] and (logits - first).abs().max() > 0.01


@pytest.mark.parametrize("family", ["gptj", "phi", "baichuan2"])
def test_the_loss_of_hidden_states_is_that_of_the_logits(make, family):
    """eval.py's way to the loss."""
    model = weights.load(make(family)[0])
    with torch.no_grad():
        expected = F.cross_entropy(model(TOKENS).flatten(0, 1), TARGETS.flatten(), reduction="sum")
        torch.testing.assert_close(
            model.loss(model.hidden(TOKENS).flatten(0, 1), TARGETS.flatten()), expected
        )


@pytest.mark.parametrize("family", ["gptj", "phi"])
def test_generation_equals_transformers(make, family):
    folder, theirs = make(family)
    prompt = TOKENS[:, :23]
    expected = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    for prefill_chunk in (1, 7, 2048):
        assert torch.equal(
            weights.load(folder).generate(prompt, 8, prefill_chunk=prefill_chunk), expected[:, 23:]
        )


@pytest.mark.parametrize("family", ["gptj", "phi", "baichuan2"])
def test_flops_count_every_matrix_product(make, family):
    ours = weights.load(make(family)[0])
    products = sum(m.weight.numel() for m in ours.modules() if isinstance(m, torch.nn.Linear))
    attention = 3 * 2 * HEADS * 2 * (2 * HEAD_DIM * 128 / 2)
    assert ours.config.flops_per_token(128) == 6 * products + attention


@pytest.mark.parametrize("family", ["gptj", "phi", "baichuan2"])
def test_pickled_weights(make, tmp_path, family):
    folder, theirs = make(family, vocab_size=2048)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    state = load_file(folder / "model.safetensors")
    for i in range(2):  # buffers of the published .bin files
        if family == "gptj":
            state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
            state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e9)
        else:
            state[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    convert.convert(folder, tmp_path / "converted")
    with torch.no_grad():
        torch.testing.assert_close(
            weights.load(tmp_path / "converted")(TOKENS, NEAR), theirs.oracle(TOKENS, NEAR), rtol=0, atol=1e-3
        )


def test_rotary_dimensions_of_a_config(make):
    """GPT-J: 64 where the key is absent, all of the head where it is null. Phi: half where nothing is
    said, in rope_parameters or beside it."""

    def rotary(folder, **changes):
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in config.items() if value != "absent"})
        )
        return weights.read_config(folder).rotary_dim

    gptj, _ = make("gptj", n_head=1)  # one head of 64
    assert rotary(gptj) == ROTARY and rotary(gptj, rotary_dim=None) == 64
    assert rotary(gptj, n_embd=256, rotary_dim="absent") == 64
    phi, _ = make("phi")
    assert rotary(phi, rope_parameters=None, partial_rotary_factor="absent") == 8
    assert rotary(phi, partial_rotary_factor=0.25) == 4
    assert (
        rotary(phi, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.75}) == 12
    )  # as transformers 5 ranks them


REFUSED = [
    ("baichuan2", {"max_position_embeddings": "absent", "model_max_length": 4096}, "13B uses ALiBi"),
    ("baichuan", {"hidden_size": 5120, "num_attention_heads": 40}, "13B uses ALiBi"),
    ("baichuan", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("baichuan2", {"tie_word_embeddings": True}, "tie_word_embeddings True"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm"),
    ("phi", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    ("phi", {"partial_rotary_factor": 0.01, "rope_parameters": None}, "0 rotary dimensions"),
    ("gptj", {"activation_function": "relu"}, "activation_function 'relu'"),
    ("gptj", {"rotary_dim": 32}, "32 rotary dimensions"),
    ("gptj", {"rotary_dim": 7}, "7 rotary dimensions"),
    (
        "gptj",
        {"n_embd": 352, "rotary_dim": 30},
        "30 rotary dimensions in a head of 88",
    ),  # int(88 * (30 / 88)) is 29, so Phi cannot have it
    ("gptj", {"n_embd": "absent"}, "n_embd"),
    ("gptj", {"n_layer": None}, "n_layer"),
    ("gptj", {"n_inner": "96"}, "n_inner"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor 0.5",
    ),
    ("qwen2", {"mlp_bias": True}, "mlp_bias"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}},
        "llama_4_scaling_beta 0.1 is not known for llama",
    ),
    ("llama", {"model_type": "ministral3"}, "llama_4_scaling_beta None is not known for ministral3"),
    ("llama", {"model_type": "ministral3", "sliding_window": 32}, "sliding_window 32 in use"),
    (
        "llama",
        {"model_type": "ministral3", "rope_parameters": {"llama_4_scaling_beta": "0.1"}},
        "beta '0.1' from 64 tokens on: not positive",
    ),
    (
        "llama",
        {
            "model_type": "ministral3",
            "rope_parameters": {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 0},
        },
        "beta 0.1 from 0 tokens on: not positive",
    ),
]


@pytest.mark.parametrize("family", ["llama", "mistral", "ministral3", "qwen2"])
def test_what_config_json_leaves_out_is_what_stock_loaders_take(make, family):
    folder, _ = make("llama")
    absent = (
        "rms_norm_eps",
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
        "rope_theta",
        "rope_parameters",
    )
    config = {
        k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k not in absent
    } | {"model_type": family}
    config |= {"hidden_size": 512, "num_attention_heads": 32, "sliding_window": None}
    if family == "ministral3":
        config |= {
            "rope_parameters": {
                "rope_type": "default",
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 64,
            }
        }
    (folder / "config.json").write_text(json.dumps(config))
    ours, theirs = weights.read_config(folder), transformers.AutoConfig.from_pretrained(folder)
    assert (ours.norm_eps, ours.n_kv_heads, ours.tie_embeddings) == (
        theirs.rms_norm_eps,
        theirs.num_key_value_heads,
        theirs.tie_word_embeddings,
    )
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16)


def test_a_query_scale_of_null_is_none(make):
    folder, _ = make("llama")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0, "llama_4_scaling_beta": None}
    (folder / "config.json").write_text(json.dumps(config))
    assert weights.read_config(folder).rope_scaling == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("family, change, says", REFUSED, ids=str)
def test_what_is_refused(make, family, change, says):
    folder, _ = make(family)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value != "absent"})
    )
    with pytest.raises(InputError, match=says) as refusal:
        weights.load(folder)
    assert "\n" not in str(refusal.value) and str(folder / "config.json") in str(refusal.value)


@pytest.mark.parametrize("family", ["qwen2", "phi", "gptj"])
def test_scaled_queries_that_no_stock_loader_has(make, family):
    config = weights.load(make(family)[0]).config
    with pytest.raises(InputError, match=f"LLaMA and Mistral, not for {family}; leave it out"):
        weights.extend(config, "yarn", 512, llama_4_scaling_beta=0.1)


BROKEN = {
    "baichuan": (
        "model.layers.1.self_attn.W_pack.weight",
        0,
        r"W_pack.weight has shape \(191, 64\), config.json says \(192, 64\)",
    ),
    "gptj": (
        "transformer.h.1.attn.q_proj.weight",
        1,
        r"q_proj.weight has shape \(64, 63\), config.json says \(64, 64\)",
    ),
}


@pytest.mark.parametrize("family", BROKEN)
def test_weights_that_do_not_fit(make, family):
    name, dim, says = BROKEN[family]
    folder, _ = make(family)
    state = load_file(folder / "model.safetensors")
    whole = state[name]
    save_file(
        state | {name: whole.narrow(dim, 0, whole.shape[dim] - 1).contiguous()}, folder / "model.safetensors"
    )
    with pytest.raises(InputError, match=says):
        weights.load(folder)
    del state[name]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(InputError, match=f"weight {name} missing"):
        weights.load(folder)


SHOWN = {
    "gptj": [
        "gptj, ",
        "MLP 256, head own",
        "heads 4 of 16 dimensions, 8 of them rotary, key/value heads 4\n",
    ],
    "phi": ["phi, ", "MLP 96", "8 of them rotary, key/value heads 4, biases on q, k, v, o\n"],
    "baichuan": ["baichuan, ", "head own\n", "heads 4 of 16 dimensions, key/value heads 4\n"],
    "baichuan2": ["baichuan, ", "head own, of unit rows\n"],
}


@pytest.mark.parametrize("family", SHOWN)
def test_show(make, capsys, family):
    folder, theirs = make(family, vocab_size=2048)
    shutil.copy(TINY / "tokenizer.model", folder)
    weights.show(folder)
    shown = capsys.readouterr().out
    for fact in (
        *SHOWN[family],
        f"{sum(p.numel() for p in theirs.parameters()):,} parameters",
        "window 64 tokens",
    ):
        assert fact in shown, (fact, shown)


@pytest.mark.parametrize("family, arguments", [("gptj", {}), ("baichuan2", {"processes": 2})], ids=str)
def test_from_training_to_stock_loaders(make, run, tmp_path, family, arguments):
    scaled = family == "gptj"  # already
    folder, theirs = make(family, scaling_of("linear") if scaled else None, vocab_size=2048)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    (tmp_path / "text.txt").write_text("The cat sat on the mat. " * 400)
    sizes = (
        "--target_len",
        256,
        "--batch_size",
        4,
        "--lr",
        1e-2,
        "--warmup_steps",
        0,
        "--device",
        "cpu",
        "--data",
        tmp_path / "text.txt",
    )
    checkpointing = ("--activation_checkpointing", "selective")
    done = run(
        "train.py",
        "--model",
        folder,
        *sizes,
        *checkpointing,
        "--steps",
        2,
        "--out",
        tmp_path / "out",
        **arguments,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "the model is scaled already (linear by 8); yarn by 4 comes on top, 32 in all" in done.stderr
    ) == scaled
    for positions in (NEAR, NEAR + 200 * (NEAR >= 15)):
        with torch.no_grad():
            expected = weights.load(tmp_path / "out" / "model", dtype=torch.float32)(TOKENS, positions)
            torch.testing.assert_close(
                stock(tmp_path / "out" / "model", positions), expected, rtol=0, atol=1e-3
            )
            assert (expected - theirs.oracle(TOKENS, positions)).abs().max() > 0.1  # it was trained
    models = ("--model", folder, tmp_path / "out" / "model")
    done = run(
        "eval.py",
        "--task",
        "ppl",
        *models,
        "--data",
        tmp_path / "text.txt",
        "--lengths",
        "64,128",
        "--json",
        tmp_path / "r.json",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["results"][0]["ppl"] < report["compared"][0]["results"][0]["ppl"]
