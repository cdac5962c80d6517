"""What a run outlives: kills, damaged checkpoints, another number of processes, the death of a process."""
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_train import losses, metrics, short, texts, train  # noqa: F401 (fixtures)

import data
import tokenizer
import weights


def start(short, out, *arguments, processes=None, **env):  # noqa: F811
    launcher = [sys.executable] + (["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else [])
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


def test_kills_lose_nothing_but_the_steps_since_the_last_checkpoint(short, train, tmp_path):  # noqa: F811
    """SIGKILL at random moments, nearly all of them while a checkpoint is being written (there is one a step)."""
    arguments = ("--steps", 12 * (KILLS + 1), "--save_every", 1)
    whole = losses(train("whole", *arguments))
    out, rng, resume = tmp_path / "killed", random.Random(), []
    for _ in range(KILLS):
        process = start(short, out, *arguments, *resume)
        assert wait_for(lambda: steps_done(out) >= 1, process), process.communicate()[1]
        saved = {p.name for p in (out / "checkpoints").glob("step-*") if p.suffix != ".tmp"} if resume else set()
        time.sleep(rng.uniform(0, 6.0 if resume else 1.0))  # a resumed run needs seconds to start
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        resume = ["--resume"]
        newest = max((int(p.name[5:]) for p in (out / "checkpoints").glob("step-*") if p.suffix != ".tmp"), default=0)
        assert newest >= max((int(name[5:]) for name in saved), default=0)  # no checkpoint is lost
        assert steps_done(out) - newest <= 3  # the one in the background, the one being copied, the step between
    resumed = losses(train("killed", *arguments, "--resume"))
    assert torch.equal(resumed, whole)
    assert {p.name for p in (out / "checkpoints").iterdir()} == {f"step-{12 * (KILLS + 1) - i}" for i in range(2)}  # no leftovers


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
    done = run("train.py", *short, "--steps", 6, "--out", out, "--resume")
    assert done.returncode == 2 and "no checkpoint there is whole" in done.stderr.splitlines()[-1]


def test_a_checkpoint_of_another_run(finished, run, short):  # noqa: F811
    out, _ = finished
    record = out / "checkpoints" / "step-6" / "checkpoint.json"
    record.write_text(record.read_text().replace('"lr": 0.001', '"lr": 0.002'))
    done = run("train.py", *short, "--steps", 6, "--out", out, "--resume")
    assert done.returncode == 2 and "step-6 is of another run: lr was 0.002, now 0.001" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("processes", [None, 4])
def test_another_number_of_processes_goes_on(short, train, tmp_path, processes):  # noqa: F811
    whole = losses(train("two", "--steps", 6, "--save_every", 3, processes=2))
    shutil.rmtree(tmp_path / "two" / "model")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-6")
    resumed = losses(train("two", "--steps", 6, "--resume", processes=processes))
    assert len(resumed) == 6 and torch.equal(resumed[:3], whole[:3])
    torch.testing.assert_close(resumed, whole, rtol=1e-5, atol=0)


def test_the_death_of_a_process_ends_all(short, tmp_path):  # noqa: F811
    process = start(short, tmp_path / "run", "--steps", 10000, processes=2)
    assert wait_for(lambda: steps_done(tmp_path / "run") >= 3, process)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert wait_for(lambda: not os.path.exists(f"/proc/{workers[0]}"), seconds=40)
    process.stderr.close()


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
    assert "seed differs between processes: [0, 1]" in told[0] and "Traceback" not in told[0] and not told[1].strip()
    assert not (tmp_path / "run").exists()


LOAD = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
import torch, fsdp, weights
from pathlib import Path

def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

model, wanted, files = weights.check(Path(sys.argv[2]))
device = fsdp.start("cpu")
before, most = held(), [0]
def watch():
    while True:
        most[0] = max(most[0], held() - before)
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
fsdp.shard(model, device, torch.float32)
weights.fill(model, wanted, files)
whole = {name: p.full_tensor() for name, p in model.named_parameters()} if sys.argv[3] == "compare" else {}
plain = dict(weights.load(sys.argv[2]).named_parameters()) if whole else {}
assert all(torch.equal(whole[name], plain[name]) for name in plain)
print("held", most[0], flush=True)
fsdp.leave()
"""


def load(folder, how, processes, tmp_path):
    (tmp_path / "load.py").write_text(LOAD)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, tmp_path / "load.py", ROOT, folder, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return [int(line.split()[-1]) for line in done.stdout.splitlines() if "held" in line]


@pytest.mark.parametrize("family", [{"tie_word_embeddings": True}, {"vocab_size": 321}, {"family": "Qwen2"}], ids=str)
def test_sharded_loading_reads_the_same_weights(make_llama, tmp_path, family):
    """Three processes: no size divides by three, the last process may hold fewer rows or none."""
    load(make_llama(**family)[0], "compare", 3, tmp_path)


def test_each_process_holds_its_share_and_one_tensor(make_llama, tmp_path):
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    folder, model = make_llama(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, **heads)
    size = sum(p.nbytes for p in model.parameters())
    assert size > 100e6
    for held in load(folder, "measure", 4, tmp_path):
        assert held < 0.4 * size, f"{held / 1e6:.0f} MB of {size / 1e6:.0f} MB"


def test_validation_and_tensorboard(train, tmp_path, texts):  # noqa: F811
    """The last validation is that of the model that is written; the loss of a plain forward pass over the same windows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = ("--steps", 3, "--eval_every", 2, "--eval_data", texts, "--eval_lengths", "64,500", "--tensorboard")
    lines = train("run", *settings, processes=2)
    assert ["validation" in line for line in lines] == [False, True, True]
    model, tok = weights.load(tmp_path / "run" / "model", dtype=torch.float32), tokenizer.load(weights.resolve("tiny"))
    documents = data.prepare([texts], tok, weights.cache_dir())
    for n in (64, 500):
        nats = []
        for i in range(len(documents)):
            row = torch.tensor([[tok.bos_id, *documents[i][:n].tolist()]])
            with torch.no_grad():
                nats.append(torch.nn.functional.cross_entropy(model(row[:, :-1]).flatten(0, 1), row[:, 1:].flatten()).item())
        assert lines[-1]["validation"][str(n)] == pytest.approx(sum(nats) / len(nats), rel=1e-3)  # the written weights are bfloat16
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for key in ("loss", "lr", "grad_norm"):
        assert [e.value for e in events.Scalars(key)] == pytest.approx([line[key] for line in lines], rel=1e-6)
    assert [e.step for e in events.Scalars("validation/500")] == [2, 3]
