"""What a run outlives: kills, damaged checkpoints, another number of processes, the death of a process."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
import zlib

import pytest
import torch
from conftest import ROOT, losses, metrics, needs_gpu
from safetensors.torch import load_file, save_file

import data
import fsdp
from cli import resuming
from hf import weights
from hf.builtin import resolve
from storage.checkpoint import Checkpoints


def steps_done(out):
    """Return how many steps of a run are in its metrics.jsonl."""
    log = out / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_for(condition, process=None, seconds=120):
    """Wait until a condition holds, and return whether it does.

    It need not hold after so many seconds, or when the process has ended.
    """
    until = time.time() + seconds
    while not condition() and time.time() < until and (process is None or process.poll() is None):
        time.sleep(0.01)
    return condition()


def saved_steps(out):
    """Return the steps of the checkpoints that have their name. Each must be whole."""
    steps = set()
    for path in (out / "checkpoints").glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdigit():
            steps.add(int(number))
            checksums = json.loads((path / "checkpoint.json").read_text())["crc32"]
            assert {file.name for file in path.iterdir()} == {"checkpoint.json", *checksums}
            assert all(zlib.crc32((path / name).read_bytes()) == crc for name, crc in checksums.items())
    return steps


def checkpoint_names(out):
    return {path.name for path in (out / "checkpoints").iterdir()}


def only_error(stderr):
    """Return the one line that says what is wrong."""
    (line,) = (line for line in stderr.splitlines() if "error: " in line)
    assert "Traceback" not in stderr
    return line


# ---------------------------------------------------------------- kills and signals

KILLS = int(os.environ.get("POSE_KILLS", 3))
STEPS = 10 * (KILLS + 1)


@pytest.fixture(scope="module")
def uninterrupted(train_into, tmp_path_factory):
    """uninterrupted(device) -> the losses of a run of STEPS."""
    runs = {}

    def make(device):
        if device not in runs:
            out = tmp_path_factory.mktemp("uninterrupted") / device
            runs[device] = losses(train_into(out, "--steps", STEPS, "--device", device))
        return runs[device]

    return make


def test_kills_lose_nothing_but_the_steps_since_the_last_checkpoint(
    uninterrupted, start, short, train, tmp_path
):
    """SIGKILL comes at random moments, nearly all of them while a checkpoint is being written.

    (There is one a step.)
    """
    out, rng = tmp_path / "killed", random.Random()
    arguments = ("--steps", STEPS, "--save_every", 1)
    resume, newest = (), 0
    for _ in range(KILLS):
        process = start("train.py", *short, "--out", out, *arguments, *resume)
        assert wait_for(lambda: steps_done(out) >= 1, process), process.wait().stderr
        # While it starts, in one of its steps or, so that it cannot end before, after eight of them.
        until = time.time() + rng.uniform(0, 2)
        while time.time() < until and steps_done(out) < newest + 8:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        process.kill(signal.SIGKILL)
        assert process.wait().returncode == -signal.SIGKILL
        resume = ("--resume",)
        before, newest = newest, max(saved_steps(out), default=0)
        assert newest >= before  # no checkpoint is lost
        # The one in the background, the one that is being copied, the step between.
        assert steps_done(out) - newest <= 3
    resumed = losses(train("killed", *arguments, "--resume"))
    assert torch.equal(resumed, uninterrupted("cpu"))
    assert checkpoint_names(out) == {f"step-{STEPS - i}" for i in range(2)}  # no leftovers


@pytest.fixture(scope="module")
def interrupted(start, short, tmp_path_factory):
    """interrupted(device) -> the folder of a run of STEPS that SIGTERM has stopped after some."""
    folders = {}

    def make(device):
        if device in folders:
            return folders[device]
        out = folders[device] = tmp_path_factory.mktemp("interrupted") / device
        process = start("train.py", *short, "--device", device, "--out", out, "--steps", STEPS)
        assert wait_for(lambda: steps_done(out) >= 5, process)
        process.kill(signal.SIGTERM)
        done = process.wait()
        assert done.returncode == 128 + signal.SIGTERM, done.stderr
        assert 5 <= steps_done(out) < STEPS
        assert f"stopped after step {steps_done(out)} of {STEPS}" in done.stderr
        return out

    return make


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_sigterm_saves_and_a_resumed_run_equals_the_uninterrupted_one(
    uninterrupted, interrupted, train, tmp_path, device
):
    shutil.copytree(interrupted(device), tmp_path / "stopped")
    model = weights.load(tmp_path / "stopped" / "model")
    assert model.config.max_position_embeddings == 2048  # what is done is usable
    resumed = losses(train("stopped", "--steps", STEPS, "--device", device, "--resume"))
    assert len(resumed) == STEPS
    # A GPU sums in any order.
    tolerance = 0 if device == "cpu" else 1e-3
    torch.testing.assert_close(resumed, uninterrupted(device), rtol=tolerance, atol=0)


KILLED_INSIDE = """
import os, runpy, signal, sys, time
sys.path.insert(0, sys.argv[1])
import storage.checkpoint, hf.weights
def die(*arguments, **others):
    os.kill(os.getpid(), signal.SIGKILL)
