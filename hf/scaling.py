"""Hugging Face's `rope_scaling` <-> rope.py: read it, stretch it further, write it for stock loaders."""

import dataclasses

import rope
from storage.files import InputError

# ---------------------------------------------------------------- stretching


def extend(config, mode, target_len, llama_4_scaling_beta=None, **settings):
    """Return the Config with the window stretched to target_len tokens by a mode of rope.py.

    settings: further keys of rope_scaling, such as `beta_fast` or `factor`. Without a factor it is the ratio
    of the windows; for dynamic it is 1, because dynamic grows with the length by itself.
    llama_4_scaling_beta: strength of rope.query_scale (default: the model's own, if it has one). A model that
    is scaled already (Llama 3.1, or one of ours) keeps its scaling, and both slow the frequencies. Raise
    InputError where the two cannot be combined.
    """
    window = config.max_position_embeddings
    earlier = dict(config.rope_scaling or {})
    own_beta = earlier.pop("llama_4_scaling_beta", 0.0)
    beta = own_beta if llama_4_scaling_beta is None else llama_4_scaling_beta

    if mode == "default":
        is_scaled = earlier.get("rope_type", "default") != "default"
        scaling = earlier if beta or is_scaled else None
    else:
        scaling = {
            "rope_type": mode,
            "factor": 1.0 if mode == "dynamic" else target_len / window,
            "original_max_position_embeddings": window,
        }
        if mode == "llama3":
            scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | scaling  # Llama 3.1's own
        scaling |= settings
        # `earlier` may hold no more than the original window of the queries' scale. It is combined all the
        # same: rope_scaling has one place for an original window.
        if earlier:
            scaling = compose(config.rotary_dim, config.rope_theta, earlier, scaling)
    if beta:
        scaling = {"original_max_position_embeddings": window} | (scaling or {"rope_type": "default"})
        scaling["llama_4_scaling_beta"] = beta
    return dataclasses.replace(config, max_position_embeddings=target_len, rope_scaling=scaling)


def compose(dim, theta, first, second):
    """Return the rope_scaling that stretches by `first`, which a model has already, and then by `second`.

    Both slow every pair. Which pairs are slow is asked of the model as it is, of its scaled angles in its
    present window. Raise InputError if one of the two depends on the length of the sequence.
    """
    if rope.depends_on_length(first) or rope.depends_on_length(second):
        modes = f"{second['rope_type']} scaling on top of this model's {first['rope_type']}"
        raise InputError(f"{modes}: one depends on the length; start from its base model")
    if _without_sizes(first) == _without_sizes(second):  # together they are one stretch of the first window
        return second | first | {"factor": first["factor"] * second["factor"]}
    f, attention_factor = rope.rope_frequencies(dim, theta, first)
    inv_freq, attention_factor_on_top = rope.rope_frequencies(dim, theta, second, f=f)
    original = first.get("original_max_position_embeddings") or second["original_max_position_embeddings"]
    factor = first.get("factor", 1.0) * second["factor"]
    return _as_longrope(dim, theta, inv_freq, attention_factor * attention_factor_on_top, factor, original)


def _without_sizes(scaling):
    """Return the settings of a rope_scaling that are neither its factor nor its window."""
    return {k: v for k, v in scaling.items() if k not in ("factor", "original_max_position_embeddings")}


# ---------------------------------------------------------------- written for stock loaders


