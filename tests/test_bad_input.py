"""A user's mistake: exit code 2, one line on stderr that names it, and nothing on disk changed."""

import errno
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import data
from hf import weights, writing
from storage.checkpoint import Checkpoints
from storage.log import is_finished

TINY = ROOT / "assets" / "tiny"


def snapshot(folder):
    """Return {relative path: content, None for a folder} of all that is in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def check_refusal(done, says):
    """Assert that a finished command was refused with one line that holds every word of `says`."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.endswith("\n"), done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    for word in says:
        assert str(word) in done.stderr, (word, done.stderr)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test runs in its own folder, with its own cache beside it and a small text in it."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("POSE_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text("The cat sat on the mat. " * 400)


@pytest.fixture
def refused(call):
    """refused("train", *arguments, says=[...]) asserts that the command is refused, that its one line
    holds every word of `says`, and that the folder of the test is as it was."""

    def check(module, *arguments, says):
        before = snapshot(Path())
        check_refusal(call(module, *arguments), says)
        assert snapshot(Path()) == before

    return check


@pytest.fixture
def really_refused(run):
    """really_refused("train.py", *arguments, says=[...]) asserts the same with a process of its own."""

    def check(script, *arguments, says):
        before = snapshot(Path())
        done = run(script, *arguments)
        check_refusal(done, says)
        assert done.stdout == "" and snapshot(Path()) == before

    return check


@pytest.fixture
def model(make_llama):
    """A folder with a small LLaMA and a tokenizer that fits it; its window is 64."""
    folder, _ = make_llama("work/model", vocab_size=2048, num_hidden_layers=1)
    shutil.copy(TINY / "tokenizer.model", folder)
    return folder


CPU = ("--device", "cpu")
SMALL_RUN = ("--steps", 1, "--batch_size", 2, "--target_len", 256, *CPU)
TRAIN = ("--data", "text.txt", *SMALL_RUN)
PASSKEY = ("--task", "passkey", "--lengths", 128, *CPU)


# ---------------------------------------------------------------- what argparse refuses


@pytest.mark.parametrize(
    "module, arguments, says",
    [
        ("train", ["--stepz", 3], ["unrecognized arguments: --stepz 3"]),
        ("train", ["--steps", "many"], ["--steps", "'many'"]),
        ("train", ["--eval", 3], ["--eval", "--eval_every"]),
        ("eval", ["--model", "tiny"], ["required", "--task"]),
        ("bench", ["--task", "sprint"], ["--task", "'sprint'", "prefill"]),
        ("train", ["--data", ""], ["--data", "must name a file or a folder"]),
        ("train", ["--data", "text.txt", " "], ["--data", "must name a file or a folder"]),
        ("train", ["--out", ""], ["--out", "must name a file or a folder"]),
        ("train", ["--model", ""], ["--model", "must name a file or a folder"]),
        ("train", ["--batch_size", "99999999999"], ["--batch_size", "at most 2147483648"]),
        ("train", ["--steps", "9" * 5000], ["--steps", "'9999"]),
        ("train", ["--lr", "1e300"], ["--lr", "from 0 to 1"]),
        ("train", ["--llama_4_scaling_beta", "1e300"], ["--llama_4_scaling_beta", "from 0 to 100"]),
        ("eval", ["--task", "ppl", "--data", ""], ["--data", "must name a file or a folder"]),
        ("eval", ["--task", "ppl", "--model", ""], ["--model", "must name a file or a folder"]),
        ("sample", ["--model", ""], ["--model", "must name a file or a folder"]),
        ("tasks.coverage", ["--chunks", "1,two"], ["--chunks", "1,two"]),
        ("tasks.coverage", ["--examples", 0], ["--examples", "at least 1, not 0"]),
        ("tasks.coverage", ["--plot", "noext"], ["--plot", "noext", ".png"]),
    ],
    ids=str,
)
def test_arguments_that_are_none(call, module, arguments, says):
    command = f"-m {module}" if "." in module else f"{module}.py"
    before = snapshot(Path())
    check_refusal(call(module, *arguments), [*says, f"; see python {command} --help"])
    assert snapshot(Path()) == before


def test_commands_that_are_none(run):
    for script, *arguments in (
        ["hf.weights", "a"],
        ["assets/make_tiny.py"],
        ["tasks.coverage", "--plots", "a.png"],
    ):
        command = script if script.endswith(".py") else f"-m {script}"
        check_refusal(run(script, *arguments), [f"; see python {command} --help"])


# ---------------------------------------------------------------- the model


def test_no_such_folder(really_refused):
    says = ["nowhere/llama", "no such folder"]
    really_refused("train.py", "--model", "nowhere/llama", *TRAIN, says=says)
    really_refused("eval.py", "--model", "nowhere/llama", "--task", "passkey", says=says)


META = {"params.json": "{}", "consolidated.00.pth": ""}
CONVERT = "python -m hf.weights convert"


