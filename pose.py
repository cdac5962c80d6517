"""PoSE: positional skip-wise training (Zhu et al., ICLR 2024, section 3), and the samplers it is compared with.

A training example is `train_len` tokens long. PoSE cuts it into chunks and lets the position ids jump between them, so that
the model meets every distance of a `target_len` window at the price of a short one:

    tokens     x[0 … 4]                  x[v … v+4]                  (two chunks; v: where the second one's text begins)
    positions  0 1 2 3 4   -- skip u --  u+5 … u+9                   (u ~ U{0 … target_len - train_len})

Everything here is index arithmetic in numpy. Attention stays causal by token order: a skip is no document boundary.
"""
from pathlib import Path

import numpy as np

METHODS = ("pose", "full", "pi", "randpos")
OFFSETS = ("uniform", "zero", "skip")


def sample(method, rng, text_len, train_len, target_len, chunks=2, offset="uniform"):
    """Draw one example: which tokens of a text to take, and which position each gets.

    method: `pose`; `full` (every position of the target window, needs train_len == target_len); `pi` (a plain short window,
    the control); `randpos` (a random sorted subset of positions, Ruoss et al. 2023). rng: a numpy Generator.
    text_len: tokens in the text. chunks: how many, at most train_len of them are made. offset: how chunk i's text begins
    (Table 4): `uniform` v_i ~ U{v_(i-1) … the last place that fits}; `zero` v_i = 0, contiguous text; `skip` v_i = u_i, the text
    where its positions say it is, as far as the text reaches.

    Returns (text_index, positions), int64 (train_len,), both strictly increasing, with text_index + 1 < text_len (the target of
    a token is the one that really follows it) and positions < target_len. Raises ValueError if that is impossible.
    """
    if method not in METHODS or offset not in OFFSETS:
        raise ValueError(f"method must be one of {METHODS} and offset one of {OFFSETS}, got {method!r} and {offset!r}")
    if not 1 <= train_len <= target_len:
        raise ValueError(f"need 1 <= train_len <= target_len, got train_len {train_len} and target_len {target_len}")
    if text_len <= train_len:
        raise ValueError(f"a text of {text_len} tokens is too short for a window of {train_len}: it needs {train_len + 1}")
    if method == "full" and train_len != target_len:
        raise ValueError(f"method 'full' needs train_len == target_len, got {train_len} and {target_len}")
    if chunks < 1:
        raise ValueError(f"chunks must be at least 1, got {chunks}")

    plain = np.arange(train_len)
    if method == "randpos":
        return plain, np.sort(rng.choice(target_len, train_len, replace=False))
    if method != "pose":
        return plain, plain.copy()

    chunks = min(chunks, train_len)  # a chunk has at least one token
    # Chunk lengths: chunks - 1 distinct cuts, so that every way to cut is equally likely; l_0 is uniform on 1 … L-1 for two.
    cuts = np.sort(rng.choice(train_len - 1, chunks - 1, replace=False)) + 1
    lengths = np.diff(np.concatenate(([0], cuts, [train_len])))
    # Skips u_i and text offsets v_i (section 3.2): the first chunk stays at 0, each later one moves on from the one before.
    room = text_len - 1 - train_len
    u = _chain(rng, chunks, target_len - train_len)
    v = {"uniform": lambda: _chain(rng, chunks, room), "zero": lambda: np.zeros_like(u), "skip": lambda: np.minimum(u, room)}[offset]()
    return plain + np.repeat(v, lengths), plain + np.repeat(u, lengths)


def _chain(rng, n, most):
    """n integers: the first is 0, each next one uniform on {the one before … most}."""
    values = np.zeros(n, dtype=np.int64)
    for i in range(1, n):
        values[i] = rng.integers(values[i - 1], most, endpoint=True)
    return values


def coverage(method, rng, train_len, target_len, chunks=2, examples=1000):
    """Share of examples in which two tokens stand at distance 0, 1, … target_len - 1, float64 (target_len,): Figure 5, by Monte Carlo."""
    seen = np.zeros(target_len)
    for _ in range(examples):
        taken = np.zeros(2 * target_len)
        taken[sample(method, rng, train_len + 1, train_len, target_len, chunks)[1]] = 1
        pairs = np.fft.irfft(np.abs(np.fft.rfft(taken)) ** 2)[:target_len]  # autocorrelation: pairs of positions at each distance
        seen += pairs > 0.5
    return seen / examples


def main():
    import errors  # not above: the samplers need numpy alone

    p = errors.ArgumentParser(description="Plot how often a training example holds each relative distance (the paper's Figure 5).")
    p.add_argument("--train_len", type=int, default=2048, help="default: 2048")
    p.add_argument("--target_len", type=int, default=16384, help="default: 16384")
    p.add_argument("--chunks", default="1,2,3", help="numbers of chunks, comma-separated (default: 1,2,3)")
    p.add_argument("--examples", type=int, default=1000, help="default: 1000")
    p.add_argument("--plot", type=Path, default=Path("coverage.png"), metavar="FILE.png", help="default: coverage.png")
    args = p.parse_args()
    errors.check_outputs(None, args.plot)
    if args.examples < 1:
        p.error(f"--examples {args.examples}: must be at least 1")
    from matplotlib.figure import Figure

    try:
        numbers = [int(n) for n in args.chunks.split(",")]
    except ValueError:
        p.error(f"--chunks {args.chunks}: give whole numbers, comma-separated, such as 1,2,3")
    rng = np.random.default_rng(0)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    try:
        curves = {f"PoSE, {n} chunk{'s' * (n != 1)}": ("pose", n) for n in numbers} | {"RandPos": ("randpos", 1)}
        for name, (method, chunks) in curves.items():
            axes.plot(coverage(method, rng, args.train_len, args.target_len, chunks, args.examples), label=name)
        axes.set_xlabel("relative distance, tokens")
        axes.set_ylabel("share of examples that hold it")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(args.plot, dpi=150)
    except ValueError as error:
        p.error(error)
    print(f"wrote {args.plot}")


if __name__ == "__main__":
    import errors

    errors.run(main)
