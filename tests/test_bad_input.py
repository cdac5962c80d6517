"""A user's mistake: exit code 2, one line on stderr that names it, and nothing on disk changed."""

import errno
import importlib
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import safetensors
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from hf import weights

TINY = Path(__file__).parent.parent / "assets" / "tiny"


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def check_refusal(code, err, says):
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err
    for word in says:
        assert str(word) in err, (word, err)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test runs in its own folder, with its own cache beside it and a small text in it."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("POSE_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text("The cat sat on the mat. " * 400)


@pytest.fixture
def call(monkeypatch, capfd):
    """call("train", "--steps", 3, ...) -> exit code and stderr of that command, in this process."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def start(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as stop:
                errors.run(importlib.import_module(script).main)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return stop.value.code, capfd.readouterr().err

    yield start
    for name, handler in handlers.items():
        signal.signal(name, handler)


@pytest.fixture
def refused(call):
    """The command is refused, its one line holds every word of `says`, and the folder of the test is as
    it was."""

    def check(script, *arguments, says):
        before = snapshot(Path())
        check_refusal(*call(script, *arguments, "--device", "cpu"), says)
        assert snapshot(Path()) == before

    return check


@pytest.fixture
def really_refused(run):
    """The same with a real process."""

    def check(script, *arguments, says, env=None):
        before = snapshot(Path())
        done = run(script, *arguments, "--device", "cpu", env=env)
        check_refusal(done.returncode, done.stderr, says)
        assert done.stdout == "" and snapshot(Path()) == before

    return check


@pytest.fixture
def model(make_llama):
    """A folder with a small LLaMA and a tokenizer that fits it; its window is 64."""
    folder, _ = make_llama("work/model", vocab_size=2048, num_hidden_layers=1)
    shutil.copy(TINY / "tokenizer.model", folder)
    return folder


TRAIN = ("--data", "text.txt", "--steps", 1, "--batch_size", 2, "--target_len", 256)


# ---------------------------------------------------------------- what argparse refuses


@pytest.mark.parametrize(
    "script, arguments, says",
    [
        ("train", ["--stepz", 3], ["unrecognized arguments: --stepz 3"]),
        ("train", ["--steps", "many"], ["--steps", "'many'"]),
        ("train", ["--eval", 3], ["--eval", "--eval_every"]),
        ("eval", ["--model", "tiny"], ["required", "--task"]),
        ("bench", ["--task", "sprint"], ["--task", "'sprint'", "prefill"]),
        ("pose", ["--chunks", "two"], ["--chunks two"]),
        ("pose", ["--examples", 0], ["--examples 0"]),
    ],
    ids=str,
)
def test_arguments_that_are_none(call, script, arguments, says):
    before = snapshot(Path())
    check_refusal(*call(script, *arguments), [*says, f"; see python {script}.py --help"])
    assert snapshot(Path()) == before


def test_commands_that_are_none(run):
    for command, *arguments in (
        ["weights.py", "a"],
        ["assets/make_tiny.py"],
        ["pose.py", "--plots", "a.png"],
    ):
        done = run(command, *arguments)
        check_refusal(done.returncode, done.stderr, [f"; see python {command} --help"])


# ---------------------------------------------------------------- the model


def test_no_such_folder(really_refused):
    really_refused("train.py", "--model", "nowhere/llama", *TRAIN, says=["nowhere/llama", "config.json"])
    really_refused(
        "eval.py", "--task", "passkey", "--model", "nowhere/llama", says=["nowhere/llama", "config.json"]
    )


def test_folder_without_config(refused, model):
    (model / "config.json").unlink()
    refused("train", "--model", model, *TRAIN, says=[model, "config.json"])
    refused("eval", "--task", "ppl", "--model", model, says=[model, "config.json"])


def test_half_a_config(really_refused, model):
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text[: len(text) // 2])
    really_refused("train.py", "--model", model, *TRAIN, says=[model / "config.json"])


@pytest.mark.parametrize("content", ["", "[]", "null", '"llama"', "\x00"])
def test_config_that_is_no_object(refused, model, content):
    (model / "config.json").write_text(content)
    refused("train", "--model", model, *TRAIN, says=[model / "config.json"])


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"],
)
def test_config_without_a_key(refused, model, key):
    config = json.loads((model / "config.json").read_text())
    del config[key]
    (model / "config.json").write_text(json.dumps(config))
    refused("train", "--model", model, *TRAIN, says=[model / "config.json", key])


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model_type": "gpt2"}, ["gpt2", "learned positions"]),
        ({"model_type": "opt"}, ["opt", "learned positions"]),
        ({"model_type": "bloom"}, ["bloom", "ALiBi"]),
        ({"model_type": "mpt"}, ["mpt", "ALiBi"]),
        ({"model_type": "falcon", "alibi": True}, ["falcon", "ALiBi"]),
        ({"position_embedding_type": "alibi"}, ["ALiBi"]),
        ({"model_type": "mamba2"}, ["mamba2"]),
        ({"model_type": None}, ["model_type"]),
        ({"model_type": ["llama"]}, ["model_type"]),
        ({"attention_bias": True}, ["bias"]),
        ({"hidden_act": "gelu"}, ["gelu"]),
        ({"model_type": "mistral", "sliding_window": 32}, ["mistral", "sliding_window 32"]),
        (
            {"model_type": "mistral", "max_position_embeddings": 32768},
            ["mistral", "sliding_window 4096"],
        ),  # what its class assumes
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32},
            ["qwen2", "sliding_window 32"],
        ),
        ({"model_type": "mistral", "sliding_window": "no"}, ["sliding_window", "'no'"]),
        ({"model_type": "mixtral"}, ["mixtral"]),
        ({"model_type": "qwen2_moe"}, ["qwen2_moe"]),
        ({"num_local_experts": 8}, ["mixture of experts", "num_local_experts 8"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantised"]),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "original_max_position_embeddings": "64",
                    "rope_theta": 1e4,
                }
            },
            ["config.json"],
        ),
        ({"dtype": "int8"}, ["int8"]),
        ({"rope_parameters": {"rope_type": "spiral", "factor": 2.0, "rope_theta": 1e4}}, ["spiral"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["yarn", "factor"]),
        ({"rope_parameters": "yarn"}, ["rope"]),
        ({"vocab_size": "2048"}, ["vocab_size"]),
        ({"max_position_embeddings": None}, ["max_position_embeddings"]),
    ],
    ids=str,
)
def test_architecture_that_is_not_known(refused, model, change, says):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    refused("train", "--model", model, *TRAIN, says=[model / "config.json", *says])
    refused("eval", "--task", "passkey", "--model", model, says=[model / "config.json", *says])


def test_scaling_that_depends_on_the_length(refused, model):
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    (model / "config.json").write_text(json.dumps(config))
    refused("train", "--model", model, *TRAIN, says=["dynamic", "base model"])


# ---------------------------------------------------------------- its weights


def change_tensors(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def write_index(file, only=None):
    def edit(folder):
        names = list(load_file(folder / "model.safetensors"))
        shutil.copy(folder / "model.safetensors", folder / "part-1.safetensors")
        shutil.copy(
            folder / "model.safetensors", folder.parent / "x.safetensors"
        )  # a real file, out of bounds
        weight_map = {name: "part-1.safetensors" for name in names} | {"model.norm.weight": str(file)}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
        (folder / "model.safetensors").unlink()

    return edit


def cut(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def only_pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


UP, ROUTER = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.router.weight"
BROKEN_WEIGHTS = {
    "none": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors"]),
    "pickled": (only_pickles, ["model.safetensors", ".bin"]),
    "wrong_shape": (change_tensors(lambda t: t.update({UP: t[UP][1:].clone()})), [UP, "(95, 64)", "(96, 64)"]),
    "transposed": (change_tensors(lambda t: t.update({UP: t[UP].T.contiguous()})), [UP, "(64, 96)", "(96, 64)"]),
    "missing": (change_tensors(lambda t: t.pop(UP)), [UP, "missing"]),
    "no_head": (change_tensors(lambda t: t.pop("lm_head.weight")), ["lm_head.weight", "missing"]),
    "unexpected": (change_tensors(lambda t: t.update({ROUTER: torch.ones(3)})), [ROUTER, "unexpected"]),
    "truncated": (cut, ["model.safetensors"]),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), ["model.safetensors"]),
    "git_lfs": (lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), ["model.safetensors"]),
    "index_above": (write_index("../x.safetensors"), ["index.json", "../x.safetensors"]),
    "index_absolute": (write_index("/etc/passwd"), ["index.json", "/etc/passwd"]),
    "index_parent": (write_index(".."), ["index.json", "'..'"]),
    "index_empty_name": (write_index(""), ["index.json"]),
    "index_absent_file": (write_index("part-2.safetensors"), ["part-2.safetensors", "missing"]),
    "index_no_json": (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map"'), ["index.json"]),
    "index_no_map": (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": [1]}'), ["index.json"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_WEIGHTS)
def test_broken_weights(refused, model, name):
    damage, says = BROKEN_WEIGHTS[name]
    damage(model)
    refused("eval", "--task", "passkey", "--model", model, "--lengths", 128, says=[model, *says])


def test_index_that_lacks_a_weight(refused, model):
    """The file has it, the index does not name it: it is not part of the checkpoint."""
    write_index("part-1.safetensors")(model)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    del index["weight_map"][UP]
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("eval", "--task", "passkey", "--model", model, "--lengths", 128, says=[model, UP, "missing"])


def test_truncated_weights_when_training(really_refused, model):
    cut(model)
    really_refused("train.py", "--model", model, *TRAIN, says=[model / "model.safetensors", "truncated"])


def test_vocabulary_larger_than_the_models(really_refused, make_llama):
    folder, _ = make_llama("work/model", vocab_size=320)
    shutil.copy(TINY / "tokenizer.model", folder)
    really_refused("train.py", "--model", folder, *TRAIN, says=[folder, "2048", "320"])


def test_no_tokenizer(refused, model):
    (model / "tokenizer.model").unlink()
    refused("train", "--model", model, *TRAIN, says=[model, "tokenizer.model", "tokenizer.json"])


# ---------------------------------------------------------------- numbers that do not fit


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--target_len", 64, "--train_len", 80], ["--target_len 64", "80"]),
        (["--target_len", 63, "--train_len", 16], ["--target_len 63", "window of 64"]),
        (["--target_len", -5, "--rope", "ntk"], ["--target_len -5", "window of 64"]),
        (["--target_len", 2**40], ["--target_len", "at most"]),
        (["--train_len", 0], ["--train_len 0"]),
        (["--train_len", -5], ["--train_len -5"]),
        (["--chunks", 0], ["--chunks 0"]),
        (["--batch_size", 0], ["--batch_size 0"]),
        (["--steps", -1], ["--steps -1"]),
        (["--warmup_steps", -1], ["--warmup_steps -1"]),
        (["--save_every", -1], ["--save_every -1"]),
        (["--micro_batch_size", 3, "--batch_size", 8], ["--micro_batch_size 3", "8"]),
        (["--micro_batch_size", 0], ["--micro_batch_size 0"]),
        (["--method", "full", "--train_len", 64], ["--method full", "256"]),
        (["--seed", -1], ["--seed -1"]),
        (["--lr", -1], ["--lr -1"]),
        (["--llama_4_scaling_beta", "nan"], ["--llama_4_scaling_beta nan"]),
        (["--overshoot", 0.5], ["--overshoot 0.5", "from 1 to"]),
        (["--factor", 1e300], ["--factor 1e+300", "from 1 to"]),
        (["--overshoot", 2, "--method", "pi"], ["--overshoot", "with pi"]),
        (["--factor", 0.5], ["--factor 0.5", "from 1 to"]),
        (["--factor", "nan"], ["--factor nan"]),
        (["--rope", "default", "--factor", 4], ["--factor", "--rope default"]),
        (["--rope", "ntk", "--beta_fast", 8], ["--beta_fast", "--rope ntk"]),
        (["--beta_fast", 0], ["--beta_fast 0", "from 1 to"]),
        (["--method", "pi", "--chunks", 3], ["--chunks", "pi"]),
        (["--method", "randpos", "--offset", "zero"], ["--offset", "randpos"]),
        (["--eval_lengths", 64], ["--eval_lengths", "--eval_every"]),
    ],
    ids=lambda v: " ".join(map(str, v)),
)
def test_training_arguments(refused, model, arguments, says):
    refused("train", "--model", model, *TRAIN, *arguments, says=says)


def test_batch_size_that_does_not_divide(refused, model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # what torchrun --nproc_per_node=2 sets
    refused("train", "--model", model, *TRAIN, "--batch_size", 3, says=["--batch_size 3", "2 processes"])


def test_no_cuda(call, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for script, arguments in (("train", TRAIN), ("eval", ["--task", "passkey"])):
        before = snapshot(Path())
        check_refusal(
            *call(script, "--model", "tiny", *arguments, "--device", "cuda"), ["--device cuda", "CUDA"]
        )
        assert snapshot(Path()) == before


# ---------------------------------------------------------------- the data


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("empty.txt", b"", []),
        ("blank.txt", b" \n\t\n ", []),
        ("latin1.txt", b"caf\xe9 " * 300, ["UTF-8", "byte 3"]),
        ("binary.jsonl", b'{"text": "a"}\n\xff\xfe\x00\n', ["line 2"]),
        ("d.jsonl", b'{"text": "fine"}\n\n{"content": "other key"}\n', ["line 3", "text"]),
        ("d.jsonl", b'{"text": "fine"}\n{"text": null}\n', ["line 2", "text"]),
        ("d.jsonl", b'{"text": "fine"}\n["text"]\n', ["line 2", "text"]),
        ("d.jsonl", b'{"text": "fine"}\n{"text": "half', ["line 2"]),
        ("d.jsonl", b'{"text": "fine"}\n{"text": "half an emoji: \\ud83d"}\n', ["line 2"]),
        ("d.jsonl.gz", b'{"text": "not compressed"}\n', ["gzip"]),
    ],
    ids=lambda v: ascii(v)[:40],
)  # fmt: skip
def test_data_that_cannot_be_read(refused, model, tmp_path, name, content, says):
    Path(name).write_bytes(content)
    refused("train", "--model", model, *TRAIN[2:], "--data", name, says=[name, *says])
    tokens = tmp_path / "cache" / "tokens"
    assert not tokens.exists() or not list(
        tokens.iterdir()
    )  # no half-made token file for the next run to find


def test_no_data(really_refused, refused, model):
    Path("empty.txt").write_text("")
    Path("folder").mkdir()
    really_refused("train.py", "--model", model, *TRAIN[2:], "--data", "empty.txt", says=["empty.txt"])
    refused("train", "--model", model, *TRAIN[2:], "--data", "absent.txt", says=["absent.txt"])
    refused(
        "train",
        "--model",
        model,
        *TRAIN[2:],
        "--data",
        "absent.txt",
        "--data",
        "text.txt",
        says=["absent.txt"],
    )  # both count
    refused("train", "--model", model, *TRAIN[2:], "--data", "folder", says=["folder", ".txt"])


def test_train_len_longer_than_every_document(refused, model):
    Path("short.txt").write_text("a cat")
    refused(
        "train",
        "--model",
        model,
        *TRAIN[2:],
        "--data",
        "short.txt",
        "--train_len",
        50,
        says=["50", "--train_len"],
    )


# ---------------------------------------------------------------- the output folder


@pytest.fixture
def finished(model):
    """A folder that looks like a run's, with the arguments it had."""
    arguments = {
        "model": str(model), "target_len": 256, "train_len": 64, "method": "pose", "rope": "yarn", "chunks": 2, "offset": "uniform",
        "data": ["text.txt"], "steps": 1, "batch_size": 2, "micro_batch_size": 2, "lr": 2e-5, "factor": 4.0, "warmup_steps": 10, "seed": 0,
        "llama_4_scaling_beta": 0.0, "overshoot": 1.0,
        "activation_checkpointing": "none", "cpu_offload": False, "compile": False, "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    Path("done/model").mkdir(parents=True)
    Path("done/args.json").write_text(json.dumps(arguments))
    Path("done/model/config.json").write_text("{}")


def test_out_that_holds_a_run(really_refused, refused, model, finished):
    really_refused("train.py", "--model", model, *TRAIN, "--out", "done", says=["done", "--resume"])
    Path("done/args.json").unlink()  # a bare model is not overwritten either
    refused("train", "--model", model, *TRAIN, "--out", "done", says=["done"])
    Path("done/model").rename("done/checkpoints")  # nor are checkpoints mixed with those of another run
    refused("train", "--model", model, *TRAIN, "--out", "done", says=["done"])


def test_resume_without_a_run(really_refused, refused, model):
    really_refused(
        "train.py", "--model", model, *TRAIN, "--out", "absent", "--resume", says=["--resume", "absent"]
    )
    Path("bare").mkdir()
    refused("train", "--model", model, *TRAIN, "--out", "bare", "--resume", says=["--resume", "bare"])


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--lr", 1e-3], ["lr was 2e-05, now 0.001"]),
        (["--seed", 1, "--rope", "linear"], ["seed was 0, now 1", "rope was yarn, now linear"]),
        (["--train_len", 32], ["train_len was 64, now 32"]),
        (
            ["--rope", "default"],
            ["rope was yarn, now default"],
        ),  # and not that this has no factor, which was not given
        (["--data", "text.txt"], ["data was ['text.txt'], now ['text.txt', 'text.txt']"]),
    ],
    ids=lambda v: " ".join(map(str, v)),
)
def test_resume_with_other_arguments(refused, model, finished, arguments, says):
    refused(
        "train",
        "--model",
        model,
        *TRAIN,
        "--out",
        "done",
        "--resume",
        *arguments,
        says=["--resume", "done", *says],
    )


