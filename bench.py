"""How fast, and in how much memory? Training, PoSE beside full-length training, and reading a long prompt.

    python bench.py --task train --model smollm2-135m --micro_batch_size 16 --compare transformers liger
    python bench.py --task efficiency --model smollm2-135m --plot efficiency.png      # the paper's Figure 3
    python bench.py --task prefill --model llama-7b --lengths 32768,131072

A model is a shape with random weights: a name of SHAPES, `llama-7b:8` for its first 8 layers, or a folder,
of which only config.json counts. The training step is that of train.py; torchrun runs it on several GPUs.

Notable choices:
- MFU counts 6 operations for each weight in a matrix product, and causal attention without its masked half
  (Config.flops_per_token), over the card's bfloat16 peak.
- Training steps beside those of tasks/peers.py run in a process for each side. The processes take turns, so
  that a drift of the machine meets all; one that waits holds its weights and the optimizer's state alone.
- `prefill` stands beside what no program can avoid on that card: its matrix products and attention kernels
  alone, at the same sizes.
"""

import dataclasses
import gc
import itertools
import os
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import float8
import fsdp
from cli import arguments, completion, process
from hf import builtin, families
from model import Config, add_adapters, causal_attention, empty_transformer, linear_layers, multiply_in_float8
from storage.errors import InputError, printable
from storage.files import write_json
from storage.processes import is_distributed, world_size
from tasks import peers, plots, turns

GIB = 2**30
PIECE = 16384  # tokens of a prompt for which the kernels alone run at once

# ---------------------------------------------------------------- shapes: which model

SHAPES = {
    "smollm2-135m": Config(49152, 576, 1536, 30, 9, 3, 64, 8192, rope_theta=1e5, tie_embeddings=True),
    "llama-7b": Config(32000, 4096, 11008, 32, 32, 32, 128, 2048),
}


def shape(name):
    """Return the Config of a name of SHAPES, a built-in model or a folder, each with `:LAYERS` if wanted."""
    name, _, layers = name.partition(":")
    if name in SHAPES:
        config = SHAPES[name]
    elif name in builtin.BUILT_IN or Path(name).is_dir():
        config = families.read_config(builtin.resolve(name))
    else:
        known = ", ".join(SHAPES)
        raise InputError(f"--model {name}: neither a folder nor a shape; those are {known} and tiny")
    if not layers:
        return config
    if layers not in map(str, range(1, config.n_layers + 1)):
        allowed = f"a number of layers after the colon, at most {config.n_layers}"
        raise InputError(f"--model {name}:{layers}: give {allowed}")
    return dataclasses.replace(config, n_layers=int(layers))


@torch.no_grad()
def randomise(model, device):
    """Fill a model with random weights, the same on any number of processes and with offloading."""
    for seed, parameter in enumerate(model.parameters()):
        generator = torch.Generator(device).manual_seed(seed)
        whole = 0.02 * torch.randn(parameter.shape, generator=generator, device=device)
        if parameter.dim() == 1:
            whole += 1  # as a norm's weight
        fsdp.set_whole(parameter, whole)


# ---------------------------------------------------------------- the clock


class Clock:
    """Measures the seconds of pieces of work, until the device has done them, and the peak of its memory."""

    def __init__(self, device):
        self.on_gpu = device.type == "cuda"
        self.seconds = []  # one entry for each piece of work
        self.peak = 0  # bytes; stays 0 on a CPU

    def __call__(self, work):
        """Call work(), note its seconds and memory, and return its result."""
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        result = work()
        if self.on_gpu:
            torch.cuda.synchronize()
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        self.seconds.append(time.perf_counter() - began)
        return result


