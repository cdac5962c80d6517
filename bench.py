"""How fast, and in how much memory? Training, PoSE beside full-length training, and reading a long prompt in one pass.

    python bench.py --task train --model smollm2-135m --train_len 2048 --micro_batch_size 16 --compare transformers
    python bench.py --task efficiency --model smollm2-135m --plot efficiency.png        # the paper's Figure 3
    python bench.py --task prefill --model llama-7b --lengths 32768,131072

`--model` is a shape with random weights: a name of SHAPES, with `:8` for its first 8 layers, or a folder's config.json. The training step is
fsdp.update, that of train.py; torchrun runs it on several GPUs.

Notable choices:
- MFU counts 6 operations per weight in a matrix product, and causal attention once (Config.flops_per_token), over the card's bfloat16 peak.
- The peer's training loop is the usual one: the whole model under torch.compile, bfloat16 autocast, fused AdamW on float32 weights. It runs in
  the same process, in turns.
- `prefill` stands beside what nothing can avoid on that card: its matrix products and attention kernels alone, at the same sizes.
"""
import dataclasses
import gc
import importlib.util
import os
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

import data
import errors
import families
import fsdp
import report
import weights
from errors import UserError
from model import Config, Transformer, attention

SHAPES = {
    "smollm2-135m": Config(49152, 576, 1536, 30, 9, 3, 64, 8192, rope_theta=1e5, tie_embeddings=True),
    "llama-7b": Config(32000, 4096, 11008, 32, 32, 32, 128, 2048),
}
TURNS = 2  # of each side
BELONGS = {"plot": ("efficiency",), "compare": ("train", "prefill"), "lengths": ("efficiency", "prefill")} | dict.fromkeys(
    ("train_len", "micro_batch_size", "batch_size", "activation_checkpointing", "cpu_offload", "param_dtype"), ("train", "efficiency")
)  # option -> tasks


def parse_arguments():
    p = errors.ArgumentParser(description="Speed and memory, with random weights.")
    p.add_argument(
        "--task", choices=("train", "efficiency", "prefill"), required=True, help="a training step; PoSE's beside a full-length one; a long prompt"
    )
    p.add_argument("--model", help=f"{', '.join(SHAPES)}, NAME:LAYERS, tiny, or a folder (default: smollm2-135m with a GPU, else tiny)")
    p.add_argument("--lengths", help="efficiency: targets, prefill: prompts, in tokens (default: doubling from two windows, prefill one, to 131,072)")
    p.add_argument("--train_len", type=int, help="train, efficiency: tokens in a training example (default: the model's window)")
    p.add_argument("--micro_batch_size", type=int, help="train, efficiency: examples a process takes at once (default: 32,768 tokens; efficiency 1)")
    p.add_argument("--batch_size", type=int, help="train, efficiency: examples in a step, over all processes (default: one micro-batch each)")
    p.add_argument("--steps", type=int, default=10, help="timed steps, in two turns, or prompts (default: 10)")
    p.add_argument("--activation_checkpointing", choices=("none", "selective", "full"), default="none", help="as train.py's")
    p.add_argument("--cpu_offload", action="store_true", help="as train.py's")
    p.add_argument("--param_dtype", choices=("float32", "bfloat16"), default="float32", help="as train.py's")
    p.add_argument("--compare", choices=("transformers",), help="train, prefill: the same work there, in the same process")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="efficiency: time and memory by target")
    return p.parse_args()


