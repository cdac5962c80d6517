"""Run lm-evaluation-harness on local files: what did the longer window cost on ordinary tasks (Table 3)?

Tasks, prompts, few-shot examples and metrics are the harness's own (`pip install lm_eval`). This file gives
it two things: items, read from JSON Lines files and turned into the layout that its tasks expect, and our
model behind its model interface.
"""

import functools
import importlib.util
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hf.tokenizer import bos_ids
from storage.errors import InputError
from storage.texts import read_values
from storage.values import check_characters

JSON_LINES = (".jsonl", ".jsonl.gz")

# ---------------------------------------------------------------- items in the layout of the harness's tasks
# Each of these functions takes the object of one line and returns an item. It raises ValueError, KeyError,
# TypeError or AttributeError where the object is not an item of its benchmark.


def arc(line):
    """Return an item of the ARC challenge."""
    choices = line["question"]["choices"]
    labels = checked_texts(choice["label"] for choice in choices)
    answers = checked_texts(choice["text"] for choice in choices)
    answer = labels[index_of(labels, line["answerKey"])]  # the harness wants the label itself
    (question,) = checked_texts([line["question"]["stem"]])
    return {"question": question, "choices": {"text": answers, "label": labels}, "answerKey": answer}


def boolq(line):
    """Return an item of BoolQ in the layout of SuperGLUE."""
    title, passage, question = checked_texts(line[key] for key in ("title", "passage", "question"))
    if not isinstance(line["answer"], bool):
        raise ValueError(f"answer is {line['answer']!r}, neither true nor false")
    return {"passage": f"{title} -- {passage}", "question": question, "label": int(line["answer"])}


def hellaswag(line):
    """Return an item of HellaSwag, processed as the harness's own `process_docs` does."""
    activity, context = checked_texts([line["activity_label"], line["ctx"]])
    endings = checked_texts(line["endings"])
    # The harness capitalises the second half of the context, an unfinished sentence. These files have the
    # halves joined.
    context = re.sub(r"(?<=[.!?] )[a-z][^.!?]*$", lambda half: half[0].capitalize(), context)
    query = f"{activity}: {context}"
    if "[header]" in context:  # The data set's own file still has the tags of WikiHow.
        from lm_eval.tasks.hellaswag.utils import preprocess

        query, *endings = checked_texts(map(preprocess, [query, *endings]))
    return {"query": query, "choices": endings, "label": index_of(range(len(endings)), line["label"])}


def truthfulqa(line):
    """Return an item of TruthfulQA with several right answers (mc2)."""
    (question,) = checked_texts([line["question"]])
    item = {"question": question}
    for kind in ("mc1_targets", "mc2_targets"):
        labels = [index_of((0, 1), label) for label in line[kind].values()]
        item[kind] = {"choices": checked_texts(line[kind]), "labels": labels}
    return item


def piqa(line):
    """Return an item of PIQA."""
    goal, first, second = checked_texts(line[key] for key in ("goal", "sol1", "sol2"))
    return {"goal": goal, "sol1": first, "sol2": second, "label": index_of((0, 1), line["label"])}


def winogrande(line):
    """Return an item of WinoGrande."""
    sentence, first, second = checked_texts(line[key] for key in ("sentence", "option1", "option2"))
    if "_" not in sentence:
        raise ValueError("the sentence has no _ for the answer")
    answer = ("1", "2")[index_of((1, 2), line["answer"])]
    return {"sentence": sentence, "option1": first, "option2": second, "answer": answer}


def checked_texts(values):
    """Return the values as a list. Raise ValueError if there is none, or if one is no string or blank.

    The harness itself does not check that.
    """
    values = list(values)
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{value!r} where a text is due")
        check_characters(value)
    if not values:
        raise ValueError("no answers")
    return values


def index_of(names, answer):
    """Return the index of the answer among the names, compared as text. Raise ValueError if it is none."""
    names = [str(name) for name in names]
    if str(answer) not in names:
        raise ValueError(f"{answer!r} is none of {', '.join(names)}")
    return names.index(str(answer))


class Benchmark(NamedTuple):
    """A row of BENCHMARKS: how a file is evaluated."""

    task: str  # the harness's name
    metric: str  # the harness's name
    shots: int  # few-shot examples in front of each item
    convert: Callable  # one of the functions above
    examples: str | None = None  # file of the few-shot examples; None: other items of the same file


BENCHMARKS = {  # by the name of the file, without its suffix
    "boolq": Benchmark("boolq", "acc", 0, boolq),
    "piqa": Benchmark("piqa", "acc", 0, piqa),
    "winogrande": Benchmark("winogrande", "acc", 0, winogrande),
    "truthfulqa_mc": Benchmark("truthfulqa_mc2", "acc", 0, truthfulqa),
    "arc_challenge": Benchmark("arc_challenge", "acc_norm", 25, arc, "arc_challenge_train"),
    "hellaswag": Benchmark("hellaswag", "acc_norm", 10, hellaswag),
}
TASK_FOLDERS = ("arc", "hellaswag", "piqa", "super_glue", "truthfulqa", "winogrande")  # in the harness
EXPECTED_FILES = f"{', '.join(BENCHMARKS)} ({' or '.join(JSON_LINES)})"


# ---------------------------------------------------------------- files


