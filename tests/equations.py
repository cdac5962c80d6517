"""Every interpolation pair by pair with scalars, as the papers and their reference code have it. Tests
compare rope.py with it.
"""

import math


def rope_scaling(mode, factor=4.0, original=2048, dim=64):
    """Return a rope_scaling with every key that any mode reads."""
    return {
        "rope_type": mode,
        "factor": factor,
        "original_max_position_embeddings": original,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "short_factor": [1 + j / dim for j in range(dim // 2)],
        "long_factor": [1 + j * factor / dim for j in range(dim // 2)],
    }


def by_hand(mode, theta, dim, s, original, n):
    """Return (frequencies, factor on cos and sin) of the `rope_scaling` of this mode, with factor s and
    the original window. n: tokens in the sequence."""
    f = powers(theta, dim)
    wavelength = [2 * math.pi / x for x in f]
    temperature = 1 if s <= 1 else 0.1 * math.log(s) + 1  # YaRN: sqrt(1/t) = 0.1 ln(s) + 1
    if mode == "default":
        return f, 1
    if mode == "linear":  # position m becomes m / s
        return [x / s for x in f], 1
    if mode == "ntk":
        return powers(theta * s ** (dim / (dim - 2)), dim), 1
    if mode == "dynamic":
        alpha = s * n / original - (s - 1) if n > original else 1
        return powers(theta * alpha ** (dim / (dim - 2)), dim), 1
    if mode == "llama3":
        return [as_meta_scales(x, s, original) for x in f], 1
    if mode == "longrope":
        lists = rope_scaling(mode, s, original, dim)
        factors = lists["long_factor" if n > original else "short_factor"]
        return [x / g for x, g in zip(f, factors)], math.sqrt(1 + math.log(s) / math.log(original))
    ramp = yarn_ramp(theta, dim, original)
    if mode == "yarn_revised":  # wavelengths are blended
        return [2 * math.pi / (w * (1 - r) + w * s * r) for w, r in zip(wavelength, ramp)], temperature
    assert mode in ("yarn", "ntk_by_parts"), mode
    frequencies = [x * (1 - r) + x / s * r for x, r in zip(f, ramp)]  # frequencies are blended
    return frequencies, temperature if mode == "yarn" else 1


def powers(base, dim):
    """Return base^(-2j/dim) for every pair j."""
    return [math.exp(-2 * j / dim * math.log(base)) for j in range(dim // 2)]


def yarn_ramp(theta, dim, original):
    """Return YaRN's ramp. Pair j turns L / wavelength_j times in the window L. The pairs that turn 32
    times and once are real numbers, rounded outwards to whole pairs."""

    def pair(turns):
        return dim / 2 * math.log(original / (2 * math.pi * turns), theta)

    first, last = max(math.floor(pair(32)), 0), min(math.ceil(pair(1)), dim - 1)
    ramp = []
    for j in range(dim // 2):
        if j <= first:
            ramp.append(0.0)
        elif j >= last:
            ramp.append(1.0)
        else:
            ramp.append((j - first) / (last - first))
    return ramp


def as_meta_scales(x, s, original, low_freq_factor=1.0, high_freq_factor=4.0):
    """Return a frequency as Meta's apply_scaling for Llama 3.1 changes it."""
    wavelength = 2 * math.pi / x
    if wavelength < original / high_freq_factor:
        return x
    if wavelength > original / low_freq_factor:
        return x / s
    smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    return (1 - smooth) * x / s + smooth * x
