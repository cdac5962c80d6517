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
  linear time. Tokens that only the tokenizer.json adds are never produced.
"""

import json
from pathlib import Path

import sentencepiece
import tokenizers

from storage.files import InputError

# The files that travel with a model, where it has them.
FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def load(folder):
    """Return the tokenizer of a Hugging Face folder. Raise InputError if there is none, or a broken one."""
    folder = Path(folder)
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if "tokenizer.model" in files:
        name, kind = "tokenizer.model", SentencePiece
    elif "tokenizer.json" in files:
        name, kind = "tokenizer.json", TokenizerJson
    else:
        remedy = "put the model's own tokenizer file there"
        if "merges.txt" in files:
            remedy = "save a tokenizer.json there with transformers"
        raise InputError(f"{folder}: no tokenizer.model or tokenizer.json; {remedy}")

    for settings in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        try:
            _json_object(files, settings)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{folder / settings}: not readable ({error}); copy it again") from None
    if not files[name]:
        raise InputError(f"{folder / name}: not readable (it is empty); copy it again")
    try:
        return kind(files)
    except Exception as error:  # Both libraries raise a bare RuntimeError or Exception for a broken file.
        raise InputError(f"{folder / name}: not readable ({first_line(error)}); copy it again") from None


def check_size(tokenizer, vocab_size, path):
    """Raise InputError if a tokenizer makes ids that a model of `vocab_size` embeddings does not have.

    path: where both come from, for the message.
    """
    if tokenizer.vocab_size > vocab_size:
        sizes = f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {vocab_size}"
        raise InputError(f"{path}: {sizes}; use the tokenizer it was trained with")


class SentencePiece:
    """A tokenizer.model. Windows begin with its bos token unless tokenizer_config.json says otherwise."""

    def __init__(self, files):
        self.files = files
        self._model = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
        self.vocab_size = self._model.vocab_size()
        settings = _json_object(files, "tokenizer_config.json")
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
        example = self._model.encode("a")
        begins_with_special_token = example.special_tokens_mask[0]
        self.bos_id = example.ids[0] if begins_with_special_token else None

    def encode(self, text):
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts):
        return [encoded.ids for encoded in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids):
        return self._model.decode([int(i) for i in ids], skip_special_tokens=False)


def first_line(error):
    """Return the first line of an exception's message, the name of its type if it has none."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0]


def _json_object(files, name):
    """Return the JSON object in one of `files` {name: bytes}, {} if there is no such file.

    Raise ValueError if the file holds something else.
    """
    content = json.loads(files.get(name, b"{}"))
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content
