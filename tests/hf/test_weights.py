"""Folders in and out: what we load computes what transformers computes, and what we write transformers
loads.
"""

import dataclasses
import errno
import json
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
import transformers
from conftest import hf_logits, scaling_of
from safetensors.torch import load_file, save_file
from test_rope import by_hand

import rope
from hf import families, tokenizer, weights
from storage.files import InputError

TINY = Path(__file__).parent.parent / "assets" / "tiny"
TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(7))
NEAR = torch.arange(40).expand(2, 40)
FAR = NEAR + 460 * (NEAR >= 15)  # a jump, as PoSE makes them: 0 … 14, 475 … 499


@pytest.fixture
def tiny_tokenizer():
    return tokenizer.load(TINY)


@torch.no_grad()
def stock(model, positions=NEAR, tokens=TOKENS):
    """Logits of transformers, in float32."""
    if isinstance(model, Path):
        model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return hf_logits(model, tokens, positions)


@torch.no_grad()
def ours(model, positions=NEAR, tokens=TOKENS):
    if isinstance(model, Path):
        model = weights.load(model, dtype=torch.float32)
    return model(tokens, positions)


def assert_same(a, b, tolerance=1e-4):
    """Equal to 1e-4 of the largest logit (about 7: the angles of transformers are float32, which costs
    1e-4 at position 500)."""
    assert b.abs().max() > 0.5, "logits near zero would make any two models equal"
    assert (a - b).abs().max() < tolerance * b.abs().max()


def edit(path, change):
    """change(content of a JSON file) in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"head_dim": 32, "rope_theta": 5e5},
    ],
    ids=["gqa", "tied", "mha", "mqa", "wide_heads"],
)
def test_loads_what_transformers_writes(make_llama, shape, shard):
    folder, model = make_llama(max_shard_size=shard, **shape)
    assert (folder / "model.safetensors.index.json").exists() == (shard != "5GB")
    assert not list(folder.glob("*.bin"))
    loaded = weights.load(folder)
    assert not loaded.training
    assert (loaded.head.weight is loaded.embed.weight) == shape.get("tie_word_embeddings", False)
    assert_same(ours(loaded), stock(model))
    assert_same(ours(loaded, FAR), stock(model, FAR))


def test_bfloat16_on_disk(make_llama):
    folder, model = make_llama()
    model.to(torch.bfloat16).save_pretrained(folder)
    assert {p.dtype for p in weights.load(folder).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in weights.load(folder, dtype=torch.float32).parameters()} == {torch.float32}
    assert_same(ours(folder), stock(folder))


def test_old_exports(make_llama):
    """LLaMA-1 configs have no head_dim and no KV heads; old files carry rotary tables and a tied head
    twice."""
    folder, model = make_llama(num_key_value_heads=4, tie_word_embeddings=True)
    edit(folder / "config.json", lambda c: (c.pop("head_dim"), c.pop("num_key_value_heads")))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same(ours(folder), stock(model))


@pytest.mark.parametrize("shards", [1, 2])
def test_a_tied_model_with_another_head(make_llama, shards):
    """transformers 5 takes the head then, earlier ones do not."""
    folder, _ = make_llama(tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    head["lm_head.weight"][319, 63] += 0.25
    if shards == 1:
        save_file(tensors | head, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        save_file(head, folder / "head.safetensors", metadata={"format": "pt"})
        weight_map = dict.fromkeys(tensors, "model.safetensors") | {"lm_head.weight": "head.safetensors"}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    with pytest.raises(InputError, match="lm_head.weight is another.* tie_word_embeddings"):
        weights.load(folder)
    edit(folder / "config.json", lambda c: c.update(tie_word_embeddings=False))
    assert torch.equal(weights.load(folder).head.weight, head["lm_head.weight"])


SCALINGS = {mode: scaling_of(mode) for mode in ("linear", "dynamic", "yarn", "llama3", "longrope")}
SCALINGS["yarn_keys"] = scaling_of("yarn") | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3}


@pytest.mark.parametrize("name", SCALINGS)
def test_both_spellings_of_the_rope_config(make_llama, name):
    """rope_scaling (`type` or `rope_type`) beside rope_theta, or rope_parameters: one Config, and
    transformers' logits from each."""
    window = 64 if name == "dynamic" else 512
    folder, _ = make_llama(max_position_embeddings=window)
    scaling = SCALINGS[name]
    old = {k: v for k, v in scaling.items() if k != "rope_type"} | {"type": scaling["rope_type"]}
    plain = ours(folder, FAR)
    plain_config = json.loads((folder / "config.json").read_text())
    configs = []
    for spelling in (
        {"rope_theta": 5e4, "rope_scaling": scaling},
        {"rope_theta": 5e4, "rope_scaling": old},
        {"rope_parameters": scaling | {"rope_theta": 5e4}},
    ):
        c = {k: v for k, v in plain_config.items() if k != "rope_parameters"} | spelling
        (folder / "config.json").write_text(json.dumps(c))
        configs.append(weights.read_config(folder))
        assert_same(ours(folder), stock(folder))
        assert_same(ours(folder, FAR), stock(folder, FAR))
        assert (ours(folder, FAR) - plain).abs().max() > 0.1
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].rope_theta == 5e4 and configs[0].rope_scaling["factor"] == 8.0


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("mode", weights.EXTENSIONS)
def test_what_we_write_transformers_computes(make_llama, tiny_tokenizer, tmp_path, mode):
    folder, base = make_llama()
    model = weights.load(folder)
    model.config = weights.extend(model.config, mode, 512)
    weights.save(model, tiny_tokenizer, tmp_path / "out")
    for positions in (NEAR, FAR):
        assert_same(stock(tmp_path / "out", positions), ours(model, positions))
        assert_same(ours(tmp_path / "out", positions), ours(model, positions), 1e-6)
    if mode != "default":  # the interpolation is really there
        assert (stock(tmp_path / "out", FAR) - stock(base, FAR)).abs().max() > 0.1


