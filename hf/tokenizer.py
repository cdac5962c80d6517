"""Text <-> token ids: SentencePiece `tokenizer.model` and `tokenizer.json` behind one small interface.

A tokenizer has `vocab_size`, `bos_id` (the token this model's windows begin with, None if it was trained without one),
`encode(text)`, `encode_batch(texts)` (lists of ids, no special tokens), `decode(ids)`, and `files`, the bytes it was read from.

Text that spells a control token ("<s>", "<|endoftext|>") stays text in SentencePiece and becomes that token in a tokenizer.json, as in
transformers. A folder with both files is read by its tokenizer.model: tokens that only the other one adds are never produced.
"""
import json
import struct
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

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
    name = next((name for name in ("tokenizer.model", "tokenizer.json") if name in files), None)
    if name is None:
        do = "save a tokenizer.json there with transformers" if "merges.txt" in files else "put the model's own tokenizer file there"
        raise UserError(f"{folder}: no tokenizer.model or tokenizer.json; {do}")
    for settings in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            if not isinstance(json.loads(files.get(settings, b"{}")), dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            raise UserError(f"{folder / settings}: not readable ({error}); copy it again") from None
    try:
        if not files[name]:
            raise ValueError("it is empty")
        return SentencePiece(files) if name == "tokenizer.model" else TokenizerJson(files)
    except Exception as error:  # both libraries raise bare RuntimeError or Exception for a broken file
        raise UserError(f"{folder / name}: not readable ({_first_line(error)}); copy it again") from None


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
        return self._model.decode([int(i) for i in ids if i < self.vocab_size])  # a model may have rows beyond it: added tokens, padding


class TokenizerJson:
    def __init__(self, files):
        self.files = files
        self._model = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        self.vocab_size = max(self._model.get_vocab().values()) + 1
        self._model.no_truncation()  # some files come with both switched on: they would cut every document
        self._model.no_padding()
        begin = self._model.encode("a")  # the post-processor says what a text begins with, as in transformers 5 (not tokenizer_config)
        self.bos_id = begin.ids[0] if begin.special_tokens_mask[0] else None

    def encode(self, text):
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts):
        return [e.ids for e in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids):
        return self._model.decode([int(i) for i in ids], skip_special_tokens=False)


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------- rebuilt from a vocabulary and merges, or from scored pieces

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cut(digits):
    split = pre_tokenizers.Split(Regex(WORDS % digits), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# How each family cuts text into pieces before it merges bytes, by the name that GGUF files have for it.
PRE_TOKENIZERS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "llama-bpe": _cut(r"\p{N}{1,3}"),
    "qwen2": _cut(r"\p{N}"),
}


def _byte_level_bpe(vocab, merges, family, added, bos=None):
    """vocab {token: id}, merges (left, right) in order, added {token: special?}, bos: what texts begin with -> a tokenizers.Tokenizer."""
    model = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=family == "llama-bpe"))
    if family == "qwen2":
        model.normalizer = normalizers.NFC()
    model.pre_tokenizer = PRE_TOKENIZERS[family]
    model.decoder = decoders.ByteLevel()
    model.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in added.items()])
    if bos:
        model.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, model.token_to_id(bos))])
    return model


def from_gguf(metadata):
    """The tokenizer of a GGUF file, rebuilt as tokenizer.json or tokenizer.model. metadata: key -> value. UserError for one not known."""
    meta = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind, pre = meta.get("model"), meta.get("pre")
    if kind != "llama" and (kind, pre) not in [("gpt2", family) for family in PRE_TOKENIZERS]:
        known = f"this code rebuilds llama, and gpt2 with {', '.join(PRE_TOKENIZERS)}"
        raise UserError(f"GGUF tokenizer {kind!r} with pre-tokenizer {pre!r} is not known ({known}); take a Hugging Face folder")
    try:
        return _sentencepiece_from_gguf(meta) if kind == "llama" else _bpe_from_gguf(meta, pre)
    except KeyError as error:
        raise UserError(f"GGUF tokenizer: tokenizer.ggml.{error.args[0]} is missing; convert the model to GGUF again") from None
    except Exception as error:  # both libraries raise bare RuntimeError or Exception for what they cannot use
        if isinstance(error, UserError):
            raise
        raise UserError(f"GGUF tokenizer: not usable ({_first_line(error)}); convert the model to GGUF again") from None


def _bpe_from_gguf(meta, family):
    tokens, types = meta["tokens"], meta["token_type"]
    control, user_defined = 3, 4
    added = {token: kind == control for token, kind in zip(tokens, types) if kind in (control, user_defined)}
    vocab = {token: i for i, token in enumerate(tokens)}
    add_bos = meta.get("add_bos_token", family == "llama-bpe")  # llama.cpp's own default
    bos = tokens[meta["bos_token_id"]] if add_bos else None
    model = _byte_level_bpe(vocab, [tuple(line.split(" ")) for line in meta["merges"]], family, added, bos)
    settings = {f"{name}_token": tokens[meta[f"{name}_token_id"]] for name in ("bos", "eos") if f"{name}_token_id" in meta}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": add_bos}
    return TokenizerJson({"tokenizer.json": model.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()})


def _sentencepiece_from_gguf(meta):
    """Pieces with scores -> tokenizer.model, a protobuf message that is short enough to be written by hand."""
    tokens, scores, types = meta["tokens"], meta["scores"], meta["token_type"]
    normal = 1
    if len({score for score, kind in zip(scores, types) if kind == normal}) < 2:  # from a converter that knew the merges alone
        raise UserError("GGUF tokenizer: its pieces have no scores of their own; take a Hugging Face folder")
    unk, bos, eos = (tokens[meta.get(f"{name}_token_id", i)] for i, name in enumerate(("unknown", "bos", "eos")))
    pieces = [_field(1, token.encode()) + _field(2, float(score)) + _field(3, kind) for token, score, kind in zip(tokens, scores, types)]
    names = b"".join(_field(45 + i, token.encode()) for i, token in enumerate((unk, bos, eos)))
    trained = _field(3, 2) + _field(4, len(tokens)) + _field(35, 1) + names  # BPE, vocabulary size, byte fallback
    spaces = _field(3, int(meta.get("add_space_prefix", True))) + _field(4, int(meta.get("remove_extra_whitespaces", False)))
    proto = b"".join(_field(1, piece) for piece in pieces) + _field(2, trained) + _field(3, _field(1, b"identity") + spaces)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": bos, "eos_token": eos, "unk_token": unk, "legacy": False}
    settings |= {"add_bos_token": meta.get("add_bos_token", True)}
    return SentencePiece({"tokenizer.model": proto, "tokenizer_config.json": json.dumps(settings).encode()})


def _field(number, value):
    """One field of a protobuf message: a float, an int, or bytes."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(n):
    return bytes([n & 127 | 128]) + _varint(n >> 7) if n > 127 else bytes([n])
