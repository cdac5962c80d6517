"""The figures in the documents against the files in results/ that they come from.

Each row of the tables named below is read from its document, and each of its cells is computed anew.
"""

import json
import math
import re
import statistics

import pytest
from test_documents import ROOT, cited_paths, expand_braces, read

METHODS = {"full-length": "full", "RandPos": "randpos", "plain short windows": "pi", "PoSE": "pose"}
ROPES = {"linear": "linear", "NTK": "ntk", "YaRN": "yarn"}
FIGURE_4 = {
    "linear": "linear", "NTK": "ntk", "YaRN": "yarn-", "YaRN, the official code's form": "yarn_revised",
    "Llama 3's": "llama3",
}  # fmt: skip
TABLE_5 = {
    "1 chunk": "1-chunks?-", "2 chunks": "2-chunks", "3 chunks": "3-chunks", "8 chunks": "8-chunks",
    "RandPos": "randpos",
}  # fmt: skip
SMOLLM2, TINY = {"none": "^smollm2-135m$"}, {"none": "^tiny$"}  # the rows of untouched models


def of_targets(arms, targets):
    """Return {"PoSE, target 16,384": "pose-2x", …} for every arm and each of {target: windows in it}."""
    rows = {}
    for target, windows in targets.items():
        rows |= {f"{name}, target {target:,}": f"{arm}-{windows}x" for name, arm in arms.items()}
    return rows


# Tables whose rows are models of the same files: (document, beginning of the table's first header cell, files
# in results/ without .json, {row: regular expression that finds the folders of its model, one a seed}).
ROWS_ARE_MODELS = [
    (
        "RESULTS.md", "Table 1, linear", "smollm2/table1_seeds_books_tail",
        SMOLLM2 | of_targets(METHODS, {16384: 2, 32768: 4}),
    ),
    (
        "RESULTS.md", "Figure 4, factor 4, passkey",
        "smollm2/figure4_{passkey,seed_1_passkey,seed_2_passkey}", SMOLLM2 | FIGURE_4,
    ),
    (
        "RESULTS.md", "Figure 4, factor 4, perplexity",
        "smollm2/figure4_{books_tail,seed_1_books_tail,seed_2_books_tail}", SMOLLM2 | FIGURE_4,
    ),
    (
        "RESULTS.md", "Table 2, perplexity", "smollm2/table2_books_tail",
        SMOLLM2 | of_targets(ROPES, {98304: 12, 131072: 16}),
    ),
    (
        "RESULTS.md", "Table 3", "smollm2/table3_benchmarks",
        SMOLLM2 | {
            "full-length, target 16,384": "full-2x",
            "PoSE, target 16,384": "pose-2x",
            "PoSE, target 131,072": "pose-16x",
        },
    ),
    (
        "RESULTS.md", "Table 4, perplexity", "smollm2/{table4_books_tail,table4_passkey}",
        {
            "text from anywhere behind (uniform)": "uniform",
            "right behind (zero)": "zero",
            "as far behind as the positions say (skip)": "skip",
        },
    ),
    ("RESULTS.md", "Table 5, passkey", "smollm2/table5_seeds_passkey", TABLE_5),
    ("RESULTS.md", "Table 5, perplexity", "smollm2/table5_seeds_books_tail", TABLE_5),
    ("RESULTS.md", "Figure 4 on", "tiny/{figure4_passkey,figure4_books_sliding}", TINY | FIGURE_4),
    (
        "RESULTS.md", "Table 5 on", "tiny/{table5_seeds_passkey,table5_seeds_books_sliding}",
        {row: TABLE_5[row] for row in ("1 chunk", "2 chunks", "RandPos")},
    ),
    (
        "results/LOG.md", "Table 1, linear", "tiny/table1_books_sliding",
        TINY | of_targets(METHODS, {512: 2, 1024: 4}),
    ),
    (
        "results/LOG.md", "Table 2, perplexity", "tiny/table2_books_sliding",
        TINY | of_targets(ROPES, {3072: 12, 4096: 16}),
    ),
    ("results/LOG.md", "Figure 4, target", "tiny/figure4_books_sliding", FIGURE_4),
    ("results/LOG.md", "Table 5, target", "tiny/table5_books_sliding", TABLE_5),
    (
        "results/LOG.md", "Table 2, sliding", "smollm2/table2_books_sliding",
        SMOLLM2 | of_targets(ROPES, {98304: 12, 131072: 16}),
    ),
]  # fmt: skip

