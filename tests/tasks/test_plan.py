"""The plan of a run beside what is counted, and what was measured on GPUs."""

import gc
import json
import re
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, metrics, needs_gpu
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fsdp
import model as decoder
from bench import SHAPES, shape
from hf.builtin import open_model, resolve
from model import (
    Config,
    Transformer,
    add_adapters,
    chunked_cross_entropy,
    cross_entropy_and_gradient,
    empty_transformer,
    linear_layers,
    multiply_in_float8,
)
from tasks import announcement, plan

DEEP = Config(320, 64, 176, 6, 4, 2, 16, 64)
WIDE = Config(4096, 96, 256, 2, 4, 4, 24, 64, tie_embeddings=True)
PARALLEL = Config(
    320, 96, 384, 4, 4, 4, 24, 64, norm="layer", mlp="gelu", parallel=True, qkv_bias=True, mlp_bias=True
)
DTYPES = {2: torch.bfloat16, 4: torch.float32}


def trainable(config, way, device="cpu", lora_rank=0):
    """Return a model and its optimizer, prepared as fsdp.shard prepares those of a single process."""
    torch.manual_seed(0)
    model = Transformer(config).to(device)
    if lora_rank:
        add_adapters(model, lora_rank, lora_rank, linear_layers(config))
    if way.float8:
        multiply_in_float8(model)
    for parameter in model.parameters():
        is_frozen_matrix = parameter.dim() > 1 and not parameter.requires_grad
        parameter.data = parameter.data.to(DTYPES[way.compute_bytes if is_frozen_matrix else way.param_bytes])
    model.compute_dtype = DTYPES[way.compute_bytes]
    for block in model.blocks:
        fsdp.checkpoint_activations(block, way.activation_checkpointing)
        if way.compiled:
            block.forward = torch.compile(block.forward, fullgraph=True)
    if way.compiled:
        model.cross_entropy = torch.compile(model.cross_entropy)
    return model, fsdp.adamw(model, 1e-4)


def take_step(model, optimizer, way, device="cpu", look=lambda: None):
    """Take a training step on random tokens. look() is called where gradients and moments are there."""
    for _ in range(way.micro_batches):
        tokens, targets = torch.randint(model.config.vocab_size, (2, way.examples, way.train_len)).to(device)
        positions = torch.arange(way.train_len, device=device).expand(tokens.shape)
        model(tokens, positions, targets, torch.ones(tokens.shape, device=device)).backward()
    optimizer.step()
    look()
    optimizer.zero_grad()


