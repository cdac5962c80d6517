"""What a run outlives: kills, damaged checkpoints, another number of processes, the death of a process."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_train import losses, metrics, short, texts, train  # noqa: F401 (fixtures)

import data
from hf import tokenizer, weights


def start(short, out, *arguments, processes=None, **env):  # noqa: F811
    launcher = [sys.executable] + (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    )
    return subprocess.Popen(
        [*launcher, ROOT / "train.py", *map(str, short), "--out", out, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def steps_done(out):
    return (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0


def wait_for(condition, process=None, seconds=120):
    until = time.time() + seconds
    while not condition() and time.time() < until and (process is None or process.poll() is None):
        time.sleep(0.01)
    return condition()


KILLS = int(os.environ.get("POSE_KILLS", 4))


def saved_steps(out):
    """Of the checkpoints that have their name; each is whole."""
    steps = {
        int(path.name[5:]): path for path in (out / "checkpoints").glob("step-*") if path.name[5:].isdigit()
    }
    for path in steps.values():
        checksums = json.loads((path / "checkpoint.json").read_text())["crc32"]
        assert {file.name for file in path.iterdir()} == {"checkpoint.json", *checksums}
        assert all(zlib.crc32((path / name).read_bytes()) == crc for name, crc in checksums.items())
    return set(steps)


def test_kills_lose_nothing_but_the_steps_since_the_last_checkpoint(short, train, tmp_path):  # noqa: F811
    """SIGKILL at random moments, nearly all of them while a checkpoint is being written (there is one a
    step)."""
    arguments = ("--steps", 12 * (KILLS + 1), "--save_every", 1)
    whole = losses(train("whole", *arguments))
    out, rng, resume = tmp_path / "killed", random.Random(), []
    for _ in range(KILLS):
        before = saved_steps(out)
        process = start(short, out, *arguments, *resume)
        assert wait_for(lambda: steps_done(out) >= 1, process), process.communicate()[1]
        time.sleep(rng.uniform(0, 6.0 if resume else 1.0))  # a resumed run needs seconds to start
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        resume = ["--resume"]
        newest = max(saved_steps(out), default=0)
        assert newest >= max(before, default=0)  # no checkpoint is lost
        assert (
            steps_done(out) - newest <= 3
        )  # the one in the background, the one being copied, the step between
    resumed = losses(train("killed", *arguments, "--resume"))
    assert torch.equal(resumed, whole)
    assert {p.name for p in (out / "checkpoints").iterdir()} == {
        f"step-{12 * (KILLS + 1) - i}" for i in range(2)
    }  # no leftovers


def cut(folder):
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-5000])


DAMAGE = {
    "cut": cut,
    "without metadata": lambda folder: (folder / ".metadata").unlink(),
    "metadata of nothing": lambda folder: (folder / ".metadata").write_bytes(b""),
    "without data": lambda folder: next(folder.glob("*.distcp")).unlink(),
    "without checksums": lambda folder: (folder / "checkpoint.json").unlink(),
    "one bit": lambda folder: flip(next(folder.glob("*.distcp"))),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def finished(train, tmp_path):  # noqa: F811
    """A run of six steps with checkpoints after three and six, as if killed before its model was written."""
    whole = losses(train("run", "--steps", 6, "--save_every", 3))
    shutil.rmtree(tmp_path / "run" / "model")
    return tmp_path / "run", whole


def test_a_damaged_checkpoint_is_passed_over(finished, run, short, train, tmp_path):  # noqa: F811
    out, whole = finished
    shutil.copytree(out, tmp_path / "spare")
    for name, damage in DAMAGE.items():
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "spare", out)
        damage(out / "checkpoints" / "step-6")
        done = run("train.py", *short, "--steps", 6, "--out", out, "--resume")
        assert done.returncode == 0, (name, done.stderr)
        assert "step-6 is damaged" in done.stderr and "going on after step 3" in done.stderr, name
        assert torch.equal(losses(metrics(out)), whole), name
    shutil.rmtree(out)
    shutil.copytree(tmp_path / "spare", out)
    for step in (3, 6):
        cut(out / "checkpoints" / f"step-{step}")
    done = run("train.py", *short, "--steps", 6, "--out", out, "--resume", processes=2)
    assert done.returncode == 1 and "no checkpoint there is whole" in only_error(done.stderr)


def only_error(stderr):
    """The one line that says what is wrong."""
    (line,) = (line for line in stderr.splitlines() if "error: " in line)
    assert "Traceback" not in stderr
    return line


@pytest.mark.parametrize("what", ["data", "model"])
def test_a_path_that_holds_something_else_now(run, short, tmp_path, what):  # noqa: F811
    shutil.copytree(weights.resolve("tiny"), tmp_path / "model")
    shutil.copy(short[short.index("--data") + 1], tmp_path / "texts.jsonl")
    model, data = ("--model", tmp_path / "model", "--target_len", 2048), ("--data", tmp_path / "texts.jsonl")
    arguments = (*short, *model, *data, "--steps", 2, "--save_every", 1, "--out", tmp_path / "run")
    assert run("train.py", *arguments).returncode == 0
    shutil.rmtree(tmp_path / "run" / "model")
    if what == "data":
        (tmp_path / "texts.jsonl").write_text((tmp_path / "texts.jsonl").read_text().replace("a", "b"))
    else:  # as another training run of the same model would leave it
        tensors = load_file(tmp_path / "model" / "model.safetensors")
        save_file(
            {name: p * 1.01 for name, p in tensors.items()},
            tmp_path / "model" / "model.safetensors",
            metadata={"format": "pt"},
        )
    for _ in range(2):
        done = run("train.py", *arguments, "--resume")
        assert (
            done.returncode == 2 and f"is of another run: {what}_sha256 was " in done.stderr.splitlines()[-1]
        )
        shutil.rmtree(
            tmp_path / "run" / "checkpoints", ignore_errors=True
        )  # nor may it start again with the first step


@pytest.mark.parametrize("before, after", [(2, None), (2, 2), (2, 4), (None, 2)])
def test_any_number_of_processes_goes_on(short, train, tmp_path, before, after):  # noqa: F811
    """A single process holds and saves plain tensors, several hold shards."""
    whole = losses(train("run", "--steps", 6, "--save_every", 3, processes=before))
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
    resumed = losses(train("run", "--steps", 6, "--resume", processes=after))
    same = 6 if before == after else 3  # steps that the same number of processes did
    assert len(resumed) == 6 and torch.equal(resumed[:same], whole[:same])
    torch.testing.assert_close(resumed, whole, rtol=1e-5, atol=0)


def torchrun_and_workers(process):
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    return [process.pid, *map(int, workers)]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_a_process_ends_all(short, tmp_path, rank):  # noqa: F811
    process = start(short, tmp_path / "run", "--steps", 10000, processes=2)
    assert wait_for(lambda: steps_done(tmp_path / "run") >= 3, process)
    workers = torchrun_and_workers(process)[1:]
    os.kill(workers[rank], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert wait_for(lambda: not os.path.exists(f"/proc/{workers[1 - rank]}"), seconds=40)


KILLED_INSIDE = """
import os, runpy, signal, sys
sys.path.insert(0, sys.argv[1])
import fsdp, weights
def die(*arguments, **others):
    os.kill(os.getpid(), signal.SIGKILL)
