"""bench.py: what it trains is a training run, what it writes is what it says."""

import dataclasses
import json
import math
import sys
from argparse import Namespace
from types import ModuleType

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import bench as bench_module
import data
import fsdp
import train
from hf import builtin
from model import Config, Transformer, add_adapters, empty_transformer
from storage.errors import InputError
from tasks import peers, turns

TINY = ("--model", "tiny:2")
WINDOW = ("--train_len", 64, "--batch_size", 4, "--micro_batch_size", 2)


@pytest.fixture
def bench(call, run, tmp_path, monkeypatch):
    """bench("train", …) -> its `results` and what it printed, on the CPU.

    processes=N: not in this process but in N others.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def start(task, *arguments, processes=None):
        path = tmp_path / f"{task}-{processes}.json"
        arguments = ("--task", task, *TINY, "--json", path, *arguments)
        if processes is None:
            done = call("bench", *arguments)
        else:
            done = run("bench.py", *arguments, processes=processes, env={"CUDA_VISIBLE_DEVICES": ""})
        assert done.returncode == 0, done.stderr
        written = json.loads(path.read_text())
        assert written["task"] == task and written["model"] == "tiny:2" and written["card"].startswith("CPU")
        return written["results"], done.stdout

    return start


@pytest.mark.parametrize("steps", [1, 5])
def test_training_counts_its_tokens(bench, steps):
    (entry,), said = bench("train", *WINDOW, "--steps", steps)
    assert (entry["side"], entry["processes"], entry["train_len"]) == ("ours", 1, 64)
    assert (entry["share"], entry["micro_batch_size"]) == (4, 2)
    assert len(entry["seconds"]) == steps
    assert len(entry["losses"]) == 1 + 2 + steps  # the first step and two that warm up are not timed
    assert min(entry["seconds"]) <= entry["step_seconds"] <= max(entry["seconds"])
    assert entry["tokens_per_second"] == pytest.approx(4 * 64 / entry["step_seconds"])
    assert entry["first_step_seconds"] > max(entry["seconds"]) and 0 <= entry["waiting_for_data"] < 1
    assert entry["mfu"] is None and entry["peak_memory_gib"] is None  # of a GPU alone
    assert f"ours: {entry['tokens_per_second']:,.0f} tokens/s" in said


def test_where_nothing_tells_when_a_process_began_the_first_step_has_no_time(bench, monkeypatch, tmp_path):
    """As on macOS, which has no /proc."""
    monkeypatch.setattr(bench_module, "Path", lambda path: tmp_path / path.lstrip("/"))
    (entry,), said = bench("train", *WINDOW, "--steps", 1)
    assert entry["first_step_seconds"] is None and "first step" not in said and "tokens/s" in said


def test_losses_begin_with_chance_and_do_not_depend_on_processes(bench):
    """Random weights know nothing: the loss is ln V and half the small variance of their logits.

    The batches and the weights are the same for any number of processes.
    """
    config = builtin.open_model("tiny").config
    (one,), _ = bench("train", *WINDOW, "--steps", 2)
    (two,), _ = bench("train", *WINDOW, "--steps", 2, processes=2)
    chance = math.log(config.vocab_size) + 0.02**2 * config.hidden_dim / 2
    assert one["losses"][0] == pytest.approx(chance, abs=0.05)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert (two["share"], two["processes"]) == (2, 2)
    assert max(two["seconds"]) < two["first_step_seconds"] < 500


class NoCheckpoints:
    """Takes the place of storage.checkpoint.Checkpoints for a run that saves none."""

    def raise_if_failed(self):
        pass

    def is_due(self, minutes):
        return False


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_step_is_that_of_train(tmp_path, lora_rank):
    """From the same weights, on the same batches, train.train has the same losses to the last bit."""
    device = fsdp.start("cpu")
    try:
        config = dataclasses.replace(builtin.open_model("tiny").config, n_layers=2)
        sampling = {"method": "pose", "train_len": 32, "target_len": 128}
        args = Namespace(batch_size=4, share=4, micro_batch_size=2, train_len=32, param_dtype="float32")
        args.activation_checkpointing, args.cpu_offload, args.retrieval = "none", False, 0
        args.lora_rank, args.float8 = lora_rank, False
        step = bench_module.our_step(config, args, sampling, device)
        expected = [step()[0] for _ in range(2)]

        args.steps, args.lr, args.warmup_steps = 2, 1e-5, 0  # bench's learning rate; the second loss knows it
        args.out, args.tensorboard, args.save_every, args.save_minutes = tmp_path, False, 0, 0
        model = empty_transformer(config)
        if lora_rank:
            add_adapters(model, lora_rank, 2 * lora_rank, ("q", "k", "v", "o", "gate", "up", "down"))
        fsdp.shard(model, device, torch.float32)
        bench_module.randomise(model, device)
        document = bench_module.RandomDocument(config.vocab_size, 2**20)
        batches = data.Batches(document, seed=0, **sampling)
        train.train(args, model, fsdp.adamw(model, args.lr), batches, None, NoCheckpoints(), 0, device, [])
    finally:
        torch.distributed.destroy_process_group()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == expected


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_transformers_has_the_same_weights(make_llama, family):
    """Qwen2's biases too."""
    folder, _ = make_llama(family=family, tie_word_embeddings=True)
    config = bench_module.shape(f"{folder}:1")
    ours = Transformer(config)
    theirs = peers.hf_model(config)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert {p.dtype for p in theirs.parameters()} == {torch.float32}