# Tables whose rows have files of their own, of one model each where no other is named behind a blank.
ROWS_ARE_FILES = [
    (
        "README.md", "keys found, of 50",
        {
            "tiny as it was": "tiny/quick_start ^tiny$",
            "after train.py": "tiny/quick_start ^out/model$",
        },
    ),
    (
        "README.md", "tokens",
        {
            "one of four codes in a novel, untouched": "needle_base",
            "one of four codes, extended": "needle",
            "passkey, untouched": "{passkey_base,smollm2/figure4_passkey} smollm2-135m",
            "passkey, extended": "{passkey,passkey_far}",
            "perplexity of novels, untouched": "{tail_base_books,smollm2/table2_books_tail} smollm2-135m",
            "perplexity of novels, extended": "tail_books",
        },
    ),
    (
        "RESULTS.md", "needles",
        {
            "untouched": "needle_base",
            "extended": "needle",
            "the same, --seed 1": "seed_1/needle",
            "the same, --seed 2": "seed_2/needle",
            "episodes without skips: --method pi --retrieval 0.5": "no_skips/needle",
            "skips without episodes: --retrieval 0": "no_episodes/needle",
            "adapters alone: --lora_rank 16": "lora/needle",
            "YaRN by 16: --rope yarn": "yarn/needle",
            "linear by 16: --rope linear": "linear/{needle,needle_128k}",
            "on the standard library: no --data": "library_alone/needle",
        },
    ),
    ("RESULTS.md", "passkey", {"extended": "{passkey,passkey_far}"}),
    (
        "RESULTS.md", "RULER, mean",
        {"untouched": "ruler_base", "extended": "{ruler,ruler_64k,ruler_128k}"},
    ),
    (
        "RESULTS.md", "perplexity in a window of",
        {
            "novels: untouched": "{tail_base_books,smollm2/table2_books_tail} smollm2-135m",
            "novels: extended": "tail_books",
            "novels: --lora_rank 16": "lora/tail_books",
            "novels: --rope yarn": "yarn/tail_books",
            "novels: --rope linear": "linear/tail_books",
            "novels: no --data": "library_alone/tail_books",
            "LaTeX: untouched": "tail_base_latex",
            "LaTeX: extended": "tail_latex",
            "reports: untouched": "tail_base_gov",
            "reports: extended": "tail_gov",
        },
    ),
    (
        "RESULTS.md", "ordinary tasks",
        {
            "untouched": "benchmarks_base", "extended": "benchmarks",
            "the same, --seed 1": "seed_1/benchmarks",
        },
    ),
    (
        "results/LOG.md", "passkey at",
        {
            "untouched (20 prompts)": "passkey_untrained smollm2-135m",
            "YaRN, untrained (20 prompts)": "passkey_untrained untrained-yarn",
            "PoSE, NTK by 32 (50 prompts)": "first_passkey",
            "NTK by 64, windows of 8,192": "windows_8192/passkey",
            "NTK by 64, windows of 32,768": "factor_64/{passkey,passkey_256k}",
            "NTK by 96, 5e-5": "rate_5e-5/{passkey,passkey_256k}",
            "NTK by 96, 1e-4: that day's": "rate_1e-4/{passkey,passkey_256k}",
        },
    ),
    (
        "results/LOG.md", "perplexity in a window of",
        {
            f"{kind}: {run}": f"{folder}/tail_{file}"
            for kind, file in (("novels", "books"), ("LaTeX", "latex"), ("reports", "gov"))
            for run, folder in (
                ("NTK by 64, windows of 8,192", "windows_8192"),
                ("NTK by 64, windows of 32,768", "factor_64"),
                ("NTK by 96, 5e-5", "rate_5e-5"),
                ("NTK by 96, 1e-4", "rate_1e-4"),
            )
        } | {"novels: on the standard library, 5e-5": "standard_library/tail_books"},
    ),
    (
        "results/LOG.md", "needles",
        {
            "NTK by 64, windows of 32,768": "factor_64/needle",
            "NTK by 96, 5e-5": "rate_5e-5/needle",
            "NTK by 96, 1e-4": "rate_1e-4/needle",
        },
    ),
    (
        "results/LOG.md", "ordinary tasks",
        {
            "NTK by 64, windows of 32,768": "factor_64/benchmarks",
            "NTK by 96, 5e-5": "rate_5e-5/benchmarks",
            "NTK by 96, 1e-4": "rate_1e-4/benchmarks",
        },
    ),
    (
        "results/LOG.md", "run",
        {
            "2e-4": "rate_2e-4/{needle,tail_books,benchmarks}",
            "4e-4": "{needle,tail_books,benchmarks}",
            "4e-4, --seed 1": "seed_1/{needle,tail_books,benchmarks}",
            "4e-4, --seed 2": "seed_2/needle",
            "2e-4, denser episodes": "denser_episodes/{needle,tail_books}",
            "4e-4, episodes without skips": "no_skips/needle",
            "4e-4, skips without episodes": "no_episodes/needle",
            "2e-4, --target_len 262144": "target_262144/{needle,tail_books,benchmarks}",
        },
    ),
]  # fmt: skip
BENCHMARKS = {
    "BoolQ": "boolq", "PIQA": "piqa", "WinoGrande": "winogrande", "TruthfulQA": "truthfulqa_mc",
    "ARC-Challenge": "arc_challenge", "HellaSwag": "hellaswag",
}  # fmt: skip
# Files of four documents, of which the table has those that fill the longest window.
LONG_DOCUMENTS = {"tail_base_latex": 3, "tail_base_gov": 2}


