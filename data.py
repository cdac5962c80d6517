"""Documents -> token files -> batches. A batch is a pure function of (seed, step).

Texts are tokenised once into memory-mapped files in the cache folder, and reused while neither they nor the
tokenizer change. A training example depends on (seed, step, its index in the global batch) alone. So
resuming is exact, and the loss curve does not depend on how many processes share the work.
"""

import errno
import gzip
import hashlib
import math
import os
import shutil
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import pose
from storage.errors import InputError, naming, warn
from storage.files import new_folder, only_one_process
from storage.values import check_characters, parse_json

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")  # of the files that are read in a folder
JSON_LINES = (".jsonl", ".ndjson", ".json")  # each line is a document; .gz may follow
SPAN_IN_WINDOWS = 5  # the text of an example spans at most train_len times this, as in the official code
CACHE_LAYOUT = b"3"  # version of the folders in the cache
DOCUMENTS_AT_ONCE = 32  # documents that are tokenised together, by several threads


# ---------------------------------------------------------------- files -> documents


def find_files(paths):
    """Return the files that the user named, and those of SUFFIXES in the folders among them.

    Without any path, return the source of the running Python's standard library. Raise InputError for a path
    that is not there, a folder without texts, or a device or pipe, since texts are read more than once.
    """
    if not paths:
        return standard_library()
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            files += texts_in(path)
        elif path.is_file():
            files.append(path)
        elif path.exists():
            raise InputError(f"{path}: a device or a pipe; save the texts to a file and name that")
        else:
            raise InputError(f"{path}: no such file or folder; check the path")
    return files


def texts_in(folder):
    """Return the files of SUFFIXES in a folder and the folders inside, in the order of their paths.

    Warn of what is passed over: hidden files (editors keep copies there), linked folders (they may lead
    back), files of other suffixes. Raise InputError if no file is left.
    """
    texts, passed_over = [], Counter()
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_dir():
            passed_over["linked folder"] += path.is_symlink()
        elif is_hidden:
            passed_over["hidden"] += 1
        elif path.is_file() and path.name.lower().endswith(SUFFIXES):
            texts.append(path)
        else:
            passed_over[path.suffix.lower() or "without a suffix"] += 1
    if not texts:
        raise InputError(f"{folder}: no {', '.join(SUFFIXES)} inside; name the files to read")
    counts = ", ".join(f"{count} {kind}" for kind, count in passed_over.most_common() if count)
    if counts and os.environ.get("RANK", "0") == "0":
        warn(f"{folder}: {len(texts)} file(s) read; passed over: {counts} (name a file to read it)")
    return texts


def standard_library():
    """Return the source files of the running Python's standard library, without its tests."""
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    return sorted(p for p in library.rglob("*.py") if not left_out & set(p.relative_to(library).parts))


def fingerprint(files):
    """Return 16 hexadecimal digits of the SHA-256 of what the files hold."""
    digest = hashlib.sha256()
    for path in files:
        with naming(path), open(path, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:16]


def is_json_lines(path):
    """Return whether a file is JSON Lines by its name, so that each line is a document."""
    return path.name.lower().removesuffix(".gz").endswith(JSON_LINES)


def read_documents(path):
    """Yield the texts of a file: one for each line of JSON Lines, a single one for any other file.

    Empty texts are passed over. Raise InputError for what is no text. That includes JSON under another name,
    which would be learnt with all its keys and brackets.
    """
    if is_json_lines(path):
        for text in read_json_lines(path, document_text, 'a JSON object with a string "text" in UTF-8'):
            if text.strip():
                yield text
        return
    try:
        with naming(path):
            text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; convert it or leave it out") from None
    if "\0" in text:
        raise InputError(f"{path}: NUL at character {text.index(chr(0))}, so no text; leave it out")
    if is_json(text):
        raise InputError(f'{path}: holds JSON; make it a .jsonl, an object with a string "text" a line')
    if text.strip():
        yield text


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


def document_text(line):
    """Return the text in a line's JSON object. Raise TypeError, KeyError or ValueError if there is none."""
    text = line["text"]
    if not isinstance(text, str):
        raise TypeError("text is not a string")
    check_characters(text)
    return text


