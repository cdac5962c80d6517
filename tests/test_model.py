"""The decoder computes the logits, gradients and greedy continuations of transformers.

Its ways to save memory change nothing.
"""

import dataclasses
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import hf_logits, needs_gpu, pose_positions, scaling_of
from transformers.models.ministral3 import modeling_ministral3 as ministral3

import model as decoder
from hf import families, weights

VOCAB = 320
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def random_tokens(rows, T):
    return torch.randint(0, VOCAB, (rows, T))


def plain_positions(rows, T):
    return torch.arange(T).expand(rows, -1)


def assert_same_gradients(ours, theirs, ours_loss, theirs_loss):
    """Assert that two losses have the same gradients by the parameters of both models.

    One model is ours, the other one of transformers.
    """
    ours.zero_grad()
    theirs.zero_grad()
    ours_loss.backward()
    theirs_loss.backward()
    parameters = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        expected = parameters[families.published_name(name, "llama")].grad
        torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


# ---------------------------------------------------------------- against transformers

SHAPES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "mqa": {"num_key_value_heads": 1, "head_dim": 32},
    "mistral": {"family": "Mistral", "sliding_window": None},
    "qwen2": {"family": "Qwen2"},
    "tied qwen2": {"family": "Qwen2", "tie_word_embeddings": True},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_equal_transformers(make_llama, shape):
    folder, theirs = make_llama(**SHAPES[shape])
    ours = weights.load(folder)
    tokens, targets = random_tokens(2, 48), random_tokens(2, 48)
    for positions in (plain_positions(2, 48), pose_positions(48, 2048, 2)):
        expected = hf_logits(theirs, tokens, positions)
        assert expected.std() > 0.3  # else any model would agree
        torch.testing.assert_close(ours(tokens, positions), expected, rtol=0, atol=1e-4)
        expected_loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum")
        assert_same_gradients(ours, theirs, ours(tokens, positions, targets), expected_loss)


@needs_gpu
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_logits_on_a_gpu_equal_transformers_on_the_cpu(make_llama, dtype, error):
    """Windows of 4,096 tokens stand at positions up to 131,072.

    There, bfloat16 positions or angles would be off by hundreds.
    """
    folder, theirs = make_llama(head_dim=64)
    ours = weights.load(folder, "cuda", dtype)
    tokens, positions = random_tokens(2, 4096), pose_positions(4096, 131072, 2)
    with torch.no_grad():
        expected = hf_logits(theirs, tokens, positions)
        got = ours(tokens.cuda(), positions.cuda()).float().cpu()
    assert expected.std() > 0.3
    assert (got - expected).norm() < error * expected.norm()


SCALED = {
    "rope_theta": 10000.0,
    "rope_type": "default",
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.3,
}


def test_scaled_queries_equal_transformers(make_llama, monkeypatch):
    """Ministral 3 in three windows of 16 has the same logits, gradients and greedy continuations.

    transformers scales by position, as a loader may that never meets a skip. Ours scales by the number of
    keys, also with skips. There, transformers' own function is given the indices.
    """
    folder, theirs = make_llama(family="Ministral3", rope_parameters=SCALED)
    ours = weights.load(folder)
    tokens, near, far = random_tokens(2, 48), plain_positions(2, 48), pose_positions(48, 2048, 2)
    scale = ministral3.get_llama_4_attn_scale
    for positions in (near, far):
        monkeypatch.setattr(ministral3, "get_llama_4_attn_scale", lambda _, *settings: scale(near, *settings))
        expected = hf_logits(theirs, tokens, positions)
        torch.testing.assert_close(ours(tokens, positions), expected, rtol=0, atol=1e-4)
        before_last, targets = expected[:, :-1].flatten(0, 1), tokens[:, 1:]
        expected_loss = F.cross_entropy(before_last, targets.flatten(), reduction="sum")
        assert_same_gradients(ours, theirs, ours(tokens[:, :-1], positions[:, :-1], targets), expected_loss)
    monkeypatch.undo()
    prompt = tokens[:, :37]
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, **GREEDY)
    for prefill_tokens in (1, 7, 16, 2048):
        assert torch.equal(ours.generate(prompt, 12, prefill_tokens=prefill_tokens), expected[:, 37:])


