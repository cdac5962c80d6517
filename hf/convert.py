"""Other layouts of checkpoints -> safetensors folders: pickled .bin and Meta's .pth.

A pickle is read through torch.load(weights_only=True) alone: code in one is refused, not run. The new folder
appears when it is whole. (hf/gguf_file.py converts GGUF.)
"""

import json
import os
import pickle
import zipfile
from collections import Counter
from pathlib import Path

import torch

from hf import tokenizer
from hf.families import (
    LARGEST_SIZES,
    check_config,
    half_split,
    is_query_or_key,
    is_recomputed,
    read_config,
    renamed,
    stored_parameters,
)
from hf.folder import check_dtype, first_of, read_index
from hf.writing import write_converted, write_folder
from model import Config
from storage.errors import InputError
from storage.values import positive, read_json


def convert(source, dest, window=None):
    """Write the checkpoint `source` as a safetensors folder `dest`.

    source: a Hugging Face folder with .bin weights, a folder of Meta's consolidated.*.pth, or a .gguf file.
    window: the window in tokens of a model in Meta's layout, which does not record it.
    Raise InputError if the source cannot be converted; then nothing is left behind.
    """
    source, dest = Path(source), Path(dest)
    if dest.exists():
        raise InputError(f"{dest} exists already; name a new folder")
    is_meta = source.is_dir() and (source / "params.json").is_file()
    if window is not None and not is_meta:
        raise InputError(f"{source} records its window itself; do not give one")

    if is_meta:
        convert_meta(source, dest, window)
    elif source.is_file() and source.suffix == ".gguf":
        from hf.gguf_file import convert_gguf  # here, so that nothing else waits for the gguf library to load

        convert_gguf(source, dest)
    elif source.is_dir() and any(source.glob("pytorch_model*.bin")):
        convert_bin(source, dest)
    else:
        reason = "no pytorch_model*.bin, no params.json, no .gguf file; nothing to convert"
        if source.is_dir() and any(source.glob("*.safetensors")):
            reason += " (a safetensors folder is used as it is)"
        raise InputError(f"{source}: {reason}")


# ---------------------------------------------------------------- pickled weights


def convert_bin(source, dest):
    """Write a folder with pytorch_model.bin, or with an index and its shards, as a safetensors folder.

    One file is read at a time, so that memory stays near the largest. dtypes stay as they are.
    """
    # An architecture or a tokenizer that is not known is refused before a weight is read.
    config = read_config(source)
    loaded = tokenizer.load_for(config, source)
    index = source / "pytorch_model.bin.index.json"
    paths = list(read_index(index)) if index.is_file() else [source / "pytorch_model.bin"]
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: missing; copy the checkpoint again")

    others = loaded.files | {"config.json": (source / "config.json").read_bytes()}
    write_folder(source, dest, (_weights_in(path) for path in paths), len(paths), others)


def _weights_in(path):
    """Return {name: tensor} of the weights in a pickle file, as copies in memory."""
    return {name: t.contiguous().clone() for name, t in read_pickle(path).items() if not is_recomputed(name)}


def read_pickle(path):
    """Return {name: tensor} of a file that torch.save wrote, on the CPU.

    Raise InputError if the file is damaged or holds anything else, such as code.
    """
    if not path.is_file():
        raise InputError(f"{path}: not a file; copy the checkpoint again")
    with open(path, "rb") as f:
        head = f.read(23)
    if head == b"version https://git-lfs":
        raise InputError(f"{path}: a Git LFS pointer, not the weights; run git lfs pull where it came from")
    is_zip = head[:2] == b"PK"  # torch.save writes zip files since PyTorch 1.6; only they can be mapped
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:
        reason = "holds more than weights (code, or unknown objects)"
        raise InputError(f"{path}: {reason}; it is not opened, do not use it") from None
    except MemoryError:
        raise
    except Exception as error:  # Damage shows in many ways: KeyError, IndexError, AssertionError, ...
        raise InputError(f"{path}: truncated or damaged ({type(error).__name__}); copy it again") from None
    is_state = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    )
    if not is_state:
        reason = "not a dictionary of tensors by their names"
        raise InputError(f"{path}: {reason}; is this the weights file of a Hugging Face folder?")
    for name, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            raise InputError(f"{path}: {name} is sparse, quantised or without values; take the plain model")
        check_dtype(path, name, str(tensor.dtype).removeprefix("torch."))
    if is_zip:
        check_records(path, state.values())
    return state


