"""Options of train.py, completed: what is not given depends on the model, the machine and the recipe.

Options that cannot work together, or not with this model, are refused here.
"""

import contextlib
import copy
import importlib.util
from pathlib import Path

import torch

import float8
import rope
from cli.arguments import LARGEST
from cli.process import compute_dtype
from cli.training import LORA_LR, RECIPE_OF_MODEL, RECIPES
from hf import families
from hf.builtin import BUILT_IN
from model import linear_layers
from storage.errors import InputError, warn
from storage.processes import world_size
from tasks import plan

LARGEST_BATCH_TOKENS = 2**28  # in a step, over all processes
MICRO_BATCH_TOKENS = 32768  # tokens that a process takes through the model at once, unless told otherwise


def complete(args, config):
    """Fill in the options of train.py that depend on the model and the machine.

    config: the model's Config. Raise InputError for options that cannot work together.
    """
    args.recipe = args.recipe or RECIPE_OF_MODEL.get(args.model, "paper")
    recipe = RECIPES[args.recipe]
    window = config.max_position_embeddings
    for option in ("steps", "warmup_steps", "rope"):
        if getattr(args, option) is None:
            setattr(args, option, getattr(recipe, option))
    if args.lr is None:
        args.lr = LORA_LR * recipe.lr if args.lora_rank else recipe.lr
    complete_lora(args, config)
    complete_lengths(args, window, recipe)
    complete_episodes(args, window, recipe)
    complete_batch(args, window, recipe)
    # The recipe's factor, overshoot and scale of the queries were found for one interpolation and need not
    # suit another. With another one, or where the window stays as it is, the paper's are taken.
    suits = args.rope == recipe.rope and args.target_len > window
    complete_interpolation(args, config, recipe if suits else RECIPES["paper"])
    if args.beta_fast is None and args.rope in rope.RAMPED:
        args.beta_fast = recipe.beta_fast  # it suits the model's size, not one interpolation
    refuse_contradictions(args)
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    args.dtype = args.dtype or compute_dtype(args.device, args.float8)
    if args.float8:
        if args.dtype != "bfloat16":
            raise InputError("--float8: its results are bfloat16; leave --dtype out")
        float8.check(config, args.micro_batch_size * args.train_len, args.device)
        if args.device == "cpu":
            warn("--float8: a CPU only imitates it, which is slow and good for trying alone", shared=True)
    args.keep = args.keep or (2 if args.save_every else 1)


def complete_lora(args, config):
    """Fill in lora_alpha and lora_targets where there are adapters. config: the model's Config."""
    if not args.lora_rank:
        for option in ("lora_alpha", "lora_targets", "lora_train", "adapter"):
            if getattr(args, option):
                raise InputError(f"--{option} belongs to --lora_rank; leave it out or give a rank")
        return
    if args.lora_rank > config.hidden_dim:
        raise InputError(
            f"--lora_rank {args.lora_rank}: this model's weights have at most rank {config.hidden_dim}; "
            "lower it, or leave it out to train them all"
        )
    if args.lora_alpha is None:
        args.lora_alpha = 2 * args.lora_rank
    layers = linear_layers(config)
    if args.lora_targets is None:
        args.lora_targets = ",".join(layers)
    for target in args.lora_targets.split(","):
        if target not in layers:
            raise InputError(f"--lora_targets: this model has no {target}; choose of {','.join(layers)}")


