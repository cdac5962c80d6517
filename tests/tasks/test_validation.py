"""The validation loss of a run, in metrics.jsonl and in TensorBoard's events."""

import re

import pytest
import torch
from conftest import metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import data
from hf import tokenizer, weights
from hf.builtin import resolve
from storage.files import cache_dir


@pytest.fixture(scope="module")
def validated(run, short, texts, tmp_path_factory):
    """The folder of a run of three steps by two processes, and what it said.

    The run is validated and shown in TensorBoard.
    """
    out = tmp_path_factory.mktemp("runs") / "validated"
    validation = ("--eval_every", 2, "--eval_data", texts, "--eval_lengths", "64,500")
    arguments = (*short, "--out", out, "--steps", 3, *validation, "--tensorboard")
    done = run("train.py", *arguments, processes=2)
    assert done.returncode == 0, done.stderr
    return out, done.stderr


def test_validation_is_measured_before_the_first_step_and_after_the_last(validated):
    """And every second step."""
    out, stderr = validated
    said = [line.split(":")[0] for line in stderr.splitlines() if ": validation loss" in line]
    assert said == ["step 0", "step 2", "step 3"]
    assert ["validation" in line for line in metrics(out)] == [False, True, True]


def plain_loss(folder, texts, n):
    """Return the loss of the model in a folder in windows of n tokens that end at token 500.

    It is that of plain forward passes on the last 64 tokens of each, in nats a token.
    """
    model = weights.load(folder, dtype=torch.float32)
    tok = tokenizer.load(resolve("tiny"))
    documents = data.tokenised([texts], tok, cache_dir())
    nats = []
    for i in range(len(documents)):
        row = torch.tensor([[tok.bos_id, *documents[i][500 - n : 500].tolist()]])
        with torch.no_grad():
            logits = model(row[:, :-1])[0, -64:]
        nats.append(torch.nn.functional.cross_entropy(logits, row[0, -64:]).item())
    return sum(nats) / len(nats)


def test_the_last_validation_is_that_of_the_model_that_is_written(validated, texts):
    out, _ = validated
    for n in (64, 500):
        measured = metrics(out)[-1]["validation"][str(n)]
        # The written weights are bfloat16.
        assert measured == pytest.approx(plain_loss(out / "model", texts, n), rel=1e-3)


def test_the_untrained_model_is_validated_too(call, texts, tmp_path):
    """What the interpolation alone does is seen there. No texts to train on are needed."""
    validation = ("--eval_every", 1, "--eval_data", texts, "--eval_lengths", "64,500")
    arguments = ("--model", "tiny", "--device", "cpu", "--data", "absent.txt", "--steps", 0, *validation)
    done = call("train", *arguments, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    ((short, long),) = re.findall(r"^step 0: validation loss (\S+) at 64, (\S+) at 500$", done.stderr, re.M)
    for measured, n in ((short, 64), (long, 500)):
        assert float(measured) == pytest.approx(plain_loss(tmp_path / "run" / "model", texts, n), abs=6e-4)


def test_tensorboard_shows_the_figures_of_metrics(validated):
    out, _ = validated
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    for key in ("loss", "lr", "grad_norm"):
        expected = [line[key] for line in metrics(out)]
        assert [event.value for event in events.Scalars(key)] == pytest.approx(expected, rel=1e-6)
    assert [event.step for event in events.Scalars("validation/500")] == [2, 3]
