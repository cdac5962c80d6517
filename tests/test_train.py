"""Training runs as a whole.

Losses are compared with a plain loop, for any number of processes; resuming, and what is written.
"""

import io
import itertools
import json
import re
import shlex
import shutil
import sys
import types

import pytest
import torch
import transformers
from conftest import ROOT, losses, metrics, needs_gpu
from safetensors.torch import load_file

import data
import fsdp
import retrieval
import train as train_script
from hf import families, scaling, tokenizer, weights
from hf.builtin import open_model, resolve
from storage import texts as storage_texts
from storage.checkpoint import Checkpoints
from storage.files import cache_dir

# ---------------------------------------------------------------- what a run writes


@pytest.fixture(scope="module")
def four_steps(train_into, tmp_path_factory):
    """The folder of a run of four steps with a checkpoint after each."""
    out = tmp_path_factory.mktemp("runs") / "four_steps"
    train_into(out, "--steps", 4, "--save_every", 1)
    return out


def test_a_run_writes_its_metrics_and_a_model_that_transformers_loads(four_steps):
    lines = metrics(four_steps)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert set(lines[0]) == {"step", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "peak_memory_gib"}
    # Warm-up over 2 steps, then linear decay that would reach zero after step 4.
    assert [line["lr"] for line in lines] == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.5e-3])
    ours = weights.load(four_steps / "model", dtype=torch.float32)
    assert ours.config.max_position_embeddings == 2048
    assert ours.config.rope_scaling == {
        "rope_type": "yarn",
        "factor": 8.0,
        "beta_fast": 8.0,
        "original_max_position_embeddings": 256,
    }
    load_theirs = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load_theirs(four_steps / "model", dtype=torch.float32)
    tokens = torch.randint(0, 2048, (1, 700))  # beyond the old window
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-3)
    moved = (ours.embed.weight - weights.load("tiny", dtype=torch.float32).embed.weight).abs().max()
    assert 1e-4 < moved < 1e-2  # Adam moves a weight by about lr a step


def checkpoint_names(out):
    return {path.name for path in (out / "checkpoints").iterdir()}


def test_the_newest_checkpoints_are_kept(four_steps, train, tmp_path):
    """Two of them, unless another number is given."""
    assert checkpoint_names(four_steps) == {"step-4", "step-3"}
    train("one", "--steps", 4, "--save_every", 1, "--keep", 1)
    assert checkpoint_names(tmp_path / "one") == {"step-4"}


def test_a_run_without_a_number_of_steps_keeps_one_checkpoint_and_then_none(
    train, call, short, tmp_path, monkeypatch
):
    """Checkpoints by the minute are there for the time of the run alone.

    This one has one after each step, unless the one before is still being written.
    """
    seen = []

    def look(checkpoints):
        seen.append(checkpoint_names(tmp_path / "run"))
        return remove_all(checkpoints)

    remove_all = Checkpoints.remove_all
    monkeypatch.setattr(Checkpoints, "remove_all", look)
    train("run", "--steps", 4, "--save_minutes", 1e-6)
    assert seen in ([{"step-1"}], [{"step-2"}], [{"step-3"}])
    assert not (tmp_path / "run" / "checkpoints").exists()
    # It is finished for all that.
    done = call("train", "--resume", "--out", tmp_path / "run")
    assert done.returncode == 0 and "is finished" in done.stderr


def test_a_short_run_writes_no_checkpoint(train, tmp_path, monkeypatch):
    """Unless it has taken ten minutes."""
    monkeypatch.setattr(Checkpoints, "save", None)
    train("short", "--steps", 2)


def test_after_ten_steps_the_time_that_is_left_is_said(call, short, tmp_path, monkeypatch):
    """Once in a call, from the steps after the first two, which compile: here each takes 900 seconds."""
    arguments = ("train", *short, "--out", tmp_path / "run", "--steps", 14)
    ticks = itertools.count()
    with monkeypatch.context() as patched:
        patched.setattr(train_script, "time", types.SimpleNamespace(perf_counter=lambda: 900 * next(ticks)))
        done = call(*arguments)
    assert done.returncode == 0, done.stderr
    assert re.findall("about .* to go", done.stderr) == ["about 1 hour to go"]


