"""What eval.py makes of its results: uncertainty, tables, a sentence, plots, and a JSON file that an interrupted evaluation goes on from.

A report is one model's {"task", "model", "results": [one entry a length or benchmark]}; all models of a call stand in one table, plot and file.
"""
import json
import math

import numpy as np

from errors import UserError, changes, write_json

DEPTHS, GRID = 5, 10  # rows of depth in the table, in the heat map
WORKS = 0.95  # right answers
HOLDS = 1.05  # times the perplexity at the shortest length

# ---------------------------------------------------------------- uncertainty


def wilson(right, n, z=1.96):
    """The 95% interval of a share, right of n (Wilson 1927): it stays sensible at 0% and 100%, where mean ± deviation does not."""
    centre, half = right + z * z / 2, z * math.sqrt(right * (n - right) / n + z * z / 4)
    return [max(0.0, (centre - half) / (n + z * z)), min(1.0, (centre + half) / (n + z * z))]


def over_documents(nats, count):
    """Perplexity of all tokens and its standard error, from sums of losses and numbers of tokens by document. Documents differ more than
    tokens do, so they are what is drawn: the error of a ratio of two sums over them (the delta method), None for a single one."""
    n, loss = len(nats), nats.sum() / count.sum()
    ppl = math.exp(min(loss, 700))
    if n == 1:
        return ppl, None
    return ppl, ppl * math.sqrt(n / (n - 1) * ((nats - loss * count) ** 2).sum()) / count.sum()


def gain(first, result):
    """Mean change of the loss from one length to another, in nats a token, and its error over documents: both scored the same tokens (--tail).
    What documents differ in falls out, so this error is far smaller than those of the two perplexities."""
    a, b = ([document["nats"] / document["tokens"] for document in r["by_document"]] for r in (first, result))
    change = np.subtract(b, a)
    return f"{change.mean():+.3f}" + (f" ± {change.std(ddof=1) / math.sqrt(len(change)):.3f}" if len(change) > 1 else "")


def by_depth(by_trial, rows):
    """Share of right answers in so many equal ranges of depth; None where no trial was."""
    trials = [[t["correct"] for t in by_trial if min(int(t["depth"] * rows), rows - 1) == row] for row in range(rows)]
    return [sum(row) / len(row) if row else None for row in trials]


# ---------------------------------------------------------------- the file


def read(path, settings):
    """The reports that an earlier call left in a --json file. UserError if they are of an evaluation with other settings."""
    try:
        written = json.loads(path.read_text())
        earlier, last = dict(written["settings"]), {key: written[key] for key in ("task", "model", "results")}
        reports = [*written.get("compared", []), last]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"--json {path}: holds no results to go on from; remove it or name another file") from None
    if changed := changes(earlier, settings):
        raise UserError(f"--json {path}: holds results of another evaluation ({changed}); remove it or name another file")
    return reports


def write(path, settings, reports):
    """The last model stands on top, the others under `compared`."""
    write_json(path, reports[-1] | ({"compared": reports[:-1]} if reports[:-1] else {}) | {"settings": settings})


# ---------------------------------------------------------------- in words


def percent(share):
    return "" if share is None else f"{share:.0%}"


def figure(result):
    """The figure of a result and its uncertainty, two cells of the table."""
    if "accuracy" in result:
        return percent(result["accuracy"]), "{:.0f}-{:.0f}%".format(*(100 * share for share in result["interval"]))
    value, show = (result["ppl"], "{:,.2f}") if "ppl" in result else (result["score"], "{:.1%}")
    return [sign + show.format(x) if x is not None else "-" for sign, x in (("", value), ("± ", result["standard_error"]))]