def test_queries_are_scaled_beyond_the_first_window_only(make_llama):
    """Training in the original window, whatever the skips, is untouched by the scale."""
    folder, _ = make_llama()
    ours, plain = weights.load(folder), weights.load(folder)
    ours.config = dataclasses.replace(ours.config, rope_scaling=SCALED)
    tokens, positions = random_tokens(2, 17), pose_positions(17, 2048, 2)
    assert torch.equal(ours(tokens[:, :16], positions[:, :16]), plain(tokens[:, :16], positions[:, :16]))
    assert not torch.equal(ours(tokens, positions)[:, 16], plain(tokens, positions)[:, 16])


@pytest.mark.parametrize("mode", ["linear", "dynamic", "yarn", "llama3", "longrope"])
def test_every_stock_interpolation_equals_transformers(make_llama, mode):
    folder, theirs = make_llama(rope_parameters={"rope_theta": 10000.0} | scaling_of(mode))
    ours = weights.load(folder)
    tokens = random_tokens(2, 96)
    for positions in (plain_positions(2, 96), pose_positions(96, 512, 2)):
        with torch.no_grad():
            expected = hf_logits(theirs, tokens, positions)
            torch.testing.assert_close(ours(tokens, positions), expected, rtol=0, atol=1e-4)


def test_positions_enter_only_through_their_differences(make_llama):
    """RoPE is relative: moving every position by a million changes nothing but rounding.

    No table has to reach that far.
    """
    ours = weights.load(make_llama()[0])
    tokens, positions = random_tokens(1, 32), pose_positions(32, 2000, 1)
    moved = ours(tokens, positions + 1_000_000)
    torch.testing.assert_close(ours(tokens, positions), moved, rtol=0, atol=1e-3)
    assert (ours(tokens, positions) - ours(tokens)).abs().max() > 0.1  # a skip does change something


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("scaling", [None, "yarn"])
def test_generation_equals_transformers_whatever_the_prefill(make_llama, scaling):
    changes = {"rope_parameters": {"rope_theta": 10000.0} | scaling_of(scaling)} if scaling else {}
    folder, theirs = make_llama(**changes)
    ours = weights.load(folder)
    prompt = random_tokens(2, 37)
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, **GREEDY)
    for prefill_tokens in (1, 8, 36, 37, 2048):
        assert torch.equal(ours.generate(prompt, 12, prefill_tokens=prefill_tokens), expected[:, 37:])


@pytest.mark.parametrize("mode, n", [("dynamic", 200), ("longrope", 200), ("longrope", 64), ("longrope", 65)])
def test_generation_with_angles_that_depend_on_the_length(make_llama, mode, n):
    """The frequencies of the n tokens that are read in all hold from the first token on.

    (The last new token is not read.) So the continuation is that of a model that has them at every length.
    """
    ours = weights.load(make_llama()[0])
    L, d = 64, 16  # the original window, rotated dimensions
    scaling = {"rope_type": mode, "original_max_position_embeddings": L}
    if mode == "dynamic":
        ours.config.rope_scaling = scaling | {"factor": 2.0}
        same = {"rope_theta": 10000.0 * (2 * n / L - 1) ** (d / (d - 2))}
    else:
        lists = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
        ours.config.rope_scaling = scaling | lists | {"attention_factor": 1.0}
        same = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0 if n > L else 1.0}
    _, theirs = make_llama("same", rope_parameters=same)
    prompt = random_tokens(2, n - 11)
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, **GREEDY)
    for prefill_tokens in (50, 2048):
        assert torch.equal(ours.generate(prompt, 12, prefill_tokens=prefill_tokens), expected[:, n - 11 :])


@pytest.mark.parametrize("mode", [None, "dynamic", "longrope"])
def test_prompts_of_several_lengths_are_continued_as_each_alone(make_llama, mode):
    """Also where angles depend on the length: only some of the rows are longer than the original window."""
    changes = {"rope_parameters": {"rope_theta": 10000.0} | scaling_of(mode)} if mode else {}
    ours = weights.load(make_llama(**changes)[0])
    prompts = [random_tokens(1, n) for n in (58, 41, 52, 54)]
    rows = torch.cat([F.pad(prompt, (0, 58 - prompt.shape[1]), value=7) for prompt in prompts])
    alone = [ours.generate(prompt, 12)[0].tolist() for prompt in prompts]
    for prefill_tokens in (16, 2048):
        together = ours.generate(rows, 12, lengths=[58, 41, 52, 54], prefill_tokens=prefill_tokens)
        assert together.tolist() == alone


