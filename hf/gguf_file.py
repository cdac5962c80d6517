"""A GGUF file -> a safetensors folder.

GGUF is the format of llama.cpp: metadata, the tokenizer and all tensors, quantised or not, in one file. Three
architectures are read: llama (Mistral has it too), qwen2 and qwen3. hf/gguf_tokenizer.py rebuilds the
tokenizer.
"""

import gguf
import numpy as np
import torch

from hf.families import (
    FAMILIES,
    LARGEST_SIZES,
    check_config,
    half_split,
    is_query_or_key,
    renamed,
    stored_parameters,
)
from hf.gguf_tokenizer import rebuild_tokenizer
from hf.scaling import stretched_window
from hf.tokenizer import check_size
from hf.writing import write_converted
from model import Config
from storage.errors import InputError
from storage.values import positive

# The architectures that are read. Each is written as the family of its name.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
INTERLEAVED = ("llama",)  # those whose rotary pairs are neighbours in the rows of q and k

# What the metadata of an architecture may say. Any other key could mean another computation.
KNOWN_KEYS = (
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "tensor_data_layout",
)

GGUF_NAMES = {  # our name of a module -> GGUF's; those of a block come after the number of its layer
    "attention_norm": "attn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.o": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "embed": "token_embd",
    "norm": "output_norm",
    "head": "output",
}

# The tensor that divides the frequency of each rotary pair, in files of Llama 3.1.
FREQUENCY_DIVISORS = "rope_freqs.weight"


def convert_gguf(source, dest):
    """Write a GGUF file as a safetensors folder. float32 and float16 stay, everything else becomes bfloat16.

    Raise InputError if the file cannot be converted; then nothing is left behind.
    """
    file = GGUFFile(source)
    write_converted(source, dest, file.config, file.read, file.tokenizer_files())


class Reader(gguf.GGUFReader):
    """The gguf library's reader, which also ends where the file ends: the library reads on and on there."""

    def _get(self, offset, dtype, count=1, override_order=None):
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it ends too early")
        return super()._get(offset, dtype, count, override_order)


