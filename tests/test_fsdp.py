"""Sharding: what each process loads, holds and computes."""

import pytest
import torch
import transformers
from conftest import ROOT

import fsdp
from model import Config, empty_transformer

BEGIN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch, torch.distributed as dist
import fsdp, model as decoder
from cli import process
from hf import weights
from hf.folder import CheckpointFolder
from model import empty_transformer

folders = [Path(path) for path in sys.argv[2:]]
device = fsdp.start("cpu")
rank, world = dist.get_rank(), dist.get_world_size()

def sharded(path, *how, adapters=()):
    folder = CheckpointFolder(path)
    model = empty_transformer(folder.config)
    if adapters:
        decoder.add_adapters(model, *adapters)
    fsdp.shard(model, device, *how)
    torch.set_num_threads(1)  # for a model this small; cpu_offload takes all there are
    folder.read_into(model)
    return model

def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
"""


@pytest.fixture
def launch(run, tmp_path):
    """launch(script, processes, *folders) -> the lines that the processes print."""

    def start(script, processes, *folders):
        (tmp_path / "script.py").write_text(BEGIN + script + "\nprocess.leave(0)\n")
        done = run(tmp_path / "script.py", ROOT, *folders, processes=processes, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return start


def gptj(folder):
    """Write a GPT-J, and return its folder.

    Its rotary pairs are interleaved: the rows of q and k change places across the borders of the shards.
    """
    sizes = {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8}
    model = transformers.GPTJForCausalLM(transformers.GPTJConfig(**sizes))
    for p in model.parameters():  # its own biases are zero
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.12)
    model.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- loading


COMPARE = """
for path in folders:
    for dtype in (torch.float32, torch.bfloat16):
        plain = dict(weights.load(path, dtype=dtype).named_parameters())
        for cpu_offload in (False, True):
            own = dict(sharded(path, dtype, dtype, "none", cpu_offload).named_parameters())
            assert own.keys() == plain.keys()
            for name, p in own.items():
                what = (path.name, dtype, cpu_offload, name)
                assert p.dtype == dtype and torch.equal(whole(p), plain[name]), what
"""


def test_sharded_loading_reads_the_same_weights(launch, make_llama, tmp_path):
    """Three processes: no size divides by three, the last process may hold fewer rows or none."""
    tied, _ = make_llama("tied", tie_word_embeddings=True)
    odd, _ = make_llama("odd", vocab_size=321)
    biased, _ = make_llama("biased", family="Qwen2")
    fused, _ = make_llama("fused", family="Phi3", pad_token_id=None)
    fused_by_head, _ = make_llama("fused_by_head", family="GPTNeoX")
    launch(COMPARE, 3, tied, odd, biased, fused, fused_by_head, gptj(tmp_path / "gptj"))


MEASURE = """
import threading, time

def held():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

before, most = held(), [0]
def watch():
    while True:
        most[0] = max(most[0], held() - before)
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
model = sharded(folders[0], torch.float32)
print("held", most[0], flush=True)
"""


def test_each_process_holds_its_share_and_one_tensor(launch, make_llama):
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    folder, model = make_llama(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, **heads)
    size = sum(p.nbytes for p in model.parameters())
    assert size > 100e6
    for held in (int(line.split()[1]) for line in launch(MEASURE, 4, folder)):
        assert held < 0.4 * size, f"{held / 1e6:.0f} MB of {size / 1e6:.0f} MB"


# ---------------------------------------------------------------- gradients


GRADIENTS = """
from functools import partial
from torch.utils._python_dispatch import TorchDispatchMode

torch.compile = partial(torch.compile, backend="aot_eager")  # the same graphs, without minutes of C++

class Count(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        seen.append(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))