def find_files(folder):
    """Return the benchmarks in a folder, {name: {"test": file, "train": file}}, in the order of BENCHMARKS.

    "train" is the file of the few-shot examples, where a benchmark has one. Raise InputError if the harness
    is not installed or the folder holds something else.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("lm-evaluation-harness is not installed here; pip install lm_eval")
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder; name one with files of {EXPECTED_FILES}")
    known = {*BENCHMARKS, *(benchmark.examples for benchmark in BENCHMARKS.values())}
    files = {}
    for path in sorted(Path(folder).iterdir()):
        if not (path.is_file() and path.name.endswith(JSON_LINES)):
            continue
        name = path.name.removesuffix(".gz").removesuffix(".jsonl")
        if name not in known:
            raise InputError(f"{path}: not a known benchmark; they are {', '.join(BENCHMARKS)}")
        if name in files:
            raise InputError(f"{path}: {files[name].name} is the same benchmark; remove one of them")
        files[name] = path

    found = {}
    for name, benchmark in BENCHMARKS.items():
        if name not in files:
            continue
        found[name] = {"test": files[name]}
        if benchmark.examples:
            if benchmark.examples not in files:
                missing = f"{benchmark.examples}.jsonl"
                raise InputError(f"{files[name]}: its few-shot examples, {missing}, are missing beside it")
            found[name]["train"] = files[benchmark.examples]
    if not found:
        raise InputError(f"{folder}: no {EXPECTED_FILES} inside")
    return found


def read(path, convert):
    """Return the items of a JSON Lines file as a datasets.Dataset, which the harness wants.

    convert: as in a Benchmark. Raise InputError, which names the line, if a line is not an item.
    """
    import datasets

    items = list(read_values(path, lambda value, place: convert(value), "an item of this benchmark"))
    if not items:
        raise InputError(f"{path}: is empty; remove it or copy it again")
    return datasets.Dataset.from_list(items)


# ---------------------------------------------------------------- the harness


def as_model(config, tokenizer, log_likelihoods):
    """Return our model behind the harness's interface, counting tokens as the harness's own `hf` model does.

    config: the model's Config. log_likelihoods: a function from pairs (context, continuation) of lists of
    token ids to pairs (the continuation's summed log-likelihood in nats, whether greedy decoding gives it).
    Raise InputError if the model has no token that a text begins with.
    """
    from lm_eval.api.model import TemplateLM

    first = config.eos_token_id if config.bos_token_id is None else config.bos_token_id
    first = first[0] if isinstance(first, list) and first else first
    if type(first) is not int or first >= config.vocab_size:
        what = f"no token for the start of a text (bos_token_id or eos_token_id is {first})"
        raise InputError(
            f"config.json names {what} in its vocabulary of {config.vocab_size}; correct it there"
        )

    class Model(TemplateLM):
        eot_token_id = config.eos_token_id
        prefix_token_id = first  # what stands before a text without context

        def tok_encode(self, string, add_special_tokens=None, **_):
            bos = [] if add_special_tokens is False else bos_ids(tokenizer)
            return bos + tokenizer.encode(string)

        def loglikelihood(self, requests, disable_tqdm=False):
            # log_likelihoods shows its own progress.
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests, **_):
            room = config.max_position_embeddings + 1  # the last token is never read, only predicted
            pairs = []
            for _, context, continuation in requests:
                # An answer longer than the window stays whole, behind one token of its context.
                kept = max(room, len(continuation) + 1)
                whole = (context + continuation)[-kept:]
                pairs.append((whole[: -len(continuation)], continuation))
            return log_likelihoods(pairs)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            raise NotImplementedError("none of BENCHMARKS asks for it")

        generate_until = loglikelihood_rolling

    return Model()


def evaluate(name, files, lm, limit=None):
    """Return the entry of `results` of one benchmark, on its first `limit` items (None: all).

    files: its entry of `find_files`. lm: what `as_model` returns, or a model of the harness.
    """
    import lm_eval

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    benchmark = BENCHMARKS[name]
    # In a group a registered task takes other settings and still is that task.
    group = {"group": "local", "task": [task_config(name, files)]}
    settings = {"task_manager": task_manager(), "limit": limit, "log_samples": False}
    found = lm_eval.simple_evaluate(lm, tasks=[group], **settings)
    metrics = found["results"][benchmark.task]
    error = metrics[f"{benchmark.metric}_stderr,none"]
    return {
        "benchmark": name,
        "metric": benchmark.metric,
        "shots": benchmark.shots,
        "items": found["n-samples"][benchmark.task]["effective"],
        "score": float(metrics[f"{benchmark.metric},none"]),
        "standard_error": None if error == "N/A" else float(error),  # N/A: a single item has none
    }


def task_config(name, files):
    """Return the settings of the harness's own task, with the local items in place of its download.

    Raise InputError if there are too few items for the few-shot examples.
    """
    benchmark = BENCHMARKS[name]
    splits = {split: read(path, benchmark.convert) for split, path in files.items()}
    of_examples = "train" if "train" in files else "test"
    needed = benchmark.shots + (of_examples == "test")  # an item is no example for itself
    has = len(splits[of_examples])
    if has < needed:
        too_few = f"has {has} items, and {needed} are needed for {benchmark.shots} examples"
        raise InputError(f"{files[of_examples]}: {too_few}; add some")
    config = {
        "task": benchmark.task,
        "num_fewshot": benchmark.shots,
        "custom_dataset": lambda **_: splits,
        "dataset_path": str(files["test"]),
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": of_examples,
    }
    if name == "hellaswag":
        config["process_docs"] = None  # the function `hellaswag` has done the same already
    return config


@functools.cache
def task_manager():
    """Return the harness's list of the tasks of BENCHMARKS, made once.

    Of all tasks it would take a quarter of a minute: they are more than ten thousand files.
    """
    import lm_eval.tasks

    of_all = Path(lm_eval.tasks.__file__).parent
    folders = [of_all / folder for folder in TASK_FOLDERS]
    return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
