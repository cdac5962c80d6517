"""eval.py: each measure beside a slow and plain way to find it, and the command."""

import copy
import json
import math
import random
import shutil
import signal
import time
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import needs_gpu
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
from hf import builtin, scaling, weights
from hf.tokenizer import SentencePiece
from tasks import prompts, ruler


@pytest.fixture(scope="module")
def tiny():
    """The built-in model in float32, and its tokenizer."""
    return weights.load("tiny", dtype=torch.float32), builtin.open_model("tiny").load_tokenizer()


@given(st.integers(1, 200), st.integers(2, 40), st.data())
def test_windows_score_every_token_once_with_as_much_context_as_fits(n, window, data):
    stride = data.draw(st.integers(1, window))
    scored = []
    for begin, first, end in evaluation.sliding_windows(n, window, stride):
        assert end - begin <= window and begin <= first < end <= n
        scored += range(first, end)
        if begin > 0:  # a later window scores at most `stride` tokens, the last ones of what it sees
            assert end - first <= stride and first - begin >= window - stride
    assert scored == list(range(n))


@torch.no_grad()
def token_losses(model, row):
    """Return the loss of each token of a row of ids but the first, in nats."""
    logits = model(torch.tensor([row]))[0]
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(row[1:]), reduction="none")


@pytest.mark.parametrize("with_bos", [True, False])
@pytest.mark.parametrize("cut_to", [120, None])
@pytest.mark.parametrize("length, stride", [(32, 7), (32, 32), (90, 45), (120, 120)])
def test_perplexity_equals_scoring_token_by_token(tiny, monkeypatch, with_bos, cut_to, length, stride):
    """Each token is scored with exactly the context that its window gives it, once."""
    model, tokenizer = tiny
    bos = [tokenizer.bos_id] if with_bos else []
    monkeypatch.setattr(tokenizer, "bos_id", tokenizer.bos_id if with_bos else None)
    torch.manual_seed(0)
    documents = [torch.randint(3, 2048, (n,)).numpy() for n in (100, 131, 20)]
    got = evaluation.perplexity(model, tokenizer, length, documents, cut_to, stride)
    nats, count = 0.0, 0
    long_enough = [d.tolist() for d in documents if len(d) >= length]
    if cut_to:
        long_enough = [text[: cut_to - len(bos)] for text in long_enough]
    for text in long_enough:
        seen_to, begin, room = 0, 0, length - len(bos)
        while seen_to < len(text):
            end = min(begin + room, len(text))
            losses = token_losses(model, bos + text[begin:end]).tolist()
            for i in range(seen_to, end):
                if i > begin or with_bos:  # else nothing is before it
                    nats += losses[i - begin - 1 + len(bos)]
                    count += 1
            seen_to, begin = end, begin + min(stride, room if with_bos else room - 1)
    without_context = 0 if with_bos else 1  # a document's first token has nothing before it
    assert count == sum(len(text) - without_context for text in long_enough)
    assert got["documents"] == len(long_enough) and got["tokens"] == count
    assert got["ppl"] == pytest.approx(math.exp(nats / count), rel=1e-4)


@pytest.mark.parametrize("length, stride", [(32, 5), (32, 32), (100, 60)])
def test_losses_by_position_equal_scoring_token_by_token(tiny, length, stride):
    model, tokenizer = tiny
    documents = [torch.randint(3, 2048, (n,), generator=torch.manual_seed(1)).numpy() for n in (100, 131)]
    got = evaluation.perplexity(model, tokenizer, length, documents, 100, stride, by_position=True)
    losses = {}  # position in the window -> of the tokens scored there
    for text in ([tokenizer.bos_id, *d[:99].tolist()] for d in documents):
        for begin, first, end in evaluation.sliding_windows(99, length - 1, min(stride, length - 1)):
            row = [tokenizer.bos_id, *text[1 + begin : 1 + end]]
            of_row = token_losses(model, row)
            for i in range(first, end):
                losses.setdefault(i - begin + 1, []).append(of_row[i - begin].item())
    assert sum(b["tokens"] for b in got["by_position"]) == got["tokens"] == 2 * 99
    edges = [0, *(e for e in (16, 32, 64) if e < length), length]
    for low, high in zip(edges, edges[1:]):
        here = [loss for position, of in losses.items() if low <= position < high for loss in of]
        found = [b for b in got["by_position"] if b["from"] == low]
        assert len(found) == bool(here)
        if here:
            assert found[0]["to"] == high and found[0]["tokens"] == len(here)
            assert found[0]["loss"] == pytest.approx(sum(here) / len(here), rel=1e-4)