@pytest.mark.parametrize(
    "name, files, says",
    [
        ("meta", META, [f"{CONVERT} meta NEW_FOLDER"]),
        ("m.gguf", {"": "GGUF"}, [f"{CONVERT} m.gguf NEW_FOLDER"]),
        ("ggufs", {"q8.gguf": "GGUF"}, [f"{CONVERT} ggufs/q8.gguf NEW_FOLDER"]),
        ("out", {"model/config.json": "{}"}, ["its model is in out/model"]),
        ("peft", {"adapter_config.json": "{}", "base/config.json": "{}"}, ["adapters alone", "merged into"]),
        ("llamas", {"7b/config.json": "{}", "13b/config.json": "{}"}, ["2 models", "such as llamas/13b"]),
        ("empty", {"a.txt": ""}, ["name a Hugging Face folder, or tiny or smollm2-135m"]),
        ("llama/config.json", {"": "{}"}, ["name its folder, llama"]),
    ],
)
def test_a_model_that_is_somewhere_else(refused, name, files, says):
    """The message says what to do."""
    for file, content in files.items():
        path = Path(name, file) if file else Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    reason = "a file and no model's folder" if Path(name).is_file() else "no model here"
    refused("train", "--model", name, *TRAIN, "--out", "new", says=[f"{name}: {reason}", *says])


def test_folder_without_config(refused, model):
    (model / "config.json").unlink()
    refused("train", "--model", model, *TRAIN, says=[model, "config.json"])
    refused("eval", "--model", model, "--task", "ppl", says=[model, "config.json"])


def test_half_a_config(really_refused, model):
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text[: len(text) // 2])
    really_refused("train.py", "--model", model, *TRAIN, says=[model / "config.json"])


@pytest.mark.parametrize("content", ["", "[]", "null", '"llama"', "\x00"])
def test_config_that_is_no_object(refused, model, content):
    (model / "config.json").write_text(content)
    refused("train", "--model", model, *TRAIN, says=[model / "config.json"])


def change_config(model, change):
    """Change the model's config.json: {key: value}, or, for a key alone, take it out."""
    path = model / "config.json"
    config = json.loads(path.read_text())
    if isinstance(change, str):
        del config[change]
    else:
        config |= change
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"],
)
def test_config_without_a_key(refused, model, key):
    change_config(model, key)
    refused("train", "--model", model, *TRAIN, says=[model / "config.json", key])


LONGROPE_OF_A_TEXT = {
    "rope_type": "longrope",
    "original_max_position_embeddings": "64",
    "rope_theta": 1e4,
}


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
        # What its class assumes.
        ({"model_type": "mistral", "max_position_embeddings": 32768}, ["mistral", "sliding_window 4096"]),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0},
            ["qwen2", "sliding_window 32"],
        ),
        ({"model_type": "mistral", "sliding_window": "no"}, ["sliding_window", "'no'"]),
        ({"model_type": "mixtral"}, ["mixtral"]),
        ({"model_type": "qwen2_moe"}, ["qwen2_moe"]),
        ({"num_local_experts": 8}, ["mixture of experts", "num_local_experts 8"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantised"]),
        ({"rope_parameters": LONGROPE_OF_A_TEXT}, ["config.json"]),
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
    change_config(model, change)
    refused("train", "--model", model, *TRAIN, says=[model / "config.json", *says])
    refused("eval", "--model", model, "--task", "passkey", says=[model / "config.json", *says])


def test_scaling_that_depends_on_the_length(refused, model):
    change_config(model, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}})
    refused("train", "--model", model, *TRAIN, says=["dynamic", "base model"])


# ---------------------------------------------------------------- its weights


def change_tensors(change):
    """Return a function of a model's folder that applies change({name: tensor}) to its weights."""

    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def write_index(file):
    """Return a function of a model's folder that gives it an index, which says that the last norm is in
    `file`."""

    def edit(folder):
        names = list(load_file(folder / "model.safetensors"))
        shutil.copy(folder / "model.safetensors", folder / "part-1.safetensors")
        # A real file, out of bounds.
        shutil.copy(folder / "model.safetensors", folder.parent / "x.safetensors")
        weight_map = {name: "part-1.safetensors" for name in names} | {"model.norm.weight": str(file)}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "model.safetensors").unlink()

    return edit


def write_text_index(text):
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


def write_weights(content):
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


