"""Hugging Face checkpoint folders <-> model.py: configs, names of weights, safetensors in and out.

    python weights.py show PATH                # family, sizes, window, scaling; what is wrong, if something is
    python weights.py convert SOURCE DEST      # .bin, .pth or GGUF -> a safetensors folder (convert.py)

Notable choices:
- A folder is checked whole (config, every name, every shape) before a weight is read.
- Interpolation is written in Hugging Face's own terms, and a mode that stock loaders lack in one they have, so that
  transformers and vLLM compute the same logits as this code.
- A folder is written aside and renamed: a full disk or a kill leaves the earlier one whole.
"""
import argparse
import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import errors
import rope
import tokenizer as tokenizers
from errors import UserError
from model import Config, Transformer

BUILT_IN = ("tiny", "smollm2-135m")
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}  # model_type -> class
SHARD_BYTES = 5 * 2**30

# Our name of a weight -> Hugging Face's, GGUF's. Inside a block first.
BLOCK_NAMES = {
    "attn_norm": ("input_layernorm", "attn_norm"),
    "q": ("self_attn.q_proj", "attn_q"),
    "k": ("self_attn.k_proj", "attn_k"),
    "v": ("self_attn.v_proj", "attn_v"),
    "o": ("self_attn.o_proj", "attn_output"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "gate": ("mlp.gate_proj", "ffn_gate"),
    "up": ("mlp.up_proj", "ffn_up"),
    "down": ("mlp.down_proj", "ffn_down"),
}
OUTER_NAMES = {"embed": ("model.embed_tokens", "token_embd"), "norm": ("model.norm", "output_norm"), "head": ("lm_head", "output")}


def cache_dir():
    """Where converted models and tokenised texts are kept: $POSE_CACHE, else the user's cache folder."""
    return Path(os.environ.get("POSE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pose-pytorch")


# ---------------------------------------------------------------- reading


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
        raise UserError(f"{name}: no model here (no config.json); name a Hugging Face folder or one of {', '.join(BUILT_IN)}")
    return Path(name)


def load(name, device="cpu", dtype=None):
    """The model of a folder or a built-in name, in eval mode. dtype: of its weights, default as on disk.
    Raises UserError if anything about the folder is wrong: a file, the architecture, a name or a shape."""
    model, wanted, files = check(resolve(name))
    config = model.config
    state = {}
    for path, tensors in files.items():
        with safe_open(path, "pt", device=str(device)) as f:
            state |= {wanted[theirs][0]: f.get_tensor(theirs).to(dtype or getattr(torch, config.dtype)) for theirs in tensors if theirs in wanted}
    model.load_state_dict(state, strict=False, assign=True)  # complete: the names were checked
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    return model.eval()


def check(folder):
    """Read no weight, but make sure that each is there and fits. -> the model on the meta device, {Hugging Face's name: (ours, shape)},
    {safetensors file: names in it}. UserError if anything about the folder is wrong."""
    config = read_config(folder)
    with torch.device("meta"):
        model = Transformer(config)
    wanted = {hf_name(ours): (ours, tuple(p.shape)) for ours, p in model.state_dict().items()}
    if config.tie_embeddings:
        del wanted["lm_head.weight"]
    files = _weight_files(folder)
    _check_names_and_shapes(files, wanted, config, folder)
    return model, wanted, files


def load_tokenizer(name, config):
    """The tokenizer beside a model; UserError if it produces ids that the model has no embedding for."""
    folder = resolve(name)
    tokenizer = tokenizers.load(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}; use the tokenizer it was trained with"
        )
    return tokenizer


def read_config(folder):
    """config.json -> Config. UserError for an architecture, or a variant of one, that this code does not compute exactly."""
    path = Path(folder) / "config.json"
    try:
        c = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable ({error}); copy it again") from None

    def refuse(why):
        raise UserError(f"{path}: {why}; this code extends RoPE models of {', '.join(ARCHITECTURES)}")

    if not isinstance(c, dict):
        refuse("not a JSON object")
    kind = c.get("model_type")
    if c.get("position_embedding_type") == "alibi" or c.get("alibi") or kind in ("bloom", "mpt"):
        refuse(f"{kind!r} uses ALiBi, not RoPE")
    if kind in ("gpt2", "opt", "gpt_bigcode", "gpt_neo", "bert"):
        refuse(f"{kind!r} uses learned positions, not RoPE")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        refuse(f"model_type {kind!r} is not known")
    if c.get("attention_bias") or c.get("mlp_bias"):
        refuse(f"biases in attention or MLP are not known for {kind}")
    if c.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act {c['hidden_act']!r} is not known for {kind}")
    if c.get("partial_rotary_factor", 1) != 1:
        refuse(f"partial_rotary_factor {c['partial_rotary_factor']} is not known for {kind}")

    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(c.get(key) or {}, dict):
            refuse(f"{key} {c[key]!r} is not a JSON object")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    optional = ("num_key_value_heads", "head_dim", "sliding_window")
    given = {key: c[key] for key in sizes if key in c} | {key: c[key] for key in optional if c.get(key) is not None}
    for key, value in given.items():
        if type(value) is not int or value < 1:
            refuse(f"{key} is {value!r}, not a positive whole number")
    if _slides(c):
        refuse(f"{kind} with sliding_window {c.get('sliding_window', 4096)} in use: it never looks further back, so longer positions gain nothing")
    # Both spellings: rope_scaling beside rope_theta (before transformers 5), rope_parameters that holds both (since).
    parameters = dict(c.get("rope_parameters") or {})
    scaling = dict(c.get("rope_scaling") or parameters)
    theta = parameters.pop("rope_theta", None) or scaling.get("rope_theta") or c.get("rope_theta") or 10000.0
    mode = scaling.get("rope_type") or scaling.get("type") or "default"
    scaling = {k: v for k, v in scaling.items() if k not in ("type", "rope_theta")} | {"rope_type": mode}
    if mode not in ("default", "linear"):
        scaling.setdefault("original_max_position_embeddings", c.get("original_max_position_embeddings") or c.get("max_position_embeddings"))
    try:
        config = Config(
            vocab_size=c["vocab_size"],
            hidden_dim=c["hidden_size"],
            intermediate_dim=c["intermediate_size"],
            n_layers=c["num_hidden_layers"],
            n_heads=c["num_attention_heads"],
            n_kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
            head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
            max_position_embeddings=c["max_position_embeddings"],
            norm_eps=float(c.get("rms_norm_eps", 1e-6)),
            rope_theta=float(theta),
            rope_scaling=None if mode == "default" else scaling,
            tie_embeddings=c.get("tie_word_embeddings", False),
            bos_token_id=c.get("bos_token_id"),
            eos_token_id=c.get("eos_token_id"),
            dtype=c.get("dtype") or c.get("torch_dtype") or "float32",
            model_type=kind,
        )
        for seq_len in (1, 2**62):  # longrope has a list for short and one for long sequences
            rope.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, seq_len)
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]!r} is missing; is this a config.json of a llama model?") from None
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{path}: {error}") from None
    if config.dtype not in ("float32", "bfloat16", "float16"):
        refuse(f"weights of dtype {config.dtype!r} are not known")
    return config


