"""Files are written whole or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest

from storage.files import write_json


def disk_full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_json_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"first": 1})
    monkeypatch.setattr(Path, "replace", disk_full)
    with pytest.raises(OSError):
        write_json(path, {"second": 2})
    assert json.loads(path.read_text()) == {"first": 1} and not list(tmp_path.glob("*.part"))