def print_table(reports, task):
    """Lengths (or benchmarks) from top to bottom, in each the models one below the other."""
    first = reports[0]["results"][0]
    if task in ("passkey", "needle"):
        print(f"{first['trials']} prompts a length; on the right, the share of correct answers by the key's depth in the text")
        head = ["correct", "95% interval", *(f"{100 * i // DEPTHS}-{100 * (i + 1) // DEPTHS}%" for i in range(DEPTHS))]
    elif task == "ppl":
        head = ["perplexity", "± error", "documents", "left out", "tokens scored"] + ([f"loss against {first['length']:,}"] if first["tail"] else [])
    else:
        head = ["score", "± error", "metric", "shots", "items"]
    rows = [["" if task == "benchmarks" else "length", task, *head]]
    for results in zip(*(report["results"] for report in reports)):
        for report, r in zip(reports, results):
            label = "" if r is not results[0] else r["benchmark"] if task == "benchmarks" else f"{r['length']:,}"
            row = [label, report["model"] + "*" * r.get("beyond_window", False), *figure(r)]
            if task in ("passkey", "needle"):
                row += map(percent, by_depth(r["by_trial"], DEPTHS))
            elif task == "ppl":
                row += [f"{r[key]:,}" for key in ("documents", "left_out", "tokens")]
                row += [gain(report["results"][0], r)] if r["tail"] and r["length"] != first["length"] else [""]
            else:
                row += [r["metric"], str(r["shots"]), f"{r['items']:,}"]
            rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" if i < 2 else f"{cell:>{width}}" for i, (cell, width) in enumerate(zip(row, widths))).rstrip())
    if any(r.get("beyond_window") for report in reports for r in report["results"]):
        print("* longer than the model's window")
    for report in reports:
        for line in conclude(report["results"], task):
            print(report["model"], line)


def conclude(results, task):
    """What the results of one model say, in sentences that go on after its name."""

    def reach(results, holds):  # the longest length up to which every one holds
        return next((results[i - 1] for i, r in enumerate(results) if not holds(r)), results[-1])["length"]

    if task in ("passkey", "needle"):
        if results[0]["accuracy"] < WORKS:
            yield f"is below {WORKS:.0%} already at {results[0]['length']:,} tokens"
        else:
            works = reach(results, lambda r: r["accuracy"] >= WORKS)
            longest = ", the longest asked for" if works == results[-1]["length"] else ""
            yield f"works to {works:,} tokens ({WORKS:.0%} or more at every length){longest}"
        if trials := [t for r in results for t in r["by_trial"] if "agrees" in t]:
            yield f"decoded greedily gives the verdict of one-pass scoring on {sum(t['agrees'] for t in trials)} of {len(trials)} prompts"
    elif task == "ppl":
        filled = [r for r in results if r["documents"]]
        same = [r for r in filled if r["documents"] == filled[0]["documents"]]  # that of other texts is not comparable
        if len(same) > 1 and not same[0]["tail"]:  # with a tail the change and its error say more
            held = reach(same, lambda r: r["ppl"] <= HOLDS * same[0]["ppl"])
            others = "" if len(same) == len(filled) else "; other lengths have other documents"
            yield f"holds its perplexity to {held:,} tokens (at no length more than {HOLDS - 1:.0%} above that at {same[0]['length']:,}{others})"
        longest = filled[-1]
        if bins := longest.get("by_position"):
            ranges = ", ".join(f"{b['from']:,}-{b['to'] - 1:,}: {b['loss']:.3f}" for b in bins)
            yield f"has this loss by position in windows of {longest['length']:,}: {ranges} (nats a token)"
    else:
        yield f"scores {np.mean([r['score'] for r in results]):.1%} on average of {len(results)} benchmarks"


# ---------------------------------------------------------------- plots


def draw(reports, task, path):
    from matplotlib.figure import Figure

    by_position = "by_position" in reports[0]["results"][0]
    columns = len(reports) if task == "needle" else 1 + by_position
    whole = Figure(figsize=(1 + 5 * columns, 4), layout="constrained")
    axes = whole.subplots(1, columns, squeeze=False)
    if task == "needle":
        for a, report in zip(axes[0], reports):
            image = draw_grid(a, report)
        whole.colorbar(image, ax=axes, label="right answers, %")
    elif task == "benchmarks":
        draw_bars(axes[0, 0], reports)
    else:
        draw_curves(axes[0, 0], reports, task)
        if by_position:
            draw_positions(axes[0, 1], reports)
    whole.savefig(path, dpi=150)


