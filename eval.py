"""Does the longer window work? Retrieval, perplexity and ordinary tasks (section 4 of the paper).

    python eval.py --task passkey                     # what train.py wrote last, beside the model it came from
    python eval.py --task needle --data book.txt --plot grid.png
    python eval.py --task ppl --data book.txt --lengths 2048,8192,32768 --tail 1024
    python eval.py --task benchmarks --data folder/   # through lm-evaluation-harness, see harness.py

Notable choices:
- One forward pass a prompt: greedy decoding gives the answer exactly when every token of the answer is the argmax given the
  ones before it, and the token after it is no further digit. No KV cache; only the scored rows meet the vocabulary.
- A length is exact: so many tokens are in the prompt with its answer (see prompts.py), or in the window with its BOS.
- Perplexity is weighted by token. A document is cut to the longest length asked for, so that every length that it is long enough for
  scores the same text; a shorter document is left out of the lengths that it does not fill, which are not compared in words then. With
  `--tail` all lengths score the same tokens.
- Every figure has its uncertainty beside it: Wilson's 95% interval of a share, one standard error over documents of a perplexity.
"""
import functools
import json
import math
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import errors
import harness
import report
import weights
from errors import UserError
from prompts import CITIES, digit_tokens, needle_prompt, passkey_prompt

SETTINGS = {  # the options that a result depends on
    "passkey": ("trials", "seed", "generate"), "needle": ("trials", "seed", "generate", "keys", "data"),
    "ppl": ("documents", "stride", "tail", "by_position", "data"), "benchmarks": ("limit", "data"),
}  # fmt: skip


def parse_arguments():
    p = errors.ArgumentParser(description="Retrieval, perplexity by length, and ordinary tasks.")
    p.add_argument("--task", choices=("passkey", "needle", "ppl", "benchmarks"), required=True, help="the README's table says what each tells")
    p.add_argument(
        "--model", nargs="+", action="extend",
        help="folders or built-in names (default: the base and the result of the run in out/, else the built-in)",
    )  # fmt: skip
    p.add_argument("--lengths", help="tokens, comma-separated (default: doubling from the original window, where it is recorded, to the longest)")
    p.add_argument("--trials", type=int, help="passkey, needle: prompts per length (default: 50)")
    p.add_argument("--seed", type=int, help="passkey, needle: of the keys and their places (default: 0)")
    p.add_argument("--keys", type=int, help="needle: codes in the text, one of which is asked for (default: 4)")
    p.add_argument("--generate", action="store_true", help="passkey, needle: decode each answer token by token too, as a check")
    p.add_argument(
        "--data", nargs="+", action="extend", default=[], metavar="FILE",
        help="needle, ppl: texts (default: Python's standard library); benchmarks: the folder with their files",
    )  # fmt: skip
    p.add_argument("--documents", type=int, help="ppl: use that many, the longest (default: 50), each to the longest of --lengths")
    p.add_argument("--stride", type=int, help="ppl: tokens that the window moves on, at most a window (default: half of one, at most 16,384)")
    p.add_argument("--tail", type=int, metavar="N", help="ppl: score the last N tokens of each document, the rest of the length before them")
    p.add_argument("--by_position", action="store_true", help="ppl: the loss by position in the window too (--stride then defaults to a window)")
    p.add_argument("--limit", type=int, metavar="N", help="benchmarks: the first N items of each (default: all)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the results there after each length; the same call again goes on from them")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them there")
    p.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    return p.parse_args()


def check(args):
    """Refuse what cannot run, and fill in the defaults that depend on the machine."""
    args.device = errors.device(args.device)
    options = {key: [task for task in SETTINGS if key in SETTINGS[task]] for keys in SETTINGS.values() for key in keys}
    errors.check_task(args, options | {"lengths": ["passkey", "needle", "ppl"]})
    errors.at_least(args, 1, "trials", "documents", "stride", "tail", "keys", "limit")
    errors.at_least(args, 0, "seed")
    args.trials, args.documents, args.keys, args.seed = args.trials or 50, args.documents or 50, args.keys or 4, args.seed or 0
    if args.keys > len(CITIES):
        raise UserError(f"--keys {args.keys}: at most {len(CITIES)}")
    if args.tail and (args.by_position or args.stride):
        raise UserError(f"--tail {args.tail} scores one place of each document: leave out --{'stride' if args.stride else 'by_position'}")
    errors.check_outputs(args.json, args.plot)


