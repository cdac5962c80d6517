"""Sharding: what each process loads, holds and computes; what a checkpoint is on disk."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import ROOT

import fsdp
from storage.files import InputError

BEGIN = """
import sys
from functools import partial
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch, torch.distributed as dist
import fsdp, weights

folder = Path(sys.argv[2])
device = fsdp.start("cpu")
rank, world = dist.get_rank(), dist.get_world_size()

def sharded(*how):
    model, wanted, files = weights.check(folder)
    fsdp.shard(model, device, *how)
    weights.fill(model, wanted, files)
    return model
"""


@pytest.fixture
def launch(run, tmp_path):
    """launch(script, folder, processes) -> the lines that the processes print."""

    def start(script, folder, processes):
        (tmp_path / "script.py").write_text(BEGIN + script + "\nfsdp.leave()\n")
        done = run(tmp_path / "script.py", ROOT, folder, processes=processes, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return start


def gptj(tmp_path):
    """Its rotary pairs are interleaved: the rows of q and k change places across the borders of the
    shards."""
    model = transformers.GPTJForCausalLM(
        transformers.GPTJConfig(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=64, rotary_dim=8)
    )
    for p in model.parameters():  # its own biases are zero
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.12)
    model.save_pretrained(tmp_path / "gptj")
    return tmp_path / "gptj"


# ---------------------------------------------------------------- loading


COMPARE = """
for dtype in (torch.float32, torch.bfloat16):
    plain = dict(weights.load(folder, dtype=dtype).named_parameters())
    for cpu_offload in (False, True):
        own = dict(sharded(dtype, dtype, "none", cpu_offload).named_parameters())
        assert own.keys() == plain.keys()
        assert all(p.dtype == dtype and torch.equal(getattr(p, "full_tensor", lambda p=p: p)(), plain[name]) for name, p in own.items())
"""


@pytest.mark.parametrize(
    "family", [{"tie_word_embeddings": True}, {"vocab_size": 321}, {"family": "Qwen2"}, "gptj"], ids=str
)
def test_sharded_loading_reads_the_same_weights(launch, make_llama, tmp_path, family):
    """Three processes: no size divides by three, the last process may hold fewer rows or none."""
    launch(COMPARE, gptj(tmp_path) if family == "gptj" else make_llama(**family)[0], 3)


MEASURE = """
import threading, time

def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

before, most = held(), [0]
def watch():
    while True:
        most[0] = max(most[0], held() - before)
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
model = sharded(torch.float32)
print("held", most[0], flush=True)
"""


def test_each_process_holds_its_share_and_one_tensor(launch, make_llama):
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    folder, model = make_llama(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, **heads)
    size = sum(p.nbytes for p in model.parameters())
    assert size > 100e6
    for held in (int(line.split()[1]) for line in launch(MEASURE, folder, 4)):
        assert held < 0.4 * size, f"{held / 1e6:.0f} MB of {size / 1e6:.0f} MB"


# ---------------------------------------------------------------- gradients


GRADIENTS = """
from torch.utils._python_dispatch import TorchDispatchMode

torch.compile = partial(torch.compile, backend="aot_eager")  # the same graphs, without minutes of C++

class Count(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        seen.append(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))

