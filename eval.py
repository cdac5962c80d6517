"""Does the longer window work? Passkey retrieval and sliding-window perplexity (section 4 of the paper).

    python eval.py --task passkey                     # what train.py wrote last, beside the model it came from
    python eval.py --task ppl --data book.txt --lengths 2048,8192,32768

Notable choices:
- One forward pass a prompt: greedy decoding gives the answer exactly when every token of the answer is the argmax given the
  ones before it, and the token after it is no further digit. No KV cache; only the scored rows meet the vocabulary.
- Perplexity is weighted by token. A document is cut to the longest length asked for, so that every length that it is long enough for
  scores the same text; a shorter document is left out of the lengths that it does not fill.
"""
import argparse
import functools
import json
import math
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import errors
import weights
from errors import UserError

# Mohtashami & Jaggi 2023, the prompt of PoSE section 4.2.
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"


def parse_arguments():
    p = argparse.ArgumentParser(description="Passkey retrieval and perplexity by length.")
    p.add_argument("--task", choices=("passkey", "ppl"), required=True)
    p.add_argument("--model", nargs="+", help="folders or built-in names (default: the base and the result of the run in out/, else the built-in)")
    p.add_argument("--lengths", help="tokens, comma-separated (default: from the shortest original window, doubling, to the longest window)")
    p.add_argument("--trials", type=int, default=50, help="passkey prompts per length (default: 50)")
    p.add_argument("--seed", type=int, default=0, help="of the keys (default: 0)")
    p.add_argument("--data", nargs="+", default=[], metavar="FILE", help="texts for ppl (default: Python's standard library)")
    p.add_argument("--documents", type=int, default=50, help="ppl: use that many, the longest (default: 50), each to the longest of --lengths")
    p.add_argument("--stride", type=int, help="ppl: tokens that the window moves on, at most a window (default: half of one, at most 16,384)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them there")
    p.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    return p.parse_args()


