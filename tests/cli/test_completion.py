"""Options of train.py that are not given depend on the model, the machine and the recipe."""

import copy
import dataclasses

import pytest

from bench import SHAPES
from cli import completion
from hf import scaling
from storage import errors
from storage.errors import InputError

SMOLLM2 = SHAPES["smollm2-135m"]
TO_16_WINDOWS = ("--model", "smollm2-135m", "--target_len", 131072)


@pytest.fixture
def parse_and_complete(parse):
    """parse_and_complete("--steps", 3, config=SMOLLM2) -> the completed options of train.py, on a CPU."""

    def start(*arguments, config=SMOLLM2):
        args = parse(*arguments, "--device", "cpu")
        complete(args, config)
        return args

    return start


def complete(args, config=SMOLLM2):
    completion.complete(args, config)


@pytest.mark.parametrize(
    "arguments, factor, overshoot, beta",
    [
        ([], 96, 1.25, 0.1),
        (["--rope", "yarn"], 16, 1, 0),
        (["--method", "full"], 96, 1, 0.1),
        (["--method", "pi"], 96, 1, 0.1),
        (["--factor", 20, "--overshoot", 1.5, "--llama_4_scaling_beta", 0], 20, 1.5, 0),
    ],
)
def test_a_recipe_is_for_its_own_interpolation(parse_and_complete, arguments, factor, overshoot, beta):
    """SmolLM2's, which nothing here can run, for 16 windows.

    With another interpolation the paper's settings are left.
    """
    args = parse_and_complete(*TO_16_WINDOWS, *arguments)
    assert (args.factor, args.overshoot, args.llama_4_scaling_beta) == (factor, overshoot, beta)
    recorded = copy.deepcopy(args)
    complete(args)  # as --resume does with what the run recorded
    assert args == recorded


@pytest.mark.parametrize(
    "arguments, processes, train_len, batch_size",
    [
        ("--data texts", 1, 32768, 4),
        ("--data texts", 8, 32768, 8),
        ("", 8, 8192, 16),
        ("", 3, 8192, 15),
        ("--data texts --batch_size 6", 2, 32768, 6),
        ("--data texts --target_len 65536", 1, 16384, 8),
        ("--data texts --target_len 16384", 1, 8192, 16),
        ("--data texts --target_len 100000", 1, 24576, 5),
        ("--data texts --target_len 65535", 1, 8192, 16),
        ("--train_len 4096", 1, 4096, 32),
        ("--train_len 24576", 1, 24576, 5),
        ("--data texts --method full", 1, 131072, 16),
        ("--data texts --method pi", 1, 32768, 4),
    ],
)
def test_smollm2_trains_in_windows_longer_than_its_own_where_there_are_texts(
    parse_and_complete, as_first_of, arguments, processes, train_len, batch_size
):
    """A step has as many tokens as 16 windows of the model, as near as processes divide them.

    Each example leaves room for skips.
    """
    as_first_of(processes)
    args = parse_and_complete("--model", "smollm2-135m", *arguments.split())
    assert (args.train_len, args.batch_size) == (train_len, batch_size)


@pytest.mark.parametrize(
    "arguments, share, episode_len, micro_batch_size",
    [
        ("smollm2-135m --data texts", 0.5, 8192, 1),
        ("smollm2-135m --data texts --target_len 100000", 0.5, 8192, 1),
        ("smollm2-135m --data texts --episode_len 32768", 0.5, 32768, 1),
        ("smollm2-135m", 0.5, 8192, 4),
        ("smollm2-135m --train_len 4096", 0.5, 4096, 8),
        ("smollm2-135m --train_len 12288 --batch_size 2", 0.5, 12288, 2),
        ("smollm2-135m --train_len 16384 --batch_size 2", 0.5, 8192, 1),
        ("smollm2-135m --train_len 16384 --batch_size 2 --retrieval 1", 1, 8192, 2),
        ("smollm2-135m --method pi", 0, None, 4),
        ("smollm2-135m --method pi --retrieval 1", 1, 8192, 4),
        ("smollm2-135m --method full", 0, None, 1),
        ("smollm2-135m --retrieval 0", 0, None, 4),
        ("tiny", 0, None, 1),
        ("folder", 0, None, 4),
    ],
)
def test_episodes_have_the_models_window_and_fill_an_example(
    parse_and_complete, arguments, share, episode_len, micro_batch_size
):
    """Windows of two lengths do not go through the model together."""
    args = parse_and_complete("--model", *arguments.split())
    assert (args.retrieval, args.episode_len) == (share, episode_len)
    assert args.micro_batch_size == micro_batch_size
    recorded = copy.deepcopy(args)
    complete(args)  # as --resume does with what the run recorded
    assert args == recorded


@pytest.mark.parametrize("window, batch_size", [(2048, 64), (4096, 32), (8192, 16), (32768, 4), (2**20, 1)])
def test_the_papers_recipe_is_for_any_window(parse_and_complete, window, batch_size):
    """131,072 tokens a step, section 4.1's 64 x 2,048, and all else as there."""
    config = dataclasses.replace(SMOLLM2, max_position_embeddings=window)
    args = parse_and_complete("--model", "folder", config=config)
    assert parse_and_complete("--model", "folder", "--recipe", "paper", config=config) == args
    assert (args.train_len, args.batch_size, args.steps, args.lr) == (window, batch_size, 1000, 2e-5)
    assert (args.rope, args.target_len, args.factor, args.retrieval) == ("yarn", 16 * window, 16, 0)


