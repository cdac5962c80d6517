import copy
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from conftest import ROOT, needs_gpu
from safetensors.torch import load_file

import train as trainer
from bench import SHAPES
from hf import weights
from storage.files import InputError
from storage.log import Log


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghij") for _ in range(rng.randint(1, 6))) for _ in range(200)]
    path = tmp_path_factory.mktemp("texts") / "words.jsonl"
    path.write_text(
        "".join(json.dumps({"text": " ".join(rng.choices(words, k=800))}) + "\n" for _ in range(6))
    )
    return path


@pytest.fixture
def short(texts):
    """The arguments of a small PoSE run of `tiny`, but for --steps and --out."""
    sizes = ["--train_len", 64, "--batch_size", 4, "--factor", 8]
    return ["--model", "tiny", "--device", "cpu", "--data", texts, *sizes, "--lr", 1e-3, "--warmup_steps", 2]


@pytest.fixture
def train(run, short, tmp_path):
    """train("name", "--steps", 3, …) -> the lines of its metrics.jsonl; the run of `short` in
    tmp_path/name."""

    def start(name, *arguments, processes=None):
        done = run("train.py", *short, "--out", tmp_path / name, *arguments, processes=processes)
        assert done.returncode == 0, done.stderr
        return metrics(tmp_path / name)

    return start


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(lines):
    return torch.tensor([line["loss"] for line in lines], dtype=torch.float64)


def test_a_run_writes_its_metrics_and_a_model_that_transformers_loads(train, tmp_path):
    lines = train("run", "--steps", 4)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert set(lines[0]) == {"step", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "peak_memory_gib"}
    # Warm-up over 2 steps, then linear decay that would reach zero after step 4.
    assert [line["lr"] for line in lines] == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.5e-3])
    ours = weights.load(tmp_path / "run" / "model", dtype=torch.float32)
    assert ours.config.max_position_embeddings == 2048
    assert ours.config.rope_scaling == {
        "rope_type": "yarn",
        "factor": 8.0,
        "beta_fast": 8.0,
        "original_max_position_embeddings": 256,
    }
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "model", dtype=torch.float32
    )
    tokens = torch.randint(0, 2048, (1, 700))  # beyond the old window
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-3)
    moved = (ours.embed.weight - weights.load("tiny", dtype=torch.float32).embed.weight).abs().max()
    assert 1e-4 < moved < 1e-2  # Adam moves a weight by about lr a step


def test_the_factor_is_the_users(run, tmp_path):
    """NTK with head room reaches the checkpoint as the base that its equation gives; without a recipe
    the factor is the windows' ratio."""
    base = tmp_path / "base"  # a folder, not the built-in name: the paper's settings
    shutil.copytree(weights.resolve("tiny"), base)
    for name, arguments in (("ntk", ["--rope", "ntk", "--factor", 20]), ("yarn", [])):
        untrained(run, tmp_path / name, "--model", base, "--target_len", 1024, *arguments)
    written = json.loads((tmp_path / "ntk" / "model" / "config.json").read_text())
    assert written["rope_theta"] == pytest.approx(10000 * 20 ** (64 / 62)) and written["rope_scaling"] is None
    assert weights.read_config(tmp_path / "yarn" / "model").rope_scaling == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256
    }  # fmt: skip


@pytest.mark.parametrize(
    "arguments, factor, overshoot, beta",
    [
        ([], 96, 1.25, 0.1), (["--rope", "yarn"], 16, 1, 0), (["--method", "full"], 96, 1, 0.1), (["--method", "pi"], 96, 1, 0.1),
        (["--factor", "20", "--overshoot", "1.5", "--llama_4_scaling_beta", "0"], 20, 1.5, 0),
    ],
)  # fmt: skip
def test_a_recipe_is_for_its_own_interpolation(monkeypatch, arguments, factor, overshoot, beta):
    """SmolLM2's, which nothing here can run, for 16 windows; with another interpolation the paper's
    settings are left."""
    monkeypatch.setattr(
        sys,
        "argv",
        ["train.py", "--model", "smollm2-135m", "--target_len", "131072", "--device", "cpu", *arguments],
    )
    args = trainer.parse_arguments()
    trainer.complete(args, SHAPES["smollm2-135m"])
    assert (args.factor, args.overshoot, args.llama_4_scaling_beta) == (factor, overshoot, beta)
    recorded = copy.deepcopy(args)
    trainer.complete(args, SHAPES["smollm2-135m"])  # as --resume does with what the run recorded
    assert args == recorded


