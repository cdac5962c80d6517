"""The command line of train.py: its options, and the recipes that their defaults come from.

Defaults that depend on the model, the machine or an earlier run are None here; completion.py and resuming.py
fill them in.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import pose
import rope
from cli.arguments import (
    LARGEST,
    LARGEST_LR,
    LARGEST_SEED,
    ArgumentParser,
    as_path,
    names_of,
    number,
    path_name,
    token_counts,
    whole_number,
)
from model import TRAINED_BESIDE

LORA_LR = 10  # the learning rate of adapters, in learning rates of whole weights


@dataclass(frozen=True)
class Recipe:
    """The defaults of those training options that depend on the model. The values here are section 4.1's."""

    steps: int = 1000
    # The paper's 64 examples of 2,048 tokens. Of a longer window there are fewer, but one for each process.
    tokens_per_step: int = 131072
    lr: float = 2e-5
    warmup_steps: int = 10
    target_windows: int = 16  # target_len, in windows of the model
    train_windows: int = 1  # train_len, in windows of the model
    rope: str = "yarn"
    headroom: float = 1.0  # the interpolation is made for target_len times this
    beta_fast: float | None = None  # None: rope.py's
    overshoot: float = 1.0  # positions are drawn from a window of target_len times this
    llama_4_scaling_beta: float = 0.0
    retrieval: float = 0.0  # share of the examples that are retrieval episodes


RECIPES = {
    "paper": Recipe(),
    # What was found for smollm2-135m: minutes on one GPU, and codes are found far back.
    "fast": Recipe(
        steps=300,
        lr=4e-4,
        train_windows=4,
        retrieval=0.5,
        rope="ntk",
        headroom=1.188,
        overshoot=1.25,
        llama_4_scaling_beta=0.1,
    ),
    # For the model of that name, on a laptop.
    "tiny": Recipe(
        steps=150,
        tokens_per_step=4096,
        lr=2e-4,
        target_windows=8,
        headroom=2,
        beta_fast=8,
    ),
}
RECIPE_OF_MODEL = {"smollm2-135m": "fast", "tiny": "tiny"}  # of others it is the paper's


def parser():
    """Return the parser of train.py.

    Defaults that depend on the model or the machine are None: see completion.complete.
    """
    p = ArgumentParser(description="Extend a model's context window with PoSE.")
    # fmt: off
    p.add_argument("--model", type=path_name,
        help="a Hugging Face folder, or tiny or smollm2-135m (default: smollm2-135m with a GPU, else tiny)")
    p.add_argument("--data", type=path_name, nargs="+", action="extend", default=[], metavar="FILE",
        help="texts: .txt, .md, .jsonl, .ndjson, .json files (.gz and .zst too), .parquet, folders of them, "
        "or - for standard input (default: Python's standard library)")
    p.add_argument("--text_key", default="text", metavar="KEY",
        help="key of the text in JSON and Parquet (default: text); objects without it may have messages, or "
        "prompt and completion")
    p.add_argument("--out", type=as_path, default=Path("out"), metavar="DIR",
        help="a new folder for this run (default: out)")
    p.add_argument("--target_len", type=whole_number(1),
        help="tokens in the new window (default: 16 times the model's window, 8 times with tiny)")
    p.add_argument("--recipe", choices=RECIPES,
        help="defaults of the other options. paper: section 4.1's, 131 million tokens with YaRN. fast: 39 "
        "million tokens with ntk, half of the examples retrieval episodes, measured on smollm2-135m alone; a "
        "larger model may want a lower --lr than its 4e-4. tiny: that model's. More tokens where a step has "
        "more, see --batch_size (default: fast with smollm2-135m, tiny with tiny, else paper)")
    p.add_argument("--dry_run", action="store_true",
        help="say what the run will need, tokens, memory and disk, and stop; --out is left alone")
    # fmt: on
    add_method(p.add_argument_group("the method"))
    add_schedule(p.add_argument_group("training"))
    add_lora(p.add_argument_group("adapters (LoRA)"))
    add_interruptions(p.add_argument_group("interruptions"))
    add_watching(p.add_argument_group("watching"))
    add_speed(p.add_argument_group("speed and memory"))
    return p


