"""tasks/plots.py: what stands in a picture, read from matplotlib's own objects and from the pixels."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from tasks import plots

LENGTHS = (128, 256, 1024)


def report(model, window, original_window, lengths=LENGTHS, right=9):
    """Return the report of a model that gives 9 right answers to 10 prompts."""
    results = []
    for length in lengths:
        trials = [{"depth": (i + 0.5) / 10, "correct": i < right} for i in range(10)]
        result = {"length": length, "beyond_window": length > window, "trials": 10, "by_trial": trials}
        result |= {"accuracy": right / 10, "interval": [0.6, 0.98]}
        result |= {"documents": 3, "tail": None, "ppl": 20.0 + length / 1000, "standard_error": 2.0}
        by_task = {"vt": {"score": 0.5}, "fwe": {"score": 0.7}}
        results.append(result | {"samples": 4, "score": 0.6, "by_task": by_task})
    return {"model": model, "window": window, "original_window": original_window, "results": results}


@pytest.fixture
def draw(monkeypatch):
    """draw(plots.draw_accuracy, *reports) -> the Figure, laid out, and nothing is written."""

    def draw_figure(function, *reports):
        figures = []
        monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
        function(list(reports), Path("p.png"))
        FigureCanvasAgg(figures[0]).draw()
        return figures[0]

    return draw_figure


def texts(axes):
    return [text.get_text() for text in axes.texts]


CURVES = (plots.draw_accuracy, plots.draw_ruler, plots.draw_perplexity)


@pytest.mark.parametrize("function", CURVES)
def test_the_original_window_is_a_line_with_a_label(draw, function):
    base, extended = report("base", 256, 256), report("extended", 2048, 256)
    axes = draw(function, base, extended).axes[0]
    (line,) = [line for line in axes.lines if list(line.get_xdata()) == [256, 256]]
    assert line.get_linestyle() == ":"
    (label,) = [text for text in axes.texts if text.get_text() == "original window, 256"]
    assert label.get_position()[0] == 256

    axes = draw(function, base).axes[0]
    assert texts(axes) == ["window, 256"]  # nothing longer is known of it
    axes = draw(function, report("far", 8192, 8192)).axes[0]  # outside of what was measured
    assert texts(axes) == [] and axes.get_xlim()[1] < 8192


@pytest.mark.parametrize("function", CURVES)
def test_points_beyond_a_models_window_are_hollow(draw, function):
    axes = draw(function, report("base", 256, 256), report("extended", 2048, 256)).axes[0]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    (points,) = hollow
    assert points.get_xdata().tolist() == [pytest.approx(1024, rel=0.05)]
    assert "beyond the model's window" in axes.get_legend_handles_labels()[1]
    axes = draw(function, report("extended", 2048, 256)).axes[0]
    assert axes.get_legend_handles_labels()[1] == ["extended"]


def test_curves_that_coincide_are_all_seen(draw):
    """Between the lengths, where there are no markers, each colour has a fair share of the pixels."""
    figure = draw(plots.draw_accuracy, *(report(name, 2048, 2048) for name in "abc"))
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3] / 255
    axes = figure.axes[0]
    (left, low), (right, high) = axes.transData.transform([(300, 85), (900, 95)])
    stretch = pixels[int(len(pixels) - high) : int(len(pixels) - low), int(left) : int(right)]
    shown = [(np.abs(stretch - to_rgb(f"C{i}")).max(-1) < 0.2).sum() for i in range(3)]
    assert min(shown) > 0.1 * sum(shown) > 0
    markers = {
        line.get_marker() for line in axes.lines if line.get_label() in "abc" or len(line.get_xdata()) > 2
    }
    assert len(markers - {"None", "|", "_"}) >= 3


@pytest.mark.parametrize(
    "function, says",
    [
        (plots.draw_accuracy, "% of 10 prompts"),
        (plots.draw_ruler, "2 tasks of 4 prompts"),
        (plots.draw_perplexity, "3 documents"),
    ],
)
def test_the_number_of_prompts_is_said(draw, function, says):
    assert says in draw(function, report("base", 256, 256)).axes[0].get_ylabel()


def test_an_interval_that_rounding_leaves_short_of_100_percent_is_drawn(draw):
    """That of 200 right answers to 200 prompts is one."""
    certain = report("base", 256, 256)
    for result in certain["results"]:
        result |= {"accuracy": 1.0, "interval": [0.98, 1 - 2**-53]}
    draw(plots.draw_accuracy, certain)


@pytest.mark.parametrize("function, panel", [(plots.draw_accuracy_grids, 0), (plots.draw_ruler, 1)])
def test_heat_maps_have_the_window_between_two_columns(draw, function, panel):
    axes = draw(function, report("extended", 512, 200)).axes[panel]
    assert [line.get_xdata()[0] for line in axes.lines] == [0.5]  # behind 128
    assert axes.get_xlabel() == "length, tokens\n* beyond the window\ndotted: original window, 200"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["128", "256", "1,024*"]
    axes = draw(function, report("extended", 2048, 1024)).axes[panel]
    assert len(axes.lines) == 0 and axes.get_xlabel() == "length, tokens"


def test_the_loss_by_position_has_the_window_too(draw):
    base = report("base", 256, 256)
    for result in base["results"]:
        edges = [0, 16, 64, result["length"]]
        bins = [{"from": low, "to": high, "loss": 3.0} for low, high in zip(edges, edges[1:])]
        result["by_position"] = bins
    axes = draw(plots.draw_perplexity, base, base | {"model": "other"}).axes[1]
    assert texts(axes) == ["window, 256"]
    assert axes.get_legend_handles_labels()[1] == [f"{name}*, windows of 1,024" for name in ("base", "other")]
    first, second = axes.patches
    assert first.get_linestyle() != second.get_linestyle()