@pytest.mark.parametrize("config", [DEEP, WIDE, PARALLEL], ids=["deep", "wide", "parallel"])
@pytest.mark.parametrize("param_bytes, lora_rank", [(2, 0), (4, 0), (4, 8)])
def test_weights_gradients_and_moments_are_those_of_the_optimizer(config, param_bytes, lora_rank):
    way = plan.Way(8, micro_batches=2, param_bytes=param_bytes, compute_bytes=2 if lora_rank else 4)
    model, optimizer = trainable(config, way, lora_rank=lora_rank)
    counted = {}

    def count():
        parameters = list(model.parameters())
        counted["weights"] = sum(p.nbytes for p in parameters)
        counted["gradients"] = sum(p.grad.nbytes for p in parameters if p.grad is not None)
        moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        counted["optimizer"] = sum(moment.nbytes for moment in moments)

    take_step(model, optimizer, way, look=count)
    need = plan.memory(plan.Shape(model), way)
    assert {name: getattr(need, name) for name in counted} == counted
    assert plan.Shape(model).parameters == sum(p.numel() for p in model.parameters())


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.drop, storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def drop(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


# (Config, Way): the peak is in the loss, at the beginning or at the end of the backward pass.
WAYS = {
    "deep": (DEEP, plan.Way(128, 2)),
    "deep, bfloat16": (DEEP, plan.Way(128, 2, compute_bytes=2)),
    "deep, float8": (DEEP, plan.Way(128, 2, compute_bytes=2, float8=True)),
    "deep, all bfloat16": (DEEP, plan.Way(128, 2, param_bytes=2, compute_bytes=2)),
    "deep, selective": (DEEP, plan.Way(128, 4, compute_bytes=2, activation_checkpointing="selective")),
    "deep, full": (DEEP, plan.Way(128, 4, activation_checkpointing="full")),
    "deep, few tokens": (DEEP, plan.Way(16, 1, activation_checkpointing="full")),
    "wide, twice": (WIDE, plan.Way(64, 2, micro_batches=2)),
    "wide, bfloat16": (WIDE, plan.Way(64, 2, compute_bytes=2, activation_checkpointing="full")),
    "parallel": (PARALLEL, plan.Way(128, 2)),
    "parallel, selective": (PARALLEL, plan.Way(128, 2, activation_checkpointing="selective")),
    "deep, LoRA": (DEEP, plan.Way(128, 2, compute_bytes=2)),
    "wide, LoRA": (WIDE, plan.Way(64, 2, micro_batches=2, compute_bytes=2)),
    "deep, LoRA, full": (DEEP, plan.Way(128, 4, compute_bytes=2, activation_checkpointing="full")),
}


@pytest.mark.parametrize("name", WAYS)
def test_the_peak_of_a_step_is_planned(name):
    """Of all tensors that live at once, in the second step: in the first there are no moments yet."""
    config, way = WAYS[name]
    with Held() as held:
        model, optimizer = trainable(config, way, lora_rank=2 if "LoRA" in name else 0)
        for parameter in model.parameters():
            held.add(parameter)
        take_step(model, optimizer, way)
        held.peak = held.now
        take_step(model, optimizer, way)
    # What a block frees while it computes again is planned roughly. Frozen norms keep less than is planned.
    error = 0.15 if "LoRA" in name else 0.1 if way.activation_checkpointing == "full" else 0.05
    assert plan.memory(plan.Shape(model), way).total == pytest.approx(held.peak, rel=error)


def test_the_loss_holds_the_logits_of_one_chunk_at_a_time(monkeypatch):
    """Four chunks need no more memory than one, but for their hidden states and the gradient of these."""
    V, C, chunk = 512, 8, 16
    monkeypatch.setattr(decoder, "MAX_LOGITS", chunk * V)

    def peak(tokens):
        hidden, weight = torch.randn(tokens, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
        with Held() as held:
            targets, ones = torch.arange(tokens), torch.ones(tokens)
            chunked_cross_entropy(hidden, weight, None, targets, ones, cross_entropy_and_gradient)
        return held.peak

    assert peak(4 * chunk) - peak(chunk) < 4 * chunk * V / 4  # a quarter of a chunk's logits in float32


SHARDED = {
    # (Config, blocks in a group, tokens): what FSDP gathers is twice in memory at the loss; at the end the
    # gradients of embedding and head are, in two dtypes.
    "no groups": (Config(320, 128, 352, 2, 4, 2, 32, 64), 3, 128),
    "a large head": (Config(8192, 64, 176, 2, 4, 2, 16, 64), 1, 8),
}


@pytest.mark.parametrize("name", SHARDED)
def test_the_peak_of_a_sharded_step_is_planned(name, monkeypatch):
    """Beside PyTorch's own tracker, for one of four processes. The others are not there."""
    config, blocks_in_group, tokens = SHARDED[name]
    model = empty_transformer(config)
    of_block = sum(p.numel() for p in model.blocks[0].parameters())
    monkeypatch.setattr(fsdp, "SMALLEST_GROUP", blocks_in_group * of_block)
    way = plan.Way(tokens, processes=4, compute_bytes=2)
    torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        need = plan.memory(plan.Shape(model), way).total
        fsdp.shard(model, torch.device("cpu"), torch.bfloat16)
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        optimizer = fsdp.adamw(model, 1e-4)
        tracker = FSDPMemTracker(model, optimizer)
        tracker.track_inputs(())
        with tracker:
            take_step(model, optimizer, way)
            tracker.reset_mod_stats()
            take_step(model, optimizer, way)
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    finally:
        torch.distributed.destroy_process_group()
    assert 0.97 * peak < need < 1.12 * peak


# ---------------------------------------------------------------- beside GPUs


def measured():
    """Yield (model, Way, GiB) of every training step in results/ whose peak memory was measured.

    The models have no values.
    """
    for path in sorted((ROOT / "results").glob("*.json")):
        report = json.loads(path.read_text())
        if report.get("task") not in ("train", "efficiency"):
            continue
        settings = report["settings"]
        for result in report["results"]:
            is_peers = result.get("side", "ours") != "ours"
            if is_peers or not result["peak_memory_gib"]:  # the latter ran out of memory
                continue
            is_full = result.get("method") == "full"
            way = plan.Way(
                train_len=int(result["target_len"] if is_full else settings["train_len"]),
                examples=int(settings["micro_batch_size"]),
                processes=result.get("processes", 1),
                param_bytes={"float32": 4, "bfloat16": 2}[settings["param_dtype"]],
                compute_bytes=2,
                activation_checkpointing=settings["activation_checkpointing"],
                cpu_offload=settings["cpu_offload"] == "True",
                compiled=True,
                float8=settings.get("float8") == "True" and settings.get("lora_rank", "0") == "0",
            )
            name = f"{path.stem} {way.train_len}"
            model = empty_transformer(shape(report["model"]))
            if rank := int(settings.get("lora_rank", 0)):
                add_adapters(model, rank, rank, linear_layers(model.config))
            yield pytest.param(model, way, result["peak_memory_gib"], id=name)
    of_recipe = plan.Way(32768, 1, micro_batches=4, compute_bytes=2, compiled=True)
    for folder in (".", "seed_1"):
        lines = (ROOT / "results" / folder / "train_metrics.jsonl").read_text().splitlines()
        gib = json.loads(lines[-1])["peak_memory_gib"]
        model = empty_transformer(SHAPES["smollm2-135m"])
        yield pytest.param(model, of_recipe, gib, id=f"{folder}/train_metrics")


@pytest.mark.parametrize("model, way, gib", list(measured()))
def test_what_was_measured_on_gpus_would_have_been_planned(model, way, gib):
    assert plan.memory(plan.Shape(model), way).total / 2**30 == pytest.approx(gib, rel=0.15)


LARGE = {
    "13b": (Config(32000, 5120, 13824, 40, 40, 40, 128, 4096), 13_015_864_320),
    "70b": (Config(32000, 8192, 28672, 80, 64, 8, 128, 4096), 68_976_648_192),
}


@pytest.mark.parametrize("processes", [1, 2, 8, 64])
@pytest.mark.parametrize("config, parameters", LARGE.values(), ids=LARGE)
def test_models_too_large_to_measure_are_planned_as_by_hand(config, parameters, processes):
    """LLaMA-2's shapes, of float32 weights, one window of 4,096 tokens, recomputing all of a block."""
    shape = plan.Shape(empty_transformer(config))
    assert shape.parameters == parameters
    way = plan.Way(
        4096,
        processes=processes,
        compute_bytes=2,
        activation_checkpointing="full",
        compiled=True,
    )
    block = (parameters - 2 * 32000 * config.hidden_dim) / config.n_layers
    state = 16 * parameters / processes  # weights, gradients and two moments
    inputs = 2 * config.n_layers * 4096 * config.hidden_dim
    # Of one block: inputs and outputs of norms, queries, keys, values, attention, gate, up, both together.
    numbers = 4 * config.hidden_dim + 2 * config.n_heads * 128 + 2 * config.n_kv_heads * 128
    again = 2 * 4096 * (numbers + 3 * config.intermediate_dim)
    # Embedding, head and two blocks in bfloat16, and the gradients of one in bfloat16 and float32.
    gathered = 2 * 2 * 32000 * config.hidden_dim + (2 * 2 + 2 + 4) * block if processes > 1 else 0
    # When the first gradients come all inputs are there, when the last ones come a single one.
    never_together = min(inputs, 4 * parameters / processes)
    by_hand = state + inputs + again + gathered
    assert 0.98 * (by_hand - never_together) < plan.memory(shape, way).total < 1.02 * by_hand


GPU_SHAPE = Config(32000, 1024, 2816, 8, 16, 8, 64, 2048)


@needs_gpu
@pytest.mark.parametrize(
    "way",
    [
        plan.Way(2048, 8, compute_bytes=2, compiled=True),
        plan.Way(
            2048, 4, micro_batches=2, compute_bytes=2, activation_checkpointing="selective", compiled=True
        ),
        plan.Way(2048, 8, param_bytes=2, compute_bytes=2, activation_checkpointing="full", compiled=True),
    ],
    ids=["none", "selective", "full, all bfloat16"],
)
def test_the_memory_of_a_gpu_is_planned(way):
    torch._dynamo.reset()
    gc.collect()  # What other tests leave must not be freed meanwhile.
    before = torch.cuda.memory_allocated()
    model, optimizer = trainable(GPU_SHAPE, way, "cuda")
    take_step(model, optimizer, way, "cuda")
    torch.cuda.reset_peak_memory_stats()
    take_step(model, optimizer, way, "cuda")
    peak = torch.cuda.max_memory_allocated() - before
    assert plan.memory(plan.Shape(model), way).total == pytest.approx(peak, rel=0.15)


# ---------------------------------------------------------------- ways that fit


def test_the_way_that_fits_costs_as_little_as_possible():
    """LLaMA-7B on a card of 80 GiB, on a smaller one, and on eight."""
    llama = plan.Shape(empty_transformer(SHAPES["llama-7b"]))
    way = plan.Way(2048, 16, micro_batches=4, compute_bytes=2, compiled=True)
    large, small = (plan.Room(n * 2**30, plan.CUDA_CONTEXT, 0, on_cpu=False) for n in (80, 24))
    found = plan.way_that_fits(llama, way, large)
    assert (found.param_bytes, found.cpu_offload) == (2, False)
    assert found.examples * found.micro_batches == 64
    assert plan.of_process(llama, found, large) <= large.memory
    assert plan.of_process(llama, replace(found, param_bytes=4), large) > large.memory
    assert plan.way_that_fits(llama, way, small).cpu_offload
    assert plan.way_that_fits(llama, way, replace(small, on_cpu=True)) is None
    # Eight cards share the weights, and nothing has to be changed.
    alone = plan.Way(2048, 1, processes=8, compute_bytes=2, compiled=True)
    assert plan.way_that_fits(llama, alone, large) == alone


class ThreeTexts:
    """What announcement.Needs asks of data.Batches."""

    documents, n_too_short, usable_tokens, counted_share, mean_window = [0, 0, 0], 0, 10**9, 1.0, 2048


@pytest.mark.parametrize("processes, host_gib, warns", [(1, 84, False), (1, 75, True), (4, 20, False)])
def test_a_checkpoint_has_to_fit_into_the_memory_of_the_host(processes, host_gib, warns):
    """It is copied there, and written while training goes on. LLaMA-7B's has 12 bytes a parameter."""
    llama = plan.Shape(empty_transformer(SHAPES["llama-7b"]))
    way = plan.Way(2048, 1, processes=processes, compute_bytes=2, compiled=True)
    room = plan.Room(200 * 2**30, plan.CUDA_CONTEXT, 10**15, on_cpu=False, host=host_gib * 2**30)
    needs = announcement.Needs(llama, way, 1000, 64, ThreeTexts, 2, room)
    assert needs.saving_bytes == 12 * llama.parameters / processes
    warnings = needs.warnings(str)
    assert len(warnings) == warns and all("a process needs 75.3 GiB" in line for line in warnings)


def test_the_operations_of_a_run_are_those_of_its_windows():
    """Half of the examples are two episodes in windows of 1,024, the others windows of 2,048."""
    llama = plan.Shape(empty_transformer(SHAPES["llama-7b"]))
    room = plan.Room(0, 0, 0, on_cpu=False)

    class WithEpisodes(ThreeTexts):
        mean_window = 1536

    needs = announcement.Needs(llama, plan.Way(2048), 10, 64, WithEpisodes, 1, room)
    by_window = [llama.config.flops_per_token(window) for window in (1024, 2048)]
    assert needs.flops == pytest.approx(10 * 64 * 2048 * sum(by_window) / 2)


@pytest.mark.parametrize(
    "seconds, words",
    [
        (0.2, "1 second"),
        (59, "59 seconds"),
        (61, "1 minute and 1 second"),
        (3600, "1 hour"),
        (12000, "3 hours and 20 minutes"),
        (46 * 3600, "1 day and 22 hours"),
        (11.4 * 86400, "11 days"),
    ],
)
def test_a_time_in_words(seconds, words):
    assert announcement.duration(seconds) == words


# ---------------------------------------------------------------- train.py --dry_run


@pytest.fixture
def planned(call, tmp_path):
    """planned(*arguments) -> what `train.py --dry_run` says of a run in tmp_path/run.

    It leaves nothing there.
    """

    def start(*arguments):
        done = call("train", *arguments, "--dry_run", "--out", tmp_path / "run")
        assert done.returncode == 0, done.stderr
        assert not done.stdout and not (tmp_path / "run").exists()
        return done.stderr

    return start


def test_a_plan_needs_no_weights(planned, texts, tmp_path):
    """What it says of tokens and parameters is counted here."""
    folder = tmp_path / "without weights"
    shutil.copytree(resolve("tiny"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    arguments = ("--device", "cpu", "--data", texts, "--steps", 40, "--batch_size", 4)
    said = planned("--model", folder, *arguments)
    tokeniser = open_model("tiny").load_tokenizer()
    lengths = [
        len(ids) for ids in tokeniser.encode_batch([json.loads(line)["text"] for line in texts.open()])
    ]
    assert "plan: 40 steps of 4 x 256 tokens on 1 process(es), 40,960 tokens; 2,164,416 parameters" in said
    read = f"{40960 / sum(lengths):.2f}"
    assert f"texts: {sum(lengths):,} tokens in {len(lengths)} document(s), each read {read} times; 0 " in said
    assert f"{folder} holds no safetensors" in said
    assert "time on one H100, if it reaches 40% of its peak: 1 second" in said  # 4e11 operations
    checkpoint = 3 * 4 * 2_164_416  # weights and two moments in float32
    assert f"disk: 4 MB for the model, {checkpoint / 1e6:.0f} MB for a checkpoint" in said
    assert re.search(
        r"GPU memory by the number of GPUs: \S+ \wiB on 1, \S+ \wiB on 2, \S+ \wiB on 4$", said, re.M
    )


def test_a_plan_is_for_the_processes_that_torchrun_starts(planned, short, monkeypatch, as_first_of):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "4 x 64 tokens on 1 process(es)" in planned(*short, "--steps", 3)  # a scheduler's, not torchrun's
    as_first_of(4)
    assert "4 x 64 tokens on 4 process(es)" in planned(*short, "--steps", 3)


@pytest.mark.parametrize(
    "processes, arguments, warns",
    [
        (16, (), False),  # 256 tokens each are the recipe's 4,096
        (11, ("--train_len", 128), False),  # 33 examples instead of 32, which 11 do not share evenly
        (2, ("--train_len", 1365), False),  # 4 examples instead of 3
        (4, ("--train_len", 2048), True),
        (32, (), True),
        (32, ("--train_len", 128), False),
        (32, ("--batch_size", 32), False),  # as it was asked for
        (1, ("--train_len", 8192), True),
    ],
)
def test_a_step_that_has_more_than_the_recipe_says(
    planned, tmp_path, as_first_of, processes, arguments, warns
):
    """Each process takes an example, so the number of processes may make more of them than a recipe has."""
    long = tmp_path / "long.txt"
    long.write_text("word " * 50_000)
    as_first_of(processes)
    fixed = ("--model", "tiny", "--device", "cpu", "--data", long, "--target_len", 16384)
    said = planned(*fixed, "--steps", 2, *arguments)
    line = f"warning: a step has 8,192 tokens instead of the recipe's 4,096, because each of {processes} "
    assert (line in said) == warns and ("the recipe's" in said) == warns


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((), "no interpolation"),  # though this recipe makes it for twice the target
        (("--rope", "linear"), "no interpolation"),
        (("--rope", "default"), "no interpolation"),
        (("--rope", "linear", "--factor", 2), "linear by 2"),
        (("--rope", "dynamic"), "dynamic"),
        (("--rope", "dynamic", "--factor", 1), "dynamic by 1"),  # its default, which grows with the length
    ],
)
def test_a_window_that_is_not_extended_is_no_extension(planned, short, arguments, says):
    said = planned(*short[:6], "--target_len", 256, *arguments).splitlines()
    assert said[0] == f"tiny: the window of 256 tokens stays as it is, pose, {says} (recipe tiny)"
    if says == "no interpolation":  # which every loader computes
        assert said[1].startswith("plan: ")


def test_a_plan_leaves_a_run_alone(train, call, short, tmp_path):
    train("run", "--steps", 2, "--save_every", 1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for more in ((), ("--resume", "--keep", 1)):
        done = call(
            "train", *short, "--steps", 2, "--save_every", 1, "--out", tmp_path / "run", "--dry_run", *more
        )
        assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "arguments, warned",
    [
        ((), set()),
        (("--steps", 500), {"passes over these texts"}),
        (
            ("--train_len", 4000, "--batch_size", 1, "--steps", 2),
            {"most documents are not longer"},
        ),
        (("--steps", 10**9), {"a CPU needs about", "passes over"}),
        (("--batch_size", 2**19, "--micro_batch_size", 2**19), {"this CPU is too small", "passes over"}),
    ],
    ids=["nothing", "passes", "short documents", "time", "memory"],
)
def test_what_speaks_against_a_run_is_said(planned, texts, tmp_path, arguments, warned):
    """One document is longer than the others, and 2**25 tokens at once need thousands of GiB."""
    documents = [json.loads(line)["text"] for line in texts.open()]
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": text}) + "\n" for text in (*documents, " ".join(documents))))
    sizes = ("--data", own, "--steps", 10, "--train_len", 64, "--batch_size", 4)
    said = planned("--model", "tiny", "--device", "cpu", "--target_len", 8192, *sizes, *arguments)
    lines = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert len(lines) == len(warned) and all(any(words in line for line in lines) for words in warned), said
    if "this CPU is too small" in warned:
        assert re.search(r"too small; --micro_batch_size \d+ makes it", said)


def test_the_memory_of_a_cpu_is_planned(run, texts, tmp_path):
    """As metrics.jsonl has it, of the whole process."""
    arguments = ("--model", "tiny", "--device", "cpu", "--data", texts, "--steps", 2, "--batch_size", 24)
    done = run("train.py", *arguments, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    planned_gib = float(re.search(r"memory of a process: (\S+) GiB of", done.stderr)[1])
    # It is said to a tenth of a GiB, and what glibc keeps differs between runs.
    assert planned_gib == pytest.approx(metrics(tmp_path / "run")[-1]["peak_memory_gib"], rel=0.2)
