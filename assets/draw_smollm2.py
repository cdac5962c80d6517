"""Draw assets/smollm2.png from the files in results/.

PYTHONPATH=. python assets/draw_smollm2.py
"""

import json
from pathlib import Path

from tasks import plots

WINDOWS = {"untouched": 8192}  # the others: 131,072


def report(name, *files):
    """Return the report of a model, as tasks/plots.py draws it. Several files hold other models too."""
    by_length = {}
    for file in files:
        written = json.loads(Path("results", file).read_text())
        for model in (*written.get("compared", []), written):
            if len(files) == 1 or model["model"] == "smollm2-135m":
                by_length |= {result["length"]: result for result in model["results"]}
    window = WINDOWS.get(name, 131072)
    results = [by_length[length] | {"beyond_window": length > window} for length in sorted(by_length)]
    return {"model": name, "window": window, "original_window": 8192, "results": results}


def share(result):
    low, high = result["interval"]
    return [100 * x for x in (result["accuracy"], result["accuracy"] - low, high - result["accuracy"])]


def perplexity(result):
    return result["ppl"], result["standard_error"], result["standard_error"]


codes = [
    report("untouched", "needle_base.json"),
    report("PoSE with episodes", "needle.json"),
    report("episodes without skips", "no_skips/needle.json"),
    report("skips without episodes", "no_episodes/needle.json"),
]
novels = [
    report("untouched", "tail_base_books.json", "smollm2/table2_books_tail.json"),
    report("PoSE with episodes", "tail_books.json"),
]
figure, (left, right) = plots.new_figure(2, 12, 4)
plots.draw_curves(left, codes, share)
left.set(ylabel="codes found, one of four in novels\n% of 100 prompts (95% interval)", ylim=(-5, 105))
plots.draw_curves(right, novels, perplexity)
right.set(ylabel="perplexity of novels (± 1 SE)\nlast 1,024 tokens of 4 documents", yscale="log")
plots.save(figure, Path("assets/smollm2.png"))