def test_resume_of_a_broken_record(refused, model, finished):
    Path("done/args.json").write_text('{"model"')
    refused("train", "--model", model, *TRAIN, "--out", "done", "--resume", says=["args.json"])


@pytest.mark.parametrize("out", ["text.txt", "text.txt/run"])
def test_out_that_is_a_file(refused, model, out):
    refused("train", "--model", model, *TRAIN, "--out", out, says=["text.txt"])


# ---------------------------------------------------------------- eval


@pytest.mark.parametrize("lengths", ["abc", "128,", "1e3", "64;128", ""])
def test_lengths_that_are_no_numbers(refused, model, lengths):
    refused("eval", "--task", "passkey", "--model", model, "--lengths", lengths, says=["--lengths"])


def test_lengths_abc(really_refused):
    really_refused(
        "eval.py", "--task", "passkey", "--model", "tiny", "--lengths", "abc", says=["--lengths abc"]
    )


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["passkey", "--lengths", 20], ["--lengths 20", "too short"]),
        (["passkey", "--lengths", 0], ["--lengths 0"]),
        (["passkey", "--lengths", "-64"], ["--lengths -64"]),
        (["passkey", "--trials", 0], ["--trials 0"]),
        (["passkey", "--seed", -1], ["--seed -1"]),
        (["ppl", "--documents", 0], ["--documents 0"]),
        (["ppl", "--stride", 0], ["--stride 0"]),
        (["ppl", "--data", "text.txt", "--lengths", "100000,200000"], ["--data", "100000"]),
        (["ppl", "--data", "absent.txt"], ["absent.txt"]),
        (["passkey", "--json", "absent/r.json"], ["absent/r.json"]),
        (["passkey", "--plot", "absent/r.png"], ["absent/r.png"]),
        (["passkey", "--json", "folder"], ["folder"]),
        (["passkey", "--plot", "plot.xyz"], ["plot.xyz"]),
        (["passkey", "--tail", 8], ["--tail", "--task ppl"]),
        (["passkey", "--documents", 3], ["--documents", "--task ppl"]),
        (["ppl", "--seed", 1], ["--seed", "--task passkey or needle"]),
        (["ppl", "--trials", 1], ["--trials", "--task passkey or needle"]),
        (["benchmarks", "--lengths", 256], ["--lengths", "--task passkey or needle or ppl"]),
        (["ppl", "--generate"], ["--generate", "--task passkey or needle"]),
        (["ppl", "--tail", 0], ["--tail 0"]),
        (["ppl", "--tail", 256], ["--tail 256", "length of 256"]),
        (["ppl", "--tail", 8, "--by_position"], ["--tail 8", "--by_position"]),
        (["ppl", "--tail", 8, "--data", "text.txt", "--lengths", "128,100000"], ["--data", "100000"]),
        (["needle", "--keys", 17], ["--keys 17", "16"]),
        (["passkey", "--data", "text.txt"], ["--data", "needle"]),
        (["needle", "--data", "text.txt", "--lengths", 60], ["--lengths 60", "too short", "--keys"]),
        (["needle", "--data", "text.txt", "--lengths", 100000], ["--data", "100000"]),
        (["benchmarks"], ["--data", "boolq"]),
        (["benchmarks", "--data", "text.txt"], ["--data", "boolq"]),
        (["benchmarks", "--data", "folder"], ["folder", "boolq"]),
        (["benchmarks", "--data", "folder", "--limit", 0], ["--limit 0"]),
    ],
    ids=lambda v: " ".join(map(str, v)),
)
def test_evaluation_arguments(refused, model, arguments, says):
    Path("folder").mkdir()
    lengths = [] if arguments[0] == "benchmarks" else ["--lengths", 256]
    refused("eval", "--model", model, *lengths, "--task", *arguments, says=says)


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"task"',
        "[1]",
        '{"task": "passkey"}',
        '{"task": "passkey", "model": "tiny", "results": []}',
        "\xff",
    ],
)
def test_json_that_holds_nothing_to_go_on_from(refused, model, content):
    Path("r.json").write_bytes(content.encode("latin1"))
    refused(
        "eval",
        "--task",
        "passkey",
        "--model",
        model,
        "--lengths",
        256,
        "--json",
        "r.json",
        says=["--json r.json"],
    )


