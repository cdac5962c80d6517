"""Hugging Face's `rope_scaling` <-> rope.py: read it, stretch it further, write it for stock loaders."""

import dataclasses
import math

import rope
from storage.errors import InputError
from storage.values import positive

# ---------------------------------------------------------------- stretching


def extend(config, mode, target_len, llama_4_scaling_beta=None, **settings):
    """Return the Config with the window stretched to target_len tokens by a mode of rope.py.

    settings: further keys of rope_scaling, such as `beta_fast` or `factor`. Without a factor it is the ratio
    of the windows; for dynamic it is 1, because dynamic grows with the length by itself. In all other modes a
    factor of 1 interpolates nothing, and nothing is recorded.
    llama_4_scaling_beta: strength of rope.query_scale (default: the model's own, if it has one). A model that
    is scaled already (Llama 3.1, or one of ours) keeps its scaling, and both slow the frequencies. Raise
    InputError where the two cannot be combined.
    """
    window = config.max_position_embeddings
    earlier = dict(config.rope_scaling or {})
    own_beta = earlier.pop("llama_4_scaling_beta", 0.0)
    beta = own_beta if llama_4_scaling_beta is None else llama_4_scaling_beta

    factor = settings.get("factor", 1.0 if mode == "dynamic" else target_len / window)
    if not interpolates(mode, factor):
        is_scaled = earlier.get("rope_type", "default") != "default"
        scaling = earlier if beta or is_scaled else None
    else:
        scaling = {"rope_type": mode, "factor": factor, "original_max_position_embeddings": window}
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


def interpolates(mode, factor):
    """Return whether a mode of rope.py with this factor changes angles, at whatever length."""
    return mode != "default" and (factor != 1 or mode == "dynamic")


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
    original = first.get("original_max_position_embeddings") or second["original_max_position_embeddings"]
    if first["rope_type"] == "default" and second["rope_type"] in ("linear", "ntk"):
        # These two look at no window. The one that is recorded is that of the queries' scale.
        return second | {"original_max_position_embeddings": original}
    f, attention_factor = rope.rope_frequencies(dim, theta, first)
    inv_freq, attention_factor_on_top = rope.rope_frequencies(dim, theta, second, f=f)
    factor = first.get("factor", 1.0) * second["factor"]
    return _as_longrope(dim, theta, inv_freq, attention_factor * attention_factor_on_top, factor, original)


def _without_sizes(scaling):
    """Return the settings of a rope_scaling that are neither its factor nor its window."""
    return {k: v for k, v in scaling.items() if k not in ("factor", "original_max_position_embeddings")}


# ---------------------------------------------------------------- written for stock loaders


def stock_terms(config, known):
    """Return (theta, rope_scaling or None) that give the same angles in terms that stock loaders have.

    known: the modes that they have for this family. Static NTK becomes another base, NTK-by-parts YaRN
    without its factor on cos and sin, and revised YaRN and whatever is not known LongRoPE's factors. Where
    the queries are scaled, llama.cpp reads YaRN alone. So there the plain frequencies, of whatever base,
    become a YaRN that slows nothing. `_own_mode` reads these forms back.
    """
    dim, theta, original = config.rotary_dim, config.rope_theta, config.original_window
    scaling = config.rope_scaling or {"rope_type": "default"}
    mode = scaling["rope_type"]
    query_scale = {}
    if rope.has_query_scale(scaling):
        query_scale = {k: scaling[k] for k in ("llama_4_scaling_beta", "original_max_position_embeddings")}

    if mode == "ntk":
        theta = theta * scaling["factor"] ** (dim / (dim - 2))
        mode = "default"
    if mode == "default":
        if not query_scale:
            return theta, None
        return theta, _yarn_that_slows_nothing(theta, config.max_position_embeddings, original) | query_scale
    if mode in ("yarn_revised", "longrope") or mode not in known:
        inv_freq, attention_factor = rope.rope_frequencies(dim, theta, scaling)
        if mode != "longrope":
            scaling = _as_longrope(dim, theta, inv_freq, attention_factor, scaling["factor"], original)
        # Loaders derive the attention factor from the windows in different ways, and vLLM has two names of
        # its own for it.
        spelled_out = dict.fromkeys(("attention_factor", "short_mscale", "long_mscale"), attention_factor)
        return theta, scaling | spelled_out | query_scale
    if mode == "ntk_by_parts":
        # mlx-lm and llama.cpp know the two mscales, and older loaders the attention factor.
        without_factor = dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), 1.0)
        scaling = scaling | {"rope_type": "yarn"} | without_factor
    elif mode == "yarn" and query_scale:  # llama.cpp's converter asks for it
        scaling = {"mscale_all_dim": 0.0} | scaling
    return theta, _with_floats(scaling)


