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
from storage.files import InputError


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


# ---------------------------------------------------------------- what is refused


def test_a_new_field_of_config_changes_no_fingerprint():
    """Runs and results of before it can go on."""
    folder = CheckpointFolder(TINY)
    before = folder.fingerprint()
    extended = dataclasses.make_dataclass("Extended", [("another", int, 0)], bases=(Config,))
    folder.config = extended(**vars(folder.config))
    assert folder.fingerprint() == before


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
