"""What we load computes what transformers computes, and what we save transformers loads.

An interrupted save leaves the earlier folder whole.
"""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from published import (
    FAR,
    NEAR,
    TINY,
    assert_same,
    ours,
    publish,
    snapshot,
    stock,
)
from safetensors.torch import load_file, save_file

from hf import scaling, tokenizer, weights, writing
from hf.builtin import open_model


@pytest.fixture(scope="module")
def tiny_tokenizer():
    return tokenizer.load(TINY)


@pytest.fixture
def small_shards(monkeypatch):
    """Let a safetensors file hold 100,000 bytes at most."""
    monkeypatch.setattr(writing, "SHARD_BYTES", 100_000)


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"head_dim": 32, "rope_theta": 5e5},
    ],
    ids=["gqa", "tied", "mha", "mqa", "wide_heads"],
)
def test_loads_what_transformers_writes(make_llama, shape, shard):
    folder, model = make_llama(max_shard_size=shard, **shape)
    assert (folder / "model.safetensors.index.json").exists() == (shard != "5GB")
    assert not list(folder.glob("*.bin"))
    loaded = weights.load(folder)
    assert not loaded.training
    assert (loaded.head.weight is loaded.embed.weight) == shape.get("tie_word_embeddings", False)
    for positions in (NEAR, FAR):
        assert_same(ours(loaded, positions), stock(model, positions))


def test_bfloat16_on_disk(make_llama):
    folder, model = make_llama()
    model.to(torch.bfloat16).save_pretrained(folder)
    assert {p.dtype for p in weights.load(folder).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in weights.load(folder, dtype=torch.float32).parameters()} == {torch.float32}
    assert_same(ours(folder), stock(folder))


def test_tiny():
    model, tiny = weights.load("tiny", dtype=torch.float32), open_model("tiny").load_tokenizer()
    ids = torch.tensor([[tiny.bos_id] + tiny.encode(Path(shutil.__file__).read_text())])[:, :256]
    positions = torch.arange(256)[None]
    logits = ours(model, positions, ids)
    assert_same(logits, stock(TINY, positions, ids))
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    # It is trained: a random model's loss is log V.
    assert loss < 0.6 * np.log(model.config.vocab_size)


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize(
    "shape", [{"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"head_dim": 32}], ids=str
)
def test_shapes_survive_saving(make_llama, tiny_tokenizer, tmp_path, shape):
    folder, base = make_llama(**shape)
    weights.save(weights.load(folder), tiny_tokenizer, tmp_path / "out")
    assert_same(stock(tmp_path / "out"), stock(base))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_load_save_gives_the_same_bytes(make_llama, tiny_tokenizer, tmp_path, small_shards, dtype):
    folder, base = make_llama()
    base.to(dtype).save_pretrained(folder)
    # The trainer has float32 in memory, whatever is on disk.
    model = weights.load(folder, dtype=torch.float32)
    model.config = scaling.extend(model.config, "yarn", 512)
    weights.save(model, tiny_tokenizer, tmp_path / "a")
    weights.save(weights.load(tmp_path / "a"), tokenizer.load(tmp_path / "a"), tmp_path / "b")
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert {t.dtype for t in load_file(file).values()} == {dtype}


def test_tokenizer_files_come_along(make_llama, tmp_path):
    folder, _ = make_llama()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    extra = {
        "special_tokens_map.json": b"{}",
        "generation_config.json": b'{"do_sample": false}',
        "chat_template.jinja": b"{{ messages }}",
    }
    for name, content in extra.items():
        (folder / name).write_bytes(content)
    weights.save(weights.load(folder), tokenizer.load(folder), tmp_path / "out")
    written = snapshot(tmp_path / "out")
    assert {name: written[name] for name in extra} == extra
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert written[name] == (TINY / name).read_bytes()


def test_shards(make_llama, tiny_tokenizer, tmp_path, small_shards):
    folder, base = make_llama()
    out = tmp_path / "out"
    weights.save(weights.load(folder), tiny_tokenizer, out)
    files = sorted(p.name for p in out.glob("*.safetensors"))
    count = len(files)
    assert count > 2 and files == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    sizes = [sum(t.nbytes for t in load_file(out / file).values()) for file in files]
    assert max(sizes) <= 100_000
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes) == sum(p.nbytes for p in base.parameters())
    assert set(index["weight_map"]) == set(base.state_dict())
    assert_same(stock(out), stock(base))
    assert_same(ours(out), stock(base))


def test_an_existing_folder_is_replaced_whole(make_llama, tiny_tokenizer, tmp_path, monkeypatch):
    folder, _ = make_llama()
    out = tmp_path / "runs" / "model"
    with monkeypatch.context() as m:
        m.setattr(writing, "SHARD_BYTES", 100_000)
        weights.save(weights.load(folder), tiny_tokenizer, out)
    (out / "extra.safetensors").write_text("stale")
    other, base = make_llama("other", seed=1)
    weights.save(weights.load(other), tiny_tokenizer, out)
    of_tokenizer = {"tokenizer.model", "tokenizer_config.json"}
    assert set(snapshot(out)) == {"config.json", "model.safetensors"} | of_tokenizer
    assert [p.name for p in out.parent.iterdir()] == ["model"]
    assert_same(stock(out), stock(base))


@pytest.fixture
def saved(make_llama, tiny_tokenizer, tmp_path):
    """Return a folder that holds a saved model, alone in the folder above it, and another model."""
    out = tmp_path / "runs" / "model"
    weights.save(weights.load(make_llama()[0]), tiny_tokenizer, out)
    return out, weights.load(make_llama("other", seed=1)[0])


@pytest.mark.parametrize("at", [1, 2])
def test_a_full_disk_leaves_the_earlier_folder_whole(saved, tiny_tokenizer, monkeypatch, small_shards, at):
    """The disk is full at the first file, or at the second."""
    out, other = saved
    before = snapshot(out)
    calls = []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) < at:
            return save_file(tensors, path, metadata)
        Path(path).write_bytes(b"half of it")
        # safetensors 0.8 says this on a tmpfs of 1 MiB.
        message = "Error while serializing: I/O error: No space left on device (os error 28)"
        raise safetensors.SafetensorError(message)

    monkeypatch.setattr(writing, "save_file", full)
    with pytest.raises(OSError) as error:
        weights.save(other, tiny_tokenizer, out)
    assert error.value.errno == errno.ENOSPC and len(calls) == at
    assert snapshot(out) == before
    assert [p.name for p in out.parent.iterdir()] == ["model"]


