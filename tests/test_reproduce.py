"""reproduce.py: fair arms, every one of them measured, and a table that is what the JSON files say."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import call_main

import pose
import reproduce
import rope
from storage.errors import InputError
from storage.log import is_finished

TEXT = "The cat sat on the mat, and the dog looked on. "


def options_given(arm):
    """Return train.py's options of an arm for a window of 8,192."""
    return reproduce.training_options(arm, 8192, reproduce.TOKENS)


@pytest.mark.parametrize("table", reproduce.TABLES)
def test_every_arm_sees_the_same_number_of_tokens(table):
    """In each step and in all, at full length too; and asks for what train.py has."""
    arms, lengths = reproduce.TABLES[table].arms, reproduce.TABLES[table].lengths
    seen, targets = set(), set()
    for given in map(options_given, arms.values()):
        assert given.get("method", "pose") in pose.METHODS
        assert given.get("offset", "uniform") in pose.OFFSETS
        assert given.get("rope", "ntk") in rope.EXTENSIONS
        assert given["retrieval"] == 0  # the paper has no episodes
        targets.add(given["target_len"])
        window = given["target_len"] if given.get("method") == "full" else 8192
        tokens_per_step = window * given["batch_size"]
        seen.add((tokens_per_step, tokens_per_step * given["steps"]))
    assert seen == {(2**17, reproduce.TOKENS)}
    # Measured up to the longest window, and no further.
    assert not lengths or max(targets) == 8192 * lengths[-1]


@pytest.mark.parametrize("table", ["figure4", "table2"])
def test_interpolations_are_compared_at_the_same_factor(table):
    """The ratio of the windows, not what a model's recipe adds to one of them."""
    arms_of_target = {}
    for given in map(options_given, reproduce.TABLES[table].arms.values()):
        assert given["factor"] == given["target_len"] / 8192
        arms_of_target.setdefault(given["target_len"], []).append(given)
    for arms in arms_of_target.values():
        modes = [given.pop("rope") for given in arms]
        assert len(set(modes)) == len(arms) > 1 and all(given == arms[0] for given in arms)


