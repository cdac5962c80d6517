"""Files damaged at random: each is used, or refused in one line with exit code 2 and nothing written.

A few cases of each kind run with the other tests. POSE_FUZZ=200 runs so many of each kind instead, with other
damage in each run (POSE_FUZZ_SEED repeats one), and prints how many were used and refused.
"""

import copy
import gzip
import json
import os
import random
import re
import shutil
import signal
import struct
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, SMALL, call_main
from gguf_files import Q, bpe_metadata, smollm_bpe, write_gguf
from test_bad_input import snapshot
from tokenizers import processors

from hf import families, tokenizer, weights
from hf.convert import meta_name
from model import Config, Transformer

TINY = ROOT / "assets" / "tiny"
CASES = int(os.environ.get("POSE_FUZZ", 4))  # of each kind
SEED = os.environ.get("POSE_FUZZ_SEED", "0" if "POSE_FUZZ" not in os.environ else str(time.time_ns()))
MOST_SECONDS = 60  # for one case
# What Python says of a value of a type that nobody expected.
PYTHONS_WORDS = re.compile(
    r"Traceback|panicked|not supported between|object is not|has no attribute|NoneType|not subscriptable|"
    r"index out of range|not iterable|must be str|unhashable|division by zero|takes \d|codec can't"
)

# ---------------------------------------------------------------- damage

STRANGE = [
    None, True, False, 0, -1, 1, 7, 2**31, 2**62, 10**60, 0.5, -0.5, 1e-300, 1e300, float("nan"),
    float("inf"), "", " ", "1", "64", "\0", "\ud800", "é\n\x1b[31m", "x" * 5000, "../x", "/etc/passwd", [],
    [None], [1, 2], ["a"], [[]], {}, {"a": 1}, {"": None}, "default", "yarn", "linear", "longrope", "llama3",
    "ntk", "float16", "int8", "qwen2", "phi", "gptj", "baichuan", "ministral3",
]  # fmt: skip
STRANGE_TEXT = [
    b"9" * 5000, b"[" * 2000, b"{" * 50, b"NaN", b"-Infinity", b"1e999", b'"\\ud800"', b"\0", b"\xff",
    b"\xef\xbb\xbf", b"null", b"true", b'"', b"}", b"]", b",", b":", b"-", b"\n", b"\r\n", b"\\",
    b'"a":', b" " * 100,
]  # fmt: skip


def places(value, place=()):
    """Return the place of every value inside a JSON value, as tuples of keys; of long lists the ends."""
    inside = [place] if place else []
    if isinstance(value, dict):
        keys = list(value)
    else:
        keys = list(range(len(value))) if isinstance(value, list) else []
    if len(keys) > 40:
        keys = keys[:3] + keys[-3:]
    for key in keys:
        inside += places(value[key], (*place, key))
    return inside


def damage_json(content, rng):
    """Return the bytes of a JSON file with one or two values replaced, removed, renamed or doubled."""
    value = json.loads(content)
    for _ in range(rng.choice([1, 1, 2])):
        *outer, key = rng.choice(places(value) or [(None,)])
        holder = value
        for step in outer:
            holder = holder[step]
        if key is None:
            break
        how = rng.random()
        if how < 0.1:
            del holder[key]
        elif how < 0.2 and isinstance(holder, dict):
            holder[rng.choice(["", "factor", "a\nb", "dtype"])] = holder.pop(key)
        elif how < 0.3:
            holder[key] = [copy.deepcopy(holder[key])] * 2
        elif how < 0.4 and isinstance(holder[key], (int, float)):
            holder[key] = rng.choice([-holder[key], holder[key] * 1e9, holder[key] + 1, str(holder[key])])
        else:
            holder[key] = copy.deepcopy(rng.choice(STRANGE))
    return json.dumps(value).encode("utf-8", "surrogatepass")


def damage_bytes(content, rng, within=None):
    """Return bytes that are cut, lengthened or changed somewhere. within: only that far from the start."""
    content = bytearray(content)
    end = max(1, min(len(content), within or len(content)))
    for _ in range(rng.choice([1, 1, 3])):
        place = rng.randrange(end)
        how = rng.random()
        if how < 0.15:
            del content[place:]
        elif how < 0.3:
            del content[place : place + rng.choice([1, 4, 100])]
        elif how < 0.5:
            content[place:place] = rng.choice(STRANGE_TEXT)
        elif how < 0.7:  # a number of a binary format
            number = rng.choice([b"\0" * 8, b"\xff" * 8, b"\0\0\0\x80\0\0\0\0", b"\0\0\xc0\x7f"])
            content[place : place + len(number)] = number
        elif place < len(content):
            content[place] = rng.randrange(256)
    return bytes(content)


