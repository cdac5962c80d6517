"""rope.py agrees with transformers, with the papers' equations and with exact arithmetic.

The equations are written again with scalars.
"""

import math
from decimal import Decimal, getcontext

import pytest
import torch
from equations import by_hand, rope_scaling
from transformers import LlamaConfig, modeling_rope_utils
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from rope import (
    MODES,
    RAMPED,
    apply_rope,
    depends_on_length,
    has_query_scale,
    ntk_factor,
    query_scale,
    rope_cos_sin,
    rope_frequencies,
)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 2048}
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 2048}
YARN_8192 = YARN | {"original_max_position_embeddings": 8192}
LONGROPE = {"rope_type": "longrope", "factor": 32.0, "original_max_position_embeddings": 4096}
LONGROPE |= {"short_factor": [1 + j / 100 for j in range(32)], "long_factor": [1.5**j for j in range(32)]}
NEEDS = {  # the keys that each mode cannot do without
    "linear": ["factor"],
    "ntk": ["factor"],
    "dynamic": ["factor", "original_max_position_embeddings"],
    "ntk_by_parts": ["factor", "original_max_position_embeddings"],
    "yarn": ["factor", "original_max_position_embeddings"],
    "yarn_revised": ["factor", "original_max_position_embeddings"],
    "llama3": ["factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"],
    "longrope": ["factor", "original_max_position_embeddings", "short_factor"],
}


def relative_error(got, want):
    """Return the largest error of a tensor beside a list, relative to the list's numbers."""
    want = torch.tensor(want, dtype=torch.float64)
    return float(((got - want) / want).abs().max())


# ---------------------------------------------------------------- against transformers


def llama_config(scaling, theta, dim, window):
    sizes = {"hidden_size": 4 * dim, "num_attention_heads": 4, "head_dim": dim}
    parameters = scaling | {"rope_theta": theta}
    return LlamaConfig(**sizes, max_position_embeddings=window, rope_parameters=parameters)


def theirs(scaling, theta, dim, seq_len=None):
    """Return what transformers has for rope_frequencies."""
    # Its `dynamic` ignores original_max_position_embeddings and takes the model's window.
    config = llama_config(scaling, theta, dim, window=scaling.get("original_max_position_embeddings", 2048))
    if scaling["rope_type"] == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, seq_len=seq_len)


class Float64Torch:
    """torch, in which float32 is called float64."""

    float = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def transformers_in_float64(monkeypatch):
    """Let transformers compute in float64, so that nothing but the mathematics can differ.

    Its functions ask for float32 by name.
    """
    for module in (modeling_rope_utils, modeling_llama):
        monkeypatch.setattr(module, "torch", Float64Torch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize(
    "scaling, seq_len",
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "linear", "factor": 8.0}, None),
        (DYNAMIC, None),
        (DYNAMIC, 2048),
        (DYNAMIC, 2049),
        (DYNAMIC, 100_000),
        (YARN, None),
        (YARN | {"factor": 1.0}, None),
        (YARN | {"beta_fast": 16.0, "beta_slow": 2.0}, None),
        (YARN | {"truncate": False}, None),
        (YARN_8192 | {"truncate": False, "beta_fast": 20, "beta_slow": 3}, None),
        (YARN | {"original_max_position_embeddings": 6}, None),  # the ramp's two ends meet at the first pair
        (YARN | {"truncate": False, "beta_fast": 4, "beta_slow": 4}, None),  # and between two pairs
        (YARN | {"original_max_position_embeddings": 131_072}, None),  # the ramp ends beyond the last pair
        (YARN | {"factor": 0.5}, None),
        (YARN | {"attention_factor": 1.25}, None),
        (YARN | {"mscale": 0.707, "mscale_all_dim": 1.2}, None),
        (YARN | {"mscale": 0.707}, None),  # one without the other counts for nothing
        (YARN | {"mscale_all_dim": 1.2}, None),
        (YARN | {"mscale": 0.707, "mscale_all_dim": 1.2, "attention_factor": 2.0}, None),
        (LLAMA3, None),
        (LLAMA3 | {"factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 16.0}, None),
        (LONGROPE, None),
        (LONGROPE, 4096),
        (LONGROPE, 4097),
        (LONGROPE | {"attention_factor": 1.19}, 4097),
        (LONGROPE | {"factor": 1.0}, None),
        (LONGROPE | {"factor": 0.5}, None),
    ],
)
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_same_as_transformers(transformers_in_float64, scaling, seq_len, theta):
    want, want_factor = theirs(scaling, theta, 64, seq_len)
    got, got_factor = rope_frequencies(64, theta, scaling, seq_len)
    assert got.dtype == want.dtype == torch.float64 and got.shape == (32,)
    assert relative_error(got, want.tolist()) < 1e-12
    assert got_factor == want_factor


