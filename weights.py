"""Hugging Face checkpoint folders <-> model.py: safetensors in and out. families.py has the names and config.json.

    python weights.py show PATH                # family, sizes, window, scaling; what is wrong, if something is
    python weights.py convert SOURCE DEST      # .bin, .pth or GGUF -> a safetensors folder (convert.py)

Notable choices:
- A folder is checked whole (config, every name, every shape) before a weight is read.
- A folder is written aside and renamed: a full disk or a kill leaves the earlier one whole.
"""
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import errors
import families
import rope
import tokenizer as tokenizers
from errors import UserError
from families import hf_config, hf_name, read_config
from model import Transformer

BUILT_IN = ("tiny", "smollm2-135m")
SHARD_BYTES = 5 * 2**30


def cache_dir():
    """Where converted models and tokenised texts are kept: $POSE_CACHE, else the user's cache folder."""
    return Path(os.environ.get("POSE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pose-pytorch")


# ---------------------------------------------------------------- reading


def default(device):
    """The built-in model to take on a device, "cuda" or "cpu", where the user names none."""
    return "smollm2-135m" if device == "cuda" else "tiny"


def resolve(name):
    """The folder of a model: a built-in name (fetched once) or a path."""
    if name == "tiny":
        return Path(__file__).parent / "assets" / "tiny"
    if name == "smollm2-135m":
        cache_dir().mkdir(parents=True, exist_ok=True)
        with open(cache_dir() / "smollm2-135m.lock", "w") as lock:  # under torchrun one process fetches, the others find it done
            fcntl.flock(lock, fcntl.LOCK_EX)
            import convert  # which imports this file

            return convert.fetch_smollm2()
    if not (Path(name) / "config.json").is_file():
        run = "; its model is in " + str(Path(name) / "model") if (Path(name) / "model" / "config.json").is_file() else ""
        raise UserError(f"{name}: no model here (no config.json){run}; name a Hugging Face folder or one of {', '.join(BUILT_IN)}")
    return Path(name)


def load(name, device="cpu", dtype=None):
    """The model of a folder or a built-in name, in eval mode. dtype: of its weights, default as on disk.
    Raises UserError if anything about the folder is wrong: a file, the architecture, a name or a shape."""
    model, wanted, files = check(resolve(name))
    model.to(dtype or getattr(torch, model.config.dtype)).to_empty(device=device)
    fill(model, wanted, files)
    return model.eval()


@torch.no_grad()
def fill(model, wanted, files):
    """Read what `check` found into the parameters of a model, rounded to their dtype. Of a parameter that is sharded (a DTensor) each process
    reads its own rows, so that memory stays near a process's share and one tensor."""
    own = model.state_dict()
    for path, tensors in files.items():
        with safe_open(path, "pt") as f:
            for theirs in tensors:
                if theirs in wanted:
                    families.read(f.get_slice(theirs), {name: own[name] for name in wanted[theirs][0]}, model.config)


def check(folder):
    """Read no weight, but make sure that each is there and fits. -> the model on the meta device, {published name: (our names of what is
    in it, shape)}, {safetensors file: {name in it: shape}}. UserError if anything about the folder is wrong."""
    config = read_config(folder)
    with torch.device("meta"):
        model = Transformer(config)
    wanted = {}
    for ours, p in model.state_dict().items():
        theirs = hf_name(ours, config.model_type)
        above, (rows, *_) = wanted.get(theirs, ((), (0,)))
        wanted[theirs] = (*above, ours), (rows + p.shape[0], *p.shape[1:])
    if config.tie_embeddings:
        del wanted["lm_head.weight"]
    files = _weight_files(folder)
    _check_names_and_shapes(files, wanted, config, folder)
    return model, wanted, files


def fingerprint(config, files):
    """16 digits of the SHA-256 of a config and of the first row of each tensor in {safetensors file: names in it}: two checkpoints of one
    shape differ in it too, and little is read."""
    digest = hashlib.sha256(repr(config).encode())
    for path, tensors in files.items():
        with safe_open(path, "pt") as f:
            for name in (name for name in tensors if not recomputed(name)):
                digest.update(f.get_slice(name)[:1].contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def load_tokenizer(name, config):
    """The tokenizer beside a model; UserError if it produces ids that the model has no embedding for."""
    folder = resolve(name)
    tokenizer = tokenizers.load(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}; use the tokenizer it was trained with"
        )
    return tokenizer


def _weight_files(folder):
    """{path of a safetensors file: {name to take from it: shape}}, from the index where there is one."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            pickled = f" (its .bin weights are pickled: python weights.py convert {folder} NEW_FOLDER)" if any(folder.glob("*.bin")) else ""
            raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json{pickled}; is the copy complete?")
        return {single: _shapes(single)}
    files = {}
    for path, names in read_index(index).items():
        shapes = _shapes(path)
        if absent := set(names) - set(shapes):
            raise UserError(f"{path}: {min(absent)} is missing, though {index.name} names it here; copy the file again")
        files[path] = {name: shapes[name] for name in names}
    return files


def read_index(index):
    """{file: names of its weights} of an index file; none of the files is outside the index's folder."""
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: not readable ({error!r}); copy it again") from None
    files = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", "..") or file != Path(file).name:
            raise UserError(f"{index}: {name} points to {file!r}, outside the folder; do not use this checkpoint")
        files.setdefault(index.parent / file, []).append(name)
    return files


def _shapes(path):
    """{name: shape} of one safetensors file, from its header."""
    try:
        with safe_open(path, "pt") as f:
            return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
    except FileNotFoundError:  # safetensors says so, too, of one that may not be read
        if path.exists():
            open(path).close()  # says what is wrong
        raise UserError(f"{path}: missing, though the index names it; copy the checkpoint again") from None
    except SafetensorError as error:
        raise UserError(f"{path}: truncated or not safetensors ({error}); copy it again") from None


def recomputed(name):
    """Old exports carry rotary tables and causal masks (GPT-J's)."""
    return "rotary_emb" in name or name.endswith((".attn.bias", ".attn.masked_bias"))


def _check_names_and_shapes(files, wanted, config, folder):
    found = {name: shape for shapes in files.values() for name, shape in shapes.items() if not recomputed(name)}
    tied_twice = config.tie_embeddings and found.pop("lm_head.weight", None)  # as in old exports
    for what, names in (("missing", wanted.keys() - found.keys()), ("unexpected", found.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{folder}: weight {min(names)}{more} {what}; config.json and the weights are of different models")
    for name, shape in found.items():
        if shape != wanted[name][1]:
            raise UserError(f"{folder}: weight {name} has shape {shape}, config.json says {wanted[name][1]}")
    if tied_twice:
        embedding, head = (_tensor(files, name) for name in (hf_name("embed.weight", config.model_type), "lm_head.weight"))
        if embedding.dtype != head.dtype or not torch.equal(embedding, head):
            told = "config.json ties the head to the embedding, but lm_head.weight is another; loaders disagree on which one counts"
            raise UserError(f"{folder}: {told}; set tie_word_embeddings to false there to keep the head, or take it out of the file")


def _tensor(files, name):
    with safe_open(next(path for path, names in files.items() if name in names), "pt") as f:
        return f.get_tensor(name)


# ---------------------------------------------------------------- writing


def save(model, tokenizer, path):
    """Write a Hugging Face folder: config.json, safetensors (shards of at most 5 GiB), the tokenizer's files.
    Under torch.distributed every rank calls it (sharded weights are gathered one at a time); rank 0 writes."""
    path, config = Path(path), families.as_written(model.config)
    own = model.state_dict()
    with torch.device("meta"):
        written = Transformer(config).state_dict()
    if config.tie_embeddings:
        del written["head.weight"]
    dtype = getattr(torch, config.dtype)
    sizes = {name: p.numel() * dtype.itemsize for name, p in written.items()}
    shards = split_by_size(sizes)
    names = ["model.safetensors"] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]

    writes = not dist.is_initialized() or dist.get_rank() == 0
    with new_folder(path) if writes else contextlib.nullcontext() as aside:
        for file, shard in zip(names, shards):
            tensors = {}
            for name in shard:
                p = own[name].detach() if name in own else torch.zeros(written[name].shape)  # a bias that GPT-J does not have and Phi does
                p = p.full_tensor() if hasattr(p, "full_tensor") else p  # a DTensor: gathered by all ranks together
                if writes and model.config.normalised_head and name == "head.weight":
                    p = F.normalize(p.float())
                if writes:
                    tensors[hf_name(name, config.model_type)] = p.to("cpu", dtype).contiguous()
            if writes:
                save_tensors(tensors, aside / file)
        if writes:
            if len(shards) > 1:
                weight_map = {hf_name(name, config.model_type): file for file, shard in zip(names, shards) for name in shard}
                save_index(aside, weight_map, sum(sizes.values()))
            (aside / "config.json").write_text(json.dumps(hf_config(config), indent=2) + "\n")
            for name, content in families.tokenizer_files(model.config, tokenizer.files).items():
                (aside / name).write_bytes(content)


@contextlib.contextmanager
def new_folder(path):
    """An empty folder beside `path` to write into; renamed to it at the end, removed after an error."""
    aside = path.with_name(path.name + ".tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        replace_folder(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def split_by_size(sizes):
    """{name: bytes} -> lists of names, each of at most SHARD_BYTES unless one weight alone is larger."""
    shards, size = [[]], 0
    for name, more in sizes.items():
        if size + more > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += more
    return shards


def save_index(folder, weight_map, total_size):
    """model.safetensors.index.json. weight_map: {name of a weight: its file}; total_size: bytes of all weights."""
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def replace_folder(new, old):
    """Rename `new` to `old`, once its files are on disk. Whatever was there stays whole until the last moment."""
    before = old.with_name(old.name + ".before")
    shutil.rmtree(before, ignore_errors=True)
    for path in (*new.rglob("*"), new):
        _sync(path)
    if old.exists():
        old.rename(before)
    new.rename(old)
    _sync(old.parent)
    shutil.rmtree(before, ignore_errors=True)


def _sync(path):
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(tensors, path):
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)  # the library makes it readable by its owner alone
    except SafetensorError as error:  # it wraps the system's error in text
        if "os error 28" in str(error) or "os error 122" in str(error):
            raise OSError(errno.ENOSPC, "no space left", str(path)) from None
        raise


EXTENSIONS = ("default", "linear", "ntk", "dynamic", "ntk_by_parts", "yarn", "yarn_revised", "llama3")  # modes that need no more than a factor


def extend(config, mode, target_len, llama_4_scaling_beta=None, **settings):
    """The Config of the same weights with their window stretched to target_len by a mode of rope.py. settings: what else rope_scaling
    shall hold, such as `factor` (default: the ratio of the windows; 1 for dynamic, which takes that of the current length) or `beta_fast`.
    llama_4_scaling_beta: of rope.query_scale (default: the model's, if it has one). A model that is scaled already (Llama 3.1, or one of ours)
    keeps that: the factors multiply. UserError where they cannot."""
    window, earlier = config.max_position_embeddings, dict(config.rope_scaling or {})
    beta = earlier.pop("llama_4_scaling_beta", 0.0)
    beta = beta if llama_4_scaling_beta is None else llama_4_scaling_beta
    scaling = {"rope_type": mode, "factor": 1.0 if mode == "dynamic" else target_len / window, "original_max_position_embeddings": window} | settings
    if mode == "llama3":
        scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | scaling  # Llama 3.1's own
    if mode == "default":
        scaling = earlier if beta or earlier.get("rope_type", "default") != "default" else None
    elif earlier:
        try:
            scaling = rope.compose(config.rotary_dim, config.rope_theta, earlier, scaling)
        except ValueError as error:
            raise UserError(str(error)) from None
    if beta:
        if families.as_written(config).model_type not in ("llama", "mistral", "ministral3"):
            kinds = f"stock loaders have it for LLaMA and Mistral, not for {config.model_type}"
            raise UserError(f"--llama_4_scaling_beta {beta:g}: {kinds}; leave it out")
        scaling = {"original_max_position_embeddings": window} | (scaling or {"rope_type": "default"}) | {"llama_4_scaling_beta": beta}
    return dataclasses.replace(config, max_position_embeddings=target_len, rope_scaling=scaling)


# ---------------------------------------------------------------- the command


def show(name):
    """Print what a checkpoint is. UserError says what is wrong with it."""
    folder = resolve(name)
    model, wanted, files = check(folder)
    config = model.config
    tokenizer = load_tokenizer(name, config)
    head = ("tied to the embedding" if config.tie_embeddings else "own") + (", of unit rows" if config.normalised_head else "")
    parameters = sum(math.prod(shape) for _, shape in wanted.values())
    print(f"{folder}: {config.model_type}, {parameters:,} parameters, {config.dtype}, {len(files)} file(s)")
    print(f"layers {config.n_layers}, hidden {config.hidden_dim}, MLP {config.intermediate_dim}, head {head}")
    biases = (", biases on q, k, v" if config.qkv_bias else "") + (", o" if config.o_bias else "")
    rotary = f", {config.rotary_dim} of them rotary" if config.rotary_dim != config.head_dim else ""
    print(f"attention heads {config.n_heads} of {config.head_dim} dimensions{rotary}, key/value heads {config.n_kv_heads}{biases}")
    print(f"vocabulary {config.vocab_size:,}, tokenizer {type(tokenizer).__name__} with {tokenizer.vocab_size:,}, begins with {tokenizer.bos_id}")
    print(f"window {config.max_position_embeddings:,} tokens, rope_theta {config.rope_theta:g}")
    shown = {k: v for k, v in (config.rope_scaling or {}).items() if not isinstance(v, list)}
    print("scaling " + (", ".join(f"{k} {v}" for k, v in shown.items()) or "none"))


def main():
    p = errors.ArgumentParser(description="Look at a checkpoint, or convert one to safetensors.")
    commands = p.add_subparsers(dest="command", required=True)
    command = commands.add_parser("show", help="family, sizes, window, scaling; what is wrong, if something is")
    command.add_argument("path", help="a Hugging Face folder or a built-in name")
    command = commands.add_parser("convert", help=".bin or .pth weights or a .gguf file -> a safetensors folder")
    command.add_argument("source", type=Path, help="a folder with pytorch_model*.bin, one with Meta's consolidated.*.pth, or a .gguf file")
    command.add_argument("dest", type=Path, help="a new folder")
    command.add_argument("--window", type=int, metavar="TOKENS", help="of Meta's layout, which does not record it")
    args = p.parse_args()
    if args.command == "show":
        return show(args.path)
    import convert  # which imports this file

    convert.convert(args.source, args.dest, args.window)
    show(args.dest)


if __name__ == "__main__":
    errors.run(main)