def test_json_of_another_evaluation(refused, model, monkeypatch):
    call = ["--task", "passkey", "--model", str(model), "--lengths", "200", "--json", "r.json", "--trials"]
    monkeypatch.setattr(sys, "argv", ["eval.py", *call, "1", "--device", "cpu"])
    importlib.import_module("eval").main()
    refused("eval", *call, 2, "--seed", 5, says=["r.json", "trials was 1, now 2", "seed was 0, now 5"])
    refused(
        "eval",
        "--task",
        "needle",
        "--model",
        model,
        "--trials",
        1,
        "--json",
        "r.json",
        says=["r.json", "task was passkey, now needle"],
    )
    refused(
        "eval",
        *call,
        1,
        "--model",
        model,
        "tiny",
        says=["r.json", f"model was ['{model}'], now ['{model}', 'tiny']"],
    )
    change_tensors(lambda t: t.update({UP: t[UP] + 0.01}))(model)  # trained further into the same folder
    refused("eval", *call, 1, says=["r.json", f"weights of {model} was "])


def test_json_of_other_texts(refused, model, monkeypatch):
    """Of the same name and size as those that the results are of."""
    call = [
        "--task",
        "ppl",
        "--model",
        str(model),
        "--data",
        "text.txt",
        "--json",
        "r.json",
        "--lengths",
        "64",
    ]
    monkeypatch.setattr(sys, "argv", ["eval.py", *call, "--device", "cpu"])
    importlib.import_module("eval").main()
    Path("text.txt").write_text(Path("text.txt").read_text().replace("cat", "dog"))
    refused("eval", *call, says=["r.json", "data was "])