# ---------------------------------------------------------------- against the papers' equations


@pytest.mark.parametrize(
    "theta, dim, factor, original",
    [
        (1e4, 128, 16.0, 2048),
        (1e4, 64, 3.7, 4096),
        (5e5, 128, 8.0, 8192),
        (1e6, 16, 512.0, 256),
        (1e4, 64, 1.0, 2048),
        (1e4, 64, 4.0, 131_072),  # the ramp ends beyond the last pair
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_same_as_the_equations(mode, theta, dim, factor, original):
    for n in (1, original, 3 * original, 1_000_000):  # seq_len, of which only two modes may take notice
        want, want_factor = by_hand(mode, theta, dim, factor, original, n)
        got, got_factor = rope_frequencies(dim, theta, rope_scaling(mode, factor, original, dim), seq_len=n)
        assert relative_error(got, want) < 1e-12
        assert got_factor == pytest.approx(want_factor, rel=1e-12)


def test_no_scaling_is_default():
    want, _ = by_hand("default", 1e4, 32, 1, 1, 1)
    for scaling in (None, {}, {"rope_type": "default"}):
        got, factor = rope_frequencies(32, 1e4, scaling)
        assert relative_error(got, want) < 1e-12 and factor == 1


@pytest.mark.parametrize("factor", [2.0, 5.5, 64.0])
def test_ntk_divides_the_slowest_pair_by_exactly_the_factor(factor):
    """bloc97's condition: base^(-(d-2)/d) shrinks by s, while the fastest pair stays 1."""
    got, _ = rope_frequencies(64, 1e4, {"rope_type": "ntk", "factor": factor})
    assert float(got[-1]) == pytest.approx(1e4 ** (-62 / 64) / factor, rel=1e-12)
    assert float(got[0]) == 1


@pytest.mark.parametrize(
    "dim, theta, window",
    [(64, 1e5, 8192), (128, 1e4, 2048), (128, 1e4, 4096), (128, 5e5, 8192), (32, 1e4, 256)],
)
def test_ntk_by_its_own_factor_slows_the_critical_pair_by_the_ratio(dim, theta, window):
    """The critical pair is the first that does not come round in the window (Liu et al. 2023).

    It is number ceil(d/2 log_theta(window / 2 pi)).
    """
    critical = math.ceil(dim / 2 * math.log(window / 2 / math.pi, theta))
    ratio = 16.0
    scaling = {"rope_type": "ntk", "factor": ntk_factor(dim, theta, None, window, ratio)}
    slowed = (rope_frequencies(dim, theta)[0] / rope_frequencies(dim, theta, scaling)[0]).tolist()
    assert slowed[critical] == pytest.approx(ratio, rel=1e-12)
    assert max(slowed[:critical]) < ratio < min(slowed[critical + 1 :])


def test_ntks_factor_of_a_scaled_model_looks_at_its_scaled_angles():
    """Four times slower in a window four times as long is where it was.

    Slowed by 1,000 no pair but the first comes round.
    """
    by_4 = {"rope_type": "linear", "factor": 4.0}
    by_1000 = {"rope_type": "linear", "factor": 1000.0}
    of_base = ntk_factor(64, 1e5, None, 8192, 4.0)
    assert ntk_factor(64, 1e5, by_4, 32768, 4.0) == pytest.approx(of_base, rel=1e-12)
    assert ntk_factor(64, 1e5, by_1000, 8192, 2.0) == pytest.approx(2.0**31, rel=1e-12)


def test_ntks_factor_is_the_ratio_where_every_pair_comes_round():
    assert ntk_factor(32, 100.0, None, 4096, 8.0) == 8.0


def test_dynamic_depends_on_this_call_only():
    scaling = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 100}
    plain, _ = by_hand("default", 1e4, 32, 1, 1, 1)
    longest = rope_frequencies(32, 1e4, scaling, 6400)[0]
    for n in (None, 1, 100):  # after a long call, too
        assert relative_error(rope_frequencies(32, 1e4, scaling, n)[0], plain) < 1e-12
    assert torch.equal(rope_frequencies(32, 1e4, scaling, 6400)[0], longest)
    assert scaling == {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 100}


def test_yarn_and_its_revision_differ_only_on_the_ramp():
    """Both leave fast pairs alone and divide slow ones by s.

    Between, a blend of wavelengths is slower than a blend of frequencies.
    """
    default, yarn, revised = (
        rope_frequencies(128, 1e4, rope_scaling(mode, 16.0, 2048, 128))[0]
        for mode in ("default", "yarn", "yarn_revised")
    )
    change = yarn / default
    between = (change > 1 / 16 + 1e-9) & (change < 1 - 1e-9)
    assert torch.allclose(yarn[~between], revised[~between], rtol=1e-12, atol=0)
    assert between.sum() > 20 and (revised[between] < yarn[between]).all()


def test_errors():
    with pytest.raises(ValueError, match="unknown rope_type 'su'"):
        rope_frequencies(64, 1e4, {"rope_type": "su"})
    assert set(NEEDS) == set(MODES) - {"default"}
    for mode, keys in NEEDS.items():
        for key in keys:
            whole = rope_scaling(mode)
            rope_frequencies(64, 1e4, whole)  # nothing else is missing
            for broken in ({k: v for k, v in whole.items() if k != key}, whole | {key: None}):
                with pytest.raises(ValueError, match=f"'{mode}' needs '{key}'"):
                    rope_frequencies(64, 1e4, broken)
    for n, key in ((1, "short_factor"), (5000, "long_factor")):
        with pytest.raises(ValueError, match="32 factors .* got 31"):
            rope_frequencies(64, 1e4, LONGROPE | {key: [1.0] * 31}, n)


def test_longrope_with_its_own_attention_factor_needs_no_factor():
    scaling = {k: v for k, v in LONGROPE.items() if k != "factor"} | {"attention_factor": 1.5}
    assert rope_frequencies(64, 1e4, scaling)[1] == 1.5


# ---------------------------------------------------------------- what depends on more than the mode


def test_which_angles_depend_on_the_length():
    same_lists = LONGROPE | {"long_factor": LONGROPE["short_factor"]}
    for scaling, depends in (
        (DYNAMIC, True),
        (LONGROPE, True),
        (same_lists, False),
        (YARN, False),
        (None, False),
    ):
        assert depends_on_length(scaling) == depends


def test_query_scale_counts_windows_of_keys():
    """The factor is 1 + beta ln(1 + floor(i / L)) for token i."""
    scaling = {"rope_type": "default", "original_max_position_embeddings": 4, "llama_4_scaling_beta": 0.5}
    assert has_query_scale(scaling) and not has_query_scale(YARN) and not has_query_scale(None)
    want = [1 + 0.5 * math.log(1 + i // 4) for i in range(10)]
    for start in (0, 3, 8):
        scale = query_scale(scaling, start, 10)
        assert scale.dtype == torch.float32 and scale.shape == (1, 10 - start, 1, 1)
        assert scale.flatten().tolist() == pytest.approx(want[start:])
    assert query_scale(scaling, 0, 4) is None and query_scale(YARN, 0, 10_000) is None


# ---------------------------------------------------------------- cos, sin, rotation

getcontext().prec = 50
PI = Decimal("3.14159265358979323846264338327950288419716939937511")


def exact_angle(position, j, dim, theta):
    """position * theta^(-2j/dim) modulo 2 pi, from 50 digits."""
    return float(position * (Decimal(-2 * j) / dim * Decimal(theta).ln()).exp() % (2 * PI))


@pytest.mark.parametrize("theta", [10_000, 500_000])
def test_cos_and_sin_are_right_at_position_1_000_000(theta):
    positions = [0, 1, 2047, 131_071, 999_999, 1_000_000]
    inv_freq, _ = rope_frequencies(64, float(theta))
    cos, sin = rope_cos_sin(torch.tensor([positions]), inv_freq)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (1, 6, 1, 32)
    for t, position in enumerate(positions):
        for j in range(32):
            angle = exact_angle(position, j, 64, theta)
            # The error is half a unit in the last place of a float32 below 1, and what float64 loses on
            # an angle of 1,000,000 radians.
            assert abs(float(cos[0, t, 0, j]) - math.cos(angle)) <= 2**-25 + 1e-9
            assert abs(float(sin[0, t, 0, j]) - math.sin(angle)) <= 2**-25 + 1e-9


@pytest.mark.parametrize("start", [0, 1_000_000])
def test_scores_depend_on_distance_only(start):
    """A pair as a complex number z turns by exp(i m f).

    So the score of q at m and k at n is Re(sum q conj(k) exp(i (m - n) f)).
    """
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 64, generator=generator)
    distances = [0, 1, 7, 500, 30_000]
    inv_freq, _ = rope_frequencies(64, 1e4)

    def turned(x, positions):
        cos, sin = rope_cos_sin(torch.tensor([positions]), inv_freq)
        return apply_rope(x.expand(1, len(positions), 1, 64), cos, sin)[0, :, 0].double()

    scores = (turned(q, [start + d for d in distances]) * turned(k, [start] * len(distances))).sum(-1)
    zq, zk = (torch.complex(x[:32], x[32:]).to(torch.complex128) for x in (q, k))
    for score, d in zip(scores, distances):
        angles = torch.tensor([exact_angle(d, j, 64, 10_000) for j in range(32)], dtype=torch.float64)
        want = (zq * zk.conj() * torch.exp(1j * angles)).real.sum()
        assert float(score) == pytest.approx(float(want), abs=1e-5)


def test_same_rotation_as_transformers():
    """Layout, frequencies and attention factor are theirs, with every row at positions of its own."""
    config = llama_config(YARN, 1e4, 64, window=2048)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 10, 4, 64, generator=generator)  # B, T, H, D
    positions = torch.randint(0, 60, (3, 10), generator=generator)
    want_q, want_k = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(config)(q, positions), unsqueeze_dim=2)
    cos, sin = rope_cos_sin(positions, *rope_frequencies(64, 1e4, YARN))
    for x, want in ((q, want_q), (k, want_k)):  # their angles are float32: 60 * 2^-24 off
        torch.testing.assert_close(apply_rope(x, cos, sin), want, atol=3e-5, rtol=0)