plain = weights.load(folders[0], dtype=torch.float32)
rng = torch.Generator().manual_seed(0)
tokens, targets = torch.randint(plain.config.vocab_size, (2, 4, 48), generator=rng)
block = sum(p.numel() for p in plain.blocks[0].parameters())
# What FSDP gathers together: both blocks, the whole model, each block by itself.
fsdp.SMALLEST_GROUP = {1: 2 * block, 2: 100 * block, 4: 1}[world]
positions = torch.cat((torch.arange(20), torch.arange(900, 928))).expand(4, 48)
torch.nn.functional.cross_entropy(plain(tokens, positions).flatten(0, 1), targets.flatten()).backward()
share = 4 // world
for activation_checkpointing in ("none", "selective", "full"):
    for cpu_offload, compiled in ((False, False), (True, False), (False, True)):
        if compiled and world == 4:
            continue  # which takes seconds in each process
        how = (activation_checkpointing, cpu_offload, compiled)
        model, seen = sharded(folders[0], torch.float32, torch.float32, *how), []
        for i in range(rank * share, (rank + 1) * share):
            with Count() if not compiled else torch.enable_grad():
                loss = model(tokens[i : i + 1], positions[i : i + 1], targets[i : i + 1])
                (loss / tokens.numel() * world).backward()
        fsdp.average_vector_gradients(model)
        own = {name: whole(p.grad) for name, p in model.named_parameters()}
        for name, p in plain.named_parameters():
            error = (own.pop(name) - p.grad).norm() / p.grad.norm()
            assert error < 1e-5, (*how, name, error)
        assert not own
        if rank == 0 and not compiled:
            products, activations = seen.count("mm") // share, seen.count("silu") // share
            print(activation_checkpointing, products, activations, flush=True)
"""


@pytest.mark.parametrize("layers", range(1, 8))
def test_groups_are_runs_of_blocks_and_none_is_longer_than_needed(layers, monkeypatch):
    model = empty_transformer(Config(64, 8, 8, layers, 1, 1, 8, 64))

    def size(blocks):
        return sum(p.numel() for block in blocks for p in block.parameters())

    monkeypatch.setattr(fsdp, "SMALLEST_GROUP", 2 * size(model.blocks[:1]) + 1)
    groups = fsdp.groups_of_blocks(model)
    in_groups = [block for group in groups for block in group]
    assert in_groups == list(model.blocks[: len(in_groups)])
    for group in groups:
        assert size(group[:-1]) < fsdp.SMALLEST_GROUP <= size(group)
    assert size(model.blocks[len(in_groups) :]) < fsdp.SMALLEST_GROUP


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_way_to_save_memory_gives_the_same_gradients(launch, make_llama, processes):
    """The gradients are those of a plain model, and each mode computes again what it says.

    full: all of a block. selective: no matrix product.
    """
    settings = {
        1: {"family": "SmolLM3", "no_rope_layers": [0, 1], "pad_token_id": None},
        2: {"tie_word_embeddings": True},
        4: {"family": "Qwen3"},
    }
    folder, _ = make_llama(**settings[processes])
    lines = launch(GRADIENTS, processes, folder)
    blocks = 2
    # Forward, and twice backward: seven products in each block, and the head's.
    products = 3 * (2 * 7 + 1)
    # Of the last product in a block nobody needs the result again.
    again = 6 * blocks
    expected = {
        "none": (products, blocks),
        "selective": (products, 2 * blocks),
        "full": (products + again, 2 * blocks),
    }
    by_mode = [f"{mode} {products} {activations}" for mode, (products, activations) in expected.items()]
    assert lines == [line for line in by_mode for _ in range(2)]  # offload or not


FLOAT8 = """
plain = weights.load(folders[0], dtype=torch.float32)
plain.compute_dtype = torch.bfloat16
model = sharded(folders[0], torch.bfloat16, torch.float32, "selective")
tokens, targets = torch.randint(320, (2, world, 48), generator=torch.Generator().manual_seed(0))
for decoding, rows in ((plain, range(world)), (model, [rank])):
    decoder.multiply_in_float8(decoding)
    for i in rows:
        decoding(tokens[i : i + 1], None, targets[i : i + 1]).backward()