def cut(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def only_pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


UP, ROUTER = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.router.weight"
GIT_LFS = b"version https://git-lfs.github.com/spec/v1\n"
BROKEN_WEIGHTS = {
    "none": (lambda folder: (folder / "model.safetensors").unlink(), ["model.safetensors"]),
    "pickled": (
        only_pickles,
        ["no model.safetensors", "convert its .bin weights: python -m hf.weights convert"],
    ),
    "wrong_shape": (
        change_tensors(lambda tensors: tensors.update({UP: tensors[UP][1:].clone()})),
        [UP, "(95, 64)", "(96, 64)"],
    ),
    "transposed": (
        change_tensors(lambda tensors: tensors.update({UP: tensors[UP].T.contiguous()})),
        [UP, "(64, 96)", "(96, 64)"],
    ),
    "missing": (change_tensors(lambda tensors: tensors.pop(UP)), [UP, "missing"]),
    "no_head": (
        change_tensors(lambda tensors: tensors.pop("lm_head.weight")),
        ["lm_head.weight", "missing"],
    ),
    "unexpected": (
        change_tensors(lambda tensors: tensors.update({ROUTER: torch.ones(3)})),
        [ROUTER, "unexpected"],
    ),
    "truncated": (cut, ["model.safetensors"]),
    "empty": (write_weights(b""), ["model.safetensors"]),
    "git_lfs": (write_weights(GIT_LFS), ["model.safetensors"]),
    "index_above": (write_index("../x.safetensors"), ["index.json", "../x.safetensors"]),
    "index_absolute": (write_index("/etc/passwd"), ["index.json", "/etc/passwd"]),
    "index_parent": (write_index(".."), ["index.json", "'..'"]),
    "index_empty_name": (write_index(""), ["index.json"]),
    "index_absent_file": (write_index("part-2.safetensors"), ["part-2.safetensors", "missing"]),
    "index_no_json": (write_text_index('{"weight_map"'), ["index.json"]),
    "index_no_map": (write_text_index('{"weight_map": [1]}'), ["index.json"]),
}


@pytest.mark.parametrize("name", BROKEN_WEIGHTS)
def test_broken_weights(refused, model, name):
    damage, says = BROKEN_WEIGHTS[name]
    damage(model)
    refused("eval", "--model", model, *PASSKEY, says=[model, *says])


def test_index_that_lacks_a_weight(refused, model):
    """The file has it, the index does not name it: it is not part of the checkpoint."""
    write_index("part-1.safetensors")(model)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    del index["weight_map"][UP]
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("eval", "--model", model, *PASSKEY, says=[model, UP, "missing"])


def test_truncated_weights_when_training(really_refused, model):
    cut(model)
    really_refused("train.py", "--model", model, *TRAIN, says=[model / "model.safetensors", "truncated"])


def test_vocabulary_larger_than_the_models(really_refused, make_llama):
    folder, _ = make_llama("work/model", vocab_size=320)
    shutil.copy(TINY / "tokenizer.model", folder)
    really_refused("train.py", "--model", folder, *TRAIN, says=[folder, "2048", "320"])


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "merges.txt"])
def test_a_file_that_is_a_link_out_of_the_folder(refused, model, name):
    """It would be copied into every model that is made of this one."""
    Path("secret").write_text("{}")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(Path("secret").resolve())
    refused("train", "--model", model, *TRAIN, says=[model / name, "link out of the folder"])


def test_links_of_the_hugging_face_cache(call, model):
    snapshot, blobs = Path("models--a--b/snapshots/c0ffee"), Path("models--a--b/blobs")
    shutil.copytree(model, snapshot)
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(blobs / f"of_{path.name}")
        path.symlink_to(Path("../../blobs") / f"of_{path.name}")
    assert call("train", "--model", snapshot, *TRAIN, "--steps", 0).returncode == 0


def test_no_tokenizer(refused, model):
    (model / "tokenizer.model").unlink()
    refused("train", "--model", model, *TRAIN, says=[model, "tokenizer.model", "tokenizer.json"])


# ---------------------------------------------------------------- numbers that do not fit


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--target_len", 64, "--train_len", 80], ["--target_len 64", "80"]),
        (["--target_len", 63, "--train_len", 16], ["--target_len 63", "window of 64"]),
        (["--target_len", -5, "--rope", "ntk"], ["--target_len", "at least 1, not -5"]),
        (["--target_len", 2**40], ["--target_len", "at most"]),
        (["--target_len", 2**31, "--rope", "ntk"], ["--target_len 2147483648", "needs a factor of", "lower"]),
        (["--batch_size", 2**31], ["--batch_size 2147483648", "a step takes at most"]),
        (["--seed", 2**64], ["--seed", "at most"]),
        (["--train_len", 0], ["--train_len", "at least 1, not 0"]),
        (["--train_len", -5], ["--train_len", "at least 1, not -5"]),
        (["--chunks", 0], ["--chunks", "at least 1, not 0"]),
        (["--batch_size", 0], ["--batch_size", "at least 1, not 0"]),
        (["--steps", -1], ["--steps", "at least 0, not -1"]),
        (["--warmup_steps", -1], ["--warmup_steps", "at least 0, not -1"]),
        (["--save_every", -1], ["--save_every", "at least 0, not -1"]),
        (["--micro_batch_size", 3, "--batch_size", 8], ["--micro_batch_size 3", "8"]),
        (["--micro_batch_size", 0], ["--micro_batch_size", "at least 1, not 0"]),
        (["--method", "full", "--train_len", 64], ["--method full", "256"]),
        (["--seed", -1], ["--seed", "at least 0, not -1"]),
        (["--lr", -1], ["--lr", "from 0 to 1, not -1"]),
        (["--llama_4_scaling_beta", "nan"], ["--llama_4_scaling_beta", "not nan"]),
        (["--overshoot", 0.5], ["--overshoot", "from 1 to", "not 0.5"]),
        (["--factor", 1e300], ["--factor", "from 1 to", "not 1e+300"]),
        (["--overshoot", 2, "--method", "pi"], ["--overshoot", "with pi"]),
        (["--factor", 0.5], ["--factor", "from 1 to", "not 0.5"]),
        (["--factor", "nan"], ["--factor", "not nan"]),
        (["--rope", "default", "--factor", 4], ["--factor", "--rope default"]),
        (["--rope", "ntk", "--beta_fast", 8], ["--beta_fast", "--rope ntk"]),
        (["--beta_fast", 0], ["--beta_fast", "from 1 to", "not 0"]),
        (["--method", "pi", "--chunks", 3], ["--chunks", "pi"]),
        (["--method", "randpos", "--offset", "zero"], ["--offset", "randpos"]),
        (["--eval_lengths", 64], ["--eval_lengths", "--eval_every"]),
        (["--retrieval", 1.5], ["--retrieval", "from 0 to 1, not 1.5"]),
        (["--retrieval", 0.5, "--method", "full"], ["--retrieval", "with full"]),
        (["--retrieval", 0.5, "--method", "randpos"], ["--retrieval", "with randpos"]),
        (["--episode_len", 64], ["--episode_len", "--retrieval"]),
        (["--lora_rank", -1], ["--lora_rank", "at least 0, not -1"]),
        (["--lora_rank", 65], ["--lora_rank 65", "at most rank 64"]),
        (["--lora_rank", 4, "--lora_alpha", 0], ["--lora_alpha", "at least 1, not 0"]),
        (["--lora_rank", 4, "--lora_targets", "q,x"], ["--lora_targets", "q,k,v,o", "'x'"]),
        (["--lora_rank", 4, "--lora_train", "head"], ["--lora_train", "embed,norm", "'head'"]),
        (["--lora_alpha", 4], ["--lora_alpha belongs to --lora_rank"]),
        (["--lora_targets", "q"], ["--lora_targets belongs to --lora_rank"]),
        (["--lora_train", "norm"], ["--lora_train belongs to --lora_rank"]),
        (["--adapter"], ["--adapter belongs to --lora_rank"]),
        (["--retrieval", 1, "--episode_len", 48], ["--episode_len 48", "the 64 tokens"]),
        (
            ["--retrieval", 0.5, "--train_len", 128, "--micro_batch_size", 2],
            ["--micro_batch_size 2", "--episode_len 128"],
        ),
    ],
    ids=lambda v: " ".join(map(str, v)),
)
def test_training_arguments(refused, model, arguments, says):
    refused("train", "--model", model, *TRAIN, *arguments, says=says)