def test_attention_factor_multiplies_scores_twice():
    """YaRN's temperature: cos and sin carry sqrt(1/t), so that the product of q and k carries 1/t."""
    positions, (inv_freq, _) = torch.tensor([[0, 5, 900]]), rope_frequencies(16, 1e4)
    cos, sin = rope_cos_sin(positions, inv_freq, 1.5)
    angles = positions[0, :, None].double() * inv_freq
    torch.testing.assert_close(cos[0, :, 0], (1.5 * angles.cos()).float(), atol=1e-7, rtol=0)
    torch.testing.assert_close(sin[0, :, 0], (1.5 * angles.sin()).float(), atol=1e-7, rtol=0)
    x = torch.randn(1, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(apply_rope(x, cos, sin).square().sum(-1), 1.5**2 * x.square().sum(-1))


@pytest.mark.parametrize(
    "dtype, half_ulp", [(torch.float32, 2**-24), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_dtype_is_kept_and_the_arithmetic_is_float32(dtype, half_ulp):
    """Half precision is rounded once, at the end.

    An intermediate in bfloat16 would lose more than half a unit in the last place.
    """
    x = torch.randn(2, 50, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    positions = torch.arange(100).view(2, 50) * 997
    inv_freq, _ = rope_frequencies(64, 1e4)
    got = apply_rope(x, *rope_cos_sin(positions, inv_freq))
    assert got.dtype == dtype and got.shape == x.shape
    z = torch.complex(*x.double().chunk(2, dim=-1)) * torch.exp(1j * (positions[:, :, None, None] * inv_freq))
    want = torch.cat((z.real, z.imag), dim=-1)
    assert ((got.double() - want).abs() <= half_ulp * want.abs() + 1e-6).all()


def test_the_modes_with_a_ramp_are_those_that_beta_fast_changes():
    for mode in MODES:
        gentle, steep = (rope_scaling(mode) | {"beta_fast": times} for times in (32, 8))
        differ = not torch.equal(rope_frequencies(64, 1e4, gentle)[0], rope_frequencies(64, 1e4, steep)[0])
        assert differ == (mode in RAMPED), mode
