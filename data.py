"""Documents -> token files -> batches. A batch is a pure function of (seed, step).

Documents (storage/texts.py) are tokenised once into memory-mapped files in the cache folder, and reused while
neither they nor the tokenizer change. Of a conversation only the tokens that the model should say count in
the loss; a mask beside the tokens says which. Conversations that follow each other are put together, while
texts too short for an example are left out, as in the paper. A training example depends on (seed, step, its
index in the global batch) alone. So resuming is exact, and the loss curve does not depend on how many
processes share the work.
"""

import errno
import hashlib
import math
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import pose
from hf import answers
from storage import texts
from storage.errors import InputError, naming, warn
from storage.files import new_folder, only_one_process

SPAN_IN_WINDOWS = 5  # the text of an example spans at most train_len times this, as in the official code
CACHE_LAYOUT = b"5"  # version of the folders in the cache, and of the rules for what is masked
DOCUMENTS_AT_ONCE = 32  # documents that are tokenised together, by several threads
MOST_DRAWS = 200  # of a window, until one has a token that counts


# ---------------------------------------------------------------- documents -> token files


class Documents:
    """Tokenised texts: document i is tokens[starts[i] : starts[i + 1]].

    `tokens` holds all ids one after the other, memory-mapped, and `masked` is as long: uint8, 1 where a token
    does not count in the loss. It is None where all count. `sha256` is 16 digits of the hash of all three.
    """

    def __init__(self, folder):
        with naming(folder):
            self.starts = np.fromfile(folder / "starts.bin", dtype=np.int64)
            self.tokens = np.memmap(folder / "tokens.bin", dtype=(folder / "dtype").read_text(), mode="r")
            self.masked = None
            if (folder / "masked.bin").exists():
                self.masked = np.memmap(folder / "masked.bin", dtype=np.uint8, mode="r")
            self.sha256 = (folder / "sha256").read_text()

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, i):
        return self.tokens[self.starts[i] : self.starts[i + 1]]

    def token_weights(self, i, begin, end):
        """Return what the tokens begin ... end - 1 of document i count in the loss, float32: 0 or 1."""
        end = min(end, self.starts[i + 1] - self.starts[i])
        if self.masked is None:
            return np.ones(end - begin, dtype=np.float32)
        return 1 - self.masked[self.starts[i] + begin : self.starts[i] + end].astype(np.float32)

    def join_conversations(self, until):
        """Join conversations that follow each other, until they have more than so many tokens together.

        Conversations are the documents with masked tokens. Texts stay what they are, but for those in which
        the tokenizer finds no token: they go.
        """
        if self.masked is None:
            return
        starts = np.unique(self.starts)  # reduceat takes no stretch without an element
        is_conversation = np.maximum.reduceat(self.masked, starts[:-1]) > 0
        borders = [0]
        for i in range(1, len(starts) - 1):  # between documents i - 1 and i
            are_conversations = is_conversation[i - 1] and is_conversation[i]
            if not are_conversations or starts[i] - borders[-1] > until:
                borders.append(starts[i])
        self.starts = np.array([*borders, starts[-1]])


def tokenised(paths, tokenizer, cache, text_key="text"):
    """Return the Documents in `paths` (see texts.find_files), tokenised into a folder under `cache`.

    text_key: see texts.read_documents. A folder that is there already and whole is reused. Its name depends
    on what the files and the tokenizer hold and on how many embeddings the model has, not on where files are
    or when they were written.
    """
    files = texts.find_files(paths)
    key = hashlib.sha256(CACHE_LAYOUT)
    for content in tokenizer.files.values():  # a chat template is among them
        key.update(content)
    key.update(repr(tokenizer.n_embeddings).encode())  # ids beyond were refused when it was written
    key.update(texts.fingerprint(files).encode())
    key.update(repr([(texts.format_of(path), texts.packing_of(path)) for path in files]).encode())
    key.update(text_key.encode(errors="surrogateescape"))  # as words that are no UTF-8 come from the shell
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
                tokenise(files, tokenizer, aside, text_key)
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
    try:
        documents = Documents(folder)
        if documents.sha256 != content_hash(folder):
            return None
    except (OSError, ValueError, TypeError):
        return None
    return documents if documents.starts[-1] == len(documents.tokens) else None


def content_hash(folder):
    """Return 16 hexadecimal digits of the SHA-256 of tokens, starts and, where there is one, the mask."""
    digest = hashlib.sha256()
    for path in (folder / "tokens.bin", folder / "starts.bin", folder / "masked.bin"):
        if path.exists():
            with open(path, "rb") as f:
                hashlib.file_digest(f, lambda: digest)
    return digest.hexdigest()[:16]


def tokenise(files, tokenizer, folder, text_key):
    """Tokenise files into an empty folder, as Documents reads it. Raise InputError if they hold no text."""
    n_ids = max(tokenizer.vocab_size, tokenizer.n_embeddings or 0)  # control tokens may be beyond the first
    dtype = np.dtype("uint16" if n_ids <= 2**16 else "uint32")
    (folder / "dtype").write_text(dtype.name)
    starts = [0]
    n_bytes = sum(path.stat().st_size for path in files)
    bar = tqdm(total=n_bytes, unit="B", unit_scale=True, desc="tokenising", disable=None)
    with bar, open(folder / "tokens.bin", "wb") as out, open(folder / "masked.bin", "wb") as mask:
        for path in files:
            for ids, masked in encoded(path, texts.read_documents(path, text_key), tokenizer):
                out.write(np.array(ids, dtype=dtype).tobytes())
                if masked is not None:
                    mask.seek(starts[-1])  # what is left out before it reads as zeros
                    mask.write(masked.astype(np.uint8).tobytes())
                starts.append(starts[-1] + len(ids))
            bar.update(path.stat().st_size)
        has_mask = mask.tell() > 0
        if has_mask:
            mask.truncate(starts[-1])
    if not has_mask:
        (folder / "masked.bin").unlink()
    if starts[-1] == 0:
        first = files[0] if files else "none found"
        raise InputError(f"no text in {len(files)} file(s), {first} first; name files that hold some")
    (folder / "starts.bin").write_bytes(np.array(starts, dtype=np.int64).tobytes())
    (folder / "sha256").write_text(content_hash(folder))