def all_rows():
    """Return (document, table, row, files, regular expression of the model) of every row named above."""
    rows = []
    for document, table, files, models in ROWS_ARE_MODELS:
        rows += [(document, table, row, files, model) for row, model in models.items()]
    for document, table, sources in ROWS_ARE_FILES:
        for row, source in sources.items():
            files, _, model = source.partition(" ")
            rows.append((document, table, row, files, model))
    return rows


# ---------------------------------------------------------------- reading a table


def tables(document):
    """Yield the tables of a document, each a list of rows, the header first. A row is a list of cells,
    without the marks of bold and code."""
    text = read(document).replace("*", "").replace("`", "")
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = []
        for line in block.splitlines():
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        yield [rows[0], *rows[2:]]


def find_row(document, table, row):
    """Return the header and the cells of the one row of that name in the tables that begin like `table`."""
    found = []
    for header, *rows in tables(document):
        if header[0].startswith(table):
            found += [(header, cells) for cells in rows if cells[0] == row]
    assert len(found) == 1, f"{document} has {len(found)} rows {row!r} in tables that begin with {table!r}"
    return found[0]


def numbers(cell):
    """Return the numbers in a cell, as they are written."""
    return re.findall(r"\d[\d,]*(?:\.\d+)?", cell)


def lengths_in(header):
    """Return the lengths that the header of a column names: one as in 8,192, or several as in 2k, 8k, 32k."""
    thousands = re.findall(r"\b(\d+)k\b", header)
    if thousands:
        return [1024 * int(n) for n in thousands]
    return [int(n.replace(",", "")) for n in numbers(header)[-1:]]


def written_like(number, text):
    """Return a number in the form of a text: as many decimals, a half rounded up, commas if it has some."""
    decimals = len(text.partition(".")[2])
    comma = "," if "," in text else ""
    return f"{number + 1e-9:{comma}.{decimals}f}"


# ---------------------------------------------------------------- reading a file