def last_hidden(model, rows):
    """The normed last hidden states of lists of token ids, (len(rows), longest, C), in one forward pass.
    Padding stands after the text, where causal attention never looks."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return model.hidden(tokens.to(model.embed.weight.device))


def batched(rows, length, model):
    """Lists of at most `length` long rows each, as many as one forward pass takes."""
    budget = 65536 if model.embed.weight.is_cuda else 8192  # tokens
    rows = iter(rows)
    while batch := list(islice(rows, max(1, budget // length))):
        yield batch


# ---------------------------------------------------------------- passkey


def passkey_prompt(tokenizer, length, depth, key):
    """Token ids of a prompt and of its answer, together at most `length` tokens and less than a line of garbage short of it.
    depth 0 … 1: where in the garbage the key stands. Raises UserError if the prompt does not fit at all."""

    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    answer_len = len(tokenizer.encode(f"{QUESTION} {key}")) - len(tokenizer.encode(QUESTION))

    def encode(lines):
        before = round(depth * lines)
        parts = [TASK, " ".join([GARBAGE] * before), KEY.format(key=key), " ".join([GARBAGE] * (lines - before)), f"{QUESTION} {key}"]
        return bos + tokenizer.encode("\n".join(part for part in parts if part))

    short = len(encode(4))
    per_line = (len(encode(12)) - short) / 8
    lines = max(0, 4 + math.floor((length - short) / per_line))
    tokens = encode(lines)
    while len(tokens) > length:
        if lines == 0:
            raise UserError(f"--lengths {length}: too short for the passkey prompt, which needs {len(tokens)} tokens with this tokenizer")
        lines -= 1
        tokens = encode(lines)
    return tokens[:-answer_len], tokens[-answer_len:]


def answers_greedily(model, prompts, answers, digits):
    """For each prompt, would greedy decoding continue it with its answer and then stop the number? One forward pass."""
    right = []
    for h, prompt, answer in zip(last_hidden(model, [p + a for p, a in zip(prompts, answers)]), prompts, answers):
        said = model.head(h[len(prompt) - 1 : len(prompt) + len(answer)]).argmax(-1).tolist()  # one more than the answer
        right.append(said[:-1] == answer and said[-1] not in digits)
    return right


@functools.cache
def digit_tokens(tokenizer):
    """Ids that would make a number go on."""
    return {i for i in range(tokenizer.vocab_size) if tokenizer.decode([i])[:1].isdigit()}


def passkey(model, tokenizer, length, trials, seed):
    """One entry of `results`: trials at evenly spaced depths, a new 5-digit key each."""

    def draw(trial):
        depth = (trial + 0.5) / trials
        key = np.random.default_rng((seed, length, trial)).integers(10000, 100000)
        return depth, *passkey_prompt(tokenizer, length, depth, str(key))

    by_trial = []
    for batch in batched(map(draw, tqdm(range(trials), desc=f"passkey {length:,}", leave=False, disable=None)), length, model):
        depths, prompts, answers = zip(*batch)
        correct = answers_greedily(model, prompts, answers, digit_tokens(tokenizer))
        by_trial += [{"depth": d, "correct": c} for d, c in zip(depths, correct)]
    return {"length": length, "trials": trials, "accuracy": sum(t["correct"] for t in by_trial) / trials, "by_trial": by_trial}


# ---------------------------------------------------------------- perplexity


def sliding_windows(n, window, stride):
    """Yield (begin, scored_from, end) over n tokens: each token is scored once, in the window that gives it most context."""
    scored = 0
    for begin in range(0, n, stride):
        end = min(begin + window, n)
        yield begin, scored, end
        scored = end
        if end == n:
            return


def perplexity(model, tokenizer, length, documents, longest, stride):
    """One entry of `results`: exp of the mean loss over all tokens of the documents that have `length` tokens."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]  # in front of every window, and part of its length
    window = length - len(bos)

    def windows():
        for document in tqdm(long_enough, desc=f"ppl {length:,}", leave=False, disable=None):
            text = document[: longest - len(bos)].tolist()
            for begin, scored, end in sliding_windows(len(text), window, min(stride, window)):
                yield bos + text[begin:end], max(len(bos) + scored - begin, 1)  # the first scored token needs one before it

    long_enough = [d for d in documents if len(d) >= length]
    nats = count = 0
    for batch in batched(windows(), length, model):
        for h, (row, first) in zip(last_hidden(model, [row for row, _ in batch]), batch):
            targets = torch.tensor(row[first:], device=h.device)
            nats += model.loss(h[first - 1 : len(row) - 1], targets).item()
            count += len(targets)
    ppl = math.exp(min(nats / count, 700)) if count else None
    return {"length": length, "documents": len(long_enough), "tokens": count, "ppl": ppl}


# ---------------------------------------------------------------- the command


def default_models():
    """The run in out/ and the model it started from; without one, the built-in model for this machine."""
    if Path("out/model/config.json").is_file() and Path("out/args.json").is_file():
        try:
            return [json.loads(Path("out/args.json").read_text())["model"], "out/model"]
        except (ValueError, KeyError, TypeError):
            raise UserError("out/args.json: not readable; name the models with --model") from None
    return ["smollm2-135m" if torch.cuda.is_available() else "tiny"]


def parse_lengths(text, configs):
    if text is None:
        shortest, longest = min(c.original_window for c in configs), max(c.max_position_embeddings for c in configs)
        if shortest == longest:
            return [shortest // 2, shortest, 2 * shortest]
        return sorted({shortest * 2**i for i in range(math.floor(math.log2(longest / shortest)) + 1)} | {longest})
    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"--lengths {text}: give whole numbers of tokens, comma-separated, such as 2048,4096") from None
    if lengths[0] < 2 or lengths[-1] > 2**31:
        raise UserError(f"--lengths {text}: a length is at least 2 and at most {2**31} tokens")
    return lengths


