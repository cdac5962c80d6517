"""Rotary position embedding (RoPE) and every way this repository stretches it.

RoPE turns pair j of a query or key vector at position m by the angle m * f_j, with f_j = theta^(-2j/d),
so that the product of a query and a key depends on their distance only (Su et al. 2021, equation 34).
Interpolation lowers the frequencies f_j, so that the angles of a long target window stay in the range
that the model has seen.

Notable choices:
- Angles are float64 products of the actual positions; cos and sin are rounded to float32 only at the end. So
  they are as precise at position 1,000,000 as at 1, and no table of the target's length exists: a target
  window of any length costs nothing.
- `scaling` is the dictionary that Hugging Face calls `rope_scaling`. What we compute is what stock loaders
  compute.
- Half-split layout: pair j is (x[j], x[j + d/2]), as in Hugging Face's LLaMA. d may be smaller
  than the head (GPT-J, Phi).

Symbols: d `dim`, the rotated dimensions of a head; j = 0 ... d/2-1 a pair; f its frequency in radians a
token, a float64 tensor (d/2,), which Hugging Face calls inv_freq; s the factor of the interpolation; L the
original window in tokens.
"""

import math

import torch

EXTENSIONS = ("default", "linear", "ntk", "dynamic", "ntk_by_parts", "yarn", "yarn_revised", "llama3")
MODES = (*EXTENSIONS, "longrope")  # longrope needs more than a factor: it comes with a checkpoint
RAMPED = ("ntk_by_parts", "yarn", "yarn_revised")  # modes with YaRN's ramp, which have a beta_fast


def rope_frequencies(dim, theta, scaling=None, seq_len=None, f=None):
    """Return the frequency of each rotated pair and the factor on cos and sin.

    dim: rotated dimensions of a head (even). theta: the base. scaling: None, or a dict with `rope_type`
    (one of MODES), `factor`, `original_max_position_embeddings` and the mode's own keys. seq_len: tokens in
    the sequence, which only `dynamic` and `longrope` look at. f: the frequencies to stretch, if not
    theta^(-2j/dim); a model that is scaled already has others.

    Return (inv_freq float64 (dim/2,), attention_factor). Raise ValueError for an unknown mode or a
    missing key.
    """
    scaling = scaling or {}
    mode = scaling.get("rope_type", "default")
    if mode not in MODES:
        raise ValueError(f"unknown rope_type {mode!r}: this code has {', '.join(MODES)}")
    if f is None:
        f = default_frequencies(dim, theta)
    if mode == "default":
        return f, 1.0
    if mode == "longrope":
        return longrope(f, scaling, seq_len), longrope_attention_factor(scaling)

    factor = required(scaling, "factor")
    if factor <= 0:
        raise ValueError(f"the factor of rope_type {mode!r} must be positive, got {factor}")
    if mode == "linear":
        return linear(f, factor), 1.0
    if mode == "ntk":
        return ntk(f, factor, dim), 1.0

    original = required(scaling, "original_max_position_embeddings")
    if mode == "dynamic":
        return dynamic_ntk(f, factor, dim, original, seq_len), 1.0
    if mode == "llama3":
        low, high = required(scaling, "low_freq_factor"), required(scaling, "high_freq_factor")
        return llama3(f, factor, original, low, high), 1.0

    ramp = yarn_ramp(f, dim, theta, scaling)
    if mode == "ntk_by_parts":
        return ntk_by_parts(f, factor, ramp), 1.0
    if mode == "yarn":
        return ntk_by_parts(f, factor, ramp), yarn_attention_factor(scaling)
    assert mode == "yarn_revised", mode
    return yarn_revised(f, factor, ramp), yarn_attention_factor(scaling)


def required(scaling, key):
    """Return scaling[key]. Raise ValueError if it is absent or null."""
    if scaling.get(key) is None:
        raise ValueError(f"rope_type {scaling['rope_type']!r} needs {key!r} in rope_scaling")
    return scaling[key]


# ---------------------------------------------------------------- one function per interpolation


