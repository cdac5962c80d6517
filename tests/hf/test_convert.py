"""Pickled weights and Meta's layout convert to folders with the same logits as transformers' models."""

import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from gguf_files import TOKENS, Q, bpe_metadata, smollm_bpe, write_gguf

from hf import convert, weights, writing
from hf.folder import CheckpointFolder
from storage.errors import InputError

TINY = ROOT / "assets" / "tiny"


@torch.no_grad()
def assert_same_logits(folder, model):
    """Assert that this code and transformers compute the logits of a model of transformers from a folder."""
    torch.testing.assert_close(weights.load(folder)(TOKENS), model(TOKENS).logits, rtol=0, atol=1e-4)
    assert torch.equal(type(model).from_pretrained(folder)(TOKENS).logits, model(TOKENS).logits)


@pytest.fixture
def make_bin(make_llama, tmp_path):
    """make_bin(shards, **config) -> a folder laid out like the published .bin checkpoints, and its model."""

    def make(shards=1, **changes):
        written, model = make_llama(vocab_size=2048, **changes)
        folder = tmp_path / "published"
        folder.mkdir()
        for name in ("config.json", "generation_config.json"):
            shutil.copy(written / name, folder)
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(TINY / name, folder)
        # Old exports have the rotary tables too.
        state = model.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
        if shards == 1:
            torch.save(state, folder / "pytorch_model.bin")
            return folder, model
        names, weight_map = list(state), {}
        for i in range(shards):
            file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
            torch.save({name: state[name] for name in names[i::shards]}, folder / file)
            weight_map |= dict.fromkeys(names[i::shards], file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        return folder, model

    return make


# ---------------------------------------------------------------- pickled weights


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}, {"family": "Qwen2"}], ids=str)
def test_pickled_weights(make_bin, tmp_path, shards, config):
    folder, theirs = make_bin(shards, **config)
    convert.convert(folder, tmp_path / "out")
    assert_same_logits(tmp_path / "out", theirs)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == shards
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    CheckpointFolder(tmp_path / "out").load_tokenizer()


def test_the_old_format_of_torch_save(make_bin, tmp_path):
    folder, theirs = make_bin()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert.convert(folder, tmp_path / "out")
    assert_same_logits(tmp_path / "out", theirs)


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def spoil(folder, how, tmp_path):
    first = folder / "pytorch_model-00001-of-00003.bin"
    index = folder / "pytorch_model.bin.index.json"
    if how == "code":
        torch.save({"model.norm.weight": Trap(tmp_path / "sprung")}, first)
    elif how == "truncated":
        first.write_bytes(first.read_bytes()[:-2000])
    elif how == "empty":
        first.write_bytes(b"")
    elif how == "missing shard":
        first.unlink()
    elif how == "a weight too few":
        torch.save(dict(list(torch.load(first).items())[1:]), first)
    elif how == "a shape":
        torch.save({name: tensor[:1] for name, tensor in torch.load(first).items()}, first)
    elif how == "a file beside the index":
        shutil.copy(first, folder / "pytorch_model.bin")
    elif how == "a short record":
        cut_record(first)
    elif how in OTHER_TENSORS:
        torch.save(torch.load(first) | OTHER_TENSORS[how], first)
    elif how == "not a dictionary":
        torch.save([torch.ones(2)], first)
    elif how == "outside":
        shutil.copy(first, tmp_path / "elsewhere.bin")
        index.write_text(index.read_text().replace(first.name, "../elsewhere.bin"))
    elif how == "tokenizer":
        (folder / "tokenizer.model").unlink()
    elif how == "a larger tokenizer":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 1024}))
    elif how == "architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "mixtral"}))


def cut_record(path):
    """Take two numbers of the first tensor out of a file of torch.save's, which maps what follows then."""
    with zipfile.ZipFile(path) as whole:
        records = {entry.filename: whole.read(entry) for entry in whole.infolist()}
    with zipfile.ZipFile(path, "w") as cut:
        for name, content in records.items():
            cut.writestr(name, content[:-8] if name.endswith("data/0") else content)


NORM = "model.norm.weight"
OTHER_TENSORS = {
    "a key that is a number": {7: torch.ones(64)},
    "a sparse weight": {NORM: torch.ones(64).to_sparse()},
    "no values": {NORM: torch.ones(64, device="meta")},
    "whole numbers": {NORM: torch.ones(64, dtype=torch.int8)},
    "float8": {NORM: torch.ones(64).to(torch.float8_e4m3fn)},
    "NaN": {NORM: torch.full((64,), float("nan"))},
}


