"""Training steps of other libraries, which bench.py measures beside ours.

Notable choices:
- The loop is the usual one: bfloat16 autocast and fused AdamW on float32 weights.
- `transformers` is compiled as a whole. `liger` is transformers with Liger's kernels, which axolotl builds
  on, its fused linear cross-entropy included; nothing else compiles it, as people run it.
- Liger's kernels take the place of classes of transformers in the whole process. A process that has made a
  step of `liger` measures nothing else.
"""

import dataclasses
import importlib.metadata

import torch

from hf import families
from storage.errors import InputError

PACKAGES = {"transformers": ("transformers",), "liger": ("transformers", "liger-kernel")}  # peer -> packages


def version(package):
    """Return the version of a package as pip knows it, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def hf_config(config):
    """Return the config of transformers for a model of ours in float32."""
    import transformers

    in_float32 = dataclasses.replace(config, dtype="float32")
    return transformers.AutoConfig.for_model(**families.hf_config(families.as_written(in_float32)))


def hf_model(config):
    """Return their own model of this architecture, float32."""
    import transformers

    return transformers.AutoModelForCausalLM.from_config(hf_config(config))


def liger_model(config):
    """Return hf_model with Liger's kernels. Raise InputError if there are none for its architecture."""
    from liger_kernel.transformers import AutoLigerKernelForCausalLM
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    theirs = hf_config(config)
    if theirs.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:  # it would leave everything as it is
        raise InputError(f"Liger has no kernels for {theirs.model_type}")
    return AutoLigerKernelForCausalLM.from_config(theirs)


def make_step(peer, config, batches, activation_checkpointing, device):
    """Return a function that takes a plain step of a peer, without skips.

    It returns the loss, and 0 for the wait for a batch, which only our step measures.

    batches: yields the micro-batches of each step, see data.prefetched. activation_checkpointing: "none", or
    anything else for the one kind that transformers has.
    """
    on_gpu = device.type == "cuda"
    torch.set_float32_matmul_precision("high")
    make_model = liger_model if peer == "liger" else hf_model
    with device:
        model = make_model(config).train()
    if activation_checkpointing != "none":
        model.gradient_checkpointing_enable()
    forward = torch.compile(model) if on_gpu and peer == "transformers" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)

    def step():
        micro_batches = next(batches)
        total = torch.zeros((), device=device)
        for tokens, *_ in micro_batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                outputs = forward(input_ids=tokens, labels=tokens, use_cache=False)
                loss = outputs.loss / len(micro_batches)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total.item(), 0.0

    return step