exec(sys.argv[2])
sys.argv = sys.argv[2:]
runpy.run_path(sys.path[0] + "/train.py", run_name="__main__")
"""
INSIDE_THE_MODEL = "hf.weights.save_tensors = die"


@pytest.fixture
def killed_inside(run, short, tmp_path):
    """killed_inside(place, *arguments) -> a finished run of `short` that is killed at a place.

    place: a statement that puts `die` there.
    """
    script = tmp_path / "killed.py"
    script.write_text(KILLED_INSIDE)

    def start(place, *arguments, processes=None):
        return run(script, ROOT, place, *short, *arguments, processes=processes, timeout=100)

    return start


def test_the_model_of_an_interrupted_run_is_not_taken_for_the_finished_one(
    interrupted, killed_inside, train, tmp_path
):
    """Though all steps are in metrics.jsonl, because the resumed run died while it wrote its own."""
    out = tmp_path / "run"
    shutil.copytree(interrupted("cpu"), out)
    before = (out / "model" / "model.safetensors").read_bytes()
    done = killed_inside(INSIDE_THE_MODEL, "--steps", STEPS, "--resume", "--out", out)
    assert done.returncode == -signal.SIGKILL and steps_done(out) == STEPS
    assert len(train("run", "--steps", STEPS, "--resume")) == STEPS
    assert (out / "model" / "model.safetensors").read_bytes() != before


def test_a_death_while_the_model_is_written(killed_inside, train, tmp_path):
    out, arguments = tmp_path / "run", ("--steps", 4, "--save_every", 4)
    done = killed_inside(INSIDE_THE_MODEL, *arguments, "--out", out)
    assert done.returncode == -signal.SIGKILL and not (out / "model").exists()
    assert len(train("run", *arguments, "--resume")) == 4
    assert weights.load(out / "model") and not list(out.glob("model.*"))


def test_the_earlier_model_stays_until_the_new_one_is_whole(interrupted, call, short, tmp_path, monkeypatch):
    """Somebody may be using the model of the interrupted run."""
    out = tmp_path / "run"
    shutil.copytree(interrupted("cpu"), out)
    before = (out / "model" / "model.safetensors").read_bytes()

    def fail(*arguments):
        assert (out / "model" / "model.safetensors").read_bytes() == before
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_tensors", fail)
        assert call("train", *short, "--steps", STEPS, "--resume", "--out", out).returncode == 2
    assert (out / "model" / "model.safetensors").read_bytes() == before
    assert {path.name for path in out.iterdir()} == {"args.json", "checkpoints", "metrics.jsonl", "model"}


@pytest.mark.parametrize("what", ["a metrics line", "the mark", "the checkpoints"])
def test_a_finished_run_does_not_go_on(call, short, train, tmp_path, what):
    """Nor one of which something is missing: its model stays."""
    out, arguments = tmp_path / "run", ("--steps", 4, "--save_every", 2)
    train("run", *arguments)
    before = (out / "model" / "model.safetensors").read_bytes()
    resume = ("train", *short, *arguments, "--resume", "--out", out)
    if what == "a metrics line":
        lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
        (out / "metrics.jsonl").write_text("".join(lines[:-1]))
        assert "is finished, its model is" in call(*resume).stderr
        assert "is finished" in only_error(call(*resume, "--steps", 6).stderr)
    else:
        (out / "finished.json").unlink()  # as in a run of an earlier version
    if what == "the checkpoints":
        shutil.rmtree(out / "checkpoints")
        assert "no checkpoint to go on from" in only_error(call(*resume).stderr)
    elif what == "the mark":
        assert call(*resume).returncode == 0
        assert "is finished" in call(*resume).stderr
    assert (out / "model" / "model.safetensors").read_bytes() == before


def test_a_death_inside_the_writing_of_a_checkpoint(killed_inside, train, tmp_path):
    """In the background, before its processes meet again."""
    out, arguments = tmp_path / "run", ("--steps", 9, "--save_every", 3)
    place = "if os.environ['RANK'] == '1': storage.checkpoint._checksum = die"
    done = killed_inside(place, *arguments, "--out", out, processes=2)
    assert done.returncode == 1
    assert not saved_steps(out) and not (out / "model").exists()
    assert len(train("run", *arguments, "--resume")) == 9


def test_a_checkpoint_that_process_0_cannot_begin(killed_inside, tmp_path):
    """The others, which wait for the name of the folder, end with the same line and no trace."""
    place = "def die(path): raise OSError(28, 'No space left on device', str(path))\n"
    place += "storage.checkpoint.temporary_folder = die"
    done = killed_inside(place, "--steps", 2, "--save_every", 1, "--out", tmp_path / "run", processes=2)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "error: the disk is full" in done.stderr


BEGIN_ON_A_FULL_DISK = """
def full(path): raise OSError(28, 'No space left on device', str(path))
storage.checkpoint.temporary_folder = full
"""
END_ON_A_FULL_DISK = """
def full(*arguments): raise OSError(28, 'No space left on device')
storage.checkpoint.Checkpoints._give_name = full
"""


@pytest.mark.parametrize("place", [BEGIN_ON_A_FULL_DISK, END_ON_A_FULL_DISK], ids=["begin", "end"])
def test_a_full_disk_ends_no_run_for_a_checkpoint_that_nobody_asked_for(killed_inside, tmp_path, place):
    """It is said, once."""
    out, arguments = tmp_path / "run", ("--steps", 4, "--save_minutes", 1e-6)
    done = killed_inside(place, *arguments, "--out", out, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no checkpoint could be written (No space left on device)") == 1
    assert len(metrics(out)) == 4 and (out / "finished.json").exists() and weights.load(out / "model")
    assert {path.name for path in out.iterdir()} >= {"args.json", "model"} and not list(out.glob("*/*.tmp"))


def test_a_checkpoint_of_every_so_many_steps_may_end_a_run_on_a_full_disk(killed_inside, tmp_path):
    arguments = ("--steps", 4, "--save_minutes", 1e-6, "--save_every", 2)
    done = killed_inside(END_ON_A_FULL_DISK, *arguments, "--out", tmp_path / "run")
    assert done.returncode == 2 and "error: the disk is full" in done.stderr


def test_an_error_while_a_checkpoint_is_written(call, short, train, tmp_path, monkeypatch):
    """The checkpoint is finished first."""
    out, arguments = tmp_path / "run", ("--steps", 8, "--save_every", 4)
    complete, clip, steps = Checkpoints._complete, fsdp.clip_gradients, []

    def complete_slowly(*given):
        time.sleep(1)
        complete(*given)

    def clip_until_memory_is_full(*given):
        steps.append(0)
        if len(steps) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return clip(*given)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "_complete", complete_slowly)
        patched.setattr(fsdp, "clip_gradients", clip_until_memory_is_full)
        done = call("train", *short, *arguments, "--out", out)
    assert done.returncode == 2 and "memory is full" in only_error(done.stderr)
    assert saved_steps(out) == {4} and len(train("run", *arguments, "--resume")) == 8


# ---------------------------------------------------------------- going on from a checkpoint


@pytest.fixture(scope="module")
def six_steps(train_into, tmp_path_factory):
    """six_steps(processes) -> the folder of a run of six steps, and its losses.

    It has checkpoints after three and six steps, as if killed before its model was written. It is
    not to be written into.
    """
    runs = {}

    def make(processes=None):
        if processes not in runs:
            out = tmp_path_factory.mktemp("six_steps") / f"processes_{processes}"
            lines = train_into(out, "--steps", 6, "--save_every", 3, processes=processes)
            shutil.rmtree(out / "model")
            runs[processes] = out, losses(lines)
        return runs[processes]

    return make


def cut(folder):
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-5000])


def flip_a_bit(folder):
    file = next(folder.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "cut": cut,
    "without metadata": lambda folder: (folder / ".metadata").unlink(),
    "metadata of nothing": lambda folder: (folder / ".metadata").write_bytes(b""),
    "without data": lambda folder: next(folder.glob("*.distcp")).unlink(),
    "without checksums": lambda folder: (folder / "checkpoint.json").unlink(),
    "one bit": flip_a_bit,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(six_steps, call, short, tmp_path, name):
    out = tmp_path / "run"
    spare, whole = six_steps()
    shutil.copytree(spare, out)
    DAMAGE[name](out / "checkpoints" / "step-6")
    done = call("train", *short, "--steps", 6, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert "step-6 is damaged" in done.stderr and "going on after step 3" in done.stderr
    assert torch.equal(losses(metrics(out)), whole)


def test_a_run_without_a_whole_checkpoint_does_not_go_on(six_steps, run, short, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(six_steps()[0], out)
    for step in (3, 6):
        cut(out / "checkpoints" / f"step-{step}")
    record = (out / "args.json").read_bytes()
    done = run("train.py", *short, "--steps", 6, "--out", out, "--resume", "--keep", 7, processes=2)
    assert done.returncode == 1 and "no checkpoint there is whole" in only_error(done.stderr)
    assert (out / "args.json").read_bytes() == record


@pytest.mark.parametrize("before, after", [(2, None), (2, 4), (None, 2)])
def test_any_number_of_processes_goes_on(six_steps, train, tmp_path, before, after):
    """A single process holds and saves plain tensors, several hold shards."""
    spare, whole = six_steps(before)
    shutil.copytree(spare, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
    resumed = losses(train("run", "--steps", 6, "--resume", processes=after))
    assert len(resumed) == 6 and torch.equal(resumed[:3], whole[:3])
    torch.testing.assert_close(resumed, whole, rtol=1e-5, atol=0)


def test_a_run_of_an_earlier_version_goes_on(six_steps, call, short, tmp_path):
    """Without what was recorded later: neither does it take up the newer options' defaults."""
    out = tmp_path / "run"
    spare, whole = six_steps()
    shutil.copytree(spare, out)
    shutil.rmtree(out / "checkpoints" / "step-6")
    (out / "finished.json").unlink()
    for path in out / "args.json", out / "checkpoints" / "step-3" / "checkpoint.json":
        record = json.loads(path.read_text())
        for option in resuming.NEWER:
            record.get("run", record).pop(option, None)
        path.write_text(json.dumps(record))
    done = call("train", *short, "--steps", 6, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert torch.equal(losses(metrics(out)), whole)


def test_a_model_and_texts_that_were_moved(call, short, texts, tmp_path):
    """What they hold counts, not where they are."""
    for name in ("here", "there"):
        shutil.copytree(resolve("tiny"), tmp_path / name / "model")
        shutil.copy(texts, tmp_path / name / "texts.jsonl")

    def start(name, *arguments):
        own = ("--model", tmp_path / name / "model", "--data", tmp_path / name / "texts.jsonl")
        steps = ("--target_len", 2048, "--steps", 2, "--save_every", 1)
        return call("train", *short[2:4], *short[6:], *own, *steps, "--out", tmp_path / "run", *arguments)

    assert start("here").returncode == 0
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "here")
    earlier = json.loads((tmp_path / "run" / "args.json").read_text())
    gone = call("train", "--resume", "--out", tmp_path / "run")
    (line,) = gone.stderr.splitlines()
    assert gone.returncode == 2 and line.endswith(
        "/here/model is not there any more; say with --model where it is now"
    )
    gone = call("train", "--resume", "--out", tmp_path / "run", "--model", tmp_path / "there" / "model")
    assert gone.returncode == 2 and "say with --data where it is now" in gone.stderr
    done = start("there", "--resume", "--keep", 7, "--micro_batch_size", 2)
    assert done.returncode == 0 and "going on after step 2" in done.stderr
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    there = tmp_path / "there"
    moved = {"model": str(there / "model"), "data": [str(there / "texts.jsonl")]}
    assert record == earlier | moved | {"keep": 7}  # speed is a matter of the machine

    # So nothing has to be told again, by a version either that does not know all options of the last one.
    (tmp_path / "run" / "args.json").write_text(json.dumps(record | {"of_another_version": 3}))
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "finished.json").unlink()
    done = call("train", "--resume", "--out", tmp_path / "run")
    assert done.returncode == 0 and "going on after step 2" in done.stderr
    assert json.loads((tmp_path / "run" / "args.json").read_text()) == record | {"of_another_version": 3}