plain = weights.load(folder, dtype=torch.float32)
tokens, targets = torch.randint(plain.config.vocab_size, (2, 4, 48), generator=torch.Generator().manual_seed(0))
positions = torch.cat((torch.arange(20), torch.arange(900, 928))).expand(4, 48)
torch.nn.functional.cross_entropy(plain(tokens, positions).flatten(0, 1), targets.flatten()).backward()
share = 4 // world
for activation_checkpointing in ("none", "selective", "full"):
    for cpu_offload, compiled in ((False, False), (True, False), (False, True)):
        model, seen = sharded(torch.float32, torch.float32, activation_checkpointing, cpu_offload, compiled), []
        for i in range(rank * share, (rank + 1) * share):
            with Count() if not compiled else torch.enable_grad():
                (model(tokens[i : i + 1], positions[i : i + 1], targets[i : i + 1]) / tokens.numel() * world).backward()
        fsdp.average_vectors(model)
        own = {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in model.named_parameters()}
        for name, p in plain.named_parameters():
            error = (own.pop(name) - p.grad).norm() / p.grad.norm()
            assert error < 1e-5, (activation_checkpointing, cpu_offload, compiled, name, error)
        assert not own
        if rank == 0 and not compiled:
            print(activation_checkpointing, seen.count("mm") // share, seen.count("silu") // share, flush=True)
"""


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_way_to_save_memory_gives_the_same_gradients(launch, make_llama, processes):
    """Those of a plain model; and each mode computes again what it says: full all of a block, selective
    no matrix product."""
    folder, _ = make_llama(tie_word_embeddings=processes == 2)
    lines = launch(GRADIENTS, folder, processes)
    blocks, products = (
        2,
        3 * (2 * 7 + 1),
    )  # forward, and twice backward: seven products in each block, and the head's
    again = 6 * blocks  # of the last one in a block nobody needs the result again
    expected = {
        "none": (products, blocks),
        "selective": (products, 2 * blocks),
        "full": (products + again, 2 * blocks),
    }
    assert lines == [
        " ".join(map(str, (mode, *counts))) for mode, counts in expected.items() for _ in range(2)
    ]  # offload or not


# ---------------------------------------------------------------- checkpoints on disk


@pytest.fixture
def process_group():
    fsdp.start("cpu")
    yield
    dist.destroy_process_group()


def model_and_optimizer(value):
    model = torch.nn.Linear(4, 4)
    torch.nn.init.constant_(model.weight, value)
    return model, torch.optim.AdamW(model.parameters())


def save(checkpoints, step):
    """A checkpoint whose weights are the number of its step."""
    checkpoints.save(*model_and_optimizer(step), step)
    checkpoints.finish()


def load(checkpoints):
    """-> the step, after a look at the weights, and what was said."""
    (model, optimizer), said = model_and_optimizer(0), []
    step = checkpoints.load(model, optimizer, said.append)
    assert bool((model.weight == step).all())
    return step, said


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_checkpoint_has_its_name_only_when_it_is_on_disk(process_group, tmp_path, monkeypatch):
    """Every file and the folder before the rename, the name before an older checkpoint goes."""
    happened = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (happened.append(("sync", os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))
    )
    monkeypatch.setattr(
        Path, "rename", lambda self, to: (happened.append(("rename", str(to))), rename(self, to))
    )
    checkpoints = fsdp.Checkpoints(tmp_path / "c", {}, 1)
    save(checkpoints, 1)
    happened.clear()
    save(checkpoints, 2)
    named = happened.index(("rename", str(tmp_path / "c" / "step-2")))
    on_disk = {path for what, path in happened[:named] if what == "sync"}
    aside = tmp_path / "c" / "step-2.tmp"
    assert on_disk >= {str(aside), *(str(aside / name) for name in names(tmp_path / "c" / "step-2"))}
    after = happened[named:]
    assert after.index(("sync", str(tmp_path / "c"))) < after.index(
        ("rename", str(tmp_path / "c" / "step-1.old"))
    )
    assert names(tmp_path / "c") == {"step-2"}


def test_a_damaged_checkpoint_never_pushes_out_a_good_one(process_group, tmp_path):
    checkpoints = fsdp.Checkpoints(tmp_path, {}, 2)
    save(checkpoints, 3)
    save(checkpoints, 6)
    (tmp_path / "step-6" / "__0_0.distcp").write_bytes(b"")
    (tmp_path / "step-5.tmp").mkdir()  # what a kill leaves
    checkpoints = fsdp.Checkpoints(tmp_path, {}, 1)
    step, said = load(checkpoints)
    assert step == 3 and "step-6 is damaged (__0_0.distcp" in said[0]
    assert names(tmp_path) == {"step-3", "step-6"}
    save(checkpoints, 4)
    assert names(tmp_path) == {"step-4"}
    assert load(checkpoints) == (4, [])


def test_every_file_of_a_checkpoint_is_checked(process_group, tmp_path):
    checkpoints = fsdp.Checkpoints(tmp_path, {}, 2)
    save(checkpoints, 3)
    save(checkpoints, 6)
    for path in (tmp_path / "step-6").iterdir():
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        step, said = load(checkpoints)
        assert step == 3 and path.name in said[0]
        path.write_bytes(content)
    assert load(checkpoints) == (6, [])


def test_what_differs_from_the_run_of_a_checkpoint_is_named(process_group, tmp_path):
    save(fsdp.Checkpoints(tmp_path, {"lr": 1.0, "seed": 0}, 2), 3)
    with pytest.raises(InputError, match="step-3 is of another run: lr was 1.0, now 2.0;"):
        load(fsdp.Checkpoints(tmp_path, {"lr": 2.0, "seed": 0}, 2))
