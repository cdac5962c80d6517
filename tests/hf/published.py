"""Small random checkpoints of every family in its published layout, each with an oracle for its logits.

The oracles are transformers' models, given the frequencies of an interpolation that their class does not
know. Baichuan is code of its own, so it is written down here from its description. With an interpolation it
is stock LLaMA, with W_pack cut in three. What tests of folders share is here too.
"""

import json
import math
from pathlib import Path

import torch
import transformers
from conftest import ROOT, SMALL, hf_logits
from equations import by_hand
from safetensors.torch import save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import rope
from hf import weights

TINY = ROOT / "assets" / "tiny"
T, HEADS, HEAD_DIM, ROTARY, VOCAB = 40, 4, 16, 8, 320
TOKENS = torch.randint(0, VOCAB, (2, T), generator=torch.Generator().manual_seed(7))
TARGETS = torch.randint(0, VOCAB, (2, T), generator=torch.Generator().manual_seed(8))
NEAR = torch.arange(T).expand(2, T)
FAR = NEAR + 460 * (NEAR >= 15)  # a jump, as PoSE makes them: 0 ... 14, 475 ... 499

LLAMA_LIKE = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3",
    "smollm3": "SmolLM3", "olmo2": "Olmo2", "granite": "Granite",
}  # fmt: skip
OF_FAMILY = {  # settings of theirs, so that nothing that is the family's own is at rest
    "mistral": {"sliding_window": None},
    "phi3": {"partial_rotary_factor": 0.5, "pad_token_id": None},
    "smollm3": {"no_rope_layers": [0, 1], "pad_token_id": None},
    "granite": {
        "embedding_multiplier": 1.7, "attention_multiplier": 0.4, "residual_multiplier": 0.6,
        "logits_scaling": 0.7,
    },
}  # fmt: skip
GPTJ = {
    "vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": HEADS, "n_positions": 64, "n_inner": None,
    "rotary_dim": ROTARY,
}  # fmt: skip
GPTJ_TABLE = 2048  # positions in the oracle's table of angles
PHI = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "max_position_embeddings": 64,
}  # fmt: skip
BAICHUAN = PHI | {
    "model_type": "baichuan", "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "torch_dtype": "float32",
}  # fmt: skip
# transformers has no functions for these: equations.py has their equations.
WITHOUT_STOCK_FUNCTION = [mode for mode in rope.MODES if mode not in (*ROPE_INIT_FUNCTIONS, "default")]


# ---------------------------------------------------------------- checkpoints


def publish(folder, family, scaling=None, **changes):
    """Write a random checkpoint into a folder and return its model, with the published names of parameters.

    model.oracle(tokens, positions) returns its logits. model.unwritten is the scaling where config.json has
    no terms for it (Phi-3's knows longrope alone), else None.

    family: a model_type, or "baichuan2". scaling: a rope_scaling of conftest.scaling_of. changes: keys of
    config.json.
    """
    # GPT-J's class knows no scaling, and the others not every one: these models are stretched by hand.
    known = {"gptj": (), "phi3": ("longrope",)}.get(family, ROPE_INIT_FUNCTIONS)
    by_us = scaling is not None and scaling["rope_type"] not in known
    if scaling and not by_us:
        changes = {"rope_parameters": {"rope_theta": 10000.0} | scaling} | changes
    if family.startswith("baichuan"):
        model = publish_baichuan(folder, family, changes, stretched=scaling is not None)
    else:
        model = make_stock(family, changes)
        model.save_pretrained(folder)

    config = json.loads((folder / "config.json").read_text())
    if family == "gptj":
        config |= {"n_positions": 64} | changes
    model.unwritten = None
    if by_us and family == "phi3":
        model.unwritten = {"original_max_position_embeddings": 64} | scaling
    if by_us and not model.unwritten:
        partial = {"partial_rotary_factor": 0.5} if family in ("phi", "gpt_neox") else {}
        config |= {"rope_scaling": scaling, "rope_parameters": partial | {"rope_theta": 10000.0}}
    (folder / "config.json").write_text(json.dumps(config))

    def oracle(tokens, positions):
        if by_us:
            stretch(model, scaling, n=int(positions.max()) + 1)
        return (
            model(tokens, positions) if isinstance(model, Baichuan) else hf_logits(model, tokens, positions)
        )

    model.oracle = oracle
    return model


def make_stock(family, changes):
    """Return a random model of a class of transformers."""
    if family in LLAMA_LIKE:
        name = LLAMA_LIKE[family]
        settings = SMALL | OF_FAMILY.get(family, {})
    elif family == "phi":
        name, settings = "Phi", PHI
    elif family == "gpt_neox":
        name, settings = "GPTNeoX", PHI | {"rotary_pct": 0.5}
    else:
        name, settings = "GPTJ", GPTJ | {"n_positions": GPTJ_TABLE}
    config = getattr(transformers, name + "Config")(**settings | changes)
    return randomised(getattr(transformers, name + "ForCausalLM")(config))


