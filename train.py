"""Extend a model's context window with PoSE.

    python train.py                                   # a laptop: the built-in tiny model, 256 -> 2,048
    python train.py --model my-llama --data texts/    # one GPU
    torchrun --nproc_per_node=8 train.py --model my-llama --target_len 131072

OUT/metrics.jsonl gets a line for each step, OUT/model is a Hugging Face folder at the end, OUT/checkpoints is
what --resume goes on from, and OUT/finished.json says that nothing is left to do.
"""

import copy
import math
import os
import resource
import shlex
import signal
import sys
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

import cli
import data
import fsdp
import retrieval
from hf import adapter, builtin, families, loaders, scaling, weights
from model import Adapter, add_adapters, empty_transformer, initial_a
from storage import texts
from storage.checkpoint import Checkpoints
from storage.errors import InputError
from storage.files import cache_dir, write_json
from storage.log import Log, mark_finished, show_progress, unmark_finished
from storage.values import describe_changes, read_json
from tasks.validation import Validation

MAX_GRAD_NORM = 1.0
MANY_PASSES = 10  # A run that goes over its texts more often than this warns.
MAX_SKIPPED = 10  # A run gives up after so many updates in a row that are not finite.
STEADY_STEP = 3  # The step of a call, counted from 1, whose time is that of later steps.


# ---------------------------------------------------------------- the loop


def train(args, model, optimizer, batches, validation, checkpoints, first_step, device, signals):
    """Train from first_step (steps count from 0) to args.steps, and return how many steps are done then.

    batches: data.Batches. validation: None, or a function of model and device that returns {length: nats a
    token}. signals: the list of catch_signals. Once a process has caught one, all stop after the same step,
    with a checkpoint. Raise InputError after MAX_SKIPPED updates in a row that were not finite.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    log = Log(args.out, first_step, args.tensorboard) if rank == 0 else None
    done, skipped_in_a_row = first_step, 0
    disable = None if rank == 0 else True  # None: tqdm draws a bar only where there is a terminal
    progress = tqdm(range(first_step, args.steps), initial=first_step, total=args.steps, disable=disable)
    began = time.perf_counter()
    prefetched = data.prefetched(batches, first_step, own_examples(args), args.micro_batch_size, device)
    # zip asks progress first: after the last step no batch is asked for.
    for step, batch in zip(progress, prefetched):
        lr = learning_rate(step, args)
        for group, share in zip(optimizer.param_groups, optimizer.lr_shares):
            group["lr"] = share * lr

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
        stop = any_process(signals, device) and done < args.steps
        figures = {"step": done, "loss": loss.item(), "lr": lr, "grad_norm": grad_norm.item()}
        figures |= speed_and_memory(model, args, time.perf_counter() - began, device)
        was_skipped = not (math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"]))
        skipped_in_a_row = skipped_in_a_row + 1 if was_skipped else 0
        if was_skipped:
            figures["skipped"] = True
        if validation and not stop and (done % args.eval_every == 0 or done == args.steps):
            figures["validation"] = validate(validation, model, device, done)
        if rank == 0:
            log.write(figures)
            show_progress(progress, figures)
        say_if_nothing_is_saved(args, first_step, figures)

        checkpoints.raise_if_failed()
        raise_if_diverged(skipped_in_a_row, done, args.steps)
        if stop or (args.save_every and done % args.save_every == 0):
            checkpoints.save(model, optimizer, done)
        if stop:
            progress.close()
            say(f"stopped after step {done} of {args.steps}; what is done is saved, add --resume to go on")
            break
        began = time.perf_counter()  # the wait for the next batch counts, validation and checkpoints do not
    return done


def own_examples(args):
    """Return the indices of this process's examples in every global batch."""
    share = args.batch_size // dist.get_world_size()
    first = dist.get_rank() * share
    return range(first, first + share)


def learning_rate(step, args):
    """Return the learning rate of a step (steps count from 0).

    It rises linearly over warmup_steps, then falls linearly to zero.
    """
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    return args.lr * (args.steps - step) / max(1, args.steps - args.warmup_steps)


def raise_if_diverged(skipped_in_a_row, done, steps):
    """Raise InputError if too many updates in a row were left out, or all `steps`. done: steps so far."""
    if skipped_in_a_row == min(MAX_SKIPPED, steps):
        raise InputError(
            f"step {done}: loss or gradient was not finite {skipped_in_a_row} times in a row, these updates "
            "were left out; look at the texts, or start again with a lower --lr and another --out"
        )


def say_if_nothing_is_saved(args, first_step, figures):
    """Say once what a crash would cost, if hours are left and no checkpoint will be written.

    figures: those of the step that was just done.
    """
    tokens_left = (args.steps - figures["step"]) * args.batch_size * args.train_len
    hours = tokens_left / figures["tokens_per_second"] / 3600
    if figures["step"] == first_step + STEADY_STEP and hours > 1 and not args.save_every:
        say(
            f"about {hours:.0f} hours to go, and a crash would lose all: no checkpoint is written before the "
            "end; Ctrl-C saves, and --resume --save_every N goes on and saves every N steps"
        )


