"""tasks.coverage counts distances as looking at all pairs does, and agrees with the closed form."""

import numpy as np
import pytest

from pose import sample
from tasks.coverage import coverage


@pytest.mark.parametrize("method, chunks", [("pose", 1), ("pose", 2), ("pose", 4), ("randpos", 1)])
def test_coverage_counts_every_distance_of_every_example(method, chunks):
    """The same examples are looked at pair by pair."""
    train_len, target_len, examples = 9, 40, 60
    seen, rng = np.zeros(target_len), np.random.default_rng(5)
    for _ in range(examples):
        _, positions = sample(method, rng, train_len + 1, train_len, target_len, chunks)
        distances = {abs(a - b) for a in positions.tolist() for b in positions.tolist()}
        seen[sorted(distances)] += 1
    counted = coverage(method, np.random.default_rng(5), train_len, target_len, chunks, examples)
    assert np.array_equal(counted, seen / examples)


def test_coverage_of_two_chunks_is_the_closed_form():
    """Distance d needs a skip of d - L + 1 ... d - 1, out of 0 ... target - L.

    So the share is (L - 1) / (target - L + 1), the same at every distance that is longer than the window and
    not among the last ones.
    """
    train_len, target_len, examples = 64, 1024, 4000
    p = (train_len - 1) / (target_len - train_len + 1)
    shares = coverage("pose", np.random.default_rng(0), train_len, target_len, 2, examples)
    middle = shares[train_len : target_len - train_len]
    # Distances side by side share their examples, so that their mean varies as a single one does.
    assert abs(middle.mean() - p) < 4 * (p * (1 - p) / examples) ** 0.5


def test_the_command_draws_a_plot(call, tmp_path):
    arguments = ("--train_len", 16, "--target_len", 64, "--chunks", "1,2", "--examples", 5)
    done = call("tasks.coverage", *arguments, "--plot", tmp_path / "p.png")
    assert done.returncode == 0 and done.stdout == f"wrote {tmp_path / 'p.png'}\n"
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--chunks", "0"], ["chunks must be at least 1"]),
        (["--train_len", 64, "--target_len", 32], ["target_len 32"]),
    ],
    ids=str,
)
def test_mistakes_are_one_line(call, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    done = call("tasks.coverage", *arguments)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and all(word in line for word in says)
    assert not list(tmp_path.iterdir())
