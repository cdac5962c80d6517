"""The paper's tables on a small real model, one command each: train every arm on the same number of tokens, measure all of them on other texts.

    python reproduce.py table1 --data texts/ --dev books.jsonl.gz latex.jsonl.gz
    python reproduce.py table5 --data texts/ --dev books.jsonl.gz --seeds 3
    python reproduce.py table3 --data texts/ --dev benchmarks/

Every arm is a call of train.py, every measure one of eval.py with all arms, printed before it runs; what is there already is not done again.
OUT/TABLE gets the arms, the JSON files and tables.md, which has the mean over seeds and, of several, the smallest and largest value.
"""
import json
import shlex
import subprocess
import sys
from pathlib import Path

import data
import errors
import harness
import weights
from errors import UserError
from train import finished

TOKENS = 2**22  # that each arm is trained on
WINDOWS = 16  # of the model, in a step


def methods(target):
    """Table 1's rows: the paper interpolates linearly there."""
    return {f"{method} {target}x": f"--method {method} --target {target} --rope linear" for method in ("full", "randpos", "pi", "pose")}


def modes(target, *ropes):
    """Rows that differ in the interpolation alone, with the paper's settings for all of them."""
    return {f"{rope} {target}x": f"--target {target} --factor {target} --overshoot 1 --llama_4_scaling_beta 0 --rope {rope}" for rope in ropes}


# Table -> {arm: its options}; lengths to measure. Targets and lengths are in windows of the model. Tables 3 to 5 take the model's own recipe.
TABLES = {
    "table1": (methods(2) | methods(4), (0.5, 1, 2, 4)),
    "figure4": (modes(4, "linear", "ntk", "yarn", "yarn_revised", "llama3"), (0.5, 1, 2, 4)),
    "table2": (modes(12, "linear", "ntk", "yarn") | modes(16, "linear", "ntk", "yarn"), (4, 8, 12, 16)),
    "table3": ({"full 2x": "--method full --target 2", "pose 2x": "--target 2", "pose 16x": "--target 16"}, ()),
    "table4": ({offset: f"--target 4 --offset {offset}" for offset in ("uniform", "zero", "skip")}, (0.5, 1, 2, 4)),
    "table5": (
        {f"{n} chunk{'s' * (n > 1)}": f"--target 4 --chunks {n}" for n in (1, 2, 3, 8)} | {"randpos": "--target 4 --method randpos"},
        (0.5, 1, 2, 4),
    ),
}


def parse_arguments():
    p = errors.ArgumentParser(description="Train and measure the arms of one of the paper's tables.")
    p.add_argument("table", choices=TABLES)
    p.add_argument("--model", default="smollm2-135m", help="a folder or built-in name (default: smollm2-135m)")
    p.add_argument("--data", nargs="+", default=[], metavar="FILE", help="texts to train on (default: Python's standard library)")
    p.add_argument(
        "--dev", nargs="+", required=True, metavar="FILE",
        help="texts to measure on, one file for each kind of text, with documents as long as the longest length; table3: the folder of benchmarks",
    )  # fmt: skip
    p.add_argument("--seeds", type=int, default=1, help="runs of each arm (default: 1)")
    p.add_argument("--tokens", type=int, default=TOKENS, help=f"that each arm is trained on (default: {TOKENS:,})")
    p.add_argument("--lr", type=float, help="of every arm (default: train.py's)")
    p.add_argument("--trials", type=int, help="passkeys a length (default: 100; table2, as in the paper, none)")
    p.add_argument("--limit", type=int, help="table3: items of each benchmark (default: all)")
    p.add_argument("--out", type=Path, default=Path("out/reproduce"), metavar="DIR", help="default: out/reproduce")
    return p.parse_args()


def lengths(table, window):
    """To measure, in tokens."""
    return [int(x * window) for x in TABLES[table][1]]


def steps(window, tokens):
    """Of every arm, at WINDOWS windows of the model each."""
    return tokens // (WINDOWS * window)