# ---------------------------------------------------------------- one forward pass


def last_hidden(model, rows):
    """The normed last hidden states of lists of token ids, (len(rows), longest, C), in one forward pass.
    Padding stands after the text, where causal attention never looks."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    last = torch.tensor([[len(row) - 1] for row in rows])
    positions = torch.arange(tokens.shape[1]).minimum(last)  # of padding too: where angles depend on the length, a row's own length counts
    device = model.embed.weight.device
    return model.hidden(tokens.to(device), positions.to(device))


def batched(items, size, model):
    """Lists of consecutive items, as many as one forward pass takes; size(item): its tokens."""
    budget = 65536 if model.embed.weight.is_cuda else 8192
    batch, longest = [], 0
    for item in items:
        longest = max(longest, size(item))
        if batch and longest * (len(batch) + 1) > budget:
            yield batch
            batch, longest = [], size(item)
        batch.append(item)
    if batch:
        yield batch


# ---------------------------------------------------------------- retrieval


def answers_greedily(model, prompts, answers, digits):
    """For each prompt, would greedy decoding continue it with its answer and then stop the number? One forward pass."""
    right = []
    for h, prompt, answer in zip(last_hidden(model, [p + a for p, a in zip(prompts, answers)]), prompts, answers):
        said = model.head(h[len(prompt) - 1 : len(prompt) + len(answer)]).argmax(-1).tolist()  # one more than the answer
        right.append(said[:-1] == answer and said[-1] not in digits)
    return right


def retrieval(model, tokenizer, length, trials, seed, make_prompt, generate=False, task="passkey"):
    """One entry of `results`: trials at evenly spaced depths, new keys each. make_prompt(depth, rng) -> ids of a prompt and of its answer.
    generate: decode each answer greedily as well, token by token with a KV cache, and compare the verdicts."""

    def draw(trial):
        depth = (trial + 0.5) / trials
        return depth, *make_prompt(depth, np.random.default_rng((seed, length, trial)))

    by_trial = []
    with tqdm(total=trials, desc=f"{task} {length:,}", leave=False, disable=None) as bar:
        for batch in batched(map(draw, range(trials)), lambda trial: length, model):
            depths, prompts, answers = zip(*batch)
            correct = answers_greedily(model, prompts, answers, digit_tokens(tokenizer))
            by_trial += [{"depth": d, "correct": c} for d, c in zip(depths, correct)]
            for entry, prompt, answer in zip(by_trial[-len(batch) :], prompts, answers) if generate else ():
                tokens = torch.tensor([prompt], device=model.embed.weight.device)
                entry["said"] = tokenizer.decode(model.generate(tokens, len(answer) + 1)[0].tolist())
                entry["agrees"] = entry["correct"] == (re.match(r"\s*(\d*)", entry["said"])[1] == tokenizer.decode(answer).strip())
            right = sum(t["correct"] for t in by_trial)
            bar.update(len(batch))
            bar.set_postfix(right=f"{right / len(by_trial):.0%}")
    return {"length": length, "trials": trials, "accuracy": right / trials, "interval": report.wilson(right, trials), "by_trial": by_trial}


def passkey(model, tokenizer, length, trials, seed, generate=False):
    """One entry of `results`, see retrieval."""

    def make_prompt(depth, rng):
        return passkey_prompt(tokenizer, length, depth, str(rng.integers(10000, 100000)))

    return retrieval(model, tokenizer, length, trials, seed, make_prompt, generate)


def needle(model, tokenizer, corpus, length, trials, seed, keys, generate=False):
    """One entry of `results`, see retrieval. corpus: 1-d array of token ids."""

    def make_prompt(depth, rng):
        return needle_prompt(tokenizer, corpus, length, depth, rng, keys)

    return retrieval(model, tokenizer, length, trials, seed, make_prompt, generate, "needle")


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


def losses(model, rows, edges):
    """Summed losses in nats (len(rows), len(edges) - 1) of rows (ids, first): of the tokens from `first` on, by the range of positions between
    two edges that they stand in. One forward pass."""
    sums = np.zeros((len(rows), len(edges) - 1))
    for i, (h, (ids, first)) in enumerate(zip(last_hidden(model, [ids for ids, _ in rows]), rows)):
        targets = torch.tensor(ids[first:], device=h.device)
        for j, (low, high) in enumerate(pairwise(np.clip(edges, first, len(ids)).tolist())):
            if low < high:
                sums[i, j] = model.loss(h[low - 1 : high - 1], targets[low - first : high - first]).item()
    return sums


def perplexity(model, tokenizer, length, documents, longest, stride, tail=None, by_position=False):
    """One entry of `results`: exp of the mean loss over all scored tokens. Documents with fewer than `length` tokens are left out.
    tail: score only the last so many tokens of each document, in one window of `length`; to compare the same tokens at all lengths,
    documents with fewer than `longest` are left out then. by_position: add the loss by position in the window."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]  # in front of every window, and part of its length
    window = length - len(bos)
    long_enough = [d for d in documents if len(d) >= (longest if tail else length)]
    edges = [0, *(2**i for i in range(4, 40) if 2**i < length and by_position), length]

    def windows():  # document, ids, first scored
        for i, document in enumerate(long_enough):
            if tail:
                yield i, bos + document[-window:].tolist(), length - tail
                continue
            text = document[: longest - len(bos)].tolist()
            for begin, scored, end in sliding_windows(len(text), window, max(1, min(stride, window - (not bos)))):
                yield i, bos + text[begin:end], max(len(bos) + scored - begin, 1)  # the first scored token needs one before it, BOS or text

    nats, count = np.zeros((2, len(long_enough), len(edges) - 1))
    total = sum(tail or min(len(d), longest) for d in long_enough)
    with tqdm(total=total, unit=" tokens", unit_scale=True, desc=f"ppl {length:,}", leave=False, disable=None) as bar:
        for batch in batched(windows(), lambda w: len(w[1]), model):
            for (i, ids, first), sums in zip(batch, losses(model, [w[1:] for w in batch], edges)):
                nats[i] += sums
                count[i] += np.diff(np.clip(edges, first, len(ids)))
                bar.update(len(ids) - first)
            bar.set_postfix(ppl=f"{math.exp(min(nats.sum() / count.sum(), 700)):.2f}")
    if not np.isfinite(nats).all():
        raise UserError(f"--lengths {length}: the loss is not finite; look at the weights of this model")
    ppl, error = report.over_documents(nats.sum(1), count.sum(1)) if long_enough else (None, None)
    result = {"length": length, "tail": tail, "documents": len(long_enough), "left_out": len(documents) - len(long_enough)}
    result |= {"tokens": int(count.sum()), "ppl": ppl, "standard_error": error}
    result["by_document"] = [{"tokens": int(n), "nats": loss} for n, loss in zip(count.sum(1), nats.sum(1))]
    if by_position:
        ranges = zip(pairwise(edges), count.sum(0), nats.sum(0))
        result["by_position"] = [{"from": a, "to": b, "tokens": int(n), "loss": loss / n} for (a, b), n, loss in ranges if n]
    return result


