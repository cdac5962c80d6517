"""GGUF files of transformers' models convert to folders with the same logits and the same tokens."""

import dataclasses
import math
import struct

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_files import (
    TOKENS,
    Q,
    assert_same,
    bpe_metadata,
    ours,
    rounded,
    smollm_bpe,
    stock,
    write_gguf,
)

from hf import convert, tokenizer, weights, writing
from hf.families import read_config
from storage.errors import InputError


@pytest.fixture(scope="module")
def bpe():
    return smollm_bpe()


@pytest.fixture
def make_gguf(make_llama, bpe, tmp_path):
    """make_gguf(kind, metadata, tensors, **config) writes model.gguf. Returns transformers' model of it."""

    def make(kind=Q.F32, metadata=None, tensors=None, **config):
        _, model = make_llama(vocab_size=bpe.get_vocab_size(), **config)
        write_gguf(tmp_path / "model.gguf", model, bpe_metadata(bpe), kind, metadata, tensors)
        return model

    return make


@pytest.fixture
def convert_it(tmp_path):
    """convert_it() converts model.gguf and returns the new folder."""

    def do():
        convert.convert(tmp_path / "model.gguf", tmp_path / "out")
        return tmp_path / "out"

    return do


# ---------------------------------------------------------------- what is read

FAMILIES = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "mistral": {"family": "Mistral", "sliding_window": None},
    "qwen2": {"family": "Qwen2"},
    "qwen2, tied": {"family": "Qwen2", "tie_word_embeddings": True},
    "qwen3": {"family": "Qwen3", "head_dim": 32},
}
# How far the logits may be from those of the model before it was quantised, as a share of their norm.
QUANTISATIONS = {
    Q.F32: 1e-6, Q.F16: 0.01, Q.BF16: 0.05, Q.Q8_0: 0.1, Q.Q5_0: 0.3, Q.Q5_1: 0.3, Q.Q4_0: 0.6, Q.Q4_1: 0.6,
}  # fmt: skip
EACH = [("llama", kind) for kind in QUANTISATIONS]
EACH += [(family, Q.Q8_0) for family in FAMILIES if family != "llama"]


@pytest.mark.parametrize("family, kind", EACH, ids=lambda x: getattr(x, "name", x))
def test_families_and_quantisations(make_gguf, convert_it, bpe, monkeypatch, family, kind):
    monkeypatch.setattr(writing, "SHARD_BYTES", 100_000)
    model = make_gguf(kind, rms_norm_eps=1e-6, **({"rope_theta": 1e5} | FAMILIES[family]))
    exact = stock(model)
    out = convert_it()
    logits = ours(out)
    for p in model.parameters():
        p.data = rounded(p.data, kind)
    assert_same(logits, stock(model))
    assert_same(stock(transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)), logits)
    # And that is only rounding away from the original.
    assert (logits - exact).norm() < QUANTISATIONS[kind] * exact.norm()

    config = read_config(out)
    assert config.norm_eps == 1e-6
    assert config.dtype == {Q.F32: "float32", Q.F16: "float16"}.get(kind, "bfloat16")
    assert config.model_type == family.split(",")[0].replace("mistral", "llama")
    files = list(out.glob("*.safetensors"))
    assert len(files) > 1 and max(file.stat().st_size for file in files) < 110_000

    loaded = tokenizer.load(out)
    words = ("", "the cat", "naïve 😀 mats", "Thé dogs" * 50)
    for text in (*words, "  12 cats\n\n345\t", "\x00\x7f", "a<|im_end|>b"):
        assert loaded.encode(text) == bpe.encode(text, add_special_tokens=False).ids
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.vocab_size == bpe.get_vocab_size() and loaded.bos_id is None


def test_keys_that_have_defaults_may_be_absent(make_gguf, convert_it):
    absent = ("vocab_size", "attention.head_count_kv", "rope.dimension_count", "rope.freq_base")
    harmless = {"expert_count": 0, "tensor_data_layout": "Meta AI original pth"}
    model = make_gguf(metadata=dict.fromkeys(absent) | harmless, num_key_value_heads=4)
    assert_same(ours(convert_it()), stock(model))


LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 100,
}


