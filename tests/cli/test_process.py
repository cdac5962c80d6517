"""How a command ends: an error that is no bug is one line, and a bug stays a trace."""

import errno
import io
import os
import subprocess
import sys

import pytest
from conftest import ROOT

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
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
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


@pytest.mark.parametrize("room", ["cli", "hf", "storage", "tasks"])
def test_an_installed_package_of_the_same_name_is_not_taken(tmp_path, room):
    """Which Python would do for a folder that is no package, wherever the other one is on its path."""
    (tmp_path / room).mkdir()
    (tmp_path / room / "__init__.py").write_text("raise ImportError('another package')")
    script = f"import {room}; print(*{room}.__path__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(ROOT / room), done.stderr


CLOSED = """import os, sys
sys.path[0] = {root!r}
from cli import process
os.close({number})
sys.{name} = None
def main():
    print("a result")
    print("a word \\udcff", file=sys.stderr)
    assert os.open("a file", os.O_CREAT | os.O_WRONLY) > 2  # else libraries would print into it
process.{run}(main)
"""


@pytest.mark.parametrize("run", ["run", "run_distributed"])
@pytest.mark.parametrize(
    "number, name, expected",
    [
        (0, "stdin", ("a result\n", "a word \\udcff\n")),
        (1, "stdout", ("", "a word \\udcff\n")),
        (2, "stderr", ("a result\n", "")),
    ],
)
def test_a_stream_that_was_closed(start, tmp_path, number, name, expected, run):
    """What goes there is lost, and goes nowhere else. That may be a name which is not UTF-8."""
    script = tmp_path / "script.py"
    script.write_text(CLOSED.format(root=str(ROOT), number=number, name=name, run=run))
    done = start(script, cwd=tmp_path).wait()
    assert (done.returncode, done.stdout, done.stderr) == (0, *expected)


def test_commands_start_without_what_few_need():
    """The compiler takes more than a second to import, and each command would, even for --help."""
    code = (
        "import sys, train, eval, sample, bench, reproduce; from hf import weights; "
        "print([name for name in ('torch._dynamo', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


REFUSING = """
from cli import process
from storage.errors import InputError


def refuse():
    raise InputError("--model nope: no such folder")


process.run(refuse)
"""


def test_the_report_of_torchrun_ends_with_the_error(tmp_path):
    """torchrun prints a long trace of its own after a process's line, which nobody would look for above."""
    script = tmp_path / "refusing.py"
    script.write_text(REFUSING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    # torchrun leaves its logs in TMPDIR.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    *_, cause, line = done.stderr.splitlines()
    assert done.returncode == 1 and set(line) == {"="}
    assert cause.endswith("error: --model nope: no such folder")