def test_resume_of_a_finished_run_changes_nothing(four_steps, call, short):
    """So that a job script may be started again."""
    before = (four_steps / "metrics.jsonl").read_bytes()
    done = call("train", *short, "--steps", 4, "--save_every", 1, "--out", four_steps, "--resume")
    assert done.returncode == 0 and f"is finished, its model is {four_steps / 'model'}" in done.stderr
    assert (four_steps / "metrics.jsonl").read_bytes() == before


def test_resume_of_a_finished_run_by_other_paths(four_steps, call, short, tmp_path):
    """They may hold what the run began with. If they do not, another run was meant."""
    again = ("train", *short, "--steps", 4, "--save_every", 1, "--out", four_steps, "--resume")
    shutil.copytree(resolve("tiny"), tmp_path / "tiny")
    done = call(*again, "--model", tmp_path / "tiny")
    assert done.returncode == 0 and "is finished" in done.stderr, done.stderr
    (tmp_path / "other.txt").write_text("Another text. " * 400)
    for option, path in (("--model", tmp_path / "absent"), ("--data", tmp_path / "other.txt")):
        done = call(*again, option, path)
        assert done.returncode == 2 and str(path) in done.stderr, done.stderr


def test_the_next_command_after_dynamic_scaling_names_the_length(call, short, tmp_path):
    """The model's config.json has its old window, which is where this scaling begins."""
    arguments = ("--steps", 1, "--rope", "dynamic", "--target_len", 1024, "--out", tmp_path / "run")
    done = call("train", *short, *arguments)
    assert done.returncode == 0 and done.stderr.strip().endswith("--lengths 1024"), done.stderr


def test_the_command_for_more_steps_than_a_run_had(train, call, tmp_path, monkeypatch):
    """It can be typed as it is, and trains the model on in the same window by the same settings."""
    train("a run", "--steps", 2, *EPISODES)
    done = call("train", "--resume", "--out", tmp_path / "a run", "--steps", 3)
    assert done.returncode == 2 and "is finished" in done.stderr
    _, _, command = done.stderr.strip().partition("in a run of its own: python train.py ")
    done = call("train", *shlex.split(command))
    assert done.returncode == 0, done.stderr
    assert "a run/model: the window of 2,048 tokens stays as it is" in done.stderr
    records = [json.loads((tmp_path / name / "args.json").read_text()) for name in ("a run", "a run-more")]
    differing = {key for key in records[0] if records[0][key] != records[1][key]}
    assert differing == {"model", "model_sha256", "steps", "rope", "factor", "beta_fast", "recipe"}
    assert records[1]["steps"] == 1 and len(metrics(tmp_path / "a run-more")) == 1


@pytest.fixture
def untrained(call, tmp_path):
    """untrained("name", *arguments) -> the model's folder of a run of no steps in tmp_path/name."""

    def start(name, *arguments):
        out = tmp_path / name
        done = call("train", "--steps", 0, "--device", "cpu", "--out", out, *arguments)
        assert done.returncode == 0, done.stderr
        return out / "model"

    return start


def test_the_factor_is_the_users(untrained, tmp_path):
    """NTK with head room reaches the checkpoint as the base that its equation gives.

    Without a recipe the factor is the windows' ratio.
    """
    base = tmp_path / "base"  # a folder, not the built-in name: the paper's settings
    shutil.copytree(resolve("tiny"), base)
    to_1024 = ("--model", base, "--target_len", 1024)
    ntk = untrained("ntk", *to_1024, "--rope", "ntk", "--factor", 20)
    written = json.loads((ntk / "config.json").read_text())
    assert written["rope_theta"] == pytest.approx(10000 * 20 ** (64 / 62)) and written["rope_scaling"] is None
    yarn = untrained("yarn", *to_1024)
    assert families.read_config(yarn).rope_scaling == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 256,
    }


def test_a_model_trained_in_its_own_window_keeps_it(untrained, call, tmp_path):
    """tiny's recipe makes the interpolation for twice the target, and here there is none to make."""
    same = ("--model", "tiny", "--target_len", 256)
    once = untrained("once", *same)
    assert families.read_config(once) == families.read_config(resolve("tiny"))
    untrained("twice", "--model", once, "--target_len", 256)
    done = call("train", *same, "--factor", 2, "--steps", 0, "--out", tmp_path / "refused")
    assert done.returncode == 2 and not (tmp_path / "refused").exists()
    assert done.stderr.startswith("error: yarn by 2 ") and done.stderr.count("\n") == 1


