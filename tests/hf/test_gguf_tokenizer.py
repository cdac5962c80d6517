"""Tokenizers rebuilt from the metadata of a GGUF file give the ids of the original, and the text back."""

import unicodedata

import pytest
import sentencepiece
from tokenizer_files import AWKWARD, CORPUS, HARDER, SPECIAL, TINY, stock_of, train, write_files
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf import families, tokenizer
from hf.gguf_tokenizer import PRE_TOKENIZERS, rebuild_tokenizer
from model import Config
from storage.errors import InputError

LLAMA = Config(320, 64, 96, 2, 4, 2, 16, 64)


def prefixed(metadata):
    """Return metadata with the prefix that a tokenizer's keys have in a GGUF file."""
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


# ---------------------------------------------------------------- byte-level BPE


def bpe_metadata(vocab, merges, family, types=None, **more):
    """Return the metadata of a BPE. types: {token: GGUF's number for its type}, of those not normal."""
    tokens = sorted(vocab, key=vocab.get)
    metadata = {
        "model": "gpt2",
        "pre": family,
        "tokens": tokens,
        "token_type": [(types or {}).get(token, 1) for token in tokens],
        "merges": [" ".join(merge) for merge in merges],
    }
    return prefixed(metadata | more)


@pytest.mark.parametrize("family", SPECIAL)
def test_byte_level_bpe(tmp_path, family):
    special = SPECIAL[family]
    vocab, merges = train(400, special)
    stock = stock_of(family, vocab, merges, special)
    more = {"bos_token_id": vocab[special[0]], "eos_token_id": vocab[special[-1]]}
    ours = rebuild_tokenizer(bpe_metadata(vocab, merges, family, dict.fromkeys(special, 3), **more))
    for text in HARDER + [f"a{token} b{token}" for token in special]:
        assert ours.encode(text) == stock.encode(text, add_special_tokens=False), text
        expected = unicodedata.normalize("NFC", text) if family == "qwen2" else text
        assert ours.decode(ours.encode(text)) == expected
    assert ours.vocab_size == len(stock) == len(vocab)
    assert ours.bos_id == (vocab[special[0]] if family == "llama-bpe" else None)

    write_files(tmp_path, ours.files)
    again, theirs = tokenizer.load(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again.bos_id == ours.bos_id
    assert again.encode_batch(HARDER) == [theirs.encode(text, add_special_tokens=False) for text in HARDER]
    begin = [ours.bos_id] if family == "llama-bpe" else []
    assert theirs("cat").input_ids == begin + ours.encode("cat")


def test_families_differ():
    """A wrong pre-tokenizer would give other ids, without any error."""
    vocab, merges = train(400, [])
    ids = []
    for family in PRE_TOKENIZERS:
        ours = rebuild_tokenizer(bpe_metadata(vocab, merges, family, add_bos_token=False))
        ids.append(ours.encode_batch(CORPUS))
    for i, a in enumerate(ids):
        assert all(a != b for b in ids[:i])


def test_llama_3_takes_a_whole_word_without_its_merges():
    """Some of Llama 3's tokens cannot be reached by merges: its tokenizer.json has ignore_merges."""
    vocab, merges = train(300, ["Ġunreachable"])
    ours = rebuild_tokenizer(bpe_metadata(vocab, merges, "llama-bpe", add_bos_token=False))
    assert ours.encode(" unreachable") == [vocab["Ġunreachable"]]
    assert len(ours.encode(" unreachables")) > 1


@pytest.mark.parametrize("add, bos", [(True, 300), (False, None), (None, None)])
def test_bos(add, bos):
    vocab, merges = train(300, ["<|begin|>", "<tool>"])
    added = {} if add is None else {"add_bos_token": add}
    types = {"<|begin|>": 3, "<tool>": 4}
    ours = rebuild_tokenizer(bpe_metadata(vocab, merges, "qwen2", types, bos_token_id=300, **added))
    assert ours.bos_id == bos
    assert ours.encode("a<tool>b")[1] == 301  # a user-defined token is one token, but no control token
    sentencepieces = rebuild_tokenizer(SENTENCEPIECE | prefixed(added))
    assert sentencepieces.bos_id == (None if add is False else 1)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_the_chat_template_is_kept(tmp_path, kind):
    """transformers spells a conversation by it."""
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    metadata = SENTENCEPIECE if kind == "sentencepiece" else bpe_metadata(*train(300, []), "qwen2")
    write_files(tmp_path, rebuild_tokenizer(metadata | {"tokenizer.chat_template": template}).files)
    write_files(tmp_path, families.tokenizer_files(LLAMA, tokenizer.load(tmp_path).files))  # an export
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "42"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == "<user>hé\n<assistant>42\n"


# ---------------------------------------------------------------- SentencePiece


def piece_type(model, i):
    """Return the number that GGUF has for the type of a piece."""
    if model.is_byte(i):
        return 6
    if model.is_control(i):
        return 3
    return 2 if model.is_unknown(i) else 1


def sentencepiece_metadata(model):
    """Return a tokenizer.model as llama.cpp's converter writes it into a GGUF file."""
    ids = range(model.vocab_size())
    metadata = {
        "model": "llama",
        "pre": "default",
        "tokens": [model.id_to_piece(i) for i in ids],
        "token_type": [piece_type(model, i) for i in ids],
        "scores": [model.get_score(i) for i in ids],
        "bos_token_id": model.bos_id(),
        "eos_token_id": model.eos_id(),
        "unknown_token_id": model.unk_id(),
    }
    return prefixed(metadata)


TINY_MODEL = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
SENTENCEPIECE = sentencepiece_metadata(TINY_MODEL)


def test_sentencepiece(tmp_path):
    original, ours = tokenizer.load(TINY), rebuild_tokenizer(SENTENCEPIECE)
    for text in HARDER + AWKWARD + ["<s>", "</s> and more", "<unk>", "<0x0A>"]:
        assert ours.encode(text) == original.encode(text), text
        assert ours.decode(ours.encode(text)) == text
    assert (ours.vocab_size, ours.bos_id) == (original.vocab_size, original.bos_id)
    rebuilt = sentencepiece.SentencePieceProcessor(model_proto=ours.files["tokenizer.model"])
    assert (rebuilt.bos_id(), rebuilt.eos_id(), rebuilt.unk_id(), rebuilt.pad_id()) == (1, 2, 0, -1)
    write_files(tmp_path, ours.files)
    assert tokenizer.load(tmp_path).encode_batch(HARDER) == original.encode_batch(HARDER)


def test_sentencepiece_with_user_defined_tokens():
    """Chat models have such tokens: SentencePiece takes the longest match before it merges anything."""
    added = {}
    for key, value in prefixed({"tokens": "<tool>", "scores": -1000.0, "token_type": 4}).items():
        added[key] = [*SENTENCEPIECE[key], value]
    ours = rebuild_tokenizer(SENTENCEPIECE | added)
    ids = ours.encode("say <tool> now")
    assert ours.vocab_size == 2049 and 2048 in ids and ours.decode(ids) == "say <tool> now"


# ---------------------------------------------------------------- what is refused

EQUAL_SCORES = {"tokens": ["<unk>", "a", "b"], "scores": [-1000.0] * 3, "token_type": [2, 1, 1]}
NO_UNKNOWN = {"tokens": ["a", "b", "c"], "scores": [0.0, -1.0, -2.0], "token_type": [1] * 3}
REFUSED = {
    "pre": ({"model": "gpt2", "pre": "tekken"}, "'gpt2'.*'tekken'"),
    # The converter writes "default" when it does not know the family.
    "default": ({"model": "gpt2", "pre": "default"}, "'default'"),
    "no pre": ({"model": "gpt2"}, "pre-tokenizer None"),
    "kind": ({"model": "t5", "pre": "default"}, "'t5'"),
    "none": ({}, "GGUF tokenizer None"),
    "no tokens": ({"model": "gpt2", "pre": "qwen2"}, "tokenizer.ggml.tokens is missing"),
    "no scores": ({"model": "llama", "tokens": ["a"]}, "tokenizer.ggml.scores is missing"),
    "scores of no use": ({"model": "llama"} | EQUAL_SCORES, "no scores"),
    "no unknown piece": ({"model": "llama"} | NO_UNKNOWN, "not usable"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_cannot_be_rebuilt(how):
    metadata, told = REFUSED[how]
    with pytest.raises(InputError, match=told) as refusal:
        rebuild_tokenizer(prefixed(metadata))
    assert "\n" not in str(refusal.value)