def any_process(signals, device):
    """Return whether any process has caught a signal, so that all decide the same."""
    caught = torch.tensor(float(bool(signals)), device=device)
    dist.all_reduce(caught)
    return bool(caught.item())


def validate(validation, model, device, step):
    """Return the validation loss {length: nats a token} after a step, and say it."""
    nats = validation(model, device)
    by_length = ", ".join(f"{loss:.3f} at {length:,}" for length, loss in nats.items())
    say(f"step {step}: validation loss {by_length}")
    return nats


def speed_and_memory(model, args, seconds, device):
    """Return the figures of a step that took so many seconds.

    They are tokens_per_second over all processes, mfu (the model FLOP/s utilisation, None where the card's
    peak is not known) and peak_memory_gib.
    """
    tokens_per_second = args.batch_size * args.train_len / seconds
    peak = fsdp.peak_flops(device)
    # The operations of a token grow linearly with its window, so that the mean window gives their mean.
    window = args.train_len
    if args.retrieval:
        window = args.retrieval * args.episode_len + (1 - args.retrieval) * args.train_len
    flops_per_token = model.config.flops_per_token(window, frozen=args.lora_rank > 0)
    flops = tokens_per_second / dist.get_world_size() * flops_per_token
    return {
        "tokens_per_second": tokens_per_second,
        "mfu": flops / peak if peak else None,
        "peak_memory_gib": peak_memory_gib(device),
    }


