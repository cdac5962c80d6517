"""Does the longer window work? Retrieval, RULER, perplexity and ordinary tasks (section 4 of the paper).

    python eval.py --task passkey          # what train.py wrote last, beside the model it came from
    python eval.py --task needle --data book.txt --plot grid.png
    python eval.py --task ruler --data book.txt --lengths 4096,32768
    python eval.py --task ppl --data book.txt --lengths 2048,8192,32768 --tail 1024
    python eval.py --task ppl --data book.txt --lengths 2048,8192 --all
    python eval.py --task benchmarks --data folder/      # through lm-evaluation-harness

A task is a row of TASKS: its options, the function that measures it, and how tasks/report.py and
tasks/plots.py show it. What it asks the model is in tasks/prompts.py, tasks/ruler.py and tasks/harness.py.

Notable choices:
- One forward pass a prompt: greedy decoding gives the answer exactly when every token of the answer is the
  argmax given the ones before it, and the token after it does not make the number go on. No KV cache is
  needed, and only the hidden states of scored tokens meet the vocabulary. RULER looks for answers anywhere
  in what is said, so that there the model generates.
- A length is exact: so many tokens are in the prompt with its answer, or in the window with its BOS.
- Perplexity is weighted by token. A document is cut to the longest length asked for, so that every length
  that it fills scores the same text; with `--all` it is scored whole at each of them, by windows that slide
  over it. A document too short for a length is left out there, and lengths with different documents are not
  compared in words. With `--tail` all lengths score the same tokens.
- Every figure has its uncertainty beside it: Wilson's 95% interval of a share, one standard error over
  documents of a perplexity or over prompts of RULER's mean.
"""

import functools
import itertools
import math
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from cli import arguments, process
from hf import weights
from hf.builtin import default_model, open_model
from hf.tokenizer import bos_ids, stop_ids
from storage import texts
from storage.errors import InputError
from storage.files import cache_dir, is_stream
from storage.values import read_record
from tasks import harness, plots, report, ruler
from tasks.prompts import CITIES, digit_tokens, needle_prompt, passkey_prompt

# ---------------------------------------------------------------- one forward pass


def last_hidden(model, rows):
    """Return the normed last hidden states of `rows`, lists of token ids, in one forward pass.

    Shape (len(rows), tokens of the longest, C). Shorter rows are padded after their end, where causal
    attention never looks.
    """
    longest = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    positions = torch.arange(longest).repeat(len(rows), 1)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        # Where angles depend on the length of a row, padding must not make it longer.
        positions[i, len(row) :] = len(row) - 1
    device = model.embed.weight.device
    return model.hidden(tokens.to(device), positions.to(device))


def tokens_a_pass(model):
    """Return how many tokens, with padding, one forward pass takes."""
    return 65536 if model.embed.weight.is_cuda else 8192