def draw_grid(a, report):
    results = report["results"]
    cells = 100 * np.array([by_depth(r["by_trial"], GRID) for r in results], dtype=float).T  # (GRID, lengths); NaN: no trial
    image = a.imshow(cells, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    a.set_xticks(range(len(results)), [f"{r['length']:,}" + "*" * r["beyond_window"] for r in results], rotation=30)
    a.set_yticks(np.arange(GRID + 1) - 0.5, [f"{100 * i // GRID}%" for i in range(GRID + 1)])
    a.set_title(f"{report['model']}, {results[0]['trials']} prompts a length")
    a.set(xlabel="length, tokens (* beyond the window)", ylabel="depth of the answer in the text")
    return image


def draw_bars(a, reports):
    width = 0.8 / len(reports)
    for i, report in enumerate(reports):
        scores, errors = ([100 * (r[key] or 0) for r in report["results"]] for key in ("score", "standard_error"))
        a.bar(np.arange(len(scores)) + (i + 0.5) * width - 0.4, scores, width, yerr=errors, label=report["model"])
    a.set_xticks(range(len(scores)), [r["benchmark"] for r in report["results"]], rotation=20)
    a.set(ylabel="score, % (± standard error)", ylim=(0, 100))
    a.legend()


def draw_curves(a, reports, task):
    from matplotlib.ticker import LogFormatter

    for report in reports:
        results = [r for r in report["results"] if r.get("documents", 1)]
        values = [100 * r["accuracy"] if task == "passkey" else r["ppl"] for r in results]
        if task == "passkey":
            errors = np.abs(100 * np.transpose([r["interval"] for r in results]) - values)
        else:
            errors = [r["standard_error"] or 0 for r in results]
        a.errorbar([r["length"] for r in results], values, errors, marker="o", capsize=3, label=report["model"])
    length_axis(a, sorted({r["length"] for report in reports for r in report["results"]}), "length, tokens")
    if task == "passkey":
        a.set(ylabel="passkey accuracy, % (95% interval)", ylim=(-5, 105))
    else:
        tail = reports[0]["results"][0]["tail"]
        scored = f", last {tail:,} tokens" if tail else ""
        a.set_ylabel(f"perplexity{scored} (± 1 SE)")
        drawn = [r["ppl"] for report in reports for r in report["results"] if r["ppl"]]
        if max(drawn) > 3 * min(drawn):  # a model outside its window
            a.set_yscale("log")
            a.yaxis.set_major_formatter(LogFormatter())
            a.yaxis.set_minor_formatter(LogFormatter())
    a.grid(alpha=0.3)
    a.legend()


def length_axis(a, lengths, label):
    """A logarithmic x axis with a tick at each of the lengths."""
    a.set_xscale("log", base=2)
    a.set_xticks(lengths, [f"{n:,}" for n in lengths], rotation=30)
    a.set_xlabel(label)


def draw_positions(a, reports):
    """The loss by position in the longest windows that were filled."""
    for report in reports:
        longest = [r for r in report["results"] if r["documents"]][-1]
        bins = longest["by_position"]
        edges = [max(1, bins[0]["from"]), *(b["to"] for b in bins)]  # 0 has no place on a logarithmic axis
        a.stairs([b["loss"] for b in bins], edges, baseline=None, label=f"{report['model']}, windows of {longest['length']:,}")
    a.set_xscale("log", base=2)
    a.xaxis.set_major_formatter("{x:,.0f}")
    a.set(xlabel="position in the window", ylabel="loss, nats a token")
    a.grid(alpha=0.3)
    a.legend()