@pytest.mark.parametrize("what", ["data", "model"])
def test_a_path_that_holds_something_else_now(call, short, texts, tmp_path, what):
    shutil.copytree(resolve("tiny"), tmp_path / "model")
    own_texts = tmp_path / "texts.jsonl"
    shutil.copy(texts, own_texts)
    own = ("--model", tmp_path / "model", "--target_len", 2048, "--data", own_texts)
    arguments = (*short, *own, "--steps", 2, "--save_every", 1, "--out", tmp_path / "run")
    assert call("train", *arguments).returncode == 0
    shutil.rmtree(tmp_path / "run" / "model")
    if what == "data":
        own_texts.write_text(own_texts.read_text().replace("a", "b"))
    else:  # as another training run of the same model would leave it
        path = tmp_path / "model" / "model.safetensors"
        tensors = {name: 1.01 * tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    for _ in range(2):
        done = call("train", *arguments, "--resume")
        assert done.returncode == 2
        *_, line = done.stderr.splitlines()
        assert f"began with another --{what}: what is in " in line
        assert str(own_texts if what == "data" else tmp_path / "model") in line
        # Nor may it start again with the first step.
        shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)


# ---------------------------------------------------------------- one run, one folder


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_owns_its_folder_from_the_first_second(
    interrupted, call, run, short, tmp_path, monkeypatch, resume
):
    """A second run comes while the first one still tokenises, and while it trains."""
    out = tmp_path / "run"
    if resume:
        shutil.copytree(interrupted("cpu"), out)
    arguments = (*short, "--steps", STEPS if resume else 2, "--out", out, *(["--resume"] if resume else []))
    others = []

    def start_another(real):
        def start(*given):
            others.append(run("train.py", *arguments))
            return real(*given)

        return start

    monkeypatch.setattr(data, "tokenised", start_another(data.tokenised))
    monkeypatch.setattr(weights, "save", start_another(weights.save))
    assert call("train", *arguments).returncode == 0
    assert [done.returncode for done in others] == [2, 2]
    for done in others:
        assert f"--out {out}: another run is using it" in only_error(done.stderr)
    assert len(metrics(out)) == arguments[arguments.index("--steps") + 1]
    assert not (out / ".lock").exists()