def test_the_untrained_model_needs_no_texts(untrained, tmp_path, monkeypatch):
    """It needs neither those that are named, which are not there, nor the standard library's.

    The latter would be tokenised into the cache.
    """
    named = untrained("named", "--model", "tiny", "--data", "absent.txt")
    monkeypatch.setenv("POSE_CACHE", str(tmp_path / "cache"))
    default = untrained("default", "--model", "tiny", "--llama_4_scaling_beta", 0.25)
    assert families.read_config(default).rope_scaling["llama_4_scaling_beta"] == 0.25
    assert not list((tmp_path / "cache").glob("tokens*"))
    base = load_file(resolve("tiny") / "model.safetensors")
    for folder in (named, default):
        ours = load_file(folder / "model.safetensors")
        assert ours.keys() == base.keys() and all(torch.equal(ours[key], base[key]) for key in base)


# ---------------------------------------------------------------- the losses


@pytest.fixture(scope="module")
def three_steps(train_into, tmp_path_factory):
    """The metrics of a run of three steps on one CPU in float32."""
    return train_into(tmp_path_factory.mktemp("runs") / "three_steps", "--steps", 3)


def plain_loop(texts, lrs, skipped=(), reach=2048, train_len=64, share=0, all_count=True):
    """Yield loss and gradient norm by step of the same examples with a plain torch model and optimizer.

    There is no FSDP and there are no micro-batches. share: of the examples that are episodes of 256 tokens.
    all_count: whether all tokens of completions count.
    """
    tiny = open_model("tiny")
    model = weights.load("tiny", dtype=torch.float32)
    model.config = scaling.extend(model.config, "yarn", 2048, beta_fast=8)
    tokeniser = tiny.load_tokenizer()
    documents = data.tokenised([texts], tokenizer.load(tiny.path), cache_dir())
    if all_count:
        documents.masked = None
    sampling = {"method": "pose", "target_len": reach, "chunks": 2, "offset": "uniform"}

    def make(rng, document, weights):
        return retrieval.episode(rng, document, 256, reach, tokeniser, weights)

    episodes = data.Episodes(share, 4, 256, make)
    batches = data.Batches(documents, 0, tokeniser.bos_id, episodes, train_len=train_len, **sampling)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step, lr in enumerate(lrs):
        nats, counts = [], []
        for example in batches(step, range(4)):
            tokens, positions, targets, token_weights = map(torch.from_numpy, example)
            logits = model(tokens, positions).flatten(0, 1)
            nats.append(torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="none"))
            counts.append(token_weights.flatten())
        loss = (torch.cat(nats) * torch.cat(counts)).sum() / torch.cat(counts).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if step not in skipped:
            optimizer.step()
        optimizer.zero_grad()
        yield loss.item(), norm.item()


def test_the_first_losses_equal_a_plain_loop(three_steps, train, texts):
    overshot = train("overshot", "--steps", 3, "--overshoot", 1.5)
    for lines, reach in ((three_steps, 2048), (overshot, 3072)):
        expected = plain_loop(texts, [0.5e-3, 1e-3, 1e-3], reach=reach)
        for line, (loss, norm) in zip(lines, expected, strict=True):
            assert line["loss"] == pytest.approx(loss, rel=1e-4)
            assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize(
    "processes, arguments",
    [
        (None, ("--micro_batch_size", 1, "--activation_checkpointing", "full")),
        (2, ("--micro_batch_size", 1, "--cpu_offload", "--activation_checkpointing", "selective")),
        (2, ("--micro_batch_size", 2)),
        (4, ()),
    ],
    ids=["1, recomputed", "2, recomputed and offloaded", "2", "4"],
)
def test_the_curve_depends_neither_on_processes_nor_on_memory_savers(
    three_steps, train, processes, arguments
):
    """That each of the latter gives the same gradients: test_fsdp.py."""
    lines = train("other", "--steps", 3, *arguments, processes=processes)
    for line, expected in zip(lines, three_steps, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        # A factor on the gradient would not show in the losses that AdamW gives.
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_bfloat16_compute_stays_near_float32(three_steps, train):
    reference = losses(three_steps)
    for name in ("--dtype", "--param_dtype"):
        other = losses(train(name[2:], "--steps", 3, name, "bfloat16"))
        torch.testing.assert_close(other, reference, rtol=2e-2, atol=0)
        assert not torch.equal(other, reference)


@needs_gpu
def test_a_gpu_gives_the_curve_of_the_cpu(three_steps, train):
    """Compiled, with NCCL, and with all that shards, recomputes or offloads."""
    runs = [
        ("float32",),
        ("bfloat16",),
        ("float32", "--activation_checkpointing", "full", "--cpu_offload"),
        ("bfloat16", "--cpu_offload"),
    ]
    for processes in range(1, min(torch.cuda.device_count(), 2) + 1):
        for dtype, *arguments in runs:
            name = "-".join((dtype, str(processes), *arguments))
            on_gpu = ("--device", "cuda", "--dtype", dtype, *arguments)
            lines = train(name, "--steps", 3, *on_gpu, processes=processes)
            loss_error, norm_error = (1e-4, 1e-3) if dtype == "float32" else (1e-2, 5e-2)
            for line, expected in zip(lines, three_steps, strict=True):
                assert line["loss"] == pytest.approx(expected["loss"], rel=loss_error), name
                assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=norm_error), name