# Each of these adds the options of one group to it.


# fmt: off
def add_method(g):
    g.add_argument("--method", choices=pose.METHODS, default="pose",
        help="what an example is. pose: chunks of a short window with skips between their positions. full: "
        "a window of target_len. pi: a plain short window. randpos: a short text at random positions "
        "(default: pose)")
    g.add_argument("--train_len", type=whole_number(1),
        help="tokens in an example (default: the model's window; with --method full target_len; with the "
        "fast recipe and --data up to four windows: at most 32,768 tokens and a quarter of the target, but "
        "one window at least)")
    g.add_argument("--chunks", type=whole_number(1), default=2,
        help="pose: chunks in an example (default: 2)")
    g.add_argument("--offset", choices=pose.OFFSETS, default="uniform",
        help="pose: where a chunk's text is taken from. uniform: anywhere behind the one before. zero: "
        "right behind it. skip: as far behind as its positions say (default: uniform)")
    g.add_argument("--overshoot", type=number(1, LARGEST), metavar="X",
        help="pose, randpos: draw positions from a window of X times target_len; otherwise its last "
        "stretch is met rarely (default: 1; 1.25 with the fast recipe and ntk)")
    g.add_argument("--retrieval", type=number(0, 1), metavar="SHARE",
        help="pose, pi: share of the examples that are episodes: texts with facts and, behind a skip, "
        "questions about them, in which the answers count most; they have chunks and skips of their own "
        "(default: 0; 0.5 with the fast recipe and pose)")
    g.add_argument("--episode_len", type=whole_number(1),
        help="tokens in an episode, a divisor of train_len (default: the model's window, or train_len where "
        "that is no multiple of it)")
    g.add_argument("--rope", choices=rope.EXTENSIONS,
        help="interpolation (default: yarn; ntk with the fast recipe)")
    g.add_argument("--factor", type=number(1, LARGEST),
        help="factor of the interpolation (default: target_len / window, and twice that with tiny and "
        "yarn; for ntk the factor that slows the critical pair by target_len / window, or by 1.188 times "
        "that with the fast recipe, see rope.ntk_factor; 1 for dynamic, and where the window stays)")
    g.add_argument("--beta_fast", type=number(1, LARGEST),
        help="yarn: pairs that turn at least so often in the window stay as they are (default: 32; 8 with "
        "tiny)")
    g.add_argument("--llama_4_scaling_beta", type=number(0, 100), metavar="BETA",
        help="multiply the queries of token i by 1 + BETA ln(1 + floor(i / window)), as Llama 4 does "
        "(default: what the model has, else 0, which is not at all; 0.1 with the fast recipe and ntk, for "
        "LLaMA and Mistral)")


def add_schedule(g):
    g.add_argument("--steps", type=whole_number(0),
        help="optimizer steps; 0 writes the untrained model with its interpolation (default: 1000; 150 "
        "with tiny's recipe, 300 with the fast one)")
    g.add_argument("--batch_size", type=whole_number(1),
        help="examples in a step, over all processes (default: as many as make 131,072 tokens, 4,096 with "
        "tiny's recipe, but one for each process at least; with --method full as many as there would be "
        "windows)")
    g.add_argument("--lr", type=number(0, LARGEST_LR),
        help="peak learning rate of AdamW (default: 2e-5; 2e-4 with tiny, 4e-4 with the fast recipe; with "
        f"--lora_rank {LORA_LR} times that)")
    g.add_argument("--warmup_steps", type=whole_number(0),
        help="steps of linear warm-up, before linear decay to 0 (default: 10)")
    g.add_argument("--seed", type=whole_number(0, LARGEST_SEED), default=0,
        help="seed of the examples (default: 0)")
    g.add_argument("--loss_on", choices=("answers", "all"), default="answers",
        help="what counts in conversations and completions: what the assistant says, or all. Of plain texts "
        "all counts (default: answers)")


