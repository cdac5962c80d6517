"""pose.sample keeps every promise of its docstring, for any request.

Its distributions are those of closed forms and of full enumeration. The chi-square tests have fixed seeds
and fail below p = 1e-6: never by bad luck, and at once for a wrong distribution.
"""

from collections import Counter
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pose import METHODS, OFFSETS, sample

# ---------------------------------------------------------------- properties


@st.composite
def requests(draw, methods=METHODS, offsets=OFFSETS):
    """Draw any request that can be met.

    Lengths 1 and 2, a text with no token to spare and too many chunks come up often.
    """
    method = draw(st.sampled_from(methods))
    train_len = draw(st.one_of(st.sampled_from([1, 2]), st.integers(1, 40)))
    farther = 0 if method == "full" else draw(st.one_of(st.just(0), st.integers(0, 300)))
    too_many = [train_len, train_len + 1, 10 * train_len]
    return {
        "method": method,
        "train_len": train_len,
        "target_len": train_len + farther,
        "text_len": train_len + 1 + draw(st.one_of(st.just(0), st.integers(0, 400))),
        "chunks": draw(st.one_of(st.integers(1, 4), st.sampled_from(too_many))),
        "offset": draw(st.sampled_from(offsets)),
    }


seeds = st.integers(0, 2**32)
thorough = settings(max_examples=400, deadline=None)
fewer = settings(max_examples=150, deadline=None)  # where one method or one offset is left to draw from


def draw_one(request, seed):
    return sample(rng=np.random.default_rng(seed), **request)


def shifts(index):
    """Return how far each token stands from the plain 0, 1, 2, ...

    A chunk has one shift, and a jump is where it changes.
    """
    return index - np.arange(index.shape[-1])


@thorough
@given(requests(), seeds)
def test_promises_to_every_caller(request, seed):
    text_index, positions = draw_one(request, seed)
    for index in (text_index, positions):
        assert index.dtype == np.int64 and index.shape == (request["train_len"],)
        assert (np.diff(index) > 0).all()
        assert index[0] >= 0
    assert text_index[-1] + 1 < request["text_len"]  # the target of the last token is there
    assert positions[-1] < request["target_len"]
    again = draw_one(request, seed)
    assert np.array_equal(again[0], text_index) and np.array_equal(again[1], positions)


@thorough
@given(requests(methods=["pose"]), seeds)
def test_pose_cuts_text_and_positions_at_the_same_few_places(request, seed):
    text_index, positions = draw_one(request, seed)
    assert text_index[0] == positions[0] == 0
    jumps = (np.diff(text_index) > 1) | (np.diff(positions) > 1)
    assert jumps.sum() <= request["chunks"] - 1


@fewer
@given(requests(methods=["full", "pi", "randpos"]), seeds)
def test_the_other_methods_read_plain_text(request, seed):
    text_index, positions = draw_one(request, seed)
    assert text_index.tolist() == list(range(request["train_len"]))
    if request["method"] != "randpos":
        assert positions.tolist() == list(range(request["train_len"]))
    if request["method"] == "full":
        assert positions.tolist() == list(range(request["target_len"]))


@fewer
@given(requests(methods=["pose"], offsets=["zero"]), seeds)
def test_offset_zero_is_contiguous_text(request, seed):
    text_index, _ = draw_one(request, seed)
    assert text_index.tolist() == list(range(request["train_len"]))


@fewer
@given(requests(methods=["pose"], offsets=["skip"]), seeds)
def test_offset_skip_takes_the_text_of_its_positions(request, seed):
    """Where the text ends too early, a chunk gets its last place that fits.

    That is as if the whole window stood at the end of the text.
    """
    text_index, positions = draw_one(request, seed)
    last_place = np.arange(request["train_len"]) + request["text_len"] - 1 - request["train_len"]
    assert np.array_equal(text_index, np.where(positions <= last_place, positions, last_place))
    if request["text_len"] > request["target_len"]:
        assert np.array_equal(text_index, positions)


@pytest.mark.parametrize("train_len", [1, 2, 7])
def test_more_chunks_than_tokens_are_one_token_each(train_len):
    request = {"method": "pose", "train_len": train_len, "target_len": 10**12, "text_len": 10**12}
    for seed in range(20):
        most = draw_one(request | {"chunks": train_len}, seed)
        for index in most:  # so much room that no two shifts are the same
            assert (np.diff(index) > 1).all()
        for chunks in (train_len + 1, 1000):
            assert np.array_equal(draw_one(request | {"chunks": chunks}, seed), most)


