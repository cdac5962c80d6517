"""What stock loaders compute otherwise than this code, although they say nothing of it.

tests/loaders/compare.py runs them and writes results/loaders.json, and tests/hf/test_loaders.py compares this
file with that one. transformers computes all that is written from 5.0 on. Others were not run.
"""

import math

import rope
from hf.families import FAMILIES, as_written, written_rope


def differences(config, ratio):
    """Return [(what a loader does otherwise with the model of a Config, what mends it)], often [].

    ratio: of its window to the one that was stretched. What mends it is a dict with another value for `rope`
    (the mode), `factor` or `beta_fast`; {} means that nothing does.
    """
    written = as_written(config)
    family = FAMILIES[written.model_type]
    theta, scaling = written_rope(written)
    scaling = scaling or {"rope_type": "default"}
    mode = (config.rope_scaling or {}).get("rope_type", "default")
    where = "with scaled queries" if rope.has_query_scale(scaling) else f"in {family.architecture}"
    # Two stretches of different kinds are composed into longrope (scaling.compose). With another mode for the
    # second one they still would be, so none is proposed.
    another_mode = {} if mode == "longrope" else {"rope": "yarn"}

    found = []
    if not _llama_cpp_computes(family, theta, scaling):
        mending = another_mode if "yarn" in (family.llama_cpp or ()) else {}
        found.append((f"llama.cpp does not compute {mode} {where}", mending))
    elif _llama_cpp_ignores_beta_fast(scaling):
        found.append((f"llama.cpp ignores beta_fast {scaling['beta_fast']:g}", {"beta_fast": 32}))

    end_of_table = math.ceil(scaling.get("factor", 1) * config.original_window)
    if scaling["rope_type"] == "dynamic":
        found.append(("vLLM refuses texts past the old window", {"rope": "ntk"}))
    elif scaling["rope_type"] == "yarn" and end_of_table < config.max_position_embeddings:
        found.append((f"vLLM is wrong past {end_of_table:,} tokens", {"factor": f"{ratio:g}"}))

    if scaling["rope_type"] not in family.mlx_lm:
        mending = another_mode if "yarn" in family.mlx_lm else {}
        found.append((f"mlx-lm does not compute {mode} {where}", mending))
    return found


def _llama_cpp_computes(family, theta, scaling):
    """Return whether llama.cpp and its converter compute these terms of config.json, beta_fast aside."""
    if family.llama_cpp is None:  # The converter does not know what transformers 5 makes of its config.json.
        return False
    if scaling["rope_type"] not in family.llama_cpp:
        # Of a family without any type it does not read the base either, and takes the usual one.
        return not family.llama_cpp and scaling["rope_type"] == "default" and theta == 10000
    if scaling["rope_type"] != "yarn" or rope.has_query_scale(scaling):
        return True
    return rope.yarn_attention_factor(scaling) == 0.1 * math.log(max(scaling["factor"], 1)) + 1


def _llama_cpp_ignores_beta_fast(scaling):
    """Return whether there is a beta_fast of another value than the one that llama.cpp always takes.

    It reads beta_fast of models with scaled queries alone.
    """
    is_yarn = scaling["rope_type"] == "yarn" and not rope.has_query_scale(scaling)
    return is_yarn and (scaling.get("beta_fast") or 32) != 32