def seconds_since_start():
    """Return the seconds since this process was started, imports included. None without Linux's /proc."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return None
    fields = stat.read_text().rpartition(")")[2].split()
    start_ticks = int(fields[19])  # field 22 of proc(5): since the machine was started
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------- training steps, ours and theirs


class RandomDocument(data.Documents):
    """One long document of random tokens."""

    def __init__(self, vocab_size, length):
        self.starts, self.masked = np.array([0, length]), None
        self.tokens = np.random.default_rng(0).integers(vocab_size, size=length)


def random_batches(config, args, sampling, device):
    """Yield the micro-batches of each step as in train.py, but of random tokens.

    sampling: the arguments of pose.sample.
    """
    document = RandomDocument(config.vocab_size, max(4 * sampling["train_len"], 2**20))
    batches = data.Batches(document, seed=0, **sampling)
    own_examples = fsdp.own_examples(args.batch_size)
    return data.prefetched(batches, 0, own_examples, args.micro_batch_size, device)


def our_step(config, args, sampling, device):
    """Return a function that takes a training step as train.py does.

    It returns the loss and the seconds that it waited for its batch. Its lines are those of train.train,
    with a clock around the wait.
    """
    on_gpu = device.type == "cuda"
    model = empty_transformer(config)
    if args.lora_rank:
        add_adapters(model, args.lora_rank, 2 * args.lora_rank, linear_layers(config))
    if args.float8:
        multiply_in_float8(model)
    compute_dtype = getattr(torch, process.compute_dtype(device.type, args.float8))
    param_dtype = getattr(torch, args.param_dtype)
    checkpointing, offload = args.activation_checkpointing, args.cpu_offload
    fsdp.shard(model, device, compute_dtype, param_dtype, checkpointing, offload, compile=on_gpu)
    randomise(model, device)
    optimizer = fsdp.adamw(model, 1e-5)
    batches = random_batches(config, args, sampling, device)

    def step():
        began = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - began
        loss = torch.zeros((), device=device)
        total_weight = sum(token_weights.sum() for *_, token_weights in batch)
        dist.all_reduce(total_weight)
        total_weight.clamp_(min=1)
        for micro_batch in batch:
            part = model(*micro_batch) / total_weight
            (part * dist.get_world_size()).backward()  # gradients are averaged over processes
            loss += part.detach()
        dist.all_reduce(loss)
        fsdp.average_vector_gradients(model)
        grad_norm = fsdp.clip_gradients(model, 1.0)
        fsdp.skip_update_unless_finite(optimizer, loss, grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), waited

    return step


class Side:
    """One side of a comparison of training steps: what its steps take."""

    def __init__(self, name, config, args, sampling, device, since_start=0.0):
        """Prepare the side's step and warm it up.

        name: "ours", or a peer of tasks/peers.py. since_start: seconds that count as the first step's too,
        None if they are not known.
        """
        self.name = name
        self.tokens = args.share * sampling["train_len"]  # of this process in a step
        self.flops_per_token = config.flops_per_token(sampling["train_len"], frozen=args.lora_rank > 0)
        self.peak_flops = fsdp.peak_flops(device)
        began = time.perf_counter()
        if name == "ours":
            self.step = our_step(config, args, sampling, device)
        else:
            batches = random_batches(config, args, sampling, device)
            self.step = peers.make_step(name, config, batches, args.activation_checkpointing, device)
        loss, _ = self.step()
        first_step = time.perf_counter() - began
        self.first_step_seconds = None if since_start is None else since_start + first_step
        self.losses = [loss]
        warm = Clock(device)
        self.take_steps(2, warm)
        self.peak_memory_gib = warm.peak / GIB if warm.peak else None
        self.clock = Clock(device)
        self.waits = []  # seconds of each timed step until its batch was there

    def take_steps(self, steps, clock):
        """Take so many steps, each timed by a Clock, and return how long each waited for its batch."""
        waits = []
        for _ in range(steps):
            loss, waited = clock(self.step)
            self.losses.append(loss)
            waits.append(waited)
        return waits

    def take_timed_steps(self, steps):
        """Take so many more steps, which count."""
        self.waits += self.take_steps(steps, self.clock)

    def result(self):
        """Return an entry of `results`."""
        step_seconds = statistics.median(self.clock.seconds)
        tokens_per_second = self.tokens / step_seconds
        mfu = tokens_per_second * self.flops_per_token / self.peak_flops if self.peak_flops else None
        entry = {
            "side": self.name,
            "first_step_seconds": self.first_step_seconds,
            "peak_memory_gib": self.peak_memory_gib,
            "losses": self.losses,
            "tokens_per_second": tokens_per_second,
            "step_seconds": step_seconds,
            "seconds": self.clock.seconds,
            "mfu": mfu,
        }
        if self.name == "ours":
            entry["waiting_for_data"] = statistics.median(self.waits) / step_seconds
        return entry


def measure_alone(config, args, sampling, device, since_start=0.0):
    """Time args.steps of our steps in this process. Return an entry of `results`. since_start: see Side."""
    side = Side("ours", config, args, sampling, device, since_start)
    side.take_timed_steps(args.steps)
    return side.result()


def serve(connection, name, config, args, sampling, device_type):
    """Measure a side in this process of its own: see turns.take_turns. It ends when the connection does."""
    since_start = seconds_since_start()
    try:
        device = fsdp.start(device_type)
        side = Side(name, config, args, sampling, device, since_start)
        answer = {}
        while True:
            torch.cuda.empty_cache()  # the others need the memory meanwhile
            connection.send(answer)
            steps = connection.recv()
            side.take_steps(1, Clock(device))  # it takes the memory again
            side.take_timed_steps(steps)
            answer = side.result()
    except (EOFError, ConnectionError):
        pass
    except torch.OutOfMemoryError:
        connection.send(turns.failed("out of memory"))
    except Exception as error:
        connection.send(turns.failed(process.one_line(error) or f"{type(error).__name__}: {error}"))
    process.leave(0)


# ---------------------------------------------------------------- task: train


def train(config, args, device):
    """Measure training steps. Return `results`, an entry for each side, ours first."""
    sampling = {"method": "pose", "train_len": args.train_len, "target_len": 16 * args.train_len}
    if args.compare:
        names, more = ["ours", *args.compare], (config, args, sampling, device.type)
        results = turns.take_turns(serve, names, args.steps, *more)
        if "error" in results[0]:
            raise InputError(f"--task train: our side: {results[0]['error']}")
        add_ratios(results)
    else:
        results = [measure_alone(config, args, sampling, device, seconds_since_start())]
    for result in results:
        for key in ("train_len", "share", "micro_batch_size"):
            result[key] = getattr(args, key)
        result["processes"] = dist.get_world_size()
        say(f"{result['side']}: {describe_training(result)}")
    return results


def add_ratios(results):
    """Add to each entry its speed divided by the fastest peer's. results: ours, then the peers."""
    measured = [result for result in results if "error" not in result]
    if len(measured) > 1:
        fastest = max(result["tokens_per_second"] for result in measured[1:])
        for result in measured:
            result["times_fastest_peer"] = result["tokens_per_second"] / fastest


