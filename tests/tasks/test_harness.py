"""Our model behind lm-evaluation-harness's interface, beside the harness's own `hf` on the same items."""

import functools
import gzip
import json
import random
import shutil

import datasets
import lm_eval.evaluator
import pytest
import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.hellaswag.utils import process_docs

import eval as evaluation
from hf import builtin, weights
from model import Config
from storage.errors import InputError
from tasks import harness, prompts, report

WORDS = (
    "the cat dog house river sees likes old red green of in and a runs home over under bridge bread makes "
    "door is was"
).split()


def sentence(rng, n):
    return " ".join(rng.choices(WORDS, k=n)).capitalize()


def question(rng, answer):
    labels = "1234" if answer in "1234" else "ABCD"
    choices = [{"text": sentence(rng, rng.randint(1, 5)) + ".", "label": label} for label in labels]
    return {"id": None, "question": {"stem": sentence(rng, 8) + "?", "choices": choices}, "answerKey": answer}


def item(name, rng):
    if name == "boolq":
        asked, answer = sentence(rng, 6).lower(), rng.random() < 0.5
        return {"question": asked, "title": "Bread", "answer": answer, "passage": sentence(rng, 40) + "."}
    if name == "piqa":
        goal, first, second = sentence(rng, 6), sentence(rng, 5), sentence(rng, 9)
        return {"goal": goal, "sol1": first, "sol2": second, "label": rng.randint(0, 1)}
    if name == "winogrande":
        with_a_gap = f"The cat and the dog {sentence(rng, 3)} so _ runs home."
        return {"sentence": with_a_gap, "option1": "cat", "option2": "dog", "answer": rng.choice("12")}
    if name == "truthfulqa_mc":
        targets = {f"{sentence(rng, 5)} {i}.": int(i < 2) for i in range(5)}
        return {"question": sentence(rng, 6) + "?", "mc1_targets": targets, "mc2_targets": targets}
    if name == "hellaswag":
        context = f"{sentence(rng, 10)}. the old {rng.choice(WORDS)}"
        endings = [sentence(rng, rng.randint(2, 6)).lower() + "." for _ in range(4)]
        in_words = {"activity_label": "Running", "ctx": context, "query": f"Running: {context}"}
        return in_words | {"endings": endings, "label": rng.randint(0, 3)}
    return question(rng, rng.choice("ABCD1234"))


@pytest.fixture(autouse=True)
def no_inventory_of_the_machine(monkeypatch):
    """The harness's results would list it, which takes a second each time. Nothing here looks at it."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files in the layout that the README of such a folder describes: 30 made-up items each."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("benchmarks")
    for name in (*harness.BENCHMARKS, "arc_challenge_train"):
        lines = "".join(json.dumps(item(name, rng)) + "\n" for _ in range(30)).encode()
        if name == "piqa":
            (folder / f"{name}.jsonl").write_bytes(lines)
        else:
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines))
    return folder


@pytest.fixture(scope="module")
def models():
    """tiny, as our model and as the harness's."""
    folder = builtin.open_model("tiny")
    model = weights.load("tiny", dtype=torch.float32)
    log_likelihoods = functools.partial(evaluation.log_likelihoods, model)
    ours = harness.as_model(model.config, folder.load_tokenizer(), log_likelihoods)
    path = str(folder.path)
    return ours, HFLM(pretrained=path, tokenizer=path, dtype="float32", device="cpu", batch_size=8)


class Recorder(LM):
    """A model that notes what it is asked and finds every answer equally likely."""

    def loglikelihood(self, requests):
        self.asked = [r.args for r in requests]
        return [(-1.0, False) for _ in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    generate_until = loglikelihood_rolling


@pytest.mark.parametrize("name", harness.BENCHMARKS)
def test_scores_equal_those_of_the_harness_own_model(folder, models, name):
    """The few-shot prompts are longer than tiny's window: both must cut them in the same place."""
    files = harness.find_files(folder)[name]
    with torch.no_grad():
        ours, theirs = (harness.evaluate(name, files, model, limit=4) for model in models)
    assert ours["items"] == 4 and ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value)