def test_training_beside_transformers(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the processes of the sides
    results, said = bench("train", *WINDOW, "--steps", 3, "--compare", "transformers")
    assert [entry["side"] for entry in results] == ["ours", "transformers"]
    for entry in results:
        assert len(entry["seconds"]) == 3
        assert len(entry["losses"]) == 3 + 2 * 1 + 3  # a turn begins with a step that is not timed
        vocabulary = builtin.open_model("tiny").config.vocab_size
        assert entry["losses"][0] == pytest.approx(math.log(vocabulary), abs=0.1)  # what random weights know
        assert entry["first_step_seconds"] > max(entry["seconds"])
        ratio = entry["tokens_per_second"] / results[1]["tokens_per_second"]
        assert entry["times_fastest_peer"] == pytest.approx(ratio)
        assert f"{entry['side']}: {entry['tokens_per_second']:,.0f} tokens/s" in said
    versions = json.loads((tmp_path / "train-None.json").read_text())["versions"]
    assert versions == {"torch": torch.__version__, "transformers": transformers.__version__}


def test_a_comparison_names_the_fastest_peer_and_who_has_failed(call, monkeypatch, tmp_path):
    def measured(side, tokens_per_second):
        figures = {"side": side, "tokens_per_second": tokens_per_second, "seconds": [2.0]}
        return figures | {"first_step_seconds": 3.0, "mfu": None, "peak_memory_gib": None}

    def failed(side):
        return {"side": side} | turns.failed(f"{side} has died")

    path = tmp_path / "r.json"
    command = ["bench", *TINY, "--task", "train", "--compare", "transformers", "--json", path]
    sides = [measured("ours", 9.0), measured("transformers", 6.0), failed("liger"), measured("other", 4.0)]
    monkeypatch.setattr(turns, "take_turns", lambda *_: sides)
    done = call(*command)
    assert done.returncode == 0 and "liger: liger has died" in done.stdout.splitlines()
    results = json.loads(path.read_text())["results"]
    assert [entry["tokens_per_second"] for entry in results] == [9, 6, None, 4]
    ratios = [entry.get("times_fastest_peer") for entry in results]
    assert ratios == [pytest.approx(9 / 6), 1, None, pytest.approx(4 / 6)]
    path.unlink()

    monkeypatch.setattr(turns, "take_turns", lambda *_: [failed("ours")])
    done = call(*command)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr == "error: --task train: our side: ours has died\n"


@pytest.mark.parametrize(
    "liger, says",
    [(None, "--compare liger: not installed here; pip install liger-kernel"), ("0.8.5", "need a GPU")],
)
def test_liger_needs_its_package_and_a_gpu(call, monkeypatch, liger, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(peers, "version", lambda package: liger if package == "liger-kernel" else "5.0")
    done = call("bench", *TINY, "--task", "train", "--compare", "transformers", "liger")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: --compare liger: ") and says in line


def test_liger_has_kernels_for_some_families_alone(make_llama, monkeypatch):
    """Its own function leaves the others as they are, and would then measure transformers once more."""
    kernels, patches = ModuleType("liger_kernel.transformers"), ModuleType("monkey_patch")
    kernels.AutoLigerKernelForCausalLM = transformers.AutoModelForCausalLM
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    for module in (ModuleType("liger_kernel"), kernels):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patches)
    for family in ("Llama", "Qwen2"):
        folder, _ = make_llama(family, family)
        if family == "Llama":
            assert type(peers.liger_model(bench_module.shape(str(folder)))) is transformers.LlamaForCausalLM
        else:
            with pytest.raises(InputError, match="qwen2"):
                peers.liger_model(bench_module.shape(str(folder)))


def test_prefill_beside_its_kernels_and_transformers(bench):
    results, said = bench("prefill", "--lengths", "200,64", "--steps", 2, "--compare", "transformers")
    assert [entry["length"] for entry in results] == [64, 200]
    for entry in results:
        for side in ("ours", "kernels alone", "transformers"):
            assert len(entry[side]["all"]) == 2
            assert 0 < min(entry[side]["all"]) <= entry[side]["seconds"] <= max(entry[side]["all"])
            assert entry[side]["peak_memory_gib"] is None
            assert f"{entry['length']} tokens, {side}: {entry[side]['seconds']:.3f} s" in said


@pytest.mark.parametrize("length", [40, 64, 100])
def test_kernels_alone_are_all_products_of_one_block(length, monkeypatch):
    """As PyTorch counts: 2 operations for each weight and token; for less than a chunk, one, and more."""
    monkeypatch.setattr(bench_module, "PIECE", 64)
    config = Config(64, 32, 48, 2, 4, 2, 8, 64)
    block = sum(p.numel() for p in Transformer(config).blocks[0].parameters() if p.dim() == 2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        bench_module.make_kernels(Transformer(config), torch.zeros(1, length, dtype=torch.int64))()
    by_kernel = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert by_kernel["aten.mm"] == 2 * length * block


def test_efficiency_draws_both_methods_by_target(bench, tmp_path):
    arguments = ("--train_len", 32, "--lengths", "64,128", "--steps", 2, "--plot", tmp_path / "p.png")
    results, said = bench("efficiency", *arguments)
    assert all(r["step_seconds"] > 0 and len(r["seconds"]) == 2 for r in results)
    measured = [(r["method"], r["target_len"]) for r in results]
    assert measured == [("pose", 64), ("full", 64), ("pose", 128), ("full", 128)]
    tokens = [round(r["tokens_per_second"] * r["step_seconds"]) for r in results]
    assert tokens == [32, 64, 32, 128]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["prefill", "--lengths", "128,abc"], ["--lengths", "128,abc"]),
        (["prefill", "--lengths", "0"], ["--lengths", "0"]),
        (["efficiency", "--lengths", "128"], ["--lengths 128: a target is at least the window of 256"]),
        (["train", "--model", "nothing-here"], ["--model nothing-here: neither a folder nor a shape"]),
        (["train", "--model", "tiny:two"], ["--model tiny:two"]),
        (["train", "--steps", 0], ["--steps", "at least 1", "0"]),
        (["train", "--batch_size", 3, "--micro_batch_size", 2], ["--micro_batch_size 2", "the 3 examples"]),
        (["train", "--plot", "p.png"], ["--plot belongs to --task efficiency"]),
        (["train", "--lengths", "64"], ["--lengths belongs to --task efficiency or prefill"]),
        (["prefill", "--cpu_offload"], ["--cpu_offload belongs to --task train or efficiency"]),
        (["prefill", "--lora_rank", 4], ["--lora_rank belongs to --task train or efficiency"]),
        (["prefill", "--compare", "liger"], ["--compare liger belongs to --task train"]),
        (["train", "--compare", "axolotl"], ["--compare", "axolotl", "transformers", "liger"]),
        (["efficiency", "--compare", "transformers"], ["--compare belongs to --task train or prefill"]),
        (["train", "--lora_rank", 4, "--compare", "transformers"], ["--lora_rank", "all weights"]),
        (["prefill", "--float8"], ["--float8 belongs to --task train or efficiency"]),
        (["train", "--float8", "--train_len", 60, "--batch_size", 1], ["16 tokens", "not 60"]),
        (["prefill", "--param_dtype", "float32"], ["--param_dtype belongs to --task train or efficiency"]),
        (["efficiency", "--plot", "p.xyz"], ["--plot", "p.xyz"]),
        (["train", "--json", "absent/r.json"], ["absent/r.json"]),
        (["train", "--model", "llama-7b:33"], ["llama-7b:33", "at most 32"]),
        (["train", "--model", "llama-7b:²"], ["llama-7b:²", "at most 32"]),
    ],
    ids=lambda v: " ".join(map(str, v)),
)
def test_mistakes_are_one_line(call, monkeypatch, tmp_path, arguments, says):
    monkeypatch.chdir(tmp_path)
    done = call("bench", *TINY, "--task", *arguments)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ")
    assert all(word in line for word in says)
    assert not list(tmp_path.iterdir())


