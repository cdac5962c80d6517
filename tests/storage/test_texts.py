"""texts.py: which files are read, what is in them, what is refused and in which words."""

import argparse
import gzip
import io
import json
import os
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from storage import texts
from storage.errors import InputError
from storage.texts import Completion, Conversation


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(*documents):
    """Return JSON Lines of these texts, or objects as they are."""
    objects = [{"text": document} if isinstance(document, str) else document for document in documents]
    return "".join(json.dumps(each) + "\n" for each in objects)


def texts_of(*paths, **how):
    return [text for file in texts.find_files(paths) for text in texts.read_documents(file, **how)]


# ---------------------------------------------------------------- readers


def test_txt_is_one_document(tmp_path):
    assert texts_of(write(tmp_path / "a.txt", "one\n\ntwo é 字\n")) == ["one\n\ntwo é 字\n"]


def test_jsonl_is_a_document_a_line(tmp_path):
    """Blank lines, blank texts and other keys are passed over.

    A line separator inside a text does not end it.
    """
    lines = [
        '{"text": "first"}',
        "",
        '{"id": 3, "text": "sec\\nond", "meta": {"text": 1}}',
        '{"text": " \\n"}',
        '{"text": "a\u2028b"}',
    ]
    plain = write(tmp_path / "a.jsonl", "\n".join(lines))
    packed = write(tmp_path / "b.jsonl.gz", gzip.compress("\r\n".join(lines).encode()))
    assert texts_of(plain) == texts_of(packed) == ["first", "sec\nond", "a\u2028b"]


def test_folder_is_searched_in_order_and_other_files_are_left_alone(tmp_path):
    write(tmp_path / "d" / "b.txt", "b")
    write(tmp_path / "d" / "a" / "deep.jsonl", jsonl("deep 1", "deep 2"))
    write(tmp_path / "d" / "c.jsonl.gz", gzip.compress(jsonl("packed").encode()))
    write(tmp_path / "d" / "picture.png", b"\xff\xfe")
    write(tmp_path / "d" / "e.py", "not asked for")
    assert texts_of(tmp_path / "d") == ["deep 1", "deep 2", "b", "packed"]
    named = str(tmp_path / "d" / "b.txt"), tmp_path / "d" / "a"
    assert texts_of(*named) == ["b", "deep 1", "deep 2"]  # in the order of their names, str or Path


def test_a_name_that_is_not_utf_8(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("The cat.")
    assert texts_of(tmp_path) == ["The cat."]


def test_a_named_file_of_another_suffix_is_read_as_text(tmp_path):
    source = "def f():\n    return 1\n"
    files = write(tmp_path / "code.py", source), write(tmp_path / "README", "read me")
    assert texts_of(*files) == [source, "read me"]


def test_structured_files_by_every_name(tmp_path):
    """Suffixes count in upper case too. In a folder, a .json that is no array says something about texts."""
    for name in ("a.JSONL", "b.ndjson", "c.NDJSON", "d.json"):
        assert texts_of(write(tmp_path / name, jsonl("one", "two"))) == ["one", "two"]
    assert texts_of(write(tmp_path / "e.Jsonl.GZ", gzip.compress(jsonl("packed").encode()))) == ["packed"]
    assert texts_of(write(tmp_path / "f.txt.gz", gzip.compress(b"\xef\xbb\xbfpacked\r\n"))) == ["packed\n"]
    write(tmp_path / "d" / "dataset_infos.json", '{"rows": 1}')
    write(tmp_path / "d" / "a.TXT", "text")
    write(tmp_path / "d" / "b.NDJSON", jsonl("line"))
    write(tmp_path / "d" / "c.MD", "# Title")
    write(tmp_path / "d" / "d.Json", '[{"text": "item"}]')
    assert texts_of(tmp_path / "d") == ["text", "line", "# Title", "item"]


ARRAYS = ['["one", {"text": "two", "id": 7}, " "]', '\ufeff\n [\n "one",\n\n {\n"text": "two"}\n]\n']


@pytest.mark.parametrize("array", ARRAYS)
def test_an_array_of_objects_or_of_strings(tmp_path, array):
    assert texts_of(write(tmp_path / "a.json", array)) == ["one", "two"]
    assert texts_of(write(tmp_path / "a.json.gz", gzip.compress(array.encode()))) == ["one", "two"]


@pytest.mark.parametrize(
    "array, says",
    [
        (
            '["fine", {"text": 5}]',
            'a.json, item 2: not a document ("text" is not a string); mend or remove the',
        ),
        (
            '[{"text": "fine"}, 17]',
            'a.json, item 2: not a document (neither a string nor an object with "text")',
        ),
        ('["a", "b"', "a.json: not a JSON array (not JSON at character 9); mend it"),
        ('["a"]\n["b"]', "a.json: not a JSON array (not JSON at character 6)"),
        ('["half a character: \\ud83d"]', "a.json, item 1: not a document (half a character"),
    ],
)
def test_what_is_wrong_in_an_array_is_said_by_item(tmp_path, array, says):
    with pytest.raises(InputError) as error:
        texts_of(write(tmp_path / "a.json", array))
    assert str(error.value).startswith(f"{tmp_path}/{says}") and "line" not in str(error.value)


def test_the_key_of_the_text(tmp_path):
    lines = write(tmp_path / "a.jsonl", '{"content": "one", "id": 1, "url": null}\n')
    assert texts_of(lines, text_key="content") == ["one"]
    with pytest.raises(InputError) as error:
        texts_of(lines)
    said = (
        'not a document (no "text" in it, but content, id: text_key names the one with a text; chats are '
        '"messages", or "prompt" and "completion")'
    )
    assert str(error.value) == f"{lines}, line 1: {said}; mend or remove the line"


ASKED, SAID = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}


