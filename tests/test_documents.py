"""The documents: their length, their links, the commands they name, and their figures against the JSON files in results/."""
import argparse
import importlib
import importlib.util
import json
import math
import re
import shlex
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORD_LIMITS = {"README.md": 1600, "GUIDE.md": 2500, "RESULTS.md": 4500, "CONTRIBUTING.md": 500}
DOCUMENTS = (*WORD_LIMITS, "results/LOG.md")


def read(document):
    return (ROOT / document).read_text(encoding="utf-8")


@pytest.mark.parametrize("document, limit", WORD_LIMITS.items())
def test_documents_stay_short(document, limit):
    assert len(read(document).split()) <= limit


# ---------------------------------------------------------------- links and cited files


def anchors(document):
    """Return the anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", read(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_relative_link_points_to_something(document):
    targets = re.findall(r"\]\(([^)\s]+)\)", read(document)) + re.findall(r'src="([^"]+)"', read(document))
    for target in targets:
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (ROOT / document).parent / path if path else ROOT / document
        assert linked.exists(), f"{document} links to {target}"
        if anchor:
            assert anchor in anchors(linked.relative_to(ROOT)), f"{document} links to {target}"


def test_every_picture_is_shown():
    shown = set()
    for document in DOCUMENTS:
        shown |= set(re.findall(r"!\[[^]]*\]\((assets/[^)]+)\)", read(document)))
    assert shown == {f"assets/{path.name}" for path in (ROOT / "assets").glob("*.png")}


def expand_braces(text):
    """Return the paths that a citation stands for: `a/{b,c}.json` is a/b.json and a/c.json."""
    before, brace, rest = text.partition("{")
    if not brace:
        return [text]
    inside, _, after = rest.partition("}")
    return [before + name + after for name in inside.split(",")]


def cited_paths():
    """Return {path under results/: a document that cites it}."""
    cited = {}
    for document in DOCUMENTS:
        for citation in re.findall(r"`(results/[^`]*)`", read(document)):
            for path in expand_braces(citation):
                cited[path] = document
    return cited


def test_every_cited_result_exists():
    for path, document in cited_paths().items():
        assert (ROOT / path).exists(), f"{document} cites {path}"


def test_every_result_is_cited():
    cited = cited_paths()
    files = [path for path in (ROOT / "results").rglob("*") if path.is_file() and path.name != "LOG.md"]
    assert [str(path.relative_to(ROOT)) for path in files if path.relative_to(ROOT).as_posix() not in cited] == []


# ---------------------------------------------------------------- commands


def commands(document):
    """Return the words of each python or torchrun command in a document's shell blocks and in its inline code."""
    text = read(document)
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose)]
    found = []
    for line in "\n".join((*blocks, *inline)).replace("\\\n", " ").splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            if words and words[0] in ("python", "torchrun"):
                found.append(words)
    return found


class ParserFound(BaseException):
    """Carries the argparse parser of a script out of its main function."""


@pytest.fixture
def parser_of(monkeypatch):
    """parser_of("train.py") -> the argument parser that the script makes, caught before it parses anything."""

    def catch(parser, *args, **kwargs):
        raise ParserFound(parser)

    def find(script):
        if script.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [script])
        with monkeypatch.context() as patched, pytest.raises(ParserFound) as caught:
            patched.setattr(argparse.ArgumentParser, "parse_known_args", catch)
            module.main()
        return caught.value.args[0]

    return find


def check_options(parser, words):
    """Assert that a parser knows every `--option` among the words, and its value where it has choices."""
    subparsers = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if subparsers and words[0] in subparsers[0].choices:
        return check_options(subparsers[0].choices[words[0]], words[1:])
    for word, following in zip(words, (*words[1:], None)):
        if not word.startswith("--"):
            continue
        option, _, value = word.partition("=")
        assert option in parser._option_string_actions, f"{option} is unknown in {' '.join(words)}"
        action = parser._option_string_actions[option]
        if action.choices and action.nargs is None:
            assert (value or following) in map(str, action.choices), f"{option} {value or following}"


