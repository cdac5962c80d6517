"""Both kinds of tokenizer give the ids of transformers, and the text back."""
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

import tokenizer
from errors import UserError

TINY = Path(__file__).parent.parent / "assets" / "tiny"
AWKWARD = [
    "", "a", "The pass key is 12345.", "0", "007 1234567890 3.14e-10", "\n", "\n\n\n", "a\n\tb\r\n c\n", "\t\ttabs\t",
    "if x:\n        return  1\n", "x ", "x    ", "naïve café e\u0301", "你好，世界", "😀👩\u200d👧 🇩🇪",
    "\x00\x01\x7f", "\u200b\u3000\ufeff", "ﬁ ½ Ⅷ", "العربية", "a" * 3000, "word " * 20000,
]  # fmt: skip
SPACES = [" ", "  ", " a", "    a", "  \n a", " " * 50 + "b"]


# ---------------------------------------------------------------- SentencePiece


@pytest.fixture(scope="module")
def stock_llama():
    """transformers' LlamaTokenizer from the pieces of tokenizer.model (it would itself read the file only with protobuf installed)."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    return LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab))


@pytest.fixture(scope="module")
def sp():
    return tokenizer.load(TINY)


@pytest.mark.parametrize("text", AWKWARD, ids=lambda t: ascii(t[:12]))
def test_sentencepiece_ids(sp, stock_llama, text):
    assert sp.encode(text) == stock_llama.encode(text, add_special_tokens=False)
    assert sp.decode(sp.encode(text)) == text


@pytest.mark.parametrize("text", SPACES, ids=ascii)
def test_sentencepiece_keeps_leading_spaces(sp, stock_llama, text):
    """SentencePiece puts a space before every text; transformers >= 5 only before one that has none, and so loses it: give it two."""
    assert sp.encode(text) == stock_llama.encode(" " + text, add_special_tokens=False)
    assert sp.decode(sp.encode(text)) == text


def test_sentencepiece_never_makes_control_tokens_of_text(sp):
    for text in ("<s>", "</s> and more", "<unk>", "<0x0A>"):
        assert not {0, 1, 2} & set(sp.encode(text))
        assert sp.decode(sp.encode(text)) == text


def test_sentencepiece_interface(sp):
    stock = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    assert sp.vocab_size == stock.vocab_size() == json.loads((TINY / "config.json").read_text())["vocab_size"]
    assert all(0 <= i < sp.vocab_size for text in AWKWARD for i in sp.encode(text))
    assert sp.bos_id == stock.bos_id() == 1
    assert sp.files == {p.name: p.read_bytes() for p in TINY.iterdir() if "token" in p.name}


@pytest.mark.parametrize("settings, bos", [(None, 1), ({}, 1), ({"add_bos_token": True}, 1), ({"add_bos_token": False}, None)])
def test_sentencepiece_bos(tmp_path, settings, bos):
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert tokenizer.load(tmp_path).bos_id == bos


# ---------------------------------------------------------------- tokenizer.json

TEMPLATES = {
    "none": (None, None),
    "bos": (processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]), 1),
    "bos_eos": (processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]), 1),
    "eos": (processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)]), None),
    "llama3": (
        processors.Sequence(
            [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])]
        ),
        1,
    ),
}


def make_bpe(template="none"):
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special, alphabet = ["<unk>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["the cat sat on the mat", "The pass key is 12345.\n\n  Remember it, 你好 😀"] * 3, trainer)
    if TEMPLATES[template][0]:
        bpe.post_processor = TEMPLATES[template][0]
    return bpe


@pytest.fixture(params=TEMPLATES)
def pair(request, tmp_path):
    """A folder with tokenizer.json, read here and by transformers."""
    make_bpe(request.param).save(str(tmp_path / "tokenizer.json"))
    stock = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return tokenizer.load(tmp_path), stock, TEMPLATES[request.param][1]


def test_json_ids(pair):
    ours, stock, _ = pair
    for text in AWKWARD + SPACES + ["<s>", "</s> and more"]:
        assert ours.encode(text) == stock.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == text


def test_json_interface(pair, tmp_path):
    ours, stock, bos = pair
    assert ours.vocab_size == len(stock)
    assert ours.files == {"tokenizer.json": (tmp_path / "tokenizer.json").read_bytes()}
    # The token a text begins with, as transformers adds it; an end token alone is none.
    begins_with_bos = stock("cat").input_ids[0] == stock.bos_token_id
    assert ours.bos_id == bos == (stock.bos_token_id if begins_with_bos else None)


def test_json_counts_tokens_added_with_a_gap(tmp_path):
    """An added token beyond the model's own vocabulary: the largest id decides, not the number of tokens."""
    content = json.loads(make_bpe().to_str())
    token = {"id": 400, "content": "<tool>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["model"]["vocab"]["<tool>"] = 400
    content["added_tokens"].append(token)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ours = tokenizer.load(tmp_path)
    assert ours.encode("a<tool>")[-1] == 400 and ours.vocab_size == 401


def test_json_ignores_truncation_and_padding(tmp_path):
    """Some folders come with both switched on in tokenizer.json. transformers switches them off for a plain call: no text is cut."""
    bpe = make_bpe()
    bpe.enable_truncation(16)
    bpe.enable_padding(length=32, pad_id=0, pad_token="<unk>")
    bpe.save(str(tmp_path / "tokenizer.json"))
    stock = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ours = tokenizer.load(tmp_path)
    for text in ("", "a", "the cat " * 100):
        assert ours.encode(text) == stock.encode(text, add_special_tokens=False)
        assert ours.encode_batch([text, "a"])[0] == stock.encode(text, add_special_tokens=False)
    assert ours.bos_id is None


# ---------------------------------------------------------------- both


@pytest.fixture(params=["tokenizer.model", "tokenizer.json"])
def either(request, sp, tmp_path):
    if request.param == "tokenizer.model":
        return sp
    make_bpe("bos").save(str(tmp_path / "tokenizer.json"))
    return tokenizer.load(tmp_path)


def test_a_batch_is_its_texts_one_by_one(either):
    texts = AWKWARD + SPACES
    assert either.encode_batch(texts) == [either.encode(text) for text in texts]
    assert either.encode_batch([]) == []


def test_decode_takes_ids_of_numpy_and_torch(either):
    import numpy
    import torch

    ids = either.encode("The cat sat, 12345.\n")
    assert either.decode(numpy.array(ids, dtype=numpy.uint16)) == either.decode(torch.tensor(ids)) == "The cat sat, 12345.\n"


def test_files_travel(either, tmp_path):
    """A folder made of `files` alone is the same tokenizer."""
    (tmp_path / "copy").mkdir()
    for name, content in either.files.items():
        (tmp_path / "copy" / name).write_bytes(content)
    copy = tokenizer.load(tmp_path / "copy")
    assert copy.encode_batch(AWKWARD) == either.encode_batch(AWKWARD)
    assert (copy.bos_id, copy.vocab_size, copy.files) == (either.bos_id, either.vocab_size, either.files)


def test_all_files_of_a_tokenizer_travel(tmp_path):
    make_bpe().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ messages }}")
    (tmp_path / "special_tokens_map.json").write_bytes(b"{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights are not the tokenizer's")
    assert set(tokenizer.load(tmp_path).files) == {"tokenizer.json", "chat_template.jinja", "special_tokens_map.json"}


# ---------------------------------------------------------------- broken files

GIT_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:9e556afd44213b6bd1be2b850ebbbd98\nsize 499723\n"


@pytest.mark.parametrize("content", [b"", b"junk" * 50, GIT_LFS, "half"], ids=["empty", "junk", "git_lfs", "half"])
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_broken_file(tmp_path, name, content):
    if content == "half":
        whole = (TINY / name).read_bytes() if name == "tokenizer.model" else make_bpe().to_str().encode()
        content = whole[: len(whole) // 2]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        tokenizer.load(tmp_path)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_broken_settings_are_named(tmp_path):
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": tr')
    with pytest.raises(UserError, match="tokenizer_config.json"):
        tokenizer.load(tmp_path)


def test_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.model or tokenizer.json") as error:
        tokenizer.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_gguf_tokenizer_that_is_not_known():
    with pytest.raises(UserError, match="'llama'.*'default'"):
        tokenizer.from_gguf({"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"})