def default_frequencies(dim, theta):
    """Return f_j = theta^(-2j/d), float64 (dim/2,): RoPE as it is (Su et al. 2021, section 3.2.2)."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    return 1.0 / torch.tensor(theta, dtype=torch.float64) ** exponents


def linear(f, s):
    """Return f_j / s: position interpolation (Chen et al. 2023)."""
    return f / s


def ntk(f, s, dim):
    """Return f_j s^(-2j/(d-2)): NTK-aware interpolation (bloc97 2023).

    It is the same as the base theta * s^(d/(d-2)). The fastest pair stays, and the slowest is divided by
    exactly s.
    """
    return f * default_frequencies(dim, s ** (dim / (dim - 2)))


def dynamic_ntk(f, s, dim, original, seq_len):
    """Return `ntk` with a factor that grows with the sequence (emozilla 2023).

    The factor is s n/L - (s-1), where n = max(seq_len, L).
    """
    n = max(seq_len or 0, original)
    return ntk(f, s * n / original - (s - 1), dim)


def llama3(f, s, original, low_freq_factor, high_freq_factor):
    """Return Llama 3.1's frequencies: f_j / s for slow pairs, f_j for fast ones, and a blend between.

    A pair is slow if it turns fewer than `low_freq_factor` times in the original window, and fast if it
    turns more than `high_freq_factor` times. The blend is linear in the number of turns.
    """
    turns = original * f / (2 * math.pi)
    keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return keep * f + (1 - keep) * f / s


def ntk_by_parts(f, s, ramp):
    """Return (1-r_j) f_j + r_j f_j/s with YaRN's ramp r (Peng et al. 2023, section 3.2).

    YaRN has the same frequencies. What it adds is the factor on cos and sin (`yarn_attention_factor`).
    """
    return (1 - ramp) * f + ramp * f / s


def yarn_revised(f, s, ramp):
    """Return f_j / (r_j s + 1 - r_j), which blends wavelengths instead of frequencies.

    Source: YaRN's issue 24, and the official PoSE code.
    """
    return f / (ramp * s + 1 - ramp)


def longrope(f, scaling, seq_len):
    """Return f_j / factor_j with a list of factors found by search (Ding et al. 2024).

    The list is `short_factor` for sequences of up to `original_max_position_embeddings` tokens,
    `long_factor` beyond. Raise ValueError if it has not one factor per pair.
    """
    original = required(scaling, "original_max_position_embeddings")
    name = "long_factor" if seq_len is not None and seq_len > original else "short_factor"
    factors = torch.tensor(required(scaling, name), dtype=torch.float64)
    if len(factors) != len(f):
        raise ValueError(f"longrope needs {len(f)} factors (half the rotated dimension), got {len(factors)}")
    return f / factors


def longrope_attention_factor(scaling):
    """Return LongRoPE's factor on cos and sin: the recorded one, else sqrt(1 + ln s / ln L), 1 if s <= 1."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor = required(scaling, "factor")
    if factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(required(scaling, "original_max_position_embeddings")))


def yarn_ramp(f, dim, theta, scaling):
    """Return YaRN's ramp r_j, float64 (dim/2,) (Peng et al. 2023, section 3.2).

    It is 0 for pairs that turn at least `beta_fast` times in the original window, 1 for those that turn at
    most `beta_slow` times, and linear in the pair's index between.
    """
    original = scaling["original_max_position_embeddings"]
    low = pair_with_turns(scaling.get("beta_fast") or 32, dim, theta, original)
    high = pair_with_turns(scaling.get("beta_slow") or 1, dim, theta, original)
    if scaling.get("truncate", True):  # YaRN's own code rounds to whole pairs
        low, high = math.floor(low), math.ceil(high)
    # dim - 1 as in YaRN's own code, though there are dim / 2 pairs.
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # no division by zero
    # The pair of the unscaled model that has frequency f_j: j itself, unless the model is scaled already.
    pair = -f.log() * dim / (2 * math.log(theta))
    return ((pair - low) / (high - low)).clamp(0, 1)


def pair_with_turns(turns, dim, theta, original):
    """Return the index (a float) of the pair that turns so many times in the original window."""
    return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))