def test_batch_size_that_does_not_divide(refused, model, as_first_of):
    as_first_of(2)
    refused("train", "--model", model, *TRAIN, "--batch_size", 3, says=["--batch_size 3", "2 processes"])


def test_no_cuda(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module, arguments in (("train", TRAIN), ("eval", PASSKEY)):
        cuda = ("--model", "tiny", *arguments, "--device", "cuda")
        refused(module, *cuda, says=["--device cuda", "CUDA"])


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
        ("d.json", b'["fine",\n5]', ["item 2"]),
        ("d.parquet", b"PAR1", ["not readable as Parquet"]),
        ("d.jsonl", b'{"messages": [{"role": "assistant", "content": "a"}]}', ["line 1", "no chat template"]),
        ("d.jsonl", b'{"messages": ["a"]}', ["line 1", "message 1"]),
    ],
    ids=lambda v: ascii(v)[:40],
)
def test_data_that_cannot_be_read(refused, model, tmp_path, name, content, says):
    Path(name).write_bytes(content)
    refused("train", "--model", model, "--data", name, *SMALL_RUN, says=[name, *says])
    # There is no half-made token file for the next run to find.
    tokens = tmp_path / "cache" / "tokens"
    assert not tokens.exists() or not list(tokens.iterdir())


def test_no_data(really_refused, refused, model):
    Path("empty.txt").write_text("")
    Path("folder").mkdir()
    run_of_model = ("--model", model, *SMALL_RUN)
    really_refused("train.py", *run_of_model, "--data", "empty.txt", says=["empty.txt"])
    refused("train", *run_of_model, "--data", "absent.txt", says=["absent.txt"])
    both = ("--data", "absent.txt", "--data", "text.txt")  # both count
    refused("train", *run_of_model, *both, says=["absent.txt"])
    refused("train", *run_of_model, "--data", "folder", says=["folder", ".txt"])


def test_train_len_longer_than_every_document(refused, model):
    Path("short.txt").write_text("a cat")
    too_long = ("--data", "short.txt", "--train_len", 50)
    refused("train", "--model", model, *SMALL_RUN, *too_long, says=["50", "training window"])


# ---------------------------------------------------------------- the output folder


@pytest.fixture
def finished(model):
    """A folder that looks like a run's, with the arguments it had."""
    arguments = {
        "model": str(model), "data": ["text.txt"], "target_len": 256, "train_len": 64, "method": "pose",
        "chunks": 2, "offset": "uniform", "overshoot": 1.0, "rope": "yarn", "factor": 4.0,
        "llama_4_scaling_beta": 0.0, "steps": 1, "batch_size": 2, "micro_batch_size": 2, "lr": 2e-5,
        "warmup_steps": 10, "seed": 0, "activation_checkpointing": "none", "cpu_offload": False,
        "compile": False, "dtype": "float32", "param_dtype": "float32", "device": "cpu",
    }  # fmt: skip
    Path("done/model").mkdir(parents=True)
    Path("done/args.json").write_text(json.dumps(arguments))
    Path("done/model/config.json").write_text("{}")


def test_weights_that_are_no_numbers_leave_no_folder(call, model):
    """So the same command goes on once they are mended. The plan was said before they were read."""
    change_tensors(lambda tensors: tensors.update({UP: tensors[UP] / 0}))(model)
    before = snapshot(Path())
    done = call("train", "--model", model, *TRAIN)
    assert done.returncode == 2 and snapshot(Path()) == before and "Traceback" not in done.stderr
    assert f"weight {UP} is NaN or infinite" in done.stderr.splitlines()[-1]


