"""Does the longer window work? Retrieval, perplexity and ordinary tasks (section 4 of the paper).

    python eval.py --task passkey                     # what train.py wrote last, beside the model it came from
    python eval.py --task needle --data book.txt --plot grid.png
    python eval.py --task ppl --data book.txt --lengths 2048,8192,32768 --tail 1024
    python eval.py --task benchmarks --data folder/   # through lm-evaluation-harness, see harness.py

Notable choices:
- One forward pass a prompt: greedy decoding gives the answer exactly when every token of the answer is the argmax given the
  ones before it, and the token after it is no further digit. No KV cache; only the scored rows meet the vocabulary.
- A length is exact: so many tokens are in the prompt with its answer, or in the window with its BOS.
- Perplexity is weighted by token. A document is cut to the longest length asked for, so that every length that it is long enough for
  scores the same text; a shorter document is left out of the lengths that it does not fill. With `--tail` all lengths score the same tokens.
- Every figure has its uncertainty beside it: Wilson's 95% interval of a share, one standard error over documents of a perplexity.
"""
import argparse
import functools
import hashlib
import json
import math
import os
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

NEEDLE_TASK = "The text below hides the door codes of {keys} cities. Remember them: the last line asks for one."
NEEDLE = "The door code of {city} is {key}."
NEEDLE_QUESTION = "What is the door code of {city}? The door code of {city} is"
CITIES = (
    "Amsterdam", "Baghdad", "Cairo", "Delhi", "Edinburgh", "Florence", "Geneva", "Helsinki",
    "Istanbul", "Jakarta", "Kyoto", "Lisbon", "Madrid", "Nairobi", "Oslo", "Prague",
)  # fmt: skip

OPTIONS = {  # of some tasks only
    "generate": ("passkey", "needle"), "keys": ("needle",), "stride": ("ppl",), "tail": ("ppl",), "by_position": ("ppl",), "limit": ("benchmarks",)
}  # fmt: skip
DEPTHS, GRID = 5, 10  # rows of depth in the table, in the heat map


def parse_arguments():
    p = argparse.ArgumentParser(description="Retrieval, perplexity by length, and ordinary tasks.")
    p.add_argument("--task", choices=("passkey", "needle", "ppl", "benchmarks"), required=True)
    p.add_argument("--model", nargs="+", help="folders or built-in names (default: the base and the result of the run in out/, else the built-in)")
    p.add_argument("--lengths", help="tokens, comma-separated (default: from the shortest original window, doubling, to the longest window)")
    p.add_argument("--trials", type=int, default=50, help="passkey, needle: prompts per length (default: 50)")
    p.add_argument("--seed", type=int, default=0, help="passkey, needle: of the keys and their places (default: 0)")
    p.add_argument("--keys", type=int, help="needle: codes in the text, one of which is asked for (default: 4)")
    p.add_argument("--generate", action="store_true", help="passkey, needle: decode each answer token by token too, as a check")
    p.add_argument(
        "--data", nargs="+", default=[], metavar="FILE",
        help="needle, ppl: texts (default: Python's standard library); benchmarks: the folder with their files",
    )  # fmt: skip
    p.add_argument("--documents", type=int, default=50, help="ppl: use that many, the longest (default: 50), each to the longest of --lengths")
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
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; leave it out to run on the CPU")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for key, tasks in OPTIONS.items():
        if getattr(args, key) not in (None, False) and args.task not in tasks:
            raise UserError(f"--{key} belongs to --task {' or '.join(tasks)}; leave it out")
    for key in ("trials", "documents", "stride", "tail", "keys", "limit"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least 1")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must not be negative")
    args.keys = args.keys or 4
    if args.keys > len(CITIES):
        raise UserError(f"--keys {args.keys}: at most {len(CITIES)}")
    if args.tail and (args.by_position or args.stride):
        raise UserError(f"--tail {args.tail} scores one place of each document: leave out --{'stride' if args.stride else 'by_position'}")
    if args.plot and args.plot.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot {args.plot}: name a .png, .pdf or .svg file")
    for path in (args.json, args.plot):
        if path and path.is_dir():
            raise UserError(f"{path}: is a folder; name a file")
        if path and not path.absolute().parent.is_dir():
            raise UserError(f"{path}: its folder does not exist; make it first")