def complete_lengths(args, window, recipe):
    """Fill in target_len and train_len. window: the model's, in tokens."""
    if args.target_len is None:
        args.target_len = recipe.target_windows * window
    if args.target_len > LARGEST:
        raise InputError(f"--target_len {args.target_len}: at most {LARGEST}")
    if args.target_len < window:
        raise InputError(
            f"--target_len {args.target_len} is smaller than the model's window of {window}; raise it"
        )
    if args.train_len is None and args.method == "full":
        args.train_len = args.target_len
    elif args.train_len is None:
        # Few files of the standard library are longer than one window.
        windows = recipe.train_windows if args.data else 1
        # A quarter of the target leaves room for skips, a quarter of a step for different texts in it.
        # Episodes of a window each fill an example of whole windows.
        longest = min(args.target_len, recipe.tokens_per_step) // 4
        args.train_len = window * max(1, min(windows, longest // window))
        if window > MICRO_BATCH_TOKENS and args.steps:
            shorter = "--train_len 8192 takes far less memory and time, and the skips reach as far"
            warn(f"an example has {window:,} tokens, the model's whole window: {shorter}", shared=True)
    if args.target_len < args.train_len:
        raise InputError(
            f"--target_len {args.target_len} is smaller than the train window of {args.train_len}; raise "
            "it or lower --train_len"
        )
    if args.method == "full" and args.train_len != args.target_len:
        raise InputError(
            f"--method full trains on whole windows: leave --train_len out or make it {args.target_len}"
        )


def complete_episodes(args, window, recipe):
    """Fill in retrieval, and episode_len where there are episodes. window: the model's, in tokens."""
    if args.retrieval is None:
        args.retrieval = recipe.retrieval if args.method == "pose" else 0.0
    if args.retrieval and args.method not in ("pose", "pi"):
        raise InputError(f"--retrieval belongs to --method pose and pi; leave it out with {args.method}")
    if not args.retrieval:
        if args.episode_len is not None:
            raise InputError("--episode_len belongs to --retrieval; leave it out or give a share above 0")
        return
    if args.episode_len is None:
        args.episode_len = args.train_len if args.train_len % window else window
    if args.train_len % args.episode_len:
        raise InputError(
            f"--episode_len {args.episode_len} does not divide the {args.train_len} tokens of an example; "
            "choose a divisor"
        )


def complete_batch(args, window, recipe):
    """Fill in batch_size and micro_batch_size. window: the model's, in tokens."""
    world = world_size()
    if args.batch_size is None:
        # A step has as many tokens whatever the length of an example, as near as the number of processes
        # divides them, and at least an example of each. (With full it has as many examples as there would be
        # windows.)
        length = window if args.method == "full" else args.train_len
        args.batch_size = world * max(1, round(recipe.tokens_per_step / length / world))
    if takes_single_examples(args):
        if args.micro_batch_size not in (None, 1):
            raise InputError(
                f"--micro_batch_size {args.micro_batch_size}: examples go one at a time where episodes are "
                f"shorter than plain windows; leave it out, or give --episode_len {args.train_len}"
            )
        args.micro_batch_size = 1
    args.micro_batch_size = split_batch(args.batch_size, args.micro_batch_size, args.train_len, world)


def takes_single_examples(args):
    """Return whether examples go through the model one at a time.

    Plain windows and shorter episodes do not go through it together, and all processes must make the same
    number of forward passes.
    """
    return 0 < args.retrieval < 1 and args.episode_len < args.train_len


def split_batch(batch_size, micro_batch_size, tokens, world):
    """Return how many examples each of `world` processes takes in one forward pass.

    micro_batch_size: that number, if it is given; None for as many examples as make about MICRO_BATCH_TOKENS.
    tokens: in an example. Raise InputError for a batch that cannot be split evenly or that is too large.
    """
    if batch_size * tokens > LARGEST_BATCH_TOKENS:
        raise InputError(
            f"--batch_size {batch_size} with {tokens} tokens in an example: a step takes at most "
            f"{LARGEST_BATCH_TOKENS} tokens; lower one of the two"
        )
    if batch_size % world:
        raise InputError(
            f"--batch_size {batch_size} does not divide over {world} processes; make it a multiple"
        )
    share = batch_size // world
    if micro_batch_size is None:
        micro_batch_size = min(share, max(1, MICRO_BATCH_TOKENS // tokens))
        while share % micro_batch_size:
            micro_batch_size -= 1
    elif share % micro_batch_size:
        raise InputError(
            f"--micro_batch_size {micro_batch_size} does not divide the {share} examples of each process; "
            "choose a divisor"
        )
    return micro_batch_size


def complete_interpolation(args, config, recipe):
    """Fill in factor, llama_4_scaling_beta and overshoot."""
    window = config.max_position_embeddings
    if args.factor is None and args.rope not in ("default", "dynamic"):
        args.factor = recipe.headroom * args.target_len / window
        if args.rope == "ntk":
            of_model = config.rotary_dim, config.rope_theta, config.rope_scaling
            factor = rope.ntk_factor(*of_model, window, args.factor)
            args.factor = float(f"{factor:.3g}")  # rounded to three digits
    if args.llama_4_scaling_beta is None:
        own = (config.rope_scaling or {}).get("llama_4_scaling_beta")
        of_recipe = recipe.llama_4_scaling_beta if families.can_scale_queries(config) else 0.0
        args.llama_4_scaling_beta = of_recipe if own is None else own
    if args.overshoot is None:
        args.overshoot = recipe.overshoot if args.method in ("pose", "randpos") else 1.0


def refuse_out_inside(out, option, path, reason):
    """Raise InputError, which gives the reason, if --out is a folder that an option names, or inside it."""
    if Path(path).is_dir() and out.resolve().is_relative_to(Path(path).resolve()):
        raise InputError(f"--out {out} is inside --{option} {path}, {reason}; name a folder elsewhere")


def refuse_contradictions(args):
    """Raise InputError for options that do not go together."""
    for option in ("data", "eval_data"):
        for path in getattr(args, option) or ():
            refuse_out_inside(args.out, option, path, "where its files would be read as texts")
    if args.model not in BUILT_IN and not args.resume:
        refuse_out_inside(args.out, "model", args.model, "whose folder stays as it is")
    if args.eval_lengths and not args.eval_every:
        raise InputError("--eval_lengths belongs to --eval_every and --eval_data; leave it out or add them")
    if bool(args.eval_every) != bool(args.eval_data):
        raise InputError("--eval_every and --eval_data belong together: give both or neither")
    if args.beta_fast is not None and args.rope not in rope.RAMPED:
        raise InputError(f"--beta_fast: --rope {args.rope} does not have it; leave it out or choose yarn")
    if args.factor is not None and args.rope == "default":
        raise InputError("--factor: --rope default interpolates nothing; leave it out or choose a mode")
    if args.method != "pose" and (args.chunks != 2 or args.offset != "uniform"):
        raise InputError(f"--chunks and --offset belong to --method pose; leave them out with {args.method}")
    # An overshoot of 1 is what a run without skips records, and what --resume gives back.
    if args.method not in ("pose", "randpos") and args.overshoot != 1:
        raise InputError(f"--overshoot belongs to --method pose and randpos; leave it out with {args.method}")
    if args.factor is not None and args.factor > LARGEST:  # computed: one that is given is in that range
        needed = f"--rope {args.rope} needs a factor of {args.factor:g} for it, more than {LARGEST}"
        raise InputError(f"--target_len {args.target_len}: {needed}; lower it")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard: not installed here; pip install tensorboard")


# ---------------------------------------------------------------- what options mean for the plan of a run


def way_of(args, processes):
    """Return the plan.Way of a run with these completed options on so many processes."""
    return plan.Way(
        train_len=args.train_len,
        examples=args.micro_batch_size,
        micro_batches=args.batch_size // processes // args.micro_batch_size,
        processes=processes,
        param_bytes=getattr(torch, args.param_dtype).itemsize,
        compute_bytes=getattr(torch, args.dtype).itemsize,
        activation_checkpointing=args.activation_checkpointing,
        cpu_offload=args.cpu_offload,
        compiled=args.compile,
        float8=args.float8 and not args.lora_rank,
    )


def tokens_of_recipe(args, as_given):
    """Return the tokens that the recipe gives a step.

    It is None where --batch_size, the record of a resumed run or --method full decides. args, as_given: the
    options as completed and before.
    """
    if as_given.batch_size is not None or args.method == "full":
        return None
    return RECIPES[args.recipe].tokens_per_step


def ways_on_gpus(args, as_given):
    """Return {number of GPUs: plan.Way} of the same batches on 1 to 64 GPUs.

    args, as_given: the options as completed and before. Numbers that do not share a batch evenly are left
    out.
    """
    on_gpu = copy.copy(args)
    on_gpu.dtype = as_given.dtype or compute_dtype("cuda")
    on_gpu.compile = as_given.compile is not False
    micro_batch_size = 1 if takes_single_examples(args) else as_given.micro_batch_size
    ways = {}
    for n in (1, 2, 4, 8, 16, 32, 64):
        with contextlib.suppress(InputError):
            on_gpu.micro_batch_size = split_batch(args.batch_size, micro_batch_size, args.train_len, n)
            ways[n] = way_of(on_gpu, n)
    return ways