def test_every_command_uses_options_that_exist(parser_of):
    from torch.distributed.run import get_args_parser

    parsers, checked = {}, 0
    for document in WORD_LIMITS:
        for program, *words in commands(document):
            if program == "torchrun":
                at = next((i for i, word in enumerate(words) if word.endswith(".py")), len(words))
                check_options(get_args_parser(), words[:at])
                if at == len(words):  # the name of an option in a sentence
                    continue
                words = words[at:]
            elif words[0] == "-m":
                words = words[1:]
            script, *words = words
            if script == "pytest":
                continue
            assert script.endswith(".py") or "." in script, f"{document}: {script}"
            if script not in parsers:
                parsers[script] = parser_of(script)
            check_options(parsers[script], words)
            checked += 1
    assert checked > 30 and {"train.py", "eval.py", "bench.py", "reproduce.py"} <= set(parsers)


# ---------------------------------------------------------------- figures

# (document, beginning of the table's first header cell, {row: (files in results/, expression for the model's folder)}). A row with
# several models or files shows their mean. "first 3": of the first three documents of each entry alone.
UNTOUCHED, ANY = "^smollm2-135m$", "."
FIGURES = [
    (
        "README.md", "tokens",
        {
            "keys found, untouched": ("{passkey_base,smollm2/figure4_passkey}", UNTOUCHED),
            "keys found, extended": ("passkey", ANY),
            "novels, untouched": ("{tail_base_books,smollm2/table2_books_tail}", UNTOUCHED),
            "novels, extended": ("tail_books", ANY),
            "LaTeX, extended": ("tail_latex", ANY),
            "reports, extended": ("tail_gov", ANY),
        },
    ),
    (
        "RESULTS.md", "passkey at",
        {
            "untouched": ("{passkey_base,smollm2/figure4_passkey}", UNTOUCHED),
            "extended": ("{passkey,passkey_256k}", ANY),
            "on the standard library, --lr 5e-5": ("standard_library/passkey", ANY),
        },
    ),
    (
        "RESULTS.md", "perplexity in a window of",
        {
            "novels: untouched": ("{tail_base_books,smollm2/table2_books_tail}", UNTOUCHED),
            "novels: extended": ("tail_books", ANY),
            "novels: on the standard library": ("standard_library/tail_books", ANY),
            "LaTeX: untouched": ("tail_base_latex", "first 3"),
            "LaTeX: extended": ("tail_latex", ANY),
            "LaTeX: on the standard library": ("standard_library/tail_latex", ANY),
            "reports: untouched": ("tail_base_gov", "first 2"),
            "reports: extended": ("tail_gov", ANY),
            "reports: on the standard library": ("standard_library/tail_gov", ANY),
        },
    ),
    (
        "RESULTS.md", "sliding perplexity at",
        {
            "novels": ("sliding_books", ANY),
            "LaTeX": ("sliding_latex", ANY),
            "reports": ("sliding_gov", ANY),
        },
    ),
    (
        "RESULTS.md", "needles, one of 4",
        {"untouched (100 prompts)": ("needle_base", ANY), "extended (40 prompts)": ("needle", ANY)},
    ),
    (
        "RESULTS.md", "ordinary tasks",
        {"untouched": ("benchmarks_base", ANY), "extended": ("benchmarks", ANY)},
    ),
    (
        "RESULTS.md", "run",
        {
            "NTK by 96 at 5e-5": ("rate_5e-5/{passkey,tail_books}", ANY),
            "--overshoot 2": ("factor_96_overshoot_2/{passkey,tail_books}", ANY),
            "--seed 1": ("rate_5e-5_seed_1/{passkey,tail_books}", ANY),
            "--steps 300": ("rate_5e-5_steps_300/{passkey,tail_books}", ANY),
            "--lr 1e-4": ("{passkey,tail_books}", ANY),
            "NTK by 80": ("factor_80_rate_5e-5/{passkey,tail_books}", ANY),
        },
    ),
    (
        "RESULTS.md", "Table 1, linear",
        {
            "none": ("smollm2/table1_seeds_books_tail", UNTOUCHED),
            "full-length, target 16,384": ("smollm2/table1_seeds_books_tail", "full-2x"),
            "RandPos, target 16,384": ("smollm2/table1_seeds_books_tail", "randpos-2x"),
            "plain short windows, target 16,384": ("smollm2/table1_seeds_books_tail", "pi-2x"),
            "PoSE, target 16,384": ("smollm2/table1_seeds_books_tail", "pose-2x"),
            "full-length, target 32,768": ("smollm2/table1_seeds_books_tail", "full-4x"),
            "RandPos, target 32,768": ("smollm2/table1_seeds_books_tail", "randpos-4x"),
            "plain short windows, target 32,768": ("smollm2/table1_seeds_books_tail", "pi-4x"),
            "PoSE, target 32,768": ("smollm2/table1_seeds_books_tail", "pose-4x"),
        },
    ),
    (
        "RESULTS.md", "Figure 4, factor 4, passkey",
        {
            "none": ("smollm2/figure4_passkey", UNTOUCHED),
            "linear": ("smollm2/{figure4_passkey,figure4_seed_1_passkey,figure4_seed_2_passkey}", "linear"),
            "NTK": ("smollm2/{figure4_passkey,figure4_seed_1_passkey,figure4_seed_2_passkey}", "ntk"),
            "YaRN": ("smollm2/{figure4_passkey,figure4_seed_1_passkey,figure4_seed_2_passkey}", "yarn-"),
            "YaRN, the official code's form": (
                "smollm2/{figure4_passkey,figure4_seed_1_passkey,figure4_seed_2_passkey}", "yarn_revised",
            ),
            "Llama 3's": ("smollm2/{figure4_passkey,figure4_seed_1_passkey,figure4_seed_2_passkey}", "llama3"),
        },
    ),
    (
        "RESULTS.md", "Figure 4, factor 4, perplexity",
        {
            "none": ("smollm2/figure4_books_tail", UNTOUCHED),
            "linear": ("smollm2/{figure4_books_tail,figure4_seed_1_books_tail,figure4_seed_2_books_tail}", "linear"),
            "NTK": ("smollm2/{figure4_books_tail,figure4_seed_1_books_tail,figure4_seed_2_books_tail}", "ntk"),
            "YaRN": ("smollm2/{figure4_books_tail,figure4_seed_1_books_tail,figure4_seed_2_books_tail}", "yarn-"),
            "YaRN, the official code's form": (
                "smollm2/{figure4_books_tail,figure4_seed_1_books_tail,figure4_seed_2_books_tail}", "yarn_revised",
            ),
            "Llama 3's": ("smollm2/{figure4_books_tail,figure4_seed_1_books_tail,figure4_seed_2_books_tail}", "llama3"),
        },
    ),
    (
        "RESULTS.md", "Table 2, perplexity",
        {
            "none": ("smollm2/table2_books_tail", UNTOUCHED),
            "linear, target 98,304": ("smollm2/table2_books_tail", "linear-12x"),
            "NTK, target 98,304": ("smollm2/table2_books_tail", "ntk-12x"),
            "YaRN, target 98,304": ("smollm2/table2_books_tail", "yarn-12x"),
            "linear, target 131,072": ("smollm2/table2_books_tail", "linear-16x"),
            "NTK, target 131,072": ("smollm2/table2_books_tail", "ntk-16x"),
            "YaRN, target 131,072": ("smollm2/table2_books_tail", "yarn-16x"),
        },
    ),
    (
        "RESULTS.md", "Table 3",
        {
            "none": ("smollm2/table3_benchmarks", UNTOUCHED),
            "full-length, target 16,384": ("smollm2/table3_benchmarks", "full-2x"),
            "PoSE, target 16,384": ("smollm2/table3_benchmarks", "pose-2x"),
            "PoSE, target 131,072": ("smollm2/table3_benchmarks", "pose-16x"),
        },
    ),
    (
        "RESULTS.md", "Table 4, perplexity",
        {
            "text from anywhere behind (uniform)": ("smollm2/{table4_books_tail,table4_passkey}", "uniform"),
            "right behind (zero)": ("smollm2/{table4_books_tail,table4_passkey}", "zero"),
            "as far behind as the positions say (skip)": ("smollm2/{table4_books_tail,table4_passkey}", "skip"),
        },
    ),
    (
        "RESULTS.md", "Table 5, passkey",
        {
            "1 chunk": ("smollm2/table5_seeds_passkey", "1-chunk-"),
            "2 chunks": ("smollm2/table5_seeds_passkey", "2-chunks"),
            "3 chunks": ("smollm2/table5_seeds_passkey", "3-chunks"),
            "8 chunks": ("smollm2/table5_seeds_passkey", "8-chunks"),
            "RandPos": ("smollm2/table5_seeds_passkey", "randpos"),
        },
    ),
    (
        "RESULTS.md", "Table 5, perplexity",
        {
            "1 chunk": ("smollm2/table5_seeds_books_tail", "1-chunk-"),
            "2 chunks": ("smollm2/table5_seeds_books_tail", "2-chunks"),
            "3 chunks": ("smollm2/table5_seeds_books_tail", "3-chunks"),
            "8 chunks": ("smollm2/table5_seeds_books_tail", "8-chunks"),
            "RandPos": ("smollm2/table5_seeds_books_tail", "randpos"),
        },
    ),
    (
        "RESULTS.md", "Figure 4 on",
        {
            "none": ("tiny/{figure4_passkey,figure4_books_sliding}", "^tiny$"),
            "linear": ("tiny/{figure4_passkey,figure4_books_sliding}", "linear"),
            "NTK": ("tiny/{figure4_passkey,figure4_books_sliding}", "ntk"),
            "YaRN": ("tiny/{figure4_passkey,figure4_books_sliding}", "yarn-"),
            "YaRN, the official code's form": ("tiny/{figure4_passkey,figure4_books_sliding}", "yarn_revised"),
            "Llama 3's": ("tiny/{figure4_passkey,figure4_books_sliding}", "llama3"),
        },
    ),
    (
        "RESULTS.md", "Table 5 on",
        {
            "1 chunk": ("tiny/{table5_seeds_passkey,table5_seeds_books_sliding}", "1-chunk-"),
            "2 chunks": ("tiny/{table5_seeds_passkey,table5_seeds_books_sliding}", "2-chunks"),
            "RandPos": ("tiny/{table5_seeds_passkey,table5_seeds_books_sliding}", "randpos"),
        },
    ),
    (
        "results/LOG.md", "passkey at",
        {
            "untouched (20 prompts)": ("passkey_untrained", UNTOUCHED),
            "YaRN, untrained (20 prompts)": ("passkey_untrained", "untrained-yarn"),
            "PoSE, NTK by 32 (50 prompts)": ("first_passkey", ANY),
            "NTK by 64, windows of 8,192": ("windows_8192/passkey", ANY),
            "NTK by 64, windows of 32,768": ("factor_64/{passkey,passkey_256k}", ANY),
            "NTK by 96, 5e-5": ("rate_5e-5/{passkey,passkey_256k}", ANY),
            "NTK by 96, 1e-4: today's": ("{passkey,passkey_256k}", ANY),
        },
    ),
    (
        "results/LOG.md", "perplexity in a window of",
        {
            "novels: NTK by 64, windows of 8,192": ("windows_8192/tail_books", ANY),
            "novels: NTK by 64, windows of 32,768": ("factor_64/tail_books", ANY),
            "novels: NTK by 96, 5e-5": ("rate_5e-5/tail_books", ANY),
            "LaTeX: NTK by 64, windows of 8,192": ("windows_8192/tail_latex", ANY),
            "LaTeX: NTK by 64, windows of 32,768": ("factor_64/tail_latex", ANY),
            "LaTeX: NTK by 96, 5e-5": ("rate_5e-5/tail_latex", ANY),
            "reports: NTK by 64, windows of 8,192": ("windows_8192/tail_gov", ANY),
            "reports: NTK by 64, windows of 32,768": ("factor_64/tail_gov", ANY),
            "reports: NTK by 96, 5e-5": ("rate_5e-5/tail_gov", ANY),
        },
    ),
]  # fmt: skip
BENCHMARKS = {
    "BoolQ": "boolq", "PIQA": "piqa", "WinoGrande": "winogrande", "TruthfulQA": "truthfulqa_mc", "ARC-Challenge": "arc_challenge",
    "HellaSwag": "hellaswag",
}  # fmt: skip