def test_a_weight_that_one_of_two_processes_reads(run, model):
    """The second one has the last rows. It says so, and the first one writes nothing meanwhile."""

    def spoil(tensors):
        tensors[UP][-1] = float("nan")

    change_tensors(spoil)(model)
    before = snapshot(Path())
    done = run("train.py", "--model", model, *TRAIN, processes=2)
    after = snapshot(Path())
    for name in ("out", "out/.lock"):  # the lock of the first one, which may have been ended by the second
        after.pop(name, None)
    assert done.returncode != 0 and after == before
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    # The first one may hear of its end before torchrun ends it too.
    (own,) = [line for line in errors if "another process of this run has ended" not in line]
    assert f"weight {UP} is NaN or infinite" in own


def test_a_run_without_any_update_writes_no_model(call, model):
    """Weights so large that no loss is finite: a step is left out, and it was the only one."""
    change_tensors(lambda tensors: tensors.update({UP: tensors[UP] * 1e38}))(model)
    done = call("train", "--model", model, *TRAIN, "--steps", 3, "--out", "out")
    assert done.returncode == 2 and "step 3: loss or gradient was not finite 3 times" in done.stderr
    assert not Path("out/model").exists()


def test_many_passes_are_said(call, model):
    texts = ("--data", "text.txt", "--batch_size", 64, "--steps", 2, "--target_len", 256)
    done = call("train", "--model", model, *texts, *CPU, "--out", "out", "--train_len", 48)
    assert done.returncode == 0 and "passes over" not in done.stderr
    Path("short.txt").write_text("The cat sat on the mat. " * 20)
    texts = ("--data", "short.txt", *texts[2:])
    done = call("train", "--model", model, *texts, *CPU, "--out", "out2", "--train_len", 48)
    assert done.returncode == 0 and "passes over these texts" in done.stderr


def test_out_that_holds_a_run(really_refused, refused, model, finished):
    into_done = ("--model", model, *TRAIN, "--out", "done")
    really_refused("train.py", *into_done, says=["done", "--resume"])
    Path("done/args.json").unlink()  # a bare model is not overwritten either
    refused("train", *into_done, says=["done"])
    Path("done/model").rename("done/checkpoints")  # nor are checkpoints mixed with those of another run
    refused("train", *into_done, says=["done"])


def test_out_inside_the_model(refused, model):
    """Whoever removed the run later would remove the model with it."""
    for out in (model, model / "out"):
        refused(
            "train", "--model", model, *TRAIN, "--out", out, says=[f"--out {out} is inside --model {model}"]
        )


def test_out_in_a_folder_named_like_a_built_in_model(call):
    """The model is not in it."""
    Path("tiny").mkdir()
    done = call("train", "--model", "tiny", *TRAIN, "--steps", 0, "--out", "tiny/out")
    assert done.returncode == 0, done.stderr


