import copy
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers
import torch
from conftest import needs_gpu
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
import prompts
import report
import tokenizer as tokenizer_module
import weights


@pytest.fixture(scope="module")
def tiny():
    model = weights.load("tiny", dtype=torch.float32)
    return model, weights.load_tokenizer("tiny", model.config)


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


@pytest.mark.parametrize("with_bos", [True, False])
@pytest.mark.parametrize("length, stride", [(32, 7), (32, 32), (90, 45), (120, 120)])
def test_perplexity_equals_scoring_token_by_token(tiny, monkeypatch, with_bos, length, stride):
    """Brute force: one forward pass for each scored token, with exactly the context that its window gives it."""
    model, tokenizer = tiny
    bos = [tokenizer.bos_id] if with_bos else []
    monkeypatch.setattr(tokenizer, "bos_id", tokenizer.bos_id if with_bos else None)
    torch.manual_seed(0)
    documents = [torch.randint(3, 2048, (n,)).numpy() for n in (100, 131, 20)]
    got = evaluation.perplexity(model, tokenizer, length, documents, 120, stride)
    nats, count = 0.0, 0
    long_enough = [d[: 120 - len(bos)].tolist() for d in documents if len(d) >= length]
    for text in long_enough:
        seen_to, begin, room = 0, 0, length - len(bos)
        while seen_to < len(text):
            end = min(begin + room, len(text))
            for i in range(seen_to, end):
                context = bos + text[begin:i]
                if context:
                    with torch.no_grad():
                        logits = model(torch.tensor([context]))[0, -1]
                    nats -= logits.log_softmax(-1)[text[i]].item()
                    count += 1
            seen_to, begin = end, begin + min(stride, room if with_bos else room - 1)
    assert count == sum(len(text) - (not with_bos) for text in long_enough)  # all, but for a first one that has nothing before it
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
            with torch.no_grad():
                of_row = torch.nn.functional.cross_entropy(model(torch.tensor([row]))[0, :-1], torch.tensor(row[1:]), reduction="none")
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
    documents = [torch.randint(3, 2048, (n,), generator=torch.manual_seed(2)).numpy() for n in (150, 120, 119)]
    for length in (21, 64, 120):
        got = evaluation.perplexity(model, tokenizer, length, documents, 120, 1, tail=20)
        assert (got["documents"], got["left_out"], got["tokens"]) == (2, 1, 40)  # the shortest would be long enough for 21, not for 120
        for document, entry in zip(documents, got["by_document"]):
            row = bos + document.tolist()[-(length - len(bos)) :]
            assert len(row) == length
            with torch.no_grad():
                loss = torch.nn.functional.cross_entropy(model(torch.tensor([row]))[0, -21:-1], torch.tensor(row[-20:]), reduction="sum")
            assert entry == {"tokens": 20, "nats": pytest.approx(loss.item(), rel=1e-4)}
        assert got["ppl"] == pytest.approx(math.exp(sum(e["nats"] for e in got["by_document"]) / 40))


def test_a_row_does_not_depend_on_longer_ones_beside_it(tiny):
    """Dynamic NTK takes its base from the length: of the row, not of the batch that it is padded to."""
    model = copy.copy(tiny[0])
    model.config = weights.extend(model.config, "dynamic", 2048)
    short, long = torch.randint(3, 2048, (2, 900), generator=torch.manual_seed(3)).tolist()
    short = short[:400]
    with torch.no_grad():
        alone = evaluation.last_hidden(model, [short])[0]
        torch.testing.assert_close(alone, model.hidden(torch.tensor([short]))[0])
        torch.testing.assert_close(evaluation.last_hidden(model, [long, short])[1, :400], alone)


def test_error_over_documents_is_the_bootstraps():
    rng = np.random.default_rng(0)
    count = rng.integers(500, 2000, 60).astype(float)
    nats = count * rng.normal(3, 0.3, 60)
    ppl, error = report.over_documents(nats, count)
    assert ppl == pytest.approx(math.exp(nats.sum() / count.sum()))
    drawn = rng.integers(0, 60, (20000, 60))
    assert error == pytest.approx(np.exp(nats[drawn].sum(1) / count[drawn].sum(1)).std(), rel=0.05)
    assert report.over_documents(nats[:1], count[:1]) == (pytest.approx(math.exp(nats[0] / count[0])), None)