def check(args, config):
    """Refuse what cannot run, and fill in the defaults that depend on the model."""
    errors.check_outputs(args.json, args.plot)
    errors.check_task(args, BELONGS)
    if args.compare and importlib.util.find_spec(args.compare) is None:
        raise UserError(f"--compare {args.compare}: not installed here; pip install {args.compare}")
    errors.at_least(args, 1, "steps", "train_len", "micro_batch_size", "batch_size")
    args.train_len = args.train_len or config.max_position_embeddings
    if args.task == "efficiency":
        args.micro_batch_size = args.micro_batch_size or 1
    if args.batch_size is None:
        args.batch_size = int(os.environ.get("WORLD_SIZE", 1)) * (args.micro_batch_size or max(1, 32768 // args.train_len))
    args.share, args.micro_batch_size = fsdp.split_batch(args.batch_size, args.micro_batch_size, args.train_len)
    first = 2 * args.train_len if args.task == "efficiency" else config.max_position_embeddings
    doubling = [first * 2**i for i in range(20) if first * 2**i <= 131072] or [first]
    args.lengths = doubling if args.lengths is None else errors.token_counts("--lengths", args.lengths)
    if args.task == "efficiency" and args.lengths[0] < args.train_len:
        raise UserError(f"--lengths {args.lengths[0]}: a target is at least the window of {args.train_len}; raise it or lower --train_len")


def shape(name):
    """The Config of a shape's name."""
    name, _, layers = name.partition(":")
    if name not in (*SHAPES, *weights.BUILT_IN) and not Path(name).is_dir():
        raise UserError(f"--model {name}: neither a folder nor a shape; those are {', '.join(SHAPES)} and tiny")
    config = SHAPES.get(name) or families.read_config(weights.resolve(name))
    if layers and not (layers.isdigit() and 1 <= int(layers) <= config.n_layers):
        raise UserError(f"--model {name}:{layers}: give a number of layers after the colon, at most {config.n_layers}")
    return dataclasses.replace(config, n_layers=int(layers or config.n_layers))


def peer(config, **more):
    """transformers' own model of that architecture, in float32."""
    import transformers

    written = families.hf_config(families.as_written(dataclasses.replace(config, dtype="float32")))
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**written | more))


class Clock:
    """Seconds that pieces of work take, the device's part included, and the most of its memory (in bytes) that was in use meanwhile."""

    def __init__(self, device):
        self.gpu, self.seconds, self.peak = device.type == "cuda", [], 0

    def __call__(self, work):
        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        result = work()
        if self.gpu:
            torch.cuda.synchronize()
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        self.seconds.append(time.perf_counter() - began)
        return result


