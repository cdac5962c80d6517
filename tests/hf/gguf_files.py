"""Small GGUF files for the tests, written as llama.cpp's converter writes them."""

import json

import gguf
import tokenizers
import torch
from tokenizers import decoders, pre_tokenizers, trainers

from hf import weights

TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(7))
SENTENCES = ["the cat sat on the mat", "There are 12 cats, 345 mats\n\tand 6 dogs.", "12 345 12 345 12 345"]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
Q = gguf.GGMLQuantizationType


def smollm_bpe():
    """Return a byte-level BPE with SmolLM's pre-tokenizer: digits alone, then GPT-2's.

    It is trained without the first, so that it has merges of digits, which must never be used.
    """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=288,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES * 3, trainer)
    assert "Ġ34" in bpe.get_vocab()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return bpe


def bpe_metadata(bpe, pre="smollm", **more):
    """Return the tokenizer's part of a GGUF file's metadata."""
    tokens = sorted(bpe.get_vocab(), key=bpe.get_vocab().get)
    special = {token.content: 3 if token.special else 4 for token in bpe.get_added_tokens_decoder().values()}
    merges = json.loads(bpe.to_str())["model"]["merges"]
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [special.get(token, 1) for token in tokens],
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | more).items()}


def put(writer, key, value):
    """Write one key of the metadata with the type that llama.cpp's converter would choose."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def write_gguf(path, model, tokenizer_metadata, kind, metadata=None, tensors=None):
    """Write a transformers LLaMA, Mistral, Qwen2 or Qwen3 as a GGUF file.

    Matrices are of `kind`, vectors in float32.

    metadata: keys to set besides, or to leave out (None). tensors: the same of arrays.
    """
    family = model.config.model_type
    architecture = family if family.startswith("qwen") else "llama"
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (model_metadata(model.config) | tokenizer_metadata | (metadata or {})).items():
        if value is not None:
            prefix = "" if key.startswith(("tokenizer.", "split.")) else f"{architecture}."
            put(writer, prefix + key, value)
    for name, array in (model_arrays(model, architecture) | (tensors or {})).items():
        if array is not None:
            stored_as = Q.F32 if array.ndim == 1 else kind
            writer.add_tensor(name, gguf.quants.quantize(array, stored_as), raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def model_metadata(c):
    """Return the model's part of a GGUF file's metadata for a config of transformers."""
    lengths = {}
    if c.model_type == "qwen3":  # its heads are wider than their share of the hidden state
        lengths = {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    return lengths | {
        "vocab_size": c.vocab_size,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "rope.dimension_count": c.head_dim,
        "rope.freq_base": float(c.rope_parameters["rope_theta"]),
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
    }


def model_arrays(model, architecture):
    """Return {name in GGUF: array} of a model's weights."""
    c = model.config
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), c.num_hidden_layers)
    arrays = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        w = tensor.numpy()
        for part, heads in (("q_proj", c.num_attention_heads), ("k_proj", c.num_key_value_heads)):
            if part in name and architecture == "llama":  # as LlamaModel.permute in convert_hf_to_gguf.py
                w = w.reshape(heads, 2, len(w) // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)
        arrays[names.get_name(name, (".weight", ".bias"))] = w
    return arrays


def rounded(w, kind):
    """Return what is left of a weight that was stored in a GGUF file of `kind` and then in our folder."""
    if w.dim() == 1:
        stored = w
    elif kind == Q.Q8_0:  # blocks of 32 numbers, a float16 step and 32 whole multiples of it
        blocks = w.view(-1, 32)
        step = blocks.abs().amax(1, keepdim=True) / 127
        stored = ((blocks / step).round() * step.half().float()).view(w.shape)
    elif kind == Q.F32:
        stored = w
    else:
        stored = torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), kind), kind))
    dtype = {Q.F32: torch.float32, Q.F16: torch.float16}.get(kind, torch.bfloat16)
    return stored.to(dtype).float()


@torch.no_grad()
def ours(folder):
    """Return the logits of a folder or a built-in name in this code."""
    return weights.load(folder, dtype=torch.float32)(TOKENS)


@torch.no_grad()
def stock(model):
    """Return the logits of a model of transformers."""
    return model(TOKENS).logits


def assert_same(a, b, tolerance=1e-4):
    """Assert that logits are equal to a share of the largest one."""
    assert b.abs().max() > 0.5, "logits near zero would make any two models equal"
    assert (a - b).abs().max() < tolerance * b.abs().max()