@given(st.integers(1, 300), st.data())
def test_wilson_interval_ends_where_the_normal_test_begins_to_reject(n, data):
    """Its ends are the shares p that are 1.96 of their own standard deviations away from what was seen."""
    right = data.draw(st.integers(0, n))
    low, high = report.wilson(right, n)
    assert 0 <= low <= right / n + 1e-9 and right / n - 1e-9 <= high <= 1
    for p in (low, high):
        assert abs(right / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), abs=1e-6)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A byte-level BPE tokenizer without BOS: a newline, a space before a word and digits are cut as in GPT-2."""
    folder = tmp_path_factory.mktemp("byte_level")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    bpe.train_from_iterator([prompts.TASK, prompts.GARBAGE, prompts.QUESTION, prompts.NEEDLE, "the cat sat. It is a cat."], trainer)
    bpe.save(str(folder / "tokenizer.json"))
    return tokenizer_module.load(folder)


@pytest.mark.parametrize("which", ["sentencepiece", "byte_level"])
@pytest.mark.parametrize("length", [160, 211, 256, 257, 312, 5003])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_prompt_is_the_papers_and_has_its_length(tiny, byte_level, which, length, depth):
    tokenizer = tiny[1] if which == "sentencepiece" else byte_level
    prompt, answer = prompts.passkey_prompt(tokenizer, length, depth, "81501")
    assert len(prompt) + len(answer) == length
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert prompt[: len(bos)] == bos
    assert tokenizer.decode(answer).strip() == "81501"
    text = tokenizer.decode(prompt[len(bos) :])
    assert prompt + answer == bos + tokenizer.encode(text + " 81501")
    garbage = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    before, key, after = text.partition("The pass key is 81501. Remember it. 81501 is the pass key.")
    opening, before, after = before.split("\n", 1)[1].removesuffix("\n"), before.count(garbage), after.count(garbage)
    cut = opening.removesuffix(" ".join([garbage] * before)).rstrip(" ")
    assert garbage.endswith(cut.strip("\n")) and cut.strip("\n") != garbage and cut.count("\n") <= 2
    lines = [
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
        "I will quiz you about the important information there.",
        " ".join([cut] + [garbage] * before).strip(" "),
        key,
        " ".join([garbage] * after),
        "What is the pass key? The pass key is",
    ]
    assert text == "\n".join(line for line in lines if line)
    assert before == round(depth * (before + after))


def test_a_prompt_of_a_million_tokens_takes_no_minutes(tiny):
    began = time.perf_counter()
    prompt, answer = prompts.passkey_prompt(tiny[1], 2**20, 0.4, "81501")
    assert len(prompt) + len(answer) == 2**20
    assert time.perf_counter() - began < 5  # it takes 0.02 seconds; encoding such a text once takes 2, and it used to be done several times


@pytest.mark.parametrize("which", ["sentencepiece", "byte_level"])
@pytest.mark.parametrize("length, depth, keys", [(400, 0.5, 4), (1200, 0.05, 1), (3000, 0.95, 16)])
def test_needles_stand_between_lines_of_the_text(tiny, byte_level, which, length, depth, keys):
    tokenizer = tiny[1] if which == "sentencepiece" else byte_level
    source = "".join(f"Chapter {i}. The cat sat on the mat {i} times! Was it so?\nIt was, said the dog of house {i}\n" for i in range(300))
    corpus = np.array(tokenizer.encode(source), dtype=np.uint16)
    drawn = [prompts.needle_prompt(tokenizer, corpus, length, depth, np.random.default_rng(s), keys) for s in (7, 7, 8)]
    assert drawn[0] == drawn[1] != drawn[2]
    prompt, answer = drawn[0]
    assert len(prompt) + len(answer) == length
    text = tokenizer.decode(prompt[tokenizer.bos_id is not None :])
    task, *lines, question = text.split("\n")
    assert task == f"The text below hides the door codes of {keys} cities. Remember them: the last line asks for one."
    is_needle = re.compile(r"The door code of (\w+) is (\d{5})\.").fullmatch
    codes = dict(m.groups() for line in lines if (m := is_needle(line)))
    assert len(codes) == len(set(codes.values())) == keys
    asked = re.fullmatch(r"What is the door code of (\w+)\? The door code of (\w+) is", question)
    assert asked[1] == asked[2] and codes[asked[1]] == tokenizer.decode(answer).strip()

    # Without the needles (each brings two newlines) it is one stretch of the source, and each stands at the end of a line or sentence.
    stretch, places = "", []
    for i, line in enumerate(lines):
        if is_needle(line):
            if not is_needle(lines[i - 1]):
                stretch = stretch.removesuffix("\n")
            places.append((line, len(stretch)))
        else:
            stretch += line + "\n"
    stretch = stretch.removesuffix("\n")
    at = source.find(stretch.strip("\n"))
    assert at >= 0 and len(stretch) > 100
    for line, place in places:
        assert place == 0 or stretch[place - 1] in ".!?\n" or stretch[place] == "\n", (line, stretch[place - 20 : place])
    place = next(place for line, place in places if asked[1] in line)
    assert abs(place / len(stretch) - depth) < 60 / len(stretch) + 0.05


@pytest.mark.parametrize("which", ["sentencepiece", "byte_level"])
def test_tokens_that_make_a_number_go_on(tiny, byte_level, which):
    """Known by what they add to a text: SentencePiece's "▁8" begins another number, though alone it decodes to "8"."""
    tokenizer = tiny[1] if which == "sentencepiece" else byte_level
    digits = prompts.digit_tokens(tokenizer)
    base = tokenizer.encode("x")
    for i in range(tokenizer.vocab_size):
        assert (i in digits) == (re.match(r"x\d", tokenizer.decode([*base, i])) is not None)
    assert 10 <= len(digits) < 200


