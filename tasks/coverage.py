"""Plot how often a training example holds each relative distance (the paper's Figure 5).

    python -m tasks.coverage --train_len 2048 --target_len 16384 --chunks 1,2,3 --plot coverage.png

A distance that no example holds is one that the model is never trained on.
"""

from argparse import ArgumentTypeError
from pathlib import Path

import numpy as np

from cli import arguments, process
from pose import sample
from storage.errors import InputError
from tasks.plots import new_figure, save


def coverage(method, rng, train_len, target_len, chunks=2, examples=1000):
    """Return the share of examples in which two tokens stand at a distance, float64 (target_len,).

    Entry d is the share at distance d, estimated by drawing examples. rng: a numpy Generator. The other
    arguments are those of pose.sample.
    """
    seen = np.zeros(target_len)
    for _ in range(examples):
        _, positions = sample(method, rng, train_len + 1, train_len, target_len, chunks)
        taken = np.zeros(2 * target_len)  # twice as long, so that no distance wraps around
        taken[positions] = 1
        # The autocorrelation counts the pairs of positions at each distance.
        pairs = np.fft.irfft(np.abs(np.fft.rfft(taken)) ** 2)[:target_len]
        seen += pairs > 0.5
    return seen / examples


def chunk_counts(text):
    """Return the numbers of chunks in "1,2,3", the text of a command-line option."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"{text}: give whole numbers, comma-separated, such as 1,2,3") from None


def parse_arguments():
    description = "Plot how often an example holds each relative distance (Figure 5)."
    p = arguments.ArgumentParser(prog="python -m tasks.coverage", description=description)
    # fmt: off
    p.add_argument("--train_len", type=arguments.whole_number(1), default=2048,
        help="tokens in an example (default: 2048)")
    p.add_argument("--target_len", type=arguments.whole_number(1), default=16384,
        help="tokens in the window (default: 16384)")
    p.add_argument("--chunks", type=chunk_counts, default=[1, 2, 3],
        help="numbers of chunks, comma-separated (default: 1,2,3)")
    p.add_argument("--examples", type=arguments.whole_number(1), default=1000,
        help="to draw for each curve (default: 1000)")
    p.add_argument("--plot", type=arguments.plot_file, default=Path("coverage.png"), metavar="FILE.png",
        help="default: coverage.png")
    # fmt: on
    return p.parse_args()


def main():
    args = parse_arguments()
    curves = {}  # {label: (method, chunks)}
    for chunks in args.chunks:
        curves[f"PoSE, {chunks} chunk" + ("" if chunks == 1 else "s")] = ("pose", chunks)
    curves["RandPos"] = ("randpos", 1)

    figure, (axes,) = new_figure(1, 7, 3.6)
    rng = np.random.default_rng(0)
    for label, (method, chunks) in curves.items():
        try:
            shares = coverage(method, rng, args.train_len, args.target_len, chunks, args.examples)
        except ValueError as error:  # what pose.sample refuses, such as a target shorter than an example
            raise InputError(error) from None
        axes.plot(shares, label=label)
    axes.set_xlabel("relative distance, tokens")
    axes.set_ylabel("share of examples that hold it")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, args.plot)
    print(f"wrote {args.plot}")


if __name__ == "__main__":
    process.run(main)