def stock_terms(dim, theta, scaling):
    """Return (theta, rope_scaling or None) that give the same angles in terms that stock loaders have.

    Static NTK becomes another base, NTK-by-parts YaRN without its factor on cos and sin, and revised YaRN
    LongRoPE's factors.
    """
    scaling = scaling or {"rope_type": "default"}
    mode = scaling["rope_type"]
    query_scale = {}
    if rope.has_query_scale(scaling):
        query_scale = {k: scaling[k] for k in ("llama_4_scaling_beta", "original_max_position_embeddings")}

    if mode == "ntk":
        theta = theta * scaling["factor"] ** (dim / (dim - 2))
        mode = "default"
    if mode == "default":
        return theta, {"rope_type": "default"} | query_scale if query_scale else None
    if mode == "ntk_by_parts":
        return theta, scaling | {"rope_type": "yarn", "attention_factor": 1.0}
    if mode in ("linear", "dynamic", "yarn", "llama3"):
        return theta, scaling
    inv_freq, attention_factor = rope.rope_frequencies(dim, theta, scaling)
    if mode == "yarn_revised":
        original = scaling["original_max_position_embeddings"]
        scaling = _as_longrope(dim, theta, inv_freq, attention_factor, scaling["factor"], original)
    # Loaders derive the attention factor from the windows in different ways, and vLLM has two names of
    # its own for it.
    spelled_out = dict.fromkeys(("attention_factor", "short_mscale", "long_mscale"), attention_factor)
    return theta, scaling | spelled_out | query_scale


def _as_longrope(dim, theta, inv_freq, attention_factor, factor, original):
    """Return the rope_scaling of LongRoPE that has these frequencies at every length."""
    factors = (rope.default_frequencies(dim, theta) / inv_freq).tolist()
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": attention_factor,
        "factor": factor,
        "original_max_position_embeddings": original,
    }


# ---------------------------------------------------------------- read from config.json


def read_rope(c, window):
    """Return what a config.json says of RoPE: rope_theta, rope_scaling, and the share of a head that turns.

    c: its content. window: its max_position_embeddings. rope_scaling is as rope.py reads it, or None. Both
    spellings are read: rope_scaling beside rope_theta (transformers before 5) and rope_parameters that holds
    both (since 5). Raise ValueError for terms that are not known.
    """
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(c.get(key) or {}, dict):
            raise ValueError(f"{key} {c[key]!r} is not a JSON object")
    parameters = dict(c.get("rope_parameters") or {})
    scaling = dict(c.get("rope_scaling") or parameters)
    theta = _first_of("rope_theta", (parameters, scaling, c), default=10000.0)
    partial = _first_of("partial_rotary_factor", (scaling, parameters, c), default=1)
    mode = scaling.get("rope_type") or scaling.get("type") or "default"
    for key in ("type", "rope_theta", "partial_rotary_factor"):
        scaling.pop(key, None)
    scaling["rope_type"] = mode
    if scaling.get("llama_4_scaling_beta") is None:
        scaling.pop("llama_4_scaling_beta", None)

    _add_original_window(scaling, c.get("original_max_position_embeddings"), window)
    if rope.has_query_scale(scaling):
        beta, original = scaling["llama_4_scaling_beta"], scaling.get("original_max_position_embeddings")
        if not _is_positive(beta) or not _is_positive(original):
            start = f"llama_4_scaling_beta {beta!r} from {original!r} tokens on"
            raise ValueError(f"{start}: not positive numbers")
    elif mode == "default":
        scaling = None
    return float(theta), scaling, partial


def _first_of(key, places, default):
    """Return what the first of several dicts says under a key; null and 0 count as absent."""
    for place in places:
        if place.get(key):
            return place[key]
    return default


def _is_positive(value):
    """Return whether a value from JSON is a positive number."""
    return isinstance(value, (int, float)) and value > 0


def _add_original_window(scaling, outer, window):
    """Put the original window into a rope_scaling as stock loaders understand it, in tokens.

    outer: original_max_position_embeddings at the top of config.json, or None.
    window: max_position_embeddings.
    """
    mode = scaling["rope_type"]
    if mode == "dynamic":
        scaling["original_max_position_embeddings"] = window  # stock loaders look at nothing else
    elif outer:
        scaling["original_max_position_embeddings"] = outer  # it counts more than the one inside
    elif mode != "linear":
        scaling.setdefault("original_max_position_embeddings", window)
    if mode == "longrope" and scaling["original_max_position_embeddings"]:
        scaling.setdefault("factor", window / scaling["original_max_position_embeddings"])
