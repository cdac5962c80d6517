"""reproduce.py: fair arms, every one of them measured, and the table is what the JSON files say."""
import json

import pytest

import pose
import reproduce
import weights


@pytest.mark.parametrize("table", reproduce.TABLES)
def test_every_arm_sees_the_same_number_of_tokens(table):
    """In each step and in all, at full length too; and asks for what train.py has."""
    arms, lengths = reproduce.TABLES[table]
    seen = set()
    for options in arms.values():
        words = reproduce.training(options, 8192, reproduce.TOKENS)
        given = dict(zip(words[::2], words[1::2]))
        assert given.get("--method", "pose") in pose.METHODS and given.get("--offset", "uniform") in pose.OFFSETS
        assert given.get("--rope", "ntk") in weights.EXTENSIONS
        target = int(given["--target_len"])
        assert all(8192 * length <= target for length in lengths) or table == "table1" and target == 2 * 8192 or table == "table2"
        window = target if given.get("--method") == "full" else 8192
        seen.add((window * int(given["--batch_size"]), window * int(given["--batch_size"]) * int(given["--steps"])))
    assert seen == {(2**17, reproduce.TOKENS)}


def test_a_table_from_its_command(run, tmp_path):
    (tmp_path / "novel.txt").write_text("The cat sat on the mat, and the dog looked on. " * 400)
    command = ("reproduce.py", "table4", "--model", "tiny", "--data", "novel.txt", "--dev", "novel.txt", "--tokens", 4096, "--trials", 2)
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "results" / "table4"
    arguments = [json.loads((folder / f"{offset}-0" / "args.json").read_text()) for offset in pose.OFFSETS]
    for offset, given in zip(pose.OFFSETS, arguments):
        assert given == arguments[0] | {"offset": offset}
    figures = {"passkey": lambda r: f"{100 * sum(t['correct'] for t in r['by_trial']) / 2:.0f}", "novel_tail": lambda r: f"{r['ppl']:.2f}"}
    for name, figure in figures.items():
        written = json.loads((folder / f"{name}.json").read_text())
        reports = [*written["compared"], written]
        assert [r["model"] for r in reports] == ["tiny", *(f"results/table4/{offset}-0/model" for offset in pose.OFFSETS)]
        for arm, report in zip(("none", *pose.OFFSETS), reports):
            assert [r["length"] for r in report["results"]] == [128, 256, 512, 1024]
            assert f"| {arm} | " + " | ".join(map(figure, report["results"])) + " |" in done.stdout
    again = run(*command, cwd=tmp_path)
    assert "python train.py" in done.stdout and "python train.py" not in again.stdout
    rows = [[line for line in out.stdout.splitlines() if line.startswith("| ")] for out in (done, again)]
    assert rows[0] == rows[1]
