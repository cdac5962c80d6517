"""Both kinds of tokenizer give the ids of transformers, and the text back."""

import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_files import AWKWARD, HARDER, SPACES, SPECIAL, TINY, stock_of, train, write_files
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from hf import tokenizer
from storage.errors import InputError

# ---------------------------------------------------------------- SentencePiece


def tiny_vocabulary():
    """Return {piece: id} of the tiny model's tokenizer.model."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    return {model.id_to_piece(i): i for i in range(model.vocab_size())}


@pytest.fixture(scope="module")
def stock_llama():
    """transformers' LlamaTokenizer of the same pieces (it reads tokenizer.model only with protobuf)."""
    vocab = tiny_vocabulary()
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
    """SentencePiece puts a space before every text, transformers since 5 only before one without a space.

    So it loses the space of the others and is given two.
    """
    assert sp.encode(text) == stock_llama.encode(" " + text, add_special_tokens=False)
    assert sp.decode(sp.encode(text)) == text


def test_sentencepiece_never_makes_control_tokens_of_text(sp):
    for text in ("<s>", "</s> and more", "<unk>", "<0x0A>"):
        assert not {0, 1, 2} & set(sp.encode(text))
        assert sp.decode(sp.encode(text)) == text


def test_sentencepiece_interface(sp):
    stock = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    config = json.loads((TINY / "config.json").read_text())
    assert sp.vocab_size == stock.vocab_size() == config["vocab_size"]
    assert all(0 <= i < sp.vocab_size for text in AWKWARD for i in sp.encode(text))
    assert sp.bos_id == stock.bos_id() == 1
    assert sp.files == {p.name: p.read_bytes() for p in TINY.iterdir() if "token" in p.name}


@pytest.mark.parametrize(
    "settings, bos", [(None, 1), ({}, 1), ({"add_bos_token": True}, 1), ({"add_bos_token": False}, None)]
)
def test_sentencepiece_bos(tmp_path, settings, bos):
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert tokenizer.load(tmp_path).bos_id == bos


# ---------------------------------------------------------------- tokenizer.json

BEGIN = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
BEGIN_AND_END = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
END = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
TEMPLATES = {  # a post-processor, and the id that texts begin with
    "none": (None, None),
    "bos": (BEGIN, 1),
    "bos_eos": (BEGIN_AND_END, 1),
    "eos": (END, None),
    "llama3": (processors.Sequence([processors.ByteLevel(trim_offsets=False), BEGIN]), 1),
}


def make_bpe(template="none"):
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special, alphabet = ["<unk>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    texts = ["the cat sat on the mat", "The pass key is 12345.\n\n  Remember it, 你好 😀"]
    bpe.train_from_iterator(texts * 3, trainer)
    if TEMPLATES[template][0]:
        bpe.post_processor = TEMPLATES[template][0]
    return bpe


@pytest.fixture(params=TEMPLATES)
def pair(request, tmp_path):
    """A folder with tokenizer.json, read here and by transformers."""
    make_bpe(request.param).save(str(tmp_path / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    stock = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **special)
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
    token = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    token |= {"id": 400, "content": "<tool>", "special": True}
    content["model"]["vocab"]["<tool>"] = 400
    content["added_tokens"].append(token)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ours = tokenizer.load(tmp_path)
    assert ours.encode("a<tool>")[-1] == 400 and ours.vocab_size == 401


def test_json_ignores_truncation_and_padding(tmp_path):
    """Some folders have both switched on in tokenizer.json. A plain call of transformers cuts no text."""
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
    text = "The cat sat, 12345.\n"
    ids = either.encode(text)
    assert either.decode(np.array(ids, dtype=np.uint16)) == text
    assert either.decode(torch.tensor(ids)) == text


def test_files_travel(either, tmp_path):
    """A folder made of `files` alone is the same tokenizer."""
    (tmp_path / "copy").mkdir()
    write_files(tmp_path / "copy", either.files)
    copy = tokenizer.load(tmp_path / "copy")
    assert copy.encode_batch(AWKWARD) == either.encode_batch(AWKWARD)
    assert (copy.bos_id, copy.vocab_size, copy.files) == (either.bos_id, either.vocab_size, either.files)


def test_all_files_of_a_tokenizer_travel(tmp_path):
    make_bpe().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ messages }}")
    (tmp_path / "special_tokens_map.json").write_bytes(b"{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights are not the tokenizer's")
    expected = {"tokenizer.json", "chat_template.jinja", "special_tokens_map.json"}
    assert set(tokenizer.load(tmp_path).files) == expected


# ---------------------------------------------------------------- what comes token by token