def test_what_a_refused_run_leaves(call, short, tmp_path):
    """Nothing: not even the folder in which it held a lock."""
    assert (
        call("train", *short, "--steps", 1, "--train_len", 4096, "--out", tmp_path / "a" / "b").returncode
        == 2
    )
    assert list(tmp_path.iterdir()) == []


def test_an_out_that_is_not_free(call, short, train, tmp_path):
    """Rotation and the new model would remove it; and its own metrics.jsonl is a user's."""
    train("run", "--steps", 1)
    for place in ("checkpoints", "checkpoints/step-9", "model", "model/new"):
        done = call("train", *short, "--steps", 1, "--out", tmp_path / "run" / place)
        assert done.returncode == 2 and "run is another run's" in only_error(done.stderr)
    assert call("train", *short, "--steps", 1, "--out", tmp_path / "run" / "beside").returncode == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metrics.jsonl").write_text("{}\n")
    done = call("train", *short, "--steps", 1, "--out", tmp_path / "mine")
    assert done.returncode == 2 and "already holds a run" in only_error(done.stderr)
    assert (tmp_path / "mine" / "metrics.jsonl").read_text() == "{}\n"


def test_torchrun_starts_a_run_again(six_steps, call, short, tmp_path, monkeypatch):
    """With --max_restarts it gives the same command once more, without --resume."""
    out = tmp_path / "run"
    spare, whole = six_steps()
    shutil.copytree(spare, out)
    shutil.rmtree(out / "checkpoints" / "step-6")
    again = ("train", *short, "--steps", 6, "--save_every", 3, "--out", out)
    assert "already holds a run" in only_error(call(*again).stderr)
    told = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in (told | {"TORCHELASTIC_RESTART_COUNT": "1"}).items():
        monkeypatch.setenv(name, value)
    done = call(*again)
    assert done.returncode == 0 and "going on after step 3" in done.stderr
    assert torch.equal(losses(metrics(out)), whole)
    assert call("train", *short, "--steps", 1, "--out", tmp_path / "new").returncode == 0  # if it died early


