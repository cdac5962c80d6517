"""A run's metrics.jsonl. (That TensorBoard's events hold the same figures: tasks/test_validation.py.)"""

import json
import math

from storage.log import Log, half_trained_run, mark_finished


def test_a_figure_that_is_not_finite_is_null(tmp_path):
    Log(tmp_path, 0).write({"step": 1, "loss": math.nan, "mfu": None, "validation": {8: math.inf, 16: 1.5}})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "mfu": None, "validation": {"8": None, "16": 1.5}}


def test_the_model_of_a_run_that_has_not_ended(tmp_path, monkeypatch):
    """However its folder is named."""
    model = tmp_path / "model"
    model.mkdir()
    monkeypatch.chdir(model)
    names = (model, str(model), ".", "../model", "./")
    assert [half_trained_run(name) for name in names] == [None] * len(names)  # no run has left it
    (tmp_path / "args.json").write_text("{}")
    for name in names:
        assert half_trained_run(name).samefile(tmp_path)
    mark_finished(tmp_path, 6)
    assert [half_trained_run(name) for name in names] == [None] * len(names)