@pytest.fixture
def novel(tmp_path, monkeypatch):
    """Each test runs in a folder of its own with a small text in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "novel.txt").write_text(TEXT * 400)


@pytest.fixture
def calls(monkeypatch):
    """The calls of scripts that reproduce.py would make, lists of words: none is made, no table is read."""
    noted = []
    monkeypatch.setattr(reproduce, "run", lambda *words: noted.append(list(words)))
    monkeypatch.setattr(reproduce, "markdown", lambda *_: "")
    return noted


def lines_of(path):
    """Return the number of lines in a file, 0 without one."""
    return path.read_text().count("\n") if path.exists() else 0


def test_a_half_trained_arm_is_not_an_arm(start, call, novel, calls):
    """Interrupted by SIGTERM, train.py leaves a half-trained model.

    The next call goes on; with other settings it is refused.
    """
    options = ("--model", "tiny", "--data", "novel.txt", "--dev", "novel.txt", "--trials", 1)
    command = ("table4", *options, "--tokens")
    arm = Path("out/reproduce/table4/uniform-0")
    started = start("reproduce.py", *command, 6 * 16 * 256)
    while lines_of(arm / "metrics.jsonl") < 2:
        assert started.poll() is None
        time.sleep(0.02)
    started.kill(signal.SIGTERM)
    started.wait()
    until = time.time() + 60
    while not (arm / "model" / "config.json").exists():
        assert time.time() < until
        time.sleep(0.05)
    assert 2 <= lines_of(arm / "metrics.jsonl") < 6

    other = call("reproduce", *command, 4096)
    assert other.returncode == 2 and "tokens was 24576, now 4096" in other.stderr
    assert call("reproduce", *command, 6 * 16 * 256).returncode == 0
    trained = [words for words in calls if words[0] == "train.py"]
    assert ["--resume" in words for words in trained] == [True, False, False]
    assert call("train", *trained[0][1:]).returncode == 0
    assert lines_of(arm / "metrics.jsonl") == 6 and is_finished(arm)


def test_a_call_that_failed_at_once_does_not_stand_in_the_way(tmp_path):
    path = tmp_path / "table1" / "arms.json"
    reproduce.begin_or_check(path, {"lr": -1.0})
    reproduce.begin_or_check(path, {"lr": 5e-5})  # no arm has begun
    (tmp_path / "table1" / "pose-0").mkdir()
    (tmp_path / "table1" / "pose-0" / "args.json").write_text("{}")
    reproduce.begin_or_check(path, {"lr": 5e-5})
    with pytest.raises(InputError, match="lr was 5e-05, now 0.0001"):
        reproduce.begin_or_check(path, {"lr": 1e-4})
    path.write_text("{")
    with pytest.raises(InputError, match="arms.json is not readable"):
        reproduce.begin_or_check(path, {"lr": 5e-5})


@pytest.mark.parametrize("lr", ["nan", "-1"])
def test_a_learning_rate_that_train_refuses_is_refused_at_once(call, novel, lr):
    done = call("reproduce", "table1", "--model", "tiny", "--dev", "novel.txt", "--lr", lr)
    assert done.returncode == 2 and "--lr" in done.stderr and not done.stdout and not Path("out").exists()


@pytest.mark.parametrize("table, option", [("table3", "--trials"), ("table4", "--limit")])
def test_an_option_of_other_tables_is_named(call, novel, table, option):
    """The command goes on: here to --dev, where it ends."""
    done = call("reproduce", table, "--model", "tiny", "--dev", "absent.txt", option, 5)
    assert done.returncode == 2 and "absent.txt: no such file" in done.stderr
    assert f"warning: {option}: {table} does not look at it" in done.stderr


def test_texts_may_be_named_one_by_one(monkeypatch):
    """Of several --data and --dev all count, as in train.py and eval.py."""
    words = ["reproduce.py", "table1", "--data", "a", "--data", "b", "c", "--dev", "d", "--dev", "e"]
    monkeypatch.setattr(sys, "argv", words)
    args = reproduce.parse_arguments()
    assert (args.data, args.dev) == (["a", "b", "c"], ["d", "e"])


def test_dev_files_of_one_name_are_refused(call, novel):
    for folder in "ab":
        Path(folder).mkdir()
        Path(folder, "test.txt").write_text("text")
    done = call("reproduce", "table1", "--model", "tiny", "--dev", "a/test.txt", "b/test.txt")
    assert done.returncode == 2 and "rename one" in done.stderr and not Path("out").exists()


def test_dev_texts_that_are_too_short_are_refused(run, novel):
    Path("short.txt").write_text(TEXT * 20)
    done = run("reproduce.py", "table1", "--model", "tiny", "--dev", "short.txt")
    assert done.returncode == 2 and "--dev short.txt: its longest document has" in done.stderr
    assert "longest length is 1024" in done.stderr and not Path("out").exists()


@pytest.mark.parametrize("dev", [["novel.txt", "other.txt"], ["novel.txt"]], ids=" ".join)
def test_benchmarks_take_one_folder(call, novel, dev):
    Path("other.txt").write_text("text")
    done = call("reproduce", "table3", "--model", "tiny", "--dev", *dev)
    assert done.returncode == 2 and "folder" in done.stderr and "boolq" in done.stderr
    assert not Path("out").exists()


class CalledHere:
    """A call of a script, as subprocess.Popen makes it, but in this process: it starts in no time."""

    def __init__(self, command):
        _, script, *self.arguments = command
        self.module = Path(script).stem

    def wait(self):
        return call_main(self.module, *self.arguments)


@pytest.fixture
def table4(call, novel, monkeypatch):
    """The command of a small table, and what it did: its CompletedProcess and its folder."""
    options = ("--model", "tiny", "--data", "novel.txt", "--dev", "novel.txt")
    command = ("table4", *options, "--tokens", 4096, "--trials", 2, "--lr", 1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", CalledHere)
        done = call("reproduce", *command)
    assert done.returncode == 0, done.stderr
    return command, done, Path("out/reproduce/table4")


def test_a_table_from_its_command(call, table4, monkeypatch):
    command, done, folder = table4
    arguments = [json.loads((folder / f"{offset}-0" / "args.json").read_text()) for offset in pose.OFFSETS]
    for offset, given in zip(pose.OFFSETS, arguments):
        assert given == arguments[0] | {"offset": offset, "lr": 1e-3}

    def share_of_right_answers(result):
        return f"{100 * sum(trial['correct'] for trial in result['by_trial']) / 2:.0f}"

    def perplexity(result):
        return f"{result['ppl']:.2f}"

    for name, figure in (("passkey", share_of_right_answers), ("novel_tail", perplexity)):
        written = json.loads((folder / f"{name}.json").read_text())
        reports = [*written["compared"], written]
        arms = [f"{folder}/{offset}-0/model" for offset in pose.OFFSETS]
        assert [report["model"] for report in reports] == ["tiny", *arms]
        for arm, report in zip(("none", *pose.OFFSETS), reports):
            assert [result["length"] for result in report["results"]] == [128, 256, 512, 1024]
            assert f"| {arm} | " + " | ".join(map(figure, report["results"])) + " |" in done.stdout
    tables = (folder / "tables.md").read_text()
    assert done.stdout.endswith(tables + "\n")

    # A second run trains nothing and measures the same models: eval.py goes on from its --json.
    calls = []
    monkeypatch.setattr(reproduce, "run", lambda *words: calls.append(" ".join(words)))
    assert call("reproduce", *command).returncode == 0
    assert "python train.py" in done.stdout
    assert calls and not any(words.startswith("train.py") for words in calls)
    assert all(f"python {words}\n" in done.stdout for words in calls)
    assert (folder / "tables.md").read_text() == tables