def read_json_lines(path, convert, expected):
    """Yield convert(value) for every JSON value in a file of JSON Lines, which is gzipped if it ends in .gz.

    expected: what a line should be, in words. Blank lines are passed over. Raise InputError with the number
    of a line that is not JSON, or that `convert` raises an error for.
    """
    number = 0
    open_file = gzip.open if path.suffix.lower() == ".gz" else open
    with naming(path), open_file(path, "rb") as f:
        try:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield convert(parse_json(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = ""
            if isinstance(error, KeyError):
                reason = f" ({error} is missing)"
            elif isinstance(error, ValueError):
                reason = f" ({error})"
            raise InputError(
                f"{path}, line {number}: not {expected}{reason}; mend or remove the line"
            ) from None
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise InputError(
                f"{path}: the gzip file is truncated or damaged after line {number}; copy it again"
            ) from None


# ---------------------------------------------------------------- documents -> token files


class Documents:
    """Tokenised texts: document i is tokens[starts[i] : starts[i + 1]].

    `tokens` holds all ids one after the other, memory-mapped. `sha256` is 16 digits of their hash.
    """

    def __init__(self, folder):
        with naming(folder):
            self.starts = np.fromfile(folder / "starts.bin", dtype=np.int64)
            self.tokens = np.memmap(folder / "tokens.bin", dtype=(folder / "dtype").read_text(), mode="r")
            self.sha256 = (folder / "sha256").read_text()

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, i):
        return self.tokens[self.starts[i] : self.starts[i + 1]]


def tokenised(paths, tokenizer, cache):
    """Return the Documents in `paths` (see find_files), tokenised into a folder under `cache`.

    A folder that is there already and whole is reused. Its name depends on what the files and the tokenizer
    hold, not on where they are or when they were written.
    """
    files = find_files(paths)
    key = hashlib.sha256(CACHE_LAYOUT)
    for content in tokenizer.files.values():
        key.update(content)
    key.update(fingerprint(files).encode())
    key.update(bytes(is_json_lines(path) for path in files))
    folder = Path(cache) / "tokens" / key.hexdigest()[:24]
    was_there = folder.exists()
    documents = whole_documents(folder)
    if documents is not None:
        return documents
    with only_one_process(Path(cache) / f"tokens-{folder.name}.lock"):
        # Under torchrun one process tokenises while the others wait, and they need not check what it wrote.
        if folder.exists() and not was_there:
            return Documents(folder)
        documents = whole_documents(folder)
        if documents is not None:
            return documents
        if folder.exists():
            warn(f"{folder}: damaged; the texts are tokenised again")
            shutil.rmtree(folder)
        try:
            with new_folder(folder) as aside:
                tokenise(files, tokenizer, aside)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            # On some shared file systems a lock holds on one machine alone. Another was faster, and its
            # folder must stay: it may be in use there.
            shutil.rmtree(aside)
        return Documents(folder)


def whole_documents(folder):
    """Return the Documents of a folder, None if it is not there or is damaged.

    It reads all tokens, about a second a gigabyte, because a run on damaged ones would be worth nothing.
    """
    digest = hashlib.sha256()
    try:
        for name in ("tokens.bin", "starts.bin"):
            with open(folder / name, "rb") as f:
                hashlib.file_digest(f, lambda: digest)
        documents = Documents(folder)
    except (OSError, ValueError, TypeError):
        return None
    is_whole = documents.sha256 == digest.hexdigest()[:16] and documents.starts[-1] == len(documents.tokens)
    return documents if is_whole else None


def tokenise(files, tokenizer, folder):
    """Tokenise files into an empty folder, as Documents reads it. Raise InputError if they hold no text."""
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 2**16 else "uint32")
    (folder / "dtype").write_text(dtype.name)
    starts, digest = [0], hashlib.sha256()
    n_bytes = sum(path.stat().st_size for path in files)
    bar = tqdm(total=n_bytes, unit="B", unit_scale=True, desc="tokenising", disable=None)
    with bar, open(folder / "tokens.bin", "wb") as out:
        for path in files:
            documents = read_documents(path)
            while some := list(islice(documents, DOCUMENTS_AT_ONCE)):
                for ids in tokenizer.encode_batch(some):
                    content = np.array(ids, dtype=dtype).tobytes()
                    out.write(content)
                    digest.update(content)
                    starts.append(starts[-1] + len(ids))
            bar.update(path.stat().st_size)
    if starts[-1] == 0:
        first = files[0] if files else "none found"
        raise InputError(f"no text in {len(files)} file(s), {first} first; name files that hold some")
    content = np.array(starts, dtype=np.int64).tobytes()
    (folder / "starts.bin").write_bytes(content)
    digest.update(content)
    (folder / "sha256").write_text(digest.hexdigest()[:16])


# ---------------------------------------------------------------- token files -> batches


@dataclass
class Episodes:
    """Which examples of a run are retrieval episodes, and how they are made (retrieval.py).

    share: the share of all examples. batch_size: examples in a global batch. length: tokens in an episode. It
    divides the tokens of an example, which holds as many episodes as fit. make(rng, document): returns one
    episode, as retrieval.episode does, made in a text of more than `length` tokens.
    """

    share: float
    batch_size: int
    length: int
    make: Callable

    def includes(self, step, i):
        """Return whether example i of a step's global batch is made of episodes. They are spread evenly."""
        earlier = step * self.batch_size + i  # examples of the run before this one
        return math.floor((earlier + 1) * self.share) > math.floor(earlier * self.share)


