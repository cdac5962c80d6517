"""What a training run records of its options, and what --resume takes from there.

Notable choices:
- What the earlier run recorded is turned back into words of a command line and parsed again, so that it is
  checked like any option. The words that are given now come behind them, and so take precedence.
- What decides the result must stay. Where the model and the texts are may change, what they hold may not.
  What changes is recorded in turn, so that the next --resume, and eval.py, need not be told again.
"""

import shlex
import sys
from pathlib import Path

import torch.distributed as dist

from cli import training
from hf.builtin import BUILT_IN
from storage.errors import InputError, warn
from storage.files import write_json
from storage.log import is_finished
from storage.processes import restarts
from storage.values import describe_changes, read_record

# Options that records of earlier versions lack, and their value when such a run goes on. (All that a recipe
# says is recorded as well. Those runs wrote no timed checkpoints, but nobody minds some.)
NEWER = {
    "retrieval": 0.0, "recipe": None, "save_minutes": 10.0, "text_key": "text", "loss_on": "answers",
    "lora_rank": 0, "lora_alpha": None, "lora_targets": None, "lora_train": None, "adapter": False,
    "float8": False,
}  # fmt: skip
NOT_RECORDED = ("out", "resume", "dry_run")  # options that belong to one call
BY_CONTENT = ("model", "data")  # paths: a resumed run may have others, with the same model and texts there
# Options that a resumed run may change: those of speed for this call alone, since the next one may have
# another machine, and what is shown or kept from here on.
SPEED = ("micro_batch_size", "device", "compile", "activation_checkpointing", "cpu_offload")
SHOWN_OR_KEPT = (
    "save_every", "save_minutes", "keep", "tensorboard", "eval_every", "eval_data", "eval_lengths", "adapter",
)  # fmt: skip
MAY_CHANGE = SPEED + SHOWN_OR_KEPT


def options_of_run(args):
    """Return the options of a run. With --resume, those that are not given are the earlier run's.

    args: the options as given. Raise InputError for an --out that holds another run, for a resumed run whose
    options differ, and where --resume finds no run and no --model says what one would begin with.
    """
    # torchrun --max_restarts gives the same command again after a process has died: then the run goes on.
    if (args.resume or restarts()) and (args.out / "args.json").exists():
        return options_of_earlier_run(args)
    names = ("args.json", "checkpoints", "model")
    holds_a_run = (args.out / "metrics.jsonl").is_file() or any((args.out / name).exists() for name in names)
    if holds_a_run and not args.dry_run:
        or_resume = ", or add --resume" if (args.out / "args.json").exists() else ""
        raise InputError(f"--out {args.out} already holds a run; name another folder{or_resume}")
    if holds_a_run and not args.resume:
        warn(f"--out {args.out} holds a run, so that this one needs another folder, or --resume", shared=True)
    if args.resume and args.model is None and not holds_a_run:
        raise InputError(
            f"--resume: {args.out} holds no run to go on from; name its folder, or add --model to begin one"
        )
    if args.resume:  # in case that another folder was meant
        warn(f"--resume: {args.out} holds no run yet; beginning one", shared=True)
    args.resume = False
    return args


def options_of_earlier_run(given):
    """Return the options of the run in --out, replaced by those that are given.

    given: the options as given. Raise InputError if the run is finished and another number of steps is asked
    for, or if an option differs that must not change.
    """
    parser = training.parser()
    out, record = given.out, given.out / "args.json"
    try:
        earlier = NEWER | read_record(record)
    except InputError:
        raise InputError(f"--resume: {record} is not readable; start again with another --out") from None
    recorded = [word for option, value in earlier.items() for word in words_of(option, value, given)]
    try:
        parser.parse_args(recorded)
    except InputError as error:
        raise InputError(f"--resume: {record} is not a run's ({error}); start with another --out") from None
    args = parser.parse_args([*recorded, *sys.argv[1:]])
    args.resume = True
    if not args.eval_every:  # validation is switched off: the run's own texts and lengths go too
        args.eval_data, args.eval_lengths = given.eval_data, given.eval_lengths
    is_done = is_finished(out)
    if is_done and args.steps != earlier.get("steps"):
        raise InputError(
            f"--resume: the run in {out} is finished, and its learning rate has fallen to 0. Train its "
            f"model in a run of its own: {command_for_more_steps(args, earlier)}"
        )
    options = {option: value for option, value in vars(args).items() if option not in NOT_RECORDED}
    if changed := describe_changes(earlier, what_stays(options)):
        remedy = "leave them out, or start with another --out"
        raise InputError(f"--resume: the run in {out} had other arguments: {changed}; {remedy}")
    has_checkpoint = any((out / "checkpoints").glob("step-*"))
    if (out / "model").exists() and not has_checkpoint and not is_done:
        reason = f"{out} has a model but no checkpoint to go on from; starting anew would replace the model"
        raise InputError(f"--resume: {reason}; name another --out")
    if not is_done:
        check_paths(args, given)
    return args


