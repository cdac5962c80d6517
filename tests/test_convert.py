"""convert.py and the two commands of weights.py, against the models that transformers wrote."""
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import convert
import weights
from errors import UserError

TINY = Path(__file__).parent.parent / "assets" / "tiny"
TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def make_bin(make_llama, tmp_path):
    """make_bin(shards, **config) -> a folder laid out like the published .bin checkpoints, and transformers' model."""

    def make(shards=1, **changes):
        written, model = make_llama(vocab_size=2048, **changes)
        folder = tmp_path / "published"
        folder.mkdir()
        for name in ("config.json", "generation_config.json"):
            shutil.copy(written / name, folder)
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(TINY / name, folder)
        state = model.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # as old exports have it
        if shards == 1:
            torch.save(state, folder / "pytorch_model.bin")
        else:
            names, weight_map = list(state), {}
            for i in range(shards):
                file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
                torch.save({n: state[n] for n in names[i::shards]}, folder / file)
                weight_map |= dict.fromkeys(names[i::shards], file)
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder, model

    return make


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}, {"family": "Qwen2"}], ids=str)
def test_pickled_weights(make_bin, tmp_path, shards, config):
    folder, theirs = make_bin(shards, **config)
    convert.convert(folder, tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(weights.load(tmp_path / "out")(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-4)
        again = type(theirs).from_pretrained(tmp_path / "out")
        assert torch.equal(again(TOKENS).logits, theirs(TOKENS).logits)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == shards
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    weights.load_tokenizer(tmp_path / "out", weights.read_config(tmp_path / "out"))


def test_the_old_format_of_torch_save(make_bin, tmp_path):
    folder, theirs = make_bin()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert.convert(folder, tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(weights.load(tmp_path / "out")(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-4)


class Trap:
    """Unpickling it would create a file."""

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
        torch.save({name: t[:1] for name, t in torch.load(first).items()}, first)
    elif how == "not a dictionary":
        torch.save([torch.ones(2)], first)
    elif how == "outside":
        shutil.copy(first, tmp_path / "elsewhere.bin")
        index.write_text(index.read_text().replace(first.name, "../elsewhere.bin"))
    elif how == "architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "mixtral"}))


SPOILT = {
    "code": "do not use it", "truncated": "copy it again", "empty": "copy it again", "missing shard": "missing", "a weight too few": "missing",
    "a shape": "shape", "not a dictionary": "not a dictionary", "outside": "outside the folder", "architecture": "mixtral",
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILT)
def test_what_cannot_be_converted_leaves_nothing(make_bin, tmp_path, how):
    folder, _ = make_bin(3)
    spoil(folder, how, tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=SPOILT[how]) as refusal:
        convert.convert(folder, tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert sorted(tmp_path.iterdir()) == before  # no folder, whole or partial, and the trap did not spring


@pytest.fixture
def make_meta(make_llama, tmp_path):
    """make_meta(ranks, **config) -> a folder laid out like Meta's LLaMA downloads, and transformers' model of the same weights."""

    def make(ranks=2, **changes):
        _, model = make_llama(vocab_size=2048, **changes)
        c = model.config
        names = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "embed_tokens": "tok_embeddings", "lm_head": "output"}
        names |= {f"self_attn.{x}_proj": f"attention.w{x}" for x in "qkvo"}
        names |= {"mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"}
        files = [{"rope.freqs": torch.ones(8), "layers.0.attention.inner_attention.rope.freqs": torch.ones(8)} for _ in range(ranks)]
        for name, w in model.state_dict().items():
            if "q_proj" in name or "k_proj" in name:  # row 2j of a head is row j here, row 2j + 1 is row j + D/2
                heads, half = w.shape[0] // c.head_dim, c.head_dim // 2
                rows = [h * c.head_dim + j + half * odd for h in range(heads) for j in range(half) for odd in (0, 1)]
                w = w[rows]
            name = name.removeprefix("model.")
            for theirs, meta in names.items():
                name = name.replace(theirs, meta)
            split = 1 if any(x in name for x in ("tok_embeddings", "wo", "w2")) else 0
            parts = [w] * ranks if w.dim() == 1 else w.chunk(ranks, split)
            for file, part in zip(files, parts):
                file[name] = part.clone()
        folder = tmp_path / "meta"
        folder.mkdir()
        for i, file in enumerate(files):
            torch.save(file, folder / f"consolidated.{i:02}.pth")
        params = {"dim": 64, "n_layers": 2, "n_heads": 4, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": -1}
        params |= {"n_kv_heads": c.num_key_value_heads} if c.num_key_value_heads != 4 else {}
        (folder / "params.json").write_text(json.dumps(params))
        shutil.copy(TINY / "tokenizer.model", tmp_path)  # one folder up, as in the downloads
        return folder, model

    return make


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_metas_layout(make_meta, tmp_path, monkeypatch, ranks, kv_heads):
    monkeypatch.setattr(weights, "SHARD_BYTES", 200_000)
    folder, theirs = make_meta(ranks, num_key_value_heads=kv_heads)
    convert.convert(folder, tmp_path / "out", window=64)
    with torch.no_grad():
        torch.testing.assert_close(weights.load(tmp_path / "out")(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-4)
        assert torch.equal(type(theirs).from_pretrained(tmp_path / "out")(TOKENS).logits, theirs(TOKENS).logits)
    config = weights.read_config(tmp_path / "out")
    assert config.max_position_embeddings == 64 and weights.load_tokenizer(tmp_path / "out", config).bos_id == 1
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


META_SPOILT = {
    "no window": "--window", "rank": "missing", "params": "params.json", "layers": "missing", "truncated": "copy it again",
    "tokenizer": "tokenizer.model", "no n_layers": "n_layers", "fewer layers": "layers.1.attention.wk.weight and 8 more",
    "an extra weight": "layers.0.attention.gate",
}  # fmt: skip


@pytest.mark.parametrize("how", META_SPOILT)
def test_metas_layout_spoilt(make_meta, tmp_path, how):
    folder, _ = make_meta(2)
    params = json.loads((folder / "params.json").read_text())
    if how == "rank":
        (folder / "consolidated.01.pth").unlink()
    elif how == "params":
        (folder / "params.json").write_text("{")
    elif how == "layers":
        (folder / "params.json").write_text(json.dumps(params | {"n_layers": 3}))
    elif how == "no n_layers":
        (folder / "params.json").write_text(json.dumps({key: value for key, value in params.items() if key != "n_layers"}))
    elif how == "fewer layers":
        (folder / "params.json").write_text(json.dumps(params | {"n_layers": 1}))
    elif how == "an extra weight":
        torch.save(torch.load(folder / "consolidated.01.pth") | {"layers.0.attention.gate": torch.ones(4)}, folder / "consolidated.01.pth")
    elif how == "truncated":
        file = folder / "consolidated.00.pth"
        file.write_bytes(file.read_bytes()[:5000])
    elif how == "tokenizer":
        (tmp_path / "tokenizer.model").unlink()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=META_SPOILT[how]) as refusal:
        convert.convert(folder, tmp_path / "out", None if how == "no window" else 64)
    assert "\n" not in str(refusal.value) and sorted(tmp_path.iterdir()) == before


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["weights.py", *map(str, arguments)])
    weights.main()


def test_the_commands(make_bin, tmp_path, monkeypatch, capsys):
    folder, theirs = make_bin(3, family="Qwen2", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4})
    with pytest.raises(UserError, match="weights.py convert"):  # what to do is said
        command(monkeypatch, "show", folder)
    command(monkeypatch, "convert", folder, tmp_path / "out")
    shown = capsys.readouterr().out
    assert f"qwen2, {theirs.num_parameters():,} parameters" in shown
    for fact in ("layers 2, hidden 64, MLP 96", "biases on q, k, v", "window 64", "rope_theta 50000", "scaling ", "rope_type linear", "factor 4.0"):
        assert fact in shown
    with pytest.raises(UserError, match="exists already"):
        command(monkeypatch, "convert", folder, tmp_path / "out")
    with pytest.raises(UserError, match="nothing to convert"):
        command(monkeypatch, "convert", tmp_path / "out", tmp_path / "again")
