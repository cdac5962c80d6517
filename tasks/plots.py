"""Draw what eval.py measured, all models of a call in one plot. A report is described in report.py.

Curves that coincide stay visible: each model has a marker and dashes of its own, and its points stand a
little beside those of the others. A point is hollow where the length is beyond the model's window.

matplotlib is imported only where something is drawn: a command that draws nothing starts faster.
"""

import io

import numpy as np

from storage.files import write_file
from tasks.report import by_depth

GRID = 10  # ranges of depth in a heat map
MARKERS = ("o", "s", "^", "D", "v")  # of the models in their order, then from the beginning again
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))  # likewise
BESIDE = 0.012  # how far a model's points are beside those of the one before, as a share of the axis


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


def draw_curves(axes, reports, point):
    """Draw a curve by length for each model, with error bars, and mark the original window.

    point(result): the value, and how far its error bar reaches below and above it, three numbers.
    """
    lengths = all_lengths(reports)
    octaves = np.log2(lengths[-1] / lengths[0])
    for i, report in enumerate(reports):
        results = report["results"]
        values, *bars = np.array([point(result) for result in results]).T
        # Rounding may put the end of an interval a little inside of 0 or 100%. matplotlib would refuse it.
        bars = np.maximum(bars, 0)
        beside = 2 ** (BESIDE * octaves * (i - (len(reports) - 1) / 2))
        places = beside * np.array([result["length"] for result in results])
        style = {"marker": MARKERS[i % len(MARKERS)], "linestyle": DASHES[i % len(DASHES)], "color": f"C{i}"}
        axes.errorbar(places, values, bars, capsize=3, label=report["model"], **style)
        beyond = np.array([bool(result["beyond_window"]) for result in results])
        style |= {"linestyle": "none", "markerfacecolor": "white", "zorder": 3}
        axes.plot(places[beyond], values[beyond], **style)
    if any(result["beyond_window"] for report in reports for result in report["results"]):
        style = {"marker": "o", "linestyle": "none", "color": "gray", "markerfacecolor": "white"}
        axes.errorbar([], [], label="beyond the model's window", **style)  # for the legend
    length_axis(axes, lengths, "length, tokens")
    mark_windows(axes, reports, lengths[0], lengths[-1])
    axes.grid(alpha=0.3)
    axes.legend()


def windows_of(reports):
    """Return {tokens: name} of the windows that the models had before any interpolation, ascending."""
    longest = max(report["window"] for report in reports)
    windows = {}
    for window in sorted({report["original_window"] for report in reports}):
        # Not every extended model records its original window: what is the longest here may be no original.
        kind = "original window" if window < longest else "window"
        windows[window] = f"{kind}, {window:,}"
    return windows


def mark_windows(axes, reports, first, last):
    """Draw a vertical line with a label above the axes at each window from `first` to `last` tokens."""
    for window, name in windows_of(reports).items():
        if first <= window <= last:
            axes.axvline(window, color="gray", linestyle="dotted", zorder=0)
            at_top = axes.get_xaxis_transform()
            axes.text(window, 1.02, name, transform=at_top, ha="center", color="dimgray", fontsize="small")