def describe_training(result):
    """Return an entry of `results` in words."""
    if "error" in result:
        return printable(result["error"])
    tokens = result["share"] * result["train_len"]
    slowest, fastest = tokens / max(result["seconds"]), tokens / min(result["seconds"])
    figures = [f"{result['tokens_per_second']:,.0f} tokens/s a process ({slowest:,.0f} to {fastest:,.0f})"]
    if "times_fastest_peer" in result:
        figures.append(f"{result['times_fastest_peer']:.2f} times the fastest peer")
    if result["first_step_seconds"]:
        figures.append(f"first step after {result['first_step_seconds']:.1f} s")
    if result["mfu"]:
        figures.append(f"MFU {result['mfu']:.1%}")
    if result["peak_memory_gib"]:
        figures.append(f"{result['peak_memory_gib']:.1f} GiB")
    if "waiting_for_data" in result:
        figures.append(f"waiting for data {result['waiting_for_data']:.2%}")
    return ", ".join(figures)


# ---------------------------------------------------------------- task: efficiency


def efficiency(config, args, device):
    """Measure PoSE at a fixed window and training at full length, by target (Figure 3). Return `results`."""
    results = []
    for target_len in args.lengths:
        for method in ("pose", "full"):
            train_len = args.train_len if method == "pose" else target_len
            sampling = {"method": method, "train_len": train_len, "target_len": target_len}
            torch._dynamo.reset()  # what was compiled for other lengths
            try:
                entry = measure_alone(config, args, sampling, device)
            except torch.OutOfMemoryError:
                entry = {"step_seconds": None, "peak_memory_gib": None}
            results.append({"method": method, "target_len": target_len} | entry)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            took = f"{entry['step_seconds']:.3f} s a step" if entry["step_seconds"] else "out of memory"
            memory = f", {entry['peak_memory_gib']:.2f} GiB" if entry["peak_memory_gib"] else ""
            say(f"{method:<5} target {target_len:>9,}: {took}{memory}")
    return results


