"""Documents -> token files, and batch number n of a run as a pure function of (seed, n).

Texts are tokenised once into memory-mapped files in the cache folder and reused while neither they nor the tokenizer change.
A training example depends on (seed, step, its index in the global batch) alone: resuming is exact, and the loss curve does
not depend on how many processes share the work.
"""
import fcntl
import gzip
import hashlib
import json
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import pose
from errors import UserError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")
SPAN = 5  # the text of one example lies within SPAN * train_len tokens, as in the official code


def find_files(paths):
    """The files that the user named (in folders: those of SUFFIXES). With none: the source of the running Python's standard library."""
    if not paths:
        library = Path(sysconfig.get_paths()["stdlib"])
        apart = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
        return sorted(p for p in library.rglob("*.py") if not apart & set(p.relative_to(library).parts))
    files = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file()) if path.is_dir() else [path]
        if not path.exists() or not inside:
            raise UserError(f"{path}: " + (f"no {', '.join(SUFFIXES)} inside" if path.exists() else "no such file or folder"))
        files += inside
    return files


def fingerprint(files):
    """16 digits of the SHA-256 of what the files hold."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:16]


def read_documents(path):
    """Yield the texts of one file: a .jsonl line is a document, any other file is one. Empty ones are passed over."""
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 at byte {error.start}; convert it or leave it out") from None
        if text.strip():
            yield text
        return
    n = 0
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
        try:
            for n, line in enumerate(f, 1):
                if not line.strip():
                    continue
                text = json.loads(line)["text"]
                if not isinstance(text, str):
                    raise TypeError
                text.encode()  # a lone surrogate is no text
                if text.strip():
                    yield text
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f'{path}, line {n}: not a JSON object with a string "text" in UTF-8; mend or remove the line') from None
        except (EOFError, gzip.BadGzipFile, gzip.zlib.error):
            raise UserError(f"{path}: the gzip file is truncated or damaged after line {n}; copy it again") from None


class Documents:
    """Tokenised texts. `tokens`: all ids in one row (memory-mapped); document i is tokens[starts[i] : starts[i + 1]].
    `sha256`: 16 digits of that of them all."""

    def __init__(self, folder):
        self.starts = np.load(folder / "starts.npy")
        self.tokens = np.memmap(folder / "tokens.bin", dtype=(folder / "dtype").read_text(), mode="r")
        self.sha256 = (folder / "sha256").read_text()

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, i):
        return self.tokens[self.starts[i] : self.starts[i + 1]]


def prepare(paths, tokenizer, cache):
    """Tokenise `paths` (see `find_files`) into a folder under `cache`, or find them there -> Documents."""
    files = find_files(paths)
    key = hashlib.sha256(b"2")  # version of the folder's layout
    for content in tokenizer.files.values():
        key.update(content)
    for path in files:
        key.update(f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode(errors="surrogateescape"))
    folder = Path(cache) / "tokens" / key.hexdigest()[:24]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(Path(cache) / f"tokens-{folder.name}.lock", "w") as lock:  # under torchrun one process tokenises, the others find it done
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
                _tokenise(files, tokenizer, Path(aside) / "tokens")
                try:
                    (Path(aside) / "tokens").rename(folder)
                except OSError:  # another machine was faster: on some shared file systems the lock is of one machine alone
                    if not folder.exists():
                        raise
    return Documents(folder)


def _tokenise(files, tokenizer, folder):
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 2**16 else "uint32")
    folder.mkdir()
    (folder / "dtype").write_text(dtype.name)
    starts, digest = [0], hashlib.sha256()
    total = sum(p.stat().st_size for p in files)
    with open(folder / "tokens.bin", "wb") as out, tqdm(total=total, unit="B", unit_scale=True, desc="tokenising", disable=None) as bar:
        for path in files:
            documents = read_documents(path)
            while batch := list(islice(documents, 32)):
                for ids in tokenizer.encode_batch(batch):
                    content = np.array(ids, dtype=dtype).tobytes()
                    out.write(content)
                    digest.update(content)
                    starts.append(starts[-1] + len(ids))
            bar.update(path.stat().st_size)
    if starts[-1] == 0:
        raise UserError(f"no text in {len(files)} file(s), {files[0] if files else 'none found'} first; name files that hold some")
    np.save(folder / "starts.npy", np.array(starts))
    digest.update(np.array(starts).tobytes())
    (folder / "sha256").write_text(digest.hexdigest()[:16])


class Batches:
    """Batch number n of a run. Documents too short for one window are left out; `skipped` counts them, `usable` the tokens of the others."""

    def __init__(self, documents, seed, bos_id=None, **sampling):
        """sampling: the arguments of pose.sample after text_len. bos_id: stands in the place of each window's first token if not None."""
        self.documents, self.seed, self.bos_id, self.sampling = documents, seed, bos_id, sampling
        train_len = sampling["train_len"]
        self.span = 1 + max(SPAN * train_len, sampling["target_len"] if sampling.get("offset") == "skip" else 0)
        lengths = np.diff(documents.starts)
        # Every place where a window can begin is equally likely, so a long document counts as much as its text.
        self.ends = np.cumsum(np.maximum(lengths - train_len, 0))
        fits = lengths > train_len
        self.skipped, self.usable = int((~fits).sum()), int(lengths[fits].sum())
        if self.ends[-1] == 0:
            raise UserError(
                f"no document is longer than train_len {train_len}: the longest of {len(documents)} has {lengths.max()} tokens; "
                "lower --train_len or add longer texts"
            )

    def __call__(self, step, indices):
        """tokens, positions, targets, each int64 (len(indices), train_len), of those examples of the global batch `step`."""
        examples = [self._example(np.random.default_rng((self.seed, step, i))) for i in indices]
        return tuple(np.stack(column) for column in zip(*examples))

    def _example(self, rng):
        place = rng.integers(self.ends[-1])
        i = np.searchsorted(self.ends, place, side="right")
        start = place - (self.ends[i - 1] if i else 0)
        text = self.documents[i][start : start + self.span].astype(np.int64)
        index, positions = pose.sample(rng=rng, text_len=len(text), **self.sampling)
        tokens = text[index]
        if self.bos_id is not None:
            tokens[0] = self.bos_id
        return tokens, positions, text[index + 1]  # the target is what really follows, at the seam of two chunks too


def prefetched(batches, first, indices, device):
    """Yield batches(step, indices) as tensors on `device` for step = first, first + 1, … without end. A thread makes the next one while the
    device works on this one."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(batches, first, indices)
        for step in count(first + 1):
            batch, following = following.result(), thread.submit(batches, step, indices)
            yield tuple(torch.from_numpy(x).to(device) for x in batch)