def test_log_likelihoods_equal_those_of_the_harness_own_model(models):
    rng = random.Random(1)

    class Request:
        def __init__(self, *args):
            self.args = args

    pairs = [
        ("", "The cat"),
        ("The cat ", "sees the dog"),
        ("The cat", " sees"),
        (sentence(rng, 600), " a dog runs home"),
    ]
    pairs += [(sentence(rng, rng.randint(1, 60)), " " + sentence(rng, rng.randint(1, 9))) for _ in range(20)]
    pairs += [
        (f"{prompts.GARBAGE} {prompts.GARBAGE} The grass is green. The sky is", " blue")
    ]  # which it says by itself
    with torch.no_grad():
        ours, theirs = (model.loglikelihood([Request(*pair) for pair in pairs]) for model in models)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert {greedy for _, greedy in ours} == {True, False}
    assert [nats for nats, _ in ours] == pytest.approx([nats for nats, _ in theirs], abs=2e-3)


def test_an_answer_longer_than_the_window_is_scored_whole(models):
    """Where the harness's own model gives up. Of the question its last token is left."""
    answer = " ".join(sentence(random.Random(2), 8) for _ in range(60))
    model, encode = weights.load("tiny", dtype=torch.float32), models[0].tok_encode
    question, continuation = encode("Why so?"), encode(answer, add_special_tokens=False)
    with torch.no_grad():
        ((nats, greedy),) = models[0]._loglikelihood_tokens([(None, question, continuation)])
        tokens = torch.tensor([[question[-1], *continuation]])
        assert tokens.shape[1] > 258
        logits = model(tokens[:, :-1])[0]
        expected = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
    assert nats == pytest.approx(-expected.item(), rel=1e-5) and not greedy


@pytest.mark.parametrize("name", harness.BENCHMARKS)
def test_prompts_hold_the_items(folder, name):
    model = Recorder()
    files = harness.find_files(folder)[name]
    result = harness.evaluate(name, files, model, limit=7)
    opened = gzip.open(files["test"]) if name != "piqa" else open(files["test"], "rb")
    items = [json.loads(line) for line in opened][:7]
    shots = {"arc_challenge": 25, "hellaswag": 10}.get(name, 0)
    assert (result["items"], result["shots"], result["metric"]) == (7, shots, "acc_norm" if shots else "acc")
    asked = iter(model.asked)
    for i in items:
        if name == "boolq":
            context = f"Bread -- {i['passage']}\nQuestion: {i['question']}?\nAnswer:"
            expected = [(context, " no"), (context, " yes")]
        elif name == "piqa":
            expected = [(f"Question: {i['goal']}\nAnswer:", " " + i[key]) for key in ("sol1", "sol2")]
        elif name == "winogrande":
            before = i["sentence"].partition("_")[0]
            expected = [(before + i[key], " runs home.") for key in ("option1", "option2")]
        elif name == "truthfulqa_mc":
            expected = [(f"Q: {i['question']}\nA:", " " + answer) for answer in i["mc2_targets"]]
        elif name == "arc_challenge":
            context = f"Question: {i['question']['stem']}\nAnswer:"
            expected = [(context, " " + choice["text"]) for choice in i["question"]["choices"]]
        else:
            context = i["query"].replace(". the old", ". The old")
            expected = [(context, " " + ending) for ending in i["endings"]]
        for context, continuation in expected:
            prompt, answer = next(asked)
            assert prompt.endswith(context) and answer == continuation
            few = prompt.removesuffix(context).split("\n\n")[:-1]
            assert len(few) == shots or name == "truthfulqa_mc"  # whose six examples are part of its task
            assert name != "hellaswag" or context not in "".join(few)  # an item is no example for itself
    assert next(asked, None) is None


def test_hellaswag_is_processed_as_the_harness_does():
    """The data set's own file has tags in half of its items, which come from WikiHow."""
    halves = [
        ("[header] How to sit [title] Take a chair. [step] Stand before it.", "", "Bend. [title] Sit."),
        ("A man stands in Rome.", "he", "sits down."),
    ]
    for first, second, ending in halves:
        line = {"activity_label": "Sitting", "ctx_a": first, "ctx_b": second, "endings": [ending, "Run."]}
        line |= {"ctx": f"{first} {second}".strip(), "label": 1}
        (expected,) = process_docs(datasets.Dataset.from_list([line]))
        ours = {"query": expected["query"], "choices": expected["choices"], "label": 1}
        assert harness.hellaswag(line) == ours