# ---------------------------------------------------------------- one forward pass


def last_hidden(model, rows):
    """The normed last hidden states of lists of token ids, (len(rows), longest, C), in one forward pass.
    Padding stands after the text, where causal attention never looks."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return model.hidden(tokens.to(model.embed.weight.device))


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


@functools.cache
def token_texts(tokenizer):
    """What each id adds in the middle of a text."""
    before = tokenizer.encode("x")
    return [tokenizer.decode([*before, i])[1:] for i in range(tokenizer.vocab_size)]


# ---------------------------------------------------------------- retrieval


def passkey_prompt(tokenizer, length, depth, key):
    """Token ids of a prompt and of its answer, together `length` tokens: whole lines of garbage, then as much of one more as fills the
    length, cut after a word if that is exact, else inside one. (Where no cut is exact, it is the longest that fits.)
    depth 0 … 1: where among the lines the key stands. Raises UserError if the prompt does not fit at all."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]

    def encode(before, after, cut=""):
        after = " ".join([GARBAGE] * after + [cut] * bool(cut))
        parts = [TASK, " ".join([GARBAGE] * before), KEY.format(key=key), after, f"{QUESTION} {key}"]
        return bos + tokenizer.encode("\n".join(part for part in parts if part))

    line = len(encode(2, 3)) - len(encode(2, 2))
    lines = max(0, 5 + (length - len(encode(2, 2))) // line)
    while True:
        before = round(depth * lines)
        after = lines - before
        few = min(before, 2), min(after, 2)
        room = length - line * (lines - sum(few))  # for few lines and what is around them
        if len(encode(*few)) <= room:
            break
        if lines == 0:
            raise UserError(f"--lengths {length}: too short for the passkey prompt, which needs {len(encode(0, 0))} tokens with this tokenizer")
        lines -= 1

    words = GARBAGE.split(" ")
    cuts = [" ".join(words[:n]) for n in range(len(words))] + [GARBAGE[:n].rstrip() for n in range(1, len(GARBAGE))]
    fitting = {cut: n for cut in cuts if (n := len(encode(*few, cut))) <= room}
    cut = max(fitting, key=fitting.get)  # the first of the longest
    tokens = repeat(lambda before, after: encode(before, after, cut), before, after)
    answer_len = len(tokenizer.encode(f"{QUESTION} {key}")) - len(tokenizer.encode(QUESTION))
    return tokens[:-answer_len], tokens[-answer_len:]


def repeat(encode, before, after):
    """encode(before, after), the ids of a text with so many equal lines in two places, though only three are really encoded in each: every
    further one adds the same ids at the same place. (A million tokens take milliseconds, not seconds.)"""
    few = min(before, 2), min(after, 2)
    tokens = base = encode(*few)
    for more, times in (((0, 1), after - few[1]), ((1, 0), before - few[0])):  # the later place first: it does not move the earlier one
        if times:
            longer = encode(few[0] + more[0], few[1] + more[1])
            place = next(i for i, (a, b) in enumerate(zip(base, longer)) if a != b)
            tokens = tokens[:place] + longer[place : place + len(longer) - len(base)] * times + tokens[place:]
    return tokens


def needle_prompt(tokenizer, corpus, length, depth, rng, keys):
    """Token ids of a prompt and of its answer, together `length` tokens: a random stretch of `corpus` (1-d array of ids) with the door codes of
    `keys` cities in lines of their own, between sentences or lines of the text, and the question for one of them.
    depth 0 … 1: where in the text that one stands; the others stand anywhere. Raises UserError if the prompt or the stretch does not fit."""

    def inside(text):  # ids of a line in the middle of a text
        return tokenizer.encode("x\n" + text)[len(tokenizer.encode("x")) :]

    cities = rng.choice(CITIES, keys, replace=False).tolist()
    codes = rng.choice(np.arange(10000, 100000), keys, replace=False).tolist()
    head = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    head += tokenizer.encode(NEEDLE_TASK.format(keys=keys)) + inside("")
    needles = [inside(NEEDLE.format(city=city, key=code)) + inside("") for city, code in zip(cities, codes)]
    question = inside(NEEDLE_QUESTION.format(city=cities[0]))
    asked = inside(NEEDLE_QUESTION.format(city=cities[0]) + f" {codes[0]}")
    fixed = len(head) + sum(map(len, needles)) + len(asked)
    room = length - fixed
    if room < 1:
        raise UserError(f"--lengths {length}: too short for the needle prompt, which needs {fixed + 1} tokens with this tokenizer; lower --keys")
    if room > len(corpus):
        raise UserError(f"--data: {len(corpus):,} tokens in all, too few for --lengths {length}; add texts or lower it")
    start = rng.integers(len(corpus) - room + 1)
    text = corpus[start : start + room]
    ends = line_ends(tokenizer, text)
    places = [ends[np.abs(ends - depth * room).argmin()], *rng.choice(ends, keys - 1)]
    tokens, done = head, 0
    for place, needle in sorted(zip(places, needles), key=lambda pair: pair[0]):
        tokens = tokens + text[done:place].tolist() + needle
        done = place
    tokens += text[done:].tolist() + asked
    return tokens[: len(question) - len(asked)], tokens[len(question) - len(asked) :]


def line_ends(tokenizer, text):
    """Places in text (1-d array of ids) where a line or a sentence ends and something can be put in, 0 among them."""
    newline, stop, space = _ends(tokenizer)
    return np.concatenate([[0], 1 + np.flatnonzero(newline[text[:-1]] | stop[text[:-1]] & space[text[1:]])])


@functools.cache
def _ends(tokenizer):
    texts = token_texts(tokenizer)
    tests = (lambda t: t.endswith("\n")), (lambda t: t.rstrip("\"')”’").endswith((".", "!", "?"))), (lambda t: t[:1].isspace())
    return [np.array([test(t) for t in texts]) for test in tests]


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
    return {i for i, text in enumerate(token_texts(tokenizer)) if text[:1].isdigit()}


def wilson(right, n, z=1.96):
    """The 95% interval of a share, right of n (Wilson 1927): it stays sensible at 0% and 100%, where mean ± deviation does not."""
    centre, half = right + z * z / 2, z * math.sqrt(right * (n - right) / n + z * z / 4)
    return [max(0.0, (centre - half) / (n + z * z)), min(1.0, (centre + half) / (n + z * z))]


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
    return {"length": length, "trials": trials, "accuracy": right / trials, "interval": wilson(right, trials), "by_trial": by_trial}


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


def by_depth(by_trial, rows):
    """Share of right answers in so many equal ranges of depth; None where no trial was."""
    trials = [[t["correct"] for t in by_trial if min(int(t["depth"] * rows), rows - 1) == row] for row in range(rows)]
    return [sum(row) / len(row) if row else None for row in trials]


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
            for begin, scored, end in sliding_windows(len(text), window, min(stride, window)):
                yield i, bos + text[begin:end], max(len(bos) + scored - begin, 1)  # the first scored token needs one before it

    nats, count = np.zeros((2, len(long_enough), len(edges) - 1))
    total = sum(tail or min(len(d), longest) for d in long_enough)
    with tqdm(total=total, unit=" tokens", unit_scale=True, desc=f"ppl {length:,}", leave=False, disable=None) as bar:
        for batch in batched(windows(), lambda w: len(w[1]), model):
            for (i, ids, first), sums in zip(batch, losses(model, [w[1:] for w in batch], edges)):
                nats[i] += sums
                count[i] += np.diff(np.clip(edges, first, len(ids)))
                bar.update(len(ids) - first)
            bar.set_postfix(ppl=f"{math.exp(min(nats.sum() / count.sum(), 700)):.2f}")
    ppl, error = over_documents(nats.sum(1), count.sum(1)) if long_enough else (None, None)
    result = {"length": length, "documents": len(long_enough), "left_out": len(documents) - len(long_enough), "tokens": int(count.sum())}
    result |= {"ppl": ppl, "standard_error": error}
    result["by_document"] = [{"tokens": int(n), "nats": loss} for n, loss in zip(count.sum(1), nats.sum(1))]
    if by_position:
        ranges = zip(pairwise(edges), count.sum(0), nats.sum(0))
        result["by_position"] = [{"from": a, "to": b, "tokens": int(n), "loss": loss / n} for (a, b), n, loss in ranges if n]
    return result


def over_documents(nats, count):
    """Perplexity of all tokens and its standard error, for sums of losses and numbers of tokens by document. Documents differ more than
    tokens do, so they are what is drawn: the error of a ratio of two sums over them (the delta method), None for a single one."""
    n, loss = len(nats), nats.sum() / count.sum()
    ppl = math.exp(min(loss, 700))
    if n == 1:
        return ppl, None
    return ppl, ppl * math.sqrt(n / (n - 1) * ((nats - loss * count) ** 2).sum()) / count.sum()


# ---------------------------------------------------------------- ordinary tasks


def log_likelihoods(model, pairs):
    """For each pair of ids (context, continuation): the continuation's summed log-likelihood in nats, and whether greedy decoding gives it."""
    result = [None] * len(pairs)
    longest_first = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    with tqdm(total=len(pairs), leave=False, disable=None) as bar:
        for batch in batched(longest_first, lambda i: sum(map(len, pairs[i])), model):
            for i, h in zip(batch, last_hidden(model, [(pairs[i][0] + pairs[i][1])[:-1] for i in batch])):
                context, continuation = pairs[i]
                logits = model.head(h[len(context) - 1 : len(context) + len(continuation) - 1]).float()
                targets = torch.tensor(continuation, device=h.device)
                nats = torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
                result[i] = -nats, bool((logits.argmax(-1) == targets).all())
            bar.update(len(batch))
    return result


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


def fingerprint(folder):
    """Of a model folder, in milliseconds: of its small files all, of its weights 16 samples a file."""
    key = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".model", ".safetensors")):
        size = path.stat().st_size
        key.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as f:
            for i in range(16):
                f.seek(size * i // 16)
                key.update(f.read(2**16))
    return key.hexdigest()[:16]


def choose(documents, args, lengths):
    """The longest documents; UserError if none has the shortest length (with --tail the longest: all lengths score the same tokens)."""
    needed = lengths[-1] if args.tail else lengths[0]
    documents = sorted((documents[i] for i in range(len(documents))), key=len, reverse=True)[: args.documents]
    if len(documents[0]) < needed:
        longest = len(documents[0])
        raise UserError(f"--data: no document has {needed} tokens, the longest has {longest}; add longer texts or lower --lengths")
    return documents


def settings(args, names, lengths):
    """What two calls must share for their results to stand in one file. Further lengths may be added, unless the longest says what is scored."""
    shared = {"task": args.task, "model": names, "device": args.device}
    shared |= {f"weights of {name}": fingerprint(weights.resolve(name)) for name in names}
    if args.task in ("passkey", "needle"):
        shared |= {key: getattr(args, key) for key in ("trials", "seed", "generate")}
    if args.task == "needle":
        shared["keys"] = args.keys
    if args.task == "ppl":
        shared |= {key: getattr(args, key) for key in ("documents", "stride", "tail", "by_position")} | {"lengths": lengths}
    if args.task == "benchmarks":
        shared["limit"] = args.limit
    if args.task != "passkey":
        files = harness.find_files(args.data).values() if args.task == "benchmarks" else data.find_files(args.data)
        shared |= {"data": args.data, "bytes of data": sum(path.stat().st_size for path in files)}
    return shared


def read_reports(path, shared):
    """The reports that an earlier call left in a --json file, one a model. UserError if they are of another evaluation."""
    try:
        written = json.loads(path.read_text())
        earlier, last = written["settings"], {key: written[key] for key in ("task", "model", "results")}
        reports = [*written.get("compared", []), last]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"--json {path}: holds no results to go on from; remove it or name another file") from None
    if changed := [key for key in shared if earlier.get(key) != shared[key]]:
        what = "; ".join(f"{key} was {earlier.get(key)}, now {shared[key]}" for key in changed)
        raise UserError(f"--json {path}: holds results of another evaluation ({what}); remove it or name another file")
    return reports


