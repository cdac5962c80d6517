"""rope_scaling: read in every spelling, stretched further, and written where stock loaders look for it."""

import dataclasses
import json
import logging
import math

import pytest
import torch
import transformers
from conftest import hf_logits, scaling_of
from equations import as_meta_scales, by_hand
from published import FAR, NEAR, TINY, VOCAB, assert_same, edit, load_stock, ours, snapshot, stock

import rope
from hf import families, scaling, tokenizer, weights
from model import Config
from storage.errors import InputError

pytestmark = pytest.mark.usefixtures("no_wait_for_disk")
LLAMA = Config(VOCAB, 64, 96, 2, 4, 2, 16, 64)  # the small model of make_llama


@pytest.fixture(scope="module")
def tiny_tokenizer():
    return tokenizer.load(TINY)


def frequencies(config):
    """Return (inv_freq, attention_factor) of a Config."""
    return rope.rope_frequencies(config.rotary_dim, config.rope_theta, config.rope_scaling)


# ---------------------------------------------------------------- read from config.json

SPELLED = {mode: scaling_of(mode) for mode in ("linear", "dynamic", "yarn", "llama3", "longrope")}
SPELLED["longrope_without_factor"] = {k: v for k, v in SPELLED["longrope"].items() if k != "factor"}
SPELLED["yarn_keys"] = scaling_of("yarn") | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3}


@pytest.mark.parametrize("name", SPELLED)
def test_both_spellings_of_the_rope_config(make_llama, name):
    """rope_scaling (`type` or `rope_type`) beside rope_theta, or rope_parameters: the Config is the same.

    transformers has the same logits from each.
    """
    folder, _ = make_llama(max_position_embeddings=64 if name == "dynamic" else 512)
    new = SPELLED[name]
    old = {k: v for k, v in new.items() if k != "rope_type"} | {"type": new["rope_type"]}
    plain = ours(folder, FAR)
    configs = []
    for spelling in (
        {"rope_parameters": "absent", "rope_theta": 5e4, "rope_scaling": new},
        {"rope_parameters": "absent", "rope_theta": 5e4, "rope_scaling": old},
        {"rope_theta": "absent", "rope_scaling": "absent", "rope_parameters": new | {"rope_theta": 5e4}},
    ):
        edit(folder / "config.json", **spelling)
        model, theirs = weights.load(folder), load_stock(folder)
        configs.append(model.config)
        for positions in (NEAR, FAR):
            assert_same(ours(model, positions), stock(theirs, positions))
        assert (ours(model, FAR) - plain).abs().max() > 0.1
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].rope_theta == 5e4 and configs[0].rope_scaling["factor"] == 8.0


def test_two_spellings_of_which_one_spells_a_default_out(make_llama):
    """transformers 5 completes rope_parameters, and tools leave the rope_scaling that they found."""
    folder, _ = make_llama(max_position_embeddings=64)
    edit(folder / "config.json", rope_parameters="absent", rope_theta=50000)
    edit(folder / "config.json", rope_scaling={"type": "yarn", "factor": 8, "beta_fast": None})
    alone = weights.load(folder)
    completed = transformers.AutoConfig.from_pretrained(folder).rope_parameters
    assert completed["original_max_position_embeddings"] == 64
    edit(folder / "config.json", rope_parameters=completed | {"rope_theta": 5e4})
    both = weights.load(folder)
    assert both.config == alone.config
    assert_same(ours(both, FAR), stock(load_stock(folder), FAR))