def _yarn_that_slows_nothing(theta, window, original):
    """Return a rope_scaling of YaRN that leaves all frequencies alone, for llama.cpp, vLLM and mlx-lm.

    beta_fast is how often a pair of frequency theta^-1.5 turns in the original window. The slowest pair has
    more than theta^-1, so all turn more often, and the ramp begins past the last. The factor is the ratio of
    the windows, because vLLM's table of angles has `factor` times the original window.
    """
    beta_fast = original / (2 * math.pi * theta**1.5)
    return {
        "rope_type": "yarn",
        "factor": max(1.0, window / original),
        "beta_fast": beta_fast,
        "beta_slow": beta_fast / 2,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }


def _with_floats(scaling):
    """Return a rope_scaling with its whole numbers as floats, but for windows: old loaders warn of others."""
    as_floats = {}
    for key, value in scaling.items():
        is_window = key == "original_max_position_embeddings"
        as_floats[key] = float(value) if type(value) is int and not is_window else value
    return as_floats


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

POSITIVE = (
    "factor", "original_max_position_embeddings", "attention_factor", "low_freq_factor", "high_freq_factor",
)  # fmt: skip
DEFAULT_IF_ZERO = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "llama_4_scaling_beta")


def read_rope(c, window, default_partial, default_theta):
    """Return what a config.json says of RoPE: rope_theta, rope_scaling, and the share of a head that turns.

    c: its content. window: its max_position_embeddings. default_partial, default_theta: where it says none.
    rope_scaling is as rope.py reads it, or None. Both spellings are read: rope_scaling beside rope_theta
    (transformers before 5) and rope_parameters that holds both (since 5). Raise ValueError for terms that are
    not known, and where the two disagree.
    """
    spellings = {}
    for key in ("rope_scaling", "rope_parameters"):
        spellings[key] = c.get(key) or {}
        if not isinstance(spellings[key], dict):
            raise ValueError(f"{key} {c[key]!r} is not a JSON object")
        if any(isinstance(value, dict) for value in spellings[key].values()):
            raise ValueError(f"{key} that differ from layer to layer are not known")
    places = (*spellings.values(), c)
    theta = positive(_agreed("rope_theta", places), "rope_theta", default=default_theta)
    partial = _agreed("partial_rotary_factor", places)
    partial = positive(partial, "partial_rotary_factor", most=1, default=default_partial)

    terms = [some for some in map(_scaling_terms, spellings.values()) if some] or [{}]
    # They are compared when they are complete: one may spell defaults out that the other leaves out.
    scalings = [_completed(some, theta, c, window) for some in terms]
    if scalings[0] != scalings[-1]:
        raise ValueError("rope_scaling and rope_parameters disagree")
    return theta, scalings[0], partial


def _completed(terms, theta, c, window):
    """Return the rope_scaling that the terms of one spelling make, checked, or None if nothing is scaled.

    theta: the base. c, window: as in `read_rope`.
    """
    scaling = terms | {"rope_type": terms.get("rope_type", "default")}
    _check_numbers(scaling)
    _add_original_window(scaling, c, window)
    if scaling["rope_type"] == "yarn":
        scaling = _own_mode(theta, scaling)
    if scaling["rope_type"] == "default" and not rope.has_query_scale(scaling):
        return None
    return scaling