@pytest.mark.parametrize("with_bos", [True, False])
def test_tail_scores_the_same_tokens_behind_more_context(tiny, monkeypatch, with_bos):
    model, tokenizer = tiny
    bos = [tokenizer.bos_id] if with_bos else []
    monkeypatch.setattr(tokenizer, "bos_id", tokenizer.bos_id if with_bos else None)
    rng = torch.manual_seed(2)
    documents = [torch.randint(3, 2048, (n,), generator=rng).numpy() for n in (150, 120, 119)]
    for length in (21, 64, 120):
        got = evaluation.perplexity(model, tokenizer, length, documents, 120, 1, tail=20)
        # The shortest would be long enough for 21, not for 120.
        assert (got["documents"], got["left_out"], got["tokens"]) == (2, 1, 40)
        for document, entry in zip(documents, got["by_document"]):
            row = bos + document.tolist()[-(length - len(bos)) :]
            assert len(row) == length
            loss = token_losses(model, row)[-20:].sum().item()
            assert entry == {"tokens": 20, "nats": pytest.approx(loss, rel=1e-4)}
        assert got["ppl"] == pytest.approx(math.exp(sum(e["nats"] for e in got["by_document"]) / 40))


def test_a_row_does_not_depend_on_longer_ones_beside_it(tiny):
    """Dynamic NTK takes its base from the length: of the row, not of the batch that it is padded to."""
    model = copy.copy(tiny[0])
    model.config = scaling.extend(model.config, "dynamic", 2048)
    short, long = torch.randint(3, 2048, (2, 900), generator=torch.manual_seed(3)).tolist()
    short = short[:400]
    with torch.no_grad():
        alone = evaluation.last_hidden(model, [short])[0]
        torch.testing.assert_close(alone, model.hidden(torch.tensor([short]))[0])
        torch.testing.assert_close(evaluation.last_hidden(model, [long, short])[1, :400], alone)


def test_one_pass_scoring_agrees_with_real_greedy_decoding(tiny):
    """Also where the model is wrong: at 384 and 448 tokens `tiny` fails often, which must count as wrong."""
    model, tokenizer = tiny
    verdicts = []
    for length in (256, 384, 448):
        results = evaluation.passkey(model, tokenizer, length, 12, 3, generate=length == 384)
        for trial, entry in enumerate(results["by_trial"]):
            key = str(np.random.default_rng((3, length, trial)).integers(10000, 100000))
            prompt, _ = prompts.passkey_prompt(tokenizer, length, entry["depth"], key)
            said = tokenizer.decode(model.generate(torch.tensor([prompt]), 8)[0].tolist())
            if length == 384:
                assert entry["agrees"] and entry["said"] and said.startswith(entry["said"])
            said = said.lstrip()
            digits = "".join(c for c in said[:6] if c.isdigit())
            assert entry["correct"] == (said.startswith(key) and digits == key), (length, trial, said)
            verdicts.append(entry["correct"])
    assert 5 < sum(verdicts) < 35  # both outcomes were met


