"""Files -> documents: which files a user means, and the texts and conversations that they hold.

The name of a file says how it is read, in any letter case. .gz or .zst may follow.

    .jsonl .ndjson     a document a line
    .json              an array of documents; without a bracket in front, as .jsonl
    .parquet           a document a row (with pyarrow)
    .txt .md, others   the whole file is one text

A document in JSON or Parquet is a string, or an object with one of
- the key that the user names, "text" unless told otherwise, with a string;
- "messages", a list of {"role", "content"}: a Conversation;
- "prompt" and "completion", two strings: a Completion.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import itertools
import os
import shlex
import sys
import sysconfig
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from storage.errors import InputError, naming, warn
from storage.files import cache_dir, write_file
from storage.processes import world_size
from storage.values import check_characters, parse_json

PACKED = {".gz": "gzip", ".zst": "zstd"}
FORMATS = (".jsonl", ".ndjson", ".json", ".parquet", ".txt", ".md")  # of the files that are read in a folder
STANDARD_INPUT = "-"
PARQUET_ROWS = 64  # that are in memory at once: a row may be a book


class Conversation(NamedTuple):
    """Messages of a chat, dicts with the strings "role" and "content". place: where they are, in words."""

    messages: list
    place: str


class Completion(NamedTuple):
    """A text and what a model should write behind it. place: where they are, in words."""

    prompt: str
    completion: str
    place: str


# ---------------------------------------------------------------- which files


def find_files(paths):
    """Return the files that the user named, and those of FORMATS in the folders among them.

    Without any path, return the source of the running Python's standard library. The path "-" stands for
    standard input. Raise InputError for a path that is not there, a folder without texts, or a device or
    pipe, since texts are read more than once.
    """
    if not paths:
        return standard_library()
    files = []
    for i, path in enumerate(map(Path, paths)):
        if str(path) == STANDARD_INPUT:
            files.append(saved_stdin())
        elif path.is_dir():
            files += texts_in(path)
        elif path.is_file():
            files.append(path)
        elif path.exists():
            raise InputError(f"{path}: a device or a pipe; save the texts to a file and name that, or use -")
        else:
            raise InputError(f"{path}: no such file or folder; {cut_name(paths[i:]) or 'check the path'}")
    return files


def cut_name(paths):
    """Return what to do if these paths are one that a shell has cut at its spaces, "" if they are not."""
    for end in range(2, len(paths) + 1):
        joined = " ".join(map(str, paths[:end]))
        if Path(joined).exists():
            return f"did you mean {shlex.quote(joined)}? A name with spaces needs quotes"
    return ""


def texts_in(folder):
    """Return the files of FORMATS in a folder and the folders inside, in the order of their paths.

    Linked folders are followed, and each is searched once, so that links that lead back end. Warn of what is
    passed over: hidden files and folders (editors keep copies there), .json that is no array and so describes
    rather than holds texts, other suffixes. Raise InputError if no file is left.
    """
    texts, passed_over, seen = [], Counter(), set()
    for parent, subfolders, names in os.walk(folder, followlinks=True, onerror=reraise):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        passed_over["hidden"] += sum(name.startswith(".") for name in (*subfolders, *names))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            if not path.is_file() or not unpacked_name(path).endswith(FORMATS):
                passed_over[path.suffix.lower() or "without a suffix"] += 1
            elif format_of(path) == ".json" and not is_array(path):
                passed_over[".json that is no array"] += 1
            else:
                texts.append(path)
    if not texts:
        raise InputError(f"{folder}: no {', '.join(FORMATS)} inside; name the files to read")
    counts = ", ".join(f"{count} {kind}" for kind, count in passed_over.most_common() if count)
    if counts:
        line = f"{folder}: {len(texts)} file(s) read; passed over: {counts} (name a file to read it)"
        warn(line, shared=True)
    return sorted(texts)


def reraise(error):
    """Raise the error of a folder that cannot be searched, which os.walk would pass over."""
    raise error


def standard_library():
    """Return the source files of the running Python's standard library, without its tests."""
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    files = []
    for folder, subfolders, names in os.walk(library):
        # It does not enter these: site-packages may hold many times as many files as the library.
        subfolders[:] = set(subfolders) - left_out
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


