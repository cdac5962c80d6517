"""What did the longer window cost on ordinary tasks (the paper's Table 3)? lm-evaluation-harness on local files, no network.

The tasks, prompts, few-shot examples and metrics are the harness's own (`pip install lm_eval`). This file gives it two things: the items, from
JSON Lines files that are turned into the layout its tasks expect, and our model behind its model interface.
"""
import functools
import gzip
import importlib.util
import json
import logging
import re
from pathlib import Path

from errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz")


def texts(*values):
    """Them; ValueError unless each is a text with something in it, which the harness does not look at."""
    if not all(isinstance(value, str) and value.strip() for value in values):
        raise ValueError(f"an answer that is no text in {values}")
    return list(values)


def number(names, answer):
    """Which of the names is the answer. ValueError if it is none of them."""
    return [str(name) for name in names].index(str(answer))


def arc(r):
    choices = r["question"]["choices"]
    choices = {"text": texts(*(c["text"] for c in choices)), "label": [c["label"] for c in choices]}
    number(choices["label"], r["answerKey"])
    return {"question": r["question"]["stem"], "choices": choices, "answerKey": r["answerKey"]}


def boolq(r):
    return {"passage": f"{r['title']} -- {r['passage']}", "question": r["question"], "label": (False, True).index(r["answer"])}  # as SuperGLUE


def hellaswag(r):
    # The harness capitalises the second half of the context, an unfinished sentence; these files have the halves joined.
    context = re.sub(r"(?<=[.!?] )[a-z][^.!?]*$", lambda half: half[0].capitalize(), r["ctx"])
    endings = texts(*r["endings"])
    return {"query": f"{r['activity_label']}: {context}", "choices": endings, "label": number(range(len(endings)), r["label"])}


def truthfulqa(r):
    targets = {kind: {"choices": texts(*r[kind]), "labels": list(r[kind].values())} for kind in ("mc1_targets", "mc2_targets")}
    return {"question": r["question"]} | targets


def piqa(r):
    first, second = texts(r["sol1"], r["sol2"])
    return {"goal": r["goal"], "sol1": first, "sol2": second, "label": number((0, 1), r["label"])}


def winogrande(r):
    first, second = texts(r["option1"], r["option2"])
    return {"sentence": r["sentence"], "option1": first, "option2": second, "answer": "12"[number((1, 2), r["answer"])]}


# File -> the harness's task, its metric, few-shot examples, one item of the file in the task's layout.
BENCHMARKS = {
    "boolq": ("boolq", "acc", 0, boolq),
    "piqa": ("piqa", "acc", 0, piqa),
    "winogrande": ("winogrande", "acc", 0, winogrande),
    "truthfulqa_mc": ("truthfulqa_mc2", "acc", 0, truthfulqa),
    "arc_challenge": ("arc_challenge", "acc_norm", 25, arc),
    "hellaswag": ("hellaswag", "acc_norm", 10, hellaswag),
}
SHOTS = {"arc_challenge": "arc_challenge_train"}  # the file of the few-shot examples; without one, other items of the same file