def tables(document):
    """Yield the tables of a document, each a list of rows of cells, the header first, without bold and code marks."""
    for lines in re.findall(r"(?:^\|.*\n)+", read(document), re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.replace("*", "").replace("`", "").splitlines()]
        yield [rows[0], *rows[2:]]


def table_rows(document, table, row):
    """Return the (header, cells) of every such row in the tables whose first header cell begins with `table`."""
    fitting = [rows for rows in tables(document) if rows[0][0].startswith(table)]
    return [(rows[0], cells) for rows in fitting for cells in rows[1:] if cells[0] == row]


def results_of(files, model):
    """Return the entries of `results` of all models that fit, from all files: a list of (file, entry)."""
    entries = []
    for name in expand_braces(files):
        written = json.loads((ROOT / "results" / f"{name}.json").read_text())
        for report in (*written.get("compared", []), written):
            if model.startswith("first ") or re.search(model, report["model"]):
                entries += [(name, entry) for entry in report["results"]]
    return entries


def value(entry, documents):
    """Return the figure of an entry: a perplexity, or a share in percent. documents: of the first so many alone, if not None."""
    if "ppl" in entry and documents:
        chosen = entry["by_document"][:documents]
        return math.exp(sum(d["nats"] for d in chosen) / sum(d["tokens"] for d in chosen))
    return entry["ppl"] if "ppl" in entry else 100 * entry.get("accuracy", entry.get("score"))