def damage_text(content, rng):
    """Return the bytes of a file of JSON, damaged as values or as text."""
    return damage_json(content, rng) if rng.random() < 0.75 else damage_bytes(content, rng)


def damage_lines(content, rng):
    """Return JSON Lines of which one is damaged."""
    lines = content.splitlines(keepends=True)
    i = rng.randrange(len(lines))
    lines[i] = damage_text(lines[i], rng) + rng.choice([b"\n", b"", b"\r\n"])
    return b"".join(lines)


def damage_gzip(content, rng):
    """Return packed JSON Lines, damaged before or after packing."""
    if rng.random() < 0.5:
        return gzip.compress(damage_lines(gzip.decompress(content), rng))
    return damage_bytes(content, rng)


def damage_safetensors(content, rng):
    """Return a safetensors file with a damaged header of the right length, or damaged bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    how = rng.random()
    if how < 0.6:
        header = damage_json(content[8 : 8 + length], rng)
        return struct.pack("<Q", len(header)) + header + content[8 + length :]
    return damage_bytes(content, rng, within=8 + length if how < 0.85 else None)


def damage_head(content, rng):
    """Return bytes with changes near their start, where the structure of a file is."""
    return damage_bytes(content, rng, within=rng.choice([64, 2000, None]))


# ---------------------------------------------------------------- the files, whole

CPU = ("--device", "cpu")
NEW_RUN = ("train", "--model", "model", "--data", "a.txt", "--batch_size", 2, "--train_len", 16, *CPU)
NEW_RUN += ("--target_len", 512, "--save_every", 1)
PPL = ("eval", "--task", "ppl", "--lengths", 64, "--documents", 1, *CPU)
PASSKEY = ("eval", "--task", "passkey", "--lengths", 200, "--trials", 1, *CPU)
RESULTS = (*PASSKEY, "--model", "model", "--json", "r.json")
RESUME = ("train", "--resume", "--out", "out", *CPU)
KINDS = {  # the file, its damage, the commands that read it
    "config": (
        "model/config.json",
        damage_text,
        [
            ("hf.weights", "show", "model"),
            (*PPL, "--model", "model", "--data", "a.txt"),
            (*NEW_RUN, "--steps", 1, "--out", "new"),
        ],
    ),
    "weights": (
        "model/model.safetensors",
        damage_safetensors,
        [
            (*PPL, "--model", "model", "--data", "a.txt"),
            (*NEW_RUN, "--steps", 1, "--out", "new"),
        ],
    ),
    "index": (
        "sharded/model.safetensors.index.json",
        damage_text,
        [("hf.weights", "show", "sharded"), (*PPL, "--model", "sharded", "--data", "a.txt")],
    ),
    "sentencepiece": ("model/tokenizer.model", damage_head, [(*PPL, "--model", "model", "--data", "a.txt")]),
    "tokenizer_json": ("bpe/tokenizer.json", damage_text, [(*PPL, "--model", "bpe", "--data", "a.txt")]),
    "tokenizer_config": (
        "model/tokenizer_config.json",
        damage_text,
        [(*NEW_RUN, "--steps", 0, "--out", "new")],
    ),
    "jsonl": ("a.jsonl", damage_lines, [(*PPL, "--model", "model", "--data", "a.jsonl")]),
    "jsonl_gz": ("a.jsonl.gz", damage_gzip, [(*PPL, "--model", "model", "--data", "a.jsonl.gz")]),
    "text": ("a.txt", damage_bytes, [(*PPL, "--model", "model", "--data", "a.txt")]),
    "record": ("out/args.json", damage_text, [RESUME, PASSKEY]),
    "checkpoint": ("out/checkpoints/step-1/checkpoint.json", damage_text, [RESUME]),
    "metrics": ("out/metrics.jsonl", damage_text, [RESUME]),
    "results": ("r.json", damage_text, [RESULTS]),
    "bin": ("bin/pytorch_model.bin", damage_head, [("hf.weights", "convert", "bin", "new")]),
    "meta": (
        "meta/params.json",
        damage_text,
        [("hf.weights", "convert", "meta", "new", "--window", 64)],
    ),
    "meta_pth": (
        "meta/consolidated.00.pth",
        damage_head,
        [("hf.weights", "convert", "meta", "new", "--window", 64)],
    ),
    "gguf": ("model.gguf", damage_head, [("hf.weights", "convert", "model.gguf", "new")]),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a small file of each kind, which all commands take: models, texts, a run, results."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = Config(2048, 64, 96, 1, 4, 2, 16, 256, rope_scaling=yarn, bos_token_id=1, eos_token_id=2)
    model = Transformer(config)
    weights.save(model, tokenizer.load(TINY), folder / "model")
    save_other_layouts(folder, model)
    save_with_bpe(folder)

    text = "The cat sat on the mat. " * 100
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i in range(4)))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    (folder / "a.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call_main(*NEW_RUN, "--steps", 2, "--out", "out") == 0
        assert call_main(*RESULTS) == 0
    # As if the run had been stopped after its first step.
    shutil.rmtree(folder / "out" / "checkpoints" / "step-2")
    (folder / "out" / "finished.json").unlink(missing_ok=True)
    metrics = folder / "out" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
    return folder


def save_other_layouts(folder, model):
    """Save a model with an index, as a .bin and in Meta's layout, each in a folder of its own."""
    state = model.state_dict()
    published = {families.published_name(name, "llama"): weight for name, weight in state.items()}
    for name in ("sharded", "bin"):
        shutil.copytree(folder / "model", folder / name)
        (folder / name / "model.safetensors").rename(folder / name / "a.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(published, "a.safetensors")}
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "bin" / "a.safetensors").unlink()
    torch.save(published, folder / "bin" / "pytorch_model.bin")
    (folder / "meta").mkdir()
    torch.save(
        {meta_name(name): weight for name, weight in state.items()}, folder / "meta/consolidated.00.pth"
    )
    params = {"dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1}
    (folder / "meta" / "params.json").write_text(json.dumps(params))
    shutil.copy(TINY / "tokenizer.model", folder / "meta")


def save_with_bpe(folder):
    """Save a model with a tokenizer.json, and as a GGUF file."""
    bpe = smollm_bpe()
    config = transformers.LlamaConfig(**SMALL | {"vocab_size": bpe.get_vocab_size(), "num_hidden_layers": 1})
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "bpe")
    start = ("<|im_start|>", bpe.token_to_id("<|im_start|>"))
    template = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[start])
    bpe.post_processor = template
    bpe.save(str(folder / "bpe" / "tokenizer.json"))
    write_gguf(folder / "model.gguf", model, bpe_metadata(bpe), Q.F32)