# ---------------------------------------------------------------- retrieval episodes

EPISODES = ("--retrieval", 0.5, "--train_len", 512)  # half the examples are two episodes in tiny's window


@pytest.fixture(scope="module")
def three_steps_with_episodes(train_into, tmp_path_factory):
    """The metrics of a run of three steps with episodes shorter than the other examples."""
    return train_into(tmp_path_factory.mktemp("runs") / "episodes", "--steps", 3, *EPISODES)


def test_the_first_losses_with_episodes_equal_a_plain_loop(three_steps_with_episodes, train, texts):
    """Each is the mean by the weights of the tokens over a whole step, also where all windows are as long."""
    as_long = ("--retrieval", 0.5, "--train_len", 256, "--micro_batch_size", 2)
    alike = train("alike", "--steps", 3, *as_long, processes=2)
    for lines, train_len in ((three_steps_with_episodes, 512), (alike, 256)):
        expected = plain_loop(texts, [0.5e-3, 1e-3, 1e-3], train_len=train_len, share=0.5)
        for line, (loss, norm) in zip(lines, expected, strict=True):
            assert line["loss"] == pytest.approx(loss, rel=1e-4)
            assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_curve_with_episodes_does_not_depend_on_processes(three_steps_with_episodes, train, processes):
    """Of four processes two have an example of episodes in each step, and two have none."""
    lines = train("other", "--steps", 3, *EPISODES, processes=processes)
    for line, expected in zip(lines, three_steps_with_episodes, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_windows_too_short_for_an_episode_are_plain_ones(train):
    """None of 16 tokens has room. They are windows of other texts, so that the losses are only near."""
    first = ("--steps", 1, "--train_len", 16, "--batch_size", 64)
    without_room = losses(train("without_room", *first, "--retrieval", 1))
    torch.testing.assert_close(without_room, losses(train("plain", *first)), rtol=0.05, atol=0)


def test_mfu_counts_the_windows_of_episodes(train, monkeypatch):
    monkeypatch.setattr(fsdp, "peak_flops", lambda device: 1e12)
    (line,) = train("run", "--steps", 1, *EPISODES)
    config = open_model("tiny").config
    flops = (config.flops_per_token(256) + config.flops_per_token(512)) / 2
    assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / 1e12)


# ---------------------------------------------------------------- updates that are not finite

POISONED = """
import os, runpy, sys
sys.path.insert(0, sys.argv[1])
import model
true_forward, calls, poison = model.Transformer.forward, [], eval(sys.argv[2])
def forward(self, *arguments, **others):
    calls.append(0)
    loss = true_forward(self, *arguments, **others)
    is_last_process = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
    return poison(len(calls) - 1, loss) if is_last_process else loss
model.Transformer.forward = forward
sys.argv = sys.argv[2:]
runpy.run_path(sys.path[0] + "/train.py", run_name="__main__")
"""


@pytest.fixture
def poisoned(run, short, tmp_path):
    """poisoned(poison, *arguments) -> the finished run in tmp_path/run, of one micro-batch a step.

    Its loss in the last process is what a function `poison` of the step and the true one makes of it.
    """
    script = tmp_path / "poisoned.py"
    script.write_text(POISONED)

    def start(poison, *arguments, processes=None):
        return run(script, ROOT, poison, *short, "--out", tmp_path / "run", *arguments, processes=processes)

    return start