# ---------------------------------------------------------------- what is refused

FINE = {
    "method": "pose", "text_len": 100, "train_len": 10, "target_len": 40, "chunks": 2, "offset": "uniform",
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_len": 10}, "too short"),
        ({"text_len": 0}, "too short"),
        ({"train_len": 0, "target_len": 0}, "train_len 0"),
        ({"train_len": -1}, "train_len -1"),
        ({"target_len": 9}, "target_len 9"),
        ({"method": "longpose"}, "'longpose'"),
        ({"offset": "random"}, "'random'"),
        ({"chunks": 0}, "at least 1, got 0"),
        ({"chunks": -2}, "at least 1, got -2"),
    ],
)
def test_impossible_requests(method, change, message):
    fine = FINE | {"method": method, "target_len": 10 if method == "full" else 40}
    draw_one(fine, 0)
    with pytest.raises(ValueError, match=message):
        draw_one(fine | change, 0)


def test_full_is_the_whole_target_window():
    with pytest.raises(ValueError, match="train_len == target_len, got 10 and 40"):
        draw_one(FINE | {"method": "full"}, 0)


# ---------------------------------------------------------------- distributions


def assert_drawn_from(drawn, law):
    """Pearson's chi-square test of drawn outcomes against {outcome: probability} of all outcomes.

    At least 10 of each must be expected.
    """
    counts, n = Counter(drawn), len(drawn)
    assert set(counts) <= set(law) and sum(law.values()) == 1
    assert min(law.values()) * n >= 10
    statistic = float(sum((counts[outcome] - n * p) ** 2 / (n * p) for outcome, p in law.items()))
    degrees_of_freedom = len(law) - 1
    p_value = upper_tail_of_chi_square(statistic, degrees_of_freedom)
    assert p_value > 1e-6, (p_value, counts)