def _slides(c):
    """Does the model of this config.json look back less far than its window?"""
    if c["model_type"] == "mistral":  # absent means 4,096 to stock loaders
        reach = c.get("sliding_window", 4096)
        return reach is not None and reach < c.get("max_position_embeddings", 0)
    return bool(c.get("use_sliding_window")) or "sliding_attention" in str(c.get("layer_types"))


def hf_name(name):
    """blocks.3.q.weight -> model.layers.3.self_attn.q_proj.weight"""
    if not name.startswith("blocks."):
        module, _, kind = name.rpartition(".")
        return f"{OUTER_NAMES[module][0]}.{kind}"
    _, i, module, kind = name.split(".")
    return f"model.layers.{i}.{BLOCK_NAMES[module][0]}.{kind}"


def _weight_files(folder):
    """{path of a safetensors file: the names to take from it}, from the index where there is one."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            pickled = f" (its .bin weights are pickled: python weights.py convert {folder} NEW_FOLDER)" if any(folder.glob("*.bin")) else ""
            raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json{pickled}; is the copy complete?")
        return {single: list(_shapes(single))}
    files = read_index(index)
    for path, names in files.items():
        if absent := set(names) - set(_shapes(path)):
            raise UserError(f"{path}: {sorted(absent)[0]} is missing, though {index.name} names it here; copy the file again")
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
    except FileNotFoundError:
        raise UserError(f"{path}: missing, though the index names it; copy the checkpoint again") from None
    except SafetensorError as error:
        raise UserError(f"{path}: truncated or not safetensors ({error}); copy it again") from None


def recomputed(name, config):
    """Old exports carry rotary tables, and a tied head twice."""
    return "rotary_emb" in name or (config.tie_embeddings and name == "lm_head.weight")


def _check_names_and_shapes(files, wanted, config, folder):
    found = {name: shape for path, names in files.items() for name, shape in _shapes(path).items() if name in names}
    found = {n: s for n, s in found.items() if not recomputed(n, config)}
    for what, names in (("missing", wanted.keys() - found.keys()), ("unexpected", found.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{folder}: weight {min(names)}{more} {what}; config.json and the weights are of different models")
    for name, shape in found.items():
        if shape != wanted[name][1]:
            raise UserError(f"{folder}: weight {name} has shape {shape}, config.json says {wanted[name][1]}")


# ---------------------------------------------------------------- writing


def save(model, tokenizer, path):
    """Write a Hugging Face folder: config.json, safetensors (shards of at most 5 GiB), the tokenizer's files.
    Under torch.distributed every rank calls it (sharded weights are gathered one at a time); rank 0 writes."""
    path, config = Path(path), model.config
    state = {hf_name(name): p for name, p in model.state_dict().items()}
    if config.tie_embeddings:
        del state["lm_head.weight"]
    dtype = getattr(torch, config.dtype)
    sizes = {name: p.numel() * dtype.itemsize for name, p in state.items()}
    shards = split_by_size(sizes)
    names = ["model.safetensors"] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]

    writes = not dist.is_initialized() or dist.get_rank() == 0
    with new_folder(path) if writes else contextlib.nullcontext() as aside:
        for file, shard in zip(names, shards):
            tensors = {}
            for name in shard:
                p = state[name].detach()
                p = p.full_tensor() if hasattr(p, "full_tensor") else p  # a DTensor: gathered by all ranks together
                if writes:
                    tensors[name] = p.to("cpu", dtype).contiguous()
            if writes:
                save_tensors(tensors, aside / file)
        if writes:
            if len(shards) > 1:
                save_index(aside, {name: file for file, shard in zip(names, shards) for name in shard}, sum(sizes.values()))
            (aside / "config.json").write_text(json.dumps(hf_config(config), indent=2) + "\n")
            for name, content in tokenizer.files.items():
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
    """Rename `new` to `old`. Whatever was there stays whole until the last moment."""
    before = old.with_name(old.name + ".before")
    shutil.rmtree(before, ignore_errors=True)
    if old.exists():
        old.rename(before)
    new.rename(old)
    shutil.rmtree(before, ignore_errors=True)


def save_tensors(tensors, path):
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)  # the library makes it readable by its owner alone
    except SafetensorError as error:  # it wraps the system's error in text
        if "os error 28" in str(error) or "os error 122" in str(error):
            raise OSError(errno.ENOSPC, "no space left", str(path)) from None
        raise


def hf_config(config):
    """config.json of a Config, in terms that stock loaders compute exactly (modes they lack in the terms of one they have)."""
    theta, scaling = config.rope_theta, dict(config.rope_scaling or {})
    mode = scaling.get("rope_type", "default")
    if mode == "ntk":  # nothing but another base
        theta, scaling = theta * scaling["factor"] ** (config.head_dim / (config.head_dim - 2)), {}
    elif mode == "ntk_by_parts":  # YaRN without its factor on cos and sin
        scaling |= {"rope_type": "yarn", "attention_factor": 1.0}
    elif mode == "yarn_revised":  # per-pair factors, as LongRoPE has them
        inv_freq, attention_factor = rope.rope_frequencies(config.head_dim, theta, scaling)
        factors = (rope.rope_frequencies(config.head_dim, theta)[0] / inv_freq).tolist()
        scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": attention_factor} | {
            key: scaling[key] for key in ("factor", "original_max_position_embeddings")
        }
    elif mode == "longrope":
        scaling.setdefault("factor", config.max_position_embeddings / config.original_window)
    both = scaling | {"type": scaling["rope_type"]} if scaling else None  # older readers want `type`
    return {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_dim,
        "intermediate_size": config.intermediate_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": int(config.max_position_embeddings),
        "rms_norm_eps": config.norm_eps,
        "rope_theta": theta,
        "rope_scaling": both,
        "rope_parameters": {"rope_type": "default"} | scaling | {"rope_theta": theta},
        "tie_word_embeddings": config.tie_embeddings,
        **({"attention_bias": False, "mlp_bias": False} if config.model_type == "llama" else {"sliding_window": None}),
        "hidden_act": "silu",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "dtype": config.dtype,
        "torch_dtype": config.dtype,
    }


EXTENSIONS = ("default", "linear", "ntk", "ntk_by_parts", "yarn", "yarn_revised", "llama3")  # modes that need no more than a factor


def extend(config, mode, target_len, **settings):
    """The Config of the same weights with their window stretched to target_len by a mode of rope.py. settings: what else rope_scaling
    shall hold, such as `factor` (default: the ratio of the windows) or yarn's `beta_fast`.
    A model that is scaled already (Llama 3.1, or one of ours) keeps that: the factors multiply. UserError where they cannot."""
    window = config.max_position_embeddings
    scaling = {"rope_type": mode, "factor": target_len / window, "original_max_position_embeddings": window} | settings
    if mode == "llama3":
        scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | scaling  # Llama 3.1's own
    if mode == "default":
        scaling = config.rope_scaling
    elif config.rope_scaling:
        scaling = _compose(config, scaling)
    return dataclasses.replace(config, max_position_embeddings=target_len, rope_scaling=scaling)


def _compose(config, new):
    """rope_scaling that stretches an already scaled model once more."""
    old = config.rope_scaling
    if old["rope_type"] == "dynamic" or (old["rope_type"] == "longrope" and old["short_factor"] != old["long_factor"]):
        raise UserError(f"this model's {old['rope_type']} scaling depends on the length, which another on top cannot keep; start from its base model")
    if old["rope_type"] == new["rope_type"] and "attention_factor" not in old:  # the same as one stretch of the first window
        return new | old | {"factor": old["factor"] * new["factor"]}
    plain, _ = rope.rope_frequencies(config.head_dim, config.rope_theta)
    factors, attention_factor = 1.0, 1.0  # of each pair: what the first stretch divides by, times what the second does
    for scaling in (old, new):
        inv_freq, on_attention = rope.rope_frequencies(config.head_dim, config.rope_theta, scaling)
        factors, attention_factor = factors * plain / inv_freq, attention_factor * on_attention
    return {
        "rope_type": "longrope", "short_factor": factors.tolist(), "long_factor": factors.tolist(), "attention_factor": attention_factor,
        "factor": new["factor"] * old.get("factor", 1.0), "original_max_position_embeddings": config.original_window,
    }  # fmt: skip


# ---------------------------------------------------------------- the command


def show(name):
    """Print what a checkpoint is. UserError says what is wrong with it."""
    folder = resolve(name)
    model, wanted, files = check(folder)
    config = model.config
    tokenizer = load_tokenizer(name, config)
    head = "tied to the embedding" if config.tie_embeddings else "own"
    parameters = sum(math.prod(shape) for _, shape in wanted.values())
    print(f"{folder}: {config.model_type}, {parameters:,} parameters, {config.dtype}, {len(files)} file(s)")
    print(f"layers {config.n_layers}, hidden {config.hidden_dim}, MLP {config.intermediate_dim}, head {head}")
    biases = ", biases on q, k, v" if config.qkv_bias else ""
    print(f"attention heads {config.n_heads} of {config.head_dim}, key/value heads {config.n_kv_heads}{biases}")
    print(f"vocabulary {config.vocab_size:,}, tokenizer {type(tokenizer).__name__} with {tokenizer.vocab_size:,}, begins with {tokenizer.bos_id}")
    print(f"window {config.max_position_embeddings:,} tokens, rope_theta {config.rope_theta:g}")
    shown = {k: v for k, v in (config.rope_scaling or {}).items() if not isinstance(v, list)}
    print("scaling " + (", ".join(f"{k} {v}" for k, v in shown.items()) or "none"))


def main():
    p = argparse.ArgumentParser(description="Look at a checkpoint, or convert one to safetensors.")
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