def streamed(tok, ids, starts_text=True):
    """Return the pieces of text in which a Detokenizer gives the ids, and what it held back last."""
    detokenizer = tokenizer.Detokenizer(tok, starts_text)
    return [*(detokenizer.add(i) for i in ids), detokenizer.rest()]


@given(st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pieces_joined_are_the_text_of_all_ids(either, data):
    """Whatever the ids: spaces, control tokens, bytes that are no UTF-8, ids without a piece.

    Behind another text they are what they add to it.
    """
    texts = st.text(max_size=8).map(either.encode)
    single = st.integers(0, either.vocab_size - 1).map(lambda i: [i])
    a_few = st.integers(0, 20).map(lambda i: [i])  # control tokens, bytes
    ids = sum(data.draw(st.lists(st.one_of(texts, single, a_few), max_size=12)), [])
    if "tokenizer.model" in either.files and data.draw(st.booleans()):
        ids.insert(data.draw(st.integers(0, len(ids))), either.vocab_size)  # an added token or padding
    assert "".join(streamed(either, ids)) == either.decode(ids)
    before = either.encode(data.draw(st.text(max_size=5)) + "x")
    assert either.decode(before) + "".join(streamed(either, ids, False)) == either.decode(before + ids)


@pytest.mark.parametrize("text", HARDER, ids=lambda t: ascii(t[:12]))
def test_pieces_hold_whole_characters(either, tmp_path, text):
    """They come as soon as a character is whole, and hold no part of one.

    So it is for the tokenizer.json of Mistral and LLaMA 2, too, which falls back on bytes.
    """
    write(tmp_path, **mistral(None, None, None))
    for tok in (either, tokenizer.load(tmp_path)):
        ids = tok.encode(text[:200])
        pieces = streamed(tok, ids)
        assert "".join(pieces) == text[:200] and "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
        for i, piece in enumerate(pieces[:-1], 1):
            if piece == "":
                assert tok.decode(ids[:i]) == "" or tok.decode(ids[:i]).endswith("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize(
    "content, expected",
    [
        (None, [7]),
        ({}, [7]),
        ({"eos_token_id": None}, [7]),
        ({"eos_token_id": 2}, [2]),
        ({"eos_token_id": [2, 5]}, [2, 5]),
    ],
)
def test_stop_ids_are_those_of_generation_config(sp, content, expected):
    files = {} if content is None else {"generation_config.json": json.dumps(content).encode()}
    tok = tokenizer.SentencePiece(sp.files | files)
    assert tokenizer.stop_ids(tok, SimpleNamespace(eos_token_id=7)) == expected
    assert tokenizer.stop_ids(tok, SimpleNamespace(eos_token_id=[7])) == expected
    none = tokenizer.stop_ids(tok, SimpleNamespace(eos_token_id=None))
    assert none == ([] if expected == [7] else expected)


@pytest.mark.parametrize("eos", ["2", True, [2, "5"], 2.0, {}, [[2]], 2**63, [2, -(2**64)]], ids=repr)
def test_stop_ids_that_are_none(sp, eos):
    tok = tokenizer.SentencePiece(
        sp.files | {"generation_config.json": json.dumps({"eos_token_id": eos}).encode()}
    )
    with pytest.raises(InputError, match="generation_config.json: eos_token_id"):
        tokenizer.stop_ids(tok, SimpleNamespace(eos_token_id=7))


# ---------------------------------------------------------------- which tokens are in a span


@pytest.mark.parametrize(
    "text",
    ["BytesWarning", *(text[:300] for text in HARDER if not text.startswith(" "))],
    ids=lambda t: ascii(t[:12]),
)
def test_tokens_in_a_span_are_those_of_the_tokenizers_library(sp, tmp_path, text):
    """Wherever its edge is, also inside a word. That library knows where in a text each token is."""
    write(tmp_path, **mistral(None, None, None))
    stock = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    encoded = stock.encode(text, add_special_tokens=False)
    for cut in range(len(text) + 1):
        for begin, end in ((0, cut), (cut, len(text)), (cut - 1, cut + 2)):
            ids, inside = sp.encode_with_spans(text, [(begin, end)])
            expected = [last > begin and first < end for first, last in encoded.offsets]
            assert (ids, inside.tolist()) == (encoded.ids, expected), (begin, end)


@pytest.mark.parametrize("is_suffix", [False, True])
def test_tokens_in_a_span_where_spaces_at_the_end_are_left_out(is_suffix):
    """As SentencePiece's own defaults are. Each character of this text is a token, even a full-width one.

    A space is put before it, or behind it.
    """
    text, trained = "The ｃat sat on the mat.", io.BytesIO()
    options = {"model_type": "char", "vocab_size": 30, "hard_vocab_limit": False, "minloglevel": 2}
    options["treat_whitespace_as_suffix"] = is_suffix
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter([text]), model_writer=trained, **options)
    tok = tokenizer.SentencePiece({"tokenizer.model": trained.getvalue()})
    assert len(tok.encode(text)) == 1 + len(text)
    for cut in range(1, len(text)):
        _, inside = tok.encode_with_spans(text, [(cut, len(text))])
        before = cut if is_suffix else 1 + cut
        assert inside.tolist() == [False] * before + [True] * (1 + len(text) - before)