def llama3_factors(dim, theta, scaling):
    """Return rope_freqs.weight as llama.cpp's converter computes it, from Llama 3.1's description."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for j in range(0, dim, 2):
        wavelength = 2 * math.pi * theta ** (j / dim)
        turns = scaling["original_max_position_embeddings"] / wavelength
        smooth = (turns - low) / (high - low)
        if smooth > 1:
            factors.append(1.0)
        elif smooth < 0:
            factors.append(scaling["factor"])
        else:
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def test_llama_3_1(make_gguf, convert_it):
    factors = llama3_factors(16, 1e3, LLAMA31)
    assert factors.min() == 1 and factors.max() == 8 and len(set(factors)) > 3
    model = make_gguf(
        tensors={"rope_freqs.weight": factors},
        max_position_embeddings=800,
        rope_parameters=LLAMA31 | {"rope_theta": 1e3},
    )
    out = convert_it()
    assert_same(ours(out), stock(model))
    assert_same(stock(transformers.AutoModelForCausalLM.from_pretrained(out)), stock(model))
    config = read_config(out)
    assert config.max_position_embeddings == 800
    with torch.no_grad():
        unscaled = weights.load(out)
        unscaled.config = dataclasses.replace(config, rope_scaling=None)
        assert (unscaled(TOKENS) - ours(out)).abs().max() > 0.1  # the factors do matter here


@pytest.mark.parametrize("mode", ["linear", "yarn"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_rope_scaling(make_llama, make_gguf, convert_it, bpe, mode, family):
    scaling = {"rope_type": mode, "factor": 4.0}
    metadata = {"rope.scaling.type": mode, "rope.scaling.factor": 4.0}
    if mode == "yarn":
        scaling["original_max_position_embeddings"] = 32
        metadata |= {"rope.scaling.original_context_length": 32, "rope.scaling.finetuned": True}
    changes = {"family": family, "max_position_embeddings": 128}
    model = make_gguf(metadata=metadata, rope_parameters=scaling | {"rope_theta": 1e4}, **changes)
    assert_same(ours(convert_it()), stock(model))
    _, unscaled = make_llama("unscaled", vocab_size=bpe.get_vocab_size(), **changes)
    assert (stock(unscaled) - stock(model)).abs().max() > 0.1


@pytest.mark.parametrize(
    "scaling, window",
    [
        ({"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 64}, 256),
        ({"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 16}, 64),
        ({"rope.scaling.type": "linear"}, 64),
    ],
    ids=str,
)
def test_the_window_of_a_scaled_model(make_gguf, convert_it, scaling, window):
    """llama.cpp's converter writes the 64 of a config.json whose YaRN by 4 begins there."""
    make_gguf(metadata=scaling | {"rope.scaling.factor": 4.0})
    assert weights.load(convert_it()).config.max_position_embeddings == window


def test_a_file_that_was_joined(make_gguf, convert_it):
    """llama-gguf-split --merge leaves a count of 0 parts."""
    make_gguf(metadata={"split.count": 0})
    assert convert_it().is_dir()


# ---------------------------------------------------------------- what is refused

YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
LONGROPE = {"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}
SMALL_EMBEDDING = {"token_embd.weight": np.ones((128, 64), np.float32), "output.weight": None}
NANS = np.full(64, np.nan, np.float32)
SPOILT = {  # the metadata to change, the tensors to change, what the refusal names
    "experts": ({"expert_count": 8}, {}, "expert_count 8"),
    "a sliding window": ({"attention.sliding_window": 16}, {}, "sliding_window 16"),
    "a scale": ({"attention.scale": 0.5}, {}, "attention.scale 0.5"),
    "partial rotary": ({"rope.dimension_count": 8}, {}, "rotated dimensions"),
    "another scaling": (LONGROPE, {}, "'longrope'"),
    "no factor": ({"rope.scaling.type": "linear"}, {}, "rope.scaling.factor is missing"),
    "two scalings": (YARN, {"rope_freqs.weight": np.ones(8, np.float32)}, "beside"),
    "too few factors": ({}, {"rope_freqs.weight": np.ones(4, np.float32)}, "needs 8 factors"),
    "a missing key": ({"block_count": None}, {}, "llama.block_count is missing"),
    "a key of another kind": ({"embedding_length": "64"}, {}, "llama.embedding_length is '64'"),
    "heads by layer": ({"attention.head_count": [4, 4]}, {}, "head_count is"),
    "more layers": ({"block_count": 3}, {}, r"blk.2.attn_\w+.weight is missing"),
    "fewer layers": ({"block_count": 1}, {}, "blk.1.attn_k.weight is not part"),
    "a missing tensor": ({}, {"blk.1.ffn_up.weight": None}, "blk.1.ffn_up.weight is missing"),
    "no embedding": ({}, {"token_embd.weight": None}, "token_embd.weight is missing"),
    "a bias": ({}, {"blk.0.attn_q.bias": np.ones(64, np.float32)}, "blk.0.attn_q.bias is not part"),
    "a shape": ({}, {"blk.0.attn_v.weight": np.ones((16, 64), np.float32)}, r"shape \(16, 64\).*\(32, 64\)"),
    "a smaller vocabulary": ({}, SMALL_EMBEDDING, "288 tokens.* only 128"),
    "a tokenizer": ({"tokenizer.ggml.pre": "tekken"}, {}, "model.gguf: .*'tekken'"),
    "a part of several": ({"split.count": 3}, {"blk.1.ffn_up.weight": None}, "one of 3 parts"),
    "half a layer": ({"block_count": 2.5}, {}, "block_count is 2.5"),
    "a factor of text": (
        {"rope.scaling.type": "linear", "rope.scaling.factor": "4"},
        {},
        "llama.rope.scaling.factor is '4'",
    ),
    "an eps of text": ({"attention.layer_norm_rms_epsilon": "1e-5"}, {}, "epsilon is '1e-5'"),
    "a base of nothing": ({"rope.freq_base": float("nan")}, {}, "freq_base is nan"),
    "parts of text": ({"split.count": "3"}, {}, "one of 3 parts"),
    "a BOS of text": ({"tokenizer.ggml.bos_token_id": "1"}, {}, "'1' is no id of a token"),
    "layers without end": ({"block_count": 2**31}, {}, "block_count is 2147483648, more than"),
    "kv heads": ({"attention.head_count_kv": 3}, {}, "model.gguf: 3 key/value heads do not divide 4"),
    "a weight that is no number": ({}, {"output_norm.weight": NANS}, "model.norm.weight is NaN"),
    "factors that are no numbers": ({}, {"rope_freqs.weight": NANS[:8]}, "long_factor|no frequencies"),
    "tokens that are a number": ({"tokenizer.ggml.tokens": 5}, {}, "not usable .damaged"),
    "no merges": ({"tokenizer.ggml.merges": None}, {}, "tokenizer.ggml.merges is missing"),
    "merges of another model": ({"tokenizer.ggml.merges": ["q q", "qq q"]}, {}, "not usable"),
}


@pytest.fixture
def assert_refused(tmp_path):
    """assert_refused(told) asserts that model.gguf is refused with such a line and leaves nothing behind."""

    def check(told):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(InputError, match=told) as refusal:
            convert.convert(tmp_path / "model.gguf", tmp_path / "out")
        assert "\n" not in str(refusal.value) and sorted(tmp_path.iterdir()) == before

    return check


@pytest.mark.parametrize("how", SPOILT)
def test_spoilt(make_gguf, assert_refused, how):
    metadata, tensors, told = SPOILT[how]
    make_gguf(metadata=metadata, tensors=tensors)
    assert_refused(told)


def test_another_architecture(assert_refused, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert_refused("model.gguf.*'gemma3'")


def test_a_quantisation_that_is_not_known(make_gguf, assert_refused, monkeypatch):
    make_gguf(Q.Q8_0)

    def dequantize(data, kind):
        raise NotImplementedError(f"Dequantization for {kind.name} is not yet implemented")

    monkeypatch.setattr(gguf.quants, "dequantize", dequantize)
    assert_refused("quantisation Q8_0 of token_embd.weight")


def test_a_file_that_is_cut_or_none(make_gguf, assert_refused, tmp_path):
    make_gguf()
    whole = (tmp_path / "model.gguf").read_bytes()
    for length in [*range(0, 8000, 97), 12000, len(whole) // 2, len(whole) - 4]:
        (tmp_path / "model.gguf").write_bytes(whole[:length])
        assert_refused("model.gguf: truncated, damaged, or not GGUF")
    for content in (b"PK" + whole, b"version https://git-lfs.github.com/spec/v1\n" * 3):
        (tmp_path / "model.gguf").write_bytes(content)
        assert_refused("model.gguf: truncated, damaged, or not GGUF")


def test_an_array_that_is_longer_than_the_file(assert_refused, tmp_path):
    """The gguf library would read 2^31 elements that are not there, for hours."""
    key = b"general.things"
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    array_of_float32 = struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.FLOAT32, 2**31)
    (tmp_path / "model.gguf").write_bytes(header + array_of_float32 + bytes(64))
    assert_refused("truncated, damaged, or not GGUF")


@pytest.mark.parametrize("where", ["of the tensor before it", "outside"])
def test_a_tensor_in_the_place_of_another(make_gguf, assert_refused, tmp_path, where):
    make_gguf()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    field, first = tensors["blk.1.ffn_up.weight"].field, tensors["blk.0.ffn_up.weight"].field
    content = bytearray((tmp_path / "model.gguf").read_bytes())
    at = field.offset + sum(part.nbytes for part in field.parts[:-1])  # its offset is the last part
    inside = int(first.parts[-1][0])
    content[at : at + 8] = struct.pack("<Q", len(content) - 64 if where == "outside" else inside)
    (tmp_path / "model.gguf").write_bytes(content)
    assert_refused("outside the file|truncated" if where == "outside" else "overlaps another")