def since_start():
    """Seconds since this process was started, imports included."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------- training


class RandomDocument:
    """One long document where data.Batches wants data.Documents."""

    def __init__(self, vocab_size, length):
        self.starts = np.array([0, length])
        self.tokens = np.random.default_rng(0).integers(vocab_size, size=length)

    def __getitem__(self, i):
        return self.tokens


def random_batches(config, args, sampling, device):
    """What train.py trains on, but of random tokens."""
    batches = data.Batches(RandomDocument(config.vocab_size, max(4 * sampling["train_len"], 2**20)), 0, **sampling)
    mine = range(dist.get_rank() * args.share, (dist.get_rank() + 1) * args.share)
    return data.prefetched(batches, 0, mine, device)


def our_step(config, args, sampling, device):
    """A function that makes one training step as train.py does -> (loss, seconds that it waited for its batch)."""
    with torch.device("meta"):
        model = Transformer(config)
    gpu = device.type == "cuda"
    dtypes = torch.bfloat16 if gpu else torch.float32, getattr(torch, args.param_dtype)
    fsdp.shard(model, device, *dtypes, args.activation_checkpointing, args.cpu_offload, compile=gpu)
    randomise(model, device)
    optimizer = fsdp.adamw(model, 1e-5)
    batches = random_batches(config, args, sampling, device)

    def step():
        began = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - began
        loss, _ = fsdp.update(model, optimizer, batch, args.micro_batch_size, args.batch_size * sampling["train_len"])
        return loss.item(), waited

    return step


@torch.no_grad()
def randomise(model, device):
    """The same random weights, whatever the number of processes and wherever the weights are."""
    for seed, p in enumerate(model.parameters()):
        whole = torch.randn(p.shape, generator=torch.Generator(device).manual_seed(seed), device=device) * 0.02 + (p.dim() == 1)
        if isinstance(p, DTensor):
            p.to_local().copy_(whole[families.own_rows(p)])
        else:
            p.copy_(whole)


def their_step(config, args, sampling, device):
    """The same of transformers: on a GPU the whole model compiled and bfloat16 autocast; float32 weights and AdamW."""
    torch.set_float32_matmul_precision("high")
    model = peer(config, use_cache=False).to(device).train()
    if args.activation_checkpointing != "none":  # it has one kind
        model.gradient_checkpointing_enable()
    gpu = device.type == "cuda"
    compiled = torch.compile(model) if gpu else model  # as ours
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    batches = random_batches(config, args, sampling, device)

    def step():
        tokens, _, _ = next(batches)
        for piece in tokens.split(args.micro_batch_size):
            with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
                loss = compiled(input_ids=piece, labels=piece).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), 0.0

    return step


def measure_training(config, args, sampling, device):
    """One entry of `results` for each side, ours first; they take turns. first_step_seconds: from its making on."""
    sides = []
    for name, make in (("ours", our_step), ("transformers", their_step))[: 2 if args.compare else 1]:
        held = torch.cuda.memory_allocated() if device.type == "cuda" else 0  # by the other side
        began = time.perf_counter()
        step = make(config, args, sampling, device)
        losses = [step()[0]]
        first, warm = time.perf_counter() - began, Clock(device)
        losses += [warm(step)[0] for _ in range(2)]
        memory = (warm.peak - held) / 2**30 if warm.peak else None
        entry = {"side": name, "first_step_seconds": first, "peak_memory_gib": memory, "losses": losses}
        sides.append((entry, step, Clock(device), []))
    for turn in range(TURNS):
        for entry, step, clock, waits in sides:
            for _ in range(turn, args.steps, TURNS):
                loss, waited = clock(step)
                entry["losses"].append(loss)
                waits.append(waited)
    peak_flops, tokens = fsdp.peak_flops(device), args.share * sampling["train_len"]
    for entry, _, clock, waits in sides:
        seconds = statistics.median(clock.seconds)
        mfu = tokens / seconds * config.flops_per_token(sampling["train_len"]) / peak_flops if peak_flops else None
        entry |= {"tokens_per_second": tokens / seconds, "step_seconds": seconds, "seconds": clock.seconds, "mfu": mfu}
        if entry["side"] == "ours":
            entry["waiting_for_data"] = statistics.median(waits) / seconds
    return [entry for entry, *_ in sides]


def train(config, args, device):
    started = since_start()
    results = measure_training(config, args, {"method": "pose", "train_len": args.train_len, "target_len": 16 * args.train_len}, device)
    results[0]["first_step_seconds"] += started
    for r in results:
        r |= {"train_len": args.train_len, "share": args.share, "micro_batch_size": args.micro_batch_size, "processes": dist.get_world_size()}
        slow, fast = (args.share * args.train_len / f(r["seconds"]) for f in (max, min))
        told = [f"{r['tokens_per_second']:,.0f} tokens/s a process ({slow:,.0f} to {fast:,.0f})", f"first step after {r['first_step_seconds']:.1f} s"]
        told += [f"MFU {r['mfu']:.1%}"] if r["mfu"] else []
        told += [f"{r['peak_memory_gib']:.1f} GiB"] if r["peak_memory_gib"] else []
        told += [f"waiting for data {r['waiting_for_data']:.2%}"] if "waiting_for_data" in r else []
        say(f"{r['side']}: " + ", ".join(told))
    return results


def efficiency(config, args, device):
    """Figure 3: step time and memory of PoSE at a fixed window, and of training at full length, by target."""
    results = []
    for target in args.lengths:
        for method in ("pose", "full"):
            sampling = {"method": method, "train_len": args.train_len if method == "pose" else target, "target_len": target}
            torch._dynamo.reset()
            try:
                entry = measure_training(config, args, sampling, device)[0]
            except torch.OutOfMemoryError:
                entry = {"step_seconds": None, "peak_memory_gib": None}
            results.append({"method": method, "target_len": target} | entry)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            seconds, memory = entry["step_seconds"], entry["peak_memory_gib"]
            told = (f"{seconds:.3f} s a step" if seconds else "out of memory") + (f", {memory:.2f} GiB" if memory else "")
            say(f"{method:<5} target {target:>9,}: {told}")
    return results


def draw_efficiency(results, path):
    from matplotlib.figure import Figure

    shown = {"step_seconds": "seconds a step", "peak_memory_gib": "peak memory, GiB"}
    shown = {key: label for key, label in shown.items() if any(r[key] for r in results)}  # memory: of a GPU alone
    figure = Figure(figsize=(4.5 * len(shown), 3.6), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)
    for axes, (key, label) in zip(panels[0], shown.items()):
        for method, name in (("full", "full-length"), ("pose", "PoSE")):
            points = [(r["target_len"], r[key]) for r in results if r["method"] == method and r[key]]
            axes.plot(*zip(*points), marker="o", label=name)
        report.length_axis(axes, sorted({r["target_len"] for r in results}), "target window, tokens")
        axes.set_ylabel(label)
        axes.set_ylim(0)
        axes.grid(alpha=0.3)
    panels[0, 0].legend()
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------- reading a prompt


@torch.no_grad()
def prefill(config, args, device):
    """Reading a prompt in one pass and naming the last 8 tokens, as eval.py scores a passkey, beside its kernels alone, and generate() there."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.to_empty(device=device)
    randomise(model, device)
    other = peer(config).to(dtype).to(device).eval() if args.compare else None
    work = {"ours": lambda prompt: partial(read, model, prompt), "kernels alone": lambda prompt: kernels(model, prompt.shape[1])}
    if other:
        work["transformers"] = partial(generating, other)
    results = []
    for length in args.lengths:
        tokens = torch.randint(config.vocab_size, (1, length), device=device)
        entry = {"length": length}
        for name, prepare in work.items():
            clock = Clock(device)
            try:
                prepare(tokens[:, :16384])()  # warm
                run = prepare(tokens)  # not before: its tensors are not part of another's memory
                for _ in range(args.steps):
                    clock(run)
            except torch.OutOfMemoryError:
                entry[name] = None
                say(f"{length:>9,} tokens, {name}: out of memory")
                continue
            seconds = [s * config.n_layers if name == "kernels alone" else s for s in clock.seconds]
            memory = clock.peak / 2**30 if clock.peak else None
            entry[name] = {"seconds": statistics.median(seconds), "all": seconds, "peak_memory_gib": memory}
            told = f", {memory:.2f} GiB" if memory and name != "kernels alone" else ""
            say(f"{length:>9,} tokens, {name}: {entry[name]['seconds']:.3f} s ({min(seconds):.3f} to {max(seconds):.3f}){told}")
        results.append(entry)
    return results