def training(options, window, tokens):
    """train.py's options, a list of words, from an arm's: the target in tokens, and as many tokens a step and in all as any other arm's."""
    words = options.split()
    at = words.index("--target")
    target = int(words[at + 1]) * window
    share = target // window if "full" in words else 1
    batch = max(1, WINDOWS // share)
    words[at : at + 2] = ["--target_len", str(target)]
    if share == 1:  # the model's own window, whatever its recipe says
        words += ["--train_len", str(window)]
    return [*words, "--batch_size", str(batch), "--steps", str(steps(window, tokens))]


def run(script, *arguments):
    """Call a script of this repository; what goes wrong there ends this one too."""
    command = [script, *map(str, arguments)]
    print("python", shlex.join(command), flush=True)
    called = subprocess.Popen([sys.executable, Path(__file__).parent / script, *command[1:]])
    try:
        code = called.wait()
    except KeyboardInterrupt:  # the script has it too, and saves what is done
        code = called.wait() or 130
    if code:
        sys.exit(code)


def kind(file):
    """A dev file's name without endings."""
    return Path(file).name.split(".")[0]


def check_record(path, record):
    """Keep what the arms in a folder are trained with. UserError if arms of other settings are there."""
    if not any(path.parent.glob("*/args.json")):  # none has begun
        path.parent.mkdir(parents=True, exist_ok=True)
        return errors.write_json(path, record)
    try:
        changed = errors.changes(json.loads(path.read_text()), record)
    except (OSError, ValueError):
        changed = f"{path.name} is not readable"
    if changed:
        raise UserError(f"{path.parent}: holds arms of other settings ({changed}); name another --out or remove it")


def spread(values, digits):
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def markdown(title, path, names, figure, digits):
    """A table of the results in a --json file of eval.py, a row an arm and a column a length. names: {model: arm}; figure(result) -> a number
    or None."""
    written = json.loads(path.read_text())
    rows = {}
    for report in (*written.get("compared", []), written):
        for result in report["results"]:
            unit = result.get("length") or result["benchmark"]
            rows.setdefault(names[report["model"]], {}).setdefault(unit, []).append(figure(result))
    units = list(next(iter(rows.values())))
    table = [[title, *(f"{u:,}" if isinstance(u, int) else u for u in units)], ["---"] * (1 + len(units))]
    for arm in dict.fromkeys(names.values()):
        cells = ([v for v in rows[arm].get(unit, []) if v is not None] for unit in units)
        table.append([arm, *(spread(cell, digits) if cell else "" for cell in cells)])
    return "".join(f"| {' | '.join(row)} |\n" for row in table)


def check(args, config):
    """Refuse what would fail after hours of training, and fill in the default that depends on the table."""
    if args.trials is None:
        args.trials = 0 if args.table == "table2" else 100
    window = config.max_position_embeddings
    errors.at_least(args, 1, "seeds", "limit")
    errors.at_least(args, 0, "trials")
    if steps(window, args.tokens) < 1:
        raise UserError(f"--tokens {args.tokens}: at least {WINDOWS * window:,}, one step of {WINDOWS} windows")
    if absent := next((path for path in (*args.data, *args.dev) if not Path(path).exists()), None):
        raise UserError(f"{absent}: no such file or folder")
    if len({kind(file) for file in args.dev}) < len(args.dev):
        raise UserError(f"--dev {' '.join(args.dev)}: two files of one name, by which the results are kept; rename one")
    if args.table == "table3":
        harness.find_files(args.dev)
        return
    longest, tokenizer = lengths(args.table, window)[-1], weights.load_tokenizer(args.model, config)
    for file in args.dev:
        found = max(map(len, data.prepare([file], tokenizer, weights.cache_dir())))
        if found < longest:
            raise UserError(f"--dev {file}: its longest document has {found} tokens, this table's longest length is {longest}; name a longer one")


def train(args, folder, window):
    """Train the arms that are not there yet -> {model: arm}, the untouched model first."""
    names = {args.model: "none"}
    for arm, options in TABLES[args.table][0].items():
        for seed in range(args.seeds):
            out = folder / f"{arm.replace(' ', '-')}-{seed}"
            names[str(out / "model")] = arm
            if not finished(out, steps(window, args.tokens)):
                texts = ("--data", *args.data) if args.data else ()
                lr = ("--lr", args.lr) if args.lr is not None else ()
                resume = ("--resume",) if (out / "args.json").exists() else ()
                run("train.py", "--model", args.model, *texts, *training(options, window, args.tokens), *lr, "--seed", seed, "--out", out, *resume)
    return names


def measure(args, folder, window, names):
    """-> the tables, in Markdown."""
    models = ("--model", *names)
    if args.table == "table3":
        path = folder / "benchmarks.json"
        run("eval.py", "--task", "benchmarks", *models, "--data", *args.dev, "--json", path, *(("--limit", args.limit) if args.limit else ()))
        return [markdown("score, %", path, names, lambda r: 100 * r["score"], 1)]
    measured = lengths(args.table, window)
    common = (*models, "--lengths", ",".join(map(str, measured)))
    tables = []
    if args.trials:
        path = folder / "passkey.json"
        run("eval.py", "--task", "passkey", *common, "--trials", args.trials, "--json", path)
        tables.append(markdown("passkey, %", path, names, lambda r: 100 * r["accuracy"], 0))
    documents = max(4, 2**17 // measured[-1])  # enough text where windows are short
    for file in args.dev:
        for way, options in (("sliding", ()), ("tail", ("--tail", window // 8))):
            path = folder / f"{kind(file)}_{way}.json"
            run("eval.py", "--task", "ppl", *common, "--data", file, "--documents", documents, *options, "--json", path)
            tables.append(markdown(f"perplexity, {path.stem}", path, names, lambda r: r["ppl"], 2))
    return tables


def main():
    args = parse_arguments()
    config = weights.read_config(weights.resolve(args.model))
    check(args, config)
    window = config.max_position_embeddings
    folder = args.out / args.table
    check_record(folder / "arms.json", {key: getattr(args, key) for key in ("model", "data", "tokens", "seeds", "lr")})
    tables = measure(args, folder, window, train(args, folder, window))
    print("\n" + "\n".join(tables))
    (folder / "tables.md").write_text("\n".join(tables))


if __name__ == "__main__":
    errors.run(main)