# ---------------------------------------------------------------- broken files

BROKEN = {
    "empty": b"",
    "junk": b"junk" * 50,
    "git_lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:9e556afd44213b6b\nsize 499723\n",
    "half": None,
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_broken_file(tmp_path, name, how):
    content = BROKEN[how]
    if how == "half":
        whole = (TINY / name).read_bytes() if name == "tokenizer.model" else make_bpe().to_str().encode()
        content = whole[: len(whole) // 2]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        tokenizer.load(tmp_path)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_a_panic_of_the_library_is_one_line(tmp_path, capfd):
    """Its template names a token that it does not define: the library panics, and prints a trace itself."""
    bpe = make_bpe()
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}]}
    template |= {"pair": template["single"], "special_tokens": {}}
    content = json.loads(bpe.to_str()) | {"post_processor": template}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="tokenizer.json: not readable .no entry found for key"):
        tokenizer.load(tmp_path)
    assert capfd.readouterr().err == ""


def test_a_text_that_has_no_tokens(tmp_path):
    model = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="<unk>")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    assert tokenizer.load(tmp_path).encode("a") == [0]
    with pytest.raises(InputError, match="does not encode this text"):
        tokenizer.load(tmp_path).encode("é")


TIKTOKEN = b"IQ== 0\nIg== 1\nIw== 2\n"


def test_a_tiktoken_file_does_not_count(tmp_path):
    """Llama 3 has one. With a tokenizer.json beside it that is read, and both travel."""
    (tmp_path / "tokenizer.model").write_bytes(TIKTOKEN)
    with pytest.raises(InputError, match="tokenizer.model of tiktoken's; save a tokenizer.json"):
        tokenizer.load(tmp_path)
    make_bpe().save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizer.load(tmp_path)
    assert loaded.encode("The cat") == make_bpe().encode("The cat", add_special_tokens=False).ids
    assert loaded.files["tokenizer.model"] == TIKTOKEN


def test_a_bos_outside_the_vocabulary(tmp_path):
    content = json.loads(make_bpe().to_str())
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 10**6)])
    content["post_processor"] = json.loads(template.__getstate__())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = tokenizer.load(tmp_path)
    assert loaded.bos_id == 10**6
    with pytest.raises(InputError, match="has 1000001 tokens, the model only"):
        tokenizer.check_size(loaded, loaded.vocab_size, tmp_path)


@pytest.mark.parametrize("name", tokenizer.SETTINGS)
def test_broken_settings_are_named(tmp_path, name):
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    for content in ('{"add_bos_token": tr', "[]", "\xff", "[" * 100_000):
        (tmp_path / name).write_bytes(content.encode("latin-1"))
        with pytest.raises(InputError, match=name) as error:
            tokenizer.load(tmp_path)
        assert "\n" not in str(error.value)


def test_no_tokenizer(tmp_path):
    with pytest.raises(InputError, match="no tokenizer.model or tokenizer.json") as error:
        tokenizer.load(tmp_path)
    assert str(tmp_path) in str(error.value)


# ---------------------------------------------------------------- the published form of each family


def write(folder, **files):
    """write(folder, tokenizer_config={...}, ...) writes each keyword as a .json file (merges as .txt)."""
    for name, content in files.items():
        path = folder / (name + (".txt" if name == "merges" else ".json"))
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def llama3(vocab, merges, special):
    """tokenizer.json and tokenizer_config.json in the form of Llama 3's."""
    stock = stock_of("llama-bpe", vocab, merges, special)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[0],
        "eos_token": special[1],
    }
    return {"tokenizer": stock.backend_tokenizer.to_str(), "tokenizer_config": settings}


def qwen2(vocab, merges, special):
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": special[0],
    }
    stock = stock_of("qwen2", vocab, merges, special)
    return {"tokenizer": stock.backend_tokenizer.to_str(), "tokenizer_config": settings}


