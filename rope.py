"""Rotary position embedding (RoPE) and every way this repository stretches it.

RoPE turns each pair j of a query or key vector at position m by the angle m * theta_j, theta_j = base^(-2j/d), so that the
product of a query and a key depends on their distance only (Su et al. 2021, eq. 34). Interpolation changes theta_j so that
the angles of a long target window stay in the range that the model has seen.

Notable choices:
- Angles are float64 products of the *actual* positions, cos and sin are float32: exact at position 1,000,000. There is no
  table of length target_len, so any target window costs nothing.
- `scaling` is the dictionary that Hugging Face calls `rope_scaling`; what we compute is what stock loaders compute.
- Half-split layout: pair j is (x[j], x[j + d/2]), as in Hugging Face LLaMA; d may be less than the head (GPT-J, Phi).
"""
import math

import torch

MODES = ("default", "linear", "ntk", "dynamic", "ntk_by_parts", "yarn", "yarn_revised", "llama3", "longrope")


def rope_frequencies(dim, theta, scaling=None, seq_len=None, f=None):
    """Angles per position of each rotated pair, and the factor on cos and sin.

    dim: rotated size of a head (even). theta: the base. scaling: None or a dict with `rope_type` (one of MODES), `factor` s,
    `original_max_position_embeddings` L and the mode's own keys. seq_len: tokens in the current sequence, for `dynamic` and
    `longrope` only. f: what is stretched, float64 (dim/2,), default theta^(-2j/dim); an already scaled model has others.
    Returns (inv_freq float64 (dim/2,), attention_factor). Raises ValueError for an unknown mode or a missing key.

      default       f_j
      linear        f_j / s                                            position interpolation, Chen et al. 2023
      ntk           f_j s^(-2j/(dim-2)): base theta s^(dim/(dim-2))    NTK-aware, bloc97: the slowest pair is divided by exactly s
      dynamic       ntk with s replaced by s*n/L - (s-1), n = max(seq_len, L)
      ntk_by_parts  (1-r_j) f_j + r_j f_j/s                            YaRN section 3.2; r_j is linear in ln f_j, as in YaRN's code
      yarn          ntk_by_parts, cos and sin times 0.1 ln(s) + 1      YaRN eq. 22 (Peng et al. 2023)
      yarn_revised  f_j / (r_j s + 1 - r_j), and yarn's factor         blends wavelengths (YaRN issue 24; the official PoSE code)
      llama3        f_j / s for wavelengths over L/low_freq_factor, f_j below L/high_freq_factor, linear in L/wavelength between
      longrope      f_j / factor_j, short_factor up to L tokens, long_factor beyond; cos and sin times sqrt(1 + ln s / ln L)
    """
    scaling = scaling or {}
    mode = scaling.get("rope_type", "default")
    if mode not in MODES:
        raise ValueError(f"unknown rope_type {mode!r}: this code has {', '.join(MODES)}")

    def need(key):
        if scaling.get(key) is None:
            raise ValueError(f"rope_type {mode!r} needs {key!r} in rope_scaling")
        return scaling[key]

    def powers(base):
        return 1.0 / torch.tensor(base, dtype=torch.float64) ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    f = powers(theta) if f is None else f
    if mode == "default":
        return f, 1.0
    if mode == "longrope":
        original = need("original_max_position_embeddings")
        beyond = seq_len is not None and seq_len > original
        factors = torch.tensor(need("long_factor" if beyond else "short_factor"), dtype=torch.float64)
        if len(factors) != dim // 2:
            raise ValueError(f"longrope needs {dim // 2} factors (half the rotated dimension), got {len(factors)}")
        attention_factor = scaling.get("attention_factor")
        if attention_factor is None:
            s = need("factor")
            attention_factor = math.sqrt(1 + math.log(s) / math.log(original)) if s > 1 else 1.0
        return f / factors, float(attention_factor)

    s = need("factor")
    if s <= 0:
        raise ValueError(f"the factor of rope_type {mode!r} must be positive, got {s}")
    if mode == "linear":
        return f / s, 1.0
    if mode == "ntk":
        return f * powers(s ** (dim / (dim - 2))), 1.0
    original = need("original_max_position_embeddings")
    if mode == "dynamic":
        n = max(seq_len or 0, original)
        return f * powers((s * n / original - (s - 1)) ** (dim / (dim - 2))), 1.0
    if mode == "llama3":
        low, high = need("low_freq_factor"), need("high_freq_factor")
        turns = original * f / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast pair, left alone; 0: slow pair, divided by s
        return keep * f + (1 - keep) * f / s, 1.0

    ramp = _yarn_ramp(f, dim, theta, original, scaling)
    if mode == "yarn_revised":
        return f / (ramp * s + 1 - ramp), _yarn_attention_factor(s, scaling)
    inv_freq = (1 - ramp) * f + ramp * f / s
    return inv_freq, 1.0 if mode == "ntk_by_parts" else _yarn_attention_factor(s, scaling)


def _yarn_ramp(f, dim, theta, original, scaling):
    """0 for pairs that turn beta_fast times or more in the original window, 1 for those that turn beta_slow times or fewer."""
    def pair_that_turns(times):
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_that_turns(scaling.get("beta_fast") or 32)
    high = pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):  # whole pairs, as in YaRN's own code
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    pair = -f.log() * dim / (2 * math.log(theta))  # whose unscaled frequency it is: 0, 1, 2, … for an unscaled model
    return ((pair - low) / (high - low)).clamp(0, 1)


def _yarn_attention_factor(s, scaling):
    def mscale(weight):
        return 0.1 * weight * math.log(s) + 1.0 if s > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):  # DeepSeek's form
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)