@pytest.mark.parametrize(
    "family", [{"family": "Mistral", "sliding_window": None}, {"family": "Qwen2"}], ids=lambda f: f["family"]
)
@pytest.mark.parametrize("mode", ["ntk", "yarn", "yarn_revised"])
def test_every_family_is_written_as_itself(make_llama, tiny_tokenizer, tmp_path, family, mode):
    folder, base = make_llama(**family)
    model = weights.load(folder)
    model.config = weights.extend(
        model.config, mode, 8192
    )  # past 4,096, the sliding window that Mistral's class assumes when none is named
    weights.save(model, tiny_tokenizer, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        written["architectures"] == [family["family"] + "ForCausalLM"] and written["sliding_window"] is None
    )
    assert not transformers.AutoConfig.from_pretrained(tmp_path / "out").sliding_window
    for positions in (NEAR, FAR):
        assert_same(stock(tmp_path / "out", positions), ours(model, positions))
    assert weights.read_config(tmp_path / "out").qkv_bias == (family["family"] == "Qwen2")


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
@pytest.mark.parametrize("mode", weights.EXTENSIONS)
def test_scaled_queries_are_written_as_ministral(make_llama, tiny_tokenizer, tmp_path, mode, family):
    """In five windows of 64; our own reader agrees, and writes the same bytes again."""
    folder, base = make_llama(family=family, **({"sliding_window": None} if family == "Mistral" else {}))
    model = weights.load(folder)
    model.config = weights.extend(model.config, mode, 512, llama_4_scaling_beta=0.3)
    weights.save(model, tiny_tokenizer, tmp_path / "out")
    tokens, positions = torch.randint(0, 320, (1, 300)), torch.arange(300).expand(1, -1)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    again = weights.load(tmp_path / "out")
    with torch.no_grad():
        expected = hf_logits(theirs, tokens, positions)
        assert_same(model(tokens), expected)
        assert_same(again(tokens), expected)
        model.config.rope_scaling = {**model.config.rope_scaling, "llama_4_scaling_beta": 0.0}
        plain = model(tokens)
        assert_same(plain[:, :64], expected[:, :64])
        assert (plain - expected)[:, 64:].abs().max() > 0.1
    weights.save(again, tokenizer.load(tmp_path / "out"), tmp_path / "again")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "again")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["Ministral3ForCausalLM"]
    assert written["llama_4_scaling"] == {
        "beta": 0.3,
        "original_max_position_embeddings": 64,
    }  # where vLLM looks