fsdp.average_vector_gradients(model)
for name, p in model.blocks.named_parameters():
    expected = plain.blocks.get_parameter(name).grad / world
    error = (whole(p.grad) - expected).norm() / expected.norm()
    assert error < 1e-5, (name, error)
"""


def test_float8_has_the_same_gradients_sharded(launch, make_llama):
    """FSDP hands out weights in bfloat16. A single process rounds them to that before float8, too."""
    launch(FLOAT8, 2, make_llama()[0])


ADAPTERS = """
from functools import partial
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

torch.compile = partial(torch.compile, backend="aot_eager")

class Count(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.mm.default:
            seen.append("narrow" if args[0].shape[1] == 4 else "wide")  # what it sums over
        return op(*args, **(kwargs or {}))

plain = weights.load(folders[0], dtype=torch.float32)
rng = torch.Generator().manual_seed(0)
tokens, targets = torch.randint(plain.config.vocab_size, (2, 2, 48), generator=rng)
pairs = {}
for name, weight in plain.named_parameters():
    if "blocks" in name and weight.dim() == 2:
        shapes = (4, weight.shape[1]), (len(weight), 4)
        pairs[name] = tuple(0.3 * torch.randn(*shape, generator=rng) for shape in shapes)
        for part in pairs[name]:
            part.requires_grad_()
changed = {name: plain.get_parameter(name) + 0.5 * b @ a for name, (a, b) in pairs.items()}
logits = functional_call(plain, changed, (tokens,))
torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
for activation_checkpointing, compiled in (
    ("none", False), ("selective", False), ("full", False), ("full", True)
):
    adapters = 4, 2, decoder.linear_layers(plain.config)
    how, seen = (activation_checkpointing, False, compiled), []
    model = sharded(folders[0], torch.float32, torch.float32, *how, adapters=adapters)
    for name, pair in pairs.items():
        adapter = model.get_submodule(name.removesuffix(".weight")).adapter
        for parameter, value in zip((adapter.a, adapter.b), pair):
            parameter.data.copy_(value)
    with Count() if not compiled else torch.enable_grad():
        model(tokens, None, targets).backward()
    if not compiled:
        print(activation_checkpointing, seen.count("narrow"), seen.count("wide"))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, pair in pairs.items():
        for letter, part in zip("ab", pair):
            error = (found.pop(name.replace("weight", f"adapter.{letter}")) - part.grad).norm()
            assert error / part.grad.norm() < 1e-4, (*how, name, letter, error)
    assert not found

rounded = sharded(folders[0], torch.bfloat16, adapters=adapters)
whole_weights = sharded(folders[0], torch.bfloat16)
for name, p in rounded.named_parameters():
    is_frozen_matrix = p.dim() == 2 and "adapter" not in name
    assert p.dtype == (torch.bfloat16 if is_frozen_matrix else torch.float32), name
    if ".adapter." in name:
        p.data.zero_()
with torch.no_grad():
    assert torch.equal(rounded(tokens), whole_weights(tokens))
"""


def test_adapters_have_the_same_gradients_in_every_way_to_save_memory(launch, make_llama):
    """They are those of the parts of whole weights W + B A. The first block's input needs no gradient.

    selective: of a layer's products only an adapter's second one is computed again, whose result is as large
    as the layer's own. full: the last layer's own is not. Frozen matrices are rounded when they are read,
    with the result that they have when they are rounded where they are used. Sharded: test_lora.py.
    """
    modes = [line.split() for line in launch(ADAPTERS, 1, make_llama()[0])]
    narrow, wide = ({mode: int(counts[i]) for mode, *counts in modes} for i in range(2))
    assert narrow["selective"] - narrow["none"] == narrow["full"] - narrow["none"] == 2 * 7
    assert wide["selective"] == wide["none"]
    assert wide["full"] - wide["none"] == 2 * (7 + 7 - 1)
