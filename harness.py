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


def arc(r):
    choices = r["question"]["choices"]
    texts, labels = [c["text"] for c in choices], [c["label"] for c in choices]
    labels.index(r["answerKey"])  # ValueError: the answer is none of the choices
    return {"question": r["question"]["stem"], "choices": {"text": texts, "label": labels}, "answerKey": r["answerKey"]}


def boolq(r):
    return {"passage": f"{r['title']} -- {r['passage']}", "question": r["question"], "label": int(r["answer"])}  # as SuperGLUE has it


def hellaswag(r):
    # The harness capitalises the second half of the context, an unfinished sentence; these files have the halves joined.
    context = re.sub(r"(?<=[.!?] )[a-z][^.!?]*$", lambda half: half[0].capitalize(), r["ctx"])
    return {"query": f"{r['activity_label']}: {context}", "choices": r["endings"], "label": int(r["label"])}


def truthfulqa(r):
    targets = {kind: {"choices": list(r[kind]), "labels": list(r[kind].values())} for kind in ("mc1_targets", "mc2_targets")}
    return {"question": r["question"]} | targets


def piqa(r):
    return {key: r[key] for key in ("goal", "sol1", "sol2", "label")}


def winogrande(r):
    return {key: r[key] for key in ("sentence", "option1", "option2", "answer")}


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