# ---------------------------------------------------------------- ordinary tasks


def log_likelihoods(model, pairs):
    """For each pair of ids (context, continuation): the continuation's summed log-likelihood in nats, and whether greedy decoding gives it."""
    rows = {}  # answers of one token share theirs
    for i, (context, continuation) in enumerate(pairs):
        rows.setdefault((*context, *continuation[:-1]), []).append(i)
    result = [None] * len(pairs)
    with tqdm(total=len(rows), leave=False, disable=None) as bar:
        for batch in batched(sorted(rows, key=len, reverse=True), len, model):
            for row, h in zip(batch, last_hidden(model, batch)):
                for i in rows[row]:
                    targets = torch.tensor(pairs[i][1], device=h.device)
                    logits = model.head(h[len(row) - len(targets) : len(row)]).float()
                    nats = torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
                    result[i] = -nats, bool((logits.argmax(-1) == targets).all())
            bar.update(len(batch))
    return result


# ---------------------------------------------------------------- the command


def default_models(device):
    """The run in out/ and the model it started from; without one, the built-in model for this device."""
    if Path("out/model/config.json").is_file() and Path("out/args.json").is_file():
        try:
            return [json.loads(Path("out/args.json").read_text())["model"], "out/model"]
        except (ValueError, KeyError, TypeError):
            raise UserError("out/args.json: not readable; name the models with --model") from None
    return [weights.default(device)]