def test_the_right_answer_is_what_the_file_says(tmp_path):
    """A model that prefers one answer by its text alone gets exactly the items where that is right."""
    rng = random.Random(3)
    items = [question(rng, answer) for answer in "ABCD1234" * 2]
    for i in items:
        right = next(c for c in i["question"]["choices"] if c["label"] == i["answerKey"])
        right["text"] = "Right."
    items[3]["answerKey"] = "A"
    (tmp_path / "arc_challenge.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))
    (tmp_path / "arc_challenge_train.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items * 2))

    class Knows(Recorder):
        def loglikelihood(self, requests):
            return [(0.0 if r.args[1] == " Right." else -50.0, False) for r in requests]

    result = harness.evaluate("arc_challenge", harness.find_files(tmp_path)["arc_challenge"], Knows())
    assert result["score"] == 15 / 16


def test_a_single_item_has_no_error(folder):
    result = harness.evaluate("piqa", harness.find_files(folder)["piqa"], Recorder(), limit=1)
    assert result["items"] == 1 and result["standard_error"] is None
    assert report.ScoreTable().headline(result)[1] == "-"


def test_the_command(call, folder, tmp_path, monkeypatch):
    written, two = tmp_path / "r.json", tmp_path / "two"
    two.mkdir()
    for name in ("piqa.jsonl", "boolq.jsonl.gz"):
        (two / name).write_bytes((folder / name).read_bytes())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = ("--model", "tiny", "--data", two, "--limit", 2, "--device", "cpu")
    done = call("eval", "--task", "benchmarks", *arguments, "--json", written, "--plot", tmp_path / "p.png")
    assert done.returncode == 0, done.stderr
    results = json.loads(written.read_text())["results"]
    assert [(r["benchmark"], r["items"]) for r in results] == [("boolq", 2), ("piqa", 2)]
    assert "piqa" in done.stdout and "on average of 2 benchmarks" in done.stdout
    assert (tmp_path / "p.png").stat().st_size > 10000


@pytest.mark.parametrize(
    "name, file, needed", [("arc_challenge", "arc_challenge_train", 25), ("hellaswag", "hellaswag", 11)]
)
def test_too_few_items_for_the_examples_are_refused(folder, tmp_path, name, file, needed):
    for path in folder.glob(f"{name}*"):
        shutil.copy(path, tmp_path)
    lines = gzip.decompress((folder / f"{file}.jsonl.gz").read_bytes()).splitlines(keepends=True)
    for n in (needed - 1, needed):
        (tmp_path / f"{file}.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:n])))
        files = harness.find_files(tmp_path)[name]
        if n < needed:
            with pytest.raises(InputError, match=f"{file}.jsonl.gz: has {n} items, and {needed} are needed"):
                harness.evaluate(name, files, Recorder())
        else:
            assert harness.evaluate(name, files, Recorder(), limit=3)["items"] == 3


def test_too_few_items_are_found_before_the_first_benchmark_is_measured(call, folder, tmp_path):
    two, written = tmp_path / "two", tmp_path / "r.json"
    two.mkdir()
    for name in ("boolq", "arc_challenge", "arc_challenge_train"):
        shutil.copy(folder / f"{name}.jsonl.gz", two)
    lines = gzip.decompress((two / f"{name}.jsonl.gz").read_bytes()).splitlines(keepends=True)
    (two / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines[0]))
    arguments = ("--model", "tiny", "--data", two, "--limit", 2, "--device", "cpu", "--json", written)
    done = call("eval", "--task", "benchmarks", *arguments)
    assert done.returncode == 2 and "has 1 items, and 25 are needed" in done.stderr
    assert not written.exists()


@pytest.mark.parametrize(
    "files, says",
    [
        ({}, ["no boolq"]),
        ({"squad.jsonl": "{}\n"}, ["squad.jsonl", "boolq"]),
        ({"arc_challenge.jsonl": "{}\n"}, ["arc_challenge.jsonl", "arc_challenge_train"]),
        ({"boolq.jsonl": "{}\n", "boolq.jsonl.gz": ""}, ["boolq.jsonl.gz", "same benchmark"]),
    ],
)
def test_folders_that_are_refused(tmp_path, files, says):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as refusal:
        harness.find_files(tmp_path)
    assert all(word in str(refusal.value) for word in says)


@pytest.mark.parametrize(
    "name, line",
    [
        *(("piqa", line) for line in ('{"goal": "a"}', "[]", '{"goal"', '"text"', "null")),
        *(("piqa", {"label": label}) for label in (2, -1, "", None)),
        ("piqa", {"sol2": " "}),
        ("piqa", {"sol1": 7}),
        ("piqa", {"goal": None}),
        ("piqa", {"label": [0]}),
        ("winogrande", {"sentence": "No place for the answer."}),
        ("winogrande", {"sentence": {}}),
        ("boolq", {"passage": None}),
        ("boolq", {"question": 7}),
        ("boolq", {"question": "\ud800"}),
        ("hellaswag", {"endings": []}),
        ("hellaswag", {"ctx": [1]}),
        ("hellaswag", {"activity_label": None}),
        ("truthfulqa_mc", {"mc2_targets": {"a": "yes"}}),
        ("truthfulqa_mc", {"mc1_targets": []}),
        ("truthfulqa_mc", {"question": {"a": 1}}),
        ("arc_challenge", {"question": "text"}),
        ("arc_challenge", {"question": {"stem": "a", "choices": [{"text": "b", "label": 1}]}}),
        ("winogrande", {"answer": ""}),
        ("winogrande", {"answer": 0}),
        ("winogrande", {"option1": ""}),
        ("boolq", {"answer": "true"}),
        ("hellaswag", {"label": 4}),
        ("hellaswag", {"label": -1}),
        ("hellaswag", {"endings": ["a", "", "c", "d"]}),
        ("truthfulqa_mc", {"mc2_targets": {"": 1}}),
        ("arc_challenge", {"answerKey": "E"}),
    ],
    ids=str,
)
def test_items_that_are_refused(tmp_path, name, line):
    good = item(name, random.Random(0))
    line = line if isinstance(line, str) else json.dumps(good | line)
    (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(InputError, match=rf"{name}.jsonl, line 2: "):
        harness.read(tmp_path / f"{name}.jsonl", harness.BENCHMARKS[name].convert)


@pytest.mark.parametrize("name, key", [("piqa", "label"), ("winogrande", "answer"), ("hellaswag", "label")])
def test_a_label_may_be_a_number_or_its_text(tmp_path, name, key):
    good = item(name, random.Random(0))
    lines = [json.dumps(good | {key: label}) for label in (int(good[key]), str(good[key]))]
    (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    first, second = harness.read(tmp_path / f"{name}.jsonl", harness.BENCHMARKS[name].convert)
    assert first == second and str(first["label" if key == "label" else key]) == str(good[key])


def test_files_that_are_no_lines_of_items(tmp_path):
    good = json.dumps(item("piqa", random.Random(0)))
    (tmp_path / "piqa.jsonl.gz").write_text(good)
    with pytest.raises(InputError, match="piqa.jsonl.gz: the gzip file is truncated or damaged"):
        harness.evaluate("piqa", harness.find_files(tmp_path)["piqa"], Recorder())
    # Blank lines count for nothing.
    (tmp_path / "piqa.jsonl.gz").write_bytes(gzip.compress(f"{good}\n\n{good}\n\n".encode()))
    assert harness.evaluate("piqa", harness.find_files(tmp_path)["piqa"], Recorder())["items"] == 2


@pytest.mark.parametrize("bos, eos", [(320, 2), (None, None), (None, 320), (None, [320]), (None, [])])
def test_a_model_without_a_first_token(bos, eos):
    config = Config(320, 64, 96, 1, 4, 2, 16, 64, bos_token_id=bos, eos_token_id=eos)
    with pytest.raises(InputError, match="no token for the start of a text .* vocabulary of 320"):
        harness.as_model(config, None, None)


def test_without_the_harness(tmp_path, monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install lm_eval"):
        harness.find_files(tmp_path)