def check_paths(args, given):
    """Raise InputError if a path that the earlier run recorded, and that is not given, leads nowhere now."""
    for option in BY_CONTENT:
        if getattr(given, option):
            continue  # where it is read, it is checked
        recorded = getattr(args, option) or []
        for path in [recorded] if isinstance(recorded, str) else recorded:
            if path not in BUILT_IN and not Path(path).exists():
                where = f"say with --{option} where it is now"
                raise InputError(f"--resume: {path} is not there any more; {where}")


def command_for_more_steps(args, earlier):
    """Return the command that trains a finished run's model on, with the same settings and its window.

    args: the options, with the new number of steps. earlier: the finished run's, {option: value}.
    """
    out = args.out
    settings = earlier | {"model": str(out / "model"), "out": f"{out}-more", "rope": "default"}
    settings["steps"] = max(1, args.steps - earlier["steps"])
    # Those of the interpolation are in the model. Its recipe is spelt out.
    for option in ("factor", "beta_fast", "llama_4_scaling_beta", "recipe"):
        settings.pop(option, None)
    parser = training.parser()
    nothing_given = parser.parse_args([])
    words = ["python", "train.py"]
    for option, value in settings.items():
        if value != parser.get_default(option):
            words += words_of(option, value, nothing_given)
    return shlex.join(words)


def words_of(option, value, given):
    """Return a recorded option as words of a command line, so that it is checked like one.

    given: the options as given. Return no words for a list that is given too, since argparse would add to it.
    """
    if option not in vars(given) or value is None:
        return []
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    if not isinstance(value, list):
        return [f"--{option}={value}"]
    if not value or getattr(given, option):
        return []
    if all(isinstance(part, int) for part in value):
        return [f"--{option}={','.join(map(str, value))}"]
    return [f"--{option}={part}" for part in value]


# ---------------------------------------------------------------- the record


def record_of(args, as_given):
    """Return the record of a run for args.json, {option: value}.

    as_given: the options before they were completed. Those of MAY_CHANGE are recorded as given, since their
    defaults depend on the machine.
    """
    record = {option: value for option, value in vars(args).items() if option not in NOT_RECORDED}
    for option in MAY_CHANGE:
        record[option] = getattr(as_given, option)
    return record


def write_record(out, record):
    """Write the record of a run, new or resumed, to args.json in `out`.

    A resumed run's has what this call changed, but for SPEED: the next one takes it from there. Keys that
    only another version of this code knows stay.
    """
    path = out / "args.json"
    earlier = read_record(path) if path.exists() else {}
    stays = {option: earlier[option] for option in SPEED if option in earlier}
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, earlier | record | stays)


def what_stays(record):
    """Return what a checkpoint must have in common with the run of a record, {option or hash: value}."""
    return {key: value for key, value in record.items() if key not in MAY_CHANGE + BY_CONTENT}


def has_other_paths(args):
    """Return whether the model or the texts of a resumed run are named by other paths than it recorded."""
    earlier = read_record(args.out / "args.json")
    return any(getattr(args, option) != earlier.get(option) for option in BY_CONTENT)


def check_same_model_and_texts(out, record):
    """Raise InputError if the run in `out` began with other weights or texts, whatever their paths."""
    earlier = read_record(out / "args.json")
    for option in BY_CONTENT:
        hashed = f"{option}_sha256"
        if hashed not in record or record[hashed] == earlier.get(hashed):
            continue
        changed = describe_changes(earlier, {option: record[option]})
        changed = changed or f"what is in {record[option]} differs"
        begun = f"the run in {out} began with another --{option}: {changed}"
        raise InputError(f"--resume: {begun}; give it that one, or start again with another --out")


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
