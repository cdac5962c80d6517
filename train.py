"""Extend a model's context window with PoSE.

    python train.py                                   # a laptop: the built-in tiny model, 256 -> 2,048
    python train.py --model my-llama --data texts/    # one GPU
    torchrun --nproc_per_node=8 train.py --model my-llama --target_len 131072
    python train.py --dry_run --model my-llama --data texts/     # what that will need

OUT/metrics.jsonl gets a line for each step, OUT/model is a Hugging Face folder at the end, OUT/checkpoints is
what --resume goes on from, and OUT/finished.json says that nothing is left to do.
"""

import contextlib
import copy
import math
import shlex
import signal
import statistics
import sys
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import fsdp
import retrieval
from cli import arguments, completion, process, resuming, training
from hf import adapter, builtin, families, scaling, weights
from hf.tokenizer import load_for as load_tokenizer
from model import Adapter, add_adapters, empty_transformer, initial_a, multiply_in_float8
from storage import texts
from storage.checkpoint import Checkpoints
from storage.errors import InputError, warn
from storage.files import cache_dir
from storage.log import Log, is_finished, mark_finished, progress_bar, show_progress, unmark_finished
from storage.processes import is_process_0, world_size
from tasks import announcement, plan
from tasks.validation import Validation

MAX_GRAD_NORM = 1.0
MAX_SKIPPED = 10  # A run gives up after so many updates in a row that are not finite.
WARM_UP_STEPS = 2  # The first steps of a call, which compile and allocate, and take longer than later ones.
TIMED_STEPS = 10  # After so many steps of a call the time that is left is said.


# ---------------------------------------------------------------- the loop