exec(sys.argv[2])
sys.argv = sys.argv[2:]
runpy.run_path(sys.path[0] + "/train.py", run_name="__main__")
"""


def killed_inside(run, tmp_path, place, *arguments, processes=None):
    """A run that is killed at a place: a statement that puts `die` there."""
    (tmp_path / "killed.py").write_text(KILLED_INSIDE)
    return run(tmp_path / "killed.py", ROOT, place, *arguments, processes=processes, timeout=100)


def test_a_death_inside_the_writing_of_a_checkpoint(run, short, train, tmp_path):  # noqa: F811
    """In the background, before its processes meet again."""
    arguments = ("--steps", 30, "--save_every", 10)
    place = "fsdp._checksum = die if os.environ['RANK'] == '1' else fsdp._checksum"
    done = killed_inside(run, tmp_path, place, *short, *arguments, "--out", tmp_path / "run", processes=2)
    assert done.returncode == 1
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-10.tmp"} and not (
        tmp_path / "run" / "model"
    ).exists()
    assert len(train("run", *arguments, "--resume")) == 30


def test_an_error_while_a_checkpoint_is_written(run, short, train, tmp_path):  # noqa: F811
    """It is finished first."""
    arguments = ("--steps", 8, "--save_every", 4)
    place = """
import time, torch
seal, update, done = fsdp.Checkpoints._seal, fsdp.update, []
fsdp.Checkpoints._seal = lambda *given: time.sleep(2) or seal(*given)
def full(*given):
    done.append(0)
    if len(done) == 6:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return update(*given)