def test_one_pass_scoring_agrees_with_real_greedy_decoding(tiny):
    """Also where the model is wrong: at 384 and 512 tokens `tiny` fails often, and a wrong answer must count as wrong."""
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
            digits = "".join(c for c in said.lstrip()[:6] if c.isdigit())
            assert entry["correct"] == (said.lstrip().startswith(key) and digits == key), (length, trial, said)
            verdicts.append(entry["correct"])
    assert 5 < sum(verdicts) < 35  # both outcomes were met


def test_a_number_that_goes_on_is_wrong(tiny):
    """The answer's digits alone are not enough: a model that would say 815012 has not found 81501."""
    model, tokenizer = tiny
    prompt, answer = prompts.passkey_prompt(tokenizer, 256, 0.5, "81501")
    with torch.no_grad():
        assert evaluation.answers_greedily(model, [prompt], [answer], set()) == [True]
        assert evaluation.answers_greedily(model, [prompt], [answer[:-1]], set(range(tokenizer.vocab_size))) == [False]
        digits = {i for i in range(tokenizer.vocab_size) if tokenizer.decode([i])[:1].isdigit()}
        assert evaluation.answers_greedily(model, [prompt], [answer[:-1]], digits) == [False]


def test_the_base_works_in_its_window_and_nowhere_else(tiny):
    """What the README promises of `tiny`: at least 95% to 256 tokens, at most 10% past 512."""
    model, tokenizer = tiny
    for length in (128, 192, 256):
        assert evaluation.passkey(model, tokenizer, length, 40, 1)["accuracy"] >= 0.95
    for length in (768, 1024, 2048):
        assert evaluation.passkey(model, tokenizer, length, 20, 1)["accuracy"] <= 0.10


