import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
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
            seen_to, begin = end, begin + min(stride, room)
    assert got["documents"] == len(long_enough) and got["tokens"] == count
    assert got["ppl"] == pytest.approx(math.exp(nats / count), rel=1e-4)


@pytest.mark.parametrize("length", [130, 256, 700])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_prompt_is_the_papers_and_fills_its_length(tiny, length, depth):
    tokenizer = tiny[1]
    prompt, answer = evaluation.passkey_prompt(tokenizer, length, depth, "81501")
    line = len(tokenizer.encode(evaluation.GARBAGE)) + 2
    assert length - line < len(prompt) + len(answer) <= length
    assert prompt[0] == tokenizer.bos_id
    assert tokenizer.decode(answer).strip() == "81501"
    garbage = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    text = tokenizer.decode(prompt[1:])
    before, _, after = text.partition("The pass key is 81501. Remember it. 81501 is the pass key.")
    before, after = before.count(garbage), after.count(garbage)
    lines = [
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
        "I will quiz you about the important information there.",
        " ".join([garbage] * before),
        "The pass key is 81501. Remember it. 81501 is the pass key.",
        " ".join([garbage] * after),
        "What is the pass key? The pass key is",
    ]
    assert text == "\n".join(line for line in lines if line)
    assert before == round(depth * (before + after))


def test_one_pass_scoring_agrees_with_real_greedy_decoding(tiny):
    """Also where the model is wrong: at 384 and 512 tokens `tiny` fails often, and a wrong answer must count as wrong."""
    model, tokenizer = tiny
    verdicts = []
    for length in (256, 384, 448):
        results = evaluation.passkey(model, tokenizer, length, 12, 3)
        for trial, entry in enumerate(results["by_trial"]):
            key = str(evaluation.np.random.default_rng((3, length, trial)).integers(10000, 100000))
            prompt, _ = evaluation.passkey_prompt(tokenizer, length, entry["depth"], key)
            said = tokenizer.decode(model.generate(torch.tensor([prompt]), 8)[0].tolist())
            digits = "".join(c for c in said.lstrip()[:6] if c.isdigit())
            assert entry["correct"] == (said.lstrip().startswith(key) and digits == key), (length, trial, said)
            verdicts.append(entry["correct"])
    assert 5 < sum(verdicts) < 35  # both outcomes were met


def test_a_number_that_goes_on_is_wrong(tiny):
    """The answer's digits alone are not enough: a model that would say 815012 has not found 81501."""
    model, tokenizer = tiny
    prompt, answer = evaluation.passkey_prompt(tokenizer, 256, 0.5, "81501")
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


def test_the_command_writes_json_and_plot(run, tmp_path):
    report, picture = tmp_path / "r.json", tmp_path / "p.png"
    done = run("eval.py", "--task", "passkey", "--model", "tiny", "--lengths", "256,128", "--trials", 4, "--json", report, "--plot", picture)
    assert done.returncode == 0, done.stderr
    written = json.loads(report.read_text())
    assert set(written) == {"task", "model", "results"} and written["task"] == "passkey" and written["model"] == "tiny"
    for entry, length in zip(written["results"], (128, 256)):
        assert entry["length"] == length and entry["trials"] == 4 and len(entry["by_trial"]) == 4
        assert entry["accuracy"] == sum(t["correct"] for t in entry["by_trial"]) / 4
        assert [t["depth"] for t in entry["by_trial"]] == [0.125, 0.375, 0.625, 0.875]
    assert picture.read_bytes().startswith(b"\x89PNG")

    text = tmp_path / "t.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    done = run("eval.py", "--task", "ppl", "--model", "tiny", "tiny", "--lengths", "64,5000", "--data", text, "--json", report)
    assert done.returncode == 0, done.stderr
    written = json.loads(report.read_text())
    assert written["results"] == written["compared"][0]["results"]  # the same model twice
    short, long = written["results"]
    assert short["documents"] == 1 and short["ppl"] > 1
    assert long == {"length": 5000, "documents": 0, "tokens": 0, "ppl": None}