def lengths_in(header):
    """Return the lengths that a column's header names: 8,192 or 2k, 8k, 32k."""
    thousands = re.findall(r"\b(\d+)k\b", header)
    if thousands:
        return [1024 * int(n) for n in thousands]
    return [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", header)][-1:]


def shown(number, text):
    """Return a number in the form of a text: as many decimals, a half rounded up, thousands separated or not."""
    number += 1e-9
    decimals = len(text.partition(".")[2])
    return f"{number:,.{decimals}f}" if "," in text else f"{number:.{decimals}f}"


def check_cell(cell, entries, documents):
    """Assert that a cell shows the mean of the entries, and behind it their interval, spread, error or number of prompts."""
    values = [value(entry, documents) for entry in entries]
    main, *others = re.findall(r"\d[\d,]*(?:\.\d+)?", cell)
    assert main == shown(statistics.fmean(values), main), f"{cell}: {values}"
    expected = []
    if " to " in cell:
        expected = [min(values), max(values)]
    elif "±" in cell:
        expected = [entries[0]["standard_error"]]
    elif "(of" in cell:
        expected = [entries[0]["trials"]]
    elif "-" in cell:
        expected = [100 * bound for bound in entries[0]["interval"]]
    assert others == [shown(number, text) for number, text in zip(expected, others, strict=True)], f"{cell}: {expected}"


def check_row(header, cells, files, model):
    """Assert that the cells of a row are what the files say. Return how many figures were compared."""
    documents = int(model.removeprefix("first ")) if model.startswith("first ") else None
    entries, compared = results_of(files, model), 0
    for column, cell in zip(header[1:], cells[1:], strict=True):
        if not re.match(r"\d", cell):
            continue
        if column == "average":
            assert cell == shown(statistics.fmean(value(entry, None) for _, entry in entries), cell)
            compared += 1
            continue
        if column in BENCHMARKS:
            check_cell(cell, [entry for _, entry in entries if entry["benchmark"] == BENCHMARKS[column]], None)
            compared += 1
            continue
        lengths = lengths_in(column)
        pieces = re.split(" / |, ", cell) if len(lengths) > 1 else [cell]
        kind = "accuracy" if "%" in cell else "ppl"
        for length, piece in zip(lengths, pieces, strict=True):
            check_cell(piece, [entry for _, entry in entries if entry["length"] == length and kind in entry], documents)
            compared += 1
    return compared


ROWS = [(document, table, row, *source) for document, table, rows in FIGURES for row, source in rows.items()]


@pytest.mark.parametrize("document, table, row, files, model", ROWS)
def test_figures_are_those_of_the_files(document, table, row, files, model):
    found = table_rows(document, table, row)
    assert len(found) == 1, f"{document} has {len(found)} rows {row!r} in tables that begin with {table!r}"
    assert check_row(*found[0], files, model) > 0
    for name in expand_braces(files):
        assert f"results/{name}.json" in cited_paths()


# (document, beginning of the table's first header cell, row, column, file, key of its first result)
SPEEDS = [
    ("README.md", "LLaMA-7B on", "four, float32 weights", "tokens a second, each", "train_7b_four_gpus", "tokens_per_second"),
    ("README.md", "LLaMA-7B on", "four, float32 weights", "memory of each", "train_7b_four_gpus", "peak_memory_gib"),
    ("RESULTS.md", "several H100", "two: the same, float32 weights", "tokens a second", "train_7b_two_gpus", "tokens_per_second"),
    ("RESULTS.md", "several H100", "two: the same, float32 weights", "memory", "train_7b_two_gpus", "peak_memory_gib"),
    ("RESULTS.md", "several H100", "four: the same, float32 weights", "tokens a second", "train_7b_four_gpus", "tokens_per_second"),
    ("RESULTS.md", "several H100", "four: the same, float32 weights", "memory", "train_7b_four_gpus", "peak_memory_gib"),
    ("RESULTS.md", "several H100", "four: the same", "tokens a second", "train_smollm2_four_gpus", "tokens_per_second"),
    ("RESULTS.md", "several H100", "four: the same", "memory", "train_smollm2_four_gpus", "peak_memory_gib"),
]


@pytest.mark.parametrize("document, table, row, column, file, key", SPEEDS)
def test_speeds_are_those_of_the_files(document, table, row, column, file, key):
    ((header, cells),) = table_rows(document, table, row)
    number = re.match(r"\d[\d,.]*", cells[header.index(column)])[0]
    measured = json.loads((ROOT / "results" / f"{file}.json").read_text())["results"][0][key]
    if key == "tokens_per_second":  # shown to three digits
        measured = float(f"{measured:.3g}")
    assert number == shown(measured, number)


def test_hours_follow_from_the_speeds():
    rows = {cells[0]: cells for rows in tables("README.md") if rows[0][0] == "LLaMA-7B on H100s" for cells in rows[1:]}
    speeds = {cells[0].partition(",")[0]: cells[1].replace(",", "") for cells in rows.values()}
    assert not speeds["eight"].isdigit()
    speeds["eight"] = speeds["four"]  # as the table says
    for cells in rows.values():
        cards = {"one": 1, "two": 2, "four": 4, "eight": 8}[cells[0].partition(",")[0]]
        hours = 1000 * 64 * 2048 / (cards * int(speeds[cells[0].partition(",")[0]])) / 3600
        assert cells[2].partition(",")[0] == f"{hours:.1f}"


def test_costs_of_a_step_by_target():
    results = json.loads((ROOT / "results" / "efficiency.json").read_text())["results"]
    for method, label in (("full", "full-length"), ("pose", "PoSE")):
        for key, what in (("step_seconds", "seconds a step"), ("peak_memory_gib", "memory, GiB")):
            ((header, cells),) = table_rows("RESULTS.md", "target", f"{label}: {what}")
            for column, cell in zip(header[1:], cells[1:], strict=True):
                target = lengths_in(column)[0]
                (measured,) = (r[key] for r in results if (r["method"], r["target_len"]) == (method, target))
                assert cell == (shown(measured, cell) if measured else "out of memory" if key == "step_seconds" else "")


def test_sentences_with_figures():
    def load(name):
        return json.loads((ROOT / "results" / f"{name}.json").read_text())["results"]

    at_target = {r["method"]: r for r in load("efficiency") if r["target_len"] == 131072}
    pose, full = ((at_target[m]["step_seconds"], at_target[m]["peak_memory_gib"]) for m in ("pose", "full"))
    prefill = load("prefill_1m")[0]["ours"]
    needles = {r["length"]: 100 * r["accuracy"] for r in load("needle")}
    before, after = (statistics.fmean(100 * r["score"] for r in load(name)) for name in ("benchmarks_base", "benchmarks"))
    beyond = 100 * load("passkey_256k")[0]["accuracy"]
    readme = " ".join(read("README.md").split())
    for sentence in (
        f"takes {pose[0]:.2f} s and {pose[1]:.1f} GiB; at full length it takes {full[0]:.1f} s and {full[1]:.1f} GiB",
        f"read in {prefill['seconds']:.1f} s and {prefill['peak_memory_gib']:.1f} GiB",
        f"{shown(needles[2048], '53')}% at 2,048 and {shown(needles[131072], '23')}% at 131,072",
        f"fall from {before:.1f}% to {after:.1f}% on average",
        f"({beyond:.0f}% at 262,144)",
    ):
        assert sentence in readme, sentence