def test_generation_ends_once_each_row_has_said_a_stop(make_llama):
    ours = weights.load(make_llama()[0])
    prompts = random_tokens(3, 20)
    free = ours.generate(prompts, 15, lengths=[20, 17, 18])
    said_at = [3, 9, 5]
    stops = [row[i].item() for row, i in zip(free, said_at)]
    first_stops = [min(i for i, token in enumerate(row.tolist()) if token in stops) for row in free]
    stopped = ours.generate(prompts, 15, lengths=[20, 17, 18], stop_ids=stops)
    last_place = max(n + i for n, i in zip((20, 17, 18), first_stops))
    for row, expected, n in zip(stopped, free, (20, 17, 18)):
        here = last_place + 1 - n  # tokens of this row when the last row had stopped
        assert row[:here].tolist() == expected[:here].tolist() and not row[here:].any()


def test_cached_attention_lines_up_with_the_last_key():
    q, k, v = torch.randn(1, 3, 4, 8), torch.randn(1, 10, 2, 8), torch.randn(1, 10, 2, 8)
    keys, values = (x.repeat_interleave(2, 2).transpose(1, 2) for x in (k, v))
    scores = q.transpose(1, 2) @ keys.transpose(2, 3) / 8**0.5
    allowed = torch.tensor([[key <= query + 7 for key in range(10)] for query in range(3)])
    expected = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ values
    torch.testing.assert_close(decoder.causal_attention(q, k, v), expected.transpose(1, 2).flatten(2))


# ---------------------------------------------------------------- what saves memory changes nothing