def tokens_a_cache(model):
    """Return how many tokens' keys and values fill half of the GPU's free memory, at least tokens_a_pass."""
    if not model.embed.weight.is_cuda:
        return tokens_a_pass(model)
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    config = model.config
    numbers_a_token = 2 * config.n_layers * config.n_kv_heads * config.head_dim  # keys and values
    return max(tokens_a_pass(model), free // 2 // (numbers_a_token * model.hidden_dtype.itemsize))


def batched(items, size, most_tokens):
    """Yield lists of consecutive items, each as long as most_tokens allows, padding included.

    An item with more tokens than that comes alone. size(item): the tokens of an item.
    """
    batch, longest = [], 0
    for item in items:
        longest = max(longest, size(item))
        if batch and longest * (len(batch) + 1) > most_tokens:
            yield batch
            batch, longest = [], size(item)
        batch.append(item)
    if batch:
        yield batch


# ---------------------------------------------------------------- retrieval


class Trial(NamedTuple):
    """A prompt with a known answer. depth: from 0 to 1, where in the text the answer stands."""

    depth: float
    prompt: list  # token ids
    answer: list  # token ids


def retrieval(model, tokenizer, length, trials, seed, make_prompt, generate, task):
    """Measure how often the model finds an answer that stands in its prompt. Return an entry of `results`.

    The trials are at evenly spaced depths, each with a key of its own. make_prompt(depth, rng): a function
    that returns the token ids of a prompt of `length` tokens and of its answer. generate: also decode each
    answer token by token and record whether the verdict is the same. task: a name for the progress bar.
    """

    def draw(number):
        depth = (number + 0.5) / trials
        rng = np.random.default_rng((seed, length, number))
        return Trial(depth, *make_prompt(depth, rng))

    digits = digit_tokens(tokenizer)
    by_trial = []
    with tqdm(total=trials, desc=f"{task} {length:,}", leave=False, disable=None) as bar:
        all_trials = map(draw, range(trials))  # each is drawn when its batch takes it
        for batch in batched(all_trials, lambda trial: length, tokens_a_pass(model)):
            for trial, correct in zip(batch, greedy_verdicts(model, batch, digits)):
                entry = {"depth": trial.depth, "correct": correct}
                if generate:
                    entry |= check_by_decoding(model, tokenizer, trial, correct)
                by_trial.append(entry)
            right = sum(entry["correct"] for entry in by_trial)
            bar.update(len(batch))
            bar.set_postfix(right=f"{right / len(by_trial):.0%}")
    return {
        "length": length,
        "trials": trials,
        "accuracy": right / trials,
        "interval": report.wilson(right, trials),
        "by_trial": by_trial,
    }


def greedy_verdicts(model, trials, digits):
    """Return for each trial whether greedy decoding would say its answer and then end the number.

    digits: the set of token ids that would make the number go on. One forward pass.
    """
    verdicts = []
    rows = [trial.prompt + trial.answer for trial in trials]
    for hidden, trial in zip(last_hidden(model, rows), trials):
        # A token is predicted from the one before it: from the last of the prompt on, one token more than
        # the answer has.
        before = hidden[len(trial.prompt) - 1 : len(trial.prompt) + len(trial.answer)]
        *said, following = model.head(before).argmax(-1).tolist()
        verdicts.append(said == trial.answer and following not in digits)
    return verdicts


def check_by_decoding(model, tokenizer, trial, correct):
    """Decode the answer token by token with a KV cache. Return what was said, and if `correct` agrees."""
    prompt = torch.tensor([trial.prompt], device=model.embed.weight.device)
    said = tokenizer.decode(model.generate(prompt, len(trial.answer) + 1)[0].tolist())
    number = re.match(r"\s*(\d*)", said)[1]
    right = number == tokenizer.decode(trial.answer).strip()
    return {"said": said, "agrees": correct == right}


def passkey(model, tokenizer, length, trials, seed, generate=False):
    """Measure the paper's passkey retrieval (section 4.2). Return an entry of `results`, see `retrieval`."""

    def make_prompt(depth, rng):
        key = str(rng.integers(10000, 100000))
        return passkey_prompt(tokenizer, length, depth, key)

    return retrieval(model, tokenizer, length, trials, seed, make_prompt, generate, "passkey")


def needle(model, tokenizer, corpus, length, trials, seed, keys, generate=False):
    """Measure how often the model finds one of `keys` codes in real text. Return an entry of `results`.

    corpus: a 1-d array of token ids, from which the text is taken. The rest is as in `retrieval`.
    """

    def make_prompt(depth, rng):
        return needle_prompt(tokenizer, corpus, length, depth, rng, keys)

    return retrieval(model, tokenizer, length, trials, seed, make_prompt, generate, "needle")


# ---------------------------------------------------------------- RULER


def measure_ruler(model, tokenizer, corpus, length, samples, seed):
    """Measure the score of the model in each task of RULER at one length. Return an entry of `results`.

    samples: prompts a task. corpus: a 1-d array of token ids, the texts that some tasks hide needles in.
    """
    by_task = {}
    total = samples * len(ruler.TASKS)
    with tqdm(total=total, desc=f"ruler {length:,}", leave=False, disable=None) as bar:
        for task in ruler.TASKS:
            draw = functools.partial(ruler.make_prompt, task, tokenizer, length, seed=seed, corpus=corpus)
            scores = []
            for batch in batched(map(draw, range(samples)), lambda prompt: length, tokens_a_cache(model)):
                for prompt, said in zip(batch, continuations(model, tokenizer, batch)):
                    scores.append(ruler.score(said, prompt.references))
                bar.update(len(batch))
            # Scores between 0 and 1 spread no more than right and wrong answers do, so this interval of a
            # share is wide enough for their mean.
            interval = report.wilson(sum(scores), samples)
            by_task[task] = {"score": sum(scores) / samples, "interval": interval, "by_sample": scores}
            bar.set_postfix_str(f"{task} {by_task[task]['score']:.0%}")
    mean, error = report.over_tasks([entry["by_sample"] for entry in by_task.values()])
    return {
        "length": length,
        "samples": samples,
        "score": mean,
        "standard_error": error,
        "by_task": by_task,
    }


def continuations(model, tokenizer, prompts):
    """Return what greedy decoding says after each of these prompts of one task, up to a stop, texts."""
    rows = [torch.tensor(prompt.ids) for prompt in prompts]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.embed.weight.device)
    stops = stop_ids(tokenizer, model.config)
    lengths = [len(row) for row in rows]
    prefill_tokens = max(256, tokens_a_pass(model) // len(rows))
    n_new = prompts[0].tokens_to_generate
    new_tokens = model.generate(tokens, n_new, lengths, stops, prefill_tokens)
    said = []
    for ids in new_tokens.tolist():
        before_stop = itertools.takewhile(lambda token: token not in stops, ids)
        said.append(tokenizer.decode(list(before_stop)))
    return said


# ---------------------------------------------------------------- perplexity


class Window(NamedTuple):
    """Token ids that one forward pass reads. The ones from index `first` on are scored."""

    document: int  # index of the document that they are from
    ids: list
    first: int


def perplexity(model, tokenizer, length, documents, longest, stride, tail=None, by_position=False):
    """Measure perplexity, exp of the mean loss over all scored tokens. Return an entry of `results`.

    documents: 1-d arrays of token ids. Each is cut to `longest` tokens (None: it stays whole) and read in
    windows of `length` that move on by `stride`; documents with fewer than `length` tokens are left out.
    tail: read one window of each document instead and score its last `tail` tokens; all lengths must score
    the same tokens then, so documents with fewer than `longest` are left out. by_position: add the loss by
    position in the window. Raise InputError if a loss is not finite.
    """
    bos = bos_ids(tokenizer)  # before every window, part of its length
    needed = longest if tail else length
    long_enough = [document for document in documents if len(document) >= needed]
    if tail:
        windows = tail_windows(long_enough, bos, length, tail)
        total = tail * len(long_enough)
    else:
        end = None if longest is None else longest - len(bos)
        cut = [document[:end] for document in long_enough]
        windows = sliding_windows_of_documents(cut, bos, length, stride)
        total = sum(map(len, cut))
    # The edges of the ranges of positions whose losses are summed apart.
    edges = [0, *arguments.doubling(16, length), length] if by_position else [0, length]

    nats = np.zeros((len(long_enough), len(edges) - 1))  # by document and range of positions
    count = np.zeros_like(nats)  # of scored tokens
    in_tokens = {"unit": " tokens", "unit_scale": True}
    with tqdm(total=total, desc=f"ppl {length:,}", leave=False, disable=None, **in_tokens) as bar:
        for batch in batched(windows, lambda window: len(window.ids), tokens_a_pass(model)):
            for window, (losses, scored) in zip(batch, losses_by_position(model, batch, edges)):
                nats[window.document] += losses
                count[window.document] += scored
                bar.update(len(window.ids) - window.first)
            bar.set_postfix(ppl=f"{math.exp(min(nats.sum() / count.sum(), 700)):.2f}")
    if not np.isfinite(nats).all():
        raise InputError(f"length {length}: the loss is not finite; look at the weights of this model")

    result = {"length": length, "tail": tail, "cut_to": None if tail else longest}
    result |= {"documents": len(long_enough), "left_out": len(documents) - len(long_enough)}
    result |= summary_by_document(nats.sum(1), count.sum(1))
    if by_position:
        result["by_position"] = summary_by_position(nats.sum(0), count.sum(0), edges)
    return result


def tail_windows(documents, bos, length, tail):
    """Yield one Window of `length` tokens for each document, at its end, of which the last `tail` count."""
    for i, document in enumerate(documents):
        ids = bos + document[len(bos) - length :].tolist()
        yield Window(i, ids, length - tail)


def sliding_windows_of_documents(documents, bos, length, stride):
    """Yield the Windows that score each token of each document once."""
    room = length - len(bos)
    if not bos:
        stride = min(stride, room - 1)  # the first scored token of a window needs one before it
    stride = max(1, min(stride, room))
    for i, document in enumerate(documents):
        text = document.tolist()
        for begin, scored_from, end in sliding_windows(len(text), room, stride):
            first = len(bos) + scored_from - begin
            yield Window(i, bos + text[begin:end], max(first, 1))  # nothing predicts a text's first token


def sliding_windows(n, window, stride):
    """Yield (begin, scored_from, end) over n tokens, each of which is scored once.

    Windows begin at multiples of the stride, so that the last one may be shorter than the others.
    """
    scored = 0
    for begin in range(0, n, stride):
        end = min(begin + window, n)
        yield begin, scored, end
        scored = end
        if end == n:
            return


def losses_by_position(model, windows, edges):
    """Yield for each window its summed losses in nats and its numbers of scored tokens, two 1-d arrays.

    Each has an entry for each range of positions between two edges. All windows take one forward pass.
    """
    all_hidden = last_hidden(model, [window.ids for window in windows])
    for hidden, window in zip(all_hidden, windows):
        targets = torch.tensor(window.ids, device=hidden.device)
        scored_edges = np.clip(edges, window.first, len(window.ids))
        sums = np.zeros(len(edges) - 1)
        for i, (low, high) in enumerate(pairwise(scored_edges.tolist())):
            if low < high:  # the token at position p is predicted from the hidden state at p - 1
                sums[i] = model.loss(hidden[low - 1 : high - 1], targets[low:high]).item()
        yield sums, np.diff(scored_edges)


def summary_by_document(nats, count):
    """Return what `results` say of summed losses and numbers of tokens by document, two 1-d arrays."""
    ppl, error = report.over_documents(nats, count) if len(nats) else (None, None)
    by_document = [{"tokens": int(n), "nats": loss} for n, loss in zip(count, nats)]
    return {"tokens": int(count.sum()), "ppl": ppl, "standard_error": error, "by_document": by_document}


def summary_by_position(nats, count, edges):
    """Return the mean loss of each range of positions in which tokens were scored, a list of dicts."""
    ranges = []
    for (begin, end), n, loss in zip(pairwise(edges), count, nats):
        if n:
            ranges.append({"from": begin, "to": end, "tokens": int(n), "loss": loss / n})
    return ranges


# ---------------------------------------------------------------- ordinary tasks


def log_likelihoods(model, pairs):
    """Return for each pair (context, continuation) of lists of ids how likely the continuation is.

    That is its summed log-likelihood in nats, and whether greedy decoding gives it.
    """
    # Answers of one token to the same question are predicted by the same row, which is read once.
    pairs_of_row = {}
    for i, (context, continuation) in enumerate(pairs):
        row = (*context, *continuation[:-1])  # the last token is never read, only predicted
        pairs_of_row.setdefault(row, []).append(i)

    result = [None] * len(pairs)
    longest_first = sorted(pairs_of_row, key=len, reverse=True)
    with tqdm(total=len(longest_first), leave=False, disable=None) as bar:
        for batch in batched(longest_first, len, tokens_a_pass(model)):
            for row, hidden in zip(batch, last_hidden(model, batch)):
                for i in pairs_of_row[row]:
                    _, continuation = pairs[i]
                    targets = torch.tensor(continuation, device=hidden.device)
                    logits = model.head(hidden[len(row) - len(targets) : len(row)]).float()
                    nats = F.cross_entropy(logits, targets, reduction="sum").item()
                    is_greedy = bool((logits.argmax(-1) == targets).all())
                    result[i] = (-nats, is_greedy)
            bar.update(len(batch))
    return result


# ---------------------------------------------------------------- the tasks
# Each prepare function returns a function that measures one length (or one benchmark) and returns its entry
# of `results`. lengths: all that are asked for, ascending.


def prepare_passkey(args, model, tokenizer, lengths):
    def measure(length):
        return passkey(model, tokenizer, length, args.trials, args.seed, args.generate)

    return measure


def prepare_needle(args, model, tokenizer, lengths):
    corpus = data.tokenised(args.data, tokenizer, cache_dir(), args.text_key).tokens

    def measure(length):
        return needle(model, tokenizer, corpus, length, args.trials, args.seed, args.keys, args.generate)

    return measure


def prepare_ruler(args, model, tokenizer, lengths):
    corpus = data.tokenised(args.data, tokenizer, cache_dir(), args.text_key).tokens
    ruler.check_length(tokenizer, lengths[0], args.seed, corpus)

    def measure(length):
        return measure_ruler(model, tokenizer, corpus, length, args.samples, args.seed)

    return measure


def prepare_perplexity(args, model, tokenizer, lengths):
    shortest, longest = lengths[0], lengths[-1]
    documents = data.tokenised(args.data, tokenizer, cache_dir(), args.text_key)
    chosen = longest_documents(documents, args.documents, needed=longest if args.tail else shortest)

    def measure(length):
        if args.stride:
            stride = args.stride
        elif args.by_position:
            stride = length
        else:
            stride = max(1, min(length // 2, 16384))
        cut_to = None if args.all else longest
        result = perplexity(model, tokenizer, length, chosen, cut_to, stride, args.tail, args.by_position)
        return result | {"text_tokens": len(documents.tokens)}

    return measure


def longest_documents(documents, count, needed):
    """Return the longest `count` documents, all for None. Raise InputError if none has `needed` tokens."""
    by_length = sorted(documents, key=len, reverse=True)
    has = len(by_length[0])
    if has < needed:
        wanted = f"no document has {needed} tokens, the longest has {has}"
        raise InputError(f"--data: {wanted}; add longer texts or lower --lengths")
    return by_length[:count]


def prepare_benchmarks(args, model, tokenizer, names):
    lm = harness.as_model(model.config, tokenizer, functools.partial(log_likelihoods, model))
    (folder,) = args.data
    files = harness.find_files(folder)
    for name in names:
        harness.task_config(name, files[name])  # so that items that lack show before hours of work

    def measure(name):
        return harness.evaluate(name, files[name], lm, args.limit)

    return measure


class Task(NamedTuple):
    """A row of TASKS: all that the command knows of one task."""

    options: tuple  # that belong to it; its results depend on them
    prepare: Callable  # one of the functions above
    table: report.Table
    draw: Callable  # one of the functions in tasks/plots.py
    unit: str = "length"  # what an entry of `results` is of: a length, or a benchmark
    may_add_lengths: bool = True  # to a file of results; False where the longest says what is scored
    shortest: int = 256  # of the default lengths, in tokens: its prompts need so many


TASKS = {
    "passkey": Task(
        options=("trials", "seed", "generate"),
        prepare=prepare_passkey,
        table=report.AccuracyTable(),
        draw=plots.draw_accuracy,
    ),
    "needle": Task(
        options=("trials", "seed", "generate", "keys", "data", "text_key"),
        prepare=prepare_needle,
        table=report.AccuracyTable(),
        draw=plots.draw_accuracy_grids,
    ),
    "ruler": Task(
        options=("samples", "seed", "data", "text_key"),
        prepare=prepare_ruler,
        table=report.RulerTable(),
        draw=plots.draw_ruler,
        shortest=2048,
    ),
    "ppl": Task(
        options=("documents", "stride", "tail", "by_position", "all", "data", "text_key"),
        prepare=prepare_perplexity,
        table=report.PerplexityTable(for_more="--all scores them all"),
        draw=plots.draw_perplexity,
        may_add_lengths=False,
    ),
    "benchmarks": Task(
        options=("limit", "data"),
        prepare=prepare_benchmarks,
        table=report.ScoreTable(),
        draw=plots.draw_scores,
        unit="benchmark",
    ),
}


# ---------------------------------------------------------------- the command

# argparse must not fill these in: an option that is given and belongs to another task is refused.
DEFAULTS = {"trials": 50, "seed": 0, "keys": 4, "samples": 25, "documents": 50, "text_key": "text"}


def parse_arguments():
    p = arguments.ArgumentParser(description="Retrieval, RULER, perplexity by length, and ordinary tasks.")
    # fmt: off
    p.add_argument("--task", choices=TASKS, required=True,
        help="the README's table says what each tells")
    p.add_argument("--model", type=arguments.path_name, nargs="+", action="extend",
        help="folders or built-in names (default: the base and the result of the run in out/, else the "
        "built-in one)")
    p.add_argument("--lengths", type=arguments.token_counts(least=2), metavar="TOKENS,…",
        help="tokens, comma-separated (default: doubling from the original window, where it is recorded, to "
        "the longest)")
    p.add_argument("--trials", type=arguments.whole_number(1),
        help="passkey, needle: prompts per length (default: 50)")
    p.add_argument("--seed", type=arguments.whole_number(0, arguments.LARGEST_SEED),
        help="passkey, needle, ruler: of the keys and their places (default: 0)")
    p.add_argument("--keys", type=arguments.whole_number(1),
        help="needle: codes in the text, one of which is asked for (default: 4)")
    p.add_argument("--samples", type=arguments.whole_number(1),
        help="ruler: prompts per task and length (default: 25; NVIDIA takes 500)")
    p.add_argument("--generate", action="store_true",
        help="passkey, needle: decode each answer token by token too, as a check")
    p.add_argument("--data", type=arguments.path_name, nargs="+", action="extend", default=[], metavar="FILE",
        help="needle, ruler, ppl: texts (default: Python's standard library); benchmarks: the folder with "
        "their files")
    p.add_argument("--text_key", metavar="KEY",
        help="needle, ruler, ppl: key of the text in JSON and Parquet (default: text)")
    p.add_argument("--documents", type=arguments.whole_number(1),
        help="ppl: use that many, the longest (default: 50), each to the longest of --lengths")
    p.add_argument("--all", action="store_true", default=None,  # None is also what earlier files recorded
        help="ppl: score every token of all documents that have enough of them (with --documents N, of the N "
        "longest)")
    p.add_argument("--stride", type=arguments.whole_number(1),
        help="ppl: tokens that the window moves on, at most a window (default: half of one, at most 16,384)")
    p.add_argument("--tail", type=arguments.whole_number(1), metavar="N",
        help="ppl: score the last N tokens of each document, the rest of the length before them")
    p.add_argument("--by_position", action="store_true",
        help="ppl: the loss by position in the window too (--stride then defaults to a window)")
    p.add_argument("--limit", type=arguments.whole_number(1), metavar="N",
        help="benchmarks: the first N items of each (default: all)")
    p.add_argument("--json", type=arguments.output_file(), metavar="FILE",
        help="write the results there after each length; the same call again goes on from them")
    p.add_argument("--plot", type=arguments.plot_file, metavar="FILE.png",
        help="draw them there")
    p.add_argument("--device", choices=("cuda", "cpu"),
        help="default: cuda if there is one")
    # fmt: on
    return p.parse_args()


def complete(args):
    """Refuse what cannot run, fill in the defaults and return the arguments."""
    args.device = process.device(args.device)
    tasks_of_option = {"lengths": [name for name, task in TASKS.items() if task.unit == "length"]}
    for name, task in TASKS.items():
        for option in task.options:
            tasks_of_option.setdefault(option, []).append(name)
    arguments.refuse_options_of_other_tasks(args, tasks_of_option)
    arguments.refuse_one_file_for_two(args)
    defaults = dict(DEFAULTS)
    if args.all:
        del defaults["documents"]  # None takes all of them
    for option, default in defaults.items():
        if getattr(args, option) is None:
            setattr(args, option, default)
    if args.keys > len(CITIES):
        raise InputError(f"--keys {args.keys}: at most {len(CITIES)}")
    for other in ("stride", "by_position", "all"):
        if args.tail and getattr(args, other):
            raise InputError(f"--tail {args.tail} scores one place of each document: leave out --{other}")
    if args.task == "benchmarks" and (len(args.data) != 1 or not Path(args.data[0]).is_dir()):
        raise InputError(f"--data: name one folder with files of {harness.EXPECTED_FILES}")
    return args


def default_models(device):
    """Return the base and the result of the run in out/; without one, the built-in model for a device."""
    out = Path("out")
    if not (out / "model" / "config.json").is_file() or not (out / "args.json").is_file():
        name = default_model(device)
        print(f"no run in out/, so this measures the built-in {name}; --model names another", file=sys.stderr)
        return [name]
    base = read_record(out / "args.json").get("model")
    if not isinstance(base, str):
        raise InputError(f"{out / 'args.json'}: names no model; name the models with --model")
    return [base, str(out / "model")]


def units_to_measure(args, configs):
    """Return the lengths in tokens, ascending, or the names of the benchmarks. configs: of all models."""
    if args.task == "benchmarks":
        (folder,) = args.data
        return list(harness.find_files(folder))
    lengths = args.lengths or default_lengths(configs, TASKS[args.task].shortest)
    if args.tail and args.tail >= lengths[0]:
        no_context = f"leaves no context in a length of {lengths[0]}"
        raise InputError(f"--tail {args.tail}: {no_context}; lower it or raise --lengths")
    return lengths


def default_lengths(configs, least):
    """Return lengths that double from the shortest window before any interpolation to the longest window.

    None is shorter than `least` tokens.
    """
    shortest = max(least, min(config.original_window for config in configs))
    longest = max(shortest, *(config.max_position_embeddings for config in configs))
    if shortest == longest:  # no window was made longer: show where it ends
        return [length for length in (shortest // 2, shortest, 2 * shortest) if length >= least]
    return [*arguments.doubling(shortest, longest), longest]


def result_settings(args, names, folders, units):
    """Return what two calls must share for their results to stand in one file, {setting: value}.

    names: of the models. folders: their CheckpointFolders. units: what is measured.
    """
    task = TASKS[args.task]
    settings = {"task": args.task, "model": names, "device": args.device}
    for option in task.options:
        settings[option] = getattr(args, option)
    for name, folder in zip(names, folders):
        settings[f"weights of {name}"] = folder.fingerprint()
    if not task.may_add_lengths:
        settings["lengths"] = units
    if "data" in task.options:
        settings["sha256 of data"] = texts.fingerprint(texts.find_files(args.data))
    return settings


@torch.no_grad()  # without gradients the blocks take a long text in slices, so that a million tokens fit
def measure_model(args, name, folder, units, missing):
    """Yield the result of each length (or benchmark) in `missing` of one model. units: all asked for."""
    if not missing:
        return  # without loading the model
    task = TASKS[args.task]
    model = weights.load(name, args.device, getattr(torch, process.compute_dtype(args.device)))
    measure = task.prepare(args, model, folder.load_tokenizer(), units)
    for unit in missing:
        result = measure(unit)
        if task.unit == "length":
            result["beyond_window"] = unit > folder.config.max_position_embeddings
        yield result


def main():
    args = complete(parse_arguments())
    with process.own_results(args.json):
        evaluate(args)


def evaluate(args):
    """Measure what the options say, and write, print and draw the results."""
    task = TASKS[args.task]
    keeps_results = args.json and not is_stream(args.json)  # a pipe gets them at the end, once
    names = list(dict.fromkeys(args.model or default_models(args.device)))  # each once
    for name in names:
        arguments.warn_if_half_trained(name)
    folders = [open_model(name) for name in names]  # all are checked before hours of work with the first
    units = units_to_measure(args, [folder.config for folder in folders])
    settings = result_settings(args, names, folders, units) if args.json else None
    if keeps_results and args.json.exists():
        reports = report.read(args.json, settings, task.table, task.unit)
    else:
        reports = [{"task": args.task, "model": name, "results": []} for name in names]
    for folder, of_model in zip(folders, reports):
        of_model["window"] = folder.config.max_position_embeddings
        of_model["original_window"] = folder.config.original_window

    for name, folder, of_model in zip(names, folders, reports):
        done = [result[task.unit] for result in of_model["results"]]
        missing = [unit for unit in units if unit not in done]
        for result in measure_model(args, name, folder, units, missing):
            of_model["results"].append(result)
            if task.unit == "length":  # it may be shorter than what an earlier call measured
                of_model["results"].sort(key=itemgetter("length"))
            if keeps_results:
                report.write(args.json, settings, reports)
            headline = " ".join(task.table.headline(result))
            tqdm.write(f"{name}, {args.task} {result[task.unit]}: {headline}", file=sys.stderr)

    for of_model in reports:  # a file may hold lengths that this call did not ask for
        of_model["results"] = [result for result in of_model["results"] if result[task.unit] in units]
    report.print_reports(reports, args.task, task.table)
    if args.plot:
        task.draw(reports, args.plot)
        print(f"wrote {args.plot}", file=sys.stderr)
    if args.json and not keeps_results:
        report.write(args.json, settings, reports)


if __name__ == "__main__":
    process.run(main)