def draw_efficiency(results, path):
    """Draw the time of a step and, of a GPU, the peak memory, by target, a curve for each method."""
    targets = sorted({result["target_len"] for result in results})
    labels = {"step_seconds": "seconds a step"}
    if any(result["peak_memory_gib"] for result in results):
        labels["peak_memory_gib"] = "peak memory, GiB"
    figure, panels = plots.new_figure(len(labels), 4.5 * len(labels), 3.6)
    for axes, (key, label) in zip(panels, labels.items()):
        for method, name in (("full", "full-length"), ("pose", "PoSE")):
            measured = [result for result in results if result["method"] == method and result[key]]
            own_targets = [result["target_len"] for result in measured]
            axes.plot(own_targets, [result[key] for result in measured], marker="o", label=name)
        plots.length_axis(axes, targets, "target window, tokens")
        axes.set_ylabel(label)
        axes.set_ylim(0)
        axes.grid(alpha=0.3)
    panels[0].legend()
    plots.save(figure, path)


# ---------------------------------------------------------------- task: prefill
# Each make function returns a function that does a side's work on a prompt, tokens int64 (1, T).


@torch.no_grad()
def prefill(config, args, device):
    """Measure how long reading a prompt and naming 8 tokens takes. Return `results`, an entry a length.

    Beside ours stand its kernels alone, and transformers if it is asked for.
    """
    dtype = getattr(torch, process.compute_dtype(device.type))
    model = empty_transformer(config).to(dtype)
    model.to_empty(device=device)
    randomise(model, device)
    sides = {"ours": partial(make_reading, model), "kernels alone": partial(make_kernels, model)}
    if args.compare:
        theirs = peers.hf_model(config).to(dtype).to(device).eval()
        sides["transformers"] = partial(make_generating, theirs)

    results = []
    for length in args.lengths:
        tokens = torch.randint(config.vocab_size, (1, length), device=device)
        entry = {"length": length}
        for side, make_work in sides.items():
            layers = config.n_layers if side == "kernels alone" else 1  # the kernels run for one layer
            entry[side] = time_prompt(make_work, tokens, args.steps, layers, device)
            say(f"{length:>9,} tokens, {side}: {describe_prompt(entry[side], side)}")
        results.append(entry)
    return results


def time_prompt(make_work, tokens, times, layers, device):
    """Return the seconds and the memory of one side on one prompt; None if the memory is too small.

    layers: how often the work has to be counted. times: how often it is timed.
    """
    clock = Clock(device)
    try:
        make_work(tokens[:, :PIECE])()  # warms up
        work = make_work(tokens)  # after the warm-up, so that the tensors of both are not in memory together
        for _ in range(times):
            clock(work)
    except torch.OutOfMemoryError:
        return None
    seconds = [layers * s for s in clock.seconds]
    memory = clock.peak / GIB if clock.peak else None
    return {"seconds": statistics.median(seconds), "all": seconds, "peak_memory_gib": memory}


def describe_prompt(timed, side):
    """Return what `time_prompt` found in words."""
    if timed is None:
        return "out of memory"
    spread = f"{min(timed['all']):.3f} to {max(timed['all']):.3f}"
    memory = timed["peak_memory_gib"]
    shown_memory = f", {memory:.2f} GiB" if memory and side != "kernels alone" else ""
    return f"{timed['seconds']:.3f} s ({spread}){shown_memory}"