def smollm2(vocab, merges, special):
    bpe = tokenizers.Tokenizer(models.BPE(vocab, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(special)
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "bos_token": special[0],
        "eos_token": special[0],
    }
    return {"tokenizer": bpe.to_str(), "tokenizer_config": settings}


def mistral(vocab, merges, special):
    """Return what Mistral and LLaMA 2 have beside tokenizer.model: the same BPE as a tokenizer.json."""
    vocab = tiny_vocabulary()
    merges = [tuple(merge) for merge in generate_merges(vocab)]
    bpe = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    return {"tokenizer": bpe.to_str(), "tokenizer_config": settings}


FAMILIES = {  # how the files are made, the control tokens, the one that a text begins with
    "llama 3": (llama3, SPECIAL["llama-bpe"], "<|begin_of_text|>"),
    "qwen2": (qwen2, SPECIAL["qwen2"], None),
    "smollm2": (smollm2, SPECIAL["qwen2"], None),
    "mistral": (mistral, ["<s>", "</s>"], "<s>"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_as_published(tmp_path, family):
    make, special, bos = FAMILIES[family]
    write(tmp_path, **make(*train(400, special), special))
    ours, stock = tokenizer.load(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in HARDER:
        assert ours.encode(text) == stock.encode(text, add_special_tokens=False), text
        if family != "qwen2":  # which puts text into NFC
            assert ours.decode(ours.encode(text)) == text
    begin = stock("cat").input_ids[0]
    assert ours.bos_id == (stock.convert_tokens_to_ids(bos) if bos else None)
    assert (begin == ours.bos_id) == (bos is not None)
    for token in special:  # Text that spells a control token becomes it: the file cannot tell the two apart.
        assert ours.encode(f"a{token}b") == stock.encode(f"a{token}b", add_special_tokens=False)
        assert stock.convert_tokens_to_ids(token) in ours.encode(f"a{token}b")


@pytest.mark.parametrize("wanted", [True, False, None])
@pytest.mark.parametrize("template", TEMPLATES)
def test_json_template_stands_above_add_bos_token(tmp_path, template, wanted):
    """That is so in transformers 5. A tokenizer.model has no template, so add_bos_token decides there."""
    make_bpe(template).save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    if wanted is not None:
        settings["add_bos_token"] = wanted
    write(tmp_path, tokenizer_config=settings)
    stock = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (tokenizer.load(tmp_path).bos_id == 1) == (stock("cat").input_ids[0] == 1)


def test_baichuan_begins_with_nothing(tmp_path):
    """Its tokenizer.model has a <s>, but its tokenizer_config.json says that no text begins with it."""
    bos = {"__type": "AddedToken", "content": "<s>", "normalized": True, "single_word": True}
    bos |= {"lstrip": False, "rstrip": False}
    settings = {"tokenizer_class": "BaichuanTokenizer", "add_bos_token": False, "bos_token": bos}
    write(tmp_path, tokenizer_config=settings)
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    assert tokenizer.load(tmp_path).bos_id is None


def test_both_files(sp, tmp_path):
    """SentencePiece reads, and tokens that only tokenizer.json adds stay text and decode to nothing."""
    files = mistral(None, None, None)
    bpe = tokenizers.Tokenizer.from_str(files["tokenizer"])
    bpe.add_special_tokens(["<|added|>"])
    files |= {"tokenizer": bpe.to_str(), "added_tokens": {"<|added|>": 2048}}
    write(tmp_path, **files)
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    ours = tokenizer.load(tmp_path)
    assert bpe.encode("<|added|>", add_special_tokens=False).ids == [2048]
    for text in HARDER + ["a<|added|>b", "<s>a</s>"]:
        assert ours.encode(text) == sp.encode(text) and ours.decode(ours.encode(text)) == text
    for text in HARDER:  # elsewhere the two files agree
        assert ours.encode(text) == bpe.encode(text, add_special_tokens=False).ids, text
    assert (ours.vocab_size, ours.bos_id) == (2048, 1) and ours.decode([*ours.encode("cat"), 2048]) == "cat"


def test_a_control_token_beyond_the_vocabulary_ends_no_line(tmp_path):
    """A conversation holds such ids among words, also in token files of the smallest dtype that fits."""
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    ours = tokenizer.load(tmp_path)
    words = np.array(ours.encode("One.\n Two. Three"))
    ends = tokenizer.line_ends(ours, words)
    assert len(ends) > 2
    for dtype in (np.uint16, np.int64):
        with_control = np.insert(words, 1, 2**16 - 1).astype(dtype)
        assert tokenizer.line_ends(ours, with_control).tolist() == [0, *(ends[1:] + 1)]


def test_vocabulary_and_merges_alone(tmp_path):
    """How such a folder cuts text depends on code that it does not hold."""
    write(tmp_path, vocab={"a": 0}, merges="", tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    told = "no tokenizer.model or tokenizer.json; save a tokenizer.json there"
    with pytest.raises(InputError, match=told):
        tokenizer.load(tmp_path)