def test_permissions_that_cannot_be_set_are_no_failure(saved, tiny_tokenizer, monkeypatch):
    """As on mounts of cloud storage."""
    out, other = saved

    def refuse(path, mode):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "chmod", refuse)
    weights.save(other, tiny_tokenizer, out)
    assert [p.name for p in out.parent.iterdir()] == ["model"] and weights.load(out)


def test_a_kill_at_the_last_moment_leaves_the_earlier_folder_whole(saved, tiny_tokenizer, monkeypatch):
    out, other = saved
    before, rename = snapshot(out), Path.rename

    def killed(self, target):
        if Path(target) == out:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        weights.save(other, tiny_tokenizer, out)
    assert before in [snapshot(p) for p in out.parent.iterdir()]


# ---------------------------------------------------------------- python -m hf.weights show

SHOWN = {
    "gptj": [
        "gptj, ",
        "MLP 256, head own",
        "heads 4 of 16 dimensions, 8 of them rotary, key/value heads 4\n",
    ],
    "phi": ["phi, ", "MLP 96", "8 of them rotary, key/value heads 4, biases on q, k, v, o\n"],
    "olmo2": ["olmo2, ", "key/value heads 2, queries and keys normalised\n"],
    "smollm3": ["smollm3, ", "key/value heads 2, no RoPE in 1 layer(s)\n"],
    "baichuan": ["baichuan, ", "head own\n", "heads 4 of 16 dimensions, key/value heads 4\n"],
    "baichuan2": ["baichuan, ", "head own, of unit rows\n"],
}


@pytest.mark.parametrize("family", SHOWN)
def test_show(capsys, tmp_path, family):
    folder = tmp_path / family
    theirs = publish(folder, family, vocab_size=2048)
    shutil.copy(TINY / "tokenizer.model", folder)
    weights.show(folder)
    shown = capsys.readouterr().out
    parameters = f"{sum(p.numel() for p in theirs.parameters()):,} parameters"
    for fact in (*SHOWN[family], parameters, "window 64 tokens"):
        assert fact in shown, (fact, shown)