def train(args, model, optimizer, batches, validation, checkpoints, first_step, device, signals):
    """Train from first_step (steps count from 0) to args.steps, and return how many steps are done then.

    batches: data.Batches. validation: None, or a function of model and device that returns {length: nats a
    token}. signals: the list of process.catch_signals: once a process has caught one, all save and stop
    together. Raise InputError after MAX_SKIPPED updates in a row that were not finite.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    log = Log(args.out, first_step, args.tensorboard) if rank == 0 else None
    done, skipped_in_a_row, step_seconds = first_step, 0, []
    progress = progress_bar(first_step, args.steps)
    began = time.perf_counter()
    own_examples = fsdp.own_examples(args.batch_size)
    prefetched = data.prefetched(batches, first_step, own_examples, args.micro_batch_size, device)
    # zip asks progress first: after the last step no batch is asked for.
    for step, batch in zip(progress, prefetched):
        lr = learning_rate(step, args)
        set_learning_rate(optimizer, lr)
        loss = torch.zeros((), device=device)  # nats a token, the weighted mean over the global batch
        total_weight = sum(token_weights.sum() for *_, token_weights in batch)
        dist.all_reduce(total_weight)
        total_weight.clamp_(min=1)  # where no token counts, as may happen in conversations, the loss is 0
        for micro_batch in batch:  # tokens, positions, targets, token weights
            part = model(*micro_batch) / total_weight
            (part * world).backward()  # FSDP averages over processes, and the loss is a sum over them
            loss += part.detach()
        dist.all_reduce(loss)
        fsdp.average_vector_gradients(model)
        grad_norm = fsdp.clip_gradients(model, MAX_GRAD_NORM)
        fsdp.skip_update_unless_finite(optimizer, loss, grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        is_stopped, is_due = agreed(bool(signals), checkpoints.is_due(args.save_minutes), device=device)
        stop = is_stopped and done < args.steps
        figures = {"step": done, "loss": loss.item(), "lr": lr, "grad_norm": grad_norm.item()}
        step_seconds.append(time.perf_counter() - began)
        figures |= speed_and_memory(model, args, batches, step_seconds[-1], device)
        is_skipped = not (math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"]))
        skipped_in_a_row = skipped_in_a_row + 1 if is_skipped else 0
        if is_skipped:
            figures["skipped"] = True
        if validation and not stop and (done % args.eval_every == 0 or done == args.steps):
            figures["validation"] = validate(validation, model, device, done)
        if rank == 0:
            log.write(figures)
            show_progress(progress, figures)
        say_time_left(args.steps - done, step_seconds)
        checkpoints.raise_if_failed()
        raise_if_diverged(skipped_in_a_row, done, args.steps)
        is_asked_for = stop or (args.save_every and done % args.save_every == 0)
        if is_asked_for or (is_due and done < args.steps):
            checkpoints.save(model, optimizer, done, is_optional=not is_asked_for)
        if stop:
            progress.close()
            say(f"stopped after step {done} of {args.steps}; what is done is saved, add --resume to go on")
            break
        began = time.perf_counter()  # the wait for the next batch counts, validation and checkpoints do not
    return done


def learning_rate(step, args):
    """Return the learning rate of a step (steps count from 0).

    It rises linearly over warmup_steps, then falls linearly to zero.
    """
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    return args.lr * (args.steps - step) / max(1, args.steps - args.warmup_steps)


def set_learning_rate(optimizer, lr):
    """Give each group of parameters its share of the learning rate, see fsdp.adamw."""
    for group, share in zip(optimizer.param_groups, optimizer.lr_shares):
        group["lr"] = share * lr


def raise_if_diverged(skipped_in_a_row, done, steps):
    """Raise InputError if too many updates in a row were left out, or all `steps`. done: steps so far."""
    if skipped_in_a_row == min(MAX_SKIPPED, steps):
        raise InputError(
            f"step {done}: loss or gradient was not finite {skipped_in_a_row} times in a row, these updates "
            "were left out; look at the texts, or start again with a lower --lr and another --out"
        )


def say_time_left(steps_left, step_seconds):
    """Say once, after TIMED_STEPS, how long the steps that are left will take.

    step_seconds: what each step of this call has taken so far.
    """
    if steps_left and len(step_seconds) == TIMED_STEPS:
        steady = statistics.median(step_seconds[WARM_UP_STEPS:])
        say(f"about {announcement.duration(steps_left * steady)} to go")


def agreed(*values, device):
    """Return, in all processes, the largest that any process has of each value, a small number."""
    largest = torch.tensor(values, dtype=torch.float32, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.int().tolist()


def validate(validation, model, device, step):
    """Return the validation loss {length: nats a token} after a step, and say it."""
    nats = validation(model, device)
    by_length = ", ".join(f"{loss:.3f} at {length:,}" for length, loss in nats.items())
    say(f"step {step}: validation loss {by_length}")
    return nats


def speed_and_memory(model, args, batches, seconds, device):
    """Return the figures of a step that took so many seconds.

    They are tokens_per_second over all processes, mfu (the model FLOP/s utilisation, None where the card's
    peak is not known) and peak_memory_gib.
    """
    tokens_per_second = args.batch_size * args.train_len / seconds
    peak = fsdp.peak_flops(device)
    flops_per_token = model.config.flops_per_token(batches.mean_window, frozen=args.lora_rank > 0)
    flops = tokens_per_second / dist.get_world_size() * flops_per_token
    return {
        "tokens_per_second": tokens_per_second,
        "mfu": flops / peak if peak else None,
        "peak_memory_gib": fsdp.peak_memory(device) / 2**30,
    }


def say(line):
    """Print a line on stderr, from process 0 alone."""
    if is_process_0():
        tqdm.write(line, file=sys.stderr)


# ---------------------------------------------------------------- before and after


def main():
    given = training.parser().parse_args()
    process.check_out(given.out)
    # A plan leaves --out alone, and may be made while a run is there.
    with contextlib.nullcontext() if given.dry_run else process.own_out(given.out):
        run(resuming.options_of_run(given))


def run(args):
    """Train as the options say. The folder args.out must belong to this run alone."""
    finished = f"the run in {args.out} is finished, its model is {args.out / 'model'}"
    is_done = args.resume and is_finished(args.out)
    if is_done and not resuming.has_other_paths(args):
        return say(finished)
    # --resume finds there what came through standard input.
    args.data, args.eval_data = map(texts.with_saved_stdin, (args.data, args.eval_data))
    as_given = copy.copy(args)
    args.device = process.device(args.device)
    args.model = args.model or builtin.default_model(args.device)
    folder, base, tokenizer = open_base(args)
    completion.complete(args, base)
    config = extended_config(base, args)
    batches, validation = read_texts(args, tokenizer)
    if args.dry_run:
        return announce(args, as_given, base, config, batches)
    record = resuming.record_of(args, as_given)
    record["model_sha256"] = folder.fingerprint()  # the same path may hold something else another day
    if batches:
        record["data_sha256"] = batches.documents.sha256
    if args.resume:
        resuming.check_same_model_and_texts(args.out, record)
    if is_done:
        return say(finished)

    # All that a user can get wrong has been checked. What follows takes memory and writes into --out.
    device = fsdp.start(args.device)
    resuming.check_agreement(record)
    announce(args, as_given, base, config, batches)
    model = load_sharded(args, folder, config, device)
    dist.barrier()  # a process that has read a weight that is NaN ends there, and then nothing is written
    optimizer = fsdp.adamw(model, args.lr, 1 / training.LORA_LR if args.lora_rank else 1.0)
    checkpoints = Checkpoints(args.out / "checkpoints", resuming.what_stays(record), args.keep)
    first_step = go_on_from(checkpoints, model, optimizer, args.out) if args.resume else 0
    if dist.get_rank() == 0:  # the record of a run that cannot go on stays as it was
        resuming.write_record(args.out, record)
    if validation:  # the loss before training; and too little memory for it shows here, not at the end
        validate(validation, model, device, first_step)

    signals = process.catch_signals(checkpoints)
    done = None
    try:
        done = train(args, model, optimizer, batches, validation, checkpoints, first_step, device, signals)
    finally:
        try:  # An error in a step must not cost the checkpoint that is still being written,
            checkpoints.finish()
        finally:  # and a disk too full for the last checkpoint must not cost the model.
            if done is not None:
                write_model(args, model, folder, tokenizer, done)
    end_run(args, done, checkpoints, signals, device)


def open_base(args):
    """Return the CheckpointFolder of the model to train, its Config and its tokenizer.

    A dry run needs no weights. Where none are there, the folder is None then.
    """
    path = builtin.resolve(args.model)
    if args.dry_run and not any(path.glob("*.safetensors*")):
        warn(f"{path} holds no safetensors: this plan needs none, the run itself does", shared=True)
        base = families.read_config(path)
        return None, base, load_tokenizer(base, path)
    folder = builtin.open_model(args.model)
    return folder, folder.config, folder.load_tokenizer()


def write_model(args, model, folder, tokenizer, done):
    """Write the model after `done` steps, and its adapters if they are wanted by themselves.

    folder: the CheckpointFolder that it came from.
    """
    weights.save(model, tokenizer, args.out / "model")
    if args.adapter:
        adapter.save(model, folder, tokenizer, args.out / "adapter")
    if dist.get_rank() == 0 and done == args.steps:
        mark_finished(args.out, done)


def go_on_from(checkpoints, model, optimizer, out):
    """Restore the newest of the Checkpoints of the run in `out`, and return its step, 0 if there are none."""
    first_step = checkpoints.load(model, optimizer)
    if dist.get_rank() == 0:
        unmark_finished(out)
    say(f"going on after step {first_step}" if first_step else f"--resume: {out} holds no checkpoint yet")
    return first_step


def end_run(args, done, checkpoints, signals, device):
    """Say what a run has written, once its model is. End the process if a signal has stopped it.

    The exit code is then 128 + the signal's number, as a shell's own is: the model is half-trained, and what
    was to follow must not start. A run that has made all its steps is done all the same, unless by Ctrl-C.
    """
    # All decide together, and none before all have saved: torchrun ends every process soon after the first
    # one that leaves with another code than 0.
    (number,) = agreed(max(signals, default=0), device=device)
    is_done = done == args.steps
    if is_done and not args.save_every:  # nothing will go on from them, and nobody has asked for them
        checkpoints.remove_all()
    if number and (not is_done or number == signal.SIGINT):
        sys.exit(128 + number)
    measure = ["python", "eval.py", "--task", "passkey", "--model", str(args.out / "model")]
    if args.rope == "dynamic":  # whose config.json has the old window alone
        measure += ["--lengths", str(args.target_len)]
    say(f"wrote {args.out / 'model'}; next: {shlex.join(measure)}")


def read_texts(args, tokenizer):
    """Return the data.Batches to train on, None for no steps, and the Validation, None for none."""

    def read(paths, tokens):
        documents = data.tokenised(paths, tokenizer, cache_dir(), args.text_key)
        documents.join_conversations(until=tokens)
        if args.loss_on == "all":
            documents.masked = None
        return documents

    validation = None
    if args.eval_every:
        lengths = args.eval_lengths or [args.train_len]
        validation = Validation(lengths, read(args.eval_data, max(lengths)), tokenizer)
    if not args.steps:
        return None, validation
    batches = data.Batches(
        read(args.data, data.SPAN_IN_WINDOWS * args.train_len),
        args.seed,
        tokenizer.bos_id,
        retrieval_episodes(args, tokenizer),
        method=args.method,
        train_len=args.train_len,
        target_len=round(args.overshoot * args.target_len),
        chunks=args.chunks,
        offset=args.offset,
    )
    return batches, validation


def empty_model(args, config):
    """Return the model of this Config without values, with the adapters that the options ask for."""
    model = empty_transformer(config)
    if args.lora_rank:
        train = args.lora_train.split(",") if args.lora_train else ()
        add_adapters(model, args.lora_rank, args.lora_alpha, args.lora_targets.split(","), train)
    return model


def load_sharded(args, folder, config, device):
    """Return the model in a CheckpointFolder, but with this Config, sharded and ready for training."""
    model = empty_model(args, config)
    if args.float8:
        multiply_in_float8(model)
    fsdp.shard(
        model,
        device,
        compute_dtype=getattr(torch, args.dtype),
        param_dtype=getattr(torch, args.param_dtype),
        activation_checkpointing=args.activation_checkpointing,
        cpu_offload=args.cpu_offload,
        compile=args.compile,
    )
    folder.read_into(model)
    initialise_adapters(model, args.seed)
    return model.train()


@torch.no_grad()
def initialise_adapters(model, seed):
    """Give the adapters of a model, if any, their first values, the same on any number of processes."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, Adapter):
            fsdp.set_whole(module.a, initial_a(module.a.shape, generator))
            module.b.zero_()


