"""What train.py says of stock loaders is what results/loaders.json has measured."""

import json

import pytest
from conftest import ROOT
from loaders import compare

from hf import families, loaders, scaling

NAMES = {"llama.cpp": "llama.cpp", "vllm": "vLLM", "mlx-lm": "mlx-lm"}  # in the results, in hf/loaders.py
MEASURED = json.loads((ROOT / "results" / "loaders.json").read_text())["cases"]
OF_TINY = [name for name in compare.cases() if not name.startswith("smollm2")]


def extended(name, folder, **other):
    """Return the Config of a case and the ratio of the windows. other: settings of its last stretch."""
    base, beta, stretches = compare.cases()[name]
    config = compare.base_config(base)
    for i, (mode, target_len, settings) in enumerate(stretches):
        if i:  # it is exported in between
            (folder / "config.json").write_text(json.dumps(families.hf_config(families.as_written(config))))
            config = families.read_config(folder)
        if i == len(stretches) - 1:
            mode = other.pop("rope", mode)
            settings = {key: float(value) for key, value in (settings | other).items()}
        ratio = target_len / config.max_position_embeddings
        config = scaling.extend(config, mode, target_len, beta, **settings)
    return config, ratio


def told(config, ratio):
    """Return {loader: what mends it} of the differences that are told."""
    found = {}
    for what, mending in loaders.differences(config, ratio):
        found[next(name for name in NAMES.values() if what.startswith(name))] = mending
    return found


def test_every_case_is_measured():
    assert MEASURED.keys() == compare.cases().keys()
    for name, row in MEASURED.items():
        # 10,000 tokens of smollm2-135m took mlx-lm more than 20 minutes on a busy CPU.
        not_run = {"mlx-lm"} if name.startswith("smollm2") else set()
        assert row.keys() | not_run == compare.VERSIONS.keys(), name
        assert row["transformers 5"]["verdict"] == "right", name
    assert MEASURED["smollm2-135m: its recipe"]["llama.cpp"]["verdict"] == "right"  # as GUIDE.md says


@pytest.mark.parametrize("name", OF_TINY)
def test_what_is_told_is_what_is_measured(tmp_path, name):
    wrong = {NAMES[k] for k, v in MEASURED[name].items() if k in NAMES and v["verdict"] != "right"}
    differing = told(*extended(name, tmp_path))
    if name == "phi: yarn, factor 4":  # vLLM 0.32 lets transformers run Phi. Older ones have a table for it.
        wrong.add("vLLM")
    assert differing.keys() == wrong
    for loader, mending in differing.items():  # and what is said to mend it does
        if mending:
            assert loader not in told(*extended(name, tmp_path, **mending))


def test_train_says_it_in_one_line(call, tmp_path):
    """tiny's own recipe has a beta_fast that llama.cpp ignores."""
    done = call("train", "--model", "tiny", "--steps", 0, "--device", "cpu", "--out", tmp_path / "a")
    line = "not every loader will compute this model: llama.cpp ignores beta_fast 8 (--beta_fast 32 mends it)"
    assert done.returncode == 0 and done.stderr.splitlines().count(line) == 1