def find_files(paths):
    """{benchmark: {"test": file, "train": file of few-shot examples if it has one}} in the one folder of `paths`, in the order of BENCHMARKS."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--task benchmarks: lm-evaluation-harness is not installed here; pip install lm_eval")
    if len(paths) != 1 or not Path(paths[0]).is_dir():
        raise UserError(f"--task benchmarks: --data names one folder with files of {', '.join(BENCHMARKS)} ({' or '.join(SUFFIXES)})")
    files = {}
    for path in sorted(Path(paths[0]).iterdir()):
        name = path.name.removesuffix(".gz").removesuffix(".jsonl")
        if path.name.endswith(SUFFIXES):
            if name not in BENCHMARKS and name not in SHOTS.values():
                raise UserError(f"{path}: not a benchmark that this code knows; they are {', '.join(BENCHMARKS)}")
            files[name] = path
    found = {name: {"test": files[name]} for name in BENCHMARKS if name in files}
    if not found:
        raise UserError(f"--data {paths[0]}: no {', '.join(BENCHMARKS)} inside ({' or '.join(SUFFIXES)})")
    for name in SHOTS.keys() & found.keys():
        if SHOTS[name] not in files:
            raise UserError(f"{files[name]}: its few-shot examples, {SHOTS[name]}.jsonl, are missing beside it")
        found[name]["train"] = files[SHOTS[name]]
    return found


def read(path, convert):
    """The items of a JSON Lines file as the harness wants them, a datasets.Dataset. convert: one of the functions above, a line's object -> item.
    UserError if a line is none."""
    import datasets

    items, n = [], 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
            for n, line in enumerate(f, 1):
                if line.strip():
                    items.append(convert(json.loads(line)))
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, gzip.BadGzipFile, gzip.zlib.error) as error:
        raise UserError(f"{path}, line {n}: not an item of this benchmark ({type(error).__name__}: {error}); mend or remove it") from None
    if not items:
        raise UserError(f"{path}: is empty; remove it or copy it again")
    return datasets.Dataset.from_list(items)


def task_config(name, files):
    """The harness's own task, with the local items in the place of its download."""
    task, _, shots, convert = BENCHMARKS[name]
    splits = {split: read(path, convert) for split, path in files.items()}
    config = {"task": task, "num_fewshot": shots, "custom_dataset": lambda **_: splits, "dataset_path": str(files["test"])}
    config |= {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": "train" if "train" in files else "test"}
    return config | ({"process_docs": None} if name == "hellaswag" else {})  # which would do again what `hellaswag` did


def as_model(config, tokenizer, log_likelihoods):
    """Our model behind the harness's interface, which counts tokens as its `hf` model does. log_likelihoods: a list of (context, continuation),
    both lists of ids -> for each the continuation's summed log-likelihood in nats and whether greedy decoding gives it."""
    from lm_eval.api.model import TemplateLM

    class Model(TemplateLM):
        eot_token_id = config.eos_token_id
        prefix_token_id = config.eos_token_id if config.bos_token_id is None else config.bos_token_id  # before a text without context

        def tok_encode(self, string, add_special_tokens=None, **_):
            bos = [tokenizer.bos_id] if tokenizer.bos_id is not None and add_special_tokens is not False else []
            return bos + tokenizer.encode(string)

        def loglikelihood(self, requests, disable_tqdm=False):
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests, **_):
            room = config.max_position_embeddings + 1  # the last token is never read, only predicted
            # An answer that is longer stays whole, behind one token of its context.
            return log_likelihoods([((context + c)[-max(room, len(c) + 1) : -len(c)], c) for _, context, c in requests])

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            raise NotImplementedError("none of BENCHMARKS asks for it")

        generate_until = loglikelihood_rolling

    return Model()


@functools.cache
def task_manager():
    from lm_eval.tasks import TaskManager

    return TaskManager()  # reads some ten thousand files


def evaluate(name, files, lm, limit=None):
    """One entry of `results` of the benchmark `name`, on its first `limit` items. files: see find_files. lm: as_model's, or one of the harness."""
    import lm_eval

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    task, metric, shots, _ = BENCHMARKS[name]
    group = {"group": "local", "task": [task_config(name, files)]}  # in a group a registered task takes other settings and stays that task
    found = lm_eval.simple_evaluate(lm, tasks=[group], task_manager=task_manager(), limit=limit, log_samples=False)
    score, error = (found["results"][task][f"{key},none"] for key in (metric, f"{metric}_stderr"))
    error = None if error == "N/A" else float(error)  # of a single item
    items = found["n-samples"][task]["effective"]
    return {"benchmark": name, "metric": metric, "shots": shots, "items": items, "score": float(score), "standard_error": error}
