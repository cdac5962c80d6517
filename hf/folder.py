"""A Hugging Face checkpoint folder: config, names and shapes are checked whole before a weight is read."""

import dataclasses
import hashlib
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fsdp import own_part
from hf import families, tokenizer
from storage.errors import InputError, LocalError
from storage.values import read_json

INDEX = "model.safetensors.index.json"
# The dtypes of weights, by their names in safetensors files. Integers and float8 are quantised weights.
WEIGHT_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


class CheckpointFolder:
    """A folder whose weights fit its config.json. Nothing but headers has been read, and no memory is taken.

    path: the folder. config: its Config.
    files: {path of a safetensors file: {published name of a tensor: its shape}}.
    """

    def __init__(self, path):
        """Check the folder. Raise InputError if a file, the architecture, a name or a shape is wrong."""
        self.path = Path(path)
        self.config = families.read_config(self.path)
        parameters = families.stored_parameters(self.config)
        # published name -> our names of the parameters that are stacked there by rows, in their order
        self._our_names = families.by_published_name(parameters, self.config.model_type)
        self._shapes = {}  # published name -> its shape
        for published, names in self._our_names.items():
            shapes = [parameters[name].shape for name in names]
            self._shapes[published] = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        self.files = find_tensors(self.path, self._shapes)
        self._check_names_and_shapes()

    def parameter_count(self):
        """Return how many numbers the weights hold."""
        return sum(math.prod(shape) for shape in self._shapes.values())

    @torch.no_grad()
    def read_into(self, model):
        """Read the weights into the parameters of a model of this Config, rounded to their dtype.

        Raise InputError for a weight that is NaN or infinite then.
        Of a parameter that is sharded (a DTensor) each process reads its own rows, so that its memory stays
        near its share and one tensor.
        """
        parameters = model.state_dict()
        for path, shapes in self.files.items():
            with safe_open(path, "pt") as f:
                for published in shapes:
                    if published in self._our_names:
                        self._read_tensor(f.get_slice(published), path, published, parameters)

    def _read_tensor(self, stored, path, published, parameters):
        """Copy `stored`, the tensor `published` of a file, into the parameters that are stacked in it.

        parameters: the model's state_dict.
        """
        names = self._our_names[published]
        if families.has_other_rows(names, self.config):
            # Permuted rows cross the borders of shards, so the whole tensor is read.
            stored = families.our_rows(stored[:], names, self.config)
        first_row = 0
        for name in names:
            local, rows = own_part(parameters[name])
            local.copy_(stored[first_row + rows.start : first_row + rows.stop])
            check_finite(path, published, local)
            first_row += len(parameters[name])

    def fingerprint(self):
        """Return 16 hexadecimal digits of the SHA-256 of the config and of each tensor's first row.

        Two checkpoints of one shape differ in it, though little is read.
        """
        # Fields that have their default are left out, so that a new field of Config changes no fingerprint.
        settings = {}
        for field in dataclasses.fields(self.config):
            value = getattr(self.config, field.name)
            if value != field.default:
                settings[field.name] = value
        digest = hashlib.sha256(repr(settings).encode())
        for path, shapes in self.files.items():
            with safe_open(path, "pt") as f:
                for published in shapes:
                    if not families.is_recomputed(published):
                        first_row = f.get_slice(published)[:1].contiguous()
                        digest.update(first_row.view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def load_tokenizer(self):
        """Return the tokenizer beside the weights, or raise InputError: see tokenizer.load_for."""
        return tokenizer.load_for(self.config, self.path)

    def _check_names_and_shapes(self):
        """Raise InputError unless the files hold exactly the weights that config.json asks for."""
        found = {}
        for shapes in self.files.values():
            found |= {name: shape for name, shape in shapes.items() if not families.is_recomputed(name)}
        tied_twice = False
        if self.config.tie_embeddings:  # old exports hold the tied head a second time
            tied_twice = found.pop(self._head_name(), None) is not None
        missing, unexpected = self._shapes.keys() - found.keys(), found.keys() - self._shapes.keys()
        for what, names in (("missing", missing), ("unexpected", unexpected)):
            if names:
                remedy = "config.json and the weights are of different models"
                raise InputError(f"{self.path}: weight {first_of(names)} {what}; {remedy}")
        for name, shape in found.items():
            if shape != self._shapes[name]:
                expected = self._shapes[name]
                raise InputError(f"{self.path}: weight {name} has shape {shape}, config.json says {expected}")
        if tied_twice:
            self._check_tied_head()

    def _check_tied_head(self):
        """Raise InputError if a head that config.json ties to the embedding is another tensor."""
        embedding = self._tensor(families.published_name("embed.weight", self.config.model_type))
        head = self._tensor(self._head_name())
        if embedding.dtype != head.dtype or not torch.equal(embedding, head):
            reason = f"config.json ties the head to the embedding, but {self._head_name()} is another"
            remedy = "set tie_word_embeddings to false there to keep the head, or take it out of the file"
            raise InputError(f"{self.path}: {reason}; loaders disagree on which one counts; {remedy}")

    def _head_name(self):
        """Return the published name of the head's weight."""
        return families.published_name("head.weight", self.config.model_type)

    def _tensor(self, published):
        """Return one whole tensor."""
        for path, shapes in self.files.items():
            if published in shapes:
                with safe_open(path, "pt") as f:
                    return f.get_tensor(published)


# ---------------------------------------------------------------- what the files hold


def first_of(names):
    """Return the first of these names, and how many more there are, as text."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return min(names) + more


def find_tensors(folder, needed):
    """Return {path of a safetensors file: {name of a tensor in it: its shape}} of a folder.

    An index, where there is one, says which files and tensors count; what is not in `needed` may be missing
    all the same, such as the head that is tied to the embedding. Raise InputError if a tensor is missing.
    """
    index, single = folder / INDEX, folder / "model.safetensors"
    if not index.exists():
        if single.exists():
            return {single: read_shapes(single)}
        advice = "is the copy complete?"
        if any(folder.glob("*.bin")):
            advice = f"convert its .bin weights: python -m hf.weights convert {folder} NEW_FOLDER"
        raise InputError(f"{folder}: no model.safetensors and no {INDEX}; {advice}")
    files = {}
    for path, names in read_index(index).items():
        shapes = read_shapes(path)
        absent = set(names) & needed.keys() - shapes.keys()
        if absent:
            reason = f"{min(absent)} is missing, though {INDEX} names it here"
            raise InputError(f"{path}: {reason}; copy the file again")
        files[path] = {name: shapes[name] for name in names if name in shapes}
    return files


def read_index(index):
    """Return {file: names of its weights} of an index file.

    Raise InputError if it names a file outside its own folder, or leaves out a single file beside it that has
    its name: loaders disagree on which of the two counts.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: has no weight_map; copy it again")
    files = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", "..") or file != Path(file).name:
            reason = f"{name} points to {file!r}, outside the folder"
            raise InputError(f"{index}: {reason}; do not use this checkpoint")
        files.setdefault(index.parent / file, []).append(name)
    single = index.with_name(index.name.removesuffix(".index.json"))
    if single.exists() and single not in files:
        reason = f"holds {single.name} and {index.name}, which names other files"
        raise InputError(f"{index.parent}: {reason}; remove what is not this model's")
    return files


def read_shapes(path):
    """Return {name: shape} of a safetensors file, from its header.

    Raise InputError if it cannot be read, or holds weights of a dtype that is not known.
    """
    if not path.is_file():
        reason = "not a file" if path.exists() else "missing, though the index names it"
        raise InputError(f"{path}: {reason}; copy the checkpoint again")
    shapes = {}
    try:
        with safe_open(path, "pt") as f:
            for name in f.keys():
                stored = f.get_slice(name)
                check_dtype(path, name, WEIGHT_DTYPES.get(stored.get_dtype(), stored.get_dtype()))
                shapes[name] = tuple(stored.get_shape())
    except FileNotFoundError:  # the library says this of a file that may not be read
        open(path).close()  # raises the system's own error
        raise
    except SafetensorError as error:
        raise InputError(f"{path}: truncated or not safetensors ({error}); copy it again") from None
    return shapes


# ---------------------------------------------------------------- what a weight may be


def check_dtype(path, name, dtype):
    """Raise InputError unless a published tensor of a file has a dtype of WEIGHT_DTYPES.

    dtype: its name. Tables and masks that models compute themselves may have any.
    """
    if dtype not in WEIGHT_DTYPES.values() and not families.is_recomputed(name):
        known = f"weights are {', '.join(WEIGHT_DTYPES.values())}"
        raise InputError(f"{path}: weight {name} is of dtype {dtype} ({known}); take the unquantised model")


def check_finite(path, name, weight):
    """Raise LocalError if a weight of a file is NaN or infinite somewhere.

    weight: its values, in the dtype in which they are used.
    """
    # The extremes are NaN if any value is. They cost a tenth of isfinite, and no second tensor.
    if weight.numel() and not torch.stack(weight.aminmax()).isfinite().all():
        reason = f"weight {name} is NaN or infinite somewhere, as {str(weight.dtype).removeprefix('torch.')}"
        raise LocalError(f"{path}: {reason}; the file is damaged, or its training diverged")
