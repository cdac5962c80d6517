"""Extend a model's context window with PoSE.

    python train.py                                              # a laptop: the built-in tiny model, window 256 -> 2,048
    python train.py --model my-llama --data texts/               # one GPU
    torchrun --nproc_per_node=8 train.py --model my-llama --target_len 131072

OUT/metrics.jsonl gets a line a step, OUT/model is a Hugging Face folder at the end, OUT/checkpoints lets `--resume` go on.
"""
import argparse
import importlib.util
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import errors
import fsdp
import metrics
import pose
import rope
import weights
from errors import UserError

# The paper's settings (section 4.1). The built-in models have their own, for a laptop and for minutes on one GPU. windows, train_windows:
# target_len and train_len in windows of the model. headroom: the interpolation is made for so many times target_len.
PAPER = {
    "steps": 1000, "batch_size": 64, "lr": 2e-5, "warmup_steps": 10, "windows": 16, "train_windows": 1, "rope": "yarn", "headroom": 1,
    "overshoot": 1.0, "llama_4_scaling_beta": 0.0,
}  # fmt: skip
RECIPES = {
    "tiny": PAPER | {"steps": 150, "batch_size": 32, "lr": 2e-4, "windows": 8, "headroom": 2, "beta_fast": 8},
    "smollm2-135m": PAPER | {
        "steps": 200, "batch_size": 16, "lr": 1e-4, "train_windows": 4, "rope": "ntk", "headroom": 1.188, "overshoot": 1.25,
        "llama_4_scaling_beta": 0.1,
    },
}  # fmt: skip
MAX_SKIPPED = 10  # updates in a row that are not finite before a run gives up
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


def parse_arguments():
    p = errors.ArgumentParser(description="Extend a model's context window with PoSE.")
    p.add_argument("--model", help=f"a Hugging Face folder, or {' or '.join(weights.BUILT_IN)} (default: smollm2-135m with a GPU, else tiny)")
    p.add_argument(
        "--data", nargs="+", action="extend", default=[], metavar="FILE", help=".txt, .jsonl, .jsonl.gz, folders (default: Python's standard library)"
    )
    p.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="a new folder for this run (default: out)")
    p.add_argument("--target_len", type=int, help="tokens in the new window (default: 16 times the model's window; tiny: 8)")

    g = p.add_argument_group("the method")
    g.add_argument(
        "--method", choices=pose.METHODS, default="pose",
        help="what an example is: pose, chunks of a short window with skips between their positions; full, a window of target_len; pi, a plain short "
        "window; randpos, a short text at random positions (default: pose)",
    )  # fmt: skip
    g.add_argument("--train_len", type=int, help="tokens in an example (default: the model's window; smollm2-135m: see README; full: target_len)")
    g.add_argument("--chunks", type=int, default=2, help="pose: chunks in an example (default: 2)")
    g.add_argument(
        "--offset", choices=pose.OFFSETS, default="uniform",
        help="pose: where a chunk's text is taken from: anywhere behind the one before, right behind it (zero), or as far behind as its "
        "positions say (skip) (default: uniform)",
    )  # fmt: skip
    g.add_argument(
        "--overshoot", type=float, metavar="X",
        help="pose, randpos: draw positions from a window X times target_len, else its last stretch is met rarely (default: 1; smollm2-135m's ntk "
        "1.25)",
    )  # fmt: skip
    g.add_argument("--rope", choices=weights.EXTENSIONS, help="interpolation (default: yarn; smollm2-135m ntk)")
    g.add_argument(
        "--factor", type=float,
        help="of the interpolation (default: the ratio target_len / window, twice that with tiny's yarn; for ntk rope.ntk_factor of the ratio, "
        "of 1.19 times that with smollm2-135m; for dynamic 1)",
    )  # fmt: skip
    g.add_argument("--beta_fast", type=float, help="yarn leaves pairs alone that turn so often in the window (default: 32; tiny 8)")
    g.add_argument(
        "--llama_4_scaling_beta", type=float, metavar="BETA",
        help="multiply the queries of token i by 1 + BETA ln(1 + floor(i / window)), as Llama 4 (default: the model's, else 0, not at all; "
        "smollm2-135m's ntk 0.1)",
    )  # fmt: skip

    g = p.add_argument_group("training")
    g.add_argument("--steps", type=int, help="optimizer steps; 0: the untrained model, interpolated (default: 1000; tiny 150, smollm2-135m 200)")
    g.add_argument("--batch_size", type=int, help="examples in a step of all processes (default: 64; tiny 32, smollm2-135m 16; fewer long ones)")
    g.add_argument("--lr", type=float, help="peak of AdamW's learning rate (default: 2e-5; tiny 2e-4, smollm2-135m 1e-4)")
    g.add_argument("--warmup_steps", type=int, help="linear warm-up; then linear decay to 0 (default: 10)")
    g.add_argument("--seed", type=int, default=0, help="default: 0")

    g = p.add_argument_group("interruptions")
    g.add_argument("--save_every", type=int, default=0, metavar="N", help="checkpoint every N steps (default: only when interrupted)")
    g.add_argument("--keep", type=int, default=2, metavar="N", help="checkpoints that stay, the newest (default: 2)")
    g.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out; what is not given stays as it was")

    g = p.add_argument_group("watching")
    g.add_argument("--eval_every", type=int, default=0, metavar="N", help="validation loss first, last and every N steps (default: never)")
    g.add_argument("--eval_data", nargs="+", action="extend", default=[], metavar="FILE", help="texts for it, as for --data")
    g.add_argument("--eval_lengths", metavar="TOKENS,…", help="windows with the same last tokens, as many as the shortest has (default: train_len)")
    g.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=False, help="TensorBoard events too, in OUT/tensorboard")

    g = p.add_argument_group("speed and memory")
    g.add_argument("--micro_batch_size", type=int, help="examples in one forward pass of a process (default: about 32,768 tokens)")
    g.add_argument("--activation_checkpointing", choices=("none", "selective", "full"), default="none", help="less memory for more time")
    g.add_argument("--cpu_offload", action=argparse.BooleanOptionalAction, default=False, help="keep weights and optimizer in host memory")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile each block (default: on a GPU)")
    g.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the computation (default: bfloat16 on a GPU)")
    g.add_argument(
        "--param_dtype", choices=("float32", "bfloat16"), default="float32",
        help="of master weights, gradients and optimizer state; bfloat16 halves their memory, but rounds each update to 3 digits of the weight: "
        "small ones are lost (default: float32)",
    )  # fmt: skip
    g.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    return check_out(p.parse_args(), p)


