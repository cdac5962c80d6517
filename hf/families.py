"""The model families, a row each: their published names of sizes and weights, and what a block computes.

This is the only file that knows the families of config.json, which goes in (`read_config`) and out
(`hf_config`) here. GGUF's and Meta's own names are in gguf_file.py, gguf_tokenizer.py and convert.py.

Notable choices:
- Several of our weights may share one published tensor. They are stacked there by rows, in our order
  (Baichuan's W_pack holds q, k and v; Phi-3 fuses gate and up too). They are apart in the model.
- Inside the model, rotary pairs are half-split. GPT-J publishes them interleaved, so its q and k are permuted
  when read. GPT-NeoX stacks q, k and v head by head, and its rows are permuted on both ways.
- Stock GPT-J knows no RoPE scaling, and Baichuan is code of its own. So GPT-J is written as Phi (the same
  computation, where the biases that GPT-J lacks are zero), and Baichuan as LLaMA (q, k and v apart,
  Baichuan2's head already normalised).
- A LLaMA or Mistral whose queries are scaled is written as Ministral 3, which is the same model with that
  scale.
- Interpolation is written in Hugging Face's own terms, and a mode that stock loaders lack in the terms of one
  they have, so that transformers and vLLM compute the same logits as this code.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

import rope
from hf.scaling import read_rope, stock_terms, stretched_window
from hf.tokenizer import json_object
from model import Config, empty_transformer
from storage.errors import InputError
from storage.values import LARGEST_ID, positive, read_json

LLAMA_NAMES = {  # our name of a module -> LLaMA's; those of a block come after the number of its layer
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
}

# A size in Config -> LLaMA's key for it in config.json.
LLAMA_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
}
# The largest sizes that are believed. Beyond them a file is damaged, and building its model would take hours.
LARGEST_SIZES = {
    "vocab_size": 2**24,
    "hidden_dim": 2**20,
    "intermediate_dim": 2**22,
    "n_layers": 2**11,
    "n_heads": 2**14,
    "n_kv_heads": 2**14,
    "head_dim": 2**14,
    "rotary_dim": 2**14,
    "max_position_embeddings": 2**31,
}
# Keys of config.json with the only value that this code computes.
LLAMA_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
NO_PADDING = {"pad_token_id": None}  # else stock classes take one of their own, which may be out of range
IN_LLAMA_CPP = ("default", "linear", "yarn")  # the rope_types that llama.cpp computes for most families
# What GPT-J's and Phi's blocks and heads compute.
PARALLEL = {"norm": "layer", "mlp": "gelu", "parallel": True, "mlp_bias": True, "head_bias": True}


@dataclass(frozen=True)
class Family:
    """What this code has to know of a family."""

    architecture: str | None = None  # the stock class that computes what we write; without one see written_as
    written_as: str | None = None  # another family, whose stock class computes the same
    scaled_queries_as: str | None = None  # the family whose stock class scales the queries (rope.query_scale)
    block: dict = field(default_factory=dict)  # what a block computes: fields of Config that are not LLaMA's
    # config.json:
    sizes: dict = field(default_factory=lambda: LLAMA_SIZES)
    # Sizes that may be absent or null:
    optional: tuple = ("num_key_value_heads", "head_dim")
    norm_eps: str = "rms_norm_eps"
    fixed: dict = field(default_factory=lambda: LLAMA_FIXED)  # see there
    flags: dict = field(default_factory=dict)  # a switch in Config -> its key
    multipliers: dict = field(default_factory=dict)  # a positive number in Config -> its key
    names_rope_layers: bool = False  # no_rope_layers says which layers have RoPE
    # What stock loaders take for an absent key:
    defaults: dict = field(default_factory=lambda: {"rms_norm_eps": 1e-6})
    # What partial_rotary_factor, the share of a head that RoPE turns, is where it is absent. None: always 1.
    partial_rotary: float | None = None
    rope_theta: float = 10000.0  # what it is where it is absent
    # Its own names for what the stock class reads of RoPE outside rope_parameters -> the usual names:
    rope_keys: dict = field(default_factory=dict)
    rope_types: tuple = rope.MODES  # those that the stock class computes in the forms of scaling.stock_terms
    slides_unless_null: bool = False  # sliding_window is in use wherever it is a number
    written: dict = field(default_factory=dict)  # further keys to write
    # Weights and tokenizer:
    layers: str = "model.layers"
    names: dict = field(default_factory=dict)  # modules whose published name is not LLaMA's
    interleaved_rotary: bool = False  # the rotary pairs of q and k are (x[2j], x[2j + 1])
    stacked_by_head: bool = False  # the tensor of q, k and v has these three of the first head, then the next
    tokenizer_class: str | None = None  # to write instead of a class of the family's own code
    # The rope_types that other loaders compute, see hf/loaders.py:
    # (): it ignores rope_theta too. None: it does not read the family.
    llama_cpp: tuple | None = (*IN_LLAMA_CPP, "llama3")
    mlx_lm: tuple = ("default", "linear", "dynamic", "llama3", "yarn")


FAMILIES = {  # by the model_type of config.json
    "llama": Family("LlamaForCausalLM", scaled_queries_as="ministral3"),
    "mistral": Family(
        "MistralForCausalLM",
        scaled_queries_as="ministral3",
        defaults={"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
        slides_unless_null=True,
        written={"sliding_window": None},
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        written_as="mistral",  # with the scale switched off
        scaled_queries_as="ministral3",
        defaults={"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "head_dim": 128},
        slides_unless_null=True,
        written={"sliding_window": None},
        llama_cpp=("yarn",),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        llama_cpp=IN_LLAMA_CPP,
        block={"qkv_bias": True},
        defaults={"rms_norm_eps": 1e-6, "num_key_value_heads": 32},
        written={"sliding_window": None},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        llama_cpp=IN_LLAMA_CPP,
        block={"qk_norm": "head"},
        defaults={"rms_norm_eps": 1e-6, "num_key_value_heads": 32, "head_dim": 128},
        written={"sliding_window": None},
    ),
    "phi3": Family(  # and Phi-4
        "Phi3ForCausalLM",
        llama_cpp=("default",),
        mlx_lm=("default",),
        sizes={name: key for name, key in LLAMA_SIZES.items() if name != "head_dim"},
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        partial_rotary=1.0,
        rope_types=("default", "longrope"),
        slides_unless_null=True,
        written={"sliding_window": None} | NO_PADDING,
        names={
            **{f"attention.{name}": "self_attn.qkv_proj" for name in ("q", "k", "v")},
            **{f"mlp.{name}": "mlp.gate_up_proj" for name in ("gate", "up")},
        },
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        llama_cpp=IN_LLAMA_CPP,
        fixed=LLAMA_FIXED | {"use_sliding_window": False},
        names_rope_layers=True,
        defaults={"rms_norm_eps": 1e-6, "num_key_value_heads": 4, "tie_word_embeddings": True},
        rope_theta=2e6,
        written=NO_PADDING,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        llama_cpp=IN_LLAMA_CPP,
        block={"post_norm": True, "qk_norm": "all_heads"},
        defaults={"rms_norm_eps": 1e-5},
        written=NO_PADDING,
        names={
            "attention_post_norm": "post_attention_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        },
    ),
    "granite": Family(
        "GraniteForCausalLM",
        llama_cpp=IN_LLAMA_CPP,
        multipliers={
            "embedding_multiplier": "embedding_multiplier",
            "attention_scale": "attention_multiplier",
            "residual_multiplier": "residual_multiplier",
            "logits_divisor": "logits_scaling",
        },
        defaults={
            "rms_norm_eps": 1e-6,
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
    "gpt_neox": Family(  # Pythia among them
        "GPTNeoXForCausalLM",
        llama_cpp=None,
        mlx_lm=("default",),
        block={"norm": "layer", "mlp": "exact_gelu", "parallel_norms": True, "mlp_bias": True},
        sizes={name: key for name, key in LLAMA_SIZES.items() if name not in ("n_kv_heads", "head_dim")},
        norm_eps="layer_norm_eps",
        fixed={"hidden_act": "gelu"},
        flags={"parallel": "use_parallel_residual", "qkv_bias": "attention_bias", "o_bias": "attention_bias"},
        defaults={"layer_norm_eps": 1e-5, "use_parallel_residual": True, "attention_bias": True},
        partial_rotary=0.25,
        rope_keys={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
        layers="gpt_neox.layers",
        names={
            **{f"attention.{name}": "attention.query_key_value" for name in ("q", "k", "v")},
            "attention.o": "attention.dense",
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
            "embed": "gpt_neox.embed_in",
            "norm": "gpt_neox.final_layer_norm",
            "head": "embed_out",
        },
        stacked_by_head=True,
    ),
    "phi": Family(
        "PhiForCausalLM",
        block=PARALLEL | {"qkv_bias": True, "o_bias": True},
        norm_eps="layer_norm_eps",
        fixed={"hidden_act": "gelu_new", "qk_layernorm": False},
        defaults={"layer_norm_eps": 1e-5},
        partial_rotary=0.5,
        names={
            "attention.o": "self_attn.dense",
            "mlp.up": "mlp.fc1",
            "mlp.down": "mlp.fc2",
            "norm": "model.final_layernorm",
        },
        llama_cpp=(),
        mlx_lm=("default",),
    ),
    "gptj": Family(
        written_as="phi",
        block=PARALLEL,
        sizes={
            "vocab_size": "vocab_size",
            "hidden_dim": "n_embd",
            "intermediate_dim": "n_inner",
            "n_layers": "n_layer",
            "n_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "rotary_dim": "rotary_dim",
        },
        optional=("n_inner", "rotary_dim"),
        norm_eps="layer_norm_epsilon",
        fixed={"activation_function": "gelu_new"},
        defaults={"layer_norm_epsilon": 1e-5, "rotary_dim": 64},
        layers="transformer.h",
        names={
            "attention_norm": "ln_1",
            "attention.q": "attn.q_proj",
            "attention.k": "attn.k_proj",
            "attention.v": "attn.v_proj",
            "attention.o": "attn.out_proj",
            "mlp.up": "mlp.fc_in",
            "mlp.down": "mlp.fc_out",
            "embed": "transformer.wte",
            "norm": "transformer.ln_f",
        },
        interleaved_rotary=True,
    ),
    "baichuan": Family(
        written_as="llama",
        scaled_queries_as="ministral3",
        sizes={name: key for name, key in LLAMA_SIZES.items() if name not in ("n_kv_heads", "head_dim")},
        fixed=LLAMA_FIXED | {"tie_word_embeddings": False},
        names={f"attention.{name}": "self_attn.W_pack" for name in ("q", "k", "v")},
        tokenizer_class="LlamaTokenizer",
    ),
}

# What is refused, and why.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
MIXTURE = "its MLP is a mixture of experts"
LOCAL = "some of its layers have a sliding window"
RECURRENT = "it has layers without attention"
OTHERS = {
    **dict.fromkeys(("bloom", "mpt"), "it uses ALiBi, not RoPE"),
    **dict.fromkeys(("gpt2", "opt", "gpt_bigcode", "gpt_neo", "bert"), "it uses learned positions, not RoPE"),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "olmoe", "granitemoe"), MIXTURE),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), MIXTURE),
    **dict.fromkeys(("llama4", "llama4_text", "gpt_oss"), f"{LOCAL}, and {MIXTURE}"),
    **dict.fromkeys(("gemma2", "olmo3"), LOCAL),
    **dict.fromkeys(("gemma3", "gemma3_text", "gemma3n"), f"{LOCAL} and another rope_theta"),
    **dict.fromkeys(("mamba", "mamba2", "qwen3_next", "granitemoehybrid"), RECURRENT),
}
BAICHUAN_13B_HIDDEN = 5120
BAICHUAN2_VOCAB = 125696


# ---------------------------------------------------------------- config.json -> Config


def read_config(folder):
    """Return the Config of a folder's config.json.

    Raise InputError for an architecture, or a variant of one, that this code does not compute exactly.
    """
    path = Path(folder) / "config.json"
    c = read_json(path)
    remedy = f"this code extends RoPE models of {', '.join(FAMILIES)}"
    try:
        _refuse_other_architectures(c)
        remedy = "correct it there if it is wrong, or take another model"
        config = _config(c)
        check_config(config)
    except ValueError as error:
        raise InputError(f"{path}: {error}; {remedy}") from None
    return config


def _config(c):
    """Return the Config of the content of a config.json. Raise ValueError if it is none of a known model."""
    model_type = c["model_type"]
    family = FAMILIES[model_type]
    c = family.defaults | c
    for key, value in family.fixed.items():
        if (c.get(key) or value) != value:  # null and false mean the default
            raise ValueError(f"{key} {c[key]!r} is not known for {model_type}")
    sizes = _sizes(c, family)
    for key, usual in family.rope_keys.items():
        c = c | {usual: c.get(key)}  # also if it is absent: the stock class does not look at the usual one
    defaults = family.partial_rotary or 1, family.rope_theta
    theta, scaling, partial = read_rope(c, sizes["max_position_embeddings"], *defaults)
    rope_type = (scaling or {}).get("rope_type", "default")
    if rope_type not in family.rope_types:
        raise ValueError(f"rope_type {rope_type!r} is not known for {model_type}")
    window = stretched_window(scaling, sizes["max_position_embeddings"])
    sizes["max_position_embeddings"] = window
    _refuse_sliding_window(c, family, sizes["n_layers"], window)
    if partial != 1 and family.partial_rotary is None:
        raise ValueError(f"partial_rotary_factor {partial} is not known for {model_type}")
    if rope.has_query_scale(scaling) != (family.scaled_queries_as == model_type):
        beta = (scaling or {}).get("llama_4_scaling_beta")
        raise ValueError(f"llama_4_scaling_beta {beta!r} is not known for {model_type}")
    sizes.setdefault("rotary_dim", int(sizes["head_dim"] * partial))

    dtype = c.get("dtype") or c.get("torch_dtype") or "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"weights of dtype {dtype!r} are not known")
    is_tied = c.get("tie_word_embeddings") or False
    if not isinstance(is_tied, bool):
        raise ValueError(f"tie_word_embeddings is {is_tied!r}, neither true nor false")
    is_baichuan2 = model_type == "baichuan" and ("z_loss_weight" in c or c["vocab_size"] == BAICHUAN2_VOCAB)
    return Config(
        **sizes,
        norm_eps=positive(c, family.norm_eps),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=is_tied,
        bos_token_id=c.get("bos_token_id"),
        eos_token_id=c.get("eos_token_id"),
        dtype=dtype,
        model_type=model_type,
        normalised_head=is_baichuan2,
        rope_layers=_rope_layers(c, sizes["n_layers"]) if family.names_rope_layers else None,
        **_flags(c, family),
        **{name: positive(c, key) for name, key in family.multipliers.items()},
        **family.block,
    )


def _flags(c, family):
    """Return the switches of a Config, {field: bool}. Raise ValueError for one that is something else."""
    flags = {name: c[key] for name, key in family.flags.items()}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{family.flags[name]} is {value!r}, neither true nor false")
    return flags


def _rope_layers(c, n_layers):
    """Return for each layer 1 if it has RoPE and 0 if not. Raise ValueError if a config.json says neither."""
    layers = c.get("no_rope_layers")  # in spite of its name, 0 is for those without
    if layers is None:
        interval = positive(c, "no_rope_layer_interval", int, default=4)
        layers = [int((i + 1) % interval != 0) for i in range(n_layers)]
    known = isinstance(layers, list) and len(layers) >= n_layers and all(i in (0, 1) for i in layers)
    if not known or not any(layers[:n_layers]):
        raise ValueError(f"no_rope_layers {layers!r} is not a 0 or 1 for each layer, and 1 for some")
    return [int(i) for i in layers[:n_layers]]


def check_config(config):
    """Raise ValueError unless a Config that was read from a file is one that a model can have.

    Every reader of a format has looked at each number by itself; here they are looked at together.
    """
    _check_rotary_dim(config.rotary_dim, config.head_dim)
    for name, most in LARGEST_SIZES.items():
        positive(vars(config), name, int, most)
    if config.n_heads % config.n_kv_heads:
        raise ValueError(f"{config.n_kv_heads} key/value heads do not divide {config.n_heads} heads")
    if not config.rope_theta > 1:
        raise ValueError(f"rope_theta is {config.rope_theta}, not more than 1")
    _check_frequencies(config)
    eos = config.eos_token_id
    for i in (config.bos_token_id, *(eos if isinstance(eos, list) else [eos])):
        if i is not None and not (type(i) is int and 0 <= i <= LARGEST_ID):
            raise ValueError(f"{i!r} is no id of a token, which bos_token_id and eos_token_id are")


def _check_rotary_dim(rotary_dim, head_dim):
    """Raise ValueError unless so many dimensions of a head can be turned, and written as a share of it.

    A single pair would leave NTK nothing to slow.
    """
    possible = rotary_dim % 2 == 0 and 4 <= rotary_dim <= head_dim
    if not possible or int(head_dim * (rotary_dim / head_dim)) != rotary_dim:
        raise ValueError(f"{rotary_dim} rotary dimensions in a head of {head_dim} are not known")


def _check_frequencies(config):
    """Raise ValueError unless RoPE's frequencies are positive numbers, in short and in long sequences."""
    for seq_len in (1, 2**31):  # longrope has a list of factors for each
        try:
            inv_freq, attention_factor = rope.rope_frequencies(
                config.rotary_dim, config.rope_theta, config.rope_scaling, seq_len
            )
            are_usable = ((0 < inv_freq) & (inv_freq < math.inf)).all() and 0 < attention_factor < math.inf
        except ArithmeticError:
            are_usable = False
        if not are_usable:
            raise ValueError(f"rope_scaling {config.rope_scaling} gives no frequencies")