def read(model, tokens):
    """What eval.py does for a passkey: one forward pass, and the vocabulary for the last tokens alone."""
    return model.head(model.hidden(tokens)[:, -8:]).argmax(-1)


def generating(other, tokens):
    """A function that has transformers read the prompt and name the next 8 tokens."""
    everything = torch.ones_like(tokens)  # without it a random token that is the pad token would make a mask
    return partial(other.generate, tokens, attention_mask=everything, max_new_tokens=8, do_sample=False, pad_token_id=0)


def kernels(model, length):
    """A function that runs only the attention kernel and the matrix products of the first block on a prompt of `length` tokens."""
    config, products = model.config, [module.weight for module in model.blocks[0].modules() if isinstance(module, torch.nn.Linear)]
    random = partial(torch.randn, device=products[0].device, dtype=products[0].dtype)
    q, k, v = (random(1, length, n, config.head_dim) for n in (config.n_heads, config.n_kv_heads, config.n_kv_heads))
    inputs = {width: random(min(length, 16384), width) for width in {w.shape[1] for w in products}}

    def run():
        attention(q, k, v)
        for begin in range(0, length, 16384):
            for w in products:
                F.linear(inputs[w.shape[1]][: length - begin], w)

    return run


# ---------------------------------------------------------------- the command


def say(line):
    if dist.get_rank() == 0:
        print(line, flush=True)


def main():
    args = parse_arguments()
    kind = errors.device(None)
    args.model = args.model or weights.default(kind)
    config = shape(args.model)
    check(args, config)
    device = fsdp.start(kind)
    card = torch.cuda.get_device_name() if kind == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    say(f"{args.model} on {card}, torch {torch.__version__}, {dist.get_world_size()} process(es)")
    results = {"train": train, "efficiency": efficiency, "prefill": prefill}[args.task](config, args, device)
    if dist.get_rank() == 0:
        if args.json:
            settings = {key: str(value) for key, value in vars(args).items() if value is not None}
            written = {"task": args.task, "model": args.model, "card": card, "settings": settings, "results": results}
            errors.write_json(args.json, written)
        if args.plot:
            draw_efficiency(results, args.plot)


if __name__ == "__main__":
    fsdp.run(main)