def check_records(path, tensors):
    """Raise InputError unless each tensor of a zip file that torch.save wrote has a record of its size.

    torch maps as many bytes as a tensor says it has, and they may be those of the next record.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    with zipfile.ZipFile(path) as records:
        sizes = [entry.file_size for entry in records.infolist() if "/data/" in entry.filename]
    if Counter(storages.values()) - Counter(sizes):
        raise InputError(f"{path}: a tensor is larger than its record; copy it again")


# ---------------------------------------------------------------- Meta's layout of LLaMA 1 and 2

META_NAMES = {  # our name of a module -> Meta's; those of a block come after the number of its layer
    "attention_norm": "attention_norm",
    "attention.q": "attention.wq",
    "attention.k": "attention.wk",
    "attention.v": "attention.wv",
    "attention.o": "attention.wo",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "feed_forward.w1",
    "mlp.up": "feed_forward.w3",
    "mlp.down": "feed_forward.w2",
    "embed": "tok_embeddings",
    "norm": "norm",
    "head": "output",
}
META_SIZES = {"hidden_dim": "dim", "n_layers": "n_layers", "n_heads": "n_heads"}  # Config's name -> Meta's


def convert_meta(source, dest, window):
    """Write a folder in Meta's layout as a safetensors folder. window: its window in tokens."""
    if window is None:
        reason = "Meta's params.json does not say the window"
        raise InputError(f"{source}: {reason}; give 2048 for LLaMA 1, 4096 for LLaMA 2")
    vocabulary = read_vocabulary(source)
    checkpoint = MetaCheckpoint(source, window)
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "legacy": False,
    }
    others = {
        "tokenizer.model": vocabulary,
        "tokenizer_config.json": json.dumps(settings).encode(),
    }
    write_converted(source, dest, checkpoint.config, checkpoint.read, others)


def read_vocabulary(folder):
    """Return the bytes of Meta's tokenizer.model. Raise InputError if there is none, or one of no use.

    So it is refused before a weight is read.
    """
    above = Path(os.path.abspath(folder)).parent  # of "." too, and above a link and not where it leads
    for path in (folder / "tokenizer.model", above / "tokenizer.model"):
        if path.is_file():
            vocabulary = path.read_bytes()
            if tokenizer.TIKTOKEN.match(vocabulary):
                reason = "is tiktoken's, not LLaMA 1's or 2's"
                raise InputError(f"{path} {reason}; take this model's Hugging Face folder instead")
            tokenizer.load(path.parent)
            return vocabulary
    raise InputError(f"{folder}: no tokenizer.model here or one folder up; copy it there")