def encoded(path, documents, tokenizer):
    """Yield the token ids of each document of a file, and a boolean array that is True where one is masked.

    It is None for a text, of which all tokens count in the loss. Raise InputError, which names the file, for
    a text that the tokenizer refuses.
    """
    while some := list(islice(documents, DOCUMENTS_AT_ONCE)):
        plain = [document for document in some if isinstance(document, str)]
        try:
            ids_of_plain = iter(tokenizer.encode_batch(plain))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        for document in some:
            if isinstance(document, str):
                yield next(ids_of_plain), None
            else:
                ids, counts = answers.encode(tokenizer, document)
                yield ids, ~counts


# ---------------------------------------------------------------- token files -> batches


@dataclass
class Episodes:
    """Which examples of a run are retrieval episodes, and how they are made (retrieval.py).

    share: the share of all examples. batch_size: examples in a global batch. length: tokens in an episode. It
    divides the tokens of an example, which holds as many episodes as fit. make(rng, document, weights):
    returns one episode, as retrieval.episode does, made in a text of more than `length` tokens.
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
    are left out: `n_too_short` counts them, and `usable_tokens` the tokens of the others. `counted_share` is
    the share of all tokens that count in the loss.
    """

    def __init__(self, documents, seed, bos_id=None, episodes=None, **sampling):
        """Find where windows can begin. Raise InputError if no document is long enough, or no token counts.

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
        fits = lengths > train_len
        self.n_too_short = int((~fits).sum())
        self.usable_tokens = int(lengths[fits].sum())
        if not fits.any():
            raise InputError(
                f"no document is longer than the training window of {train_len} tokens: the longest of "
                f"{len(documents)} has {lengths.max()}; train on shorter windows (train_len) or add longer "
                "texts"
            )
        # Windows of document i begin at one of first_places[i] ... last_places[i] - 1.
        self.first_places, last_places = np.zeros_like(lengths), lengths - train_len
        self.counted_share = 1.0
        if documents.masked is not None:
            self.counted_share = 1 - documents.masked.mean(dtype=np.float64)
            first_counted, last_counted = counted_ranges(documents, np.flatnonzero(fits))
            self.first_places = np.maximum(first_counted - reach, 0)
            last_places = np.minimum(last_places, last_counted)
        # Every such place is equally likely, so documents are drawn by their length.
        self.place_counts = np.cumsum(np.maximum(last_places - self.first_places, 0))
        if self.place_counts[-1] == 0:
            raise InputError(
                f"no token counts in the documents longer than the training window of {train_len} tokens; "
                "train on shorter windows, count all tokens, or add texts"
            )

    @property
    def mean_window(self):
        """The length of the window that a token stands in, on average over all tokens of the run.

        A token's cost is linear in that length, so its mean is Config.flops_per_token of this one.
        """
        train_len = self.sampling["train_len"]
        if self.episodes is None:
            return train_len
        return self.episodes.share * self.episodes.length + (1 - self.episodes.share) * train_len

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
        """Return a stretch of a document with more than train_len tokens, and what its tokens count.

        int64 and float32, both (at most span,).
        """
        place = rng.integers(self.place_counts[-1])
        i = np.searchsorted(self.place_counts, place, side="right")
        start = self.first_places[i] + place - (self.place_counts[i - 1] if i else 0)
        text = self.documents[i][start : start + self.span].astype(np.int64)
        return text, self.documents.token_weights(i, start, start + self.span)

    def window(self, rng, sampling):
        """Return tokens, positions, targets and token weights, (train_len,) each, of one plain window.

        Windows in which no token counts are drawn again, MOST_DRAWS times at most.
        """
        for _ in range(MOST_DRAWS):
            text, weights = self.draw_text(rng)
            index, positions = pose.sample(rng=rng, text_len=len(text), **sampling)
            # The target is the token that really follows in the document, at the seam of two chunks too.
            targets, token_weights = text[index + 1], weights[index + 1]
            if token_weights.any():
                break
        return self.with_bos(text[index]), positions, targets, token_weights

    def episode(self, rng):
        """Return tokens, positions, targets and token weights, (episodes.length,) each, of one episode.

        Where a window has no room for one, they are those of a plain window as long.
        """
        made = self.episodes.make(rng, *self.draw_text(rng))
        if made is None:
            return self.window(rng, self.sampling | {"train_len": self.episodes.length})
        tokens, *others = made
        return self.with_bos(tokens), *others

    def with_bos(self, tokens):
        """Overwrite the first of the tokens with bos_id, if the model has one, and return them."""
        if self.bos_id is not None:
            tokens[0] = self.bos_id
        return tokens


def counted_ranges(documents, chosen):
    """Return the places of the first and the last token of each document that count, two int64 arrays.

    chosen: the documents to look at. Both places are 0 in the others, and where no token counts.
    """
    first, last = np.zeros((2, len(documents)), dtype=np.int64)
    for i in chosen:
        masked = documents.masked[documents.starts[i] : documents.starts[i + 1]].view(bool)
        first[i] = masked.argmin()  # the first False
        if not masked[first[i]]:
            last[i] = len(masked) - 1 - masked[::-1].argmin()
    return first, last


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
