"""CheckpointFolder accepts what fits its config.json, old exports too, and says what does not."""

import dataclasses
import json
import re

import pytest
import torch
from published import TINY, assert_same, edit, ours, publish, stock
from safetensors.torch import load_file, save_file

from hf import weights
from hf.folder import CheckpointFolder
from model import Config, empty_transformer
from storage.errors import InputError


def rewrite(path, tensors):
    save_file(tensors, path, metadata={"format": "pt"})


# ---------------------------------------------------------------- what is accepted


def test_old_exports(make_llama):
    """LLaMA 1's config.json has no head_dim and no key/value heads.

    Old files carry rotary tables, and a tied head twice.
    """
    folder, model = make_llama(num_key_value_heads=4, tie_word_embeddings=True)
    edit(folder / "config.json", head_dim="absent", num_key_value_heads="absent")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    rewrite(folder / "model.safetensors", tensors)
    assert_same(ours(folder), stock(model))
    assert CheckpointFolder(folder).parameter_count() == sum(p.numel() for p in model.parameters())


def test_nothing_is_read_before_it_is_asked_for():
    folder = CheckpointFolder(TINY)
    assert folder.path == TINY and list(folder.files) == [TINY / "model.safetensors"]
    model = empty_transformer(folder.config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert folder.parameter_count() == sum(p.numel() for p in set(model.parameters()))


def test_the_fingerprint_is_of_the_config_and_the_weights(make_llama):
    folder, _ = make_llama()
    first = CheckpointFolder(folder).fingerprint()
    assert re.fullmatch("[0-9a-f]{16}", first) and CheckpointFolder(folder).fingerprint() == first
    tensors = load_file(folder / "model.safetensors")
    # What the model computes itself does not count.
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    rewrite(folder / "model.safetensors", tensors | table)
    assert CheckpointFolder(folder).fingerprint() == first
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 1
    rewrite(folder / "model.safetensors", tensors)
    second = CheckpointFolder(folder).fingerprint()
    edit(folder / "config.json", max_position_embeddings=128)
    assert len({first, second, CheckpointFolder(folder).fingerprint()}) == 3


def write_index(folder, weight_map):
    """Write an index over the tensors of a folder's model.safetensors, which becomes part.safetensors."""
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_that_names_what_no_shard_needs(make_llama):
    """Rotary tables that are computed anew, and a head that is tied: no file holds them."""
    folder, model = make_llama(tie_word_embeddings=True)
    names = [*load_file(folder / "model.safetensors"), "lm_head.weight", "model.rotary_emb.inv_freq"]
    write_index(folder, dict.fromkeys(names, "part.safetensors"))
    assert_same(ours(folder), stock(model))
    index = {"weight_map": dict.fromkeys(names, "part.safetensors") | {"model.norm.weight": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    rewrite(folder / "b.safetensors", {"another": torch.ones(2)})
    with pytest.raises(InputError, match="b.safetensors: model.norm.weight is missing, though"):
        CheckpointFolder(folder)


# ---------------------------------------------------------------- what is refused


def test_a_new_field_of_config_changes_no_fingerprint():
    """Runs and results of before it can go on."""
    folder = CheckpointFolder(TINY)
    before = folder.fingerprint()
    extended = dataclasses.make_dataclass("Extended", [("another", int, 0)], bases=(Config,))
    folder.config = extended(**vars(folder.config))
    assert folder.fingerprint() == before


def test_an_index_beside_another_model(make_llama):
    """transformers would take the single file, and vLLM what the index names."""
    folder, _ = make_llama()
    single = (folder / "model.safetensors").read_bytes()
    write_index(folder, dict.fromkeys(load_file(folder / "model.safetensors"), "part.safetensors"))
    assert CheckpointFolder(folder).files
    (folder / "model.safetensors").write_bytes(single)
    with pytest.raises(InputError, match="holds model.safetensors and .*index.json, which names other files"):
        CheckpointFolder(folder)


def test_a_folder_in_the_place_of_a_file(make_llama):
    folder, _ = make_llama()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(InputError, match="model.safetensors: not a file"):
        CheckpointFolder(folder)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_weights_that_are_no_floats(make_llama, dtype):
    """They would be rounded to something else in silence. In what is computed anew any dtype may stand."""
    folder, _ = make_llama()
    tensors = load_file(folder / "model.safetensors")
    table = {"model.rotary_emb.inv_freq": torch.ones(8).to(dtype)}
    rewrite(folder / "model.safetensors", tensors | table)
    assert CheckpointFolder(folder).files
    rewrite(folder / "model.safetensors", tensors | {UP: tensors[UP].to(dtype)})
    with pytest.raises(InputError, match=f"weight {UP} is of dtype .*unquantised"):
        CheckpointFolder(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers(make_llama, value, dtype):
    folder, _ = make_llama()
    tensors = load_file(folder / "model.safetensors")
    up = tensors[UP].to(dtype)
    up[-1, -1] = value
    rewrite(folder / "model.safetensors", tensors | {UP: up})
    with pytest.raises(InputError, match=f"weight {UP} is NaN or infinite somewhere"):
        weights.load(folder)


def test_weights_that_are_too_large_for_the_dtype_they_are_read_in(make_llama):
    """That their sum overflows is no reason."""
    folder, _ = make_llama()
    tensors = load_file(folder / "model.safetensors")
    rewrite(folder / "model.safetensors", tensors | {UP: torch.full_like(tensors[UP], 1e37)})
    assert weights.load(folder).blocks[1].mlp.up.weight.isfinite().all()
    with pytest.raises(InputError, match=f"weight {UP} is NaN or infinite somewhere, as float16"):
        weights.load(folder, dtype=torch.float16)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_tied_model_with_another_head(make_llama, shards):
    """transformers 5 takes the head then, and earlier ones do not."""
    folder, _ = make_llama(tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    head["lm_head.weight"][319, 63] += 0.25
    if shards == 1:
        rewrite(folder / "model.safetensors", tensors | head)
    else:
        rewrite(folder / "head.safetensors", head)
        weight_map = dict.fromkeys(tensors, "model.safetensors") | {"lm_head.weight": "head.safetensors"}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="lm_head.weight is another.* tie_word_embeddings"):
        CheckpointFolder(folder)
    edit(folder / "config.json", tie_word_embeddings=False)
    assert torch.equal(weights.load(folder).head.weight, head["lm_head.weight"])


BROKEN = {  # family: a weight, the dimension that lacks a row, what the message says of it
    "baichuan": (
        "model.layers.1.self_attn.W_pack.weight",
        0,
        r"W_pack.weight has shape \(191, 64\), config.json says \(192, 64\)",
    ),
    "gptj": (
        "transformer.h.1.attn.q_proj.weight",
        1,
        r"q_proj.weight has shape \(64, 63\), config.json says \(64, 64\)",
    ),
}


@pytest.mark.parametrize("family", BROKEN)
def test_weights_that_do_not_fit(tmp_path, family):
    name, dim, says = BROKEN[family]
    folder = tmp_path / family
    publish(folder, family)
    state = load_file(folder / "model.safetensors")
    whole = state.pop(name)
    shorter = whole.narrow(dim, 0, whole.shape[dim] - 1).contiguous()
    rewrite(folder / "model.safetensors", state | {name: shorter})
    with pytest.raises(InputError, match=says):
        CheckpointFolder(folder)
    rewrite(folder / "model.safetensors", state)
    with pytest.raises(InputError, match=f"weight {name} missing"):
        CheckpointFolder(folder)


def test_a_tokenizer_with_more_tokens_than_embeddings(make_llama):
    folder, _ = make_llama()
    (folder / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    with pytest.raises(InputError, match="the tokenizer has 2048 tokens, the model only 320"):
        CheckpointFolder(folder).load_tokenizer()