class MetaCheckpoint:
    """A folder with Meta's params.json and consolidated.00.pth, consolidated.01.pth, ...

    Each .pth file holds one rank's part of every weight. The files are mapped into memory, not read whole.
    config: the Config of the model. shapes: {our name of a weight: the shape of the whole}.
    """

    def __init__(self, folder, window):
        """Read all but the weights. Raise InputError unless the files are of one model, a LLaMA 1 or 2."""
        self.folder = folder
        self.params_path = folder / "params.json"
        sizes = read_params(self.params_path)
        self.paths = sorted(folder.glob("consolidated.*.pth"))
        if not self.paths:
            raise InputError(f"{folder}: no consolidated.*.pth; copy the checkpoint again")
        self.ranks = [read_pickle(path) for path in self.paths]
        self.config = self._read_config(sizes, window)
        self.shapes = {name: tuple(p.shape) for name, p in stored_parameters(self.config).items()}
        self._check_names()
        self._check_heads()

    def _read_config(self, sizes, window):
        """Return the Config. sizes: from params.json, which has all but the vocabulary's and the MLP's."""
        embedding = self._parts_of("tok_embeddings.weight")
        up = self._parts_of("layers.0.feed_forward.w1.weight")
        for path, part in zip(self.paths * 2, embedding + up):
            if part.dim() != 2:
                raise InputError(f"{path}: a matrix has shape {tuple(part.shape)}; copy it again")
        rows, columns = embedding[0].shape
        # LLaMA splits the table of embeddings by columns, other models in this layout by rows.
        is_split_by_columns = columns * len(embedding) == sizes["hidden_dim"]
        config = Config(
            vocab_size=rows if is_split_by_columns else rows * len(embedding),
            intermediate_dim=sum(len(part) for part in up),
            max_position_embeddings=window,
            bos_token_id=1,
            eos_token_id=2,
            dtype=str(embedding[0].dtype).removeprefix("torch."),
            **sizes,
        )
        try:
            check_config(config)
        except ValueError as error:
            raise InputError(f"{self.params_path}: {error}; copy it again") from None
        return config

    def _check_names(self):
        """Raise InputError if a file holds a weight that the Config has no place for."""
        expected = {meta_name(name) for name in self.shapes}
        for path, rank in zip(self.paths, self.ranks):
            extra = [name for name in rank if name not in expected and not _is_rotary_table(name)]
            if extra:
                described = f"what params.json describes ({self.config.n_layers} layers)"
                raise InputError(f"{path}: {first_of(extra)} not part of {described}; copy it again")

    def _check_heads(self):
        """Raise InputError if params.json has another number of heads than the weights.

        The shapes of q, k, v and o would not tell. RoPE's tables of frequencies, which some files hold, do.
        """
        for name, table in self.ranks[0].items():
            if _is_rotary_table(name) and 2 * table.numel() != self.config.head_dim:
                reason = f"n_heads {self.config.n_heads} is not that of the weights"
                raise InputError(f"{self.params_path}: {reason}; the files are of different models")

    def _parts_of(self, name):
        """Return each rank's part of the weight that Meta calls `name`. Raise InputError if one has none."""
        for path, rank in zip(self.paths, self.ranks):
            if name not in rank:
                reason = f"{name} is missing"
                raise InputError(f"{path}: {reason}; the files are not of one model, or one is damaged")
        return [rank[name] for rank in self.ranks]

    def read(self, name):
        """Return one of our weights, joined from the ranks' parts. Raise InputError if they do not fit."""
        shape = self.shapes[name]
        parts = self._parts_of(meta_name(name))
        weight = join(parts, shape)
        if weight is None:
            found = f"{len(parts)} file(s) with {tuple(parts[0].shape)} of {meta_name(name)}"
            asked = f"{shape}, which params.json asks for"
            raise InputError(f"{self.folder}: {found} do not make {asked}; is a consolidated.*.pth missing?")
        if is_query_or_key(name):  # Meta's rotary pairs are interleaved.
            weight = half_split(weight, self.config.head_dim, self.config.head_dim)
        return weight


def read_params(path):
    """Return what Meta's params.json tells, {field of Config: value}.

    Raise InputError if it is not that of a LLaMA 1 or 2.
    """
    params = read_json(path)
    try:
        sizes = {}
        for name, key in META_SIZES.items():
            sizes[name] = positive(params, key, int, LARGEST_SIZES[name])
        n_heads = sizes["n_heads"]
        sizes["n_kv_heads"] = positive(params, "n_kv_heads", int, LARGEST_SIZES["n_kv_heads"], n_heads)
        sizes["head_dim"] = sizes["hidden_dim"] // n_heads
        sizes["norm_eps"] = positive(params, "norm_eps", default=1e-5)
        sizes["rope_theta"] = positive(params, "rope_theta", default=10000.0)
    except ValueError as error:
        raise InputError(f"{path}: not readable ({error}); copy it again") from None
    for key in ("use_scaled_rope", "moe", "sliding_window"):
        if params.get(key):
            reason = f"{key} {params[key]} is not LLaMA 1 or 2"
            raise InputError(f"{path}: {reason}; take this model's Hugging Face folder instead")
    return sizes


def join(parts, shape):
    """Return the tensor of a shape that the ranks' parts make together, or None if they make none.

    Either each rank has the whole tensor (a norm's weight), or all have equal runs of its rows or columns.
    """
    part_shape = tuple(parts[0].shape)
    if any(tuple(part.shape) != part_shape for part in parts):
        return None
    if part_shape == shape:
        return parts[0].clone()
    for axis in range(len(part_shape)):
        joined_shape = list(part_shape)
        joined_shape[axis] *= len(parts)
        if tuple(joined_shape) == shape:
            return torch.cat(parts, axis)
    return None


def meta_name(name):
    """Return Meta's name of a weight of ours: blocks.3.mlp.up.weight is layers.3.feed_forward.w3.weight."""
    return renamed(name, META_NAMES, "layers")


def _is_rotary_table(name):
    """Return whether a tensor in Meta's files is RoPE's table of frequencies, which is computed anew."""
    return name.endswith("rope.freqs")
