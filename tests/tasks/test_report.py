"""tasks/report.py: uncertainties against other ways to find them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import report


def test_error_over_documents_is_the_bootstraps():
    rng = np.random.default_rng(0)
    count = rng.integers(500, 2000, 60).astype(float)
    nats = count * rng.normal(3, 0.3, 60)
    ppl, error = report.over_documents(nats, count)
    assert ppl == pytest.approx(math.exp(nats.sum() / count.sum()))
    drawn = rng.integers(0, 60, (20000, 60))
    assert error == pytest.approx(np.exp(nats[drawn].sum(1) / count[drawn].sum(1)).std(), rel=0.05)
    assert report.over_documents(nats[:1], count[:1]) == (pytest.approx(math.exp(nats[0] / count[0])), None)


def test_error_over_tasks_is_that_of_drawing_the_samples_of_each_task_anew():
    rng = np.random.default_rng(1)
    scores = rng.random((3, 50)) * np.array([[1.0], [0.2], [0.0]])
    mean, error = report.over_tasks(scores.tolist())
    assert mean == pytest.approx(scores.mean())
    drawn = rng.integers(0, 50, (20000, 3, 50))
    means = np.take_along_axis(scores[None], drawn, 2).mean((1, 2))
    assert error == pytest.approx(means.std(), rel=0.05)
    assert report.over_tasks([[0.5], [1.0]]) == (0.75, None)


@given(st.integers(1, 300), st.data())
def test_wilson_interval_ends_where_the_normal_test_begins_to_reject(n, data):
    """Its ends are the shares p that are 1.96 of their own standard deviations away from what was seen."""
    right = data.draw(st.integers(0, n))
    low, high = report.wilson(right, n)
    assert 0 <= low <= right / n + 1e-9 and right / n - 1e-9 <= high <= 1
    for p in (low, high):
        assert abs(right / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), abs=1e-6)


def perplexities(*values, window=4096):
    """Return results of a model with this window on one document, with perplexities at 256 tokens, 512, …"""
    results = []
    for i, ppl in enumerate(values):
        nats = [{"nats": 100 * math.log(ppl), "tokens": 100}]
        shown = {"ppl": ppl, "standard_error": None, "left_out": 0, "documents": 1, "tokens": 100}
        length = {"length": 256 << i, "beyond_window": 256 << i > window}
        results.append(length | {"tail": None, "by_document": nats} | shown)
    return results


def test_an_untrained_model_holds_nothing():
    """Its perplexity is that of guessing, at every length."""
    table = report.PerplexityTable("")
    (guesses,) = table.conclusions(perplexities(49000.0, 49100.0))
    assert guesses == "hardly predicts these texts (perplexity 49,000): is it trained at all?"
    (holds,) = table.conclusions(perplexities(12.0, 12.1))
    assert holds.startswith("holds its perplexity to 512 tokens")


def test_a_model_that_is_lost_from_the_first_length_on_holds_nothing():
    """Beyond its window a perplexity that stays is no merit, and one that is high no sign of no training."""
    table = report.PerplexityTable("")
    assert list(table.conclusions(perplexities(300.0, 301.0, window=255))) == []
    assert list(table.conclusions(perplexities(9000.0, 9001.0, window=255))) == []
    (holds,) = table.conclusions(perplexities(12.0, 300.0, window=256))
    assert holds.startswith("holds its perplexity to 256 tokens")


def test_a_model_without_any_right_answer():
    def conclusions(*right):
        results = []
        for i, n in enumerate(right):
            trials = [{"correct": trial < n} for trial in range(10)]
            results.append({"length": 256 << i, "accuracy": n / 10, "by_trial": trials})
        return list(report.AccuracyTable().conclusions(results))

    assert conclusions(0, 0) == ["gives no right answer at any length"]
    assert conclusions(9, 0) == conclusions(9, 10) == ["is below 95% already at 256 tokens"]
    assert conclusions(10, 0) == ["works to 256 tokens (95% or more at every length)"]


def test_how_much_of_the_texts_is_scored():
    table = report.PerplexityTable("more is possible")
    scored = {"length": 64, "tokens": 1200, "text_tokens": 5000}

    def introduction(**how):
        return table.introduction([scored | how, {"length": 128, "tokens": 0, "text_tokens": 5000}])

    said = "1,200 of the texts' 5,000 tokens are scored, each with the same weight: "
    whole = introduction(documents=2, tail=None, cut_to=None)
    assert whole == said + "all of 2 documents"
    cut = introduction(documents=1, tail=None, cut_to=2048)
    assert cut == said + "what a window of 2,048 holds of 1 document (more is possible)"
    tail = introduction(documents=3, tail=400, cut_to=None)
    assert tail == said + "the last 400 of 3 documents"