# ---------------------------------------------------------------- the cases


def ring(number, frame):
    raise TimeoutError(f"more than {MOST_SECONDS} s")


def outcome(command, capfd):
    """Run a command in this folder. Return "used" or "refused", or in words what is wrong with its end."""
    before = snapshot(Path())
    capfd.readouterr()
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(MOST_SECONDS)
    try:
        code = call_main(*command)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno})"
    finally:
        signal.alarm(0)
    stderr = capfd.readouterr().err
    if code == 0:
        return "used" if "Traceback" not in stderr and "panicked" not in stderr else stderr[-500:]
    last = stderr.splitlines()[-1] if stderr else ""
    if code != 2 or not last.startswith("error: ") or stderr.count("error: ") != 1:
        return f"code {code}: {stderr[-500:]}"
    if PYTHONS_WORDS.search(stderr) or len(last) > 2000:
        return f"not in our words: {stderr[-500:]}"
    return "refused" if snapshot(Path()) == before else f"something was written, then {last[-300:]}"


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(whole, tmp_path, monkeypatch, no_wait_for_disk, capfd, kind):
    name, damage, commands = KINDS[kind]
    counts, wrong = Counter(), []
    for i in range(CASES):
        rng = random.Random(f"{SEED} {kind} {i}")
        work = tmp_path / "work"
        shutil.copytree(whole, work)
        monkeypatch.chdir(work)
        content = damage((work / name).read_bytes(), rng)
        (work / name).write_bytes(content)
        command = rng.choice(commands)
        ended = outcome(command, capfd)
        counts[ended if ended in ("used", "refused") else "wrong"] += 1
        if ended not in ("used", "refused"):
            kept = tmp_path / f"{i}-{Path(name).name}"
            kept.write_bytes(content)
            wrong.append(f"case {i}, {' '.join(map(str, command))}, {kept}: {ended}")
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(work)
    if "POSE_FUZZ" in os.environ:
        with capfd.disabled():
            print(f"{kind}, seed {SEED}: {dict(counts)}")
    assert not wrong, "\n".join(wrong)