@pytest.mark.parametrize("weights", [(1,), (0, 1, 6, 0.3), (0,)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("max_logits", [900, 10**6])
def test_chunked_loss_equals_plain_and_never_holds_all_logits(with_bias, weights, max_logits, monkeypatch):
    """Loss and gradients are PyTorch's own in float64, with and without weights of the tokens."""
    torch.manual_seed(0)
    hidden = torch.randn(100, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    bias = torch.randn(50, requires_grad=True) if with_bias else None
    targets = torch.randint(0, 50, (100,))
    token_weights = torch.tensor(weights, dtype=torch.float32).repeat(100)[:100]
    logits_held = []

    def spy(logits, t, w):
        logits_held.append(logits.numel())
        return decoder.cross_entropy_and_gradient(logits, t, w)

    monkeypatch.setattr(decoder, "MAX_LOGITS", max_logits)
    arguments = (hidden, weight, bias, targets, token_weights, spy)
    loss = decoder.chunked_cross_entropy(*arguments)
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    grads = torch.autograd.grad(loss, inputs)
    logits = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    nats = F.cross_entropy(logits, targets, reduction="none")
    plain = (nats * token_weights).sum()
    torch.testing.assert_close(loss.double(), plain, rtol=1e-6, atol=0)
    for got, expected in zip(grads, torch.autograd.grad(plain, inputs)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert max(logits_held) <= max_logits and (len(logits_held) > 5 or max_logits > 900)
    with torch.no_grad():  # in evaluation
        torch.testing.assert_close(
            decoder.chunked_cross_entropy(*arguments).double(), plain, rtol=1e-6, atol=0
        )


def test_weights_of_the_model_belong_to_their_tokens(make_llama):
    """Without weights each target counts 1. If all are 0, so are the loss and every gradient, and not NaN."""
    ours = weights.load(make_llama()[0], dtype=torch.float32)
    tokens, targets, token_weights = random_tokens(2, 30), random_tokens(2, 10), torch.rand(2, 10)
    log_p = ours(tokens)[:, -10:].log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    expected = -(log_p * token_weights).sum()
    torch.testing.assert_close(ours(tokens, None, targets, token_weights), expected)
    torch.testing.assert_close(ours(tokens, None, targets), -log_p.sum())
    nothing = ours(tokens, None, targets, torch.zeros(2, 10))
    nothing.backward()
    assert nothing == 0 and all(not p.grad.any() for p in ours.parameters())  # NaN would be true


def test_a_long_text_in_slices_holds_nothing_twice(make_llama, monkeypatch):
    """The queries, keys and values of a slice are gone when the next one comes, and when attention runs."""
    ours = weights.load(make_llama()[0])
    monkeypatch.setattr(decoder, "SLICE_TOKENS", 16)
    pieces, alive = [], []
    project, attend = decoder.Attention.queries_keys_values, decoder.causal_attention

    def count():
        alive.append(sum(piece() is not None for piece in pieces))

    def project_and_note(self, *arguments):
        count()
        made = project(self, *arguments)
        pieces.extend(weakref.ref(t) for t in made)
        return made

    def count_and_attend(*arguments):
        count()
        return attend(*arguments)

    monkeypatch.setattr(decoder.Attention, "queries_keys_values", project_and_note)
    monkeypatch.setattr(decoder, "causal_attention", count_and_attend)
    with torch.no_grad():
        ours.hidden(random_tokens(1, 50))
    assert len(pieces) == 2 * 4 * 3 and alive == 2 * [0] * (4 + 1)


@pytest.mark.parametrize(
    "family",
    [
        {"family": "Llama"},
        {"family": "Phi"},
        {"family": "Ministral3", "rope_parameters": SCALED},
        {"family": "Olmo2"},
        {"family": "SmolLM3", "no_rope_layers": [1, 0], "pad_token_id": None},
    ],
    ids=lambda settings: settings["family"],
)
def test_a_long_text_in_slices_equals_one_piece(make_llama, monkeypatch, family):
    """Without gradients each block takes SLICE_TOKENS tokens at a time.

    The hidden states are those of the whole, with a cache too, behind other tokens and in front of others.
    """
    ours = weights.load(make_llama(**family)[0])
    tokens, positions = random_tokens(2, 50), pose_positions(50, 1000, 2)
    whole = ours.hidden(tokens, positions)
    assert whole.requires_grad
    monkeypatch.setattr(decoder, "SLICE_TOKENS", 7)
    with torch.no_grad():
        torch.testing.assert_close(ours.hidden(tokens, positions), whole, rtol=0, atol=1e-5)
        cache, ends = ours.new_cache(2, 50), (0, 3, 49, 50)
        for start, end in zip(ends, ends[1:]):
            part = slice(start, end)
            h = ours.hidden(tokens[:, part], positions[:, part], cache, start)
            torch.testing.assert_close(h, whole[:, part], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Phi"])
def test_float32_master_weights_compute_what_their_roundings_do(make_llama, family):
    """This is how a single process trains.

    Every matrix is rounded where it is used, so that nothing differs from a bfloat16 model, and gradients
    arrive in float32. A norm's weight is not rounded: an update far below bfloat16's step near 1 shows.
    """
    folder, _ = make_llama(family=family)
    master, rounded = (weights.load(folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    with torch.no_grad():
        for p, q in zip(master.parameters(), rounded.parameters()):
            p.copy_(q if p.dim() == 1 else p)
    master.compute_dtype = torch.bfloat16
    tokens, positions = random_tokens(2, 50), pose_positions(50, 1000, 2)
    before = master(tokens, positions)
    if family == "Llama":  # PyTorch's LayerNorm rounds otherwise in bfloat16
        assert torch.equal(before, rounded(tokens, positions))
        assert torch.equal(master.generate(tokens, 5), rounded.generate(tokens, 5))
    assert (before - rounded(tokens, positions)).norm() < 1e-2 * before.norm()
    for model in (master, rounded):
        (model(tokens[:, :-1], targets=tokens[:, 1:]) / 98).backward()
    for (name, p), q in zip(master.named_parameters(), rounded.parameters()):
        assert p.grad.dtype == torch.float32
        assert (p.grad - q.grad).norm() < 3e-2 * p.grad.norm(), name
    with torch.no_grad():
        master.norm.weight *= 1 + 2**-11
    assert not torch.equal(master(tokens, positions), before)


# ---------------------------------------------------------------- the rest


def test_flops_count_every_matrix_product(make_llama):
    """There are 6 operations for each weight of a matrix product.

    Attention has two products of half the T x T square for each head, once forward and twice backward.
    """
    ours = weights.load(make_llama()[0])
    products = sum(m.weight.numel() for m in ours.modules() if isinstance(m, torch.nn.Linear))
    T, layers, heads, head_dim = 128, 2, 4, 16
    attention = 3 * layers * heads * 2 * (2 * head_dim * T / 2)
    assert ours.config.flops_per_token(T) == 6 * products + attention


def test_meta_construction_has_no_buffers():
    scaling = {"rope_type": "linear", "factor": 2.0}
    with torch.device("meta"):
        model = decoder.Transformer(decoder.Config(VOCAB, 64, 96, 2, 4, 2, 16, 64, rope_scaling=scaling))
    assert not list(model.buffers())
