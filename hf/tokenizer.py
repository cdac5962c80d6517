"""Text <-> token ids: SentencePiece's tokenizer.model and tokenizer.json behind one small interface.

A tokenizer has
- `vocab_size`, the number of ids;
- `bos_id`, the token that this model's windows begin with, None if it was trained without one;
- `encode(text)` and `encode_batch(texts)`, which return lists of ids without special tokens;
- `decode(ids)`, which returns the text;
- `files`, {name: bytes} of the files that it was read from.

Notable choices:
- Text that spells a control token ("<s>", "<|endoftext|>") stays text in SentencePiece and becomes that
  token in a tokenizer.json, because transformers does the same.
- In a folder with both files the tokenizer.model counts, since SentencePiece reads a whole book at once in
  linear time. Tokens that only the tokenizer.json adds are never produced. A tokenizer.model in tiktoken's
  format (Llama 3 has one) does not count.
"""

import contextlib
import functools
import os
import re
import sys
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

from storage.files import InputError, naming, parse_object

# The files that travel with a model, where it has them.
FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # its first line: a token in base64 and its id


def load(folder):
    """Return the tokenizer of a Hugging Face folder. Raise InputError if there is none, or a broken one."""
    folder = Path(folder)
    files = read_files(folder)
    is_tiktoken = TIKTOKEN.match(files.get("tokenizer.model", b""))
    if "tokenizer.model" in files and not is_tiktoken:
        name, kind = "tokenizer.model", SentencePiece
    elif "tokenizer.json" in files:
        name, kind = "tokenizer.json", TokenizerJson
    else:
        remedy = "put the model's own tokenizer file there"
        if is_tiktoken or "merges.txt" in files:
            remedy = "save a tokenizer.json there with transformers"
        what = (
            "no tokenizer.json, and a tokenizer.model of tiktoken's"
            if is_tiktoken
            else "no tokenizer.model or tokenizer.json"
        )
        raise InputError(f"{folder}: {what}; {remedy}")

    for settings in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        try:
            parse_object(files.get(settings, b"{}"))
        except ValueError as error:
            raise InputError(f"{folder / settings}: not readable ({error}); copy it again") from None
    if not files[name]:
        raise InputError(f"{folder / name}: not readable (it is empty); copy it again")
    try:
        with hidden_panics():
            return kind(files)
    except Exception as error:
        raise InputError(f"{folder / name}: not readable ({reason_of(error)}); copy it again") from None


def read_files(folder):
    """Return {name: bytes} of the FILES in a folder. They go into every model that is made of this one.

    Raise InputError for a link out of the folder, which could lead to anything on this machine. The blobs of
    the Hugging Face cache are what its snapshots link to.
    """
    files = {}
    for name in FILES:
        path = folder / name
        if not path.is_file():
            continue
        target = path.resolve()
        is_blob = target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
        if target.parent != folder.resolve() and not is_blob:
            raise InputError(f"{path}: a link out of the folder, to {target}; put the file itself there")
        with naming(path):
            files[name] = path.read_bytes()
    return files


def check_size(tokenizer, vocab_size, path):
    """Raise InputError if a tokenizer makes ids that a model of `vocab_size` embeddings does not have.

    path: where both come from, for the message.
    """
    needed = max(tokenizer.vocab_size, (tokenizer.bos_id or 0) + 1)
    if needed > vocab_size:
        sizes = f"the tokenizer has {needed} tokens, the model only {vocab_size}"
        raise InputError(f"{path}: {sizes}; use the tokenizer it was trained with")


class SentencePiece:
    """A tokenizer.model. Windows begin with its bos token unless tokenizer_config.json says otherwise."""

    def __init__(self, files):
        self.files = files
        self._model = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
        self.vocab_size = self._model.vocab_size()
        settings = parse_object(files.get("tokenizer_config.json", b"{}"))
        has_bos = self._model.bos_id() >= 0
        self.bos_id = self._model.bos_id() if has_bos and settings.get("add_bos_token", True) else None

    def encode(self, text):
        return self._model.encode(text)

    def encode_batch(self, texts):
        return self._model.encode(texts, num_threads=-1)

    def decode(self, ids):
        # A model may have embeddings beyond this vocabulary, for added tokens or as padding: not text.
        return self._model.decode([int(i) for i in ids if i < self.vocab_size])


class TokenizerJson:
    """A tokenizer.json. Its post-processor says what windows begin with, and not tokenizer_config.json.

    That is what transformers does since version 5.
    """

    def __init__(self, files):
        self.files = files
        self._model = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        self.vocab_size = max(self._model.get_vocab().values()) + 1  # ids may have gaps
        # Some files come with truncation or padding switched on, which would change every document.
        self._model.no_truncation()
        self._model.no_padding()
        example = self._model.encode("a")  # a panic of the library comes here, if at all
        begins_with_special_token = example.special_tokens_mask[:1] == [1]
        self.bos_id = example.ids[0] if begins_with_special_token else None

    def encode(self, text):
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        try:
            return [encoded.ids for encoded in self._model.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error:  # such as a character that has no token, where there is none for unknown
            raise InputError(f"tokenizer.json does not encode this text ({reason_of(error)})") from None

    def decode(self, ids):
        return self._model.decode([int(i) for i in ids], skip_special_tokens=False)


@contextlib.contextmanager
def hidden_panics():
    """Turn a panic of the tokenizers library, which is written in Rust, into a RuntimeError.

    A panic is none of Python's Exceptions, and prints a trace of its own on stderr.
    """
    if sys.stderr is None:  # closed when the program began
        yield
        return
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise RuntimeError(str(error)) from None
        raise
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def reason_of(error):
    """Return in a few words what a tokenizer library says of a broken file.

    Both raise a bare Exception or RuntimeError. Any other error comes of a file that they did not check.
    """
    is_said = type(error) in (Exception, RuntimeError) and str(error).strip()
    return str(error).strip().splitlines()[0] if is_said else "damaged"


# ---------------------------------------------------------------- lines and tokens in the middle of a text


def ids_of_line(tokenizer, line):
    """Return the token ids of a newline and a line behind it, as they are in the middle of a text."""
    return tokenizer.encode("x\n" + line)[len(ids_of_x(tokenizer)) :]


@functools.cache
def ids_of_x(tokenizer):
    """Return the token ids of the letter that ids_of_line and token_texts put before a text."""
    return tokenizer.encode("x")


def line_ends(tokenizer, text):
    """Return the places in a text, a 1-d array of ids, where a line or a sentence ends, 0 among them."""
    newline, stop, space = token_kinds(tokenizer)
    this, following = text[:-1], text[1:]
    ends_here = newline[this] | (stop[this] & space[following])
    return np.concatenate([[0], 1 + np.flatnonzero(ends_here)])


@functools.cache
def token_kinds(tokenizer):
    """Return whether each token ends a line, may end a sentence, begins with a space.

    Three boolean arrays (vocab_size,).
    """
    texts = token_texts(tokenizer)
    ends_line = [text.endswith("\n") for text in texts]
    may_end_sentence = [text.rstrip("\"')”’").endswith((".", "!", "?")) for text in texts]
    begins_with_space = [text[:1].isspace() for text in texts]
    return np.array(ends_line), np.array(may_end_sentence), np.array(begins_with_space)


@functools.cache
def token_texts(tokenizer):
    """Return, for each token id, the text that it adds in the middle of a text."""
    return [tokenizer.decode([*ids_of_x(tokenizer), i])[1:] for i in range(tokenizer.vocab_size)]