def write_reports(path, shared, reports):
    """Aside, then renamed: a kill leaves the earlier file whole. The last model stands on top, the others under `compared`."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(reports[-1] | ({"compared": reports[:-1]} if reports[:-1] else {}) | {"settings": shared}, indent=2) + "\n")
    os.replace(aside, path)


def percent(share):
    return "" if share is None else f"{share:.0%}"


def figure(result):
    """The figure of a result and its uncertainty, two cells of the table."""
    if "accuracy" in result:
        return percent(result["accuracy"]), "{:.0f}-{:.0f}%".format(*(100 * share for share in result["interval"]))
    value, show = (result["ppl"], "{:,.2f}") if "ppl" in result else (result["score"], "{:.1%}")
    return [sign + show.format(x) if x is not None else "-" for sign, x in (("", value), ("± ", result["standard_error"]))]


def gain(first, result):
    """Mean change of the loss from one length to another, in nats a token, and its error over documents: both scored the same tokens (--tail)."""
    a, b = ([document["nats"] / document["tokens"] for document in r["by_document"]] for r in (first, result))
    change = np.subtract(b, a)
    return f"{change.mean():+.3f}" + (f" ± {change.std(ddof=1) / math.sqrt(len(change)):.3f}" if len(change) > 1 else "")


def print_table(reports, units, args):
    """Lengths (or benchmarks) from top to bottom, in each the models one below the other."""
    if args.task in ("passkey", "needle"):
        head = ["correct", "95% interval", *(f"{100 * i // DEPTHS}-{100 * (i + 1) // DEPTHS}% deep" for i in range(DEPTHS))]
    elif args.task == "ppl":
        head = ["perplexity", "± error", "documents", "left out", "tokens scored"] + ([f"loss against {units[0]:,}"] if args.tail else [])
    else:
        head = ["score", "± error", "metric", "shots", "items"]
    rows = [["length" if args.task != "benchmarks" else "", args.task, *head]]
    for unit, results in zip(units, zip(*(report["results"] for report in reports))):
        for report, r in zip(reports, results):
            label = "" if r is not results[0] else unit if args.task == "benchmarks" else f"{unit:,}"
            row = [label, report["model"] + "*" * r.get("beyond_window", False), *figure(r)]
            if args.task in ("passkey", "needle"):
                row += map(percent, by_depth(r["by_trial"], DEPTHS))
            elif args.task == "ppl":
                row += [f"{r[key]:,}" for key in ("documents", "left_out", "tokens")] + ([gain(report["results"][0], r)] if args.tail else [])
            else:
                row += [r["metric"], str(r["shots"]), f"{r['items']:,}"]
            rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" if i == 1 else f"{cell:>{width}}" for i, (cell, width) in enumerate(zip(row, widths))).rstrip())
    if any(r.get("beyond_window") for report in reports for r in report["results"]):
        print("* longer than the window that the model was made for")
    if args.by_position:
        print_positions(reports)
    if args.generate:
        trials = [t for report in reports for r in report["results"] for t in r["by_trial"]]
        print(f"greedy decoding and one-pass scoring give the same verdict on {sum(t['agrees'] for t in trials)} of {len(trials)} prompts")
    for report in reports if args.task != "benchmarks" else ():
        print(report["model"], conclude(report["results"], args.task))


def print_positions(reports):
    """The loss by position in the longest windows that were filled."""
    for report in reports:
        r = [r for r in report["results"] if r["documents"]][-1]
        ranges = ", ".join(f"{b['from']:,}-{b['to'] - 1:,} {b['loss']:.3f}" for b in r["by_position"])
        print(f"{report['model']}, nats a token by position in windows of {r['length']:,}: {ranges}")


def conclude(results, task):
    """What the results of a model say, in words."""

    def reach(holds):  # the longest length to which it holds at every one
        return next((results[i - 1] for i, r in enumerate(results) if not holds(r)), results[-1])["length"]

    if task in ("passkey", "needle"):
        if results[0]["accuracy"] < 0.95:
            return f"is below 95% already at {results[0]['length']:,} tokens"
        return f"works to {reach(lambda r: r['accuracy'] >= 0.95):,} tokens (95% or more at every length)"
    results = [r for r in results if r["documents"]]
    limit = 1.05 * results[0]["ppl"]
    held = reach(lambda r: r["ppl"] <= limit)
    return f"holds its perplexity to {held:,} tokens (at no length more than 5% above that at {results[0]['length']:,})"


def draw(reports, task, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if task == "needle":
        figure, axes = pyplot.subplots(1, len(reports), figsize=(1 + 5 * len(reports), 4), layout="constrained", squeeze=False)
        for a, report in zip(axes[0], reports):
            cells = np.array([by_depth(r["by_trial"], GRID) for r in report["results"]], dtype=float).T  # (GRID, lengths), NaN: no trial
            image = a.imshow(cells * 100, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
            a.set_xticks(range(cells.shape[1]), [f"{r['length']:,}" + "*" * r["beyond_window"] for r in report["results"]], rotation=30)
            a.set_yticks(np.arange(GRID + 1) - 0.5, [f"{100 * i // GRID}%" for i in range(GRID + 1)])
            a.set(title=report["model"], xlabel="length, tokens (* beyond the window)", ylabel="depth of the answer in the text")
        figure.colorbar(image, ax=axes, label="right answers, %")
        return figure.savefig(path, dpi=150)

    if task == "benchmarks":
        figure, a = pyplot.subplots(figsize=(8, 4), layout="constrained")
        for i, report in enumerate(reports):
            scores, errors = ([100 * r[key] for r in report["results"]] for key in ("score", "standard_error"))
            width = 0.8 / len(reports)
            a.bar(np.arange(len(scores)) + (i + 0.5) * width - 0.4, scores, width, yerr=errors, label=report["model"])
        a.set_xticks(range(len(scores)), [r["benchmark"] for r in report["results"]])
        a.set(ylabel="score, % (± standard error)", ylim=(0, 100))
        a.legend()
        return figure.savefig(path, dpi=150)

    by_position = "by_position" in reports[0]["results"][0]
    figure, axes = pyplot.subplots(1, 1 + by_position, figsize=(6 + 6 * by_position, 4), layout="constrained", squeeze=False)
    for report in reports:
        results = [r for r in report["results"] if r.get("documents", 1)]
        lengths, values = [r["length"] for r in results], [100 * r["accuracy"] if task == "passkey" else r["ppl"] for r in results]
        if task == "passkey":
            errors = np.abs(np.transpose([r["interval"] for r in results]) * 100 - values)
        else:
            errors = [r["standard_error"] or 0 for r in results]
        axes[0, 0].errorbar(lengths, values, errors, marker="o", capsize=3, label=report["model"])
        if by_position:
            bins = results[-1]["by_position"]
            label = f"{report['model']}, windows of {lengths[-1]:,}"
            axes[0, 1].stairs([b["loss"] for b in bins], [bins[0]["from"], *(b["to"] for b in bins)], baseline=None, label=label)
    for a in axes[0]:
        a.set_xscale("log", base=2)
        a.grid(alpha=0.3)
        a.legend()
    ticks = sorted({r["length"] for report in reports for r in report["results"]})
    axes[0, 0].set_xticks(ticks, [f"{n:,}" for n in ticks], rotation=30)
    axes[0, 0].set_xlabel("length, tokens")
    if task == "passkey":
        axes[0, 0].set(ylabel="passkey accuracy, % (Wilson's 95% interval)", ylim=(-5, 105))
    else:
        axes[0, 0].set(ylabel="perplexity (± standard error)", yscale="log")
    if by_position:
        axes[0, 1].set(xlabel="position in the window", ylabel="loss, nats a token")
    figure.savefig(path, dpi=150)


@torch.no_grad()
def main():
    args = parse_arguments()
    check(args)
    names = args.model or default_models()
    configs = [weights.read_config(weights.resolve(name)) for name in names]
    if args.task == "benchmarks":
        files = harness.find_files(args.data)
        units = list(files)
    else:
        units = parse_lengths(args.lengths, configs)
    if args.tail and args.tail >= units[0]:
        raise UserError(f"--tail {args.tail}: leaves no context in a length of {units[0]}; lower it or raise --lengths")
    shared = settings(args, names, units) if args.json else None
    if args.json and args.json.exists():
        reports = read_reports(args.json, shared)
    else:
        reports = [{"task": args.task, "model": name, "results": []} for name in names]

    key = "benchmark" if args.task == "benchmarks" else "length"
    for name, config, report in zip(names, configs, reports):
        missing = [unit for unit in units if unit not in [r[key] for r in report["results"]]]
        if not missing:
            continue
        model = weights.load(name, args.device, torch.bfloat16 if args.device == "cuda" else torch.float32)
        tokenizer = weights.load_tokenizer(name, config)
        if args.task in ("needle", "ppl"):
            documents = data.prepare(args.data, tokenizer, weights.cache_dir())
        if args.task == "ppl":
            documents = choose(documents, args, units)
        for unit in missing:
            if args.task == "passkey":
                result = passkey(model, tokenizer, unit, args.trials, args.seed, args.generate)
            elif args.task == "needle":
                result = needle(model, tokenizer, documents.tokens, unit, args.trials, args.seed, args.keys, args.generate)
            elif args.task == "ppl":
                stride = args.stride or (unit if args.by_position else max(1, min(unit // 2, 16384)))
                result = perplexity(model, tokenizer, unit, documents, units[-1], stride, args.tail, args.by_position)
            else:
                lm = harness.as_model(config, tokenizer, functools.partial(log_likelihoods, model))
                result = harness.evaluate(unit, files, lm, args.limit)
            if args.task != "benchmarks":
                result["beyond_window"] = unit > config.max_position_embeddings
            report["results"] = sorted([*report["results"], result], key=lambda r: r[key]) if key == "length" else [*report["results"], result]
            if args.json:
                write_reports(args.json, shared, reports)
            tqdm.write(f"{name}, {args.task} {unit if key == 'benchmark' else f'{unit:,}'}: {' '.join(figure(result))}", file=sys.stderr)
        del model

    asked = [report | {"results": [r for r in report["results"] if r[key] in units]} for report in reports]
    print_table(asked, units, args)
    if args.plot:
        draw(asked, args.task, args.plot)
        print(f"wrote {args.plot}", file=sys.stderr)


if __name__ == "__main__":
    errors.run(main)