def test_weights_that_give_no_number(refused, model):
    change_tensors(lambda t: t.update({UP: t[UP] * float("nan")}))(model)
    refused(
        "eval",
        "--task",
        "ppl",
        "--model",
        model,
        "--data",
        "text.txt",
        "--lengths",
        64,
        "--json",
        "r.json",
        says=["not finite"],
    )


def test_plot_without_an_ending(call):
    check_refusal(*call("pose", "--plot", "noext"), ["--plot noext", ".png"])


# ---------------------------------------------------------------- full memory


def test_memory_that_is_full(capfd):
    with pytest.raises(SystemExit) as stop:
        errors.run(lambda: torch.empty(2**52))
    check_refusal(stop.value.code, capfd.readouterr().err, ["memory is full", "lower"])


# ---------------------------------------------------------------- a full disk


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def safetensors_disk_full(*_, **__):
    raise safetensors.SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


def check_disk_full(code, err):
    assert code == 2, err
    assert "Traceback" not in err and err.splitlines()[-1].startswith("error: the disk is full"), err
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1


def test_disk_full_when_the_model_is_written(call, model, monkeypatch):
    monkeypatch.setattr(weights, "save_file", safetensors_disk_full)
    check_disk_full(*call("train", "--model", model, *TRAIN, "--out", "out", "--device", "cpu"))
    assert {p.name for p in Path("out").iterdir()} == {"args.json", "metrics.jsonl"}


