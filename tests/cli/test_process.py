"""How a command ends: an error that is no bug is one line, and a bug stays a trace."""

import errno
import io
import os
import sys

import pytest

from cli import process
from storage.errors import InputError


@pytest.mark.parametrize(
    "error, says",
    [
        (OSError(errno.EIO, "Input/output error"), ["Input/output error"]),
        (OSError(errno.EFBIG, "File too large", "out/x"), ["out/x", "File too large", "ulimit -f"]),
        (OSError(errno.ENOLCK, "No locks available", "lock"), ["lock", "No locks available"]),
        (OSError(errno.ENODEV, "No such device"), ["No such device"]),
        (OSError(errno.ESPIPE, "Illegal seek"), ["Illegal seek"]),
        (OSError("1000 requested and 10 written"), ["1000 requested and 10 written"]),  # numpy's
        (
            InputError("weight \x1b]0;title\x07 unexpected,\nsays \x9bm"),
            ["\\x1b]0;title\\x07", "\\nsays \\x9bm"],
        ),
    ],
    ids=str,
)
def test_an_error_of_the_system_is_one_line(capfd, error, says):
    def fail():
        raise error

    with pytest.raises(SystemExit) as end:
        process.run(fail)
    assert end.value.code == 2
    told = capfd.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and told[:-1].isprintable()
    assert all(word in told for word in says)


def test_a_process_that_meets_an_error_alone_reports_it(capfd, monkeypatch):
    """As the one that tokenises does, while others wait for it. It gives them time to report it first."""
    waited = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(process.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(process.time, "sleep", waited.append)

    def fail():
        raise InputError("texts.jsonl, line 7: not JSON; mend or remove the line")

    with pytest.raises(SystemExit) as end:
        process.run(fail)
    assert end.value.code == 2 and waited
    assert capfd.readouterr().err == "error: texts.jsonl, line 7: not JSON; mend or remove the line\n"


def test_an_unknown_error_stays_a_trace():
    with pytest.raises(ZeroDivisionError):
        process.run(lambda: 1 / 0)


def test_a_reader_that_goes_away(capfd, monkeypatch):
    """As in `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout, pytest.raises(SystemExit) as end:
        monkeypatch.setattr(sys, "stdout", stdout)
        process.run(lambda: print("a table"))
    assert end.value.code == 2
    assert capfd.readouterr().err == "error: standard output: Broken pipe; its reader has gone\n"


def test_a_terminal_without_every_character(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    process.run(lambda: print("50 ± 3 of \udcff"))
    assert written.getvalue() == b"50 \\xb1 3 of \\udcff\n"
