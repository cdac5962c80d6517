"""Every family computes the logits and gradients of its oracle under every interpolation.

What we write of it is what stock loaders compute.
"""

import dataclasses
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import pose_positions, scaling_of
from published import (
    FAR,
    HEAD_DIM,
    HEADS,
    NEAR,
    ROTARY,
    TARGETS,
    TINY,
    TOKENS,
    VOCAB,
    T,
    assert_same,
    edit,
    load_stock,
    ours,
    publish,
    snapshot,
    stock,
)  # fmt: skip
from safetensors.torch import load_file

import rope
from hf import convert, families, scaling, tokenizer, weights, writing
from model import Config
from storage.errors import InputError

pytestmark = pytest.mark.usefixtures("no_wait_for_disk")
NEW = ("qwen3", "phi3", "smollm3", "olmo2", "granite", "gpt_neox")
PUBLISHED = ("llama", "mistral", "qwen2", "phi", "gptj", "baichuan", "baichuan2", *NEW)


@pytest.fixture
def make(tmp_path):
    """make(family, scaling=None, **config) -> (folder, model) of published.publish."""

    def make(family, scaling=None, **changes):
        folder = tmp_path / family
        return folder, publish(folder, family, scaling, **changes)

    return make


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """published(family, **config) -> (folder, model), made once and not to be changed."""
    made = {}

    def get(family, **changes):
        key = repr((family, changes))
        if key not in made:
            folder = tmp_path_factory.mktemp("published") / family
            made[key] = folder, publish(folder, family, **changes)
        return made[key]

    return get


@pytest.fixture
def config_of(published, tmp_path):
    """config_of(family, **changes) -> a folder with nothing but a family's config.json, changed."""

    def write(family, **changes):
        shutil.copy(published(family)[0] / "config.json", tmp_path)
        edit(tmp_path / "config.json", **changes)
        return tmp_path

    return write


# ---------------------------------------------------------------- reading


def published_gradients(model):
    """Return {published name: gradient in the published layout}."""
    config, gradients = model.config, {}
    for name, p in model.named_parameters():
        gradient = p.grad
        if config.model_type == "gptj" and name.split(".")[-2] in ("q", "k"):
            gradient = gradient[rows_as_interleaved(config.rotary_dim)]
        gradients.setdefault(families.published_name(name, config.model_type), []).append(gradient)
    gradients = {name: torch.cat(parts) for name, parts in gradients.items()}
    if config.model_type == "gpt_neox":
        for name in [name for name in gradients if "query_key_value" in name]:
            gradients[name] = gradients[name][rows_by_head()]
        gradients["lm_head.weight"] = gradients.pop("embed_out.weight")  # as its class calls it
    return gradients


def rows_by_head():
    """Return the rows of our q, k and v, one below the other, in GPT-NeoX's order: q, k, v of each head."""
    first_rows = [(part * HEADS + head) * HEAD_DIM for head in range(HEADS) for part in range(3)]
    return [first + i for first in first_rows for i in range(HEAD_DIM)]