@pytest.mark.parametrize("room", [0, 2**16], ids=["at_once", "inside_a_tensor"])
def test_disk_full_when_a_checkpoint_is_written(call, model, monkeypatch, room):
    """The second checkpoint does not fit, the first stays whole. Inside a tensor PyTorch turns the
    OSError into a RuntimeError."""
    checkpoint_files = torch.distributed.checkpoint.filesystem.FileSystem
    real = checkpoint_files.create_stream

    class SmallDisk(io.FileIO):
        def write(self, content):
            return disk_full() if self.tell() + len(content) > room else super().write(content)

    def create_stream(self, path, mode):
        return (
            SmallDisk(path, mode)
            if mode == "wb" and Path("out/checkpoints/step-1").exists()
            else real(self, path, mode)
        )

    monkeypatch.setattr(checkpoint_files, "create_stream", create_stream)
    arguments = ("--batch_size", 2, "--target_len", 256, "--steps", 2, "--save_every", 1)
    check_disk_full(
        *call("train", "--model", model, "--data", "text.txt", *arguments, "--out", "out", "--device", "cpu")
    )
    assert Path("out/checkpoints/step-1/.metadata").is_file() and not Path("out/checkpoints/step-2").exists()


def test_disk_full_when_texts_are_tokenised(call, model, tmp_path, monkeypatch):
    import data

    monkeypatch.setattr(data.np, "save", disk_full)
    code, err = call("train", "--model", model, *TRAIN, "--out", "out", "--device", "cpu")
    check_disk_full(code, err)
    assert not Path("out").exists() and not list((tmp_path / "cache" / "tokens").iterdir())


def test_a_json_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    errors.write_json(path, {"first": 1})
    monkeypatch.setattr(Path, "replace", disk_full)
    with pytest.raises(OSError):
        errors.write_json(path, {"second": 2})
    assert json.loads(path.read_text()) == {"first": 1} and not list(tmp_path.glob("*.part"))


def test_results_in_a_folder_that_cannot_be_written(call, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anywhere
    check_refusal(
        *call("eval", "--task", "passkey", "--model", "tiny", "--json", "r.json"),
        ["r.json", "cannot be written"],
    )


def test_a_really_full_disk(run, model):
    """/dev/full in the place of the log: the first line of it is refused by the kernel."""
    Path("out").mkdir()
    Path("out/metrics.jsonl").symlink_to("/dev/full")
    done = run("train.py", "--model", model, *TRAIN, "--out", "out", "--device", "cpu")
    check_disk_full(done.returncode, done.stderr)
    assert not Path("out/model").exists()