class GGUFFile:
    """A GGUF file with a model that this code knows. It is mapped into memory, not read whole.

    config: the Config of the model. tensors: {our name of a weight: the gguf library's tensor}.
    """

    def __init__(self, path):
        """Read all but the weights. Raise InputError if the file is broken or its model is not known."""
        self.path = path
        try:
            reader = Reader(path)
            self.metadata = {key: field.contents() for key, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, TypeError, OverflowError):
            raise InputError(f"{path}: truncated, damaged, or not GGUF; copy it again") from None
        self._found = {tensor.name: tensor for tensor in reader.tensors}  # by the name in the file
        self.architecture = self.metadata.get("general.architecture")
        self._check_places(reader)
        self._check_kind()
        try:
            self.config = self._read_config()
            check_config(self.config)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{self.path}: {error}; convert the model to GGUF again") from None
        self.tensors = self._match_tensors()

    def _check_places(self, reader):
        """Raise InputError for tensors that overlap, or that lie outside the file."""
        end = 0
        for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
            if int(tensor.data_offset) < end:
                raise InputError(f"{self.path}: tensor {tensor.name} overlaps another; copy it again")
            end = int(tensor.data_offset) + int(tensor.n_bytes)
        if end > len(reader.data):
            raise InputError(f"{self.path}: tensors lie outside the file; copy it again")

    def _check_kind(self):
        """Raise InputError if the metadata speak of a model that this code would not compute exactly."""
        if self.architecture not in ARCHITECTURES:
            reason = f"architecture {self.architecture!r} is not known"
            raise InputError(f"{self.path}: {reason}; this code reads {', '.join(ARCHITECTURES)}")
        parts = self.metadata.get("split.count", 1)
        if parts not in (0, 1):  # 0: they were joined
            remedy = "join them first (llama.cpp: llama-gguf-split --merge)"
            raise InputError(f"{self.path}: one of {parts} parts of a model; {remedy}")
        known_keys = {f"{self.architecture}.{key}" for key in KNOWN_KEYS}
        for key, value in sorted(self.metadata.items()):
            if key.startswith(f"{self.architecture}.") and key not in known_keys and value:
                reason = f"{key} {value} is not known"
                raise InputError(f"{self.path}: {reason}; this code would compute another model without it")

    def _read_config(self):
        """Return the Config that the metadata describe."""
        hidden_dim = self._positive("embedding_length", "hidden_dim")
        n_heads = self._positive("attention.head_count", "n_heads")
        head_dim = self._positive("attention.key_length", "head_dim", hidden_dim // n_heads)
        value_dim = self._positive("attention.value_length", "head_dim", head_dim)
        rotary_dim = self._positive("rope.dimension_count", "rotary_dim", head_dim)
        window = self._positive("context_length", "max_position_embeddings")
        if value_dim != head_dim or rotary_dim != head_dim:
            reason = f"values or rotated dimensions of another size than keys ({head_dim}) are not known"
            raise InputError(f"{self.path}: {reason}")
        scaling = self._read_scaling(window)
        embedding = self._tensor("token_embd.weight")
        return Config(
            vocab_size=_shape(embedding)[0],
            hidden_dim=hidden_dim,
            intermediate_dim=self._positive("feed_forward_length", "intermediate_dim"),
            n_layers=self._positive("block_count", "n_layers"),
            n_heads=n_heads,
            n_kv_heads=self._positive("attention.head_count_kv", "n_kv_heads", n_heads),
            head_dim=head_dim,
            max_position_embeddings=stretched_window(scaling, window),
            # It is stored as float32: 1e-6 reads as 9.999999974752427e-07.
            norm_eps=round(self._positive("attention.layer_norm_rms_epsilon"), 10),
            rope_theta=self._positive("rope.freq_base", default=10000.0),
            rope_scaling=scaling,
            tie_embeddings="output.weight" not in self._found,
            bos_token_id=self.metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=self.metadata.get("tokenizer.ggml.eos_token_id"),
            dtype={"F32": "float32", "F16": "float16"}.get(embedding.tensor_type.name, "bfloat16"),
            model_type=self.architecture,
            **FAMILIES[self.architecture].block,
        )

    def _positive(self, key, size=None, default=None):
        """Return the positive number under a key. Raise ValueError if something else stands there.

        size: the field of Config that it is, a whole number; without one it is a float.
        """
        key = f"{self.architecture}.{key}"
        if size is None:
            return positive(self.metadata, key, default=default)
        return positive(self.metadata, key, int, LARGEST_SIZES[size], default)

    def _read_scaling(self, window):
        """Return the rope_scaling of the model, or None. Raise InputError for a kind that is not known.

        window: what the file says, in tokens.
        """
        mode = self.metadata.get(f"{self.architecture}.rope.scaling.type", "none")
        original = self._positive("rope.scaling.original_context_length", "max_position_embeddings", window)
        divisors = self._found.get(FREQUENCY_DIVISORS)
        if mode == "none" and divisors is None:
            return None
        if mode == "none":  # LongRoPE with one list of factors for every length
            return {
                "rope_type": "longrope",
                "original_max_position_embeddings": original,
                "short_factor": divisors.data.tolist(),
                "long_factor": divisors.data.tolist(),
                "attention_factor": 1.0,
            }
        if mode not in ("linear", "yarn") or divisors is not None:
            beside = "" if divisors is None else f" beside {FREQUENCY_DIVISORS}"
            reason = f"{self.architecture}.rope.scaling.type {mode!r}{beside} is not known"
            raise InputError(f"{self.path}: {reason}; this code reads linear and yarn")
        factor = self._positive("rope.scaling.factor")
        return {"rope_type": mode, "factor": factor, "original_max_position_embeddings": original}

    def _match_tensors(self):
        """Return {our name of a weight: its tensor}. Raise InputError unless all and no others are there."""
        matched = {}
        for name, parameter in stored_parameters(self.config).items():
            tensor = self._tensor(renamed(name, GGUF_NAMES, "blk"))
            found, expected = _shape(tensor), tuple(parameter.shape)
            if found != expected:
                reason = f"tensor {tensor.name} has shape {found}, the metadata say {expected}"
                raise InputError(f"{self.path}: {reason}; convert the model to GGUF again")
            matched[name] = tensor
        extra = self._found.keys() - {tensor.name for tensor in matched.values()} - {FREQUENCY_DIVISORS}
        if extra:
            model = f"a {self.architecture} model that this code knows"
            raise InputError(f"{self.path}: tensor {min(extra)} is not part of {model} ({len(extra)} such)")
        return matched

    def _tensor(self, name):
        """Return the tensor that the file calls `name`. Raise InputError if it has none."""
        if name not in self._found:
            remedy = "copy it again, or convert the model to GGUF again"
            raise InputError(f"{self.path}: tensor {name} is missing; {remedy}")
        return self._found[name]

    def tokenizer_files(self):
        """Return {name: bytes} of the tokenizer. Raise InputError if it is not known or does not fit."""
        try:
            tokenizer = rebuild_tokenizer(self.metadata)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None
        check_size(tokenizer, self.config.vocab_size, self.path)
        return tokenizer.files

    def read(self, name):
        """Return one of our weights in the dtype of the Config. Raise InputError if it cannot be read."""
        tensor = self.tensors[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            reason = f"quantisation {tensor.tensor_type.name} of {tensor.name} is not known"
            raise InputError(f"{self.path}: {reason}; take a Q8_0 or F16 file") from None
        weight = torch.tensor(values).to(getattr(torch, self.config.dtype))
        if self.architecture in INTERLEAVED and is_query_or_key(name):
            weight = half_split(weight, self.config.head_dim, self.config.head_dim)
        return weight


def _shape(tensor):
    """Return the shape of a tensor of the gguf library, which counts dimensions from the innermost."""
    return tuple(int(n) for n in tensor.shape[::-1])
