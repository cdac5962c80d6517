"""Load a model from a Hugging Face folder and save one as such a folder.

As a command:

    python -m hf.weights show PATH             # family, sizes, window, scaling; or what is wrong
    python -m hf.weights convert SOURCE DEST   # .bin, .pth or GGUF -> a safetensors folder

`show` reads no weight; `convert` checks what it wrote.
"""

import contextlib
import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from fsdp import whole
from hf import families
from hf.builtin import open_model
from hf.convert import convert
from hf.writing import is_model_file, save_tensors, shard_name, split_by_size, stacked, write_index
from model import empty_transformer
from storage.errors import printable
from storage.files import new_folder


def load(name, device="cpu", dtype=None):
    """Return the model of a folder or a built-in name, in eval mode.

    dtype: of its weights, by default the one that config.json names. Raise InputError if anything about the
    folder is wrong: a file, the architecture, a name or a shape.
    """
    folder = open_model(name)
    model = empty_transformer(folder.config)
    model.to(dtype or getattr(torch, folder.config.dtype))
    model.to_empty(device=device)
    folder.read_into(model)
    return model.eval()


def save(model, tokenizer, path):
    """Write a model as a Hugging Face folder.

    It gets config.json, safetensors files of at most 5 GiB, and the tokenizer's files. Adapters are merged in
    float32. Under torch.distributed every process calls this, since sharded weights are gathered one at a
    time; process 0 writes. A model that is there stays until this one is whole.
    """
    config = families.as_written(model.config)
    written = families.stored_parameters(config)
    dtype = getattr(torch, config.dtype)
    shards = split_by_size(config)
    parameters = model.state_dict()

    writes = not dist.is_initialized() or dist.get_rank() == 0
    with new_folder(Path(path), is_model_file) if writes else contextlib.nullcontext() as aside:
        weight_map = {}  # {published name: file}
        for i, shard in enumerate(shards):
            file = "model.safetensors" if len(shards) == 1 else shard_name(i, len(shards))
            tensors = {}
            for published, names in shard.items():
                parts = [_gather(name, model, parameters, written[name].shape) for name in names]
                if writes:
                    tensors[published] = stacked(parts, names, config).to("cpu", dtype)
            if writes:
                save_tensors(tensors, aside / file)
                weight_map |= dict.fromkeys(tensors, file)
        if writes:
            if len(shards) > 1:
                write_index(aside, weight_map, sum(p.numel() for p in written.values()) * dtype.itemsize)
            (aside / "config.json").write_text(json.dumps(families.hf_config(config), indent=2) + "\n")
            for name, content in families.tokenizer_files(model.config, tokenizer.files).items():
                (aside / name).write_bytes(content)


def _gather(name, model, parameters, shape):
    """Return a whole weight of a model, with its adapter, if it has one, merged. Every process takes part.

    parameters: the model's state_dict. shape: of the weight.
    """
    if name not in parameters:  # a bias that GPT-J does not have and Phi does
        return torch.zeros(shape)
    tensor = whole(parameters[name])
    if name == "head.weight" and model.config.normalised_head:
        tensor = F.normalize(tensor.float())
    adapter = f"{name.removesuffix('.weight')}.adapter"
    if f"{adapter}.a" in parameters:
        a, b = (whole(parameters[f"{adapter}.{part}"]).float() for part in "ab")
        tensor = tensor.float() + model.get_submodule(adapter).scale * (b @ a)
    return tensor


# ---------------------------------------------------------------- the command


def show(name):
    """Print what a checkpoint is. The InputError of one that cannot be used says what is wrong with it."""
    folder = open_model(name)
    tokenizer = folder.load_tokenizer()
    config = folder.config
    parameters = f"{folder.parameter_count():,} parameters"
    print(f"{folder.path}: {config.model_type}, {parameters}, {config.dtype}, {len(folder.files)} file(s)")
    head = "tied to the embedding" if config.tie_embeddings else "own"
    if config.normalised_head:
        head += ", of unit rows"
    print(f"layers {config.n_layers}, hidden {config.hidden_dim}, MLP {config.intermediate_dim}, head {head}")
    attention = f"attention heads {config.n_heads} of {config.head_dim} dimensions"
    if config.rotary_dim != config.head_dim:
        attention += f", {config.rotary_dim} of them rotary"
    attention += f", key/value heads {config.n_kv_heads}"
    if config.qkv_bias:
        attention += ", biases on q, k, v"
    if config.o_bias:
        attention += ", o"
    if config.qk_norm:
        attention += ", queries and keys normalised"
    if config.rope_layers:
        attention += f", no RoPE in {config.rope_layers.count(0)} layer(s)"
    print(attention)
    vocabulary = f"vocabulary {config.vocab_size:,}, tokenizer {type(tokenizer).__name__}"
    first = "no BOS" if tokenizer.bos_id is None else tokenizer.bos_id
    print(f"{vocabulary} with {tokenizer.vocab_size:,}, begins with {first}")
    print(f"window {config.max_position_embeddings:,} tokens, rope_theta {config.rope_theta:g}")
    scaling = [f"{k} {v}" for k, v in (config.rope_scaling or {}).items() if not isinstance(v, list)]
    print(printable("scaling " + (", ".join(scaling) or "none")))


def main():
    from cli import arguments  # here: who only loads and saves models needs no command line

    description = "Look at a checkpoint, or convert one to safetensors."
    p = arguments.ArgumentParser(prog="python -m hf.weights", description=description)
    commands = p.add_subparsers(dest="command", required=True)
    # fmt: off
    command = commands.add_parser("show",
        help="show family, sizes, window and scaling, or what is wrong with the checkpoint")
    command.add_argument("path", type=arguments.path_name,
        help="a Hugging Face folder or a built-in name")

    command = commands.add_parser("convert",
        help="convert .bin or .pth weights or a .gguf file to a safetensors folder")
    command.add_argument("source", type=arguments.as_path,
        help="a folder with pytorch_model*.bin, one with Meta's consolidated.*.pth, or a .gguf file")
    command.add_argument("dest", type=arguments.as_path,
        help="a new folder")
    command.add_argument("--window", type=arguments.whole_number(1), metavar="TOKENS",
        help="the model's window, for Meta's layout, which does not record it (2048 for LLaMA 1, 4096 for "
        "LLaMA 2)")
    # fmt: on
    args = p.parse_args()
    if args.command == "convert":
        convert(args.source, args.dest, args.window)
        show(args.dest)
    else:
        show(args.path)


if __name__ == "__main__":
    from cli import process

    process.run(main)