def _refuse_other_architectures(c):
    """Raise ValueError for what is not a RoPE model of one of FAMILIES."""
    model_type = c.get("model_type")
    if c.get("position_embedding_type") == "alibi" or c.get("alibi"):
        raise ValueError(f"{model_type!r} uses ALiBi, not RoPE")
    if model_type == "baichuan":
        if "max_position_embeddings" not in c or c.get("hidden_size") == BAICHUAN_13B_HIDDEN:
            raise ValueError("Baichuan 13B uses ALiBi, not RoPE; the 7B models do")
    if str(model_type) not in FAMILIES:  # as text, since a list, which a broken file may have, has no hash
        reason = OTHERS.get(str(model_type))
        raise ValueError(f"model_type {model_type!r} is not known" + (f": {reason}" if reason else ""))
    for key in EXPERTS:
        if c.get(key):
            raise ValueError(f"a mixture of experts ({key} {c[key]}) is not known")
    if c.get("quantization_config"):
        raise ValueError("quantised weights are not known; take the model they were made of")


def _sizes(c, family):
    """Return the sizes of a Config, {field: positive int}. Raise ValueError for any other number."""
    sizes = {}
    for name, key in family.sizes.items():
        if c.get(key) is not None or key not in family.optional:
            sizes[name] = positive(c, key, int, LARGEST_SIZES[name])
    hidden_dim, n_heads = sizes["hidden_dim"], sizes["n_heads"]
    derived = {"intermediate_dim": 4 * hidden_dim, "n_kv_heads": n_heads, "head_dim": hidden_dim // n_heads}
    return derived | sizes


def _refuse_sliding_window(c, family, n_layers, window):
    """Raise ValueError if a layer looks back less far than the window."""
    layers = c.get("layer_types")
    if family.slides_unless_null:
        slides = c.get("sliding_window") is not None
    elif layers is None:  # then those from number max_window_layers on slide
        first = c.get("max_window_layers", 28)
        slides = c.get("use_sliding_window") and (type(first) is not int or first < n_layers)
    elif isinstance(layers, list):
        slides = c.get("use_sliding_window") and "sliding_attention" in layers
    else:
        raise ValueError(f"layer_types is {layers!r}, not a list")
    if not slides:
        return
    reach = positive(c, "sliding_window", int, default=4096)  # what Qwen2's stock class takes
    if reach < window:
        in_use = f"{c['model_type']} with sliding_window {reach} in use"
        raise ValueError(f"{in_use}: it never looks further back, so longer positions gain nothing")


# ---------------------------------------------------------------- Config -> config.json


def can_scale_queries(config):
    """Return whether a stock class computes this Config's model with scaled queries (rope.query_scale)."""
    return FAMILIES[config.model_type].scaled_queries_as is not None


def as_written(config):
    """Return the Config of the same model in the family that it is written as.

    Raise InputError if no stock class computes it: its queries are scaled (rope.query_scale), and its
    family's are not. Raise it also for a Config that would be read back with another window.
    """
    family = FAMILIES[config.model_type]
    if rope.has_query_scale(config.rope_scaling):
        model_type = family.scaled_queries_as
    else:
        model_type = family.written_as or config.model_type
    if model_type is None:
        message = f"stock loaders scale the queries of LLaMA and Mistral, not of {config.model_type}"
        raise InputError(f"llama_4_scaling_beta: {message}; leave it out")
    if config.rope_scaling and config.rope_scaling["rope_type"] == "dynamic":
        if "dynamic" not in FAMILIES[model_type].rope_types:
            message = f"stock loaders do not compute it for {config.model_type}"
            raise InputError(f"dynamic scaling: {message}; take another interpolation")
    block = FAMILIES[model_type].block
    written = dataclasses.replace(config, model_type=model_type, normalised_head=False, **block)
    _refuse_another_window(written)
    return written


def _refuse_another_window(config):
    """Raise InputError if what is written of a Config says another window, see scaling.stretched_window."""
    _, scaling = written_rope(config)
    window = config.max_position_embeddings
    if (read_as := stretched_window(scaling, window)) != window:
        what = f"{config.rope_scaling['rope_type']} by {config.rope_scaling['factor']:g}"
        raise InputError(
            f"{what} without extending the window of {window} tokens would be read as a window of {read_as}; "
            "extend it, or take a factor of 1"
        )


def hf_config(config):
    """Return the content of config.json for a Config, in terms that stock loaders compute exactly.

    The Config must be of a family with a stock class, see as_written.
    """
    family = FAMILIES[config.model_type]
    sizes = {key: getattr(config, name) for name, key in family.sizes.items()}
    return {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        **sizes,
        family.norm_eps: config.norm_eps,
        **_rope_keys(config),  # the window among them
        "tie_word_embeddings": config.tie_embeddings,
        **{key: getattr(config, name) for name, key in (family.flags | family.multipliers).items()},
        **({"no_rope_layers": config.rope_layers} if family.names_rope_layers else {}),
        **family.fixed,
        **family.written,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "dtype": config.dtype,
        "torch_dtype": config.dtype,
    }


def written_rope(config):
    """Return (theta, rope_scaling or None) of a Config in terms that its family's stock class computes."""
    return stock_terms(config, FAMILIES[config.model_type].rope_types)


def _rope_keys(config):
    """Return what config.json says of RoPE and the window, in both spellings (see scaling.read_rope)."""
    family = FAMILIES[config.model_type]
    theta, scaling = written_rope(config)
    partial = {}
    if family.partial_rotary is not None:
        partial = {"partial_rotary_factor": config.rotary_dim / config.head_dim}
    window = config.max_position_embeddings
    keys = {"max_position_embeddings": window, "rope_theta": theta, **partial}
    keys |= {key: keys[usual] for key, usual in family.rope_keys.items()}
    if scaling is None:
        parameters = {"rope_type": "default", "rope_theta": theta} | partial
        if "original_max_position_embeddings" in family.defaults:  # llama.cpp's converter asks for it
            keys["original_max_position_embeddings"] = window
        return keys | {"rope_scaling": None, "rope_parameters": parameters}

    mode = scaling["rope_type"]
    original_window = {"original_max_position_embeddings": config.original_window}
    # transformers before 5 (longrope) and llama.cpp's converter (llama3) look for it nowhere else.
    keys |= original_window
    scaling = scaling | original_window
    if rope.has_query_scale(scaling):  # vLLM has a name of its own for the scale of the queries
        keys["llama_4_scaling"] = {"beta": scaling["llama_4_scaling_beta"]} | original_window
    elif mode in ("linear", "dynamic"):  # stock loaders do not know it inside these two
        del scaling["original_max_position_embeddings"]
    if mode == "dynamic":  # where stock dynamic scaling begins
        keys["max_position_embeddings"] = config.original_window
    return keys | {
        "rope_scaling": scaling | {"type": mode},  # older readers want `type`
        "rope_parameters": scaling | {"rope_theta": theta} | partial,
    }


LENGTHS = {  # the keys, by file, that hold the longest text in tokens
    "tokenizer_config.json": ("model_max_length",),
    "generation_config.json": ("max_length", "max_position_embeddings"),
}


def tokenizer_files(config, files):
    """Return the tokenizer's files {name: bytes} to go with `as_written`.

    Stock loaders would look for a family's own tokenizer class beside them, and cut or refuse texts longer
    than the old window.
    """
    tokenizer_class = FAMILIES[config.model_type].tokenizer_class
    changed = {}
    for name, keys in LENGTHS.items():
        before = json_object(files, name)
        settings = dict(before)
        if tokenizer_class and name == "tokenizer_config.json":
            settings.pop("auto_map", None)
            settings["tokenizer_class"] = tokenizer_class
        for key in keys:
            longest = settings.get(key)
            if isinstance(longest, (int, float)) and longest < config.max_position_embeddings:
                settings[key] = config.max_position_embeddings
        if settings != before:
            changed[name] = json.dumps(settings).encode()
    return files | changed


# ---------------------------------------------------------------- names and layouts of weights


def stored_parameters(config):
    """Return {our name: parameter on the meta device} of what a checkpoint of this Config stores.

    A head that is tied to the embedding is not stored a second time.
    """
    parameters = empty_transformer(config).state_dict()
    if config.tie_embeddings:
        del parameters["head.weight"]
    return parameters


def published_name(name, model_type):
    """Return the name of a weight of ours in the published folders of a family.

    blocks.3.attention.q.weight is LLaMA's model.layers.3.self_attn.q_proj.weight.
    """
    family = FAMILIES[model_type]
    return renamed(name, LLAMA_NAMES | family.names, family.layers)


def renamed(name, module_names, layers):
    """Return the name of a weight of ours in another layout.

    module_names: {our name of a module: its name there}. layers: what stands there before a layer's number.
    """
    module, _, kind = name.rpartition(".")
    if not module.startswith("blocks."):
        return f"{module_names[module]}.{kind}"
    _, layer, module = module.split(".", 2)
    return f"{layers}.{layer}.{module_names[module]}.{kind}"


def is_recomputed(published):
    """Return whether a published tensor is one that models compute themselves.

    Old exports carry rotary tables and causal masks (GPT-J's and GPT-NeoX's).
    """
    masks = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
    return "rotary_emb" in published or published.endswith(masks)


def by_published_name(names, model_type):
    """Return {published name: our names of the weights that are stacked in it, in their order}."""
    stacked = {}
    for name in names:
        stacked.setdefault(published_name(name, model_type), []).append(name)
    return stacked


def is_query_or_key(name):
    """Return whether a weight of ours makes queries or keys, whose rows RoPE turns in pairs."""
    return name.endswith((".attention.q.weight", ".attention.k.weight"))


def has_other_rows(names, config):
    """Return whether a published tensor has its rows in another order than our weights in it have them."""
    family = FAMILIES[config.model_type]
    return (family.interleaved_rotary and is_query_or_key(names[0])) or _is_stacked_by_head(names, config)


def our_rows(w, names, config):
    """Return a published tensor with its rows in the order of our weights `names`, stacked one by one."""
    if _is_stacked_by_head(names, config):
        return w.unflatten(0, (config.n_heads, 3, config.head_dim)).transpose(0, 1).flatten(0, 2)
    return half_split(w, config.head_dim, config.rotary_dim)


def published_rows(w, names, config):
    """Return our weights `names`, stacked one by one, with their rows in the order that is published."""
    if _is_stacked_by_head(names, config):
        return w.unflatten(0, (3, config.n_heads, config.head_dim)).transpose(0, 1).flatten(0, 2)
    return w  # interleaved pairs are not written


def _is_stacked_by_head(names, config):
    """Return whether our weights `names` are published head by head, q, k and v of each."""
    return FAMILIES[config.model_type].stacked_by_head and len(names) == 3


def half_split(w, head_dim, rotary_dim):
    """Return the rows of q or k (H * head_dim, C) with their rotary pairs half-split instead of interleaved.

    Of the first rotary_dim = d rows of each head, pairs that come as (x[2j], x[2j + 1]) become
    (x[j], x[j + d/2]).
    """
    order = torch.arange(head_dim, device=w.device)
    order[:rotary_dim] = order[:rotary_dim].view(-1, 2).T.flatten()  # 0 2 4 ... 1 3 5 ...
    return w.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)