def test_a_number_that_goes_on_is_wrong(tiny):
    """The answer's digits alone are not enough: a model that would say 815012 has not found 81501."""
    model, tokenizer = tiny
    prompt, answer = prompts.passkey_prompt(tokenizer, 256, 0.5, "81501")
    whole = evaluation.Trial(0.5, prompt, answer)
    without_its_end = evaluation.Trial(0.5, prompt, answer[:-1])
    everything = set(range(tokenizer.vocab_size))
    digits = {i for i in everything if tokenizer.decode([i])[:1].isdigit()}
    with torch.no_grad():
        assert evaluation.greedy_verdicts(model, [whole], set()) == [True]
        assert evaluation.greedy_verdicts(model, [without_its_end], everything) == [False]
        assert evaluation.greedy_verdicts(model, [without_its_end], digits) == [False]


def test_the_base_works_in_its_window_and_nowhere_else(tiny):
    """What the README promises of `tiny`: at least 95% to 256 tokens, at most 10% past 512."""
    model, tokenizer = tiny
    for length in (128, 192, 256):
        assert evaluation.passkey(model, tokenizer, length, 20, 1)["accuracy"] >= 0.95
    for length, trials in ((768, 10), (1024, 10), (2048, 5)):
        assert evaluation.passkey(model, tokenizer, length, trials, 1)["accuracy"] <= 0.10


# ---------------------------------------------------------------- RULER


class Oracle:
    """A model that has the answers. answer(prompt) -> the token ids that it says after a prompt."""

    def __init__(self, answer):
        self.answer = answer
        self.config = types.SimpleNamespace(eos_token_id=[2, 5])
        self.embed = types.SimpleNamespace(weight=torch.zeros(1))

    def generate(self, tokens, max_new_tokens, lengths, stop_ids, prefill_tokens):
        assert stop_ids == [2, 5]
        said = [self.answer(row[:n].tolist())[:max_new_tokens] for row, n in zip(tokens, lengths)]
        return torch.tensor([ids + [2] * (max_new_tokens - len(ids)) for ids in said])


def test_ruler_scores_the_share_of_references_said_before_eos(tiny):
    tokenizer = tiny[1]
    corpus = np.array(tokenizer.encode("The cat sat on the mat. It was a cat. " * 90))
    references_of = {}
    for task in ruler.TASKS:
        for number in range(3):
            prompt = ruler.make_prompt(task, tokenizer, 2048, number, 4, corpus)
            references_of[tuple(prompt.ids)] = prompt.references

    def all_of_them(ids):
        return tokenizer.encode(" and ".join(references_of[tuple(ids)]))

    def first_of_them(ids):
        first, *others = references_of[tuple(ids)]
        return tokenizer.encode(first) + [5] + tokenizer.encode(" ".join(others))

    right = evaluation.measure_ruler(Oracle(all_of_them), tokenizer, corpus, 2048, 3, 4)
    assert (right["length"], right["samples"], right["score"], right["standard_error"]) == (2048, 3, 1.0, 0.0)
    partly = evaluation.measure_ruler(Oracle(first_of_them), tokenizer, corpus, 2048, 3, 4)
    for task, entry in partly["by_task"].items():
        share = {"niah_multivalue": 1 / 4, "niah_multiquery": 1 / 4, "vt": 1 / 5, "cwe": 1 / 10, "fwe": 1 / 3}
        expected = share.get(task, 1.0)
        assert entry["by_sample"] == [expected] * 3 and entry["score"] == pytest.approx(expected)
        low, high = entry["interval"]
        assert low < expected <= high
    assert partly["score"] == pytest.approx((6 + 1 / 4 + 1 / 4 + 1 / 5 + 1 / 10 + 1 / 3) / 11)