def load(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def entries_of(files, model):
    """Return the entries of `results` of every model that fits, in all files."""
    entries = []
    for name in expand_braces(files):
        written = load(name)
        for report in (*written.get("compared", []), written):
            if re.search(model, report["model"]):
                entries += [cut(entry, LONG_DOCUMENTS.get(name)) for entry in report["results"]]
    return entries


def cut(entry, documents):
    """Return an entry with the perplexity of its first so many documents alone, the longest ones."""
    if documents is None:
        return entry
    chosen = entry["by_document"][:documents]
    nats, tokens = (sum(document[key] for document in chosen) for key in ("nats", "tokens"))
    return entry | {"ppl": math.exp(nats / tokens)}


def figure(entry):
    """Return what a table shows of an entry: its perplexity, or its share in percent."""
    if "ppl" in entry:
        return entry["ppl"]
    return 100 * entry.get("accuracy", entry.get("score"))


def check_cell(cell, entries):
    """Assert that a cell shows the mean of the entries, and behind it their spread, or, of a single one, its
    error, its number of prompts or its interval."""
    figures = [figure(entry) for entry in entries]
    main, *others = numbers(cell)
    if " to " in cell:
        expected = [min(figures), max(figures)]
    elif "±" in cell:
        expected = [entries[0]["standard_error"] * (100 if "%" in cell else 1)]
    elif "(of" in cell:
        expected = [entries[0]["trials"]]
    elif others:
        expected = [100 * bound for bound in entries[0]["interval"]]
    else:
        expected = []
    assert main == written_like(statistics.fmean(figures), main), f"{cell}: {figures}"
    for number, text in zip(expected, others, strict=True):
        assert text == written_like(number, text), f"{cell}: {expected}"


def check_changes(cell, before, after):
    """Assert that a cell shows by how much the loss of each document differs between two entries, in nats."""
    changes = []
    for first, second in zip(before["by_document"], after["by_document"], strict=True):
        change = second["nats"] / second["tokens"] - first["nats"] / first["tokens"]
        changes.append(f"{change:+.2f}".replace("-", "−"))
    assert cell.split() == changes


def check_column(header, cell, entries):
    """Assert that the cell of a column is what the entries say."""
    if header.startswith("change from 8,192 to 131,072"):
        by_length = {entry["length"]: entry for entry in entries}
        return check_changes(cell, by_length[8192], by_length[131072])
    if header == "average":
        scores = [entry["score"] for entry in entries if "benchmark" in entry]
        return check_cell(cell, [{"score": statistics.fmean(scores)}])
    if header in BENCHMARKS:
        return check_cell(cell, [entry for entry in entries if entry["benchmark"] == BENCHMARKS[header]])
    lengths = lengths_in(header)
    parts = re.split(" / |, ", cell) if len(lengths) > 1 else [cell]
    measures = {"accuracy", "score"} if "%" in cell else {"ppl"}
    for length, part in zip(lengths, parts, strict=True):
        fitting = [entry for entry in entries if measures & entry.keys() and entry.get("length") == length]
        check_cell(part, fitting)


@pytest.mark.parametrize("document, table, row, files, model", all_rows())
def test_tables_show_what_the_files_say(document, table, row, files, model):
    header, cells = find_row(document, table, row)
    entries, compared = entries_of(files, model), 0
    for column, cell in zip(header[1:], cells[1:], strict=True):
        if re.match(r"[−+\d]", cell):
            check_column(column, cell, entries)
            compared += 1
    assert compared > 0
    for name in expand_braces(files):
        assert f"results/{name}.json" in cited_paths()


def test_scores_by_task_of_ruler():
    columns = (
        ("niah_single_1", "niah_single_2", "niah_single_3"),
        ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
        ("niah_multivalue",), ("niah_multiquery",), ("vt",), ("cwe",), ("fwe",),
    )  # fmt: skip
    for entry in [entry for name in ("ruler", "ruler_64k", "ruler_128k") for entry in load(name)["results"]]:
        _, cells = find_row("RESULTS.md", "RULER by task", f"{entry['length']:,}")
        for cell, tasks in zip(cells[1:], columns, strict=True):
            scores = [100 * entry["by_task"][task]["score"] for task in tasks]
            assert cell == ", ".join(written_like(score, "1") for score in scores)


# ---------------------------------------------------------------- speed and memory

SPEEDS = [
    ("README.md", "LLaMA-7B", "a card of 24 GB", "train_7b_lora_4096"),
    ("README.md", "LLaMA-7B", "a card of 80 GB", "train_7b_lora_2048_none"),
    ("README.md", "LLaMA-7B", "the same, all weights", "train_7b_whole"),
    ("README.md", "LLaMA-7B", "the same, float8", "train_7b_whole_float8"),
    ("README.md", "LLaMA-7B", "four H100s, float32 weights", "train_7b_four_gpus"),
    ("README.md", "window 2,048", "SmolLM2, 16 windows", "train_{smollm2_peers,smollm2_peers_slow_host}"),
    ("README.md", "window 2,048", "8 of LLaMA-7B's 32 layers, 8 windows", "train_7b_peers"),
    ("README.md", "window 2,048", "the same, --float8", "train_7b_float8"),
    ("RESULTS.md", "one H200", "SmolLM2, micro-batch 16", "train_smollm2_peers"),
    ("RESULTS.md", "one H200", "the same, another host", "train_smollm2_peers_slow_host"),
    ("RESULTS.md", "one H200", "LLaMA-7B, 8 of 32 layers, micro-batch 8", "train_7b_peers"),
    ("RESULTS.md", "one H200", "its 8 layers, --float8", "train_7b_float8"),
    ("RESULTS.md", "one H200", "LLaMA-7B, bfloat16 weights, full, micro-batch 8", "train_7b_whole"),
    ("RESULTS.md", "one H200", "LLaMA-7B, likewise, --float8", "train_7b_whole_float8"),
    ("RESULTS.md", "one H200", "LLaMA-7B, LoRA of rank 16, full, micro-batch 8", "train_7b_lora_2048"),
    ("RESULTS.md", "one H200", "LLaMA-7B, LoRA of rank 16, micro-batch 4", "train_7b_lora_2048_none"),
    ("RESULTS.md", "one H200", "LLaMA-7B, LoRA likewise, --float8", "train_7b_lora_float8"),
    ("RESULTS.md", "LLaMA-7B on one", "LoRA of rank 16, full, window 4,096", "train_7b_lora_4096"),
    ("RESULTS.md", "LLaMA-7B on one", "the same, window 8,192", "train_7b_lora_8192"),
    (
        "RESULTS.md",
        "LLaMA-7B on one",
        "all weights, bfloat16, full, window 4,096",
        "train_7b_whole_4096",
    ),
    ("RESULTS.md", "LLaMA-7B on one", "LoRA of rank 16, window 4,096", "train_7b_lora_none"),
    ("RESULTS.md", "LLaMA-7B on one", "all weights, bfloat16, window 4,096", "train_7b_whole_none"),
    (
        "RESULTS.md",
        "several H100",
        "two: LLaMA-7B, float32 weights, full, micro-batch 8",
        "train_7b_two_gpus",
    ),
    ("RESULTS.md", "several H100", "four: the same", "train_7b_four_gpus"),
    ("RESULTS.md", "several H100", "two: 8 of its layers, float32, full, --cpu_offload", "train_7b_offload"),
    (
        "RESULTS.md",
        "several H100",
        "four: SmolLM2, window 8,192, micro-batch 8",
        "train_smollm2_four_gpus",
    ),
    (
        "RESULTS.md",
        "several H100",
        "two: SmolLM2, window 2,048, micro-batch 16",
        "train_smollm2_two_gpus",
    ),
]


def rounded(number, digits=3):
    """Return a number as a text with so many digits that count, as in 67,700."""
    return f"{float(f'{number:.{digits}g}'):,.0f}"


def span(figures, written):
    """Return what a cell shows of the figures of several runs, the least and the most: `1.17-1.42`."""
    return "-".join(dict.fromkeys([written(min(figures)), written(max(figures))]))


@pytest.mark.parametrize("document, table, row, files", SPEEDS)
def test_speed_and_memory_are_those_of_the_files(document, table, row, files):
    header, cells = find_row(document, table, row)
    runs = []
    for file in expand_braces(files):
        runs.append({result.get("side", "ours"): result for result in load(file)["results"]})
    measured = runs[0]
    digits = 2 if files == "train_7b_offload" else 3  # its two steps took 2.3 and 3.0 s

    def speed(side):
        return span([run[side]["tokens_per_second"] for run in runs], lambda x: rounded(x, digits))

    def memory(side):
        return f"{measured[side]['peak_memory_gib']:.1f} GiB"

    for column, cell in zip(header, cells):
        if column.startswith("tokens a second"):
            assert cell == speed("ours")
        elif column.startswith("memory"):
            assert cell.startswith(memory("ours"))
        elif column == "MFU" and cell:
            assert cell == f"{100 * measured['ours']['mfu']:.0f}%"
        elif column.lower() in measured:
            assert cell in (speed(column.lower()), f"{speed(column.lower())}, {memory(column.lower())}")


def test_hours_follow_from_the_speeds():
    tokens = 1000 * 64 * 2048  # steps, windows, tokens in each: the paper's defaults for LLaMA-7B
    speed = 0
    rows = {
        "a card of 24 GB": 1,
        "a card of 80 GB": 1,
        "the same, all weights": 1,
        "the same, float8": 1,
        "four H100s, float32 weights": 4,
        "eight, likewise": 8,
    }
    for row, cards in rows.items():
        _, cells = find_row("README.md", "LLaMA-7B", row)
        if cells[2] == "not measured":
            assert "if as fast" in cells[3]  # as the row before
        else:
            speed = int(cells[2].replace(",", ""))
        assert cells[3].startswith(f"{tokens / (cards * speed) / 3600:.1f}")


def test_costs_of_a_step_by_target():
    measured = {(r["method"], r["target_len"]): r for r in load("efficiency")["results"]}
    for method, label in (("full", "full-length"), ("pose", "PoSE")):
        for key, what in (("step_seconds", "seconds a step"), ("peak_memory_gib", "memory, GiB")):
            header, cells = find_row("RESULTS.md", "target", f"{label}: {what}")
            for column, cell in zip(header[1:], cells[1:], strict=True):
                figure = measured[method, lengths_in(column)[0]][key]
                if figure is None:
                    assert cell in ("out of memory", "")
                else:
                    assert cell == written_like(figure, cell)


@pytest.mark.parametrize(
    "row, files",
    [
        ("SmolLM2, 16 windows", "train_{smollm2_peers,smollm2_peers_slow_host}"),
        ("8 of LLaMA-7B's 32 layers, 8 windows", "train_7b_peers"),
        ("the same, --float8", "train_7b_float8"),
    ],
)
def test_times_the_fastest_peer(row, files):
    times = []
    for file in expand_braces(files):
        ours, *peers = (entry["tokens_per_second"] for entry in load(file)["results"])
        times.append(ours / max(peers))
    header, cells = find_row("README.md", "window 2,048", row)
    assert cells[header.index("times the faster peer")] == span(times, lambda x: f"{x:.2f}")
    said = " and ".join(f"{x:.2f}" for x in times)
    assert f"{said} times" in " ".join(read("RESULTS.md").split())


def losses(run):
    """Return the loss of every step of a run."""
    return [json.loads(line)["loss"] for line in read(f"results/{run}_metrics.jsonl").splitlines()]


def farthest(run, other):
    """Return the largest difference of the losses of two runs in the same step, as a document has it."""
    return f"{max(abs(a - b) for a, b in zip(losses(run), losses(other), strict=True)):.3f}"


def test_losses_of_the_runs_with_seed_0():
    results = " ".join(read("RESULTS.md").split())
    assert f"has one GPU's losses to {farthest('two_gpus/train', 'train')} in each of 300 steps" in results
    of_last = max(farthest("last_train", run) for run in ("train", "again_train"))
    assert f"its losses are these two runs' to {of_last}" in results


def test_quality_after_float8():
    bfloat16, float8 = (
        [entry["ppl"] for entry in load(name)["results"]] for name in ("tail_books", "float8/tail_books")
    )
    more = [100 * (b / a - 1) for a, b in zip(bfloat16, float8, strict=True)]
    *_, near = load("float8/needle")["results"]
    (far,) = load("float8/needle_128k")["results"]
    found = round(far["accuracy"] * far["trials"])
    sentences = (
        f"{100 * near['accuracy']:.0f}% of codes are found at {near['length']:,}",
        f"{found} of {far['trials']} at {far['length']:,}, and every passkey",
        f"{min(more):.1f} to {max(more):.1f}% higher",
    )
    results = " ".join(read("RESULTS.md").split())
    assert [sentence for sentence in sentences if sentence not in results] == []
    keys = load("float8/passkey")["results"] + load("float8/passkey_128k")["results"]
    assert all(entry["accuracy"] == 1 for entry in keys)


def test_a_million_tokens():
    entries = [
        entry for name in ("passkey", "passkey_seed_1") for entry in load(f"target_1048576/{name}")["results"]
    ]
    found = [trial["correct"] for entry in entries for trial in entry["by_trial"] if entry["length"] == 2**20]
    assert f"{sum(found)} of {len(found)} passkeys" in " ".join(read("README.md").split())
    lines = (ROOT / "results" / "target_1048576" / "train_metrics.jsonl").read_text().splitlines()
    seconds = sum(4 * 32768 / json.loads(line)["tokens_per_second"] for line in lines)
    assert f"{sum(found)} of {len(found)} passkeys (72-100) at 1,048,576" in read("RESULTS.md")
    assert f"{seconds:.0f} s in steps), 128 times" in read("RESULTS.md")


# ---------------------------------------------------------------- loaders

QUERIES = "scaled queries"
LOADERS = {  # the rows of GUIDE.md's table: the cases of results/loaders.json
    "default, linear, ntk, llama3": [f"llama: {mode}" for mode in ("default", "linear", "ntk", "llama3")],
    "yarn": ["llama: yarn", "llama: yarn, factor 16"],
    "yarn with --beta_fast 8, as tiny has it": [
        f"llama: yarn, {more}" for more in ("beta_fast 8", "factor 16, beta_fast 8")
    ],
    "ntk_by_parts": ["llama: ntk_by_parts"],
    "yarn_revised, or on top of another scaling": ["llama: yarn_revised", "llama: yarn on linear"],
    "dynamic": ["llama: dynamic"],
    "scaled queries: default, ntk, yarn, ntk_by_parts": [
        f"{QUERIES}: {mode}" for mode in ("default", "ntk", "ntk on ntk", "yarn", "ntk_by_parts")
    ] + [f"{QUERIES}: yarn, {more}" for more in ("beta_fast 8", "factor 16", "factor 16, beta_fast 8")],
    "scaled queries: linear, llama3": [f"{QUERIES}: linear", f"{QUERIES}: llama3"],
}  # fmt: skip


@pytest.mark.parametrize("row", LOADERS)
def test_table_of_loaders(row):
    measured = load("loaders")
    header, cells = find_row("GUIDE.md", "interpolation, as LLaMA", row)
    assert len(header) == 1 + len(measured["versions"])
    for column, cell in zip(header[1:], cells[1:]):
        (loader,) = (name for name in measured["versions"] if column.lower().startswith(name))
        for case in LOADERS[row]:
            assert measured["cases"][case][loader]["verdict"] == cell, (column, case)
    assert measured["date"] in read("GUIDE.md")


# ---------------------------------------------------------------- sentences


def test_sentences_of_the_readme():
    steps = {r["method"]: r for r in load("efficiency")["results"] if r["target_len"] == 131072}
    pose, full = steps["pose"], steps["full"]
    before, after = (
        statistics.fmean(map(figure, load(name)["results"])) for name in ("benchmarks_base", "benchmarks")
    )
    before_5, after_5 = (
        statistics.fmean(figure(entry) for entry in load(name)["results"] if entry["benchmark"] != "boolq")
        for name in ("benchmarks_base", "benchmarks")
    )
    base, far = load("ruler_base")["results"][0], load("ruler_128k")["results"][0]
    chains, words, frequent, *alike = (
        100 * far["by_task"][task]["score"]
        for task in ("vt", "cwe", "fwe", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3")
    )
    seeds = {n: figure(load(f"seed_{n}/needle")["results"][-1]) for n in (1, 2)}
    no_skips, no_episodes = (load(f"{name}/needle")["results"][-1] for name in ("no_skips", "no_episodes"))
    first_fifth = [trial["correct"] for trial in no_skips["by_trial"] if trial["depth"] < 0.2]
    assert (len(first_fifth), sum(first_fifth)) == (20, 1)
    sentences = (
        f"takes {pose['step_seconds']:.2f} s and {pose['peak_memory_gib']:.1f} GiB",
        f"at full length {full['step_seconds']:.1f} s and {full['peak_memory_gib']:.1f} GiB",
        f"solves {figure(far):.0f}% at 131,072 tokens; the untouched model solves {figure(base):.0f}%",
        f"rise from {before:.1f}% to {after:.1f}% on average",
        f"without BoolQ from {before_5:.1f}% to {after_5:.1f}%",
        f"(RULER's multikey, {min(alike):.0f}-{max(alike):.0f}%), chains of variables ({chains:.0f}%)",
        f"counting ({words:.0f}-{frequent:.0f}%)",
        f"second seed finds {seeds[1]:.0f}% of the codes at 131,072, a third {seeds[2]:.0f}%",
        f"finds {figure(no_skips):.0f}% of the codes at 131,072, and one of 20 in the first fifth",
        f"Skips without episodes find {figure(no_episodes):.0f}%",
    )
    readme = " ".join(read("README.md").split())
    assert [sentence for sentence in sentences if sentence not in readme] == []