def test_peers_may_be_named_one_by_one(monkeypatch):
    words = ["bench.py", "--task", "train", "--compare", "transformers", "--compare", "liger"]
    monkeypatch.setattr(sys, "argv", words)
    assert bench_module.parse_arguments().compare == ["transformers", "liger"]


def test_float8_asks_of_a_training_step_its_own_length_alone(monkeypatch):
    """Not that of a prompt as long as the window, here no multiple of 16."""
    words = ["bench.py", "--task", "train", "--float8", "--train_len", "64", "--micro_batch_size", "1"]
    monkeypatch.setattr(sys, "argv", words)
    config = bench_module.Config(64, 32, 32, 1, 1, 1, 32, 1001)
    assert bench_module.complete(bench_module.parse_arguments(), config, "cpu").train_len == 64


def test_a_batch_that_does_not_divide_over_the_processes(run):
    done = run("bench.py", "--task", "train", *TINY, "--batch_size", 3, processes=2)
    (line,) = (line for line in done.stderr.splitlines() if "error: " in line)
    assert line == "error: --batch_size 3 does not divide over 2 processes; make it a multiple"
    assert not done.stdout


def test_the_command_ends_with_2(run, tmp_path):
    done = run("bench.py", "--task", "train", "--model", tmp_path / "nothing")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