def test_an_update_that_is_not_finite_is_left_out(poisoned, texts, tmp_path):
    """One process of two has it. An infinite summand leaves the gradient finite."""
    poison = (
        "lambda step, loss: loss * float('nan') if step == 1 else loss + float('inf') if step == 2 else loss"
    )
    done = poisoned(poison, "--steps", 5, processes=2)
    assert done.returncode == 0, done.stderr
    lines = metrics(tmp_path / "run")
    assert [line.get("skipped") for line in lines] == [None, True, True, None, None]
    assert lines[1]["loss"] is None and lines[1]["grad_norm"] is None
    expected = list(plain_loop(texts, [0.5e-3, 1e-3, 1e-3, 2e-3 / 3, 1e-3 / 3], skipped=[1, 2]))
    assert lines[2]["loss"] is None and lines[2]["grad_norm"] == pytest.approx(expected[2][1], rel=1e-3)
    for i in (0, 3, 4):
        assert lines[i]["loss"] == pytest.approx(expected[i][0], rel=1e-4)


def test_a_run_that_is_not_finite_any_more_ends(poisoned, tmp_path):
    poison = "lambda step, loss: loss * float('nan') if step >= 5 else loss"
    done = poisoned(poison, "--steps", 40, "--save_every", 4)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: step 15: loss or gradient was not finite 10 times" in done.stderr.splitlines()[-1]
    assert len(metrics(tmp_path / "run")) == 15 and not (tmp_path / "run" / "model").exists()
    assert checkpoint_names(tmp_path / "run") == {"step-8", "step-12"}  # of the weights of step 5


@needs_gpu
@pytest.mark.parametrize("offload", [(), ("--cpu_offload",)])
def test_a_gpu_leaves_out_an_update_that_is_not_finite(poisoned, texts, tmp_path, offload):
    poison = "lambda step, loss: loss * float('nan') if step == 1 else loss"
    done = poisoned(poison, "--steps", 4, "--device", "cuda", "--dtype", "float32", *offload)
    assert done.returncode == 0, done.stderr
    lines = metrics(tmp_path / "run")
    assert [line.get("skipped") for line in lines] == [None, True, None, None]
    expected = list(plain_loop(texts, [0.5e-3, 1e-3, 1e-3, 0.5e-3], skipped=[1]))
    for i in (0, 2, 3):
        assert lines[i]["loss"] == pytest.approx(expected[i][0], rel=1e-3)


# ---------------------------------------------------------------- resuming


def test_resume_needs_no_more_than_the_folder(train, call, run, texts, tmp_path):
    """All else is as the run was started, also what leaves its result alone.

    Only what the number of processes says may differ.
    """
    first = tmp_path / "first"
    validation = ("--eval_every", 2, "--eval_data", texts)
    others = ("--seed", 5, "--method", "randpos", "--save_every", 2, *validation)
    whole = losses(train("first", "--steps", 4, *others))
    shutil.rmtree(first / "model")
    shutil.rmtree(first / "checkpoints" / "step-4")
    for processes in (None, 2):
        out = tmp_path / f"resumed by {processes}"
        shutil.copytree(first, out)
        resume = ("--resume", "--out", out)
        done = run("train.py", *resume, processes=2) if processes else call("train", *resume)
        assert done.returncode == 0 and "going on after step 2" in done.stderr, done.stderr
        torch.testing.assert_close(losses(metrics(out)), whole, rtol=1e-5 if processes else 0, atol=0)
        assert list(metrics(out)[-1]["validation"]) == ["64"]
        assert (out / "checkpoints" / "step-4").exists() and (out / "model").exists()


def test_a_resumed_run_with_episodes_has_the_same_weights(train, tmp_path):
    train("run", "--steps", 4, "--save_every", 2, *EPISODES)
    out = tmp_path / "run"
    whole, weights_of_whole = metrics(out), (out / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "step-4")
    resumed = train("run", "--resume", "--steps", 4, *EPISODES)
    assert torch.equal(losses(resumed), losses(whole))
    assert (out / "model" / "model.safetensors").read_bytes() == weights_of_whole