def publish_baichuan(folder, family, changes, stretched):
    """Write a Baichuan and return its model, one that knows scaling if it is stretched."""
    config = BAICHUAN | changes
    if family == "baichuan2":
        config["z_loss_weight"] = 0
    model = randomised((BaichuanAsLlama if stretched else Baichuan)(config))
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return model


def randomised(model):
    """Fill a model with weights so large that two models do not agree by chance."""
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.12)
    return model.eval()


# ---------------------------------------------------------------- Baichuan


class Baichuan(torch.nn.Module):
    """Its forward pass in plain matrix products, with the published names of the weights."""

    def __init__(self, config):
        super().__init__()
        self.normalised = "z_loss_weight" in config
        C, V, M = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
        shapes = {"model.embed_tokens": (V, C), "model.norm": (C,), "lm_head": (V, C)}
        in_block = {
            "self_attn.W_pack": (3 * C, C),
            "self_attn.o_proj": (C, C),
            "input_layernorm": (C,),
            "post_attention_layernorm": (C,),
            "mlp.gate_proj": (M, C),
            "mlp.up_proj": (M, C),
            "mlp.down_proj": (C, M),
        }
        for i in range(config["num_hidden_layers"]):
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in in_block.items()}
        self.w = {f"{name}.weight": torch.nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}

    def parameters(self):
        return self.w.values()

    def named_parameters(self):
        return self.w.items()

    def state_dict(self):
        return {name: p.detach() for name, p in self.w.items()}

    def forward(self, tokens, positions):
        w = {name.removesuffix(".weight"): p for name, p in self.w.items()}
        frequencies = 10000.0 ** (-torch.arange(HEAD_DIM // 2) / (HEAD_DIM / 2))
        angles = positions[:, None, :, None].double() * frequencies  # (B, 1, T, D/2)
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
        not_llamas = ("model_type", "torch_dtype", "z_loss_weight")
        settings = {key: value for key, value in config.items() if key not in not_llamas}
        self.llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()

    def forward(self, tokens, positions):
        state = {}
        for name, p in self.w.items():
            if "W_pack" in name:
                q, k, v = p.split(64)
                for letter, part in (("q", q), ("k", k), ("v", v)):
                    state[name.replace("W_pack", f"{letter}_proj")] = part
            elif name == "lm_head.weight" and self.normalised:
                state[name] = p / p.norm(dim=1, keepdim=True)
            else:
                state[name] = p
        inputs = {"attention_mask": torch.ones_like(tokens), "position_ids": positions}
        return torch.func.functional_call(self.llama, state, (tokens,), inputs).logits


# ---------------------------------------------------------------- interpolation that a class does not know


def stretch(model, scaling, n):
    """Give a stock model the frequencies of an interpolation for n tokens."""
    for module in model.modules():
        if hasattr(module, "embed_positions"):  # GPT-J's table
            inv_freq, factor = frequencies(scaling, ROTARY, n)
            angles = torch.arange(n)[:, None] * inv_freq
            module.embed_positions = torch.cat((angles.sin(), angles.cos()), 1) * factor
        elif hasattr(module, "inv_freq"):
            module.inv_freq, module.attention_scaling = frequencies(scaling, 2 * len(module.inv_freq), n)


def frequencies(scaling, dim, n):
    """Return (frequencies, factor on cos and sin) for n tokens, by transformers or by the equations."""
    mode = scaling["rope_type"]
    if mode in WITHOUT_STOCK_FUNCTION:
        inv_freq, factor = by_hand(mode, 10000.0, dim, scaling["factor"], 64, n)
        return torch.tensor(inv_freq), factor
    parameters = {"rope_theta": 10000.0} | scaling
    like = transformers.LlamaConfig(head_dim=dim, max_position_embeddings=64, rope_parameters=parameters)
    return ROPE_INIT_FUNCTIONS[mode](like, "cpu", seq_len=n)


# ---------------------------------------------------------------- comparison, and files


def load_stock(folder):
    """Return the model of transformers for a folder, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def stock(model, positions=NEAR, tokens=TOKENS):
    """Return the logits of transformers, in float32. model: one, or a folder."""
    if isinstance(model, Path):
        model = load_stock(model)
    return hf_logits(model, tokens, positions)


@torch.no_grad()
def ours(model, positions=NEAR, tokens=TOKENS):
    """Return the logits of this code. model: one, or a folder, which is loaded in float32."""
    if isinstance(model, Path):
        model = weights.load(model, dtype=torch.float32)
    return model(tokens, positions)


def assert_same(a, b, tolerance=1e-4):
    """Assert that logits are equal to 1e-4 of the largest one, which is about 7.

    The angles of transformers are float32, which costs 1e-4 at position 500.
    """
    largest = b.abs().max()
    assert largest > 0.5, "logits near zero would make any two models equal"
    assert (a - b).abs().max() < tolerance * largest


def edit(path, **changes):
    """Change keys of a JSON file in place. The value "absent" takes a key out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def snapshot(folder):
    """Return {relative path: content, None of a folder} of everything in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}