def extended_config(config, args):
    """Return the Config of the model with its window extended as the options say.

    Raise InputError if no stock class of transformers would compute it.
    """
    settings = {}
    for option in ("factor", "beta_fast"):
        if getattr(args, option) is not None:
            settings[option] = getattr(args, option)
    extended = scaling.extend(config, args.rope, args.target_len, args.llama_4_scaling_beta, **settings)
    families.as_written(extended)  # This only checks it, so that a run does not fail when it saves.
    if args.adapter:
        adapter.check(extended)
    return extended


def retrieval_episodes(args, tokenizer):
    """Return the data.Episodes that the options ask for, None if there are none."""
    if not args.retrieval:
        return None
    # Without skips an episode is a plain window with facts and questions.
    reach = round(args.overshoot * args.target_len) if args.method == "pose" else args.episode_len

    def make(rng, document, weights):
        return retrieval.episode(rng, document, args.episode_len, reach, tokenizer, weights)

    return data.Episodes(args.retrieval, args.batch_size, args.episode_len, make)


def announce(args, as_given, base, config, batches):
    """Say what will be done, what it needs, and what speaks against it.

    args, as_given: the options as completed and before. base, config: the Config before and after the window
    was extended. batches: data.Batches, None without training.
    """
    for line in announcement.of_run(args, base, config, arguments.as_options):
        say(line)
    if batches is None:
        return
    shape, way = plan.Shape(empty_model(args, config)), completion.way_of(args, world_size())
    checkpoints = args.keep + 1 if args.save_every or args.save_minutes else 1  # the new one and those before
    room = plan.room_for(args.device, args.out)
    of_recipe = completion.tokens_of_recipe(args, as_given)
    needs = announcement.Needs(shape, way, args.steps, args.batch_size, batches, checkpoints, room, of_recipe)
    for line in needs.lines():
        say(line)
    if args.dry_run:
        for line in announcement.of_gpus(needs, completion.ways_on_gpus(args, as_given)):
            say(line)
    for line in needs.warnings(arguments.as_options):
        warn(line, shared=True)
    if not args.data and args.model != "tiny":
        say("without --data it trains on the source of Python's standard library; name texts like yours")


if __name__ == "__main__":
    process.run_distributed(main)
