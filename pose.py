"""PoSE: positional skip-wise training, and the samplers it is compared with (Zhu et al., ICLR 2024).

A training example is `train_len` tokens long. PoSE cuts it into chunks and lets the position ids jump
between them, so that the model meets every distance of a `target_len` window at the price of a short one
(section 3). With two chunks:

    tokens     x[0 ... 4]                x[v+5 ... v+9]      v: how far the text moves on in the document
    positions  0 1 2 3 4   -- skip u --  u+5 ... u+9         u: uniform on 0 ... target_len - train_len

Everything here is index arithmetic in numpy. Attention stays causal by token order: a skip is not a
document boundary, and every later token attends to every earlier one.
"""

import numpy as np

METHODS = ("pose", "full", "pi", "randpos")
OFFSETS = ("uniform", "zero", "skip")


def sample(method, rng, text_len, train_len, target_len, chunks=2, offset="uniform"):
    """Draw one example: which tokens of a text to take, and which position each of them gets.

    method: `pose`; or one of the baselines: `full` (every position of the target window, so train_len must
    be target_len), `pi` (a plain short window), `randpos` (a random sorted subset of positions, Ruoss et
    al. 2023). rng: a numpy Generator. text_len: tokens in the text. chunks: how many to cut, at most
    train_len of them. offset: where the text of chunk i begins (Table 4): `uniform` draws v_i from
    {v_(i-1) ... the last place that fits}; `zero` has v_i = 0, contiguous text; `skip` has v_i = u_i, the
    text where its positions say it is, as far as the text reaches.

    Return (text_index, positions), int64 (train_len,), both strictly increasing, with
    positions < target_len and text_index + 1 < text_len, because the target of a token is the one that
    really follows it. Raise ValueError if that is impossible.
    """
    check(method, text_len, train_len, target_len, chunks, offset)
    plain = np.arange(train_len)
    if method == "randpos":
        return plain, np.sort(rng.choice(target_len, train_len, replace=False))
    if method in ("full", "pi"):
        return plain, plain.copy()  # the caller may change one of the two

    lengths = chunk_lengths(rng, train_len, min(chunks, train_len))
    room = text_len - 1 - train_len  # how far the text may move on
    skips = nondecreasing_uniform(rng, len(lengths), target_len - train_len)  # u_i
    if offset == "uniform":
        text_offsets = nondecreasing_uniform(rng, len(lengths), room)  # v_i
    elif offset == "zero":
        text_offsets = np.zeros_like(skips)
    else:
        text_offsets = np.minimum(skips, room)
    return plain + np.repeat(text_offsets, lengths), plain + np.repeat(skips, lengths)


def chunk_lengths(rng, train_len, chunks):
    """Cut a window at chunks - 1 distinct places; every way to cut is equally likely.

    Return int64 (chunks,), each at least 1, with the sum train_len. Of two chunks, the first is uniform
    on {1 ... train_len - 1}.
    """
    cuts = np.sort(rng.choice(train_len - 1, chunks - 1, replace=False)) + 1
    return np.diff(np.concatenate(([0], cuts, [train_len])))


def nondecreasing_uniform(rng, n, most):
    """Draw n integers (section 3.2): the first is 0, each later one uniform on {the one before ... most}."""
    values = np.zeros(n, dtype=np.int64)
    for i in range(1, n):
        values[i] = rng.integers(values[i - 1], most, endpoint=True)
    return values


def check(method, text_len, train_len, target_len, chunks, offset):
    """Raise ValueError unless `sample` can draw an example."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if offset not in OFFSETS:
        raise ValueError(f"offset must be one of {OFFSETS}, got {offset!r}")
    if not 1 <= train_len <= target_len:
        raise ValueError(
            f"need 1 <= train_len <= target_len, got train_len {train_len} and target_len {target_len}"
        )
    if text_len <= train_len:
        raise ValueError(
            f"a text of {text_len} tokens is too short for a window of {train_len}: it needs {train_len + 1}"
        )
    if method == "full" and train_len != target_len:
        raise ValueError(f"method 'full' needs train_len == target_len, got {train_len} and {target_len}")
    if chunks < 1:
        raise ValueError(f"chunks must be at least 1, got {chunks}")