class Batches:
    """The batches of a run. Calling it with a step and indices returns examples of that step.

    An example has train_len tokens, in one window or in several episodes. Documents too short for a window
    are left out: `n_too_short` counts them, and `usable_tokens` the tokens of the others.
    """

    def __init__(self, documents, seed, bos_id=None, episodes=None, **sampling):
        """Find where windows can begin. Raise InputError if no document is long enough.

        bos_id: replaces the first token of each window, if the model has one. episodes: an Episodes, or None
        for plain windows alone. sampling: the arguments of pose.sample after text_len.
        """
        self.documents, self.seed, self.bos_id, self.sampling = documents, seed, bos_id, sampling
        self.episodes = episodes
        train_len = sampling["train_len"]
        reach = SPAN_IN_WINDOWS * train_len
        if sampling.get("offset") == "skip":  # the text stands where its positions say
            reach = max(reach, sampling["target_len"])
        # An example chooses from so many tokens of a document; the last one can only be a target.
        self.span = 1 + reach
        lengths = np.diff(documents.starts)
        # Every place where a window can begin is equally likely, so documents are drawn by their length.
        self.window_counts = np.cumsum(np.maximum(lengths - train_len, 0))
        fits = lengths > train_len
        self.n_too_short = int((~fits).sum())
        self.usable_tokens = int(lengths[fits].sum())
        if self.window_counts[-1] == 0:
            raise InputError(
                f"no document is longer than the training window of {train_len} tokens: the longest of "
                f"{len(documents)} has {lengths.max()}; train on shorter windows or add longer texts"
            )

    def __call__(self, step, indices):
        """Return the examples `indices` of a step's global batch, a list.

        Each is a tuple of tokens, positions and targets, int64, and token weights, float32, all of shape
        (windows, tokens of a window). A token weight is what a target counts in the loss.
        """
        return [self.example(step, i) for i in indices]

    def example(self, step, i):
        """Return example i of a step, drawn with a generator of its own."""
        rng = np.random.default_rng((self.seed, step, i))
        if self.episodes is not None and self.episodes.includes(step, i):
            n = self.sampling["train_len"] // self.episodes.length
            windows = [self.episode(rng) for _ in range(n)]
        else:
            windows = [self.window(rng, self.sampling)]
        return tuple(np.stack(column) for column in zip(*windows))

    def draw_text(self, rng):
        """Return a stretch of a document, int64 (at most span,), with more than train_len tokens."""
        place = rng.integers(self.window_counts[-1])
        i = np.searchsorted(self.window_counts, place, side="right")
        start = place - (self.window_counts[i - 1] if i else 0)
        return self.documents[i][start : start + self.span].astype(np.int64)

    def window(self, rng, sampling):
        """Return tokens, positions, targets and token weights, (train_len,) each, of one plain window."""
        text = self.draw_text(rng)
        index, positions = pose.sample(rng=rng, text_len=len(text), **sampling)
        # The target is the token that really follows in the document, at the seam of two chunks too.
        targets = text[index + 1]
        return self.with_bos(text[index]), positions, targets, np.ones(len(index), dtype=np.float32)

    def episode(self, rng):
        """Return tokens, positions, targets and token weights, (episodes.length,) each, of one episode.

        Where a window has no room for one, they are those of a plain window as long.
        """
        made = self.episodes.make(rng, self.draw_text(rng))
        if made is None:
            return self.window(rng, self.sampling | {"train_len": self.episodes.length})
        tokens, *others = made
        return self.with_bos(tokens), *others

    def with_bos(self, tokens):
        """Overwrite the first of the tokens with bos_id, if the model has one, and return them."""
        if self.bos_id is not None:
            tokens[0] = self.bos_id
        return tokens


def micro_batches(examples, size):
    """Yield micro-batches: tuples of arrays like an example's, each of `size` examples put together."""
    for i in range(0, len(examples), size):
        yield tuple(np.concatenate(column) for column in zip(*examples[i : i + size]))


def prefetched(batches, first_step, indices, micro_batch_size, device):
    """Yield the micro-batches of batches(step, indices), for first_step and all steps after it.

    Those of a step are a list. Each is a tuple of tokens, positions, targets and token weights of
    micro_batch_size examples: tensors on `device` of shape (windows, tokens of a window). A thread makes the
    micro-batches of the next step meanwhile.
    """

    def make(step):
        return list(micro_batches(batches(step, indices), micro_batch_size))

    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(make, first_step)
        for step in count(first_step + 1):
            batch = following.result()
            following = thread.submit(make, step)
            yield [tuple(torch.from_numpy(x).to(device) for x in micro_batch) for micro_batch in batch]