def print_table(reports, lengths, task):
    figure = {"passkey": lambda r: f"{r['accuracy']:.0%}", "ppl": lambda r: "-" if r["ppl"] is None else f"{r['ppl']:,.2f}"}[task]
    width = max(len(name) for name in ["tokens scored", *(r["model"] for r in reports)]) + 2
    print(f"{task:<{width}}" + "".join(f"{length:>10,}" for length in lengths))
    for report in reports:
        print(f"{report['model']:<{width}}" + "".join(f"{figure(r):>10}" for r in report["results"]))
    if task == "ppl":
        print(f"{'documents':<{width}}" + "".join(f"{r['documents']:>10,}" for r in reports[-1]["results"]))
        print(f"{'tokens scored':<{width}}" + "".join(f"{r['tokens']:>10,}" for r in reports[-1]["results"]))
    else:
        for report in reports:
            works = [r["length"] for i, r in enumerate(report["results"]) if all(e["accuracy"] >= 0.95 for e in report["results"][: i + 1])]
            reach = f"works to {works[-1]:,}" if works else f"is below 95% already at {lengths[0]:,}"
            print(f"{report['model']} {reach} tokens" + (" (95% or more at every length)" if works else ""))


def draw(reports, task, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for report in reports:
        results = [r for r in report["results"] if r.get("ppl", 0) is not None]
        values = [100 * r["accuracy"] if task == "passkey" else r["ppl"] for r in results]
        axes.plot([r["length"] for r in results], values, marker="o", label=report["model"])
    axes.set_xscale("log", base=2)
    lengths = [r["length"] for r in reports[0]["results"]]
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths], rotation=30)
    axes.set_xlabel("length, tokens")
    axes.set_ylabel("passkey accuracy, %" if task == "passkey" else "perplexity")
    if task == "passkey":
        axes.set_ylim(-5, 105)
    else:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


@torch.no_grad()
def main():
    args = parse_arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; leave it out to run on the CPU")
    for key in ("trials", "documents", "stride"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least 1")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must not be negative")
    if args.plot and args.plot.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot {args.plot}: name a .png, .pdf or .svg file")
    for path in (args.json, args.plot):
        if path and path.is_dir():
            raise UserError(f"{path}: is a folder; name a file")
        if path and not path.absolute().parent.is_dir():
            raise UserError(f"{path}: its folder does not exist; make it first")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = args.model or default_models()
    lengths = parse_lengths(args.lengths, [weights.read_config(weights.resolve(name)) for name in names])

    reports = []
    for name in names:
        model = weights.load(name, device, torch.bfloat16 if device == "cuda" else torch.float32)
        tokenizer = weights.load_tokenizer(name, model.config)
        if args.task == "passkey":
            results = [passkey(model, tokenizer, length, args.trials, args.seed) for length in lengths]
        else:
            documents = data.prepare(args.data, tokenizer, weights.cache_dir())
            documents = sorted((documents[i] for i in range(len(documents))), key=len, reverse=True)[: args.documents]
            if not any(len(d) >= lengths[0] for d in documents):
                longest = max(map(len, documents))
                raise UserError(f"--data: no document has {lengths[0]} tokens, the longest has {longest}; add longer texts or lower --lengths")
            strides = [args.stride or max(1, min(length // 2, 16384)) for length in lengths]
            results = [perplexity(model, tokenizer, length, documents, lengths[-1], stride) for length, stride in zip(lengths, strides)]
        reports.append({"task": args.task, "model": name, "results": results})
        del model

    print_table(reports, lengths, args.task)
    if args.json:
        args.json.write_text(json.dumps(reports[-1] | ({"compared": reports[:-1]} if reports[:-1] else {}), indent=2) + "\n")
    if args.plot:
        draw(reports, args.task, args.plot)
        print(f"wrote {args.plot}", file=sys.stderr)


if __name__ == "__main__":
    errors.run(main)