def complete(args, config):
    """Fill in the defaults that depend on the model and the machine, and refuse what cannot run."""
    window = config.max_position_embeddings
    recipe = RECIPES.get(args.model, PAPER)
    for key in ("steps", "lr", "warmup_steps", "rope"):
        if getattr(args, key) is None:
            setattr(args, key, recipe[key])
    if args.target_len is None:
        args.target_len = recipe["windows"] * window
    if args.target_len > 2**31:
        raise UserError(f"--target_len {args.target_len}: at most {2**31}")
    if args.target_len < window:
        raise UserError(f"--target_len {args.target_len} is smaller than the model's window of {window}; raise it")
    if args.train_len is None:
        windows = recipe["train_windows"] if args.data else 1  # few files of the standard library are longer than one
        longest = max(window, args.target_len // 4)  # leaves room for skips
        args.train_len = args.target_len if args.method == "full" else min(windows * window, longest)
    if args.batch_size is None:  # as many tokens in longer windows (but those of full), as near as processes divide it
        longer = 1 if args.method == "full" else max(1, args.train_len / window)
        world = int(os.environ.get("WORLD_SIZE", 1))
        args.batch_size = world * max(1, round(recipe["batch_size"] / longer / world))
    if args.eval_lengths and not args.eval_every:
        raise UserError("--eval_lengths belongs to --eval_every and --eval_data; leave it out or add them")
    if bool(args.eval_every) != bool(args.eval_data):
        raise UserError("--eval_every and --eval_data belong together: how often, and on which texts")
    has_beta_fast = args.rope in ("yarn", "yarn_revised", "ntk_by_parts")
    if args.beta_fast is not None and not has_beta_fast:
        raise UserError(f"--beta_fast: --rope {args.rope} does not have it; leave it out or choose yarn")
    if args.factor is not None and args.rope == "default":
        raise UserError("--factor: --rope default interpolates nothing; leave it out or choose a mode")
    if args.beta_fast is None and has_beta_fast:
        args.beta_fast = recipe.get("beta_fast")
    fitted = recipe if args.rope == recipe["rope"] else PAPER  # what was found for one interpolation need not suit another
    if args.factor is None and args.rope not in ("default", "dynamic"):  # dynamic: the ratio of the current length
        args.factor = fitted["headroom"] * args.target_len / window
        if args.rope == "ntk":
            args.factor = rope.ntk_factor(config.rotary_dim, config.rope_theta, config.rope_scaling, window, args.factor)
            args.factor = float(f"{args.factor:.3g}")
    if args.llama_4_scaling_beta is None:  # what the model has, or what suits it
        args.llama_4_scaling_beta = (config.rope_scaling or {}).get("llama_4_scaling_beta", fitted["llama_4_scaling_beta"])
    if args.method != "pose" and (args.chunks != 2 or args.offset != "uniform"):
        raise UserError(f"--chunks and --offset belong to --method pose; leave them out with {args.method}")
    skips = args.method in ("pose", "randpos")
    if args.overshoot is None:
        args.overshoot = fitted["overshoot"] if skips else 1.0
    elif args.overshoot != 1 and not skips:  # 1 is what such a run records and --resume gives back
        raise UserError(f"--overshoot belongs to --method pose and randpos; leave it out with {args.method}")
    gpu = args.device == "cuda"
    args.compile = gpu if args.compile is None else args.compile
    args.dtype = args.dtype or ("bfloat16" if gpu else "float32")
    errors.at_least(args, 1, "train_len", "chunks", "batch_size", "keep")
    errors.at_least(args, 0, "steps", "warmup_steps", "save_every", "eval_every", "seed")
    for key in ("lr", "llama_4_scaling_beta"):
        if not 0 <= getattr(args, key) < math.inf:
            raise UserError(f"--{key} {getattr(args, key):g}: must be a number that is not negative")
    if args.target_len < args.train_len:
        raise UserError(f"--target_len {args.target_len} is smaller than the train window of {args.train_len}; raise it or lower --train_len")
    for key in ("factor", "beta_fast", "overshoot"):
        if getattr(args, key) is not None and not 1 <= getattr(args, key) <= 2**31:
            raise UserError(f"--{key} {getattr(args, key):g}: must be a number from 1 to {2**31}")
    if args.method == "full" and args.train_len != args.target_len:
        raise UserError(f"--method full trains on whole windows: leave --train_len out or make it {args.target_len}")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard: not installed here; pip install tensorboard")
    args.micro_batch_size = fsdp.split_batch(args.batch_size, args.micro_batch_size, args.train_len)[1]


UNRECORDED = ("out", "resume")  # of this process alone
FREE = (
    "micro_batch_size", "device", "compile", "activation_checkpointing", "cpu_offload", "save_every", "keep", "tensorboard",
    "eval_every", "eval_data", "eval_lengths",
)  # change the speed or what is shown or kept, not the run  # fmt: skip


def check_out(args, parser):
    """Refuse an output folder that holds another run. With --resume: take what the user did not give from what the run there was started
    with, and refuse what was given and differs. -> the arguments."""
    record = args.out / "args.json"
    if file := next((path for path in (args.out, *args.out.parents) if path.exists() and not path.is_dir()), None):
        raise UserError(f"--out {args.out}: {file} is a file; name a folder")
    if not args.resume:
        if any((args.out / name).exists() for name in ("args.json", "checkpoints", "model")):
            raise UserError(f"--out {args.out} already holds a run; name another folder, remove it, or add --resume")
        return args
    if not record.exists():
        raise UserError(f"--resume: {args.out} holds no run; leave --resume out to start one")
    try:
        theirs = dict(json.loads(record.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"--resume: {record} is not readable; start again with another --out") from None
    # argparse leaves alone what stands in the namespace, unless it is given; but it would add to a list there.
    kept = {k: v for k, v in theirs.items() if k in vars(args) and not (isinstance(v, list) and getattr(args, k))}
    given, args = args, parser.parse_args(namespace=argparse.Namespace(**kept))
    if not args.eval_every:  # switched off: the run's own texts and lengths go too
        args.eval_data, args.eval_lengths = given.eval_data, given.eval_lengths
    if changed := errors.changes(theirs, {k: v for k, v in vars(args).items() if k not in UNRECORDED + FREE}):
        raise UserError(f"--resume: the run in {args.out} had other arguments: {changed}")
    if finished(args.out, args.steps):
        raise UserError(f"--resume: the run in {args.out} is finished; its model is {args.out / 'model'}")
    return args


def finished(out, steps):
    """Did the run in this folder make all its steps? (An interrupted one has a model too.)"""
    return (out / "model").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= steps


def learning_rate(step, args):
    """Linear warm-up over warmup_steps, then linear decay to zero. step counts from 0."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    return args.lr * (args.steps - step) / max(1, args.steps - args.warmup_steps)


def main():
    args = parse_arguments()
    as_given = {key: getattr(args, key) for key in FREE}  # their defaults are those of a machine
    args.device = errors.device(args.device)
    args.model = args.model or weights.default(args.device)

    model, wanted, files = weights.check(weights.resolve(args.model))  # on the meta device: no memory is taken yet
    original = model.config
    complete(args, original)
    record = {key: value for key, value in vars(args).items() if key not in UNRECORDED} | as_given
    record["model_sha256"] = weights.fingerprint(original, files)  # the same paths may hold something else another day
    settings = {key: getattr(args, key) for key in ("factor", "beta_fast") if getattr(args, key) is not None}
    model.config = weights.extend(original, args.rope, args.target_len, args.llama_4_scaling_beta, **settings)
    tokenizer = weights.load_tokenizer(args.model, original)
    batches = validation = None
    if args.steps:
        documents = data.prepare(args.data, tokenizer, weights.cache_dir())
        record["data_sha256"] = documents.sha256
        validation = metrics.Validation(args, tokenizer) if args.eval_every else None
        sampling = {key: getattr(args, key) for key in ("method", "train_len", "chunks", "offset")}
        batches = data.Batches(documents, args.seed, tokenizer.bos_id, target_len=round(args.overshoot * args.target_len), **sampling)
    if args.resume:  # what check_out could not see
        begun = json.loads((args.out / "args.json").read_text())
        if changed := errors.changes(begun, {key: value for key, value in record.items() if key.endswith("_sha256")}):
            raise UserError(f"--resume: {args.out} is of another run: {changed}; start again with another --out")

    device = fsdp.start(args.device)
    check_agreement(record)
    if dist.get_rank() == 0 and not args.resume:
        args.out.mkdir(parents=True, exist_ok=True)
        errors.write_json(args.out / "args.json", record)
    dtypes = getattr(torch, args.dtype), getattr(torch, args.param_dtype)
    fsdp.shard(model, device, *dtypes, args.activation_checkpointing, args.cpu_offload, args.compile)
    weights.fill(model, wanted, files)
    model.train()
    optimizer = fsdp.adamw(model, args.lr)
    checkpoints = fsdp.Checkpoints(args.out / "checkpoints", {k: v for k, v in record.items() if k not in FREE}, args.keep)
    first = checkpoints.load(model, optimizer, say) if args.resume else 0
    if args.resume and dist.get_rank() == 0:  # that of the interrupted run: with all lines in metrics.jsonl it would pass for the finished one
        shutil.rmtree(args.out / "model", ignore_errors=True)
    announce(args, original, model.config, batches, first)

    interrupted = catch_signals()
    try:
        train(args, model, optimizer, batches, validation, checkpoints, first, device, interrupted)
    finally:  # what goes wrong later does not undo a checkpoint that is still being written
        checkpoints.finish()
    weights.save(model, tokenizer, args.out / "model")
    dist.barrier()  # torchrun ends all processes soon after the first one that leaves with another code than 0
    if signal.SIGINT in interrupted:
        sys.exit(130)  # so that a shell does not go on to the next command
    say(f"wrote {args.out / 'model'}; next: python eval.py --task passkey --model {args.out / 'model'}")


def train(args, model, optimizer, batches, validation, checkpoints, first, device, interrupted):
    """Steps first + 1 … args.steps on batches of data.Batches. A signal in the list `interrupted` of any process ends it early, with a
    checkpoint. UserError after MAX_SKIPPED updates in a row that were not finite."""
    rank, world = dist.get_rank(), dist.get_world_size()
    share = args.batch_size // world
    mine = range(rank * share, (rank + 1) * share)  # this process's examples of every global batch
    tokens_per_step = args.batch_size * args.train_len
    peak_flops = fsdp.peak_flops(device)
    log = metrics.Log(args.out, first, args.tensorboard) if rank == 0 else None
    skipped = 0  # updates in a row that were left out

    def validate(step):
        nats = validation(model, device)
        say(f"step {step}: validation loss " + ", ".join(f"{loss:.3f} at {n:,}" for n, loss in nats.items()))
        return {"validation": nats}

    if validation:  # what it was before; and too little memory for it shows now, not at the end
        validate(first)
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, disable=None if rank == 0 else True)
    began = time.perf_counter()
    for step, batch in zip(bar, data.prefetched(batches, first, mine, device)):
        for group in optimizer.param_groups:
            group["lr"] = lr = learning_rate(step, args)
        loss, grad_norm = fsdp.update(model, optimizer, batch, args.micro_batch_size, tokens_per_step)
        stop = torch.tensor(float(bool(interrupted)), device=device)  # any process that was told to stop stops all
        dist.all_reduce(stop)
        done, loss, grad_norm = step + 1, loss.item(), grad_norm.item()
        stop = stop.item() and done < args.steps
        speed = tokens_per_step / (time.perf_counter() - began)
        mfu = speed / world * model.config.flops_per_token(args.train_len) / peak_flops if peak_flops else None
        finite = math.isfinite(loss) and math.isfinite(grad_norm)  # the same on every process
        skipped = 0 if finite else skipped + 1
        due = validation and not stop and (done % args.eval_every == 0 or done == args.steps)
        validated = validate(done) if due else {}
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT
        if rank == 0:
            line = {"step": done, "loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": speed, "mfu": mfu}
            line |= {"peak_memory_gib": memory / 2**30} | ({} if finite else {"skipped": True}) | validated
            log.write(line)
            metrics.show_progress(bar, line)
        checkpoints.finish(wait=False)
        if skipped == MAX_SKIPPED:
            raise UserError(
                f"step {done}: loss or gradient was not finite {skipped} times in a row, these updates were left out; "
                "look at the texts, or start again with a lower --lr and another --out"
            )
        if stop or (args.save_every and done % args.save_every == 0):
            checkpoints.save(model, optimizer, done)
        if stop:
            bar.close()
            say(f"stopped after step {done} of {args.steps}; what is done is saved, add --resume to go on")
            break
        began = time.perf_counter()  # the wait for a batch counts, validation and checkpoints do not


def say(line):
    if dist.get_rank() == 0:
        tqdm.write(line, file=sys.stderr)


def announce(args, original, config, batches, first):
    """Say what will be done. original, config: of the model before and after its window was stretched."""
    if args.resume and not first:
        say(f"--resume: {args.out} holds no checkpoint yet; starting with the first step")
    windows = f"window {original.max_position_embeddings:,} -> {args.target_len:,}"
    stretch = f"{args.rope} by {args.factor:g}" if args.factor else args.rope
    say(f"{args.model}: {windows}, {args.method}, {stretch}" + (f", going on after step {first}" if first else ""))
    earlier = original.rope_scaling or {}
    if "factor" in earlier:
        more = f"{stretch} comes on top, {config.rope_scaling['factor']:g} in all" if args.factor else "that stays"
        say(f"the model is scaled already ({earlier['rope_type']} by {earlier['factor']:g}); {more}")
    if batches:
        used = len(batches.documents) - batches.skipped
        say(
            f"{args.steps} steps of {args.batch_size} x {args.train_len:,} tokens on {dist.get_world_size()} process(es); "
            f"{batches.usable:,} tokens in {used} document(s), {batches.skipped} too short and left out"
        )


def catch_signals():
    """-> a list, to which each SIGINT or SIGTERM adds its number from now on instead of ending the process."""
    caught, speaks = [], dist.get_rank() == 0

    def catch(number, frame):
        caught.append(number)
        if speaks:
            os.write(2, b"\nstopping after this step\n")  # print may be in the middle of something
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun repeats what a cluster sends to all, and kills after a while itself
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, catch)
    return caught


def check_agreement(record):
    """UserError if the processes, on several machines perhaps, were started with different arguments."""
    records = [None] * dist.get_world_size()
    dist.all_gather_object(records, record)
    if changed := [key for key in record if any(other.get(key) != record[key] for other in records)]:
        values = [other.get(changed[0]) for other in records]
        raise UserError(f"{changed[0]} differs between processes: {values}; start all with the same arguments, texts and model")


if __name__ == "__main__":
    fsdp.run(main)