@pytest.mark.parametrize(
    "window, train_len",
    [(2048, 8192), (8192, 32768), (12288, 24576), (32768, 32768), (131072, 131072)],
)
def test_the_fast_recipe_is_for_any_model(parse_and_complete, window, train_len):
    """A step has as many tokens, and at least four texts if the window allows it."""
    config = dataclasses.replace(SMOLLM2, max_position_embeddings=window)
    fast = ("--recipe", "fast", "--data", "texts")
    args = parse_and_complete("--model", "folder", *fast, config=config)
    assert (args.train_len, args.batch_size, args.episode_len) == (train_len, 131072 // train_len, window)
    assert (args.steps, args.lr, args.rope, args.retrieval, args.overshoot) == (300, 4e-4, "ntk", 0.5, 1.25)
    assert args.llama_4_scaling_beta == 0.1
    # Qwen2's stock class does not scale its queries.
    qwen = dataclasses.replace(config, model_type="qwen2", qkv_bias=True)
    args = parse_and_complete("--model", "folder", *fast, config=qwen)
    assert args.llama_4_scaling_beta == 0
    scaling.extend(qwen, args.rope, args.target_len, args.llama_4_scaling_beta, factor=args.factor)


def test_the_built_in_models_have_recipes_of_their_own(parse_and_complete):
    smollm2 = parse_and_complete("--model", "smollm2-135m", "--data", "texts")
    assert smollm2.recipe == "fast"
    smollm2.model = "folder"
    assert parse_and_complete("--model", "folder", "--recipe", "fast", "--data", "texts") == smollm2
    tiny = parse_and_complete("--model", "tiny")
    assert (tiny.recipe, tiny.steps, tiny.lr, tiny.beta_fast) == ("tiny", 150, 2e-4, 8)
    assert parse_and_complete("--model", "tiny", "--recipe", "paper").lr == 2e-5


@pytest.mark.parametrize("recipe", ["paper", "fast", "tiny"])
@pytest.mark.parametrize("mode", ["linear", "ntk", "yarn", "llama3"])
def test_nothing_is_interpolated_where_the_window_stays(parse_and_complete, recipe, mode):
    """Some recipes make it for more than the target. Here there is none."""
    fixed = ("--recipe", recipe, "--target_len", 8192, "--rope", mode)
    args = parse_and_complete("--model", "folder", *fixed)
    assert (args.factor, args.overshoot, args.llama_4_scaling_beta) == (1, 1, 0)
    assert parse_and_complete("--model", "folder", *fixed, "--factor", 2).factor == 2


def test_ntks_factor_is_not_rounded_away(parse_and_complete):
    """A quarter more than SmolLM2's window slows the critical pair, 20 of 31, by a quarter."""
    args = parse_and_complete("--model", "folder", "--rope", "ntk", "--target_len", 10240)
    assert args.factor ** (20 / 31) == pytest.approx(1.25, rel=5e-3)


def test_a_models_own_query_scale_stays_unless_another_is_given(parse_and_complete):
    own = {"rope_type": "default", "original_max_position_embeddings": 4096, "llama_4_scaling_beta": 0.2}
    config = dataclasses.replace(SMOLLM2, rope_scaling=own)
    for given, beta in (
        ([], 0.2),
        (["--llama_4_scaling_beta", 0], 0),
        (["--llama_4_scaling_beta", 0.3], 0.3),
    ):
        args = parse_and_complete("--model", "folder", *given, config=config)
        assert args.llama_4_scaling_beta == beta
        kept = own | {"llama_4_scaling_beta": beta} if beta else None
        assert scaling.extend(config, "default", 2**17, args.llama_4_scaling_beta).rope_scaling == kept
        stretched = scaling.extend(config, "yarn", 2**17, args.llama_4_scaling_beta).rope_scaling
        assert stretched.get("llama_4_scaling_beta", 0) == beta


def test_adapters_are_for_all_layers_and_learn_faster(parse_and_complete):
    """LLaMA has a gate. A rank changes neither what counts nor the rate."""
    args = parse_and_complete("--model", "folder", "--lora_rank", 8)
    assert (args.lora_alpha, args.lora_targets, args.lr) == (16, "q,k,v,o,gate,up,down", pytest.approx(2e-4))
    recorded = copy.deepcopy(args)
    complete(args)  # as --resume does with what the run recorded
    assert args == recorded
    given = ("--lora_alpha", 5, "--lora_targets", "v,q,v", "--lora_train", "norm,embed", "--lr", 1e-5)
    args = parse_and_complete("--model", "folder", "--lora_rank", 8, *given)
    assert (args.lora_alpha, args.lora_targets, args.lora_train, args.lr) == (5, "q,v", "embed,norm", 1e-5)
    without_gate = dataclasses.replace(SMOLLM2, mlp="gelu")
    args = parse_and_complete("--model", "folder", "--lora_rank", 8, config=without_gate)
    assert args.lora_targets == "q,k,v,o,up,down"
    with pytest.raises(InputError, match="--lora_targets: this model has no gate; choose of q,k,v,o,up,down"):
        parse_and_complete("--lora_rank", 8, "--lora_targets", "gate", config=without_gate)


def test_examples_of_a_very_long_window_are_warned_of(parse_and_complete, capfd, monkeypatch):
    """A Llama 3.1 with its window of 131,072 tokens, and the same with shorter examples."""
    monkeypatch.setattr(errors, "_warnings", set())  # no warning is said twice
    llama = dataclasses.replace(SMOLLM2, max_position_embeddings=131072)
    paper = ("--model", "folder", "--recipe", "paper")
    assert parse_and_complete(*paper, config=llama).train_len == 131072
    assert "warning: an example has 131,072 tokens" in capfd.readouterr().err
    assert parse_and_complete(*paper, "--train_len", 8192, config=llama).train_len == 8192
    assert parse_and_complete(*paper).train_len == 8192
    assert not capfd.readouterr().err