def test_scaled_queries_stay_when_a_model_is_stretched_further(make_llama, tiny_tokenizer, tmp_path):
    """NTK by another base, then YaRN on top: the queries count windows of the first 64 tokens, YaRN
    asks of turns in the 512 in between."""
    config = weights.load(make_llama()[0]).config
    ntk = weights.extend(config, "ntk", 512)
    first = dataclasses.replace(ntk, rope_theta=10000.0 * 8 ** (16 / 14), rope_scaling=None)
    without = weights.extend(first, "yarn", 2048)
    model = weights.load(make_llama()[0])
    model.config = weights.extend(config, "ntk", 512, llama_4_scaling_beta=0.3)
    weights.save(model, tiny_tokenizer, tmp_path / "ntk")
    model = weights.load(tmp_path / "ntk")
    model.config = weights.extend(model.config, "yarn", 2048)
    assert model.config.rope_scaling["llama_4_scaling_beta"] == 0.3 and model.config.original_window == 64
    ours = rope.rope_frequencies(16, model.config.rope_theta, model.config.rope_scaling)
    expected = rope.rope_frequencies(16, without.rope_theta, without.rope_scaling)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-12, atol=0)
    assert ours[1] == pytest.approx(expected[1])


def test_scaled_queries_on_top_of_linear_scaling(make_llama, tiny_tokenizer, tmp_path):
    """Which does not record a first window: queries count the windows of the model as it came."""
    model = weights.load(
        make_llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})[0]
    )
    window, before = (
        model.config.max_position_embeddings,
        rope.rope_frequencies(16, 10000.0, model.config.rope_scaling)[0],
    )
    model.config = weights.extend(model.config, "default", 4 * window, llama_4_scaling_beta=0.1)
    torch.testing.assert_close(
        rope.rope_frequencies(16, 10000.0, model.config.rope_scaling)[0], before, rtol=0, atol=0
    )
    weights.save(model, tiny_tokenizer, tmp_path / "out")
    config = weights.load(tmp_path / "out").config
    scale = rope.query_scale(config.rope_scaling, 0, 4 * window).flatten()
    assert (
        scale[window - 1] == 1
        and float(scale[window]) == pytest.approx(1 + 0.1 * math.log(2))
        and config.original_window == window
    )


@pytest.mark.parametrize("longest", ["null", '"32"'])
def test_a_tokenizer_without_a_longest_text(make_llama, longest):
    config, files = (
        weights.load(make_llama()[0]).config,
        {"tokenizer_config.json": f'{{"model_max_length": {longest}}}'.encode()},
    )
    assert families.tokenizer_files(config, files) == files


LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("mode", ["linear", "ntk", "yarn", "yarn_revised", "llama3"])
def test_a_scaled_model_is_stretched_further(make_llama, tiny_tokenizer, tmp_path, mode):
    """Llama 3.1 and its 8 x, then 4 x more: each pair is slowed by both, where it is slow by what it
    does now, and stock loaders agree."""
    folder, base = make_llama(max_position_embeddings=512, rope_parameters=LLAMA31 | {"rope_theta": 5e5})
    model = weights.load(folder)
    model.config = weights.extend(model.config, mode, 2048)
    assert model.config.max_position_embeddings == 2048 and model.config.original_window == 64

    def slowed_by(scaling):
        return rope.rope_frequencies(16, 5e5)[0] / rope.rope_frequencies(16, 5e5, scaling)[0]

    def pair(wavelength):  # as a real number: the one that an unscaled model turns so slowly
        return 8 * math.log(wavelength / (2 * math.pi), 5e5)

    if mode == "llama3":  # the same mode: one stretch of the first window by 32
        expected = slowed_by(LLAMA31 | {"factor": 32.0})
    else:
        wavelengths = [2 * math.pi / f for f in by_hand("llama3", 5e5, 16, 8.0, 64, 1)[0]]
        first, last = (
            math.floor(pair(512 / 32)),
            math.ceil(pair(512)),
        )  # YaRN's: those that turn 32 times in the window of 512, and once
        ramp = [min(max((pair(w) - first) / (last - first), 0), 1) for w in wavelengths]
        assert all(r == 1 for r, w in zip(ramp, wavelengths) if w > 2048)
        more = {
            "linear": [4.0] * 8, "ntk": [4 ** (j / 7) for j in range(8)], "yarn": [1 / (1 - r + r / 4) for r in ramp],
            "yarn_revised": [1 - r + 4 * r for r in ramp],
        }[mode]  # fmt: skip
        expected = slowed_by(LLAMA31) * torch.tensor(more, dtype=torch.float64)
    torch.testing.assert_close(slowed_by(model.config.rope_scaling), expected, rtol=1e-12, atol=0)
    assert expected[-1] == pytest.approx(32)  # the slowest pair: 8 times 4
    weights.save(model, tiny_tokenizer, tmp_path / "out")
    for positions in (NEAR, FAR):
        assert_same(stock(tmp_path / "out", positions), ours(model, positions))
    assert (stock(tmp_path / "out", FAR) - stock(base, FAR)).abs().max() > 0.1