def make_reading(model, tokens):
    """Return the work of eval.py for a passkey: one forward pass, and the head for the last 8 tokens."""

    def read():
        return model.head(model.hidden(tokens)[:, -8:]).argmax(-1)

    return read


def make_generating(theirs, tokens):
    """Return the work of transformers: read the prompt and generate the next 8 tokens."""
    everything = torch.ones_like(tokens)  # without it a random token that is the pad token would make a mask
    greedily = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    return partial(theirs.generate, tokens, attention_mask=everything, **greedily)


def make_kernels(model, tokens):
    """Return the work of the first block's attention kernel and matrix products, on random numbers."""
    config, length = model.config, tokens.shape[1]
    layers = [module for module in model.blocks[0].modules() if isinstance(module, torch.nn.Linear)]
    weights = [layer.weight for layer in layers]
    random = partial(torch.randn, device=weights[0].device, dtype=weights[0].dtype)
    q = random(1, length, config.n_heads, config.head_dim)
    k = random(1, length, config.n_kv_heads, config.head_dim)
    v = random(1, length, config.n_kv_heads, config.head_dim)
    inputs = {}  # {width: random inputs of the products that take so many numbers}
    for width in {weight.shape[1] for weight in weights}:
        inputs[width] = random(min(length, PIECE), width)

    def run():
        causal_attention(q, k, v)
        for begin in range(0, length, PIECE):
            for weight in weights:
                x = inputs[weight.shape[1]]
                F.linear(x[: length - begin], weight)  # the last piece may be shorter

    return run


# ---------------------------------------------------------------- the command

BELONGS = {  # option -> tasks
    "plot": ("efficiency",),
    "compare": ("train", "prefill"),
    "lengths": ("efficiency", "prefill"),
    "train_len": ("train", "efficiency"),
    "micro_batch_size": ("train", "efficiency"),
    "batch_size": ("train", "efficiency"),
    "activation_checkpointing": ("train", "efficiency"),
    "cpu_offload": ("train", "efficiency"),
    "param_dtype": ("train", "efficiency"),
    "lora_rank": ("train", "efficiency"),
    "float8": ("train", "efficiency"),
}
TASKS = {"train": train, "efficiency": efficiency, "prefill": prefill}
LONGEST = 131072  # of the lengths that are measured if none are asked for


def parse_arguments():
    p = arguments.ArgumentParser(description="Speed and memory, with random weights.")
    # fmt: off
    p.add_argument("--task", choices=TASKS, required=True,
        help="train: a training step; efficiency: PoSE's beside a full-length one; prefill: a long prompt")
    p.add_argument("--model", type=arguments.path_name,
        help=f"{', '.join(SHAPES)}, tiny or a folder, and NAME:LAYERS for its first layers "
        "(default: smollm2-135m with a GPU, else tiny)")
    p.add_argument("--lengths", type=arguments.token_counts(),
        help="efficiency: targets, prefill: prompts, in tokens, comma-separated (default: doubling from two "
        f"windows, with prefill from one, to {LONGEST:,})")
    p.add_argument("--train_len", type=arguments.whole_number(1),
        help="train, efficiency: tokens in a training example (default: the model's window)")
    p.add_argument("--micro_batch_size", type=arguments.whole_number(1),
        help="train, efficiency: examples a process takes at once (default: 32,768 tokens; efficiency 1)")
    p.add_argument("--batch_size", type=arguments.whole_number(1),
        help="train, efficiency: examples in a step, over all processes (default: one micro-batch each)")
    p.add_argument("--steps", type=arguments.whole_number(1), default=10,
        help="timed steps, or readings of each prompt (default: 10)")
    p.add_argument("--activation_checkpointing", choices=("none", "selective", "full"),
        help="as train.py's (default: none)")
    p.add_argument("--cpu_offload", action="store_true",
        help="as train.py's")
    p.add_argument("--param_dtype", choices=("float32", "bfloat16"),
        help="as train.py's (default: float32)")
    p.add_argument("--lora_rank", type=arguments.whole_number(1), metavar="R",
        help="as train.py's, on all linear layers (default: all weights are trained)")
    p.add_argument("--float8", action="store_true",
        help="as train.py's; MFU stays that of the bfloat16 peak")
    p.add_argument("--compare", choices=peers.PACKAGES, nargs="+", action="extend", default=[],
        help="train: beside their steps, each side in its own process; prefill: beside transformers")
    p.add_argument("--json", type=arguments.output_file(), metavar="FILE",
        help="write the results there")
    p.add_argument("--plot", type=arguments.plot_file, metavar="FILE.png",
        help="efficiency: draw time and memory by target there")
    # fmt: on
    return p.parse_args()


