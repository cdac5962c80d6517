"""Options of train.py that are not given are, with --resume, those that the earlier run recorded."""

import json
import os

import pytest

from bench import SHAPES
from cli import completion, resuming
from storage.errors import InputError


@pytest.fixture
def record(tmp_path):
    """record(args) writes args.json of an earlier run in tmp_path that had these options."""

    def write(args):
        options = {key: value for key, value in vars(args).items() if key not in resuming.NOT_RECORDED}
        (tmp_path / "args.json").write_text(json.dumps(options))

    return write


def test_validation_of_a_run_that_goes_on_can_be_switched_off(parse, record, tmp_path):
    out = ("--out", tmp_path)
    record(parse(*out, "--eval_every", 2, "--eval_data", "gone.txt", "--eval_lengths", 64))
    assert parse(*out, "--resume").eval_data == ["gone.txt"]
    args = parse(*out, "--resume", "--eval_every", 0)
    assert (args.eval_every, args.eval_data, args.eval_lengths) == (0, [], None)
    with pytest.raises(InputError, match="--eval_every and --eval_data belong together"):
        args = parse(*out, "--model", "folder", "--resume", "--eval_every", 0, "--eval_data", "other.txt")
        completion.complete(args, SHAPES["smollm2-135m"])


@pytest.mark.parametrize("recorded", ["64,32", [32, 64]])
def test_windows_of_validation_are_recorded_as_a_list_or_a_text(parse, record, tmp_path, recorded):
    """Either in args.json is understood."""
    args = parse("--out", tmp_path, "--eval_every", 2, "--eval_data", "a.txt", "--eval_lengths", "64,32")
    assert args.eval_lengths == [32, 64]
    args.eval_lengths = recorded
    record(args)
    assert parse("--out", tmp_path, "--resume").eval_lengths == [32, 64]
    assert parse("--out", tmp_path, "--resume", "--eval_lengths", 16).eval_lengths == [16]


def test_texts_in_a_file_whose_name_is_not_utf_8(parse, record, tmp_path):
    texts = tmp_path / os.fsdecode(b"caf\xe9.txt")
    texts.touch()
    record(parse("--out", tmp_path, "--data", texts))
    assert parse("--out", tmp_path, "--resume").data == [str(texts)]
