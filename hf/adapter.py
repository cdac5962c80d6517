"""Write the adapters of a model (LoRA) as PEFT does.

PATH gets adapter_config.json and adapter_model.safetensors, and PATH/base the model that they belong on: the
weights as they were, which are links, with the config.json of the extended window.

Notable choices:
- An adapter does not record the interpolation. On the model as published it would load, and compute nonsense
  without a word. So it names PATH/base as its base, by its full path: if that has moved, loaders say so.
- What was trained beside the adapters (embedding, norms) is stored whole, as PEFT's modules_to_save.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from fsdp import whole
from hf import families
from hf.folder import INDEX
from hf.writing import save_tensors
from model import Adapter
from storage.errors import InputError
from storage.files import new_folder

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base"


def check(config):
    """Raise InputError if adapters would not fit the published files of a model of this Config.

    They do not fit GPT-J and Baichuan, which are written under another family's names, nor Phi-3 and
    GPT-NeoX, which have q, k and v in a single layer.
    """
    written_as = families.as_written(config).model_type
    parameters = families.stored_parameters(config)
    own_names = [families.published_name(name, config.model_type) for name in parameters]
    if own_names != [families.published_name(name, written_as) for name in parameters]:
        reason = f"its weights are written as those of {written_as}"
    elif len(set(own_names)) < len(own_names):
        reason = "it has q, k and v in one layer"
    else:
        return
    raise InputError(f"adapters of {config.model_type} fit no stock model: {reason}; take the merged model")


def save(model, base, tokenizer, path):
    """Write the adapters of a model, and what else was trained, as a folder that PEFT reads.

    base: the CheckpointFolder of its other weights. The model's Config must have passed `check`. Under
    torch.distributed every process calls this, and process 0 writes. Adapters that are there stay until
    these are whole.
    """
    path = Path(path)
    config = families.as_written(model.config)
    state = model.state_dict()
    trained = {name: whole(state[name]).cpu() for name, p in model.named_parameters() if p.requires_grad}
    if "embed.weight" in trained and config.tie_embeddings:
        # PEFT leaves a tied head the old embedding, so the head is replaced as well, with its bias if any.
        trained["head.weight"] = trained["embed.weight"].clone()
        if config.head_bias:
            trained["head.bias"] = state["head.bias"].cpu()
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    adapters, others = _named_as_by_peft(trained, config)
    first = next(module for module in model.modules() if isinstance(module, Adapter))
    rank = len(first.a)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str((path / BASE).resolve()),
        "r": rank,
        "lora_alpha": round(first.scale * rank),
        "target_modules": sorted({name.split(".")[-3] for name in adapters}),
        "modules_to_save": sorted({name.split(".")[-2] for name in others}) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_folder(path, (CONFIG, WEIGHTS, BASE).__contains__) as aside:
        save_tensors(adapters | others, aside / WEIGHTS)
        (aside / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        _write_base(config, base, tokenizer, aside / BASE)


def _named_as_by_peft(trained, config):
    """Return two dicts {PEFT's name: tensor}: the adapters, and the other weights in the dtype of exports.

    trained: {our name: tensor}.
    """

    def name_of(weight):
        return f"base_model.model.{families.published_name(weight, config.model_type)}"

    adapters, others = {}, {}
    for name, tensor in trained.items():
        layer, is_adapter, part = name.partition(".adapter.")
        if is_adapter:
            adapters[name_of(f"{layer}.weight").replace(".weight", f".lora_{part.upper()}.weight")] = tensor
        else:
            others[name_of(name)] = tensor.to(getattr(torch, config.dtype))
    return adapters, others


def _write_base(config, base, tokenizer, folder):
    """Write the folder of the model that the adapters belong on. Its weights are links to those of `base`."""
    folder.mkdir()
    for file in (*base.files, base.path / INDEX):
        if file.exists():
            (folder / file.name).symlink_to(file.resolve())
    (folder / "config.json").write_text(json.dumps(families.hf_config(config), indent=2) + "\n")
    for name, content in families.tokenizer_files(config, tokenizer.files).items():
        (folder / name).write_bytes(content)