def peak_memory_gib(device):
    """Return this process's peak memory so far, in GiB: the GPU's if it computes there, else the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def say(line):
    """Print a line on stderr, from process 0 alone."""
    if dist.get_rank() == 0:
        tqdm.write(line, file=sys.stderr)


# ---------------------------------------------------------------- before and after


def main():
    given = cli.training_parser().parse_args()
    with cli.own_out(given.out):
        run(cli.training_arguments(given))


def run(args):
    """Train as the options say. The folder args.out must belong to this run alone."""
    # --resume finds there what came through standard input.
    args.data, args.eval_data = map(texts.with_saved_stdin, (args.data, args.eval_data))
    as_given = copy.copy(args)
    args.device = cli.device(args.device)
    args.model = args.model or builtin.default_model(args.device)
    folder = builtin.open_model(args.model)
    base = folder.config
    cli.complete_training(args, base)
    config = extended_config(base, args)
    tokenizer = folder.load_tokenizer()
    batches, validation = read_texts(args, tokenizer) if args.steps else (None, None)
    record = cli.training_record(args, as_given)
    record["model_sha256"] = folder.fingerprint()  # the same path may hold something else another day
    if batches:
        record["data_sha256"] = batches.documents.sha256
    if args.resume:
        check_same_model_and_texts(args.out, record)

    # All that a user can get wrong has been checked. What follows takes memory and writes into --out.
    device = fsdp.start(args.device)
    check_agreement(record)
    model = load_sharded(args, folder, config, device)
    dist.barrier()  # a process that has read a weight that is NaN ends there, and then nothing is written
    if dist.get_rank() == 0 and not args.resume:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "args.json", record)
    optimizer = fsdp.adamw(model, args.lr, 1 / cli.LORA_LR if args.lora_rank else 1.0)
    may_differ = cli.MAY_CHANGE + cli.BY_CONTENT
    must_match = {key: value for key, value in record.items() if key not in may_differ}
    checkpoints = Checkpoints(args.out / "checkpoints", must_match, args.keep)
    first_step = checkpoints.load(model, optimizer, say) if args.resume else 0
    if args.resume and dist.get_rank() == 0:
        unmark_finished(args.out)
    announce(args, base, model, batches, first_step)
    if validation:  # the loss before training; and too little memory for it shows here, not at the end
        validate(validation, model, device, first_step)

    signals = catch_signals(checkpoints)
    done = None
    try:
        try:
            done = train(
                args, model, optimizer, batches, validation, checkpoints, first_step, device, signals
            )
        finally:  # An error in a step must not cost the checkpoint that is still being written.
            checkpoints.finish()
    finally:  # A disk too full for the last checkpoint must not cost the model.
        if done is not None:
            weights.save(model, tokenizer, args.out / "model")
            if args.adapter:
                adapter.save(model, folder, tokenizer, args.out / "adapter")
            if dist.get_rank() == 0 and done == args.steps:
                mark_finished(args.out, done)
    # All decide together, and none before all have saved: torchrun ends every process soon after the first
    # one that leaves with another code than 0.
    if any_process([number for number in signals if number == signal.SIGINT], device):
        sys.exit(130)  # so that a shell does not go on to the next command
    next_model = shlex.quote(str(args.out / "model"))
    hint = "" if signals else f"; next: python eval.py --task passkey --model {next_model}"
    say(f"wrote {args.out / 'model'}{hint}")


def read_texts(args, tokenizer):
    """Return the data.Batches to train on, and the Validation or None."""

    def read(paths):
        documents = data.tokenised(paths, tokenizer, cache_dir(), args.text_key)
        if args.loss_on == "all":
            documents.masked = None
        return documents

    documents, validation = read(args.data), None
    if args.eval_every:
        lengths = args.eval_lengths or [args.train_len]
        validation = Validation(lengths, read(args.eval_data), tokenizer)
    batches = data.Batches(
        documents,
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


def load_sharded(args, folder, config, device):
    """Return the model in a CheckpointFolder, but with this Config, sharded and ready for training."""
    model = empty_transformer(config)
    if args.lora_rank:
        train = args.lora_train.split(",") if args.lora_train else ()
        add_adapters(model, args.lora_rank, args.lora_alpha, args.lora_targets.split(","), train)
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


def check_same_model_and_texts(out, record):
    """Raise InputError if the run in `out` began with other weights or texts, whatever their paths."""
    earlier = read_json(out / "args.json")
    hashes = {key: value for key, value in record.items() if key.endswith("_sha256")}
    if changed := describe_changes(earlier, hashes):
        paths = describe_changes(earlier, {key: record[key] for key in cli.BY_CONTENT})
        changed = "; ".join(filter(None, (changed, paths)))
        raise InputError(f"--resume: {out} is of another run: {changed}; start again with another --out")


def check_agreement(record):
    """Raise InputError if the processes were started with different arguments."""
    records = [None] * dist.get_world_size()
    dist.all_gather_object(records, record)
    for key in record:
        values = [other.get(key) for other in records]
        if any(value != record[key] for value in values):
            raise InputError(
                f"{key} differs between processes: {values}; start all with the same arguments, texts and "
                "model"
            )


def announce(args, base, model, batches, first_step):
    """Say what will be done. base: the Config before the window was extended."""
    config = model.config
    if args.resume and not first_step:
        say(f"--resume: {args.out} holds no checkpoint yet; starting with the first step")
    stretch = f"{args.rope} by {args.factor:g}" if args.factor else args.rope
    going_on = f", going on after step {first_step}" if first_step else ""
    windows = f"window {base.max_position_embeddings:,} -> {args.target_len:,}"
    episodes = f", {args.retrieval:.0%} of the examples are episodes" if args.retrieval else ""
    say(f"{args.model}: {windows}, {args.method}, {stretch}{episodes}{going_on}")
    earlier = base.rope_scaling or {}
    if "factor" in earlier:
        if args.factor:
            together = f"{stretch} comes on top, {config.rope_scaling['factor']:g} in all"
        else:
            together = "that stays"
        say(f"the model is scaled already ({earlier['rope_type']} by {earlier['factor']:g}); {together}")
    warn_of_loaders(args, base, config)
    if args.lora_rank:
        announce_adapters(args, model)
    if batches:
        n_used = len(batches.documents) - batches.n_too_short
        say(
            f"{args.steps} steps of {args.batch_size} x {args.train_len:,} tokens on "
            f"{dist.get_world_size()} process(es); {batches.usable_tokens:,} tokens in {n_used} document(s), "
            f"{batches.n_too_short} too short and left out"
        )
        if batches.counted_share < 1:
            say(f"{batches.counted_share:.1%} of the tokens are answers or plain text, and only these count")
        passes = args.steps * args.batch_size * args.train_len / batches.usable_tokens
        if passes > MANY_PASSES:
            say(f"that is {passes:,.0f} passes over these texts, which will be learnt by heart: add more")
        if not args.data and args.model != "tiny":
            say("without --data it trains on the source of Python's standard library; name texts like yours")


def announce_adapters(args, model):
    """Say what is trained instead of the whole model."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    beside = f", and {args.lora_train}" if args.lora_train else ""
    say(
        f"LoRA of rank {args.lora_rank} on {args.lora_targets}{beside}: {trained:,} parameters are trained, "
        f"{frozen:,} stay as they are"
    )


def warn_of_loaders(args, base, config):
    """Say in one line which loaders will compute a different model, and which options mend that."""
    remarks = []
    for what, mending in loaders.differences(config, args.target_len / base.max_position_embeddings):
        options = "".join(f" (--{option} {value} mends it)" for option, value in mending.items())
        remarks.append(what + options)
    if remarks:
        say(f"not every loader will compute this model: {'; '.join(remarks)}")


def catch_signals(checkpoints):
    """Catch SIGINT and SIGTERM from here on, and return the list to which each adds its number.

    The first one does not end the process. checkpoints: tells what a second one would cost.
    """
    caught = []
    speaks = dist.get_rank() == 0

    def catch(number, frame):
        caught.append(number)
        line = "stopping after this step and saving"
        # A second signal ends the process at once. Not under torchrun: it passes signals on several times,
        # and kills after a while itself.
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(number, signal.SIG_DFL)
            line += f"; a second time ends it at once, and loses what came after step {checkpoints.newest}"
        if speaks:
            os.write(2, f"\n{line}\n".encode())  # print may be in the middle of something

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, catch)
    return caught


if __name__ == "__main__":
    cli.run_distributed(main)