@pytest.mark.parametrize(
    "arguments, processes, train_len, batch_size",
    [
        ("--data texts", 1, 32768, 4), ("--data texts", 8, 32768, 8), ("", 8, 8192, 16), ("", 3, 8192, 15),
        ("--data texts --batch_size 6", 2, 32768, 6),
        ("--data texts --target_len 65536", 1, 16384, 8), ("--data texts --target_len 16384", 1, 8192, 16), ("--train_len 4096", 1, 4096, 16),
        ("--train_len 24576", 1, 24576, 5), ("--data texts --method full", 1, 131072, 16), ("--data texts --method pi", 1, 32768, 4),
    ],
)  # fmt: skip
def test_smollm2_trains_in_windows_longer_than_its_own_where_there_are_texts(
    monkeypatch, arguments, processes, train_len, batch_size
):
    """With as many tokens in a step as 16 windows of the model, as near as processes divide them, and
    room for skips in each example."""
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--model", "smollm2-135m", "--device", "cpu", *arguments.split()]
    )
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    args = trainer.parse_arguments()
    trainer.complete(args, SHAPES["smollm2-135m"])
    assert (args.train_len, args.batch_size) == (train_len, batch_size)


def test_ntks_factor_is_not_rounded_away(monkeypatch):
    """A quarter more than SmolLM2's window slows the critical pair, 20 of 31, by a quarter."""
    monkeypatch.setattr(
        sys,
        "argv",
        ["train.py", "--model", "folder", "--rope", "ntk", "--target_len", "10240", "--device", "cpu"],
    )
    args = trainer.parse_arguments()
    trainer.complete(args, SHAPES["smollm2-135m"])
    assert args.factor ** (20 / 31) == pytest.approx(1.25, rel=5e-3)