def yarn_attention_factor(scaling):
    """Return YaRN's factor on cos and sin: the recorded one, else 0.1 ln(s) + 1.

    Source: Peng et al. 2023, equation 22. Where `mscale` and `mscale_all_dim` are given (DeepSeek's form),
    it is the quotient of two of its kind.
    """
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    log_factor = math.log(max(scaling["factor"], 1))
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return (0.1 * scaling["mscale"] * log_factor + 1) / (0.1 * scaling["mscale_all_dim"] * log_factor + 1)
    return 0.1 * log_factor + 1


def ntk_factor(dim, theta, scaling, window, ratio):
    """Return the factor of `ntk` that makes a window of `window` tokens `ratio` times as long.

    dim, theta, scaling: the model's.

    Pairs that do not turn once in the window reach angles past it that the model never saw. The fastest of
    them, the critical pair j (Liu et al. 2023, "Scaling laws of RoPE-based extrapolation"), has to be
    slowed by `ratio`. ntk with factor s slows it by s^(2j/(d-2)) only, so s must be ratio^((d-2)/(2j)).
    With s = ratio the angles would be new long before the end.
    """
    f, _ = rope_frequencies(dim, theta, scaling)
    slowest = dim // 2 - 1
    # Pairs 0 ... n - 1 turn at least once, so pair n is the critical one; if all do, the slowest.
    n_turning_once = (window * f >= 2 * math.pi).sum().item()
    critical = min(max(n_turning_once, 1), slowest)
    return ratio ** (slowest / critical)


# ---------------------------------------------------------------- what depends on more than the mode


def depends_on_length(scaling):
    """Return whether the angles of this rope_scaling (or None) depend on the length of the sequence.

    LongRoPE's do not where both its lists are the same.
    """
    scaling = scaling or {}
    return scaling.get("rope_type") == "dynamic" or scaling.get("short_factor") != scaling.get("long_factor")


def has_query_scale(scaling):
    """Return whether this rope_scaling (or None) asks for `query_scale`."""
    return bool((scaling or {}).get("llama_4_scaling_beta"))


def query_scale(scaling, start, end, device=None):
    """Return the factor on the queries of tokens start ... end-1 of a sequence, or None where all are 1.

    It is float32 (1, end - start, 1, 1), ready for (B, T, H, D): 1 + beta ln(1 + floor(i / L)) for token i
    (Llama 4, Ministral 3), with beta `llama_4_scaling_beta` of the rope_scaling and L its original window.

    A softmax over n keys leaves the one that matters less weight the larger n is, and sharper queries give
    it back. What counts is how many keys a token sees. So i is its index in the sequence and not its
    position, which PoSE's skips inflate.
    """
    if not has_query_scale(scaling):
        return None
    original = scaling["original_max_position_embeddings"]
    if end <= original:
        return None
    windows = torch.arange(start, end, device=device) // original
    scale = 1 + scaling["llama_4_scaling_beta"] * (1 + windows).double().log()
    return scale.float().view(1, -1, 1, 1)


# ---------------------------------------------------------------- turning vectors


def rope_cos_sin(positions, inv_freq, attention_factor=1.0):
    """Return cos and sin of every angle, times attention_factor: float32 (B, T, 1, dim/2) each.

    They are ready for vectors (B, T, H, D). positions: int64 (B, T). inv_freq: (dim/2,), or (B, dim/2)
    where each row has its own.
    """
    inv_freq = inv_freq.to(positions.device).view(-1, 1, 1, inv_freq.shape[-1])
    angles = positions[:, :, None, None].double() * inv_freq  # (B, T, 1, dim/2)
    return (angles.cos() * attention_factor).float(), (angles.sin() * attention_factor).float()


def apply_rope(x, cos, sin):
    """Turn the pairs (x[j], x[j + d/2]) of the first d dimensions by their angles.

    x: (B, T, H, D) -> the same shape and dtype. d is 2 * cos.shape[-1]; further dimensions pass.
    The arithmetic is float32.
    """
    d = 2 * cos.shape[-1]
    a, b = x[..., :d].float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos, x[..., d:]), dim=-1).to(x.dtype)
