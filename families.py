"""The families: what their published folders call sizes and weights, and as which of them stock loaders can read a stretched model.

Notable choices:
- Weights that share a published name are stacked in that one tensor by rows, in our order (Baichuan's W_pack is q, k, v).
- Inside the model rotary pairs are half-split. GPT-J publishes them interleaved; q and k are permuted once, when they are read.
- Stock GPT-J knows no RoPE scaling, and Baichuan is code of its own. So GPT-J is written as Phi (the same computation, half-split, with
  biases on attention, which are zero then) and Baichuan as LLaMA (q, k and v apart, Baichuan2's head already normalised).
"""
import dataclasses
import json
import math
from dataclasses import dataclass, field

import torch
from torch.distributed.tensor import DTensor

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
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM"),
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
    return dataclasses.replace(config, model_type=FAMILIES[config.model_type].written_as or config.model_type, normalised_head=False)


def tokenizer_files(config, files):
    """The tokenizer's files to go with `as_written`: stock loaders would look for Baichuan's own tokenizer class beside them, and cut
    texts at the old window."""
    settings = before = json.loads(files.get("tokenizer_config.json", b"{}"))
    if config.model_type == "baichuan":
        settings = {k: v for k, v in settings.items() if k != "auto_map"} | {"tokenizer_class": "LlamaTokenizer"}
    if settings.get("model_max_length", math.inf) < config.max_position_embeddings:
        settings = settings | {"model_max_length": config.max_position_embeddings}
    return files if settings == before else files | {"tokenizer_config.json": json.dumps(settings).encode()}
