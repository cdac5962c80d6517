"""The families: what their published folders call sizes and weights, config.json in and out, and as which of them stock loaders can read a
stretched model.

Notable choices:
- Weights that share a published name are stacked in that one tensor by rows, in our order (Baichuan's W_pack is q, k, v).
- Inside the model rotary pairs are half-split. GPT-J publishes them interleaved; q and k are permuted once, when they are read.
- Stock GPT-J knows no RoPE scaling, and Baichuan is code of its own. So GPT-J is written as Phi (the same computation, half-split, with
  biases on attention, which are zero then) and Baichuan as LLaMA (q, k and v apart, Baichuan2's head already normalised).
- A LLaMA or Mistral whose queries are scaled is written as Ministral 3, the same with that scale.
- Interpolation is written in Hugging Face's own terms, and a mode that stock loaders lack in one they have, so that
  transformers and vLLM compute the same logits as this code.
"""
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

import rope
from errors import UserError
from model import Config

# Our name of a weight -> LLaMA's in Hugging Face, GGUF's. Inside a block first.
BLOCK_NAMES = {
    "attn_norm": ("input_layernorm", "attn_norm"),
    "q": ("self_attn.q_proj", "attn_q"),
    "k": ("self_attn.k_proj", "attn_k"),
    "v": ("self_attn.v_proj", "attn_v"),
    "o": ("self_attn.o_proj", "attn_output"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "gate": ("mlp.gate_proj", "ffn_gate"),
    "up": ("mlp.up_proj", "ffn_up"),
    "down": ("mlp.down_proj", "ffn_down"),
}
OUTER_NAMES = {"embed": ("model.embed_tokens", "token_embd"), "norm": ("model.norm", "output_norm"), "head": ("lm_head", "output")}

# A size in Config -> LLaMA's key in config.json.
KEYS = {
    "vocab_size": "vocab_size", "hidden_dim": "hidden_size", "intermediate_dim": "intermediate_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
}  # fmt: skip


SWIGLU = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


@dataclass(frozen=True)
class Family:
    architecture: str | None = None  # the stock class that computes what we write
    written_as: str | None = None  # without one: another family
    # Of config.json:
    keys: dict = field(default_factory=lambda: KEYS)
    optional: tuple = ("num_key_value_heads", "head_dim", "sliding_window")  # absent or null is fine
    norm_eps: str = "rms_norm_eps"
    fixed: dict = field(default_factory=lambda: SWIGLU)  # we compute no others
    defaults: dict = field(default_factory=lambda: {"rms_norm_eps": 1e-6})  # what stock loaders take for an absent key
    # Of the weights:
    layers: str = "model.layers"
    names: dict = field(default_factory=dict)  # where they are not LLaMA's


FAMILIES = {  # model_type ->
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", defaults={"rms_norm_eps": 1e-6, "num_key_value_heads": 8}),
    "ministral3": Family("Ministral3ForCausalLM", defaults={"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "head_dim": 128}),
    "qwen2": Family("Qwen2ForCausalLM", defaults={"rms_norm_eps": 1e-6, "num_key_value_heads": 32}),
    "phi": Family(
        "PhiForCausalLM",
        norm_eps="layer_norm_eps",
        fixed={"hidden_act": "gelu_new", "qk_layernorm": False},
        defaults={"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
        names={"o": "self_attn.dense", "up": "mlp.fc1", "down": "mlp.fc2", "norm": "model.final_layernorm"},
    ),
    "gptj": Family(
        written_as="phi",
        keys={
            "vocab_size": "vocab_size", "hidden_dim": "n_embd", "intermediate_dim": "n_inner", "n_layers": "n_layer", "n_heads": "n_head",
            "max_position_embeddings": "n_positions", "rotary_dim": "rotary_dim",
        },
        optional=("n_inner", "rotary_dim"),
        norm_eps="layer_norm_epsilon",
        fixed={"activation_function": "gelu_new"},
        defaults={"layer_norm_epsilon": 1e-5, "rotary_dim": 64},
        layers="transformer.h",
        names={
            "attn_norm": "ln_1", "q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj", "o": "attn.out_proj", "up": "mlp.fc_in",
            "down": "mlp.fc_out", "embed": "transformer.wte", "norm": "transformer.ln_f",
        },
    ),
    "baichuan": Family(
        written_as="llama",
        keys={field: key for field, key in KEYS.items() if field not in ("n_kv_heads", "head_dim")},
        fixed=SWIGLU | {"tie_word_embeddings": False},
        names=dict.fromkeys("qkv", "self_attn.W_pack"),
    ),
}  # fmt: skip


# ---------------------------------------------------------------- config.json


def read_config(folder):
    """config.json -> Config. UserError for an architecture, or a variant of one, that this code does not compute exactly."""
    path = Path(folder) / "config.json"
    try:
        c = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable ({error}); copy it again") from None
    try:
        return _config(c)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{path}: {error}; this code extends RoPE models of {', '.join(FAMILIES)}") from None


def _config(c):
    """The content of a config.json -> Config. ValueError says why not."""
    _check_kind(c)
    kind, family = c["model_type"], FAMILIES[c["model_type"]]
    c = family.defaults | c
    for key, value in family.fixed.items():
        if (c.get(key) or value) != value:
            raise ValueError(f"{key} {c[key]!r} is not known for {kind}")
    sizes = _sizes(c, family)
    if _slides(c):
        reach = c.get("sliding_window", 4096)
        raise ValueError(f"{kind} with sliding_window {reach} in use: it never looks further back, so longer positions gain nothing")
    theta, scaling, partial = _rope(c, sizes["max_position_embeddings"])
    rotary, head_dim = sizes.setdefault("rotary_dim", int(sizes["head_dim"] * partial)), sizes["head_dim"]
    if rotary % 2 or not 0 < rotary <= head_dim or int(head_dim * (rotary / head_dim)) != rotary:  # the last: as Phi is written
        raise ValueError(f"{rotary} rotary dimensions in a head of {head_dim} are not known")
    config = Config(
        **sizes,
        norm_eps=float(c[family.norm_eps]),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=c.get("tie_word_embeddings", False),
        bos_token_id=c.get("bos_token_id"),
        eos_token_id=c.get("eos_token_id"),
        dtype=c.get("dtype") or c.get("torch_dtype") or "float32",
        model_type=kind,
        normalised_head=kind == "baichuan" and ("z_loss_weight" in c or c["vocab_size"] == 125696),  # version 2
    )
    for seq_len in (1, 2**62):  # longrope has a list for short and one for long sequences
        rope.rope_frequencies(config.rotary_dim, config.rope_theta, config.rope_scaling, seq_len)
    if config.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"weights of dtype {config.dtype!r} are not known")
    return config


def _check_kind(c):
    """ValueError for what is not a RoPE model of one of FAMILIES."""
    if not isinstance(c, dict):
        raise ValueError("not a JSON object")
    kind = c.get("model_type")
    if c.get("position_embedding_type") == "alibi" or c.get("alibi") or kind in ("bloom", "mpt"):
        raise ValueError(f"{kind!r} uses ALiBi, not RoPE")
    if kind == "baichuan" and ("max_position_embeddings" not in c or c.get("hidden_size") == 5120):
        raise ValueError("Baichuan 13B uses ALiBi, not RoPE; the 7B models do")
    if kind in ("gpt2", "opt", "gpt_bigcode", "gpt_neo", "bert"):
        raise ValueError(f"{kind!r} uses learned positions, not RoPE")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"model_type {kind!r} is not known")
    if experts := next((key for key in ("num_local_experts", "num_experts", "n_routed_experts") if c.get(key)), None):
        raise ValueError(f"a mixture of experts ({experts} {c[experts]}) is not known")
    if c.get("quantization_config"):
        raise ValueError("quantised weights are not known; take the model they were made of")


def _sizes(c, family):
    """The whole numbers of a Config."""
    for key in (*family.keys.values(), *family.optional):
        if c.get(key) is None and key in family.optional:
            continue
        if key not in c:
            raise ValueError(f"{key!r} is missing; is this a config.json of a {c['model_type']} model?")
        if type(c[key]) is not int or c[key] < 1:
            raise ValueError(f"{key} is {c[key]!r}, not a positive whole number")
    sizes = {field: c[key] for field, key in family.keys.items() if c.get(key) is not None}
    hidden, heads = sizes["hidden_dim"], sizes["n_heads"]
    return {"intermediate_dim": 4 * hidden, "n_kv_heads": heads, "head_dim": hidden // heads} | sizes


def _rope(c, window):
    """-> rope_theta, rope_scaling in the form that rope.py reads or None, and the share of each head that is turned.
    Both spellings: rope_scaling beside rope_theta (before transformers 5), rope_parameters that holds both (since)."""
    kind = c["model_type"]
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(c.get(key) or {}, dict):
            raise ValueError(f"{key} {c[key]!r} is not a JSON object")
    parameters = dict(c.get("rope_parameters") or {})
    scaling = dict(c.get("rope_scaling") or parameters)
    theta = parameters.pop("rope_theta", None) or scaling.get("rope_theta") or c.get("rope_theta") or 10000.0
    mode = scaling.get("rope_type") or scaling.get("type") or "default"
    scaling = {k: v for k, v in scaling.items() if k not in ("type", "rope_theta")} | {"rope_type": mode}
    original = c.get("original_max_position_embeddings")  # above the one inside, as in stock loaders
    if mode == "dynamic":
        scaling["original_max_position_embeddings"] = window  # all that those look at
    elif original:
        scaling["original_max_position_embeddings"] = original
    elif mode != "linear":
        scaling.setdefault("original_max_position_embeddings", window)
    if mode == "longrope" and scaling["original_max_position_embeddings"]:  # as stock loaders
        scaling.setdefault("factor", window / scaling["original_max_position_embeddings"])
    partial = scaling.pop("partial_rotary_factor", None) or parameters.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1
    if partial != 1 and kind != "phi":
        raise ValueError(f"partial_rotary_factor {partial} is not known for {kind}")
    beta, first = scaling.get("llama_4_scaling_beta"), scaling.get("original_max_position_embeddings")
    if beta is None:
        scaling.pop("llama_4_scaling_beta", None)
    if rope.has_query_scale(scaling) != (kind == "ministral3"):
        raise ValueError(f"llama_4_scaling_beta {beta!r} is not known for {kind}")
    if beta and not all(isinstance(x, (int, float)) and x > 0 for x in (beta, first)):
        raise ValueError(f"llama_4_scaling_beta {beta!r} from {first!r} tokens on: not positive numbers")
    return float(theta), scaling if mode != "default" or rope.has_query_scale(scaling) else None, partial


def _slides(c):
    """Does the model of this config.json look back less far than its window?"""
    if c["model_type"] in ("mistral", "ministral3"):
        reach = c.get("sliding_window", 4096 if c["model_type"] == "mistral" else None)  # what an absent one means to stock loaders
        return reach is not None and reach < c.get("max_position_embeddings", 0)
    return bool(c.get("use_sliding_window")) or "sliding_attention" in str(c.get("layer_types"))


def hf_config(config):
    """config.json of a Config, in terms that stock loaders compute exactly (modes they lack in the terms of one they have).
    Its family: one with a stock class, see families.as_written."""
    family = FAMILIES[config.model_type]
    theta, scaling = rope.stock_terms(config.rotary_dim, config.rope_theta, config.rope_scaling)
    original, window = {}, config.max_position_embeddings
    if scaling:  # the first window beside it: transformers before 5 (longrope) and llama.cpp's converter (llama3) look nowhere else
        original = {"original_max_position_embeddings": config.original_window}
        scaling = scaling | original
        if scaling["rope_type"] in ("linear", "dynamic") and not rope.has_query_scale(scaling):  # stock loaders do not know it there
            del scaling["original_max_position_embeddings"]
        if scaling["rope_type"] == "dynamic":
            window = config.original_window  # where stock dynamic scaling begins
    vllms = {}  # its own name for the scale of the queries
    if rope.has_query_scale(scaling):
        vllms = {"llama_4_scaling": {"beta": scaling["llama_4_scaling_beta"]} | original}
    partial = {"partial_rotary_factor": config.rotary_dim / config.head_dim} if config.model_type == "phi" else {}
    return {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        **{key: getattr(config, field) for field, key in family.keys.items()},
        "max_position_embeddings": int(window),
        family.norm_eps: config.norm_eps,
        "rope_theta": theta,
        "rope_scaling": scaling and scaling | {"type": scaling["rope_type"]},  # older readers want `type`
        "rope_parameters": (scaling or {"rope_type": "default"}) | {"rope_theta": theta} | partial,
        **original,
        **vllms,
        **partial,
        "tie_word_embeddings": config.tie_embeddings,
        **family.fixed,
        **({"sliding_window": None} if config.model_type in ("mistral", "ministral3", "qwen2") else {}),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "dtype": config.dtype,
        "torch_dtype": config.dtype,
    }


# ---------------------------------------------------------------- weights and tokenizer


def hf_name(name, model_type="llama"):
    """blocks.3.q.weight -> model.layers.3.self_attn.q_proj.weight"""
    family, (*block, module, kind) = FAMILIES[model_type], name.split(".")
    if block:
        return f"{family.layers}.{block[1]}.{family.names.get(module) or BLOCK_NAMES[module][0]}.{kind}"
    return f"{family.names.get(module) or OUTER_NAMES[module][0]}.{kind}"


def read(published, parameters, config):
    """Copy a published tensor, as a slice of a safetensors file, into the parameters {our name: tensor} that are in it, in their order.
    A parameter may be a DTensor, sharded by rows: only this process's are read then."""
    first = 0  # row of the published tensor with which the parameter begins
    for name, p in parameters.items():
        local, rows = (p.to_local(), own_rows(p)) if isinstance(p, DTensor) else (p, slice(0, len(p)))
        if config.model_type == "gptj" and name.split(".")[-2] in ("q", "k"):
            local.copy_(half_split(published[:], config.head_dim, config.rotary_dim)[rows])
        else:
            local.copy_(published[first + rows.start : first + rows.stop])
        first += len(p)


def own_rows(p):
    """Which rows of a DTensor that fully_shard made this process holds: equal runs, the last ones shorter or empty."""
    run = -(-len(p) // p.device_mesh.size())
    first = min(p.device_mesh.get_local_rank() * run, len(p))
    return slice(first, min(first + run, len(p)))


def half_split(w, head_dim, rotary_dim):
    """Rows of q or k (H * head_dim, C) in another order: the first rotary_dim = d of each head, whose pairs come as (x[2j], x[2j + 1]),
    are paired (x[j], x[j + d/2]) then."""
    order = torch.arange(head_dim, device=w.device)
    order[:rotary_dim] = order[:rotary_dim].view(-1, 2).T.flatten()  # 0 2 4 … 1 3 5 …
    return w.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)


def as_written(config):
    """The Config of the same model in the family that it is written as."""
    kind = "ministral3" if rope.has_query_scale(config.rope_scaling) else FAMILIES[config.model_type].written_as or config.model_type
    return dataclasses.replace(config, model_type=kind, normalised_head=False)


def tokenizer_files(config, files):
    """The tokenizer's files to go with `as_written`: stock loaders would look for Baichuan's own tokenizer class beside them, and cut
    texts at the old window."""
    settings = before = json.loads(files.get("tokenizer_config.json", b"{}"))
    if config.model_type == "baichuan":
        settings = {k: v for k, v in settings.items() if k != "auto_map"} | {"tokenizer_class": "LlamaTokenizer"}
    longest = settings.get("model_max_length")
    if isinstance(longest, (int, float)) and longest < config.max_position_embeddings:
        settings = settings | {"model_max_length": config.max_position_embeddings}
    return files if settings == before else files | {"tokenizer_config.json": json.dumps(settings).encode()}