@pytest.mark.parametrize("mode", ["default", "ntk", "yarn", "ntk_by_parts"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_what_we_write_is_read_back_as_our_own_mode(tmp_path, mode, beta):
    extended = scaling.extend(LLAMA, mode, 512, llama_4_scaling_beta=beta)
    written = families.hf_config(families.as_written(extended))
    (tmp_path / "config.json").write_text(json.dumps(written))
    again = families.read_config(tmp_path)
    expected = extended.rope_scaling
    if mode == "ntk":  # it is another base then
        assert again.rope_theta == pytest.approx(1e4 * 8 ** (16 / 14), rel=1e-12)
        expected = {k: v for k, v in expected.items() if k != "factor"} | {"rope_type": "default"}
    assert again.rope_scaling == (expected if beta or mode in ("yarn", "ntk_by_parts") else None)


def test_scaled_queries_in_the_terms_of_older_exports(tmp_path):
    """A `default` beside llama_4_scaling_beta is the same model, and so is yarn with attention_factor 1."""
    for mode, older in (("default", {}), ("ntk_by_parts", {"rope_type": "yarn", "attention_factor": 1.0})):
        extended = scaling.extend(LLAMA, mode, 512, llama_4_scaling_beta=0.3)
        written = families.hf_config(families.as_written(extended))
        older = extended.rope_scaling | older
        written |= {"rope_scaling": older | {"type": older["rope_type"]}, "rope_parameters": older}
        (tmp_path / "config.json").write_text(json.dumps(written))
        assert families.read_config(tmp_path).rope_scaling == extended.rope_scaling


def test_yarn_with_other_factors_on_cos_and_sin_stays_yarn(tmp_path):
    """One mscale without the other counts for nothing, as in transformers."""
    yarn = scaling_of("yarn")
    read_as = {
        "mscale": (yarn | {"mscale": 0.7}, yarn),
        "mscale_all_dim": (yarn | {"mscale_all_dim": 0.0}, yarn),
        "both": (yarn | {"mscale": 0.7, "mscale_all_dim": 1.2},) * 2,
        "recorded": (yarn | {"attention_factor": 1.3},) * 2,
        "few turns": (yarn | {"beta_fast": 1e-4, "beta_slow": 1e-5},) * 2,
    }
    for given, expected in read_as.values():
        (tmp_path / "config.json").write_text(json.dumps(families.hf_config(LLAMA)))
        edit(tmp_path / "config.json", rope_parameters=given, rope_scaling="absent")
        edit(tmp_path / "config.json", original_max_position_embeddings="absent")
        assert families.read_config(tmp_path).rope_scaling == expected


def test_a_query_scale_of_null_is_none(tmp_path):
    parameters = {"rope_type": "linear", "factor": 2.0, "llama_4_scaling_beta": None}
    written = families.hf_config(LLAMA) | {"rope_scaling": None, "rope_parameters": parameters}
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert families.read_config(tmp_path).rope_scaling == {"rope_type": "linear", "factor": 2.0}


# ---------------------------------------------------------------- stretched further

LLAMA31 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("mode", ["linear", "ntk", "yarn", "yarn_revised", "llama3"])
def test_a_scaled_model_is_stretched_further(make_llama, tiny_tokenizer, tmp_path, mode):
    """Llama 3.1 has its 8 x, and 4 x come on top.

    Each pair is slowed by both, where it is slow by what it does in the model as it came, and stock loaders
    agree.
    """
    folder, base = make_llama(max_position_embeddings=512, rope_parameters=LLAMA31 | {"rope_theta": 5e5})
    model = weights.load(folder)
    model.config = scaling.extend(model.config, mode, 2048)
    assert model.config.max_position_embeddings == 2048 and model.config.original_window == 64
    assert model.config.rope_scaling["factor"] == 32

    def slowed_by(rope_scaling):
        return rope.rope_frequencies(16, 5e5)[0] / rope.rope_frequencies(16, 5e5, rope_scaling)[0]

    if mode == "llama3":  # the same mode: one stretch of the first window by 32
        expected = slowed_by(LLAMA31 | {"factor": 32.0})
    else:
        expected = slowed_by(LLAMA31) * torch.tensor(slowed_by_4(mode), dtype=torch.float64)
    torch.testing.assert_close(slowed_by(model.config.rope_scaling), expected, rtol=1e-12, atol=0)
    assert expected[-1] == pytest.approx(32)  # the slowest pair: 8 times 4

    weights.save(model, tiny_tokenizer, tmp_path / "out")
    theirs = load_stock(tmp_path / "out")
    for positions in (NEAR, FAR):
        assert_same(stock(theirs, positions), ours(model, positions))
    assert (stock(theirs, FAR) - stock(base, FAR)).abs().max() > 0.1


def slowed_by_4(mode):
    """Return how often each pair of the Llama 3.1 above is slowed by a stretch by 4."""

    def pair_with(wavelength):
        """Return the pair, a real number, that an unscaled model turns so slowly."""
        return 8 * math.log(wavelength / (2 * math.pi), 5e5)

    if mode == "linear":
        return [4.0] * 8
    if mode == "ntk":
        return [4 ** (j / 7) for j in range(8)]
    # YaRN's ramp lies between the pairs that turn 32 times in the window of 512 tokens, and once.
    wavelengths = [2 * math.pi / f for f in by_hand("llama3", 5e5, 16, 8.0, 64, 1)[0]]
    first, last = math.floor(pair_with(512 / 32)), math.ceil(pair_with(512))
    ramp = [min(max((pair_with(w) - first) / (last - first), 0), 1) for w in wavelengths]
    assert all(r == 1 for r, w in zip(ramp, wavelengths) if w > 2048)
    if mode == "yarn":
        return [1 / (1 - r + r / 4) for r in ramp]
    return [1 - r + 4 * r for r in ramp]  # yarn_revised


@pytest.mark.parametrize("second", ["linear", "ntk", "llama3", "yarn", "ntk_by_parts", "yarn_revised"])
@pytest.mark.parametrize("first", ["default", "ntk", "yarn", "ntk_by_parts"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_an_exported_model_is_stretched_once_more(tmp_path, first, second, beta):
    """From 64 to 512, written and read back, and then to 2,048: each pair is slowed by both, by hand."""
    config = scaling.extend(LLAMA, first, 512, llama_4_scaling_beta=beta)
    (tmp_path / "config.json").write_text(json.dumps(families.hf_config(families.as_written(config))))
    twice = scaling.extend(families.read_config(tmp_path), second, 2048)

    if first == second and first != "ntk":  # one stretch of the first window
        expected, factor = by_hand(first, 1e4, 16, 32.0, 64, 1)
    else:
        theta = 1e4 * 8 ** (16 / 14) if first == "ntk" else 1e4  # of the model that is stretched
        slowed, factor = by_hand(first, 1e4, 16, 8.0, 64, 1)
        expected, factor_on_top = stretched_by_4(second, slowed, theta, 512)
        factor *= factor_on_top
    inv_freq, attention_factor = frequencies(twice)
    torch.testing.assert_close(inv_freq, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    assert attention_factor == pytest.approx(factor, rel=1e-12)
    assert twice.max_position_embeddings == 2048
    if beta:  # they count windows of the model as it came
        scale = rope.query_scale(twice.rope_scaling, 0, 2048).flatten()
        assert scale[63] == 1 and float(scale[2047]) == pytest.approx(1 + 0.3 * math.log(32))


def stretched_by_4(mode, f, theta, window):
    """Return (frequencies, factor on cos and sin) of a model of base theta with these, stretched by 4."""
    if mode == "linear":
        return [x / 4 for x in f], 1
    if mode == "ntk":
        return [x * 4 ** (-j / 7) for j, x in enumerate(f)], 1
    if mode == "llama3":
        return [as_meta_scales(x, 4.0, window) for x in f], 1

    def pair_that_turns(times):
        return 8 * math.log(window / (2 * math.pi * times), theta)

    first, last = max(math.floor(pair_that_turns(32)), 0), min(math.ceil(pair_that_turns(1)), 15)
    ramp = [min(max((-8 * math.log(x, theta) - first) / (last - first), 0), 1) for x in f]
    if mode == "yarn_revised":
        return [x / (4 * r + 1 - r) for x, r in zip(f, ramp)], 0.1 * math.log(4) + 1
    stretched = [x * (1 - r) + x / 4 * r for x, r in zip(f, ramp)]
    return stretched, 0.1 * math.log(4) + 1 if mode == "yarn" else 1


@pytest.mark.parametrize("mode", ["linear", "yarn"])
def test_two_stretches_of_one_mode_are_one(mode):
    twice = scaling.extend(scaling.extend(LLAMA, mode, 256), mode, 1024)
    assert twice == scaling.extend(LLAMA, mode, 1024)


@pytest.mark.parametrize("first, second", [("dynamic", "yarn"), ("yarn", "dynamic"), ("longrope", "linear")])
def test_stretches_that_cannot_be_combined(first, second):
    scaled = dataclasses.replace(LLAMA, rope_scaling=scaling_of(first))
    with pytest.raises(InputError, match=f"{second} scaling on top of this model's {first}: one depends on"):
        scaling.extend(scaled, second, 1024)


# ---------------------------------------------------------------- scaled queries


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
@pytest.mark.parametrize("mode", rope.EXTENSIONS)
def test_scaled_queries_are_written_as_ministral(make_llama, tiny_tokenizer, tmp_path, mode, family):
    """transformers computes the same in five windows of 64.

    Our own reader agrees, and writes the same bytes again.
    """
    folder, _ = make_llama(family=family, **({"sliding_window": None} if family == "Mistral" else {}))
    model, out = weights.load(folder), tmp_path / "out"
    model.config = scaling.extend(model.config, mode, 512, llama_4_scaling_beta=0.3)
    weights.save(model, tiny_tokenizer, out)
    tokens, positions = torch.randint(0, VOCAB, (1, 300)), torch.arange(300).expand(1, -1)
    again = weights.load(out)
    with torch.no_grad():
        expected = hf_logits(load_stock(out), tokens, positions)
        assert_same(model(tokens), expected)
        assert_same(again(tokens), expected)
        model.config.rope_scaling = {**model.config.rope_scaling, "llama_4_scaling_beta": 0.0}
        plain = model(tokens)
        assert_same(plain[:, :64], expected[:, :64])
        assert (plain - expected)[:, 64:].abs().max() > 0.1
    weights.save(again, tokenizer.load(out), tmp_path / "again")
    assert snapshot(out) == snapshot(tmp_path / "again")
    written = json.loads((out / "config.json").read_text())
    assert written["architectures"] == ["Ministral3ForCausalLM"]
    # vLLM looks here.
    assert written["llama_4_scaling"] == {"beta": 0.3, "original_max_position_embeddings": 64}
    # llama.cpp's converter takes nothing but yarn with an mscale_all_dim.
    if mode in ("default", "ntk", "yarn", "ntk_by_parts"):
        assert written["rope_parameters"]["rope_type"] == "yarn"
        assert "mscale_all_dim" in written["rope_parameters"]


@pytest.mark.parametrize("head_dim", [2, 4, 8, 64, 128])
def test_the_yarn_that_slows_nothing(head_dim):
    """transformers has RoPE's own frequencies for it, whatever the base and the windows."""
    for theta in (100.0, 1e4, 7.3e6, 1e12):
        for window, target_len in ((64, 64), (256, 2048), (8192, 30_000)):
            config = Config(VOCAB, 64, 96, 2, 4, 2, head_dim, window, rope_theta=theta)
            written = families.hf_config(
                families.as_written(scaling.extend(config, "default", target_len, llama_4_scaling_beta=0.1))
            )
            theirs = transformers.Ministral3Config(**written)
            assert theirs.rope_parameters["rope_type"] == "yarn"
            inv_freq, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](theirs)
            expected = rope.default_frequencies(head_dim, theta).float()
            torch.testing.assert_close(inv_freq, expected, rtol=1e-6, atol=0)
            assert factor == 1
            # vLLM's table has so many rows.
            assert theirs.rope_parameters["factor"] * window == pytest.approx(target_len)


def test_a_ministral_without_scaled_queries_is_written_as_mistral(make_llama, tiny_tokenizer, tmp_path):
    """`llama_4_scaling_beta` 0 takes the scale of the queries away, and Ministral 3 cannot do without."""
    model = weights.load(make_llama()[0])
    model.config = scaling.extend(model.config, "yarn", 512, llama_4_scaling_beta=0.3)
    weights.save(model, tiny_tokenizer, tmp_path / "ministral")
    model = weights.load(tmp_path / "ministral")
    assert model.config.model_type == "ministral3"

    model.config = scaling.extend(model.config, "yarn", 1024, llama_4_scaling_beta=0.0)
    weights.save(model, tiny_tokenizer, tmp_path / "mistral")
    again = weights.load(tmp_path / "mistral")
    assert again.config.model_type == "mistral" and not rope.has_query_scale(again.config.rope_scaling)
    tokens, positions = torch.randint(0, VOCAB, (1, 300)), torch.arange(300).expand(1, -1)
    with torch.no_grad():
        assert_same(again(tokens), hf_logits(load_stock(tmp_path / "mistral"), tokens, positions))


def test_scaled_queries_stay_when_a_model_is_stretched_further(make_llama, tiny_tokenizer, tmp_path):
    """NTK becomes another base, and YaRN comes on top.

    The queries count windows of the first 64 tokens, and YaRN asks for turns in the 512 in between.
    """
    model = weights.load(make_llama()[0])
    ntk = scaling.extend(model.config, "ntk", 512)
    with_its_base = dataclasses.replace(ntk, rope_theta=10000.0 * 8 ** (16 / 14), rope_scaling=None)
    expected, expected_factor = frequencies(scaling.extend(with_its_base, "yarn", 2048))

    model.config = scaling.extend(model.config, "ntk", 512, llama_4_scaling_beta=0.3)
    weights.save(model, tiny_tokenizer, tmp_path / "ntk")
    stretched = scaling.extend(families.read_config(tmp_path / "ntk"), "yarn", 2048)
    assert stretched.rope_scaling["llama_4_scaling_beta"] == 0.3 and stretched.original_window == 64
    inv_freq, factor = frequencies(stretched)
    torch.testing.assert_close(inv_freq, expected, rtol=1e-12, atol=0)
    assert factor == pytest.approx(expected_factor)


def test_scaled_queries_on_top_of_linear_scaling(make_llama, tiny_tokenizer, tmp_path):
    """Linear scaling does not record a first window. The queries count windows of the model as it came."""
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    model = weights.load(make_llama(rope_parameters=linear)[0])
    window, before = model.config.max_position_embeddings, frequencies(model.config)[0]
    model.config = scaling.extend(model.config, "default", 4 * window, llama_4_scaling_beta=0.1)
    assert torch.equal(frequencies(model.config)[0], before)
    weights.save(model, tiny_tokenizer, tmp_path / "out")
    config = families.read_config(tmp_path / "out")
    scale = rope.query_scale(config.rope_scaling, 0, 4 * window).flatten()
    assert scale[window - 1] == 1 and float(scale[window]) == pytest.approx(1 + 0.1 * math.log(2))
    assert config.original_window == window


@pytest.mark.parametrize(
    "scaling_terms, says, window",
    [
        # Qwen2.5's own instructions: vLLM makes 32,768 of them, and transformers scales the angles by 4.
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}, 8192, 32768),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}, 32768, 32768),
        # More than the window, as our recipe for `tiny` writes it.
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}, 32768, 32768),
        ({"type": "yarn", "factor": 4.0}, 8192, 32768),  # stock loaders take 8192 for the original window
        ({"rope_type": "linear", "factor": 4.0}, 8192, 8192),
        ({"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 8192}, 8192, 8192),
        ({"rope_type": "dynamic", "factor": 4.0}, 8192, 8192),
        (LLAMA31 | {"original_max_position_embeddings": 8192}, 8192, 8192),  # its factor is not the window's
    ],
    ids=str,
)
def test_the_window_of_a_scaled_model(tmp_path, scaling_terms, says, window):
    written = families.hf_config(LLAMA) | {"rope_scaling": scaling_terms, "max_position_embeddings": says}
    (tmp_path / "config.json").write_text(json.dumps(written | {"rope_parameters": None}))
    config = families.read_config(tmp_path)
    assert config.max_position_embeddings == window
    again = families.hf_config(config)
    (tmp_path / "config.json").write_text(json.dumps(again))
    assert families.read_config(tmp_path).max_position_embeddings == window
    if window == 32768:  # stretched once more, the angles are those of the whole factor
        twice = scaling.extend(config, "yarn", 65536)
        assert twice.rope_scaling["factor"] == 2 * scaling_terms["factor"]
        assert twice.rope_scaling["original_max_position_embeddings"] == 8192