def default_lengths(configs):
    """From the shortest window before any interpolation, doubling, to the longest window; not so short that no passkey prompt fits."""
    shortest = max(256, min(c.original_window for c in configs))
    longest = max(shortest, *(c.max_position_embeddings for c in configs))
    if shortest == longest:
        return [n for n in (shortest // 2, shortest, 2 * shortest) if n >= 256]
    return sorted({shortest * 2**i for i in range(math.floor(math.log2(longest / shortest)) + 1)} | {longest})


def choose(documents, count, needed):
    """The longest `count` documents; UserError if none has `needed` tokens."""
    documents = sorted((documents[i] for i in range(len(documents))), key=len, reverse=True)[:count]
    if len(documents[0]) < needed:
        longest = len(documents[0])
        raise UserError(f"--data: no document has {needed} tokens, the longest has {longest}; add longer texts or lower --lengths")
    return documents


def settings(args, names, checked, lengths):
    """What two calls must share for their results to stand in one file. (More lengths may be added, unless the longest says what is scored.)
    checked: what weights.check found of each model."""
    shared = {"task": args.task, "model": names, "device": args.device} | {key: getattr(args, key) for key in SETTINGS[args.task]}
    shared |= {f"weights of {name}": weights.fingerprint(model.config, files) for name, (model, _, files) in zip(names, checked)}
    if args.task == "ppl":
        shared["lengths"] = lengths
    if args.task != "passkey":
        shared["sha256 of data"] = data.fingerprint(data.find_files(args.data))
    return shared


def evaluator(args, model, tokenizer, units):
    """-> a function from one of the lengths (or benchmarks) `units` to its entry of `results`."""
    if args.task == "passkey":
        return lambda length: passkey(model, tokenizer, length, args.trials, args.seed, args.generate)
    if args.task == "benchmarks":
        lm = harness.as_model(model.config, tokenizer, functools.partial(log_likelihoods, model))
        files = harness.find_files(args.data)
        return lambda name: harness.evaluate(name, files[name], lm, args.limit)
    documents = data.prepare(args.data, tokenizer, weights.cache_dir())
    if args.task == "needle":
        return lambda length: needle(model, tokenizer, documents.tokens, length, args.trials, args.seed, args.keys, args.generate)
    chosen = choose(documents, args.documents, units[-1] if args.tail else units[0])

    def ppl(length):
        stride = args.stride or (length if args.by_position else max(1, min(length // 2, 16384)))
        return perplexity(model, tokenizer, length, chosen, units[-1], stride, args.tail, args.by_position)

    return ppl


@torch.no_grad()
def main():
    args = parse_arguments()
    check(args)
    names = [*dict.fromkeys(args.model or default_models(args.device))]
    checked = [weights.check(weights.resolve(name)) for name in names]  # the last of them too, before hours with the first
    configs = [model.config for model, *_ in checked]
    by = "benchmark" if args.task == "benchmarks" else "length"
    if by == "benchmark":
        units = [*harness.find_files(args.data)]
    else:
        units = default_lengths(configs) if args.lengths is None else errors.token_counts("--lengths", args.lengths, least=2)
    if args.tail and args.tail >= units[0]:
        raise UserError(f"--tail {args.tail}: leaves no context in a length of {units[0]}; lower it or raise --lengths")
    shared = settings(args, names, checked, units) if args.json else None
    if args.json and args.json.exists():
        reports = report.read(args.json, shared)
    else:
        reports = [{"task": args.task, "model": name, "results": []} for name in names]

    for config, own in zip(configs, reports):
        missing = [unit for unit in units if unit not in [r[by] for r in own["results"]]]
        if not missing:
            continue
        model = weights.load(own["model"], args.device, torch.bfloat16 if args.device == "cuda" else torch.float32)
        evaluate = evaluator(args, model, weights.load_tokenizer(own["model"], config), units)
        for unit in missing:
            result = evaluate(unit)
            if by == "length":
                result["beyond_window"] = unit > config.max_position_embeddings
            own["results"] = sorted([*own["results"], result], key=lambda r: r[by] if by == "length" else units.index(r[by]))
            if args.json:
                report.write(args.json, shared, reports)
            tqdm.write(f"{own['model']}, {args.task} {unit}: {' '.join(report.figure(result))}", file=sys.stderr)
        del model, evaluate

    asked = [own | {"results": [r for r in own["results"] if r[by] in units]} for own in reports]
    report.print_table(asked, args.task)
    if args.plot:
        report.draw(asked, args.task, args.plot)
        print(f"wrote {args.plot}", file=sys.stderr)


if __name__ == "__main__":
    errors.run(main)
