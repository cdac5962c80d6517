"""Shared fixtures. Nothing here needs a network, a GPU or a file outside the repository."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).parent.parent
torch.set_num_threads(
    1
)  # for models this small a second thread on a busy machine costs ten times what it saves


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Tokenised texts of the tests do not land in the user's cache folder."""
    os.environ["POSE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SMALL = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


def scaling_of(mode, pairs=8):
    """rope_scaling of a mode that stretches a window of 64 by 8. pairs: half the rotated dimensions."""
    from_64 = {"factor": 8.0, "original_max_position_embeddings": 64}
    more = {
        "linear": {"factor": 8.0}, "ntk": {"factor": 8.0}, "dynamic": {"factor": 8.0},
        "llama3": from_64 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "longrope": from_64 | {"short_factor": [1.0 + i / 10 for i in range(pairs)], "long_factor": [2.0 + i for i in range(pairs)]},
    }  # fmt: skip
    return {"rope_type": mode} | more.get(mode, from_64)


def hf_logits(model, tokens, positions):
    """Logits of transformers. With neither a mask nor a cache it takes a jump in position_ids for the
    start of another document."""
    return model(tokens, attention_mask=torch.ones_like(tokens), position_ids=positions).logits


@pytest.fixture
def make_llama(tmp_path):
    """make_llama(name, **config) -> a folder written by transformers with a random small LLaMA (or
    family: Mistral, Qwen2), and that model (float32, eval)."""

    def make(name="model", family="Llama", seed=0, max_shard_size="5GB", **changes):
        torch.manual_seed(seed)
        config = getattr(transformers, family + "Config")(**(SMALL | changes))
        model = getattr(transformers, family + "ForCausalLM")(config).eval()
        for p in model.parameters():  # transformers' 0.02 makes logits so small that any two models agree
            torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.12)
        folder = tmp_path / name
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return folder, model

    return make


@pytest.fixture(scope="session")
def warm():
    """A process of warm.py. It has one thread: how many is settled when torch is imported."""
    command = [sys.executable, Path(__file__).parent / "warm.py"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run(warm, tmp_path_factory):
    """run("train.py", "--steps", 3, ...) -> the finished process; processes=N: as torchrun starts it."""

    def start(script, *arguments, processes=None, cwd=None, env=None, timeout=500):
        env = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
        folder = tmp_path_factory.mktemp("output")
        written = {name: folder / name for name in ("stdout", "stderr")}
        request = {
            "script": ROOT / script,
            "arguments": [str(a) for a in arguments],
            "processes": processes,
            "cwd": cwd or Path.cwd(),
            "env": env,
        }
        warm.stdin.write(json.dumps(request | written | {"timeout": timeout}, default=str) + "\n")
        warm.stdin.flush()
        code = int(warm.stdout.readline())
        return subprocess.CompletedProcess(
            request["arguments"], code, *(path.read_text() for path in written.values())
        )

    return start