def rows_as_interleaved(rotary):
    """Return the rows of our q or k in GPT-J's order, in which the pairs of each head are neighbours."""
    places = []
    for j in range(rotary // 2):
        places += [j, j + rotary // 2]
    places += range(rotary, HEAD_DIM)
    return [head * HEAD_DIM + place for head in range(HEADS) for place in places]


def assert_same_logits_and_gradients(folder, theirs, every_positions):
    model = weights.load(folder)
    if theirs.unwritten:
        model.config = dataclasses.replace(model.config, rope_scaling=theirs.unwritten)
    for positions in every_positions:
        expected = theirs.oracle(TOKENS, positions)
        assert expected.std() > 0.3  # else any model would agree
        # The exact GELU would be 6e-4 away.
        torch.testing.assert_close(model(TOKENS, positions), expected, rtol=0, atol=1e-4)
        model.zero_grad()
        theirs.zero_grad()
        model(TOKENS, positions, TARGETS).backward()
        F.cross_entropy(expected.flatten(0, 1), TARGETS.flatten(), reduction="sum").backward()
        gradients = published_gradients(model)
        expected_gradients = {name: p.grad for name, p in theirs.named_parameters()}
        assert set(gradients) == set(expected_gradients)
        largest = {name: gradient.abs().max() for name, gradient in expected_gradients.items()}
        torch.testing.assert_close(
            {name: gradients[name] / largest[name] for name in largest},
            {name: expected_gradients[name] / largest[name] for name in largest},
            rtol=1e-3,
            atol=1e-3,
        )


SHAPES = {
    "gptj": {},
    "gptj, all of a head": {"rotary_dim": HEAD_DIM},
    "gptj, n_inner": {"n_inner": 96},
    "phi": {},
    "phi, grouped": {"num_key_value_heads": 2, "partial_rotary_factor": 0.25},
    "phi, whole": {"partial_rotary_factor": 1.0},
    "baichuan": {},
    "baichuan2": {},
    "qwen3": {},
    "qwen3, tied": {"tie_word_embeddings": True, "head_dim": 32},
    "phi3": {},
    "phi3, whole": {"partial_rotary_factor": 1.0, "num_key_value_heads": 4},
    "smollm3": {},
    "smollm3, every second": {"no_rope_layers": None, "no_rope_layer_interval": 2},
    "olmo2": {},
    "granite": {},
    "granite, tied": {"tie_word_embeddings": True},
    "gpt_neox": {},
    "gpt_neox, one after the other": {"use_parallel_residual": False, "rotary_pct": 1.0},
    "gpt_neox, no biases": {"attention_bias": False},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients(make, shape):
    folder, theirs = make(shape.split(",")[0], **SHAPES[shape])
    assert_same_logits_and_gradients(folder, theirs, (NEAR, pose_positions(T, 2048, 2)))


def pairs_of(family):
    """Return how many pairs of a head are turned."""
    return (ROTARY if family in ("phi", "phi3", "gptj", "gpt_neox") else HEAD_DIM) // 2


@pytest.mark.parametrize("mode", rope.MODES[1:])
@pytest.mark.parametrize("family", PUBLISHED)
def test_gradients_under_every_interpolation(make, family, mode):
    folder, theirs = make(family, scaling_of(mode, pairs_of(family)))
    assert_same_logits_and_gradients(folder, theirs, (NEAR, pose_positions(T, 512, 2)))


def test_baichuan2s_head_learns_after_an_evaluation(published):
    """Baichuan's own code replaces the weight by its normalised form in evaluation.

    The optimizer holds the old one from then on.
    """
    model = weights.load(published("baichuan2")[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.no_grad():
        first, before = model.eval()(TOKENS), model.head.weight.clone()
    # The weight is what was published, not its normalised form.
    assert (before.norm(dim=1) - 1).abs().max() > 0.01
    losses = []
    for step in range(3):
        model.train()
        loss = model(TOKENS, NEAR, TARGETS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        with torch.no_grad():
            after, before = before, model.head.weight.clone()
            assert (after - before).abs().mean() > 1e-3
            logits = model.eval()(TOKENS)
            head = model.head.weight / model.head.weight.norm(dim=1, keepdim=True)
            torch.testing.assert_close(logits, model.hidden(TOKENS) @ head.T)
    assert losses[2] < losses[0] and (logits - first).abs().max() > 0.01


@pytest.mark.parametrize("family", ["gptj", "phi", "baichuan2", "granite"])
def test_the_loss_of_hidden_states_is_that_of_the_logits(published, family):
    """eval.py takes this way to the loss."""
    model = weights.load(published(family)[0])
    with torch.no_grad():
        expected = F.cross_entropy(model(TOKENS).flatten(0, 1), TARGETS.flatten(), reduction="sum")
        loss = model.loss(model.hidden(TOKENS).flatten(0, 1), TARGETS.flatten())
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("family", ["gptj", "phi", *NEW])
def test_generation_equals_transformers(published, family):
    folder, theirs = published(family)
    prompt = TOKENS[:, :23]
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, **greedy)
    model = weights.load(folder)
    for prefill_tokens in (1, 7, 2048):
        assert torch.equal(model.generate(prompt, 8, prefill_tokens=prefill_tokens), expected[:, 23:])


@pytest.mark.parametrize("family", ["gptj", "phi", "baichuan2", "gpt_neox"])
def test_flops_count_every_matrix_product(published, family):
    model = weights.load(published(family)[0])
    products = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    attention = 3 * 2 * HEADS * 2 * (2 * HEAD_DIM * 128 / 2)
    assert model.config.flops_per_token(128) == 6 * products + attention


@pytest.mark.parametrize("family", ["gptj", "phi", "baichuan2", "gpt_neox"])
def test_pickled_weights(make, tmp_path, family):
    folder, theirs = make(family, vocab_size=2048)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    state = load_file(folder / "model.safetensors")
    for i in range(2):  # buffers of the published .bin files
        if family == "gptj":
            state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
            state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e9)
        elif family == "gpt_neox":
            state[f"gpt_neox.layers.{i}.attention.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
            state[f"gpt_neox.layers.{i}.attention.masked_bias"] = torch.tensor(-1e9)
        else:
            state[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    convert.convert(folder, tmp_path / "converted")
    with torch.no_grad():
        expected = theirs.oracle(TOKENS, NEAR)
    torch.testing.assert_close(ours(tmp_path / "converted"), expected, rtol=0, atol=1e-3)


# ---------------------------------------------------------------- writing

WRITTEN_AS = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gptj": "PhiForCausalLM",
    "phi": "PhiForCausalLM",
    "baichuan": "LlamaForCausalLM",
    "baichuan2": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "granite": "GraniteForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
}


def stretched(config, mode, target_len):
    if mode != "longrope":
        return scaling.extend(config, mode, target_len)
    longrope = scaling_of(mode, config.rotary_dim // 2)
    return dataclasses.replace(config, max_position_embeddings=target_len, rope_scaling=longrope)


WRITTEN = [(family, mode) for family in WRITTEN_AS for mode in rope.MODES]
WRITTEN.remove(("phi3", "dynamic"))


@pytest.mark.parametrize("family, mode", WRITTEN)
def test_what_we_write_stock_loaders_compute(published, tmp_path, family, mode):
    # Half of a head is what Phi's class assumes for GPT-J's rotary_dim, which is another here. 8,192 is
    # past 4,096, the sliding window that Mistral's class assumes when none is named.
    folder, theirs = published(family, **({"rotary_dim": 4} if family == "gptj" else {}))
    target_len = 8192 if family in ("mistral", "qwen2") else 512
    model = weights.load(folder)
    model.config = stretched(model.config, mode, target_len)
    out = tmp_path / "out"
    weights.save(model, tokenizer.load(TINY), out)

    written = json.loads((out / "config.json").read_text())
    assert written["architectures"] == [WRITTEN_AS[family]]
    if family in ("mistral", "qwen2"):
        assert written["sliding_window"] is None
        assert not transformers.AutoConfig.from_pretrained(out).sliding_window
    again, stocks = weights.load(out), load_stock(out)
    assert again.config.qkv_bias == (family in ("qwen2", "phi", "gptj", "gpt_neox"))
    for positions in (NEAR, FAR):
        expected = ours(model, positions)
        assert_same(stock(stocks, positions), expected)
        assert_same(ours(again, positions), expected, 1e-5 if family == "gptj" else 1e-6)
        if mode == "default":  # and that is what the published model computes
            with torch.no_grad():
                assert_same(theirs.oracle(TOKENS, positions), expected)
    if mode != "default":  # the interpolation is really there
        with torch.no_grad():
            assert (stock(stocks, FAR) - theirs.oracle(TOKENS, FAR)).abs().max() > 0.1
    weights.save(again, tokenizer.load(out), tmp_path / "again")
    assert snapshot(out) == snapshot(tmp_path / "again")


def test_shards_of_what_we_write(published, tmp_path, monkeypatch):
    """The index names the weights as they are written, the zero biases of GPT-J too."""
    monkeypatch.setattr(writing, "SHARD_BYTES", 100_000)
    folder, theirs = published("gptj")
    weights.save(weights.load(folder), tokenizer.load(TINY), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {name: load_file(tmp_path / "out" / file)[name] for name, file in index["weight_map"].items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    biases = [found[f"model.layers.1.self_attn.{x}.bias"] for x in ("q_proj", "k_proj", "v_proj", "dense")]
    assert [b.shape for b in biases] == [(64,)] * 4 and not any(b.any() for b in biases)
    with torch.no_grad():
        expected = theirs.oracle(TOKENS, FAR)
    torch.testing.assert_close(stock(tmp_path / "out", FAR), expected, rtol=0, atol=1e-3)


def test_an_interpolation_that_no_stock_loader_has(published):
    """Stock Phi-3 refuses all but longrope, which can say whatever does not change with the length."""
    config = scaling.extend(families.read_config(published("phi3")[0]), "dynamic", 512)
    with pytest.raises(InputError, match="dynamic scaling: .* for phi3; take another interpolation"):
        families.as_written(config)


@pytest.mark.parametrize("family", ["qwen2", "phi", "gptj", *NEW])
def test_scaled_queries_that_no_stock_loader_has(published, family):
    config = families.read_config(published(family)[0])
    with pytest.raises(InputError, match=f"LLaMA and Mistral, not of {family}; leave it out"):
        families.as_written(scaling.extend(config, "yarn", 512, llama_4_scaling_beta=0.1))


@pytest.fixture(scope="module")
def with_own_tokenizer(published, tmp_path_factory):
    """Return the folder of an exported Baichuan2, and its tokenizer.

    In the folder that it was exported from, the tokenizer points to Baichuan's code.
    """
    made = tmp_path_factory.mktemp("with_own_tokenizer")
    folder, out = made / "baichuan2", made / "out"
    publish(folder, "baichuan2", vocab_size=2048)
    shutil.copy(TINY / "tokenizer.model", folder)
    settings = {
        "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
        "tokenizer_class": "BaichuanTokenizer",
        "add_bos_token": False,
        "bos_token": "<s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    weights.save(weights.load(folder), tokenizer.load(folder), out)
    return out, tokenizer.load(folder)


def test_the_exported_tokenizer_names_no_code(with_own_tokenizer):
    out, original = with_own_tokenizer
    settings = json.loads((out / "tokenizer_config.json").read_text())
    kept = {"add_bos_token": False, "bos_token": "<s>", "unk_token": "<unk>"}
    assert settings == {"tokenizer_class": "LlamaTokenizer"} | kept
    assert (out / "tokenizer.model").read_bytes() == (TINY / "tokenizer.model").read_bytes()
    assert tokenizer.load(out).bos_id is None and original.bos_id is None  # add_bos_token travels


def test_stock_loaders_read_the_exported_tokenizer(with_own_tokenizer):
    out, original = with_own_tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    for text in ("The cat sat on the mat.", "def f(x):\n    return x + 12", "naïve 😀"):
        assert theirs(text).input_ids == original.encode(text)


@pytest.mark.parametrize("longest", ["null", '"32"'])
def test_a_tokenizer_without_a_longest_text(longest):
    config = Config(VOCAB, 64, 96, 2, 4, 2, 16, 64)
    files = {"tokenizer_config.json": f'{{"model_max_length": {longest}}}'.encode()}
    assert families.tokenizer_files(config, files) == files


def test_lengths_follow_the_window(make_llama, tmp_path):
    """transformers warns of prompts beyond generation_config.json's max_length, or cuts what follows."""
    folder, _ = make_llama()
    (folder / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    settings = {"max_length": 64, "max_new_tokens": 7, "temperature": 0.6, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    model = weights.load(folder)
    model.config = scaling.extend(model.config, "yarn", 512)
    weights.save(model, tokenizer.load(folder), tmp_path / "out")
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (theirs.max_length, theirs.max_new_tokens, theirs.temperature) == (512, 7, 0.6)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"model_max_length": 512}


# ---------------------------------------------------------------- config.json


def test_rotary_dimensions_of_a_config(config_of):
    """GPT-J turns 64 where the key is absent, and all of the head where it is null.

    Phi turns half where nothing is said, in rope_parameters or beside it, and GPT-NeoX a quarter.
    """

    def rotary(family, **changes):
        return families.read_config(config_of(family, **changes)).rotary_dim

    one_head = {"n_head": 1}  # of 64
    assert rotary("gptj", **one_head) == ROTARY and rotary("gptj", **one_head, rotary_dim=None) == 64
    assert rotary("gptj", **one_head, n_embd=256, rotary_dim="absent") == 64
    assert rotary("phi", rope_parameters=None, partial_rotary_factor="absent") == 8
    assert rotary("phi", rope_parameters=None, partial_rotary_factor=0.25) == 4
    in_parameters = {"rope_type": "default", "partial_rotary_factor": 0.75}
    assert rotary("phi", partial_rotary_factor="absent", rope_parameters=in_parameters) == 12
    assert rotary("gpt_neox", rope_parameters=None) == 4
    assert rotary("gpt_neox", rope_parameters=None, rotary_pct=0.75, partial_rotary_factor=0.5) == 12


LLAMA_KEYS = (
    "rms_norm_eps", "num_key_value_heads", "head_dim", "tie_word_embeddings", "rope_theta", "rope_parameters",
)  # fmt: skip


LLAMA_LIKE = ("llama", "mistral", "ministral3", "qwen2", "qwen3", "phi3", "smollm3", "olmo2", "granite")


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_what_config_json_leaves_out_is_what_stock_loaders_take(config_of, family):
    changes = dict.fromkeys(LLAMA_KEYS, "absent")
    changes |= {"model_type": family, "hidden_size": 512, "num_attention_heads": 32, "sliding_window": None}
    if family == "ministral3":
        scale = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}
        changes["rope_parameters"] = {"rope_type": "default"} | scale
    folder = config_of("llama", **changes)
    config, theirs = families.read_config(folder), transformers.AutoConfig.from_pretrained(folder)
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.n_kv_heads == theirs.num_key_value_heads
    assert config.tie_embeddings == theirs.tie_word_embeddings
    assert config.head_dim == (getattr(theirs, "head_dim", None) or 16)
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.rope_layers == getattr(theirs, "no_rope_layers", None)
    assert config.attention_scale == getattr(theirs, "attention_multiplier", None)
    assert config.logits_divisor == getattr(theirs, "logits_scaling", 1.0)


@pytest.mark.parametrize("mode", ["linear", "yarn", "longrope", "dynamic"])
def test_windows_are_whole_however_a_file_spells_them(config_of, mode):
    """llama.cpp's converter and vLLM refuse 64.0."""
    settings = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8} if mode == "longrope" else {}
    folder = config_of("llama", **scaled(mode, original_max_position_embeddings=64.0, **settings))
    config = families.read_config(folder)
    found = [config.original_window]

    def look(settings):
        for key, value in settings.items():
            if isinstance(value, dict):
                look(value)
            elif key.endswith("max_position_embeddings"):
                found.append(value)

    look(families.hf_config(config))
    assert len(found) > 1 and {type(window) for window in found} == {int}


def test_rope_of_gpt_neox_has_names_of_its_own(config_of):
    """Beside them its class reads rope_parameters, and nothing else that other families have."""
    changes = {"rope_parameters": None, "rotary_emb_base": 5e4, "rope_theta": 7e4}
    folder = config_of("gpt_neox", **changes)
    theirs = transformers.AutoConfig.from_pretrained(folder)
    assert families.read_config(folder).rope_theta == theirs.rope_parameters["rope_theta"] == 5e4


MINISTRAL = {"model_type": "ministral3"}
BETA = {"llama_4_scaling_beta": 0.1}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SLIDING = {"sliding_attention": YARN, "full_attention": {"rope_type": "default"}}
IN_PARAMETERS = {"rope_type": "default", "rope_theta": 1e6}
CONTRADICTIONS = [
    ("llama", {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "disagree"),
    ("llama", {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 2.0}}, "disagree"),
    ("llama", {"rope_parameters": SLIDING}, "differ from layer to layer"),
    ("llama", {"rope_theta": 1e4, "rope_parameters": IN_PARAMETERS}, "rope_theta is 1000000.0 in one place"),
    (
        "phi",
        {"partial_rotary_factor": 0.25, "rope_parameters": {"partial_rotary_factor": 0.75}},
        "partial_rotary_factor is 0.75 in one place and 0.25 in another",
    ),
]


def scaled(mode, **settings):
    """Return a change of config.json to a window of 64 that is stretched by a mode, with these settings."""
    return {"rope_parameters": {"rope_type": mode, "factor": 4.0, "rope_theta": 1e4} | settings}


NUMBERS_THAT_NO_MODEL_HAS = [
    ("llama", {"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
    ("llama", {"rms_norm_eps": None}, "rms_norm_eps"),
    ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
    ("llama", {"rms_norm_eps": True}, "rms_norm_eps is True"),
    ("phi", {"layer_norm_eps": [1]}, r"layer_norm_eps is \[1\]"),
    ("llama", scaled("default", rope_theta=1), "rope_theta is 1.0, not more than 1"),
    ("llama", scaled("default", rope_theta=-1), "rope_theta is -1"),
    ("llama", scaled("default", rope_theta=10**31), "rope_theta is 10+, more than"),
    ("llama", scaled("default", rope_theta=1e300), "rope_theta is 1e\\+300, more than"),
    ("llama", scaled("yarn", factor="4"), "factor is '4'"),
    ("llama", scaled("linear", factor=-4), "factor is -4"),
    ("llama", scaled("linear", factor=True), "factor is True"),
    ("llama", scaled("yarn", attention_factor=-1.0), "attention_factor is -1.0"),
    ("llama", scaled("yarn", beta_fast="32"), "beta_fast is '32'"),
    ("llama", scaled("yarn", beta_fast=1, beta_slow=32), "beta_slow below beta_fast"),
    ("llama", scaled("yarn", mscale="1", mscale_all_dim=1), "mscale is '1'"),
    ("llama", scaled("llama3", low_freq_factor=4.0, high_freq_factor=4.0), "below high_freq_factor"),
    ("llama", scaled("llama3", low_freq_factor=[1], high_freq_factor=4.0), r"low_freq_factor is \[1\]"),
    ("llama", scaled("longrope", short_factor=[1.0] * 8, long_factor=[0.0] * 8), "long_factor is 0.0"),
    ("llama", scaled("longrope", short_factor=8, long_factor=8), "short_factor is 8, not a list"),
    ("llama", scaled("longrope", short_factor=["1"] * 8, long_factor=[1] * 8), "short_factor is '1'"),
    ("llama", scaled("longrope", original_max_position_embeddings="64"), "embeddings is '64'"),
    ("llama", {"original_max_position_embeddings": [64]}, r"embeddings is \[64\]"),
    ("llama", scaled("yarn", original_max_position_embeddings=64.5), "embeddings is 64.5, not a whole"),
    (
        "llama",
        {"original_max_position_embeddings": -1, "rope_scaling": None, "rope_parameters": None},
        "original_max_position_embeddings is -1",
    ),
    ("llama", {"num_key_value_heads": 3}, "3 key/value heads do not divide 4 heads"),
    ("llama", {"vocab_size": 2**62}, "vocab_size is 4611686018427387904, more than"),
    ("llama", {"num_hidden_layers": 2**31}, "num_hidden_layers is 2147483648, more than"),
    ("llama", {"max_position_embeddings": 64.0}, "max_position_embeddings is 64.0, not a positive whole"),
    ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    ("llama", {"bos_token_id": "1"}, "'1' is no id of a token"),
    ("llama", {"eos_token_id": [2, None, -1]}, "-1 is no id of a token"),
    ("llama", {"eos_token_id": 2**63}, "9223372036854775808 is no id of a token"),
    ("llama", {"dtype": ["float32"]}, "float32"),
    ("llama", {"layer_types": 7, "model_type": "qwen2", "use_sliding_window": True}, "layer_types is 7"),
]
SLIDES = ["full_attention", "sliding_attention"]
REFUSED = [
    ("baichuan2", {"max_position_embeddings": "absent", "model_max_length": 4096}, "13B uses ALiBi"),
    ("baichuan", {"hidden_size": 5120, "num_attention_heads": 40}, "13B uses ALiBi"),
    ("baichuan", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("baichuan2", {"tie_word_embeddings": True}, "tie_word_embeddings True"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm"),
    ("phi", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    ("phi", {"partial_rotary_factor": 0.01, "rope_parameters": None}, "0 rotary dimensions"),
    ("gptj", {"activation_function": "relu"}, "activation_function 'relu'"),
    ("gptj", {"rotary_dim": 32}, "32 rotary dimensions"),
    ("gptj", {"rotary_dim": 7}, "7 rotary dimensions"),
    ("gptj", {"rotary_dim": 2}, "2 rotary dimensions"),
    # int(88 * (30 / 88)) is 29, so that Phi cannot have it.
    ("gptj", {"n_embd": 352, "rotary_dim": 30}, "30 rotary dimensions in a head of 88"),
    ("gptj", {"n_embd": "absent"}, "n_embd"),
    ("gptj", {"n_layer": None}, "n_layer"),
    ("gptj", {"n_inner": "96"}, "n_inner"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    *CONTRADICTIONS,
    *NUMBERS_THAT_NO_MODEL_HAS,
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor 0.5",
    ),
    ("llama", {"hidden_size": 2, "head_dim": None}, "0 rotary dimensions in a head of 0"),
    ("qwen2", {"mlp_bias": True}, "mlp_bias"),
    ("qwen3", {"attention_bias": True}, "attention_bias True"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 32, "layer_types": SLIDES}, "window 32 in use"),
    ("qwen3", {"model_type": "qwen3_moe"}, "'qwen3_moe' is not known: its MLP is a mixture of experts"),
    ("phi3", {"sliding_window": 32}, "sliding_window 32 in use"),
    ("phi3", scaled("yarn"), "rope_type 'yarn' is not known for phi3"),
    ("smollm3", {"use_sliding_window": True}, "use_sliding_window True"),
    ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers \[1\] is not a 0 or 1 for each"),
    ("smollm3", {"no_rope_layers": [0, 0, 1]}, r"no_rope_layers \[0, 0, 1\] is not"),
    ("smollm3", {"no_rope_layers": [2, 1]}, r"no_rope_layers \[2, 1\] is not"),
    ("smollm3", {"no_rope_layers": 1}, "no_rope_layers 1 is not"),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
    ("olmo2", {"model_type": "olmo3"}, "'olmo3' is not known: some of its layers have a sliding window"),
    ("granite", {"residual_multiplier": 0}, "residual_multiplier is 0"),
    ("granite", {"logits_scaling": "8"}, "logits_scaling is '8'"),
    ("gpt_neox", {"use_parallel_residual": 1}, "use_parallel_residual is 1, neither true nor false"),
    ("gpt_neox", {"hidden_act": "gelu_fast"}, "hidden_act 'gelu_fast'"),
    ("gpt_neox", {"rope_parameters": None, "rotary_pct": 0.01}, "0 rotary dimensions"),
    ("llama", {"model_type": "gemma3_text"}, "have a sliding window and another rope_theta"),
    ("llama", {"model_type": "gpt_oss"}, "have a sliding window, and its MLP is a mixture"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default"} | BETA},
        "llama_4_scaling_beta 0.1 is not known for llama",
    ),
    ("llama", MINISTRAL, "llama_4_scaling_beta None is not known for ministral3"),
    ("llama", MINISTRAL | {"sliding_window": 32}, "sliding_window 32 in use"),
    (
        "llama",
        MINISTRAL | {"rope_parameters": {"llama_4_scaling_beta": "0.1"}},
        "llama_4_scaling_beta is '0.1', not a positive number",
    ),
    (
        "llama",
        MINISTRAL | {"rope_parameters": BETA | {"original_max_position_embeddings": 0}},
        "original_max_position_embeddings is 0, not a positive number",
    ),
]


@pytest.mark.parametrize("family, changes, says", REFUSED, ids=str)
def test_what_is_refused(config_of, family, changes, says):
    folder = config_of(family, **changes)
    with pytest.raises(InputError, match=says) as refusal:
        weights.load(folder)
    assert "\n" not in str(refusal.value) and str(folder / "config.json") in str(refusal.value)


USED_BY_NO_LAYER = {"use_sliding_window": True, "sliding_window": 32}


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"max_window_layers": 2}, None),
        ({"max_window_layers": 1}, "sliding_window 32 in use"),
        ({"layer_types": ["full_attention"] * 2, "max_window_layers": 0}, None),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window 32 in use"),
        ({"sliding_window": 64, "max_window_layers": 0}, None),
        # The window is 256 then: YaRN by 4, as Qwen's instructions have it.
        ({"rope_parameters": YARN, "sliding_window": 64, "max_window_layers": 0}, "sliding_window 64 in use"),
        ({"sliding_window": "32", "max_window_layers": 0}, "sliding_window is '32'"),
        ({"use_sliding_window": False, "max_window_layers": 0}, None),
    ],
    ids=str,
)
def test_a_sliding_window_counts_where_a_layer_uses_it(config_of, changes, says):
    """transformers makes the same of each: whether a layer slides is what its own config class says."""
    folder = config_of(
        "llama", **{"model_type": "qwen2", "layer_types": "absent"} | USED_BY_NO_LAYER | changes
    )
    if says != "sliding_window is '32'":
        theirs = transformers.AutoConfig.from_pretrained(folder)
        window = 256 if "rope_parameters" in changes else 64
        slides = "sliding_attention" in theirs.layer_types and (theirs.sliding_window or 64) < window
        assert slides == (says is not None)
    if says is None:
        assert families.read_config(folder).n_layers == 2
    else:
        with pytest.raises(InputError, match=says):
            families.read_config(folder)


BAD_JSON = {
    "[" * 100000: "nested too deeply",
    '{"a": ' + "[" * 500 + "]" * 500 + "}": "nested too deeply",
    '{"vocab_size": ' + "9" * 5000 + "}": "a number of 5000 digits",
    '{"rms_norm_eps": NaN}': "NaN or infinite",
    '{"rms_norm_eps": 1e999}': "NaN or infinite",
    '{"model_type": "\\ud800"}': "half a character",
    '{"model_type": "\\udce9"}': "half a character",  # as a byte in the name of a file, see read_record
    '{"model_type"': "not JSON at character 13",
}


@pytest.mark.parametrize("text", BAD_JSON, ids=BAD_JSON.get)
def test_json_that_no_program_can_use(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=f"config.json: not readable .*{BAD_JSON[text]}"):
        families.read_config(tmp_path)


def test_config_json_that_is_no_file(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match="config.json: not a regular file"):
        families.read_config(tmp_path)
    (tmp_path / "config.json").rmdir()
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match="config.json: not readable .not UTF-8 at byte 7"):
        families.read_config(tmp_path)


# ---------------------------------------------------------------- the whole way


@pytest.mark.parametrize("family, processes", [("gptj", None), ("gpt_neox", None), ("baichuan2", 2)])
def test_from_training_to_stock_loaders(make, call, run, tmp_path, family, processes):
    scaled = family == "gptj"  # it is scaled already
    folder, theirs = make(family, scaling_of("linear") if scaled else None, vocab_size=2048)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("The cat sat on the mat. " * 400)
    arguments = ("--model", folder, "--data", text, "--device", "cpu", "--out", out)
    arguments += ("--target_len", 256, "--batch_size", 4, "--steps", 2, "--lr", 1e-2, "--warmup_steps", 0)
    arguments += ("--activation_checkpointing", "selective")
    done = run("train.py", *arguments, processes=processes) if processes else call("train", *arguments)
    assert done.returncode == 0, done.stderr
    told = "the model is scaled already (linear by 8); yarn by 4 comes on top, 32 in all"
    assert (told in done.stderr) == scaled

    trained, stocks = weights.load(out / "model", dtype=torch.float32), load_stock(out / "model")
    for positions in (NEAR, NEAR + 200 * (NEAR >= 15)):
        expected = ours(trained, positions)
        torch.testing.assert_close(stock(stocks, positions), expected, rtol=0, atol=1e-3)
        with torch.no_grad():
            assert (expected - theirs.oracle(TOKENS, positions)).abs().max() > 0.1  # it was trained
    models, written = ("--model", folder, out / "model"), tmp_path / "r.json"
    sizes = ("--lengths", "64,128", "--device", "cpu")
    done = call("eval", "--task", "ppl", *models, "--data", text, *sizes, "--json", written)
    assert done.returncode == 0, done.stderr
    report = json.loads(written.read_text())
    assert report["results"][0]["ppl"] < report["compared"][0]["results"][0]["ppl"]