def complete(args, config, device_type):
    """Refuse what cannot run, fill in the defaults that depend on the model and return the arguments."""
    arguments.refuse_options_of_other_tasks(args, BELONGS)
    arguments.refuse_one_file_for_two(args)
    check_peers(args)
    args.compare = list(dict.fromkeys(args.compare))  # each once
    args.activation_checkpointing = args.activation_checkpointing or "none"
    args.param_dtype = args.param_dtype or "float32"
    args.lora_rank = args.lora_rank or 0
    window = config.max_position_embeddings
    args.train_len = args.train_len or window
    world = world_size()
    if args.micro_batch_size is None and args.task == "efficiency":
        args.micro_batch_size = 1
    if args.batch_size is None:
        examples = args.micro_batch_size or max(1, completion.MICRO_BATCH_TOKENS // args.train_len)
        args.batch_size = examples * world
    args.micro_batch_size = completion.split_batch(
        args.batch_size, args.micro_batch_size, args.train_len, world
    )
    args.share = args.batch_size // world
    if args.lengths is None and args.task != "train":
        first = 2 * args.train_len if args.task == "efficiency" else window
        args.lengths = [first, *arguments.doubling(2 * first, LONGEST + 1)]
    if args.task == "efficiency" and args.lengths[0] < args.train_len:
        at_least = f"a target is at least the window of {args.train_len}"
        raise InputError(f"--lengths {args.lengths[0]}: {at_least}; raise it or lower --train_len")
    if args.float8:
        for length in (args.train_len, *(args.lengths or ())):
            float8.check(config, args.micro_batch_size * length, device_type)
    return args


def check_peers(args):
    """Raise InputError if what --compare names cannot be measured here."""
    for peer in args.compare:
        if is_distributed():
            raise InputError(f"--compare {peer}: it runs in one process alone; leave torchrun out")
        if args.lora_rank:
            raise InputError(f"--compare {peer}: it trains all weights there; leave it or --lora_rank out")
        if peer == "liger" and args.task != "train":
            raise InputError("--compare liger belongs to --task train; leave it out")
        for package in peers.PACKAGES[peer]:
            if peers.version(package) is None:
                raise InputError(f"--compare {peer}: not installed here; pip install {package}")
        if peer == "liger" and not torch.cuda.is_available():
            raise InputError("--compare liger: its kernels need a GPU; leave it out")


def say(line):
    """Print a line, in one process only."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def main():
    args = parse_arguments()
    device_type = process.device(None)
    args.model = args.model or builtin.default_model(device_type)
    config = shape(args.model)
    args = complete(args, config, device_type)
    device = fsdp.start(device_type)
    on_gpu = device_type == "cuda"
    card = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__}
    for package in itertools.chain(*(peers.PACKAGES[peer] for peer in args.compare)):
        versions[package] = peers.version(package)
    with_versions = ", ".join(f"{package} {version}" for package, version in versions.items())
    say(f"{args.model} on {card}, {with_versions}, {dist.get_world_size()} process(es)")

    results = TASKS[args.task](config, args, device)
    if dist.get_rank() != 0:
        return
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items() if value not in (None, [])}
        content = {"task": args.task, "model": args.model, "card": card, "versions": versions}
        write_json(args.json, content | {"settings": settings, "results": results})
    if args.plot:
        draw_efficiency(results, args.plot)


if __name__ == "__main__":
    process.run_distributed(main)
