"""tasks/turns.py: sides in processes of their own take turns, and one that dies does not stop the others."""

import json
import multiprocessing
import os
import signal

from tasks.turns import take_turns


def serve(connection, name, log, lives):
    """Be a side that writes into `log` what it does. lives: {name: after how many answers it is killed}."""
    answers = 0

    def note(what):
        with open(log, "a") as f:
            f.write(json.dumps([name, what, os.getpid()]) + "\n")

    note("is warm")
    while answers != lives.get(name):
        connection.send({"step_seconds": answers} if answers else {})
        answers += 1
        note(connection.recv())
    os.kill(os.getpid(), signal.SIGKILL)


def measure(tmp_path, names, steps, **lives):
    """Return {side: its entry}, what the sides did in the order of time, and the set of process ids."""
    log = tmp_path / "log"
    entries = take_turns(serve, names, steps, log, lives)
    assert [entry["side"] for entry in entries] == names
    assert not multiprocessing.active_children()
    notes = [json.loads(line) for line in log.read_text().splitlines()]
    return dict(zip(names, entries)), [(name, what) for name, what, _ in notes], {pid for *_, pid in notes}


def test_turns_alternate(tmp_path):
    entries, did, pids = measure(tmp_path, ["ours", "theirs"], 5)
    assert did == [(name, what) for what in ("is warm", 3, 2) for name in ("ours", "theirs")]
    assert len(pids) == 2 and os.getpid() not in pids
    assert [entry["step_seconds"] for entry in entries.values()] == [2, 2]


def test_a_side_that_dies_is_reported(tmp_path):
    entries, did, _ = measure(tmp_path, ["ours", "early", "late"], 2, early=0, late=2)
    for name in ("early", "late"):
        assert entries[name]["error"] == "its process ended with code -9"
        assert entries[name]["step_seconds"] is None
    assert entries["ours"] == {"side": "ours", "step_seconds": 2}
    assert did[3:] == [("ours", 1), ("late", 1), ("ours", 1), ("late", 1)]


def test_one_step_is_one_turn_and_nothing_goes_on_without_the_first(tmp_path):
    _, did, _ = measure(tmp_path, ["ours"], 1)
    assert did == [("ours", "is warm"), ("ours", 1)]
    entries = take_turns(serve, ["ours", "theirs"], 4, tmp_path / "more", {"ours": 0})
    assert ["error" in entry for entry in entries] == [True]
    assert len((tmp_path / "more").read_text().splitlines()) == 1