def evaluate(monkeypatch, capsys, *arguments):
    """eval.py in this process -> what it printed."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    evaluation.main()
    return capsys.readouterr().out


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


def test_the_command_writes_json_and_plot(run, tmp_path):
    written, picture = tmp_path / "r.json", tmp_path / "p.png"
    done = run("eval.py", "--task", "passkey", "--model", "tiny", "--lengths", "512,128", "--trials", 4, "--json", written, "--plot", picture)
    assert done.returncode == 0, done.stderr
    results = json.loads(written.read_text())
    assert results["task"] == "passkey" and results["model"] == "tiny"
    for entry, length in zip(results["results"], (128, 512)):
        assert entry["length"] == length and entry["trials"] == 4 and len(entry["by_trial"]) == 4
        assert entry["accuracy"] == sum(t["correct"] for t in entry["by_trial"]) / 4
        assert [t["depth"] for t in entry["by_trial"]] == [0.125, 0.375, 0.625, 0.875]
        assert entry["beyond_window"] == (length > 256)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["128", "tiny", "100%", "51-100%", "100%", "100%", "100%", "100%"] in rows  # no trial between 40 and 60%
    assert any(row[:2] == ["512", "tiny*"] for row in rows)
    assert "tiny works to 128 tokens (95% or more at every length)" in done.stdout


def test_several_models_stand_in_one_table_and_plot(monkeypatch, capsys, tmp_path, make_llama):
    random, _ = make_llama("random", vocab_size=2048)
    shutil.copy(weights.resolve("tiny") / "tokenizer.model", random)
    text = tmp_path / "t.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 120)
    both = ("--model", "tiny", random, "--device", "cpu", "--plot", tmp_path / "p.png", "--json")
    out = evaluate(monkeypatch, capsys, "--task", "ppl", *both, tmp_path / "ppl.json", "--data", text, "--lengths", "64,128,5000")
    written = json.loads((tmp_path / "ppl.json").read_text())
    assert written["model"] == str(random) and [r["model"] for r in written["compared"]] == ["tiny"]
    for model in (written, *written["compared"]):
        short, _, long = model["results"]
        assert short["documents"] == 1 and short["ppl"] > 1 and short["standard_error"] is None and short["left_out"] == 0
        assert (long["documents"], long["left_out"], long["tokens"], long["ppl"]) == (0, 1, 0, None)
    assert written["results"][0]["ppl"] > 100 * written["compared"][0]["results"][0]["ppl"]
    rows = [line.split()[:2] for line in out.splitlines()]
    assert rows[1:5] == [["64", "tiny"], [f"{random}", rows[2][1]], ["128", "tiny"], [f"{random}*", rows[4][1]]]
    assert (tmp_path / "p.png").stat().st_size > 10000
    assert "tiny holds its perplexity to 128 tokens" in out

    out = evaluate(monkeypatch, capsys, "--task", "needle", *both, tmp_path / "n.json", "--data", text, "--lengths", "300,600", "--trials", 2)
    assert len(json.loads((tmp_path / "n.json").read_text())["compared"][0]["results"][1]["by_trial"]) == 2
    assert "is below 95% already at 300 tokens" in out

    arguments = ("--data", text, "--lengths", "64,128", "--tail", 32)
    out = evaluate(monkeypatch, capsys, "--task", "ppl", *both, tmp_path / "tail.json", *arguments)
    assert "loss against 64" in out
    out = evaluate(monkeypatch, capsys, "--task", "ppl", *both, tmp_path / "by.json", "--data", text, "--lengths", "64,128", "--by_position")
    assert "by position in windows of 128: 0-15: " in out


def test_perplexities_of_other_documents_are_not_compared(monkeypatch, capsys, tmp_path):
    """At the longer length only an easy text is left, so its low perplexity says nothing of the length."""
    hard, rng = tmp_path / "hard.jsonl", random.Random(0)
    lines = ["".join(rng.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(600)) for _ in range(3)]
    lines += ["The cat sat on the mat. " * 300]
    hard.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    written = tmp_path / "r.json"
    arguments = ("--task", "ppl", "--model", "tiny", "--data", hard, "--json", written, "--device", "cpu", "--lengths")
    out = evaluate(monkeypatch, capsys, *arguments, "64,128,512")
    assert [r["documents"] for r in json.loads(written.read_text())["results"]] == [4, 4, 1]
    assert json.loads(written.read_text())["results"][2]["ppl"] < json.loads(written.read_text())["results"][0]["ppl"] / 2
    assert "tiny holds its perplexity to 128 tokens" in out and "other lengths have other documents" in out


def test_a_killed_evaluation_goes_on(run, tmp_path, monkeypatch, capsys):
    arguments = ["--task", "passkey", "--model", "tiny", "--trials", 4, "--device", "cpu", "--lengths"]
    whole, halfway = tmp_path / "whole.json", tmp_path / "halfway.json"
    evaluate(monkeypatch, capsys, *arguments, "128,200,256", "--json", whole)
    command = [sys.executable, evaluation.__file__, *map(str, arguments), "128,200,65536", "--json", str(halfway)]  # the last takes long
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        while not halfway.exists() or len(json.loads(halfway.read_text())["results"]) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    measured = []
    real = evaluation.passkey
    monkeypatch.setattr(evaluation, "passkey", lambda *a: measured.append(a[2]) or real(*a))
    out = evaluate(monkeypatch, capsys, *arguments, "128,200,256", "--json", halfway)
    assert measured == [256]
    assert json.loads(halfway.read_text()) == json.loads(whole.read_text())
    assert evaluate(monkeypatch, capsys, *arguments, "128,200,256", "--json", whole) == out and measured == [256]
    evaluate(monkeypatch, capsys, *arguments, "150,256", "--json", whole)  # another length joins the others
    assert measured == [256, 150] and [r["length"] for r in json.loads(whole.read_text())["results"]] == [128, 150, 200, 256]