def add_lora(g):
    g.add_argument("--lora_rank", type=whole_number(0), default=0, metavar="R",
        help="train low-rank adapters beside frozen weights: 16 is usual (default: 0, which trains all "
        "weights)")
    g.add_argument("--lora_alpha", type=whole_number(1), metavar="ALPHA",
        help="adapters count ALPHA / R times (default: 2 R, so that a higher rank changes nothing else)")
    g.add_argument("--lora_targets", type=names_of("q", "k", "v", "o", "gate", "up", "down"), metavar="q,v,…",
        help="linear layers that get an adapter, of q,k,v,o,gate,up,down (default: all)")
    g.add_argument("--lora_train", type=names_of(*TRAINED_BESIDE), metavar="embed,norm",
        help="train the embedding, the norms or both as well, which LongLoRA found to be needed at 100,000 "
        f"tokens; their learning rate is a {LORA_LR}th of --lr (default: neither)")
    g.add_argument("--adapter", action=argparse.BooleanOptionalAction, default=False,
        help="also write the adapters by themselves, for PEFT, into OUT/adapter; OUT/model has them merged")


def add_interruptions(g):
    g.add_argument("--save_every", type=whole_number(0), default=0, metavar="N",
        help="write a checkpoint every N steps, and keep them when the run has ended (default: 0, never)")
    g.add_argument("--save_minutes", type=number(0, 100_000), default=10.0, metavar="M",
        help="write a checkpoint every M minutes; these go when the model is written (default: 10; 0: never)")
    g.add_argument("--keep", type=whole_number(1), metavar="N",
        help="keep the newest N checkpoints (default: 1, 2 with --save_every)")
    g.add_argument("--resume", action="store_true",
        help="go on from the newest checkpoint in --out; options that are not given stay as they were; with "
        "--model, begin a run where there is none")


def add_watching(g):
    g.add_argument("--eval_every", type=whole_number(0), default=0, metavar="N",
        help="measure the validation loss before the first step, every N steps and after the last "
        "(default: never)")
    g.add_argument("--eval_data", type=path_name, nargs="+", action="extend", default=[], metavar="FILE",
        help="texts for validation, as for --data")
    g.add_argument("--eval_lengths", type=token_counts(), metavar="TOKENS,…",
        help="windows of validation; all of them score the same last tokens, as many as the shortest holds "
        "(default: train_len)")
    g.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=False,
        help="also write TensorBoard events into OUT/tensorboard")


def add_speed(g):
    dtypes = ("float32", "bfloat16")
    g.add_argument("--micro_batch_size", type=whole_number(1),
        help="examples in one forward pass of a process (default: about 32,768 tokens)")
    g.add_argument("--activation_checkpointing", choices=("none", "selective", "full"), default="none",
        help="compute activations twice to save memory: all of a block (full), or all but its matrix "
        "products and attention (selective) (default: none)")
    g.add_argument("--cpu_offload", action=argparse.BooleanOptionalAction, default=False,
        help="keep weights and optimizer in host memory")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile each block (default: on a GPU)")
    g.add_argument("--dtype", choices=dtypes,
        help="dtype of the computation (default: bfloat16 on a GPU)")
    g.add_argument("--param_dtype", choices=dtypes, default="float32",
        help="dtype of master weights, gradients and optimizer state. bfloat16 halves their memory, but "
        "rounds each update to 3 digits of the weight, so that small ones are lost (default: float32)")
    g.add_argument("--float8", action=argparse.BooleanOptionalAction, default=False,
        help="multiply in float8 in the linear layers of the blocks, which takes an H100 or a later GPU")
    g.add_argument("--device", choices=("cuda", "cpu"),
        help="where to compute (default: cuda if there is one)")
# fmt: on