def draw_heat_map(axes, cells, report):
    """Draw a heat map of `cells`, in %, and return it. A line stands where the original window ends.

    cells: (rows, lengths of the report).
    """
    image = axes.imshow(cells, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    lengths = [result["length"] for result in report["results"]]
    labels = [
        f"{result['length']:,}" + ("*" if result["beyond_window"] else "") for result in report["results"]
    ]
    axes.set_xticks(range(len(lengths)), labels, rotation=30)
    notes = ["* beyond the window"] if any(label.endswith("*") for label in labels) else []
    for window, name in windows_of([report]).items():
        held = sum(length <= window for length in lengths)
        if 0 < held < len(lengths):
            axes.axvline(held - 0.5, color="black", linestyle="dotted")
            notes.append(f"dotted: {name}")
    axes.set_xlabel("\n".join(["length, tokens", *notes]))
    return image


# ---------------------------------------------------------------- right answers


def draw_accuracy(reports, path):
    """Draw the share of right answers by length, with its interval, a curve for each model (passkey)."""

    def point(result):
        low, high = result["interval"]
        share = result["accuracy"]
        return 100 * share, 100 * (share - low), 100 * (high - share)

    figure, (axes,) = new_figure(1, 6, 4)
    draw_curves(axes, reports, point)
    trials = reports[0]["results"][0]["trials"]
    axes.set(ylabel=f"passkeys found, % of {trials} prompts (95% interval)", ylim=(-5, 105))
    save(figure, path)


def draw_accuracy_grids(reports, path):
    """Draw the share of right answers by length and depth, a heat map for each model (needle)."""
    figure, panels = new_figure(len(reports), 1 + 5 * len(reports), 4)
    for axes, report in zip(panels, reports):
        results = report["results"]
        columns = [by_depth(result["by_trial"], GRID) for result in results]
        cells = 100 * np.array(columns, dtype=float).T  # (GRID, lengths), NaN where no trial was
        image = draw_heat_map(axes, cells, report)
        axes.set_yticks(np.arange(GRID + 1) - 0.5, [f"{100 * i // GRID}%" for i in range(GRID + 1)])
        axes.set_title(f"{report['model']}, {results[0]['trials']} prompts a length")
        axes.set_ylabel("depth of the answer in the text")
    figure.colorbar(image, ax=panels, label="right answers, %")
    save(figure, path)


def draw_ruler(reports, path):
    """Draw RULER's mean score by length, a curve for each model, and beside it a heat map of each model."""

    def point(result):
        error = result["standard_error"] or 0
        return 100 * result["score"], 100 * error, 100 * error

    figure, (first, *panels) = new_figure(1 + len(reports), 4 + 5 * len(reports), 4)
    draw_curves(first, reports, point)
    result = reports[0]["results"][0]
    prompts = f"{len(result['by_task'])} tasks of {result['samples']} prompts"
    first.set(ylabel=f"mean of {prompts}, % (± 1 SE)", ylim=(-5, 105))
    for axes, report in zip(panels, reports):
        image = _draw_scores_by_task(axes, report)
    figure.colorbar(image, ax=panels, label="score, %")
    save(figure, path)


def _draw_scores_by_task(axes, report):
    """Draw a heat map of a model's scores by length and task of RULER. Return it."""
    results = report["results"]
    tasks = list(results[0]["by_task"])
    cells = np.array([[100 * result["by_task"][task]["score"] for result in results] for task in tasks])
    image = draw_heat_map(axes, cells, report)
    for (row, column), score in np.ndenumerate(cells):
        colour = "white" if score < 15 or score > 85 else "black"  # the map is dark at both ends
        axes.text(column, row, f"{score:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_title(report["model"])
    return image


# ---------------------------------------------------------------- perplexity


def draw_perplexity(reports, path):
    """Draw perplexity by length, a curve for each model, and beside it the loss by position if measured."""
    by_position = "by_position" in reports[0]["results"][0]
    columns = 2 if by_position else 1
    figure, panels = new_figure(columns, 1 + 5 * columns, 4)
    filled = []  # the reports without the lengths that no document has
    for report in reports:
        filled.append(report | {"results": [result for result in report["results"] if result["documents"]]})
    _draw_perplexity_by_length(panels[0], filled)
    if by_position:
        _draw_loss_by_position(panels[1], filled)
    save(figure, path)


def _draw_perplexity_by_length(axes, reports):
    from matplotlib.ticker import LogFormatter

    def point(result):
        error = result["standard_error"] or 0
        return result["ppl"], error, error

    draw_curves(axes, reports, point)
    results = [result for report in reports for result in report["results"]]
    documents = [result["documents"] for result in results]
    fewest, most = min(documents), max(documents)
    number = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    tail = results[0]["tail"]
    scored = f"last {tail:,} tokens of " if tail else ""
    unit = "document" if most == 1 else "documents"
    axes.set_ylabel(f"perplexity (± 1 SE)\n{scored}{number} {unit}")
    perplexities = [result["ppl"] for result in results]
    if max(perplexities) > 3 * min(perplexities):  # one outside its window would flatten the others
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())


def _draw_loss_by_position(axes, reports):
    """Draw the loss by position in the longest windows that documents filled."""
    for i, report in enumerate(reports):
        longest = report["results"][-1]
        bins = longest["by_position"]
        first_edge = max(1, bins[0]["from"])  # 0 has no place on a logarithmic axis
        edges = [first_edge, *(b["to"] for b in bins)]
        beyond = "*" if longest["beyond_window"] else ""
        label = f"{report['model']}{beyond}, windows of {longest['length']:,}"
        style = {"linestyle": DASHES[i % len(DASHES)], "linewidth": 1.5}
        axes.stairs([b["loss"] for b in bins], edges, baseline=None, label=label, **style)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="position in the window", ylabel="loss, nats a token")
    mark_windows(axes, reports, 1, max(report["results"][-1]["length"] for report in reports))
    axes.grid(alpha=0.3)
    axes.legend()


# ---------------------------------------------------------------- benchmarks


def draw_scores(reports, path):
    """Draw scores with their standard errors: a group of bars for each benchmark, a bar for each model."""
    figure, (axes,) = new_figure(1, 6, 4)
    labels = [f"{result['benchmark']}\n{result['items']:,} items" for result in reports[0]["results"]]
    width = 0.8 / len(reports)
    for i, report in enumerate(reports):
        scores = [100 * result["score"] for result in report["results"]]
        errors = [100 * (result["standard_error"] or 0) for result in report["results"]]
        left_edge = np.arange(len(labels)) - 0.4 + i * width
        axes.bar(left_edge + width / 2, scores, width, yerr=errors, label=report["model"])
    axes.set_xticks(range(len(labels)), labels, rotation=20)
    axes.set(ylabel="score, % (± standard error)", ylim=(0, 100))
    axes.legend()
    save(figure, path)