fsdp.update = full
"""
    done = killed_inside(run, tmp_path, place, *short, *arguments, "--out", tmp_path / "run")
    assert done.returncode == 2 and "memory is full" in only_error(done.stderr)
    assert saved_steps(tmp_path / "run") == {4} and len(train("run", *arguments, "--resume")) == 8


def test_a_death_while_the_model_is_written(run, short, train, tmp_path):  # noqa: F811
    arguments = ("--steps", 4, "--save_every", 4)
    done = killed_inside(
        run, tmp_path, "weights.save_tensors = die", *short, *arguments, "--out", tmp_path / "run"
    )
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "run" / "model").exists()
    assert len(train("run", *arguments, "--resume")) == 4
    assert weights.load(tmp_path / "run" / "model") and not (tmp_path / "run" / "model.tmp").exists()


def test_the_model_of_an_interrupted_run_is_not_taken_for_the_finished_one(run, short, train, tmp_path):  # noqa: F811
    """Though all steps are in metrics.jsonl, because the resumed run died while it wrote its own."""
    out, arguments = tmp_path / "run", ("--steps", 30)
    process = start(short, out, *arguments)
    assert wait_for(lambda: steps_done(out) >= 3, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode == 0 and steps_done(out) < 30
    interrupted = (out / "model" / "model.safetensors").read_bytes()
    done = killed_inside(
        run, tmp_path, "weights.save_tensors = die", *short, *arguments, "--resume", "--out", out
    )
    assert done.returncode == -signal.SIGKILL and steps_done(out) == 30
    assert len(train("run", *arguments, "--resume")) == 30
    assert (out / "model" / "model.safetensors").read_bytes() != interrupted


def test_sigterm_to_torchrun_and_all_it_started(short, tmp_path):  # noqa: F811
    """As a cluster's scheduler sends it: each process gets it twice, for torchrun passes its own on."""
    out = tmp_path / "run"
    process = start(short, out, "--steps", 10000, processes=2)
    assert wait_for(lambda: steps_done(out) >= 3, process)
    for pid in reversed(torchrun_and_workers(process)):
        os.kill(pid, signal.SIGTERM)
    stderr = process.communicate(timeout=100)[1]
    done = steps_done(out)
    assert f"stopped after step {done} of 10000" in stderr
    assert (
        process.returncode == 1 and "SignalException" in stderr
    )  # torchrun's own end, whatever its processes did
    assert (out / "checkpoints" / f"step-{done}").exists() and (out / "model").exists()


def test_a_mistake_is_told_once_although_the_first_process_is_slow(run, short, tmp_path):  # noqa: F811
    """torchrun ends the others as soon as one has ended."""
    late = "import time; time.sleep(3 * (os.environ['RANK'] == '0'))"
    done = killed_inside(
        run, tmp_path, late, *short, "--train_len", 0, "--out", tmp_path / "run", processes=2
    )
    assert done.returncode == 1 and only_error(done.stderr) == "error: --train_len 0: must be at least 1"


def test_processes_with_different_arguments(short, tmp_path):  # noqa: F811
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    both = [
        start(short, tmp_path / "run", "--steps", 3, "--seed", rank, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
              MASTER_ADDR="localhost", MASTER_PORT=port)
        for rank in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=100)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2], told
    assert (
        "seed differs between processes: [0, 1]" in told[0]
        and "Traceback" not in told[0]
        and not told[1].strip()
    )
    assert not (tmp_path / "run").exists()


def test_validation_and_tensorboard(run, short, tmp_path, texts):  # noqa: F811
    """The last validation is that of the model that is written; at both lengths the loss of a plain
    forward pass on the same 64 tokens, the last of 500."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = (
        "--steps",
        3,
        "--eval_every",
        2,
        "--eval_data",
        texts,
        "--eval_lengths",
        "64,500",
        "--tensorboard",
    )
    done = run("train.py", *short, "--out", tmp_path / "run", *settings, processes=2)
    said = [line.split(":")[0] for line in done.stderr.splitlines() if ": validation loss" in line]
    assert done.returncode == 0 and said == ["step 0", "step 2", "step 3"]
    lines = metrics(tmp_path / "run")
    assert ["validation" in line for line in lines] == [False, True, True]
    model, tok = (
        weights.load(tmp_path / "run" / "model", dtype=torch.float32),
        tokenizer.load(weights.resolve("tiny")),
    )
    documents = data.prepare([texts], tok, weights.cache_dir())
    for n in (64, 500):
        nats = []
        for i in range(len(documents)):
            row = torch.tensor([[tok.bos_id, *documents[i][500 - n : 500].tolist()]])
            with torch.no_grad():
                nats.append(
                    torch.nn.functional.cross_entropy(model(row[:, :-1])[0, -64:], row[0, -64:]).item()
                )
        assert lines[-1]["validation"][str(n)] == pytest.approx(
            sum(nats) / len(nats), rel=1e-3
        )  # the written weights are bfloat16
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for key in ("loss", "lr", "grad_norm"):
        assert [e.value for e in events.Scalars(key)] == pytest.approx(
            [line[key] for line in lines], rel=1e-6
        )
    assert [e.step for e in events.Scalars("validation/500")] == [2, 3]