SPOILT = {
    "a file beside the index": "holds pytorch_model.bin and pytorch_model.bin.index.json",
    "a short record": "larger than its record",
    "a key that is a number": "tensors by their names",
    "a sparse weight": f"{NORM} is sparse",
    "no values": f"{NORM} is sparse, quantised or without values",
    "whole numbers": f"{NORM} is of dtype int8",
    "float8": f"{NORM} is of dtype float8_e4m3fn",
    "NaN": f"{NORM} is NaN or infinite",
    "code": "do not use it",
    "truncated": "copy it again",
    "empty": "copy it again",
    "missing shard": "missing",
    "a weight too few": "missing",
    "a shape": "shape",
    "tokenizer": "no tokenizer.model",
    "a larger tokenizer": "2048 tokens, the model only 1024",
    "not a dictionary": "not a dictionary",
    "outside": "outside the folder",
    "architecture": "mixtral",
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_cannot_be_converted_leaves_nothing(make_bin, tmp_path, how):
    folder, _ = make_bin(3)
    spoil(folder, how, tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=SPOILT[how]) as refusal:
        convert.convert(folder, tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert sorted(tmp_path.iterdir()) == before  # no folder, whole or partial, and the trap did not spring


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_pickle(tmp_path, zipped):
    """A file with bytes changed at random is read or refused, and nothing else happens."""
    path, rng = tmp_path / "pytorch_model.bin", np.random.default_rng(0)
    state = {"model.norm.weight": torch.ones(4), "lm_head.weight": torch.ones(3, 4)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole, refused = np.frombuffer(path.read_bytes(), np.uint8), 0
    for _ in range(400):
        damaged = whole.copy()
        damaged[rng.integers(0, 500, 3)] = rng.integers(0, 256, 3)  # the pickle is at the beginning
        path.write_bytes(damaged.tobytes())
        try:
            convert.read_pickle(path)
        except InputError as refusal:
            refused += 1
            assert "\n" not in str(refusal)
    assert refused > 200


# ---------------------------------------------------------------- Meta's layout

META_NAMES = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
}


def interleave(w, head_dim):
    """Return rows of q or k in Meta's order: rows j and j + D/2 of a head become its rows 2j and 2j + 1."""
    rows = []
    for head in range(w.shape[0] // head_dim):
        for j in range(head_dim // 2):
            rows += [head * head_dim + j, head * head_dim + j + head_dim // 2]
    return w[rows]


@pytest.fixture
def make_meta(make_llama, tmp_path):
    """make_meta(ranks, **config) -> a folder laid out like Meta's LLaMA downloads, and its model."""

    def make(ranks=2, **changes):
        _, model = make_llama(vocab_size=2048, **changes)
        c = model.config
        rotary_tables = ("rope.freqs", "layers.0.attention.inner_attention.rope.freqs")
        files = [dict.fromkeys(rotary_tables, torch.ones(c.head_dim // 2)) for _ in range(ranks)]
        for name, w in model.state_dict().items():
            if "q_proj" in name or "k_proj" in name:
                w = interleave(w, c.head_dim)
            name = name.removeprefix("model.")
            for theirs, meta in META_NAMES.items():
                name = name.replace(theirs, meta)
            axis = 1 if any(x in name for x in ("tok_embeddings", "wo", "w2")) else 0
            parts = [w] * ranks if w.dim() == 1 else w.chunk(ranks, axis)
            for file, part in zip(files, parts):
                file[name] = part.clone()
        folder = tmp_path / "meta"
        folder.mkdir()
        for i, file in enumerate(files):
            torch.save(file, folder / f"consolidated.{i:02}.pth")
        params = {
            "dim": c.hidden_size,
            "n_layers": c.num_hidden_layers,
            "n_heads": c.num_attention_heads,
            "norm_eps": 1e-5,
            "vocab_size": -1,
        }
        if c.num_key_value_heads != c.num_attention_heads:
            params["n_kv_heads"] = c.num_key_value_heads
        (folder / "params.json").write_text(json.dumps(params))
        shutil.copy(TINY / "tokenizer.model", tmp_path)  # one folder up, as in the downloads
        return folder, model

    return make


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_metas_layout(make_meta, tmp_path, monkeypatch, ranks, kv_heads):
    monkeypatch.setattr(writing, "SHARD_BYTES", 200_000)
    folder, theirs = make_meta(ranks, num_key_value_heads=kv_heads)
    convert.convert(folder, tmp_path / "out", window=64)
    assert_same_logits(tmp_path / "out", theirs)
    out = CheckpointFolder(tmp_path / "out")
    assert out.config.max_position_embeddings == 64 and out.load_tokenizer().bos_id == 1
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_metas_layout_named_from_inside(make_meta, tmp_path, monkeypatch):
    """The tokenizer is one folder up of `.`, too. And a matrix may lie column by column in its file."""
    folder, theirs = make_meta(2)
    path = folder / "consolidated.00.pth"
    file = torch.load(path)
    file["layers.0.feed_forward.w1.weight"] = file["layers.0.feed_forward.w1.weight"].T.contiguous().T
    torch.save(file, path)
    monkeypatch.chdir(folder)
    convert.convert(Path("."), Path("../out"), window=64)
    assert_same_logits(tmp_path / "out", theirs)


def test_metas_layout_behind_a_link(make_meta, tmp_path):
    """One folder up is where the link is, beside which the tokenizer may be, and not where it leads."""
    folder, theirs = make_meta(2)
    here = tmp_path / "here"
    here.mkdir()
    (here / "7B").symlink_to(folder)
    (tmp_path / "tokenizer.model").rename(here / "tokenizer.model")
    convert.convert(here / "7B", tmp_path / "out", window=64)
    assert_same_logits(tmp_path / "out", theirs)


META_SPOILT = {
    "no window": "does not say the window",
    "rank": "missing",
    "params": "params.json",
    "layers": "missing",
    "truncated": "copy it again",
    "tokenizer": "tokenizer.model",
    "no n_layers": "n_layers",
    "fewer layers": "layers.1.attention.wk.weight and 8 more",
    "an extra weight": "layers.0.attention.gate",
    "other heads": "n_heads",
    "window": "sliding_window 64",
    "a tokenizer of Llama 3": "tokenizer.model is tiktoken's, not LLaMA 1's or 2's; take this model's",
    "a vector": "a matrix has shape",
    "a number for a matrix": "a matrix has shape",
    "a key that is a number": "tensors by their names",
    "layers without end": "n_layers is 2147483648, more than",
    "text": "dim is '64', not a positive whole number",
}
META_TENSORS = {
    "a vector": {"tok_embeddings.weight": torch.ones(64)},
    "a number for a matrix": {"layers.0.feed_forward.w1.weight": torch.tensor(1.0)},
    "a key that is a number": {3: torch.ones(2)},
}


META_SAYS = {
    "layers": {"n_layers": 3},
    "fewer layers": {"n_layers": 1},
    "other heads": {"n_heads": 8},
    "window": {"sliding_window": 64},
    "layers without end": {"n_layers": 2**31},
    "text": {"dim": "64"},
}


@pytest.mark.parametrize("how", META_SPOILT)
def test_metas_layout_spoilt(make_meta, tmp_path, how):
    folder, _ = make_meta(2, **({"num_key_value_heads": 4} if how == "other heads" else {}))
    params_path = folder / "params.json"
    params = json.loads(params_path.read_text())
    first, second = folder / "consolidated.00.pth", folder / "consolidated.01.pth"
    if how == "rank":
        second.unlink()
    elif how == "params":
        params_path.write_text("{")
    elif how == "no n_layers":
        del params["n_layers"]
        params_path.write_text(json.dumps(params))
    elif how == "an extra weight":
        torch.save(torch.load(second) | {"layers.0.attention.gate": torch.ones(4)}, second)
    elif how == "truncated":
        first.write_bytes(first.read_bytes()[:5000])
    elif how == "tokenizer":
        (tmp_path / "tokenizer.model").unlink()
    elif how == "a tokenizer of Llama 3":
        (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
        (tmp_path / "tokenizer.json").write_text("{}")  # it is another model's all the same
    elif how in META_TENSORS:
        torch.save(torch.load(first) | META_TENSORS[how], first)
    elif how in META_SAYS:
        params_path.write_text(json.dumps(params | META_SAYS[how]))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=META_SPOILT[how]) as refusal:
        convert.convert(folder, tmp_path / "out", None if how == "no window" else 64)
    assert "\n" not in str(refusal.value) and sorted(tmp_path.iterdir()) == before


# ---------------------------------------------------------------- memory

LARGER = {
    "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
@pytest.mark.parametrize("layout", ["bin", "meta", "gguf"])
def test_memory_stays_near_one_file(make_llama, make_bin, make_meta, run, tmp_path, layout):
    window = []
    if layout == "bin":
        source, _ = make_bin(8, **LARGER)
    elif layout == "meta":
        source, _ = make_meta(2, **LARGER)
        window = [64]
    else:
        _, model = make_llama(vocab_size=2048, **LARGER)
        source = tmp_path / "model.gguf"
        write_gguf(source, model, bpe_metadata(smollm_bpe()), Q.F32)
    watched = run(Path(__file__).parent / "watch_memory.py", source, tmp_path / "out", *window)
    assert watched.returncode == 0, watched.stderr
    held = int(watched.stdout)
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) >= 8 and sum(sizes) > 100e6
    assert held < 0.5 * sum(sizes), f"{held / 1e6:.0f} MB for files of {max(sizes) / 1e6:.0f} MB"


# ---------------------------------------------------------------- the commands


def test_the_commands(make_bin, tmp_path, monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["weights.py", *map(str, arguments)])
        weights.main()

    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}
    folder, theirs = make_bin(3, family="Qwen2", rope_parameters=scaling)
    with pytest.raises(InputError, match="hf.weights convert"):  # what to do is said
        command("show", folder)
    command("convert", folder, tmp_path / "out")
    shown = capsys.readouterr().out
    assert f"qwen2, {theirs.num_parameters():,} parameters" in shown
    for fact in ("layers 2, hidden 64, MLP 96", "biases on q, k, v", "window 64", "rope_theta 50000"):
        assert fact in shown
    for fact in ("scaling ", "rope_type linear", "factor 4.0"):
        assert fact in shown
    with pytest.raises(InputError, match="exists already"):
        command("convert", folder, tmp_path / "out")
    with pytest.raises(InputError, match="nothing to convert"):
        command("convert", tmp_path / "out", tmp_path / "again")
    with pytest.raises(InputError, match="records its window itself"):
        command("convert", folder, tmp_path / "again", "--window", 64)