def _own_mode(theta, yarn):
    """Return a rope_scaling of YaRN as the mode that stock_terms wrote like this, or else as it is.

    YaRN without its factor on cos and sin is NTK-by-parts. If moreover its ramp begins past the last pair, it
    slows nothing.
    """
    rope.required(yarn, "factor")
    original = yarn["original_max_position_embeddings"]
    if rope.yarn_attention_factor(yarn) == 1:
        left_out, mode = ("attention_factor", "mscale", "mscale_all_dim"), "ntk_by_parts"
        if (yarn.get("beta_fast") or 32) <= original / (2 * math.pi * theta):
            left_out, mode = (*left_out, "factor", "beta_fast", "beta_slow", "truncate"), "default"
    elif yarn.get("mscale") and yarn.get("mscale_all_dim"):
        return yarn
    else:  # one mscale without the other counts for nothing
        left_out, mode = ("mscale", "mscale_all_dim"), "yarn"
    return {k: v for k, v in yarn.items() if k not in left_out} | {"rope_type": mode}


def _agreed(key, places):
    """Return {key: what several dicts say under it}, {} if none does. Raise ValueError if they disagree."""
    found = [place[key] for place in places if place.get(key) is not None]
    if any(value != found[0] for value in found):
        raise ValueError(f"{key} is {found[0]!r} in one place and {found[-1]!r} in another")
    return {key: found[0]} if found else {}


def _scaling_terms(spelling):
    """Return what a spelling says of the scaling alone, its kind as rope_type; {} where it says nothing."""
    not_scaling = ("type", "rope_theta", "partial_rotary_factor")
    terms = {k: v for k, v in spelling.items() if v is not None and k not in not_scaling}
    mode = spelling.get("rope_type") or spelling.get("type")
    return terms | {"rope_type": mode} if mode else terms


def _check_numbers(scaling):
    """Raise ValueError for a setting of a rope_scaling that no model can have."""
    for key in POSITIVE:
        if key in scaling:
            positive(scaling, key)
    for key in DEFAULT_IF_ZERO:
        if scaling.get(key):
            positive(scaling, key)
    for key in ("short_factor", "long_factor"):
        factors = scaling.get(key, [])
        if not isinstance(factors, list):
            raise ValueError(f"{key} is {factors!r}, not a list of numbers")
        for factor in factors:
            positive({key: factor}, key)
    low, high = scaling.get("low_freq_factor", 1), scaling.get("high_freq_factor", 4)
    slow, fast = scaling.get("beta_slow") or 1, scaling.get("beta_fast") or 32
    if not low < high or not slow <= fast:
        raise ValueError("low_freq_factor must be below high_freq_factor, and beta_slow below beta_fast")


def _add_original_window(scaling, c, window):
    """Put the original window into a rope_scaling as stock loaders understand it, in tokens.

    c: the content of config.json. window: its max_position_embeddings.
    """
    key = "original_max_position_embeddings"
    mode = scaling["rope_type"]
    if mode == "dynamic":
        scaling[key] = window  # stock loaders look at nothing else
    elif c.get(key):
        positive(c, key)
        scaling[key] = c[key]  # it counts more than the one inside
    elif mode != "linear":
        scaling.setdefault(key, window)
    elif rope.has_query_scale(scaling):
        positive(scaling, key)
    if key in scaling:
        if scaling[key] % 1:
            raise ValueError(f"{key} is {scaling[key]!r}, not a whole number")
        scaling[key] = int(scaling[key])  # a file may say 4096.0, and loaders refuse that
    if mode == "longrope":
        scaling.setdefault("factor", window / scaling[key])


def stretched_window(scaling, window):
    """Return the window, in tokens, of a model with a rope_scaling (or None) whose file says `window`.

    Qwen's own instructions add YaRN to a config.json and leave max_position_embeddings at the window before
    it. transformers scales the angles then and does not look at the window; vLLM takes the factor times the
    original window. So does this code where the original window is the one that the file says. In every other
    case the file means what it says: YaRN's factor may be larger than the windows' ratio, and with linear
    scaling most files say the stretched window and record no other.
    """
    scaling = scaling or {}
    is_unstretched = scaling.get("original_max_position_embeddings") == window
    if scaling.get("rope_type") not in rope.RAMPED or not is_unstretched:
        return window
    return max(window, round(scaling.get("factor", 1) * window))