def test_conversations_and_completions(tmp_path):
    """A text counts more than messages, and these more than a prompt; a null is as absent."""
    lines = [
        {
            "messages": [ASKED | {"name": "Ada", "tool_calls": None, "images": []}, SAID],
            "prompt": "p",
            "completion": "c",
        },
        {"prompt": "p ", "completion": "c", "text": None},
        {"text": "t", "messages": [ASKED, SAID]},
        {"prompt": " ", "completion": ""},
    ]
    path = write(tmp_path / "a.jsonl", jsonl(*lines, "plain"))
    assert texts_of(path) == [
        Conversation([ASKED | {"name": "Ada"}, SAID], f"{path}, line 1"),
        Completion("p ", "c", f"{path}, line 2"),
        "t",
        "plain",
    ]
    with pytest.raises(InputError, match="line 1: a conversation, where only plain texts are read"):
        list(texts.read_texts(path))


@pytest.mark.parametrize(
    "document, says",
    [
        ({"messages": []}, '"messages" is not a list of objects'),
        ({"messages": "Hi"}, '"messages" is not a list of objects'),
        ({"messages": [ASKED, "Hi"]}, 'message 2: not an object with "role" and "content"'),
        ({"messages": [{"content": "Hi"}]}, 'message 1: "role" is not a string'),
        (
            {"messages": [ASKED, {"role": "assistant", "content": None}]},
            'message 2: "content" is not a string',
        ),
        ({"messages": [SAID | {"tool_calls": [1]}]}, 'message 1: "tool_calls" is not a string'),
        ({"messages": [SAID | {"content": "\ud83d"}]}, "message 1: half a character"),
        ({"prompt": "p", "completion": ["c"]}, '"completion" is not a string'),
        ({"prompt": [ASKED], "completion": "c"}, '"prompt" is not a string'),
        ({"prompt": "p"}, 'no "text" in it, but prompt'),
        ({}, 'no "text" in it, but nothing'),
    ],
)
def test_broken_conversations(tmp_path, document, says):
    with pytest.raises(InputError) as error:
        texts_of(write(tmp_path / "a.jsonl", "\n" + jsonl(document)))
    assert f"a.jsonl, line 2: not a document ({says}" in str(error.value)


