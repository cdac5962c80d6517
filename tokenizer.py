"""Text <-> token ids: SentencePiece `tokenizer.model` and Hugging Face `tokenizer.json` behind one small interface.

A tokenizer has `vocab_size`, `bos_id` (the token this model's windows begin with, None if it was trained without one),
`encode(text)`, `encode_batch(texts)` (lists of ids, no special tokens), `decode(ids)`, and `files`, the bytes it was read from.
"""
import json
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from errors import UserError

# What travels with an exported model, where it is there.
FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def load(folder):
    """The tokenizer of a Hugging Face folder. SentencePiece first: it reads a whole book at once in linear time."""
    folder = Path(folder)
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if "tokenizer.model" not in files and "tokenizer.json" not in files:
        raise UserError(f"{folder}: no tokenizer.model or tokenizer.json; put the model's own tokenizer file there")
    try:
        json.loads(files.get("tokenizer_config.json", b"{}"))
    except ValueError as error:
        raise UserError(f"{folder / 'tokenizer_config.json'}: not readable ({error}); copy it again") from None
    kind, name = (SentencePiece, "tokenizer.model") if "tokenizer.model" in files else (TokenizerJson, "tokenizer.json")
    try:
        if not files[name]:
            raise ValueError("it is empty")
        return kind(files)
    except Exception as error:  # both libraries raise bare RuntimeError or Exception for a broken file
        raise UserError(f"{folder / name}: not readable ({str(error).strip().splitlines()[0]}); copy it again") from None


class SentencePiece:
    def __init__(self, files):
        self.files = files
        self._model = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
        self.vocab_size = self._model.vocab_size()
        wanted = json.loads(files.get("tokenizer_config.json", b"{}")).get("add_bos_token", True)
        self.bos_id = self._model.bos_id() if wanted and self._model.bos_id() >= 0 else None

    def encode(self, text):
        return self._model.encode(text)

    def encode_batch(self, texts):
        return self._model.encode(texts, num_threads=-1)

    def decode(self, ids):
        return self._model.decode([int(i) for i in ids])


class TokenizerJson:
    def __init__(self, files):
        self.files = files
        self._model = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        self.vocab_size = max(self._model.get_vocab().values()) + 1
        self._model.no_truncation()  # some files come with both switched on: they would cut every document
        self._model.no_padding()
        begin = self._model.encode("a")  # the post-processor says what a text begins with
        self.bos_id = begin.ids[0] if begin.special_tokens_mask[0] else None

    def encode(self, text):
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts):
        return [e.ids for e in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids):
        return self._model.decode([int(i) for i in ids], skip_special_tokens=False)


def from_gguf(metadata):
    """A byte-level BPE rebuilt from the vocabulary and merges in a GGUF file. metadata: key -> value."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if (kind, pre) != ("gpt2", "smollm"):
        raise UserError(f"GGUF tokenizer {kind!r} with pre-tokenizer {pre!r} is not one this code rebuilds (gpt2, smollm)")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(line.split(" ")) for line in metadata["tokenizer.ggml.merges"]]
    model = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type for special tokens
    model.add_special_tokens([t for t, kind in zip(tokens, metadata["tokenizer.ggml.token_type"]) if kind == control])
    bos, eos = (tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    return TokenizerJson({"tokenizer.json": model.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()})