@functools.cache
def saved_stdin():
    """Return a file in the cache with what comes through standard input, which can be read only once.

    It is JSON Lines if its first line that is not blank is a JSON object, else one text. Its name comes from
    its content. Raise InputError where nothing is piped in, or several processes would share it.
    """
    if world_size() > 1:
        raise InputError("-: several processes cannot share standard input; save the texts, name their file")
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("-: standard input is no pipe; pipe texts into this command or name a file")
    content = sys.stdin.buffer.read()
    first_line = content.lstrip().split(b"\n", 1)[0]
    if not first_line:
        raise InputError("-: standard input is empty; pipe texts into this command or name a file")
    try:
        is_json_lines = isinstance(parse_json(first_line), dict)
    except ValueError:
        is_json_lines = False
    name = hashlib.sha256(content).hexdigest()[:24] + (".jsonl" if is_json_lines else ".txt")
    path = cache_dir() / "stdin" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content)
    return path


def with_saved_stdin(paths):
    """Return these paths with the file that holds standard input in the place of "-"."""
    return [str(saved_stdin()) if path == STANDARD_INPUT else path for path in paths]


def fingerprint(files):
    """Return 16 hexadecimal digits of the SHA-256 of what the files hold."""
    digest = hashlib.sha256()
    for path in files:
        with naming(path), open(path, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- their names and their packing


def unpacked_name(path):
    """Return the name of a file in lower case, without .gz or .zst."""
    name = path.name.lower()
    return name.removesuffix(packing_of(path))


def packing_of(path):
    """Return the suffix of PACKED that a file ends with, "" if none."""
    suffix = path.suffix.lower()
    return suffix if suffix in PACKED else ""


def format_of(path):
    """Return how a file is read, a suffix of FORMATS: ".txt" for every other name."""
    name = unpacked_name(path)
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), ".txt")


@contextlib.contextmanager
def unpacked(path):
    """Yield the content of a file as a binary stream. Raise InputError where its packing is damaged."""
    packing = packing_of(path)
    try:
        with naming(path), open(path, "rb") as file:
            if packing == ".gz":
                file = gzip.open(file)
            elif packing == ".zst":
                file = io.BufferedReader(ZstdStream(file, zstd_decompressor(path)), 2**20)
            with file:
                yield file
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise InputError(
            f"{path}: the {PACKED[packing]} file is truncated or damaged; copy it again"
        ) from None


def zstd_decompressor(path):
    """Return a function that makes decompressors. Raise InputError if no library is installed."""
    try:
        from compression.zstd import ZstdDecompressor  # Python 3.14 has it

        return ZstdDecompressor
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        raise InputError(f"{path}: needs zstandard, not installed here; pip install zstandard") from None
    return zstandard.ZstdDecompressor().decompressobj


class ZstdStream(io.RawIOBase):
    """The content of a .zst file. Unlike zstandard's reader it raises EOFError if the last frame is cut."""

    def __init__(self, file, make_decompressor):
        """Read from a binary stream. make_decompressor: see zstd_decompressor."""
        self.file, self.make_decompressor = file, make_decompressor
        self.frame = None  # the decompressor of the frame that is being read; a file may have several
        self.packed, self.ready = b"", memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.ready:
            self.packed = self.packed or self.file.read(2**17)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError
                return 0
            self.frame = self.frame or self.make_decompressor()
            try:
                self.ready = memoryview(self.frame.decompress(self.packed))
            except Exception:  # each library has an error of its own for damage
                raise EOFError from None
            self.packed = b""
            if self.frame.eof:
                self.packed, self.frame = self.frame.unused_data, None
        n = min(len(buffer), len(self.ready))
        buffer[:n], self.ready = self.ready[:n], self.ready[n:]
        return n


# ---------------------------------------------------------------- files -> documents


def read_documents(path, text_key="text"):
    """Yield the documents of a file: strings, Conversations and Completions.

    text_key: the key of the text in an object. Empty texts are passed over. Raise InputError, which names the
    place, for what is no document. That includes JSON in a file of another name, which would be learnt with
    all its keys and brackets.
    """
    if format_of(path) in (".txt", ".md"):
        documents = [read_text(path)]
    else:
        documents = read_values(path, functools.partial(as_document, text_key=text_key), "a document")
    for document in documents:
        if isinstance(document, Completion):
            is_blank = not (document.prompt + document.completion).strip()
        else:
            is_blank = isinstance(document, str) and not document.strip()
        if not is_blank:
            yield document


def read_texts(path):
    """Yield the texts of a file, as read_documents does. Raise InputError if it holds chats among them."""
    for document in read_documents(path):
        if not isinstance(document, str):
            raise InputError(f"{document.place}: a conversation, where only plain texts are read")
        yield document