LOST_STDERR = {
    "a reader that has gone": "r, w = os.pipe(); os.close(r); os.dup2(w, 2)",
    "a closed terminal": "r, w = os.openpty(); os.close(r); os.dup2(w, 2)",
}


@pytest.mark.parametrize("how", LOST_STDERR)
def test_nobody_has_to_read_what_a_run_says(killed_inside, tmp_path, how):
    """As with `2>&1 | head`, and when the terminal is closed: the run goes on to its end."""
    done = killed_inside(LOST_STDERR[how], "--steps", 3, "--out", tmp_path / "run")
    assert done.returncode == 0 and len(metrics(tmp_path / "run")) == 3
    assert (tmp_path / "run" / "finished.json").exists()


def test_a_closed_terminal_stops_and_saves(start, short, tmp_path):
    """SIGHUP comes more than once then, and a line about it cannot be written."""
    script, out = tmp_path / "hangup.py", tmp_path / "run"
    script.write_text(KILLED_INSIDE)
    process = start(script, ROOT, LOST_STDERR["a closed terminal"], *short, "--steps", 10000, "--out", out)
    assert wait_for(lambda: steps_done(out) >= 3, process)
    for _ in range(2):
        process.kill(signal.SIGHUP)
    assert process.wait().returncode == 128 + signal.SIGHUP
    assert saved_steps(out) == {steps_done(out)} and weights.load(out / "model")