def test_a_models_own_query_scale_stays_unless_another_is_given(monkeypatch):
    own = {"rope_type": "default", "original_max_position_embeddings": 4096, "llama_4_scaling_beta": 0.2}
    config = dataclasses.replace(SHAPES["smollm2-135m"], rope_scaling=own)
    for given, beta in (
        ([], 0.2),
        (["--llama_4_scaling_beta", "0"], 0),
        (["--llama_4_scaling_beta", "0.3"], 0.3),
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", "--model", "folder", "--device", "cpu", *given])
        args = trainer.parse_arguments()
        trainer.complete(args, config)
        assert args.llama_4_scaling_beta == beta
        kept = own | {"llama_4_scaling_beta": beta} if beta else None
        assert weights.extend(config, "default", 2**17, args.llama_4_scaling_beta).rope_scaling == kept
        assert (
            weights.extend(config, "yarn", 2**17, args.llama_4_scaling_beta).rope_scaling.get(
                "llama_4_scaling_beta"
            )
            or 0
        ) == beta


def test_validation_of_a_run_that_goes_on_can_be_switched_off(monkeypatch, tmp_path):
    command = ["train.py", "--out", str(tmp_path)]
    monkeypatch.setattr(
        sys, "argv", [*command, "--eval_every", "2", "--eval_data", "gone.txt", "--eval_lengths", "64"]
    )
    (tmp_path / "args.json").write_text(
        json.dumps({k: v for k, v in vars(trainer.parse_arguments()).items() if k not in ("out", "resume")})
    )
    monkeypatch.setattr(sys, "argv", [*command, "--resume"])
    assert trainer.parse_arguments().eval_data == ["gone.txt"]
    monkeypatch.setattr(sys, "argv", [*command, "--resume", "--eval_every", "0"])
    args = trainer.parse_arguments()
    assert (args.eval_every, args.eval_data, args.eval_lengths) == (0, [], None)
    monkeypatch.setattr(sys, "argv", [*command, "--resume", "--eval_every", "0", "--eval_data", "other.txt"])
    with pytest.raises(InputError, match="--eval_every and --eval_data belong together"):
        trainer.complete(trainer.parse_arguments(), SHAPES["smollm2-135m"])


def untrained(run, out, *arguments):
    done = run("train.py", "--steps", 0, "--device", "cpu", "--out", out, *arguments)
    assert done.returncode == 0, done.stderr


def test_the_untrained_model_needs_no_texts(run, tmp_path):
    """Neither those that are named, which are not there, nor the standard library's, which would be
    tokenised into the cache."""
    untrained(
        run,
        tmp_path / "run",
        "--model",
        "tiny",
        "--data",
        "absent.txt",
        "--eval_every",
        1,
        "--eval_data",
        "absent.txt",
    )
    scale = ("--llama_4_scaling_beta", 0.25)
    untrained(
        lambda *arguments: run(*arguments, env={"POSE_CACHE": tmp_path / "cache"}),
        tmp_path / "default",
        "--model",
        "tiny",
        *scale,
    )
    assert weights.read_config(tmp_path / "default" / "model").rope_scaling["llama_4_scaling_beta"] == 0.25
    assert not list((tmp_path / "cache").glob("tokens*"))
    for name in ("run", "default"):
        ours, base = (
            load_file(folder / "model.safetensors")
            for folder in (tmp_path / name / "model", weights.resolve("tiny"))
        )
        assert ours.keys() == base.keys() and all(torch.equal(ours[key], base[key]) for key in base)


def plain_loop(texts, lrs, skipped=(), reach=2048):
    """Yield loss and gradient norm by step of the same examples on a plain torch model and optimizer,
    no FSDP, no micro-batches."""
    import tokenizer

    import data

    model = weights.load("tiny", dtype=torch.float32)
    model.config = weights.extend(model.config, "yarn", 2048, beta_fast=8)
    tok = tokenizer.load(weights.resolve("tiny"))
    documents = data.prepare([texts], tok, weights.cache_dir())
    batches = data.Batches(
        documents, 0, tok.bos_id, method="pose", train_len=64, target_len=reach, chunks=2, offset="uniform"
    )
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step, lr in enumerate(lrs):
        tokens, positions, targets = map(torch.from_numpy, batches(step, range(4)))
        loss = torch.nn.functional.cross_entropy(model(tokens, positions).flatten(0, 1), targets.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if step not in skipped:
            optimizer.step()
        optimizer.zero_grad()
        yield loss.item(), norm.item()


@pytest.mark.parametrize("arguments, reach", [((), 2048), (("--overshoot", 1.5), 3072)])
def test_the_first_losses_equal_a_plain_loop(train, texts, arguments, reach):
    lines = train("run", "--steps", 3, *arguments)
    for line, (loss, norm) in zip(lines, plain_loop(texts, [0.5e-3, 1e-3, 1e-3], reach=reach), strict=True):
        assert line["loss"] == pytest.approx(loss, rel=1e-4)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)


POISONED = """
import os, runpy, sys
sys.path.insert(0, sys.argv[1])
import model
real, calls, poison = model.Transformer.forward, [], eval(sys.argv[2])
def forward(self, *arguments, **others):
    calls.append(0)
    loss = real(self, *arguments, **others)
    last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
    return poison(len(calls) - 1, loss) if last else loss
model.Transformer.forward = forward
sys.argv = sys.argv[2:]
runpy.run_path(sys.path[0] + "/train.py", run_name="__main__")
"""


def poisoned(run, short, tmp_path, poison, *arguments, processes=None):
    """A run (of one micro-batch a step) whose loss in the last process is what a function `poison` of
    the step and the true one makes of it."""
    (tmp_path / "poisoned.py").write_text(POISONED)
    return run(
        tmp_path / "poisoned.py",
        ROOT,
        poison,
        *short,
        "--out",
        tmp_path / "run",
        *arguments,
        processes=processes,
    )


def test_an_update_that_is_not_finite_is_left_out(run, short, texts, tmp_path):
    """One process of two has it. An infinite summand leaves the gradient finite."""
    poison = (
        "lambda step, loss: loss * float('nan') if step == 1 else loss + float('inf') if step == 2 else loss"
    )
    done = poisoned(run, short, tmp_path, poison, "--steps", 5, processes=2)
    assert done.returncode == 0, done.stderr
    lines = metrics(tmp_path / "run")
    assert [line.get("skipped") for line in lines] == [None, True, True, None, None]
    assert lines[1]["loss"] is None and lines[1]["grad_norm"] is None
    expected = list(plain_loop(texts, [0.5e-3, 1e-3, 1e-3, 2e-3 / 3, 1e-3 / 3], skipped=[1, 2]))
    assert lines[2]["loss"] is None and lines[2]["grad_norm"] == pytest.approx(expected[2][1], rel=1e-3)
    for i in (0, 3, 4):
        assert lines[i]["loss"] == pytest.approx(expected[i][0], rel=1e-4)


def test_a_run_that_is_not_finite_any_more_ends(run, short, tmp_path):
    poison = "lambda step, loss: loss * float('nan') if step >= 5 else loss"
    done = poisoned(run, short, tmp_path, poison, "--steps", 40, "--save_every", 4)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: step 15: loss or gradient was not finite 10 times" in done.stderr.splitlines()[-1]
    assert len(metrics(tmp_path / "run")) == 15 and not (tmp_path / "run" / "model").exists()
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {
        "step-8",
        "step-12",
    }  # of the weights of step 5


def test_the_curve_depends_neither_on_processes_nor_on_memory_savers(train):
    """That each of the latter gives the same gradients: test_fsdp.py."""
    reference = train("one", "--steps", 3)
    for processes, *arguments in (
        (None, "--micro_batch_size", 1, "--activation_checkpointing", "full"),
        (2, "--micro_batch_size", 1, "--cpu_offload", "--activation_checkpointing", "selective"),
        (2, "--micro_batch_size", 2),
        (4,),
    ):
        lines = train(
            "-".join(map(str, (processes, *arguments))), "--steps", 3, *arguments, processes=processes
        )
        for line, expected in zip(lines, reference, strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert line["grad_norm"] == pytest.approx(
                expected["grad_norm"], rel=1e-4
            )  # a factor on it would not show in AdamW's losses


@needs_gpu
def test_a_gpu_gives_the_curve_of_the_cpu(train):
    """Compiled, with NCCL, and with all that shards, recomputes or offloads."""
    reference = train("cpu", "--steps", 3)
    runs = [
        ("float32",),
        ("bfloat16",),
        ("float32", "--activation_checkpointing", "full", "--cpu_offload"),
        ("bfloat16", "--cpu_offload"),
    ]
    for processes in range(1, min(torch.cuda.device_count(), 2) + 1):
        for dtype, *arguments in runs:
            name = "-".join((dtype, str(processes), *arguments))
            lines = train(
                name, "--steps", 3, "--device", "cuda", "--dtype", dtype, *arguments, processes=processes
            )
            loss_error, norm_error = (1e-4, 1e-3) if dtype == "float32" else (1e-2, 5e-2)
            for line, expected in zip(lines, reference, strict=True):
                assert line["loss"] == pytest.approx(expected["loss"], rel=loss_error), name
                assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=norm_error), name


@needs_gpu
@pytest.mark.parametrize("offload", [(), ("--cpu_offload",)])
def test_a_gpu_leaves_out_an_update_that_is_not_finite(run, short, texts, tmp_path, offload):
    poison = "lambda step, loss: loss * float('nan') if step == 1 else loss"
    done = poisoned(
        run, short, tmp_path, poison, "--steps", 4, "--device", "cuda", "--dtype", "float32", *offload
    )
    assert done.returncode == 0, done.stderr
    lines = metrics(tmp_path / "run")
    assert [line.get("skipped") for line in lines] == [None, True, None, None]
    expected = list(plain_loop(texts, [0.5e-3, 1e-3, 1e-3, 0.5e-3], skipped=[1]))
    for i in (0, 2, 3):
        assert lines[i]["loss"] == pytest.approx(expected[i][0], rel=1e-3)


def test_bfloat16_compute_stays_near_float32(train):
    reference = losses(train("float32", "--steps", 3))
    for name in ("--dtype", "--param_dtype"):
        other = losses(train(name[2:], "--steps", 3, name, "bfloat16"))
        torch.testing.assert_close(other, reference, rtol=2e-2, atol=0)
        assert not torch.equal(other, reference)


def test_resume_of_a_finished_run_changes_nothing(train, run, short, tmp_path):
    train("run", "--steps", 2)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    done = run("train.py", *short, "--steps", 2, "--out", tmp_path / "run", "--resume")
    assert done.returncode == 2 and "is finished" in done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("processes", [None, 2])
def test_resume_needs_no_more_than_the_folder(train, run, texts, tmp_path, processes):
    """All else is as the run was started, what leaves its result alone too, but for what the number of
    processes says."""
    out, others = (
        tmp_path / "run",
        ("--seed", 5, "--method", "randpos", "--save_every", 2, "--eval_every", 2, "--eval_data", texts),
    )
    whole = train("run", "--steps", 4, *others)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "step-4")
    done = run("train.py", "--resume", "--out", out, processes=processes)
    assert done.returncode == 0 and "going on after step 2" in done.stderr, done.stderr
    torch.testing.assert_close(losses(metrics(out)), losses(whole), rtol=1e-5 if processes else 0, atol=0)
    assert (
        list(metrics(out)[-1]["validation"]) == ["64"]
        and (out / "checkpoints" / "step-4").exists()
        and (out / "model").exists()
    )


