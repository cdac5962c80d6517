"""Rebuild the tokenizer of a GGUF file as a tokenizer.json or tokenizer.model.

A byte-level BPE (vocabulary and merges) becomes a tokenizer.json. A SentencePiece model (pieces and scores)
becomes a tokenizer.model. How a BPE cuts text before it merges bytes is not in the file, which only has a
name for it. So the families in PRE_TOKENIZERS alone can be rebuilt: another cut gives other ids without any
error.
"""

import json
import struct

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

from hf.tokenizer import SentencePiece, TokenizerJson, hidden_panics, reason_of
from storage.errors import InputError

# ---------------------------------------------------------------- how each family cuts text


def _words_and_digits(digits):
    """Return the cut of Llama 3 and Qwen2. `digits`: the pattern of digits that stay together."""
    contraction = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    word = r"[^\r\n\p{L}\p{N}]?\p{L}+"
    punctuation = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    line_ends = r"\s*[\r\n]+"
    spaces_before_a_word = r"\s+(?!\S)"
    spaces = r"\s+"
    pattern = "|".join((contraction, word, digits, punctuation, line_ends, spaces_before_a_word, spaces))
    split = Split(Regex(pattern), "isolated")
    return Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS = {  # by the name that GGUF files have for it
    "gpt-2": ByteLevel(add_prefix_space=False),
    # Each digit alone, the rest as in GPT-2.
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "llama-bpe": _words_and_digits(r"\p{N}{1,3}"),
    "qwen2": _words_and_digits(r"\p{N}"),
}


# ---------------------------------------------------------------- from the metadata to a tokenizer


def rebuild_tokenizer(metadata):
    """Return the tokenizer that the metadata {key: value} of a GGUF file describe.

    Raise InputError if it cannot be rebuilt: its kind is not known, or something is missing or broken.
    """
    settings = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind, family = settings.get("model"), settings.get("pre")
    is_sentencepiece = kind == "llama"
    is_known_bpe = kind == "gpt2" and family in PRE_TOKENIZERS
    if not is_sentencepiece and not is_known_bpe:
        known = f"this code rebuilds llama, and gpt2 with {', '.join(PRE_TOKENIZERS)}"
        unknown = f"GGUF tokenizer {kind!r} with pre-tokenizer {family!r} is not known"
        raise InputError(f"{unknown} ({known}); take a Hugging Face folder")
    try:
        with hidden_panics():
            return _sentencepiece(settings) if is_sentencepiece else _byte_level_bpe(settings, family)
    except InputError:
        raise
    except KeyError as error:
        missing = f"tokenizer.ggml.{error.args[0]} is missing"
        raise InputError(f"GGUF tokenizer: {missing}; convert the model to GGUF again") from None
    except Exception as error:
        reason = f"not usable ({reason_of(error)})"
        raise InputError(f"GGUF tokenizer: {reason}; convert the model to GGUF again") from None


def _byte_level_bpe(settings, family):
    """Return the TokenizerJson of a vocabulary and merges. Raise KeyError if a setting is missing."""
    tokens, types = settings["tokens"], settings["token_type"]
    add_bos = settings.get("add_bos_token", family == "llama-bpe")  # llama.cpp's own default
    bos = tokens[settings["bos_token_id"]] if add_bos else None

    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(line.split(" ")) for line in settings["merges"]]
    # Some tokens of Llama 3 cannot be reached by merges: a piece that is a token is taken whole.
    model = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=family == "llama-bpe"))
    if family == "qwen2":
        model.normalizer = normalizers.NFC()
    model.pre_tokenizer = PRE_TOKENIZERS[family]
    model.decoder = decoders.ByteLevel()
    added = []
    for token, kind in zip(tokens, types):
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
            added.append(AddedToken(token, special=kind == TokenType.CONTROL, normalized=False))
    model.add_tokens(added)
    if bos:
        bos_and_id = (bos, model.token_to_id(bos))
        model.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[bos_and_id])

    config = {}
    for name in ("bos", "eos"):
        if f"{name}_token_id" in settings:
            config[f"{name}_token"] = tokens[settings[f"{name}_token_id"]]
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": add_bos}
    config |= _chat_template(settings)
    files = {"tokenizer.json": model.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
    return TokenizerJson(files)


def _sentencepiece(settings):
    """Return the SentencePiece model of pieces and scores. Raise KeyError if a setting is missing."""
    tokens, scores, types = settings["tokens"], settings["scores"], settings["token_type"]
    scores_of_text = {score for score, kind in zip(scores, types) if kind == TokenType.NORMAL}
    if len(scores_of_text) < 2:  # the file comes from a converter that knew the merges alone
        reason = "its pieces have no scores of their own"
        raise InputError(f"GGUF tokenizer: {reason}; take a Hugging Face folder")
    unk = tokens[settings.get("unknown_token_id", 0)]
    bos = tokens[settings.get("bos_token_id", 1)]
    eos = tokens[settings.get("eos_token_id", 2)]

    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
        "legacy": False,
        "add_bos_token": settings.get("add_bos_token", True),
    } | _chat_template(settings)
    model = _sentencepiece_model(
        zip(tokens, scores, types),
        (unk, bos, eos),
        vocab_size=len(tokens),
        add_dummy_prefix=settings.get("add_space_prefix", True),
        remove_extra_whitespaces=settings.get("remove_extra_whitespaces", False),
    )
    return SentencePiece({"tokenizer.model": model, "tokenizer_config.json": json.dumps(config).encode()})


def _chat_template(settings):
    """Return what tokenizer_config.json says of how a conversation is spelled: nothing, or a template."""
    template = settings.get("tokenizer.chat_template")
    return {"chat_template": template} if template else {}


# ---------------------------------------------------------------- tokenizer.model, a protobuf message


def _sentencepiece_model(pieces, control, vocab_size, add_dummy_prefix, remove_extra_whitespaces):
    """Return the bytes of a tokenizer.model, a ModelProto of SentencePiece's sentencepiece_model.proto.

    pieces: the text, score and type of each; GGUF has SentencePiece's own numbers for the types.
    control: the texts of unk, bos and eos. The message is short enough to be written by hand.
    """
    bpe = 2
    # model_type, vocab_size and byte_fallback
    trainer_spec = _field(3, bpe) + _field(4, vocab_size) + _field(35, 1)
    # unk_piece, bos_piece and eos_piece
    for number, token in zip((45, 46, 47), control):
        trainer_spec += _field(number, token.encode())
    # name, add_dummy_prefix and remove_extra_whitespaces
    normalizer_spec = _field(1, b"identity")
    normalizer_spec += _field(3, int(add_dummy_prefix)) + _field(4, int(remove_extra_whitespaces))

    message = []
    for text, score, kind in pieces:
        message.append(_field(1, _field(1, text.encode()) + _field(2, float(score)) + _field(3, kind)))
    message.append(_field(2, trainer_spec))
    message.append(_field(3, normalizer_spec))
    return b"".join(message)


def _field(number, value):
    """Return the bytes of one field of a protobuf message. value: a float, an int or bytes."""
    varint, with_length, four_bytes = 0, 2, 5  # the low bits of a field's key say how its value is stored
    if isinstance(value, float):
        return _varint(number << 3 | four_bytes) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3 | varint) + _varint(value)
    return _varint(number << 3 | with_length) + _varint(len(value)) + value


def _varint(n):
    """Return a number in protobuf's encoding: seven bits a byte, the low ones first.

    The high bit of a byte says that more bytes follow.
    """
    encoded = bytearray()
    while n > 127:
        encoded.append(n & 127 | 128)
        n >>= 7
    encoded.append(n)
    return bytes(encoded)
