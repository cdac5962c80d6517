"""Reproduce the paper's tables on a small real model, one command each.

    python reproduce.py table1 --data texts/ --dev books.jsonl.gz latex.jsonl.gz
    python reproduce.py table5 --data texts/ --dev books.jsonl.gz --seeds 3
    python reproduce.py table3 --data texts/ --dev benchmarks/

Every arm of a table is trained on the same number of tokens by a call of train.py, and all arms are measured
on other texts by calls of eval.py. Each call is printed before it runs; what is there already is not done
again. OUT/TABLE gets the arms, the JSON files and tables.md, with the mean over seeds and, of several seeds,
the smallest and the largest value.
"""

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import data
from cli import arguments, process
from hf.builtin import open_model
from storage.errors import InputError, warn
from storage.files import cache_dir, write_file, write_json
from storage.log import is_finished
from storage.values import describe_changes, read_record
from tasks import harness

TOKENS = 2**22  # that each arm is trained on
WINDOWS = 16  # windows of the model in a step of every arm

# ---------------------------------------------------------------- the tables


@dataclass
class Table:
    """What is trained and what is measured. Lengths are in windows of the model.

    arms: {name: {option of train.py: value}}, with the target as `target` windows. lengths: at which the arms
    are measured. passkeys: prompts at each length, unless the user asks for another number. benchmarks:
    whether the arms are measured on ordinary benchmarks instead, which have no length.
    """

    arms: dict
    lengths: tuple
    passkeys: int = 100
    benchmarks: bool = False


def methods(target):
    """Return the arms of Table 1 for one target: all methods, with the paper's linear interpolation."""
    arms = {}
    for method in ("full", "randpos", "pi", "pose"):
        arms[f"{method} {target}x"] = {"method": method, "target": target, "rope": "linear"}
    return arms


def interpolations(target, *modes):
    """Return arms that differ in the interpolation alone, with the paper's settings for all of them."""
    settings = {"target": target, "factor": target, "overshoot": 1, "llama_4_scaling_beta": 0}
    return {f"{mode} {target}x": settings | {"rope": mode} for mode in modes}


UP_TO_FOUR = (0.5, 1, 2, 4)
TABLES = {  # those that name no interpolation take the model's own recipe
    "table1": Table(methods(2) | methods(4), UP_TO_FOUR),
    "figure4": Table(interpolations(4, "linear", "ntk", "yarn", "yarn_revised", "llama3"), UP_TO_FOUR),
    "table2": Table(
        interpolations(12, "linear", "ntk", "yarn") | interpolations(16, "linear", "ntk", "yarn"),
        lengths=(4, 8, 12, 16),
        passkeys=0,  # the paper has none either
    ),
    "table3": Table(
        {
            "full 2x": {"method": "full", "target": 2},
            "pose 2x": {"target": 2},
            "pose 16x": {"target": 16},
        },
        lengths=(),
        benchmarks=True,
    ),
    "table4": Table(
        {
            "uniform": {"target": 4, "offset": "uniform"},
            "zero": {"target": 4, "offset": "zero"},
            "skip": {"target": 4, "offset": "skip"},
        },
        UP_TO_FOUR,
    ),
    "table5": Table(
        {
            "1 chunk": {"target": 4, "chunks": 1},
            "2 chunks": {"target": 4, "chunks": 2},
            "3 chunks": {"target": 4, "chunks": 3},
            "8 chunks": {"target": 4, "chunks": 8},
            "randpos": {"target": 4, "method": "randpos"},
        },
        UP_TO_FOUR,
    ),
}


def steps(window, tokens):
    """Return the steps of every arm, see `training_options`."""
    return tokens // (WINDOWS * window)