def test_a_figure_that_is_not_finite_is_null(tmp_path):
    Log(tmp_path, 0).write({"step": 1, "loss": math.nan, "mfu": None, "validation": {8: math.inf, 16: 1.5}})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "mfu": None, "validation": {"8": None, "16": 1.5}}


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_checkpoints_are_kept(train, tmp_path, keep):
    train("run", "--steps", 4, "--save_every", 1, "--keep", keep)
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {
        f"step-{4 - i}" for i in range(keep)
    }


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_sigterm_saves_and_a_resumed_run_equals_the_uninterrupted_one(short, tmp_path, train, device):
    short += ["--device", device]  # the last one counts
    whole = losses(train("whole", "--steps", 40))
    out = tmp_path / "stopped"
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, short), "--steps", "40", "--out", out],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.time() + 120
    while time.time() < until and not ((out / "metrics.jsonl").exists() and len(metrics_so_far(out)) >= 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    done = len(metrics(out))
    assert 5 <= done < 40 and f"stopped after step {done} of 40" in stderr
    assert weights.load(out / "model").config.max_position_embeddings == 2048  # what is done is usable
    resumed = losses(train("stopped", "--steps", 40, "--resume"))
    assert len(resumed) == 40
    torch.testing.assert_close(
        resumed, whole, rtol=0 if device == "cpu" else 1e-3, atol=0
    )  # a GPU sums in any order


def metrics_so_far(out):
    return (out / "metrics.jsonl").read_text().splitlines()


def test_the_quick_start_extends_tiny(tmp_path):
    """The README's first command, as a new user runs it, but for 60 of its 150 steps and 20 of its 50
    prompts: it takes minutes."""

    def call(script, *arguments):
        command = [sys.executable, ROOT / script, *arguments, "--device", "cpu"]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    call("train.py", "--steps", "60")
    call("eval.py", "--task", "passkey", "--trials", "20", "--json", "passkey.json")
    report = json.loads((tmp_path / "passkey.json").read_text())
    extended, base = (
        {r["length"]: r["accuracy"] for r in x["results"]} for x in (report, report["compared"][0])
    )
    assert list(extended) == list(base) == [256, 512, 1024, 2048]
    assert base[256] >= 0.95 and base[1024] <= 0.1 and base[2048] <= 0.1
    assert min(extended.values()) >= 0.7  # 98, 100, 100 and 96% after all 150