def test_a_batch_of_prompts_is_continued_as_each_alone(tiny):
    model, tokenizer = tiny
    corpus = np.array(tokenizer.encode("The cat sat on the mat. It was a cat. " * 90))
    batch = [ruler.make_prompt("niah_multikey_2", tokenizer, 600, number, 0, corpus) for number in range(4)]
    batch = [prompt._replace(tokens_to_generate=20) for prompt in batch]
    assert len({len(prompt.ids) for prompt in batch}) > 1
    together = evaluation.continuations(model, tokenizer, batch)
    assert together == [evaluation.continuations(model, tokenizer, [prompt])[0] for prompt in batch]
    assert len(set(together)) > 1

    # An id that generation_config.json makes a stop ends them, as in sample.py.
    said = model.generate(torch.tensor([batch[0].ids]), 20)[0].tolist()
    settings = {"generation_config.json": json.dumps({"eos_token_id": [said[6]]}).encode()}
    stopping = SentencePiece(tokenizer.files | settings)
    expected = tokenizer.decode(said[: said.index(said[6])])
    assert evaluation.continuations(model, stopping, batch[:1]) == [expected] != together[:1]


@needs_gpu
def test_a_gpu_answers_as_the_cpu_does(tiny):
    on_cpu, tokenizer = tiny
    for dtype, error in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        on_gpu = weights.load("tiny", "cuda", dtype)
        assert evaluation.passkey(on_gpu, tokenizer, 256, 20, seed=0)["accuracy"] >= 0.95
        documents = [np.arange(3, 2000) % 1500 + 3, np.arange(700, 2700) % 1900 + 3]
        for length in (256, 1024):
            expected = evaluation.perplexity(on_cpu, tokenizer, length, documents, 1024, length // 2)["ppl"]
            got = evaluation.perplexity(on_gpu, tokenizer, length, documents, 1024, length // 2)["ppl"]
            assert math.log(got) == pytest.approx(math.log(expected), rel=error)


@pytest.fixture
def evaluate(call):
    """evaluate("ppl", "--model", "tiny", ...) -> what eval.py printed on the CPU, in this process."""

    def run_task(task, *arguments):
        done = call("eval", "--task", task, "--device", "cpu", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run_task


def read_results(path):
    """Return the `results` in a JSON file of eval.py."""
    return json.loads(path.read_text())["results"]


def test_the_command_writes_json_and_plot(run, tmp_path):
    written, picture = tmp_path / "r.json", tmp_path / "p.png"
    arguments = ("--model", "tiny", "--lengths", "512,128", "--trials", 4)
    done = run("eval.py", "--task", "passkey", *arguments, "--json", written, "--plot", picture)
    assert done.returncode == 0, done.stderr
    content = json.loads(written.read_text())
    assert content["task"] == "passkey" and content["model"] == "tiny"
    for entry, length in zip(content["results"], (128, 512)):
        assert entry["length"] == length and entry["trials"] == 4 and len(entry["by_trial"]) == 4
        assert entry["accuracy"] == sum(t["correct"] for t in entry["by_trial"]) / 4
        assert [t["depth"] for t in entry["by_trial"]] == [0.125, 0.375, 0.625, 0.875]
        assert entry["beyond_window"] == (length > 256)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"r.json", "p.png"}
    rows = [line.split() for line in done.stdout.splitlines()]
    by_depth = ["100%"] * 4  # of five ranges: no trial is between 40 and 60%
    assert ["128", "tiny", "100%", "51-100%", *by_depth] in rows
    assert any(row[:2] == ["512", "tiny*"] for row in rows)
    assert "tiny works to 128 tokens (95% or more at every length)" in done.stdout


@pytest.fixture
def two_models(make_llama, tmp_path):
    """The arguments for a comparison of `tiny` with a random model on one text, and that model."""
    folder, _ = make_llama("random", vocab_size=2048)
    shutil.copy(builtin.resolve("tiny") / "tokenizer.model", folder)
    text = tmp_path / "t.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 120)
    return ("--model", "tiny", folder, "--data", text, "--plot", tmp_path / "p.png"), str(folder)


def test_several_models_stand_in_one_table_and_plot(evaluate, tmp_path, two_models):
    both, other = two_models
    out = evaluate("ppl", *both, "--lengths", "64,128,5000", "--json", tmp_path / "ppl.json")
    written = json.loads((tmp_path / "ppl.json").read_text())
    assert written["model"] == other and [r["model"] for r in written["compared"]] == ["tiny"]
    for model in (written, *written["compared"]):
        short, _, long = model["results"]
        assert short["documents"] == 1 and short["left_out"] == 0
        assert short["ppl"] > 1 and short["standard_error"] is None
        assert (long["documents"], long["left_out"], long["tokens"], long["ppl"]) == (0, 1, 0, None)
    assert written["results"][0]["ppl"] > 100 * written["compared"][0]["results"][0]["ppl"]
    rows = [line.split()[:2] for line in out.splitlines()[2:6]]
    assert [rows[0], rows[2]] == [["64", "tiny"], ["128", "tiny"]]
    assert [rows[1][0], rows[3][0]] == [other, other + "*"]
    assert (tmp_path / "p.png").stat().st_size > 10000
    assert "tiny holds its perplexity to 128 tokens" in out


def test_other_tables_of_several_models(evaluate, tmp_path, two_models):
    both, _ = two_models
    out = evaluate("needle", *both, "--lengths", "300,600", "--trials", 2, "--json", tmp_path / "n.json")
    written = json.loads((tmp_path / "n.json").read_text())
    assert len(written["compared"][0]["results"][1]["by_trial"]) == 2
    assert "tiny gives no right answer at any length" in out

    out = evaluate("ppl", *both, "--lengths", "64,128", "--tail", 32, "--json", tmp_path / "tail.json")
    assert "loss against 64" in out
    out = evaluate("ppl", *both, "--lengths", "64,128", "--by_position", "--json", tmp_path / "by.json")
    assert "by position in windows of 128: 0-15: " in out


def test_the_table_of_ruler_has_a_column_for_each_length(evaluate, tmp_path, two_models, monkeypatch):
    both, other = two_models
    for name, task in ruler.TASKS.items():  # a few tokens tell as much of the table as 128
        monkeypatch.setitem(ruler.TASKS, name, task._replace(tokens_to_generate=2))
    written = tmp_path / "r.json"
    out = evaluate("ruler", *both, "--lengths", "1300,1100", "--samples", 1, "--json", written)
    introduction, *rows = [line.split() for line in out.splitlines()]
    assert introduction[:7] == ["1", "prompts", "a", "task", "and", "length,", "with"]
    assert rows[0] == ["ruler", "1,100", "1,300"]
    assert rows[3] == ["niah_single_2", "(texts)", "tiny", *["0%", "(0-79)*"] * 2]
    assert rows[4] == [other, *["0%", "(0-79)*"] * 2]
    assert rows[23] == ["mean", "tiny", *["0.0%", "-*"] * 2]
    assert "tiny scores 0.0% at 1,100 tokens and 0.0% at 1,300 tokens on average of 11 tasks" in out
    results = read_results(written)
    assert [result["length"] for result in results] == [1100, 1300]
    assert list(results[0]["by_task"]) == list(ruler.TASKS)
    assert (tmp_path / "p.png").stat().st_size > 10000


def test_perplexities_of_other_documents_are_not_compared(evaluate, tmp_path):
    """At the longest length only an easy text is left, so its low perplexity says nothing of the length."""
    rng = random.Random(0)
    texts = ["".join(rng.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(600)) for _ in range(3)]
    texts += ["The cat sat on the mat. " * 300]
    data, written = tmp_path / "hard.jsonl", tmp_path / "r.json"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = evaluate("ppl", "--model", "tiny", "--data", data, "--lengths", "64,128,512", "--json", written)
    short, _, long = results = read_results(written)
    assert [result["documents"] for result in results] == [4, 4, 1]
    assert long["ppl"] < short["ppl"] / 2
    assert "tiny holds its perplexity to 128 tokens" in out and "other lengths have other documents" in out


def test_the_key_of_the_text(evaluate, tmp_path):
    """The figures are those of the same texts under the usual key. A file without a key goes on."""
    written, texts = tmp_path / "r.json", [f"The cat sat on the mat. {i}" * 90 for i in range(2)]
    for key in ("text", "content"):
        (tmp_path / f"{key}.jsonl").write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    arguments = ("--model", "tiny", "--lengths", "64", "--data")
    other = evaluate("ppl", *arguments, tmp_path / "content.jsonl", "--text_key", "content")
    assert evaluate("ppl", *arguments, tmp_path / "text.jsonl", "--json", written) == other
    content = json.loads(written.read_text())
    assert content["settings"].pop("text_key") == "text"
    written.write_text(json.dumps(content))
    assert evaluate("ppl", *arguments, tmp_path / "text.jsonl", "--json", written) == other


def test_whole_documents_are_scored(evaluate, tmp_path):
    """All that have the tokens, or the longest of them, with every token once at each length."""
    texts = ["The cat sat on the mat. " * n for n in (40, 5, 90, 60)]
    data, written = tmp_path / "t.jsonl", tmp_path / "r.json"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sizes = [len(builtin.open_model("tiny").load_tokenizer().encode(text)) for text in texts]
    arguments = ("--model", "tiny", "--data", data, "--all", "--lengths", "128,200")
    out = evaluate("ppl", *arguments, "--json", written, "--stride", 200)
    count = sum(sizes) - sizes[1]
    assert [result["tokens"] for result in read_results(written)] == [count, count]
    introduction = "{:,} of the texts' {:,} tokens are scored, each with the same weight: all of {}"
    assert introduction.format(count, sum(sizes), "3 documents") in out
    out = evaluate("ppl", *arguments, "--stride", 200, "--documents", 1)
    assert introduction.format(sizes[2], sum(sizes), "1 document") in out


def test_default_lengths_double_from_the_original_window(tiny):
    scaling = {"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 512}
    extended = replace(tiny[0].config, max_position_embeddings=2048, rope_scaling=scaling)
    lengths = evaluation.default_lengths([extended], 256)
    assert lengths == [512, 1024, 2048] and {type(length) for length in lengths} == {int}
    assert evaluation.default_lengths([extended, tiny[0].config], 256) == [256, 512, 1024, 2048]
    assert evaluation.default_lengths([tiny[0].config], 256) == [256, 512]


def test_without_a_run_the_built_in_model_is_measured_and_named(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("--task", "passkey", "--device", "cpu", "--lengths", 128, "--trials", 1)
    done = call("eval", *arguments)
    first_line = done.stderr.splitlines()[0]
    assert first_line == "no run in out/, so this measures the built-in tiny; --model names another"
    assert "no run" not in call("eval", *arguments, "--model", "tiny").stderr


def test_a_killed_evaluation_goes_on(start, evaluate, tmp_path, monkeypatch):
    arguments = ("--model", "tiny", "--trials", 4, "--lengths")
    whole, halfway = tmp_path / "whole.json", tmp_path / "halfway.json"
    evaluate("passkey", *arguments, "128,200,256", "--json", whole)
    in_process = ("--task", "passkey", "--device", "cpu", *arguments)
    started = start("eval.py", *in_process, "128,200,65536", "--json", halfway)  # the last takes long
    while not halfway.exists() or len(read_results(halfway)) < 2:
        assert started.poll() is None
        time.sleep(0.02)
    started.kill(signal.SIGKILL)
    started.wait()

    measured = []
    real = evaluation.passkey
    monkeypatch.setattr(evaluation, "passkey", lambda *a: measured.append(a[2]) or real(*a))
    out = evaluate("passkey", *arguments, "128,200,256", "--json", halfway)
    assert measured == [256]
    assert json.loads(halfway.read_text()) == json.loads(whole.read_text())
    again = evaluate("passkey", *arguments, "128,200,256", "--json", whole)
    assert again == out and measured == [256]
    evaluate("passkey", *arguments, "150,256", "--json", whole)  # another length joins the others
    assert measured == [256, 150]
    assert [result["length"] for result in read_results(whole)] == [128, 150, 200, 256]