def training_options(arm, window, tokens):
    """Return train.py's options of an arm, {option: value}, for as many tokens as every other arm's.

    arm: its options in TABLES. window: of the model, in tokens. tokens: that an arm is trained on.
    """
    options = dict(arm)
    target = options.pop("target")
    options["target_len"] = target * window
    if options.get("method") == "full":
        options["batch_size"] = max(1, WINDOWS // target)
    else:
        options["train_len"] = window  # whatever the model's recipe says
        options["batch_size"] = WINDOWS
    options["steps"] = steps(window, tokens)
    options["retrieval"] = 0  # the paper has none
    return options


# ---------------------------------------------------------------- training and measuring


def train(args, folder, window):
    """Train the arms that are not there yet. Return {model: name of its arm}, the untouched model first."""
    arm_of_model = {args.model: "none"}
    for arm, settings in TABLES[args.table].arms.items():
        for seed in range(args.seeds):
            out = folder / f"{arm.replace(' ', '-')}-{seed}"
            arm_of_model[str(out / "model")] = arm
            if is_finished(out):
                continue
            options = training_options(settings, window, args.tokens)
            if args.lr is not None:
                options["lr"] = args.lr
            options = {"model": args.model, "data": args.data} | options | {"seed": seed, "out": out}
            words = arguments.as_words(options)
            if (out / "args.json").exists():  # an earlier call was interrupted
                words.append("--resume")
            run("train.py", *words)
    return arm_of_model


def measure(args, folder, window, arm_of_model):
    """Measure all models. Return the tables, texts in Markdown."""
    models = {"model": list(arm_of_model)}
    if TABLES[args.table].benchmarks:
        path = folder / "benchmarks.json"
        run_eval("benchmarks", models | {"data": args.dev, "limit": args.limit, "json": path})
        return [markdown("score, %", path, arm_of_model, lambda result: 100 * result["score"], 1)]

    lengths = lengths_in_tokens(args.table, window)
    common = models | {"lengths": ",".join(map(str, lengths))}
    tables = []
    if args.trials:
        path = folder / "passkey.json"
        run_eval("passkey", common | {"trials": args.trials, "json": path})
        tables.append(markdown("passkey, %", path, arm_of_model, lambda result: 100 * result["accuracy"], 0))
    documents = max(4, 2**17 // lengths[-1])  # enough text where windows are short
    for file in args.dev:
        texts = {"data": [file], "documents": documents}
        for way, options in (("sliding", {}), ("tail", {"tail": window // 8})):
            path = folder / f"{name_without_endings(file)}_{way}.json"
            run_eval("ppl", common | texts | options | {"json": path})
            title = f"perplexity, {path.stem}"
            tables.append(markdown(title, path, arm_of_model, lambda result: result["ppl"], 2))
    return tables


def run_eval(task, options):
    """Call eval.py with a task and {option: value}."""
    run("eval.py", "--task", task, *arguments.as_words(options))


def run(script, *words):
    """Print and run a call of a script of this repository. If it fails, exit with its code."""
    print("python", shlex.join([script, *words]), flush=True)
    called = subprocess.Popen([sys.executable, Path(__file__).parent / script, *words])
    try:
        code = called.wait()
    except KeyboardInterrupt:  # the script got it too, and saves what is done
        code = called.wait() or 130
    if code:
        sys.exit(code)


def lengths_in_tokens(table, window):
    """Return the lengths, in tokens, at which this table is measured."""
    return [int(windows * window) for windows in TABLES[table].lengths]


def name_without_endings(file):
    """Return the name by which the results of a text file are kept."""
    return Path(file).name.split(".")[0]


# ---------------------------------------------------------------- tables in Markdown


def markdown(title, path, arm_of_model, figure, digits):
    """Return a table of the results in a JSON file of eval.py: a row for each arm, a column for each length.

    figure(result): the number to show, or None. A cell holds the mean over seeds.
    """
    written = read_record(path)
    figures = {}  # {(arm, length or benchmark): [one number for each seed]}
    units = []  # lengths or benchmarks
    for report in (*written.get("compared", []), written):
        for result in report["results"]:
            unit = result["length"] if "length" in result else result["benchmark"]
            if unit not in units:
                units.append(unit)
            number = figure(result)
            if number is not None:
                figures.setdefault((arm_of_model[report["model"]], unit), []).append(number)

    headings = [f"{unit:,}" if isinstance(unit, int) else unit for unit in units]
    rows = [[title, *headings], ["---"] * (1 + len(units))]
    for arm in dict.fromkeys(arm_of_model.values()):  # each once, in order
        rows.append([arm, *(spread(figures.get((arm, unit), []), digits) for unit in units)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def spread(values, digits):
    """Return the mean of the values and, of several, the smallest and the largest; "" if there is none."""
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


# ---------------------------------------------------------------- the command


def parse_arguments():
    p = arguments.ArgumentParser(description="Train and measure the arms of one of the paper's tables.")
    # fmt: off
    p.add_argument("table", choices=TABLES)
    p.add_argument("--model", type=arguments.path_name, default="smollm2-135m",
        help="a folder or built-in name (default: smollm2-135m)")
    p.add_argument("--data", type=arguments.path_name, nargs="+", action="extend", default=[],
        metavar="FILE",
        help="texts to train on (default: Python's standard library)")
    p.add_argument("--dev", type=arguments.path_name, nargs="+", action="extend", required=True,
        metavar="FILE",
        help="texts to measure on, one file for each kind of text, with a document as long as the longest "
        "length; table3: the folder of benchmarks")
    p.add_argument("--seeds", type=arguments.whole_number(1), default=1,
        help="runs of each arm (default: 1)")
    p.add_argument("--tokens", type=arguments.whole_number(1, 2**50), default=TOKENS,
        help=f"that each arm is trained on (default: {TOKENS:,})")
    p.add_argument("--lr", type=arguments.number(0, arguments.LARGEST_LR),
        help="of every arm (default: train.py's)")
    p.add_argument("--trials", type=arguments.whole_number(0),
        help="passkeys a length (default: 100; table2, as in the paper, none)")
    p.add_argument("--limit", type=arguments.whole_number(1),
        help="table3: items of each benchmark (default: all)")
    p.add_argument("--out", type=arguments.as_path, default=Path("out/reproduce"), metavar="DIR",
        help="default: out/reproduce")
    # fmt: on
    return p.parse_args()


def complete(args, model):
    """Refuse what would fail after hours of training, fill in the defaults and return the arguments.

    model: the CheckpointFolder to begin with.
    """
    window = model.config.max_position_embeddings
    of_other_tables = "trials" if TABLES[args.table].benchmarks else "limit"
    if getattr(args, of_other_tables) is not None:
        warn(f"--{of_other_tables}: {args.table} does not look at it")
    if args.trials is None:
        args.trials = TABLES[args.table].passkeys
    if steps(window, args.tokens) < 1:
        at_least = f"at least {WINDOWS * window:,}, one step of {WINDOWS} windows"
        raise InputError(f"--tokens {args.tokens}: {at_least}")
    for path in (*args.data, *args.dev):
        if not Path(path).exists():
            raise InputError(f"{path}: no such file or folder")
    if len({name_without_endings(file) for file in args.dev}) < len(args.dev):
        files = " ".join(args.dev)
        raise InputError(f"--dev {files}: two files of one name, by which the results are kept; rename one")
    if TABLES[args.table].benchmarks:
        if len(args.dev) != 1:
            raise InputError(f"--dev: name one folder with files of {harness.EXPECTED_FILES}")
        harness.find_files(args.dev[0])
    else:
        check_lengths_of_texts(args, model, lengths_in_tokens(args.table, window)[-1])
    return args


def check_lengths_of_texts(args, model, longest_length):
    """Raise InputError for a file of --dev without a document of the longest length, in tokens."""
    tokenizer = model.load_tokenizer()
    for file in args.dev:
        longest_document = max(map(len, data.tokenised([file], tokenizer, cache_dir())))
        if longest_document < longest_length:
            too_short = f"its longest document has {longest_document} tokens"
            needed = f"this table's longest length is {longest_length}"
            raise InputError(f"--dev {file}: {too_short}, {needed}; name a longer one")


def begin_or_check(path, record):
    """Begin a record at `path` of how the arms beside it are trained, or check the one that is there.

    Raise InputError if an arm has begun and the record says something else, or cannot be read.
    """
    if not any(path.parent.glob("*/args.json")):  # no arm has begun
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        return
    try:
        changes = describe_changes(read_record(path), record)
    except InputError:
        changes = f"{path.name} is not readable"
    if changes:
        reason = f"holds arms of other settings ({changes})"
        raise InputError(f"{path.parent}: {reason}; name another --out or remove it")


def main():
    args = parse_arguments()
    model = open_model(args.model)
    args = complete(args, model)
    folder = args.out / args.table
    settings = {key: getattr(args, key) for key in ("model", "data", "tokens", "seeds", "lr")}
    begin_or_check(folder / "arms.json", settings)

    window = model.config.max_position_embeddings
    arm_of_model = train(args, folder, window)
    tables = "\n".join(measure(args, folder, window, arm_of_model))
    print("\n" + tables)
    write_file(folder / "tables.md", tables.encode())


if __name__ == "__main__":
    process.run(main)
