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
