"""Write Hugging Face folders: safetensors files of limited size, their index, and the other files."""

import json
import os
import re

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from hf import families, tokenizer
from hf.folder import INDEX, CheckpointFolder, check_finite
from storage.errors import best_effort
from storage.files import new_folder

SHARD_BYTES = 5 * 2**30  # the largest safetensors file


def split_by_size(config):
    """Return which tensors of a Config go into which file.

    That is for each file {published name: our names of the weights in it}. The tensors of a file have at
    most SHARD_BYTES together, unless one alone has more.
    """
    itemsize = getattr(torch, config.dtype).itemsize
    parameters = families.stored_parameters(config)
    shards = [{}]
    shard_size = 0
    for published, names in families.by_published_name(parameters, config.model_type).items():
        size = sum(parameters[name].numel() for name in names) * itemsize
        if shards[-1] and shard_size + size > SHARD_BYTES:
            shards.append({})
            shard_size = 0
        shards[-1][published] = names
        shard_size += size
    return shards


def stacked(parts, names, config):
    """Return the published tensor of our weights `names`, whose values are `parts`."""
    together = parts[0] if len(parts) == 1 else torch.cat(parts)
    return families.published_rows(together, names, config).contiguous()


def shard_name(i, count):
    """Return Hugging Face's name for the safetensors file number i (from 0) of `count`."""
    return f"model-{i + 1:05}-of-{count:05}.safetensors"


def save_tensors(tensors, path):
    """Write {name: tensor} as a safetensors file. Raise OSError if the disk is full, or has another fault."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library wraps the system's error. Its number is left in the message alone.
        number = re.search(r"os error (\d+)", str(error))
        if number:
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        raise
    with best_effort("making files readable for others"):
        path.chmod(0o644)  # the library makes it readable by its owner alone


def write_index(folder, weight_map, total_size):
    """Write model.safetensors.index.json.

    weight_map: {name of a weight: name of its file}. total_size: bytes of all weights.
    """
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2))


def is_model_file(name):
    """Return whether a file of this name in a model's folder is one that this code writes."""
    return name in ("config.json", INDEX, *tokenizer.FILES) or name.endswith(".safetensors")


def write_converted(source, dest, config, read, others):
    """Write a model that another layout holds as a folder, see `write_folder`.

    config: its Config. read(name): returns one of our weights. others: the tokenizer's files.
    """
    shards = split_by_size(config)
    tensors_of_files = (_tensors_of(shard, config, read) for shard in shards)
    config_json = json.dumps(families.hf_config(config), indent=2).encode()
    write_folder(source, dest, tensors_of_files, len(shards), others | {"config.json": config_json})


def _tensors_of(shard, config, read):
    """Return {published name: tensor} of a file. shard: see `split_by_size`. read: see `write_converted`."""
    tensors = {}
    for published, names in shard.items():
        tensors[published] = stacked([read(name) for name in names], names, config)
    return tensors


def write_folder(source, dest, shards, count, others):
    """Write a folder and check it as its reader would; it becomes `dest` when it is whole.

    source: the path that it is converted from, which an error of a weight names.
    shards: yields `count` dicts {published name: tensor}, one for each safetensors file.
    others: {file name: bytes} of the files beside them, config.json and the tokenizer's.
    Raise InputError if the result is not a model that this code reads. An error leaves nothing behind.
    """
    with new_folder(dest) as aside:
        weight_map = {}
        total_size = 0
        for i, tensors in enumerate(tqdm(shards, total=count, desc="converting", unit="file", disable=None)):
            file = shard_name(i, count)
            for name, tensor in tensors.items():
                check_finite(source, name, tensor)
            save_tensors(tensors, aside / file)
            weight_map |= dict.fromkeys(tensors, file)
            total_size += sum(tensor.nbytes for tensor in tensors.values())
            tensors.clear()  # Memory holds one file's tensors: these must go before the next ones are read.
        write_index(aside, weight_map, total_size)
        for name, content in others.items():
            (aside / name).write_bytes(content)
        CheckpointFolder(aside).load_tokenizer()