def test_out_that_cannot_be_written_to(refused, model, monkeypatch):
    """A plan says so too."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    for plan in ((), ("--dry_run",)):
        arguments = ("--model", model, *TRAIN, "--out", "a/b", *plan)
        refused("train", *arguments, says=[f"--out a/b: {Path.cwd()} cannot be written to"])


def test_a_plan_for_broken_weights(refused, model):
    """What a run would refuse hours later, on a machine that costs money."""
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    refused("train", "--model", model, *TRAIN, "--out", "new", "--dry_run", says=["model.safetensors"])


def test_out_inside_the_texts(refused, model):
    """Its metrics and tokenizer would be read as texts by the next run, and by --resume."""
    Path("texts").mkdir()
    shutil.copy("text.txt", "texts")
    for out in ("texts", "texts/out", "texts/../texts/a/b"):
        arguments = ("--model", model, *TRAIN, "--data", "texts", "--out", out)
        refused("train", *arguments, says=[f"--out {Path(out)} is inside --data texts"])


def test_resume_without_a_run_begins_one(call, refused, model):
    """So that a job script has one command. But what may be a run's or a user's is left alone."""
    resume = ("--model", model, *TRAIN, "--resume")
    Path("bare").mkdir()
    for out in ("absent", "bare"):
        done = call("train", *resume, "--out", out)
        assert done.returncode == 0, done.stderr
        assert f"--resume: {out} holds no run yet; beginning one" in done.stderr
        assert Path(out, "model", "config.json").exists() and Path(out, "args.json").exists()
    Path("bare/args.json").unlink()
    refused("train", *resume, "--out", "bare", says=["bare already holds a run; name another folder\n"])


def test_resume_without_a_run_and_a_model(refused, finished):
    """Then a folder was mistyped. The default model is not what is to be trained."""
    Path("empty").mkdir()
    for out in ("dnoe", "empty"):
        refused("train", *TRAIN, "--resume", "--out", out, says=["--resume", out])


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--lr", 1e-3], ["lr was 2e-05, now 0.001"]),
        (["--seed", 1, "--rope", "linear"], ["seed was 0, now 1", "rope was yarn, now linear"]),
        (["--train_len", 32], ["train_len was 64, now 32"]),
        # And not that this has no factor, which was not given.
        (["--rope", "default"], ["rope was yarn, now default"]),
    ],
    ids=lambda v: " ".join(map(str, v)),
)
def test_resume_with_other_arguments(refused, model, finished, arguments, says):
    resume = ("--model", model, *TRAIN, "--out", "done", "--resume")
    refused("train", *resume, *arguments, says=["--resume", "done", *says])


def test_resume_of_a_broken_record(refused, model, finished):
    Path("done/args.json").write_text('{"model"')
    refused("train", "--model", model, *TRAIN, "--out", "done", "--resume", says=["args.json"])


@pytest.mark.parametrize(
    "change",
    [
        {"lr": "fast"}, {"lr": [1e-3]}, {"lr": True}, {"steps": 1.5}, {"steps": {}}, {"steps": -1},
        {"rope": 7}, {"data": [""]}, {"data": ["a\0b"]}, {"model": ""},
        {"eval_lengths": [0]}, {"cpu_offload": "maybe"}, {"method": ["pose"]}, {"batch_size": 2**40},
    ],
    ids=str,
)  # fmt: skip
def test_resume_of_a_record_of_other_types(refused, finished, change):
    """Each is what a command line would be refused for."""
    record = json.loads(Path("done/args.json").read_text())
    Path("done/args.json").write_text(json.dumps(record | change))
    (option,) = change
    refused("train", "--resume", "--out", "done", says=["done", option])


@pytest.mark.parametrize("out", ["text.txt", "text.txt/run"])
def test_out_that_is_a_file(refused, model, out):
    refused("train", "--model", model, *TRAIN, "--out", out, says=["text.txt"])


# ---------------------------------------------------------------- eval


@pytest.mark.parametrize("lengths", ["abc", "128,", "1e3", "64;128", ""])
def test_lengths_that_are_no_numbers(refused, model, lengths):
    refused("eval", "--model", model, *PASSKEY, "--lengths", lengths, says=["--lengths", repr(lengths)])


def test_lengths_abc(really_refused):
    really_refused("eval.py", "--model", "tiny", *PASSKEY, "--lengths", "abc", says=["--lengths", "'abc'"])


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["passkey", "--lengths", 20], ["20 tokens are too few", "passkey prompt"]),
        (["passkey", "--lengths", 0], ["--lengths", "not 0"]),
        (["passkey", "--lengths", "-64"], ["--lengths", "not -64"]),
        (["passkey", "--trials", 0], ["--trials", "at least 1, not 0"]),
        (["passkey", "--seed", -1], ["--seed", "at least 0, not -1"]),
        (["ppl", "--documents", 0], ["--documents", "at least 1, not 0"]),
        (["ppl", "--stride", 0], ["--stride", "at least 1, not 0"]),
        (["ppl", "--data", "text.txt", "--lengths", "100000,200000"], ["--data", "100000"]),
        (["ppl", "--data", "absent.txt"], ["absent.txt"]),
        (["passkey", "--json", "absent/r.json"], ["absent/r.json"]),
        (["passkey", "--plot", "absent/r.png"], ["absent/r.png"]),
        (["passkey", "--json", "folder"], ["folder"]),
        (["passkey", "--plot", "plot.xyz"], ["plot.xyz"]),
        (["passkey", "--json", "r.png", "--plot", "./r.png"], ["--plot r.png", "--json"]),
        (["passkey", "--tail", 8], ["--tail", "--task ppl"]),
        (["passkey", "--documents", 3], ["--documents", "--task ppl"]),
        (["ppl", "--seed", 1], ["--seed", "--task passkey or needle"]),
        (["ppl", "--trials", 1], ["--trials", "--task passkey or needle"]),
        (["needle", "--samples", 1], ["--samples", "--task ruler"]),
        (["ruler", "--data", "text.txt", "--lengths", "600,2048"], ["600 tokens are too few", "vt", "cwe"]),
        (["benchmarks", "--lengths", 256], ["--lengths", "--task passkey or needle or ruler or ppl"]),
        (["ppl", "--generate"], ["--generate", "--task passkey or needle"]),
        (["ppl", "--tail", 0], ["--tail", "at least 1, not 0"]),
        (["ppl", "--tail", 256], ["--tail 256", "length of 256"]),
        (["ppl", "--tail", 8, "--by_position"], ["--tail 8", "--by_position"]),
        (["ppl", "--tail", 8, "--all"], ["--tail 8", "leave out --all"]),
        (["passkey", "--all"], ["--all", "--task ppl"]),
        (["ppl", "--tail", 8, "--data", "text.txt", "--lengths", "128,100000"], ["--data", "100000"]),
        (["needle", "--keys", 17], ["--keys 17", "16"]),
        (["passkey", "--data", "text.txt"], ["--data", "needle"]),
        (["needle", "--data", "text.txt", "--lengths", 60], ["60 tokens are too few", "fewer codes"]),
        (["needle", "--data", "text.txt", "--lengths", 100000], ["texts", "too few", "100000"]),
        (["benchmarks"], ["--data", "boolq"]),
        (["benchmarks", "--data", "text.txt"], ["--data", "boolq"]),
        (["benchmarks", "--data", "folder"], ["folder", "boolq"]),
        (["benchmarks", "--data", "folder", "--limit", 0], ["--limit", "at least 1, not 0"]),
    ],
    ids=lambda v: " ".join(map(str, v)),
)
def test_evaluation_arguments(refused, model, arguments, says):
    Path("folder").mkdir()
    lengths = [] if arguments[0] == "benchmarks" else ["--lengths", 256]
    refused("eval", "--model", model, *lengths, *CPU, "--task", *arguments, says=says)


TRIAL = {"depth": 0.5, "correct": True}
RESULT = {"length": 128, "trials": 1, "accuracy": 1.0, "interval": [0.2, 1.0], "by_trial": [TRIAL]}


def results(**changes):
    """Return the content of a file of results with one of a passkey evaluation, which is changed."""
    return {"task": "passkey", "model": "m", "results": [RESULT | changes], "settings": {"model": ["m"]}}


RESULTS_OF_OTHER_TYPES = [
    results() | {"settings": []},
    results() | {"settings": {"model": ["other"]}},
    results() | {"settings": {"model": ["m"], "task": "needle"}},
    results() | {"compared": 5},
    results() | {"compared": [7]},
    results() | {"results": 7},
    results() | {"results": [7]},
    results(length="128"),
    results(length=True),
    results(length=[1]),
    results(accuracy="all"),
    results(accuracy=None),
    results(interval=[0.5]),
    results(by_trial=[{"depth": "low", "correct": True}]),
    results(by_trial=[[]]),
    results(by_trial=None),
]


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"task"',
        "[1]",
        '{"task": "passkey"}',
        '{"task": "passkey", "model": "tiny", "results": []}',
        *(json.dumps(content) for content in RESULTS_OF_OTHER_TYPES),
        "\xff",
    ],
)
def test_json_that_holds_nothing_to_go_on_from(refused, model, content):
    Path("r.json").write_bytes(content.encode("latin1"))
    refused("eval", "--model", model, *PASSKEY, "--json", "r.json", says=["r.json", "holds no results"])


def test_json_that_is_of_the_right_types(refused, model):
    """What RESULTS_OF_OTHER_TYPES are changes of is refused for its settings alone."""
    Path("r.json").write_text(json.dumps(results()))
    says = ["r.json: holds results of another evaluation"]
    refused("eval", "--model", model, *PASSKEY, "--json", "r.json", says=says)


def test_a_base_that_is_no_name(refused, finished):
    """Without --model the base stands in out/args.json."""
    Path("done").rename("out")
    Path("out/args.json").write_text('{"model": [1]}')
    refused("eval", *PASSKEY, says=["out/args.json: names no model"])


def test_json_of_another_task_that_has_its_results(refused, model):
    """Perplexity's entries have other keys than those of passkeys."""
    Path("r.json").write_text(
        json.dumps(results(accuracy=None) | {"task": "ppl", "settings": {"model": ["m"], "task": "ppl"}})
    )
    says = ["r.json: holds results of another evaluation", "task was ppl, now passkey"]
    refused("eval", "--model", model, *PASSKEY, "--json", "r.json", says=says)