def test_parquet(tmp_path):
    rows = [{"text": f"Text {i}", "id": i, "messages": None} for i in range(150)]
    rows.append({"text": None, "id": 7, "messages": [ASKED, SAID]})
    path = tmp_path / "a.PARQUET"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
    *plain, conversation = texts_of(tmp_path)
    assert plain == [row["text"] for row in rows[:-1]]
    assert conversation == Conversation([ASKED, SAID], f"{path}, row 151")
    with pytest.raises(InputError, match='row 1: not a document .no "content" in it, but text, id: '):
        texts_of(path, text_key="content")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="a.PARQUET: not readable as Parquet"):
        texts_of(path)


ZST_LINES = jsonl(*(f"document {i} {i**5}" for i in range(8_000))).encode()  # larger than the buffers


def test_zst(tmp_path):
    """Of one frame or several. What is cut, or no .zst at all, is refused: zstandard reads on in silence."""
    zstandard = pytest.importorskip("zstandard")
    pack = zstandard.ZstdCompressor().compress
    packed = pack(ZST_LINES)
    documents = [json.loads(line)["text"] for line in ZST_LINES.splitlines()]
    assert texts_of(write(tmp_path / "a.jsonl.zst", packed)) == documents
    assert texts_of(write(tmp_path / "a.ndjson.ZST", pack(b"") + packed)) == documents
    assert texts_of(write(tmp_path / "b.jsonl.zst", packed + packed)) == documents + documents
    assert texts_of(write(tmp_path / "b.txt.zst", pack(b"a text"))) == ["a text"]
    streamed = zstandard.ZstdCompressor().compressobj()  # without the size of its content
    assert (
        texts_of(write(tmp_path / "c.jsonl.zst", streamed.compress(ZST_LINES) + streamed.flush()))
        == documents
    )
    for broken in (packed[: len(packed) // 2], packed[:-1], ZST_LINES, packed + b"more", b"\0" + packed):
        with pytest.raises(
            InputError, match="d.jsonl.zst: the zstd file is truncated or damaged; copy it again"
        ):
            texts_of(write(tmp_path / "d.jsonl.zst", broken))


@pytest.mark.parametrize("name, package", [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    with pytest.raises(InputError, match=f"{name}: needs {package}.*; pip install {package}"):
        texts_of(write(tmp_path / name, b""))


JSON_AS_PROSE = [
    jsonl("one", "two"),
    "\n" + jsonl("one"),
    '[{"text": "one"}, {"text": "two"}]',
    '[\n  {"text": "one"}\n]\n',
    '{\n  "text": "one"\n}',
    '["one", "two"]',
]
PROSE = [
    "[1] A footnote.\n",
    "{curly} braces",
    "{\n  return 1;\n}\n",
    "[1, 2]\n",
    "{}\n",
    "[TOC]\n# Title\n",
    "\\{x\\}",
]


@pytest.mark.parametrize("text", JSON_AS_PROSE)
@pytest.mark.parametrize("name", ["a.txt", "11", "a.text"])
def test_json_is_not_read_as_prose(tmp_path, name, text):
    """Whatever its name is: /dev/fd/11 says nothing."""
    with pytest.raises(InputError, match=f"{name}: holds JSON; make it a .jsonl"):
        texts_of(write(tmp_path / name, text))


@pytest.mark.parametrize("text", PROSE)
def test_prose_that_begins_like_json(tmp_path, text):
    assert texts_of(write(tmp_path / "a.txt", text)) == [text]


def test_what_a_folders_search_passes_over_is_said(tmp_path, capfd):
    """Hidden copies would count texts twice."""
    folder = tmp_path / "d"
    write(folder / "a.txt", "a")
    write(folder / ".ipynb_checkpoints" / "a.txt", "copy")
    write(folder / "._a.txt", "copy")
    write(folder / "notes.py", "notes")
    write(folder / "info.json", '{"text": "an object"}')
    os.mkfifo(folder / "pipe.txt")
    assert texts_of(folder) == ["a"]
    said = capfd.readouterr().err
    assert said.startswith(f"warning: {folder}: 1 file(s) read; passed over: 2 hidden, 1 ")
    assert "1 .py" in said and "1 .txt" in said and "1 .json that is no array" in said
    assert said.count("\n") == 1
    assert texts_of(folder, folder / "notes.py") == ["a", "notes"]
    assert capfd.readouterr().err == ""  # once


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    """Two links to one folder, and one back to where the search began, read nothing twice."""
    folder = tmp_path / "d"
    write(folder / "a.txt", "a")
    write(tmp_path / "elsewhere" / "b.txt", "b")
    write(tmp_path / "elsewhere" / "deep" / "c.txt", "c")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "same").symlink_to(tmp_path / "elsewhere")
    (folder / "z.txt").symlink_to(tmp_path / "elsewhere" / "b.txt")  # somebody wants it here too
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (tmp_path / "elsewhere" / "nowhere").symlink_to(tmp_path / "absent")
    assert texts_of(folder) == ["a", "b", "c", "b"]


def test_a_pipe_or_a_device_is_refused(tmp_path):
    """It would be waited for, or never end."""
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", "/dev/zero", "/dev/null"):
        with pytest.raises(InputError, match="a device or a pipe; save the texts to a file"):
            texts_of(path)
    read, written = os.pipe()
    with pytest.raises(InputError, match=f"/dev/fd/{read}: a device or a pipe"):
        texts_of(f"/dev/fd/{read}")
    os.close(read)
    os.close(written)


def test_without_paths_the_standard_library():
    files = texts.find_files([])
    library = Path(argparse.__file__).parent.resolve()
    # Not file.resolve(): Debian's sitecustomize.py is a link that leads out of the library.
    inside = {file.parent.resolve().relative_to(library) / file.name for file in files}
    assert {Path("argparse.py"), Path("gzip.py"), Path("json/__init__.py")} <= inside
    parts = {part for file in inside for part in file.parts}
    assert not {"site-packages", "dist-packages", "test", "tests"} & parts
    assert all(file.suffix == ".py" for file in files)
    # All are read, so none of the files is refused.
    assert Path(argparse.__file__).read_text(encoding="utf-8") in texts_of()


PACKED = gzip.compress(jsonl(*(f"document {i} {i**5}" for i in range(2000))).encode())
GOOD = '{"text": "good"}\n\n'  # a bad line after it is number 3


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("latin.txt", "caf\u00e9".encode("latin-1"), ["not UTF-8 at byte 3"]),
        ("a.bin", b"\x80", ["not UTF-8 at byte 0"]),
        ("a.jsonl", GOOD + "{'text': 'single quotes'}\n", ["line 3"]),
        ("a.jsonl", GOOD + '{"text": "cut sho', ["line 3"]),
        ("a.jsonl", GOOD + '{"txt": "no text"}', ["line 3", '"text"']),
        ("a.jsonl", GOOD + '{"text": 5}', ["line 3", '"text"']),
        ("a.jsonl", GOOD + '{"text": null}', ["line 3", '"text" is null']),
        ("a.jsonl", GOOD + '{"text": ["a"]}', ["line 3", '"text"']),
        ("a.jsonl", GOOD + '["text"]', ["line 3"]),
        ("a.jsonl", GOOD + "17", ["line 3"]),
        ("a.jsonl", GOOD.encode() + '{"text": "caf\u00e9"}'.encode("latin-1"), ["line 3", "UTF-8"]),
        ("a.jsonl.gz", gzip.compress((GOOD + '{"text": 5}').encode()), ["line 3", '"text"']),
        ("a.jsonl", GOOD + '{"text": "a", "id": ' + "9" * 5000 + "}", ["line 3", "a number of 5000 digits"]),
        ("a.jsonl", GOOD + "[" * 10**5, ["line 3", "nested too deeply"]),
        ("a.jsonl", GOOD + '{"text": "\\ud83d"}', ["line 3", "half a character"]),
        ("a.json", '{\n "text": "over several lines"\n}', ["a.json, line 1"]),
        ("a.txt", "a text\0with NUL", ["NUL at character 6"]),
        ("utf16.txt", "a text".encode("utf-16-le"), ["NUL at character 1"]),
        ("cut.jsonl.gz", PACKED[: len(PACKED) // 2], ["truncated"]),
        ("cut.jsonl.gz", PACKED[:-8], ["truncated"]),
        ("flipped.jsonl.gz", PACKED[:-8] + bytes(8), ["damaged"]),  # the checksum
        ("flipped.jsonl.gz", PACKED[:200] + bytes(50) + PACKED[250:], ["damaged"]),
        ("plain.jsonl.gz", jsonl("not packed at all"), ["gzip"]),
    ],
)
def test_bad_input_is_named(tmp_path, name, content, says):
    """One line names the file, and the line of a .jsonl."""
    with pytest.raises(InputError) as error:
        texts_of(write(tmp_path / name, content))
    message = str(error.value)
    assert all(part in message for part in [str(tmp_path / name), *says]) and "\n" not in message


BLANK = [
    ("a.txt", ""),
    ("a.txt", " \n\t\n"),
    ("a.jsonl", ""),
    ("a.jsonl", jsonl("", "  ", "\n") + "\n\n"),
    ("a.jsonl.gz", gzip.compress(jsonl("").encode())),
    ("a.json", "[]"),
    ("a.json", '[" ", ""]'),
]


@pytest.mark.parametrize("name, content", BLANK)
def test_blank_texts_are_passed_over(tmp_path, name, content):
    assert texts_of(write(tmp_path / name, content)) == []


@pytest.mark.parametrize("missing", ["nowhere", "nowhere.txt", "nowhere/deeper.jsonl"])
def test_missing_path(tmp_path, missing):
    with pytest.raises(InputError, match=f"{tmp_path / missing}: no such file or folder; check the path"):
        texts_of(write(tmp_path / "fine.txt", "text"), tmp_path / missing)


def test_a_name_that_a_shell_has_cut_at_its_spaces(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "my own texts" / "a.txt", "a")
    with pytest.raises(
        InputError, match="my: no such file .*; did you mean 'my own texts'. A name with spaces"
    ):
        texts_of("my", "own", "texts", "more.txt")
    with pytest.raises(InputError, match="my: no such file or folder; check the path"):
        texts_of("my", "own", "text")


def test_folder_without_texts(tmp_path):
    write(tmp_path / "empty" / "picture.png", b"\xff")
    with pytest.raises(InputError, match=f"{tmp_path / 'empty'}: no .jsonl, .ndjson, .json"):
        texts_of(tmp_path / "empty")


# ---------------------------------------------------------------- standard input


@pytest.fixture
def pipe_in(monkeypatch, tmp_path):
    """pipe_in(content): what is on standard input from then on."""
    monkeypatch.setenv("POSE_CACHE", str(tmp_path / "cache"))

    def start(content):
        texts.saved_stdin.cache_clear()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    yield start
    texts.saved_stdin.cache_clear()


@pytest.mark.parametrize(
    "content, expected",
    [
        (jsonl("one", "two").encode(), ["one", "two"]),
        (b"\n \n" + jsonl("one").encode(), ["one"]),
        (b"A text.\n\nMore of it.\n", ["A text.\n\nMore of it.\n"]),
        (b"{curly} braces\n", ["{curly} braces\n"]),
    ],
)
def test_standard_input(pipe_in, content, expected):
    """It is read once, and what it held can be read again later, as a resumed run does."""
    pipe_in(content)
    assert texts_of("-") == texts_of("-") == expected
    (saved,) = texts.with_saved_stdin(["-"])
    assert texts.with_saved_stdin(["a.txt", "-"]) == ["a.txt", saved]
    pipe_in(b"")
    assert texts_of(saved) == expected and Path(saved).read_bytes() == content


def test_standard_input_that_cannot_be_read(pipe_in, monkeypatch, as_first_of):
    pipe_in(b'["an", "array"]')
    with pytest.raises(InputError, match="holds JSON"):
        texts_of("-")
    pipe_in(b" \n")
    with pytest.raises(InputError, match="-: standard input is empty"):
        texts_of("-")
    pipe_in(b"text")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    with pytest.raises(InputError, match="-: standard input is no pipe"):
        texts_of("-")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="-: standard input is no pipe"):
        texts_of("-")
    pipe_in(b"text")
    as_first_of(2)
    with pytest.raises(InputError, match="-: several processes cannot share standard input"):
        texts_of("-")