def upper_tail_of_chi_square(statistic, degrees_of_freedom):
    halves = torch.tensor([degrees_of_freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(*halves))


def uniform(outcomes):
    outcomes = list(outcomes)
    return dict.fromkeys(outcomes, Fraction(1, len(outcomes)))


def draw_many(n, seed, **request):
    """Return n samples: text indices and positions as arrays (n, train_len)."""
    rng = np.random.default_rng(seed)
    samples = [sample(rng=rng, **request) for _ in range(n)]
    return (np.stack(column) for column in zip(*samples))


def test_a_chi_square_test_that_can_fail():
    rng = np.random.default_rng(0)
    assert_drawn_from(rng.integers(10, size=5000).tolist(), uniform(range(10)))
    with pytest.raises(AssertionError):
        assert_drawn_from([min(i, 8) for i in rng.integers(10, size=5000).tolist()], uniform(range(10)))


def test_two_chunks_skip_and_text_offset_and_first_length():
    """u ~ U{0 ... Lt - Lc}, v ~ U{0 ... Lx - 1 - Lc}, l_0 ~ U{1 ... Lc - 1}, all independent."""
    train_len = 6
    sizes = {"text_len": 12, "train_len": train_len, "target_len": 16}
    text_index, positions = draw_many(24_000, 1, method="pose", **sizes)
    u, v = shifts(positions)[:, -1].tolist(), shifts(text_index)[:, -1].tolist()
    assert_drawn_from(u, uniform(range(11)))  # 16 - 6 = 10 at most
    assert_drawn_from(v, uniform(range(6)))  # the text's last token is a target only: 12 - 1 - 6 = 5 at most
    assert_drawn_from(list(zip(u, v)), uniform((i, j) for i in range(11) for j in range(6)))

    # The cut shows where the positions jump, or the text does. Only with u = v = 0 it does not: these
    # examples are left out, which the length knows nothing of.
    seen = []
    for i, j, jumped in zip(u, v, (shifts(positions) > 0) | (shifts(text_index) > 0)):
        if i or j:
            seen.append((i, int(np.argmax(jumped))))
    assert_drawn_from([length for _, length in seen], uniform(range(1, train_len)))
    visible = {}
    for i in range(11):
        for length in range(1, train_len):  # of 66 pairs (u, v), (0, 0) is left out
            visible[i, length] = Fraction(5 if i == 0 else 6, 65 * 5)
    assert_drawn_from(seen, visible)


def test_three_chunks_follow_the_chain_rule():
    """u_1 ~ U{0 ... M}, u_2 ~ U{u_1 ... M}.

    With three tokens each chunk is one token, so that no cut hides a shift.
    """
    most = 5
    chain = {}
    for i in range(most + 1):
        for j in range(i, most + 1):
            chain[i, j] = Fraction(1, (most + 1) * (most + 1 - i))
    sizes = {"text_len": 3 + 1 + most, "train_len": 3, "target_len": 3 + most, "chunks": 3}
    text_index, positions = draw_many(12_000, 2, method="pose", **sizes)
    for index in (text_index, positions):
        zero, first, second = shifts(index).T.tolist()
        assert not any(zero)
        assert_drawn_from(first, uniform(range(most + 1)))
        assert_drawn_from(list(zip(first, second)), chain)


def test_three_chunks_are_cut_anywhere():
    """Every pair of cut points is equally likely.

    Both are seen when 0 < u_1 < u_2, of which the cuts know nothing.
    """
    _, positions = draw_many(12_000, 3, method="pose", text_len=8, train_len=7, target_len=207, chunks=3)
    cuts = [tuple((np.flatnonzero(np.diff(row)) + 1).tolist()) for row in shifts(positions)]
    both = [pair for pair in cuts if len(pair) == 2]
    assert len(both) > 10_000
    assert_drawn_from(both, uniform(combinations(range(1, 7), 2)))


def chains(n, most, first=0):
    """Return every (0, w_1, ..., w_(n-1)) with w_i uniform on {w_(i-1) ... most}, with its probability."""
    if n == 1:
        return {(first,): Fraction(1)}
    law = {}
    for i in range(first, most + 1):
        for rest, p in chains(n - 1, most, i).items():
            law[first, *rest] = p / (most - first + 1)
    return law


def law_of_pose(text_len, train_len, target_len, chunks, offset):
    """Return {(text_index, positions): probability} from section 3 of the paper.

    It goes through everything that can be drawn.
    """
    law = Counter()
    all_cuts = list(combinations(range(1, train_len), chunks - 1))
    room = text_len - 1 - train_len
    for cuts in all_cuts:
        chunk_of = [sum(t >= cut for cut in cuts) for t in range(train_len)]
        for u, p_u in chains(chunks, target_len - train_len).items():
            texts = {
                "uniform": chains(chunks, room),
                "zero": {(0,) * chunks: 1},
                "skip": {tuple(min(x, room) for x in u): 1},
            }[offset]
            for v, p_v in texts.items():
                text_index, positions = (tuple(t + w[chunk_of[t]] for t in range(train_len)) for w in (v, u))
                law[text_index, positions] += p_u * p_v / len(all_cuts)
    return law


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("chunks, train_len, target_len, room", [(2, 4, 7, 2), (3, 4, 6, 1), (4, 5, 6, 1)])
def test_the_whole_distribution(chunks, train_len, target_len, room, offset):
    sizes = {"text_len": train_len + 1 + room, "train_len": train_len, "target_len": target_len}
    request = sizes | {"chunks": chunks, "offset": offset}
    law = law_of_pose(**request)
    text_index, positions = draw_many(max(500, int(10 / min(law.values())) + 1), 4, method="pose", **request)
    assert_drawn_from([(tuple(a), tuple(b)) for a, b in zip(text_index.tolist(), positions.tolist())], law)


def test_randpos_takes_each_set_of_positions_equally_often():
    _, positions = draw_many(4000, 5, method="randpos", text_len=4, train_len=3, target_len=7)
    assert_drawn_from([tuple(row) for row in positions.tolist()], uniform(combinations(range(7), 3)))


def test_randpos_takes_each_position_equally_often():
    """Each comes with probability Lc / Lt.

    Without replacement the variance of a count is smaller by (Lt - Lc) / (Lt - 1) than Pearson's.
    """
    n, train_len, target_len = 3000, 30, 100
    _, positions = draw_many(n, 6, method="randpos", text_len=31, train_len=train_len, target_len=target_len)
    counts, expected = np.bincount(positions.ravel(), minlength=target_len), n * train_len / target_len
    assert len(counts) == target_len
    statistic = ((counts - expected) ** 2 / expected).sum() * (target_len - 1) / (target_len - train_len)
    assert 1e-6 < upper_tail_of_chi_square(statistic, target_len - 1) < 1 - 1e-6