def test_json_of_another_evaluation(refused, call, model):
    evaluation = ("--model", model, "--lengths", 200, "--json", "r.json", *CPU)
    passkey = (*evaluation, "--task", "passkey", "--trials")
    assert call("eval", *passkey, 1).returncode == 0
    refused("eval", *passkey, 2, "--seed", 5, says=["r.json", "trials was 1, now 2", "seed was 0, now 5"])
    needle = (*evaluation, "--task", "needle", "--trials", 1)
    refused("eval", *needle, says=["r.json", "task was passkey, now needle"])
    two_models = (*passkey, 1, "--model", "tiny")
    refused("eval", *two_models, says=["r.json", f"model was ['{model}'], now ['{model}', 'tiny']"])
    # The model is trained further, into the same folder.
    change_tensors(lambda tensors: tensors.update({UP: tensors[UP] + 0.01}))(model)
    refused("eval", *passkey, 1, says=["r.json", f"weights of {model} was "])


def test_json_of_other_texts(refused, call, model):
    """Of the same name and size as those that the results are of."""
    texts = ("--data", "text.txt", "--lengths", 64, "--json", "r.json")
    evaluation = ("--model", model, "--task", "ppl", *texts, *CPU)
    assert call("eval", *evaluation).returncode == 0
    Path("text.txt").write_text(Path("text.txt").read_text().replace("cat", "dog"))
    refused("eval", *evaluation, says=["r.json", "data was "])


def test_weights_that_give_no_number(refused, model):
    change_tensors(lambda tensors: tensors.update({UP: tensors[UP] * 1e38}))(model)
    texts = ("--data", "text.txt", "--lengths", 64, "--json", "r.json")
    refused("eval", "--model", model, "--task", "ppl", *texts, *CPU, says=["not finite"])


def test_results_in_a_folder_that_cannot_be_written(refused, monkeypatch):
    # root may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    refused("eval", "--model", "tiny", *PASSKEY, "--json", "r.json", says=["r.json", "cannot be written"])


def test_results_that_another_process_writes(call, run, model, monkeypatch):
    """From the first second to the last: the second call comes while the first one measures."""
    evaluation = (
        "--model",
        model,
        "--lengths",
        200,
        "--trials",
        1,
        "--json",
        "r.json",
        *CPU,
        "--task",
        "passkey",
    )
    measured, others = weights.load, []

    def load(*arguments):
        others.append(run("eval.py", *evaluation))
        return measured(*arguments)

    monkeypatch.setattr(weights, "load", load)
    assert call("eval", *evaluation).returncode == 0
    (other,) = others
    check_refusal(other, ["--json", "r.json", "another process"])
    assert len(json.loads(Path("r.json").read_text())["results"]) == 1
    assert {path.name for path in Path().iterdir()} == {"model", "r.json", "text.txt"}