def test_a_run_on_standard_input_is_resumed_without_it(call, short, texts, tmp_path, monkeypatch):
    """What came through it is kept, so the run goes on with the same texts; other ones are refused."""
    storage_texts.saved_stdin.cache_clear()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(texts.read_bytes())))
    out = tmp_path / "run"
    piped = [*("-" if word is texts else word for word in short), "--out", out]
    done = call("train", *piped, "--steps", 2, "--save_every", 1)
    assert done.returncode == 0, done.stderr
    whole = metrics(out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "step-2")
    (out / "finished.json").unlink()
    storage_texts.saved_stdin.cache_clear()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(texts.read_bytes()[:-9] + b'other"}\n')))
    done = call("train", *piped, "--resume")
    assert done.returncode == 2 and "began with another --data" in done.stderr
    monkeypatch.setattr(sys, "stdin", None)
    done = call("train", "--out", out, "--resume")
    assert done.returncode == 0 and "going on after step 1" in done.stderr, done.stderr
    assert torch.equal(losses(metrics(out)), losses(whole))
    storage_texts.saved_stdin.cache_clear()


# ---------------------------------------------------------------- conversations


@pytest.fixture(scope="module")
def completions(texts, tmp_path_factory):
    """A file of six prompts with completions, five times as long."""
    lines = []
    for line in texts.read_text().splitlines():
        words = json.loads(line)["text"].split(" ")
        prompt, completion = " ".join(words[:100]), " " + " ".join(words[100:600])
        lines.append(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    path = tmp_path_factory.mktemp("texts") / "completions.jsonl"
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("loss_on", ["answers", "all"])
def test_answers_alone_count_in_the_loss_or_all_does(call, short, texts, completions, tmp_path, loss_on):
    """In training and in validation. The prompt is longer than a training window."""
    arguments = [completions if word is texts else word for word in short]
    validation = ("--eval_every", 2, "--eval_data", completions, "--eval_lengths", "500")
    out = tmp_path / "run"
    done = call("train", *arguments, *validation, "--loss_on", loss_on, "--steps", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    expected = plain_loop(completions, [0.5e-3, 1e-3], all_count=loss_on == "all")
    for line, (loss, norm) in zip(metrics(out), expected, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=1e-4)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)

    model, tok = weights.load(out / "model", dtype=torch.float32), open_model("tiny").load_tokenizer()
    nats = []
    for line in completions.read_text().splitlines():
        document = json.loads(line)
        n_prompt = len(tok.encode(document["prompt"]))
        ids = torch.tensor([[tok.bos_id, *tok.encode(document["prompt"] + document["completion"])]])[:, :501]
        with torch.no_grad():
            logits = model(ids[:, :-1])[0]
        nats.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
        if loss_on == "answers":
            assert 64 < n_prompt < 450
            nats[-1] = nats[-1][n_prompt:]
    measured = metrics(out)[-1]["validation"]["500"]
    assert measured == pytest.approx(torch.cat(nats).mean().item(), rel=2e-3)  # the weights are bfloat16
    share = "of the tokens are answers or plain text" in done.stderr
    assert share == (loss_on == "answers")


def test_a_step_in_which_no_token_counts_changes_nothing(train, tmp_path, monkeypatch):
    """A window without any may be drawn. Its loss is 0, and no weight is lost to NaN."""
    window = data.Batches.window

    def without_weights(*arguments):
        *ids, token_weights = window(*arguments)
        return *ids, 0 * token_weights

    monkeypatch.setattr(data.Batches, "window", without_weights)
    lines = train("none", "--steps", 2)
    assert [line["loss"] for line in lines] == [0, 0] and not any("skipped" in line for line in lines)
    trained = load_file(tmp_path / "none" / "model" / "model.safetensors")
    untrained = load_file(resolve("tiny") / "model.safetensors")
    assert trained.keys() == untrained.keys()
    assert all(torch.equal(trained[name], untrained[name]) for name in trained)


# ---------------------------------------------------------------- the quick start


def test_the_quick_start_extends_tiny(begun_quick_start):
    process, folder = begun_quick_start
    assert process.wait() == 0, (folder / "stderr").read_text()
    report = json.loads((folder / "passkey.json").read_text())
    extended, base = (
        {result["length"]: result["accuracy"] for result in reported["results"]}
        for reported in (report, report["compared"][0])
    )
    assert list(extended) == list(base) == [256, 512, 1024, 2048]
    assert base[256] >= 0.95 and base[1024] <= 0.1 and base[2048] <= 0.1
    assert min(extended[1024], extended[2048]) >= 0.6  # 100 and 96% with all of them