def test_nohup_keeps_a_run_from_a_hangup(train, tmp_path, monkeypatch):
    clip = fsdp.clip_gradients

    def hang_up(*given):
        os.kill(os.getpid(), signal.SIGHUP)
        return clip(*given)

    monkeypatch.setattr(fsdp, "clip_gradients", hang_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert len(train("run", "--steps", 3)) == 3 and (tmp_path / "run" / "finished.json").exists()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_model_of_an_interrupted_run_is_known_by_those_who_use_it(interrupted, run, train, tmp_path):
    """They say how its run goes on, and use it."""
    out = interrupted("cpu")
    passkey = ("--task", "passkey", "--lengths", 256, "--trials", 1)
    for command in (("eval.py", *passkey), ("sample.py", "--prompt", "a", "--max_new_tokens", 1)):
        done = run(*command, "--model", out / "model", "--device", "cpu")
        assert done.returncode == 0, done.stderr
        told = f"{out / 'model'} is half-trained, its run was interrupted; it goes on with: "
        assert told + f"python train.py --resume --out {out}" in done.stderr
    train("finished", "--steps", 1)
    models = ("tiny", tmp_path / "finished" / "model")
    done = run("eval.py", *passkey, "--model", *models, "--device", "cpu")
    assert done.returncode == 0 and "half-trained" not in done.stderr


def test_a_second_ctrl_c_ends_a_run_at_once(start, short, tmp_path):
    """The first one says what that will cost, the second one what it has cost."""
    process = start("train.py", *short, "--out", tmp_path / "run", "--steps", 10000, "--save_every", 4)
    assert wait_for(lambda: steps_done(tmp_path / "run") > 8, process)
    process.kill(signal.SIGINT)
    assert wait_for(lambda: "stopping after this step" in (process.output / "stderr").read_text(), process)
    process.kill(signal.SIGINT)
    done = process.wait()
    if done.returncode == 130:
        pytest.skip("the run had stopped before the second one came")
    assert done.returncode == -signal.SIGINT
    lost = r"what came after step [1-9]\d*"
    assert re.search(rf"a second Ctrl-C ends it at once and discards {lost}\n", done.stderr)
    assert re.search(rf"ended at once and discarded {lost}\n", done.stderr)
    assert not (tmp_path / "run" / "model").exists() and saved_steps(tmp_path / "run")


# ---------------------------------------------------------------- several processes


@pytest.fixture
def torchrun(start, short, tmp_path):
    """torchrun(*options) -> Started of torchrun with two processes of a long run of `short` in tmp_path/run.

    The run has done three steps. The ids of these processes come back too.
    """

    def start_and_wait(*options, save_every=0):
        launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", *options)
        of_run = ("--out", tmp_path / "run", "--steps", 10000, "--save_every", save_every)
        process = start(*launcher, ROOT / "train.py", *short, *of_run)
        assert wait_for(lambda: steps_done(tmp_path / "run") >= 3, process), process.wait().stderr
        (pid,) = process.pids
        children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
        return process, [int(worker) for worker in children.stdout.split()]

    return start_and_wait


def test_the_death_of_a_process_ends_all(torchrun):
    process, workers = torchrun()
    os.kill(workers[1], signal.SIGKILL)
    assert wait_for(lambda: process.poll() is not None, seconds=60)
    assert process.poll() == 1
    assert wait_for(lambda: not os.path.exists(f"/proc/{workers[0]}"), seconds=40)
    told = process.wait().stderr
    assert "error: another process of this run has ended" in told and "[rank0]" not in told


def test_the_death_of_a_process_when_torchrun_may_start_them_again(torchrun, tmp_path):
    process, workers = torchrun("--max_restarts=1", save_every=1)
    os.kill(workers[0], signal.SIGKILL)
    stderr, done = process.output / "stderr", steps_done(tmp_path / "run")
    assert wait_for(lambda: "going on after step" in stderr.read_text(), process), stderr.read_text()
    assert wait_for(lambda: steps_done(tmp_path / "run") > done + 3, process)
    assert not os.path.exists(f"/proc/{workers[1]}")
    process.kill(signal.SIGTERM)
    assert "stopped after step" in process.wait().stderr


def test_sigterm_to_torchrun_and_all_it_started(torchrun, tmp_path):
    """As a cluster's scheduler sends it: each process gets it twice, for torchrun passes its own on."""
    out = tmp_path / "run"
    process, workers = torchrun()
    for pid in (*reversed(workers), *process.pids):
        os.kill(pid, signal.SIGTERM)
    assert wait_for(lambda: process.poll() is not None, seconds=100)
    done = process.wait()
    steps = steps_done(out)
    assert f"stopped after step {steps} of 10000" in done.stderr
    # torchrun's own end, whatever its processes did.
    assert done.returncode == 1 and "SignalException" in done.stderr
    assert (out / "checkpoints" / f"step-{steps}").exists() and (out / "model").exists()


def test_a_mistake_is_told_once_although_the_first_process_is_slow(killed_inside, tmp_path):
    """torchrun ends the others as soon as one has ended."""
    late = "if os.environ['RANK'] == '0': time.sleep(2)"
    done = killed_inside(late, "--train_len", 0, "--out", tmp_path / "run", processes=2)
    said = "error: --train_len: must be at least 1, not 0; see python train.py --help"
    assert done.returncode == 1 and only_error(done.stderr) == said


def test_processes_with_different_arguments(start, short, tmp_path):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    together = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    both = []
    for rank in range(2):
        own = ("--out", tmp_path / "run", "--steps", 3, "--seed", rank)
        both.append(start("train.py", *short, *own, env=together | {"RANK": rank, "LOCAL_RANK": rank}))
    told = [process.wait() for process in both]
    assert [done.returncode for done in told] == [2, 2], told
    assert "seed differs between processes: [0, 1]" in told[0].stderr and "Traceback" not in told[0].stderr
    assert not told[1].stderr.strip()
    assert not (tmp_path / "run").exists()