def test_results_into_a_device_or_a_pipe(call, model):
    """They are written once, at the end, and nothing is replaced."""
    evaluation = ("--model", model, "--lengths", "128,200", "--trials", 1, *CPU, "--task", "passkey")
    Path("nowhere").symlink_to(os.devnull)
    Path("nowhere.png").symlink_to(os.devnull)
    assert call("eval", *evaluation, "--json", "nowhere", "--plot", "nowhere.png").returncode == 0
    assert Path("nowhere").is_symlink() and Path("nowhere.png").is_symlink()
    os.mkfifo("pipe")
    done = call("eval", *evaluation, "--json", "pipe")
    assert done.returncode == 2 and "pipe: nobody reads" in done.stderr
    assert "128" in done.stdout  # the table is there
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert call("eval", *evaluation, "--json", "pipe").returncode == 0
    content = json.loads(os.read(reader, 2**16))
    os.close(reader)
    assert [result["length"] for result in content["results"]] == [128, 200]


def test_a_plot_is_whole_or_as_it_was(call, model, monkeypatch):
    Path("p.png").write_bytes(b"earlier")
    monkeypatch.setattr(Path, "write_bytes", disk_full)
    done = call("eval", "--model", model, *PASSKEY, "--trials", 1, "--plot", "p.png")
    check_disk_full(done)
    assert "p.png" in done.stderr and Path("p.png").read_bytes() == b"earlier"
    assert not list(Path().glob("p.png.*"))


# ---------------------------------------------------------------- errors of the system


def test_a_user_without_a_home(refused, model, monkeypatch):
    monkeypatch.delenv("POSE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    refused("train", "--model", model, *TRAIN, says=["no home folder", "POSE_CACHE"])


def test_half_of_what_torchrun_tells(refused, model, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    refused("train", "--model", model, *TRAIN, says=["RANK", "MASTER_ADDR", "torchrun"])


def test_a_limit_on_the_size_of_files(run, model):
    """`ulimit -f`, when a checkpoint and when the model is written."""
    script = Path("limited.py").resolve()
    script.write_text(LIMITED)
    checkpoint = (["--steps", 2, "--save_every", 1], "out/checkpoints")
    for more, place in checkpoint, ([], "out/model/model.safetensors"):
        done = run(script, ROOT, "--model", model, *TRAIN, "--out", "out", *more)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert f"error: {place}: File too large" in done.stderr.splitlines()[-1]
        assert not list(Path("out").rglob("*.tmp"))
        shutil.rmtree("out")


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
del sys.argv[0]
sys.path.insert(0, sys.argv[0])
runpy.run_path(sys.path[0] + "/train.py", run_name="__main__")
"""


# ---------------------------------------------------------------- full memory


def test_memory_that_is_full(call, monkeypatch):
    monkeypatch.setattr(data, "tokenised", lambda *arguments: torch.empty(2**52))
    check_refusal(call("train", "--model", "tiny", *TRAIN), ["memory is full", "lower"])


# ---------------------------------------------------------------- a full disk


def disk_full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def safetensors_disk_full(*arguments, **others):
    message = "Error while serializing: I/O error: No space left on device (os error 28)"
    raise safetensors.SafetensorError(message)


def check_disk_full(done):
    """Assert that a finished command says in its last line, and only there, that the disk is full."""
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("error: the disk is full"), done.stderr
    assert sum(line.startswith("error: ") for line in lines) == 1


def test_disk_full_when_the_model_is_written(call, model, monkeypatch):
    monkeypatch.setattr(writing, "save_file", safetensors_disk_full)
    check_disk_full(call("train", "--model", model, *TRAIN, "--out", "out"))
    assert {path.name for path in Path("out").iterdir()} == {"args.json", "metrics.jsonl"}


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
        is_second = Path("out/checkpoints/step-1").exists()
        return SmallDisk(path, mode) if mode == "wb" and is_second else real(self, path, mode)

    monkeypatch.setattr(checkpoint_files, "create_stream", create_stream)
    two_steps = (*TRAIN, "--steps", 2, "--save_every", 1)
    check_disk_full(call("train", "--model", model, *two_steps, "--out", "out"))
    assert Path("out/checkpoints/step-1/.metadata").is_file() and not Path("out/checkpoints/step-2").exists()


def test_disk_full_at_the_last_checkpoint(call, model, monkeypatch):
    """The model is smaller, and may find room."""
    monkeypatch.setattr(Checkpoints, "_give_name", disk_full)
    check_disk_full(call("train", "--model", model, *TRAIN, "--save_every", 1, "--out", "out"))
    assert weights.load("out/model") and is_finished(Path("out"))
    assert list(Path("out/checkpoints").iterdir()) == []


def test_disk_full_when_texts_are_tokenised(call, model, tmp_path, monkeypatch):
    monkeypatch.setattr(data.Path, "write_bytes", disk_full)
    check_disk_full(call("train", "--model", model, *TRAIN, "--out", "out"))
    assert not Path("out").exists() and not list((tmp_path / "cache" / "tokens").iterdir())


def test_a_really_full_disk(run, model):
    """/dev/full in the place of the log: the first line of it is refused by the kernel."""
    Path("out").mkdir()
    Path("out/metrics.jsonl").symlink_to("/dev/full")
    check_disk_full(run("train.py", "--model", model, *TRAIN, "--out", "out"))
    assert not Path("out/model").exists()
