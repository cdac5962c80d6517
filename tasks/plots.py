"""Draw what eval.py measured, all models of a call in one plot. A report is described in report.py.

matplotlib is imported only where something is drawn: a command that draws nothing starts faster.
"""

import io

import numpy as np

from storage.files import write_file
from tasks.report import by_depth

GRID = 10  # ranges of depth in a heat map


def new_figure(columns, width, height):
    """Return a matplotlib Figure, width x height inches, and its axes, so many side by side."""
    from matplotlib.figure import Figure  # without pyplot: it would look for a display

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def save(figure, path):
    """Write a figure as a .png, .pdf or .svg file. An earlier one stays whole until this one is complete."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix("."), dpi=150)
    write_file(path, content.getvalue())


def length_axis(axes, lengths, label):
    """Make the x axis logarithmic, with a tick at each of the lengths."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30)
    axes.set_xlabel(label)


def all_lengths(reports):
    """Return the lengths that occur in any of the reports, ascending."""
    return sorted({result["length"] for report in reports for result in report["results"]})


# ---------------------------------------------------------------- right answers


def draw_accuracy(reports, path):
    """Draw the share of right answers by length, with its interval, a curve for each model (passkey)."""
    figure, (axes,) = new_figure(1, 6, 4)
    for report in reports:
        results = report["results"]
        shares = np.array([100 * result["accuracy"] for result in results])
        intervals = np.array([result["interval"] for result in results]).T  # (2, lengths)
        distances = np.abs(100 * intervals - shares)
        lengths = [result["length"] for result in results]
        axes.errorbar(lengths, shares, distances, marker="o", capsize=3, label=report["model"])
    length_axis(axes, all_lengths(reports), "length, tokens")
    axes.set(ylabel="passkey accuracy, % (95% interval)", ylim=(-5, 105))
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def draw_accuracy_grids(reports, path):
    """Draw the share of right answers by length and depth, a heat map for each model (needle)."""
    figure, panels = new_figure(len(reports), 1 + 5 * len(reports), 4)
    for axes, report in zip(panels, reports):
        results = report["results"]
        columns = [by_depth(result["by_trial"], GRID) for result in results]
        cells = 100 * np.array(columns, dtype=float).T  # (GRID, lengths), NaN where no trial was
        image = axes.imshow(cells, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        labels = [f"{result['length']:,}" + ("*" if result["beyond_window"] else "") for result in results]
        axes.set_xticks(range(len(results)), labels, rotation=30)
        axes.set_yticks(np.arange(GRID + 1) - 0.5, [f"{100 * i // GRID}%" for i in range(GRID + 1)])
        axes.set_title(f"{report['model']}, {results[0]['trials']} prompts a length")
        axes.set(xlabel="length, tokens (* beyond the window)", ylabel="depth of the answer in the text")
    figure.colorbar(image, ax=panels, label="right answers, %")
    save(figure, path)


def draw_ruler(reports, path):
    """Draw RULER's mean score by length, a curve for each model, and beside it a heat map of each model."""
    figure, (first, *panels) = new_figure(1 + len(reports), 4 + 5 * len(reports), 4)
    for report in reports:
        results = report["results"]
        lengths = [result["length"] for result in results]
        scores = [100 * result["score"] for result in results]
        errors = [100 * (result["standard_error"] or 0) for result in results]
        first.errorbar(lengths, scores, errors, marker="o", capsize=3, label=report["model"])
    length_axis(first, all_lengths(reports), "length, tokens")
    first.set_title(f"{reports[0]['results'][0]['samples']} prompts a task and length")
    first.set(ylabel="mean of the tasks, % (± standard error)", ylim=(-5, 105))
    first.grid(alpha=0.3)
    first.legend()
    for axes, report in zip(panels, reports):
        image = _draw_scores_by_task(axes, report)
    figure.colorbar(image, ax=panels, label="score, %")
    save(figure, path)


def _draw_scores_by_task(axes, report):
    """Draw a heat map of a model's scores by length and task of RULER. Return it."""
    results = report["results"]
    tasks = list(results[0]["by_task"])
    cells = np.array([[100 * result["by_task"][task]["score"] for result in results] for task in tasks])
    image = axes.imshow(cells, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    for (row, column), score in np.ndenumerate(cells):
        colour = "white" if score < 15 or score > 85 else "black"  # the map is dark at both ends
        axes.text(column, row, f"{score:.0f}", ha="center", va="center", fontsize=8, color=colour)
    labels = [f"{result['length']:,}" + ("*" if result["beyond_window"] else "") for result in results]
    axes.set_xticks(range(len(results)), labels, rotation=30)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_title(report["model"])
    axes.set_xlabel("length, tokens (* beyond the window)")
    return image


# ---------------------------------------------------------------- perplexity


def draw_perplexity(reports, path):
    """Draw perplexity by length, a curve for each model, and beside it the loss by position if measured."""
    by_position = "by_position" in reports[0]["results"][0]
    columns = 2 if by_position else 1
    figure, panels = new_figure(columns, 1 + 5 * columns, 4)
    _draw_perplexity_by_length(panels[0], reports)
    if by_position:
        _draw_loss_by_position(panels[1], reports)
    save(figure, path)


def _draw_perplexity_by_length(axes, reports):
    from matplotlib.ticker import LogFormatter

    drawn = []
    for report in reports:
        filled = [result for result in report["results"] if result["documents"]]
        lengths = [result["length"] for result in filled]
        perplexities = [result["ppl"] for result in filled]
        errors = [result["standard_error"] or 0 for result in filled]
        axes.errorbar(lengths, perplexities, errors, marker="o", capsize=3, label=report["model"])
        drawn += perplexities
    length_axis(axes, all_lengths(reports), "length, tokens")
    tail = reports[0]["results"][0]["tail"]
    scored = f", last {tail:,} tokens" if tail else ""
    axes.set_ylabel(f"perplexity{scored} (± 1 SE)")
    if max(drawn) > 3 * min(drawn):  # a model outside its window would flatten the others on a linear axis
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_loss_by_position(axes, reports):
    """Draw the loss by position in the longest windows that documents filled."""
    for report in reports:
        filled = [result for result in report["results"] if result["documents"]]
        longest = filled[-1]
        bins = longest["by_position"]
        first_edge = max(1, bins[0]["from"])  # 0 has no place on a logarithmic axis
        edges = [first_edge, *(b["to"] for b in bins)]
        label = f"{report['model']}, windows of {longest['length']:,}"
        axes.stairs([b["loss"] for b in bins], edges, baseline=None, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="position in the window", ylabel="loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()


# ---------------------------------------------------------------- benchmarks


def draw_scores(reports, path):
    """Draw scores with their standard errors: a group of bars for each benchmark, a bar for each model."""
    figure, (axes,) = new_figure(1, 6, 4)
    benchmarks = [result["benchmark"] for result in reports[0]["results"]]
    width = 0.8 / len(reports)
    for i, report in enumerate(reports):
        scores = [100 * result["score"] for result in report["results"]]
        errors = [100 * (result["standard_error"] or 0) for result in report["results"]]
        left_edge = np.arange(len(benchmarks)) - 0.4 + i * width
        axes.bar(left_edge + width / 2, scores, width, yerr=errors, label=report["model"])
    axes.set_xticks(range(len(benchmarks)), benchmarks, rotation=20)
    axes.set(ylabel="score, % (± standard error)", ylim=(0, 100))
    axes.legend()
    save(figure, path)