def ntk_factor(dim, theta, scaling, window, ratio):
    """The factor of `ntk` that makes a model's window of so many tokens `ratio` times as long. dim, theta, scaling: the model's now.

    Pairs that do not come round in the window reach angles past it that the model never saw. The fastest of them, the critical pair j (Liu et
    al. 2023, "Scaling laws of RoPE-based extrapolation"), has to be slowed by `ratio`. ntk by s slows it by s^(2j/(dim-2)) only: s must be
    ratio^((dim-2)/(2j)), and with s = ratio the angles are new long before the end."""
    f, _ = rope_frequencies(dim, theta, scaling)
    slowest = dim // 2 - 1
    critical = (window * f >= 2 * math.pi).sum().clamp(1, slowest).item()  # the first that does not; if all do, the slowest one
    return ratio ** (slowest / critical)


def has_query_scale(scaling):
    """Does this rope_scaling (or None) ask for query_scale?"""
    return bool((scaling or {}).get("llama_4_scaling_beta"))


def by_length(scaling):
    """Do the angles of this rope_scaling depend on the length of the sequence? LongRoPE's do not where both its lists are the same."""
    scaling = scaling or {}
    return scaling.get("rope_type") == "dynamic" or scaling.get("short_factor") != scaling.get("long_factor")


def compose(dim, theta, first, second):
    """rope_scaling that stretches by `first`, which an already scaled model has, then by `second`; every pair is slowed by both. Which pairs
    are slow is asked of the model as it is: of its scaled angles in its present window. ValueError where one depends on the length."""
    if by_length(first) or by_length(second):
        modes = f"{second['rope_type']} scaling on top of this model's {first['rope_type']}"
        raise ValueError(f"{modes}: one depends on the length; start from its base model")
    alike = [{k: v for k, v in x.items() if k not in ("factor", "original_max_position_embeddings")} for x in (first, second)]
    if alike[0] == alike[1]:  # the same as one stretch of the first window
        return second | first | {"factor": first["factor"] * second["factor"]}
    f, attention_factor = rope_frequencies(dim, theta, first)
    inv_freq, on_top = rope_frequencies(dim, theta, second, f=f)
    original = first.get("original_max_position_embeddings") or second["original_max_position_embeddings"]
    return _as_longrope(dim, theta, inv_freq, attention_factor * on_top, first.get("factor", 1.0) * second["factor"], original)


def stock_terms(dim, theta, scaling):
    """(theta, rope_scaling or None) that give the same angles in terms that stock loaders have: static NTK as another base, NTK-by-parts as
    YaRN without its factor on cos and sin, revised YaRN as LongRoPE's factor for each pair."""
    mode = (scaling or {}).get("rope_type", "default")
    scale_of_queries = {k: scaling[k] for k in ("llama_4_scaling_beta", "original_max_position_embeddings")} if has_query_scale(scaling) else {}
    if mode == "ntk":
        theta, mode = theta * scaling["factor"] ** (dim / (dim - 2)), "default"
    if mode == "default":
        return theta, {"rope_type": mode} | scale_of_queries if scale_of_queries else None
    if mode == "ntk_by_parts":
        return theta, scaling | {"rope_type": "yarn", "attention_factor": 1.0}
    inv_freq, attention_factor = rope_frequencies(dim, theta, scaling)
    if mode == "yarn_revised":
        scaling = _as_longrope(dim, theta, inv_freq, attention_factor, scaling["factor"], scaling["original_max_position_embeddings"])
    if scaling["rope_type"] == "longrope":  # spelled out: loaders derive it from the windows in different ways, and vLLM has its own names
        scaling = scaling | dict.fromkeys(("attention_factor", "short_mscale", "long_mscale"), attention_factor)
    return theta, scaling | scale_of_queries


def _as_longrope(dim, theta, inv_freq, attention_factor, factor, original):
    factors = (rope_frequencies(dim, theta)[0] / inv_freq).tolist()
    return {
        "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": attention_factor, "factor": factor,
        "original_max_position_embeddings": original,
    }  # fmt: skip


def rope_cos_sin(positions, inv_freq, attention_factor=1.0):
    """cos and sin of every angle. positions int64 (B, T), inv_freq (dim/2,) or (B, dim/2) -> two float32 tensors (B, T, 1, dim/2),
    ready for (B, T, H, D)."""
    angles = positions[:, :, None, None].double() * inv_freq.to(positions.device).view(-1, 1, 1, inv_freq.shape[-1])  # (B, T, 1, dim/2)
    return (angles.cos() * attention_factor).float(), (angles.sin() * attention_factor).float()


def query_scale(scaling, start, end, device=None):
    """Factor on the queries of tokens start … end-1 of a sequence: 1 + beta ln(1 + floor(i / L)) for token i, beta `llama_4_scaling_beta` in
    `scaling`, L its original window (Llama 4, Ministral 3). float32 (1, end - start, 1, 1), ready for (B, T, H, D); None where all are 1.

    A softmax over n keys leaves the one that matters less weight the larger n is, and sharper queries give it back. What counts is how many
    keys a token sees, so i is its index in the sequence and not its position, which PoSE's skips inflate in training."""
    original = (scaling or {}).get("original_max_position_embeddings")
    if not has_query_scale(scaling) or end <= original:
        return None
    windows = torch.arange(start, end, device=device) // original
    return (1 + scaling["llama_4_scaling_beta"] * (1 + windows).double().log()).float().view(1, -1, 1, 1)


def apply_rope(x, cos, sin):
    """Turn the pairs (x[j], x[j + d/2]) of the first d dimensions, d/2 = cos.shape[-1]; the rest passes. x (B, T, H, D) -> the same shape
    and dtype; the arithmetic is float32."""
    d = 2 * cos.shape[-1]
    a, b = x[..., :d].float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos, x[..., d:]), dim=-1).to(x.dtype)
