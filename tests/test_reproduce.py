"""reproduce.py: fair arms, every one of them measured, and the table is what the JSON files say."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pose
import reproduce
import weights
from errors import UserError


def options_given(options):
    """{option: value} of an arm's call of train.py, for a window of 8,192."""
    words = reproduce.training(options, 8192, reproduce.TOKENS)
    return dict(zip(words[::2], words[1::2]))


@pytest.mark.parametrize("table", reproduce.TABLES)
def test_every_arm_sees_the_same_number_of_tokens(table):
    """In each step and in all, at full length too; and asks for what train.py has."""
    arms, lengths = reproduce.TABLES[table]
    seen, targets = set(), set()
    for given in map(options_given, arms.values()):
        assert given.get("--method", "pose") in pose.METHODS and given.get("--offset", "uniform") in pose.OFFSETS
        assert given.get("--rope", "ntk") in weights.EXTENSIONS
        target = int(given["--target_len"])
        targets.add(target)
        window = target if given.get("--method") == "full" else 8192
        seen.add((window * int(given["--batch_size"]), window * int(given["--batch_size"]) * int(given["--steps"])))
    assert seen == {(2**17, reproduce.TOKENS)}
    assert not lengths or max(targets) == 8192 * lengths[-1]  # measured up to the longest window, and no further


@pytest.mark.parametrize("table", ["figure4", "table2"])
def test_interpolations_are_compared_at_the_same_factor(table):
    """The ratio of the windows, not what a model's recipe adds to one of them."""
    settings = {}
    for given in map(options_given, reproduce.TABLES[table][0].values()):
        assert float(given["--factor"]) == int(given["--target_len"]) / 8192
        settings.setdefault(given["--target_len"], []).append(given)
    for arms in settings.values():
        modes = [given.pop("--rope") for given in arms]
        assert len(set(modes)) == len(arms) > 1 and all(given == arms[0] for given in arms)


def test_a_half_trained_arm_is_not_an_arm(tmp_path, monkeypatch):
    """Interrupted by SIGTERM, train.py leaves a model and exits with 0. The next call goes on; with other settings it is refused."""
    (tmp_path / "novel.txt").write_text("The cat sat on the mat, and the dog looked on. " * 400)
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, str(Path(reproduce.__file__)), "table4", "--model", "tiny", "--data", "novel.txt", "--trials", "1"]
    command += ["--dev", "novel.txt", "--tokens", str(12 * 16 * 256)]
    arm = Path("out/reproduce/table4/uniform-0")
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as called:
        while not (arm / "metrics.jsonl").exists() or len((arm / "metrics.jsonl").read_text().splitlines()) < 2:
            assert called.poll() is None
            time.sleep(0.02)
        os.killpg(called.pid, signal.SIGTERM)
        called.communicate(timeout=60)
    until = time.time() + 60
    while not (arm / "model" / "config.json").exists() and time.time() < until:
        time.sleep(0.1)
    assert 2 <= len((arm / "metrics.jsonl").read_text().splitlines()) < 12
    other = subprocess.run([*command[:-1], "4096"], capture_output=True, text=True)
    assert other.returncode == 2 and "tokens was 49152, now 4096" in other.stderr
    calls = []
    monkeypatch.setattr(reproduce, "run", lambda *words: calls.append(words))
    monkeypatch.setattr(reproduce, "markdown", lambda *_: "")
    monkeypatch.setattr(sys, "argv", command[1:])
    reproduce.main()
    trained = [words for words in calls if words[0] == "train.py"]
    assert ["--resume" in words for words in trained] == [True, False, False]
    assert subprocess.run([sys.executable, Path(reproduce.__file__).parent / "train.py", *map(str, trained[0][1:])]).returncode == 0
    assert len((arm / "metrics.jsonl").read_text().splitlines()) == 12 and reproduce.finished(arm, 12)


def test_a_call_that_failed_at_once_does_not_stand_in_the_way(tmp_path):
    path = tmp_path / "table1" / "arms.json"
    reproduce.check_record(path, {"lr": -1.0})
    reproduce.check_record(path, {"lr": 5e-5})  # no arm has begun
    (tmp_path / "table1" / "pose-0").mkdir()
    (tmp_path / "table1" / "pose-0" / "args.json").write_text("{}")
    reproduce.check_record(path, {"lr": 5e-5})
    with pytest.raises(UserError, match="lr was 5e-05, now 0.0001"):
        reproduce.check_record(path, {"lr": 1e-4})
    path.write_text("{")
    with pytest.raises(UserError, match="arms.json is not readable"):
        reproduce.check_record(path, {"lr": 5e-5})


def test_dev_files_of_one_name_are_refused(run, tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.txt").write_text("text")
    done = run("reproduce.py", "table1", "--model", "tiny", "--dev", "a/test.txt", "b/test.txt", cwd=tmp_path)
    assert done.returncode == 2 and "rename one" in done.stderr and not (tmp_path / "out").exists()


def test_dev_texts_that_are_too_short_are_refused(run, tmp_path):
    (tmp_path / "short.txt").write_text("The cat sat on the mat. " * 100)
    done = run("reproduce.py", "table1", "--model", "tiny", "--dev", "short.txt", cwd=tmp_path)
    assert done.returncode == 2 and "--dev short.txt: its longest document has" in done.stderr and "longest length is 1024" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_table_from_its_command(run, tmp_path, monkeypatch):
    (tmp_path / "novel.txt").write_text("The cat sat on the mat, and the dog looked on. " * 400)
    command = ("reproduce.py", "table4", "--model", "tiny", "--data", "novel.txt", "--dev", "novel.txt", "--tokens", 4096, "--trials", 2)
    command += "--lr", 1e-3
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "reproduce" / "table4"
    arguments = [json.loads((folder / f"{offset}-0" / "args.json").read_text()) for offset in pose.OFFSETS]
    for offset, given in zip(pose.OFFSETS, arguments):
        assert given == arguments[0] | {"offset": offset, "lr": 1e-3}
    figures = {"passkey": lambda r: f"{100 * sum(t['correct'] for t in r['by_trial']) / 2:.0f}", "novel_tail": lambda r: f"{r['ppl']:.2f}"}
    for name, figure in figures.items():
        written = json.loads((folder / f"{name}.json").read_text())
        reports = [*written["compared"], written]
        assert [r["model"] for r in reports] == ["tiny", *(f"out/reproduce/table4/{offset}-0/model" for offset in pose.OFFSETS)]
        for arm, report in zip(("none", *pose.OFFSETS), reports):
            assert [r["length"] for r in report["results"]] == [128, 256, 512, 1024]
            assert f"| {arm} | " + " | ".join(map(figure, report["results"])) + " |" in done.stdout
    tables = (folder / "tables.md").read_text()
    assert done.stdout.endswith(tables + "\n")
    calls = []  # of a second run, which trains nothing and measures the same models: eval.py goes on from its --json
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "run", lambda *words: calls.append(" ".join(map(str, words))))
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    reproduce.main()
    assert "python train.py" in done.stdout and calls and not any(call.startswith("train.py") for call in calls)
    assert all(f"python {call}\n" in done.stdout for call in calls) and (folder / "tables.md").read_text() == tables
