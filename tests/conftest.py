"""Shared fixtures. Nothing here needs a network, a GPU or a file outside the repository."""

import contextlib
import importlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import torch.distributed as dist
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

import hf.tokenizer
import pose
from cli import process, resuming, training
from storage import errors

ROOT = Path(__file__).parent.parent
# For models this small a second thread on a busy machine costs ten times what it saves.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Tokenised texts of the tests do not land in the user's cache folder."""
    os.environ["POSE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


QUICK_START = "test_the_quick_start_extends_tiny"


@pytest.fixture(autouse=True, scope="session")
def begun_quick_start(request, tmp_path_factory, own_cache):
    """The README's first commands, but smaller: (their process, their folder). None if no test asks for it.

    They take 80 of the 150 steps, 8 of the 16 examples in each, and 15 of the 50 prompts: all take minutes.
    They begin before the first test, and a second core does them meanwhile.
    """
    if all(item.name != QUICK_START for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("quick_start")
    commands = [
        ["train.py", "--steps", "80", "--batch_size", "8"],
        ["eval.py", "--task", "passkey", "--trials", "15", "--json", "passkey.json"],
    ]
    lines = [
        shlex.join([sys.executable, str(ROOT / script), *arguments, "--device", "cpu"])
        for script, *arguments in commands
    ]
    with open(folder / "stderr", "w") as stderr:
        process = subprocess.Popen(
            ["sh", "-c", " && ".join(lines)],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
    yield process, folder
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# ---------------------------------------------------------------- models

SMALL = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


def scaling_of(mode, pairs=8):
    """Return rope_scaling of a mode that stretches a window of 64 by 8. pairs: half the rotated
    dimensions."""
    from_64 = {"factor": 8.0, "original_max_position_embeddings": 64}
    more = {
        "linear": {"factor": 8.0},
        "ntk": {"factor": 8.0},
        "dynamic": {"factor": 8.0},
        "llama3": from_64 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "longrope": from_64
        | {
            "short_factor": [1.0 + i / 10 for i in range(pairs)],
            "long_factor": [2.0 + i for i in range(pairs)],
        },
    }
    return {"rope_type": mode} | more.get(mode, from_64)


def hf_logits(model, tokens, positions):
    """Return the logits of transformers. With neither a mask nor a cache it takes a jump in
    position_ids for the start of another document."""
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


# How Llama 3 cuts text, as its tokenizer.json has it. Unlike GPT-2's, it may join a full stop with a line
# break. (For GPT-2 and Qwen2 transformers has classes.)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="session")
def make_byte_level(tmp_path_factory):
    """make_byte_level(texts, vocab_size, pattern) -> a byte-level BPE tokenizer without BOS, trained on
    texts, which it cuts by a pattern, by default as GPT-2's."""

    def make(texts, vocab_size, pattern=None):
        bpe = tokenizers.Tokenizer(models.BPE())
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
        bpe.pre_tokenizer = to_bytes
        if pattern is not None:
            split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
            bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        bpe.train_from_iterator(texts, trainer)
        folder = tmp_path_factory.mktemp("byte_level")
        bpe.save(str(folder / "tokenizer.json"))
        return hf.tokenizer.load(folder)

    return make


def pose_positions(T, target_len, rows, seed=0):
    """Return positions of PoSE, int64 (rows, T). All rows end at the same position: transformers takes
    the length that `dynamic` depends on from the whole batch, and we from each row."""
    rng = np.random.default_rng(seed)
    drawn = [pose.sample("pose", rng, T + 1, T, target_len)[1] for _ in range(rows)]
    positions = torch.from_numpy(np.stack(drawn))
    positions[:, -1] = positions.max()
    return positions


# ---------------------------------------------------------------- commands, in this process


HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)  # signals that commands handle


def call_main(module, *arguments):
    """Run the main() of a command such as "train" or "hf.weights" in this process, and return its exit
    code.

    What it changes in this process is undone: arguments, warnings that were given, signal handlers,
    threads, process group."""
    argv, threads = sys.argv, torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    sys.argv = [f"{module}.py", *map(str, arguments)]
    try:
        process.run(importlib.import_module(module).main)
        return 0
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = argv
        errors._warnings.clear()
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.fixture
def call(capfd):
    """call("train", "--steps", 3, ...) -> the finished command as `run` returns it, but run by
    call_main."""

    def start(module, *arguments):
        capfd.readouterr()
        code = call_main(module, *arguments)
        return subprocess.CompletedProcess([module, *map(str, arguments)], code, *capfd.readouterr())

    return start


@pytest.fixture
def parse(monkeypatch):
    """parse("--steps", 3, ...) -> the options of train.py as given."""

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        return resuming.options_of_run(training.parser().parse_args())

    return start


# ---------------------------------------------------------------- commands, in processes of their own


class Started:
    """A command that runs in processes of its own. pids: theirs; each leads a process group."""

    def __init__(self, arguments, pids, output):
        """output: the folder of the files stdout, stderr and code."""
        self.arguments, self.pids, self.output = arguments, pids, output

    def poll(self):
        """Return the exit code, None while a process runs."""
        code = self.output / "code"
        return int(code.read_text()) if code.exists() else None

    def wait(self):
        """Wait for the end and return the CompletedProcess."""
        while (code := self.poll()) is None:
            time.sleep(0.005)
        texts = [(self.output / name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(self.arguments, code, *texts)

    def kill(self, number):
        """Send a signal to all processes that still run."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """start("train.py", "--steps", 3, ...) -> Started; processes=N: as torchrun starts it. A script
    without .py is a module, as in `python -m hf.weights`.

    warm.py forks it. It has one thread: how many is settled when torch is imported."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command = [sys.executable, Path(__file__).parent / "warm.py", device]
    one_thread = {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    warm = subprocess.Popen(command, env=os.environ | one_thread, **pipes)
    all_started = []

    def start(script, *arguments, processes=None, cwd=None, env=None, timeout=500):
        output = tmp_path_factory.mktemp("output")
        script = str(ROOT / script) if str(script).endswith(".py") else script
        request = {
            "script": script,
            "root": str(ROOT),
            "arguments": [str(argument) for argument in arguments],
            "processes": processes,
            "cwd": str(cwd or Path.cwd()),
            "env": {key: str(value) for key, value in (os.environ | one_thread | (env or {})).items()},
            "timeout": timeout,
        }
        request |= {name: str(output / name) for name in ("stdout", "stderr", "code")}
        warm.stdin.write(json.dumps(request) + "\n")
        warm.stdin.flush()
        pids = json.loads(warm.stdout.readline())
        all_started.append(Started(request["arguments"], pids, output))
        return all_started[-1]

    with warm:
        yield start
        for started in all_started:
            if started.poll() is None:  # its test has failed
                started.kill(signal.SIGKILL)
        warm.stdin.close()


@pytest.fixture(scope="session")
def run(start):
    """run("train.py", "--steps", 3, ...) -> the CompletedProcess of what `start` starts."""
    return lambda *arguments, **how: start(*arguments, **how).wait()


@pytest.fixture
def as_first_of(monkeypatch):
    """as_first_of(4) makes this process the first of four, as far as torchrun says so in the environment."""

    def tell(processes):
        for name, value in (("RANK", 0), ("WORLD_SIZE", processes)):
            monkeypatch.setenv(name, str(value))

    return tell


# ---------------------------------------------------------------- training runs of `tiny`


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A file of six documents of random words."""
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghij") for _ in range(rng.randint(1, 6))) for _ in range(200)]
    documents = [" ".join(rng.choices(words, k=800)) for _ in range(6)]
    path = tmp_path_factory.mktemp("texts") / "words.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture(scope="session")
def short(texts):
    """The arguments of a small PoSE run of `tiny`, but for --steps and --out."""
    model = ("--model", "tiny", "--device", "cpu", "--data", texts)
    sizes = ("--train_len", 64, "--batch_size", 4, "--factor", 8)
    return (*model, *sizes, "--lr", 1e-3, "--warmup_steps", 2)


@pytest.fixture(scope="session")
def train_into(run, short):
    """train_into(out, "--steps", 3, ...) -> the lines of metrics.jsonl of the run of `short` in that
    folder, which ends well. processes=N: not in this process but in N others."""

    def train(out, *arguments, processes=None):
        arguments = (*short, "--out", out, *arguments)
        # What torch.compile has compiled, as it does for a GPU, stays in a process.
        if processes is None and "cuda" not in arguments:
            assert call_main("train", *arguments) == 0
        else:
            done = run("train.py", *arguments, processes=processes)
            assert done.returncode == 0, done.stderr
        return metrics(out)

    return train


@pytest.fixture
def train(train_into, tmp_path):
    """train("name", "--steps", 3, ...) -> as train_into(tmp_path / "name", "--steps", 3, ...)."""
    return lambda name, *arguments, **how: train_into(tmp_path / name, *arguments, **how)


def metrics(out):
    """Return the lines of a run's metrics.jsonl, dicts."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(lines):
    """Return the losses of metrics' lines, float64."""
    return torch.tensor([line["loss"] for line in lines], dtype=torch.float64)


# ---------------------------------------------------------------- files


@pytest.fixture
def no_wait_for_disk(monkeypatch):
    """Leave out the waits until files are on disk (fsync), where a test writes many small folders."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