@pytest.mark.parametrize("mode", ["linear", "yarn"])
def test_two_stretches_of_one_mode_are_one(make_llama, mode):
    config = weights.load(make_llama()[0]).config
    twice = weights.extend(weights.extend(config, mode, 256), mode, 1024)
    assert twice == weights.extend(config, mode, 1024)


@pytest.mark.parametrize(
    "shape", [{"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"head_dim": 32}], ids=str
)
def test_shapes_survive_saving(make_llama, tiny_tokenizer, tmp_path, shape):
    folder, base = make_llama(**shape)
    weights.save(weights.load(folder), tiny_tokenizer, tmp_path / "out")
    assert_same(stock(tmp_path / "out"), stock(base))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_load_save_gives_the_same_bytes(make_llama, tiny_tokenizer, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(weights, "SHARD_BYTES", 100_000)
    folder, base = make_llama()
    base.to(dtype).save_pretrained(folder)
    model = weights.load(
        folder, dtype=torch.float32
    )  # as the trainer has it: float32 in memory whatever is on disk
    model.config = weights.extend(model.config, "yarn", 512)
    weights.save(model, tiny_tokenizer, tmp_path / "a")
    weights.save(weights.load(tmp_path / "a"), tokenizer.load(tmp_path / "a"), tmp_path / "b")
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert {t.dtype for t in load_file(file).values()} == {dtype}


def test_config_json_of_an_extended_model(make_llama, tiny_tokenizer, tmp_path):
    folder, _ = make_llama()
    model = weights.load(folder)
    model.config = dataclasses.replace(
        weights.extend(model.config, "yarn", 512), max_position_embeddings=512.0
    )
    weights.save(model, tiny_tokenizer, tmp_path / "out")
    c = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        c["max_position_embeddings"] == 512 and type(c["max_position_embeddings"]) is int
    )  # vLLM and llama.cpp refuse 512.0
    assert (
        c["rope_scaling"]["type"]
        == c["rope_scaling"]["rope_type"]
        == c["rope_parameters"]["rope_type"]
        == "yarn"
    )
    assert c["rope_scaling"]["factor"] == c["rope_parameters"]["factor"] == 8
    assert c["dtype"] == c["torch_dtype"] == "float32"


def test_longrope_is_spelled_out(make_llama, tiny_tokenizer, tmp_path):
    """transformers before 5 looks for the first window beside rope_scaling alone, and vLLM for the
    factor on cos and sin by other names."""
    longrope = scaling_of("longrope") | {"rope_theta": 1e4}
    folder, base = make_llama(
        max_position_embeddings=1024, rope_parameters=longrope
    )  # not the 8 times 64 that the factor says
    weights.save(weights.load(folder), tiny_tokenizer, tmp_path / "out")
    c = json.loads((tmp_path / "out" / "config.json").read_text())
    assert c["original_max_position_embeddings"] == 64
    for scaling in (c["rope_scaling"], c["rope_parameters"]):
        assert (
            scaling["short_mscale"]
            == scaling["long_mscale"]
            == scaling["attention_factor"]
            == pytest.approx(math.sqrt(1.5))
        )  # ln 8 / ln 64
        assert (
            scaling["short_factor"] == longrope["short_factor"]
            and scaling["long_factor"] == longrope["long_factor"]
        )
    for positions in (NEAR, FAR):
        assert_same(stock(tmp_path / "out", positions), stock(base, positions))


def test_the_first_window_stands_where_readers_look(
    make_llama, tiny_tokenizer, tmp_path, caplog, monkeypatch
):
    """llama.cpp's converter reads llama3's beside rope_scaling alone; inside that of linear and dynamic
    stock loaders warn of it."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = weights.load(make_llama()[0])
    base = model.config
    for mode in ("linear", "dynamic", "llama3", "yarn"):
        model.config = weights.extend(base, mode, 512)
        weights.save(model, tiny_tokenizer, tmp_path / mode)
        assert (
            json.loads((tmp_path / mode / "config.json").read_text())["original_max_position_embeddings"]
            == 64
        )
        assert weights.read_config(tmp_path / mode).original_window == 64
        transformers.AutoConfig.from_pretrained(tmp_path / mode)
    assert "rope" not in caplog.text


def test_tokenizer_files_come_along(make_llama, tmp_path):
    folder, _ = make_llama()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    extra = {
        "special_tokens_map.json": b"{}",
        "generation_config.json": b'{"do_sample": false}',
        "chat_template.jinja": b"{{ messages }}",
    }
    for name, content in extra.items():
        (folder / name).write_bytes(content)
    weights.save(weights.load(folder), tokenizer.load(folder), tmp_path / "out")
    written = snapshot(tmp_path / "out")
    assert {name: written[name] for name in extra} == extra
    assert written["tokenizer.model"] == (TINY / "tokenizer.model").read_bytes()
    assert written["tokenizer_config.json"] == (TINY / "tokenizer_config.json").read_bytes()


def test_shards(make_llama, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 100_000)
    folder, base = make_llama()
    weights.save(weights.load(folder), tiny_tokenizer, tmp_path / "out")
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files == [
        f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
    ]
    sizes = [sum(t.nbytes for t in load_file(tmp_path / "out" / f).values()) for f in files]
    assert max(sizes) <= 100_000
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes) == sum(p.nbytes for p in base.parameters())
    assert set(index["weight_map"]) == set(base.state_dict())
    assert_same(stock(tmp_path / "out"), stock(base))
    assert_same(ours(tmp_path / "out"), stock(base))


def test_an_existing_folder_is_replaced_whole(make_llama, tiny_tokenizer, tmp_path, monkeypatch):
    folder, _ = make_llama()
    out = tmp_path / "runs" / "model"
    with monkeypatch.context() as m:
        m.setattr(weights, "SHARD_BYTES", 100_000)
        weights.save(weights.load(folder), tiny_tokenizer, out)
    (out / "of_an_earlier_run.txt").write_text("stale")
    other, base = make_llama("other", seed=1)
    weights.save(weights.load(other), tiny_tokenizer, out)
    assert set(snapshot(out)) == {
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert [p.name for p in out.parent.iterdir()] == ["model"]
    assert_same(stock(out), stock(base))


@pytest.mark.parametrize("at", [1, 2])
def test_a_full_disk_leaves_the_earlier_folder_whole(make_llama, tiny_tokenizer, tmp_path, monkeypatch, at):
    folder, _ = make_llama()
    out = tmp_path / "runs" / "model"
    weights.save(weights.load(folder), tiny_tokenizer, out)
    before = snapshot(out)
    calls = []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) < at:
            return save_file(tensors, path, metadata)
        Path(path).write_bytes(b"half of it")
        # What safetensors 0.8 raised on a tmpfs of 1 MiB.
        raise safetensors.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(weights, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError) as error:
        weights.save(weights.load(make_llama("other", seed=1)[0]), tiny_tokenizer, out)
    assert error.value.errno == errno.ENOSPC and len(calls) == at
    assert snapshot(out) == before
    assert [p.name for p in out.parent.iterdir()] == ["model"]


def test_a_kill_at_the_last_moment_leaves_the_earlier_folder_whole(
    make_llama, tiny_tokenizer, tmp_path, monkeypatch
):
    folder, _ = make_llama()
    out = tmp_path / "runs" / "model"
    weights.save(weights.load(folder), tiny_tokenizer, out)
    before, real = snapshot(out), Path.rename
    other = weights.load(make_llama("other", seed=1)[0])

    def killed(self, target):
        if Path(target) == out:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        weights.save(other, tiny_tokenizer, out)
    assert before in [snapshot(p) for p in out.parent.iterdir()]


# ---------------------------------------------------------------- built-in models


def test_tiny():
    model = weights.load("tiny", dtype=torch.float32)
    tok = weights.load_tokenizer("tiny", model.config)
    ids = torch.tensor([[tok.bos_id] + tok.encode(Path(shutil.__file__).read_text())])[:, :256]
    positions = torch.arange(256)[None]
    assert_same(ours(model, positions, ids), stock(TINY, positions, ids))
    loss = torch.nn.functional.cross_entropy(ours(model, positions, ids)[0, :-1], ids[0, 1:])
    assert loss < 0.6 * np.log(model.config.vocab_size)  # it is trained: far from the log V of a random model