def written_and_read(config, folder):
    (folder / "config.json").write_text(json.dumps(families.hf_config(families.as_written(config))))
    return families.read_config(folder)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("mode", rope.EXTENSIONS)
def test_a_window_that_is_not_extended_reads_back_as_it_was(tmp_path, mode, beta):
    """Without a factor no angle changes. By 2 they do, where config.json can say so."""
    settings = [{}] if mode == "default" else [{}, {"factor": 1.0}, {"factor": 2.0}]
    for more in settings:
        extended = scaling.extend(LLAMA, mode, 64, beta, **more)
        by = more.get("factor", 1.0)
        if mode in ("yarn", "ntk_by_parts") and by == 2:
            # Qwen's instructions leave such a file, and mean a window of 128 by it.
            with pytest.raises(InputError, match=f"^{mode} by 2 .* 64 tokens .* window of 128; extend it"):
                families.as_written(extended)
            continue
        again = written_and_read(extended, tmp_path)
        assert again.max_position_embeddings == again.original_window == 64
        expected, expected_factor = by_hand(mode, 1e4, 16, by, 64, 64)
        inv_freq, attention_factor = frequencies(again)
        torch.testing.assert_close(inv_freq, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
        assert attention_factor == pytest.approx(expected_factor, rel=1e-12)


@pytest.mark.parametrize("first", ["default", "linear", "ntk", "yarn", "dynamic", "longrope"])
def test_a_factor_of_1_leaves_a_models_scaling_as_it_is(first):
    """So the model may be stretched later as if it had not been trained in between."""
    rope_scaling = None if first == "default" else scaling_of(first)
    base = dataclasses.replace(LLAMA, max_position_embeddings=512, rope_scaling=rope_scaling)
    for mode in set(rope.EXTENSIONS) - {"dynamic"}:
        assert scaling.extend(base, mode, 512) == base, mode
        assert scaling.extend(base, mode, 512, factor=1.0) == base, mode


# ---------------------------------------------------------------- written for stock loaders


def test_config_json_of_an_extended_model():
    extended = scaling.extend(LLAMA, "yarn", 512)
    c = families.hf_config(extended)
    # vLLM and llama.cpp refuse 512.0.
    assert c["max_position_embeddings"] == 512 and type(c["max_position_embeddings"]) is int
    written, parameters = c["rope_scaling"], c["rope_parameters"]
    assert written["type"] == written["rope_type"] == parameters["rope_type"] == "yarn"
    assert written["factor"] == parameters["factor"] == 8
    assert c["dtype"] == c["torch_dtype"] == "float32"


def test_settings_are_written_as_floats():
    """Older loaders warn of whole numbers. Windows are whole numbers."""
    integers = scaling_of("yarn") | {"factor": 8, "beta_fast": 16, "beta_slow": 2, "truncate": False}
    written = families.hf_config(dataclasses.replace(LLAMA, rope_scaling=integers))["rope_scaling"]
    for key in ("factor", "beta_fast", "beta_slow"):
        assert type(written[key]) is float and written[key] == integers[key]
    assert type(written["original_max_position_embeddings"]) is int and written["truncate"] is False


def test_longrope_is_spelled_out(make_llama, tiny_tokenizer, tmp_path):
    """transformers before 5 looks for the first window beside rope_scaling alone.

    vLLM looks for the factor on cos and sin by other names.
    """
    longrope = scaling_of("longrope") | {"rope_theta": 1e4}
    # The window is not the 8 times 64 that the factor says.
    folder, base = make_llama(max_position_embeddings=1024, rope_parameters=longrope)
    weights.save(weights.load(folder), tiny_tokenizer, tmp_path / "out")
    c = json.loads((tmp_path / "out" / "config.json").read_text())
    assert c["original_max_position_embeddings"] == 64
    for written in (c["rope_scaling"], c["rope_parameters"]):
        for key in ("short_mscale", "long_mscale", "attention_factor"):
            assert written[key] == pytest.approx(math.sqrt(1.5))  # 1.5 is 1 + ln 8 / ln 64
        for key in ("short_factor", "long_factor"):
            assert written[key] == longrope[key]
    theirs = load_stock(tmp_path / "out")
    for positions in (NEAR, FAR):
        assert_same(stock(theirs, positions), stock(base, positions))


def test_the_first_window_stands_where_readers_look(tmp_path, caplog, monkeypatch):
    """llama.cpp's converter reads llama3's beside rope_scaling alone.

    Inside that of linear and dynamic stock loaders warn of it.
    """
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for mode in ("linear", "dynamic", "llama3", "yarn"):
        written = families.hf_config(scaling.extend(LLAMA, mode, 512))
        (tmp_path / "config.json").write_text(json.dumps(written))
        assert written["original_max_position_embeddings"] == 64
        assert families.read_config(tmp_path).original_window == 64
        transformers.AutoConfig.from_pretrained(tmp_path)
    assert "rope" not in caplog.text