def read_text(path):
    """Return the text in a file. Raise InputError if it holds something else."""
    try:
        with unpacked(path) as f:
            text = io.TextIOWrapper(f, encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; convert it or leave it out") from None
    if "\0" in text:
        raise InputError(f"{path}: NUL at character {text.index(chr(0))}, so no text; leave it out")
    if is_json(text):
        shape = 'an object with a string "text" a line, or a .json with an array of them'
        raise InputError(f"{path}: holds JSON; make it a .jsonl, {shape}")
    return text


def is_json(text):
    """Return whether a text, or its first line, is a JSON object or a list of more than numbers."""
    text = text.strip()
    if not text.startswith(("{", "[")):
        return False
    for candidate in (text.split("\n", 1)[0], text):
        try:
            value = parse_json(candidate.encode())
        except ValueError:
            continue
        if value and not all(isinstance(part, (int, float)) for part in value):
            return True
    return False


def as_document(value, place, text_key):
    """Return the string, Conversation or Completion in a value of JSON or Parquet.

    place: where the value is, in words. Raise ValueError, which says why, if there is none.
    """
    if isinstance(value, str):
        check_characters(value)
        return value
    if not isinstance(value, dict):
        raise ValueError(f'neither a string nor an object with "{text_key}"')
    present = {key: part for key, part in value.items() if part is not None}  # Parquet has null for absent
    if text_key in present:
        return string_in(present, text_key)
    if "messages" in present:
        return Conversation(checked_messages(present["messages"]), place)
    if "prompt" in present and "completion" in present:
        return Completion(string_in(present, "prompt"), string_in(present, "completion"), place)
    if text_key in value:
        raise ValueError(f'"{text_key}" is null')
    keys = ", ".join(present) if present else "nothing"
    expected = 'text_key names the one with a text; chats are "messages", or "prompt" and "completion"'
    raise ValueError(f'no "{text_key}" in it, but {keys}: {expected}')


def string_in(values, key):
    """Return the string under a key of a dict. Raise ValueError if it is something else."""
    if not isinstance(values.get(key), str):
        raise ValueError(f'"{key}" is not a string')
    check_characters(values[key])
    return values[key]


def checked_messages(messages):
    """Return the messages of a conversation, without what is null or an empty list in them.

    Raise ValueError unless they are dicts with strings as role and content. Lists and objects under other
    keys (tool calls) are refused too: they would reach the chat template unchecked.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" is not a list of objects with "role" and "content"')
    checked = []
    for number, message in enumerate(messages, 1):
        try:
            if not isinstance(message, dict):
                raise ValueError('not an object with "role" and "content"')
            message = {key: part for key, part in message.items() if part is not None and part != []}
            string_in(message, "role")
            string_in(message, "content")
            for key, part in message.items():
                if isinstance(part, (str, list, dict)):
                    string_in(message, key)
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
        checked.append(message)
    return checked


# ---------------------------------------------------------------- files -> values


def read_values(path, convert, expected):
    """Yield convert(value, place) for every value in a file of JSON or Parquet.

    place: where the value is, in words, such as "a.jsonl, line 3". expected: what it should be, in words.
    Raise InputError for a value that cannot be read, or that `convert` raises an error for.
    """
    if format_of(path) == ".parquet":
        items = parquet_rows(path)
    elif format_of(path) == ".json" and is_array(path):
        items = array_items(path)
    else:
        items = json_lines(path)
    for kind, number, read in items:
        place = f"{path}, {kind} {number}"
        try:
            converted = convert(read(), place)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f" ({error})" if isinstance(error, ValueError) else ""
            if isinstance(error, KeyError):
                reason = f" ({error} is missing)"
            raise InputError(f"{place}: not {expected}{reason}; mend or remove the {kind}") from None
        yield converted


# Each of these yields (kind, number, read): what stands for a value in the file, its number from 1, and a
# function that returns the value.


def json_lines(path):
    """Yield the lines of a file of JSON Lines. Blank ones are passed over."""
    with unpacked(path) as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                yield "line", number, functools.partial(parse_json, line)


def array_items(path):
    """Yield the items of a file that is a JSON array. Raise InputError if it is not."""
    with unpacked(path) as f:
        content = f.read()
    try:
        items = parse_json(content)
    except ValueError as error:
        raise InputError(f"{path}: not a JSON array ({error}); mend it") from None
    for number, item in enumerate(items, 1):
        yield "item", number, lambda item=item: item


def is_array(path):
    """Return whether the first character of a file, blanks aside, is the bracket of a JSON array."""
    with unpacked(path) as f:
        return f.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def parquet_rows(path):
    """Yield the rows of a Parquet file as dicts. Raise InputError if it is damaged, or without pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: needs pyarrow, which is not installed here; pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=PARQUET_ROWS)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, 1):
                yield "row", number, lambda row=row: row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: not readable as Parquet ({reason}); copy it again") from None
