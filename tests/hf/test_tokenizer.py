"""Both kinds of tokenizer give the ids of transformers, and the text back."""
import json
import shutil
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
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


# ---------------------------------------------------------------- rebuilt from a GGUF file

# Every family's own cut of text, as its published tokenizer.json has it (Llama 3, Qwen2) or its class (GPT-2: ByteLevel's own).
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = [
    "The cat's mat, the dog's mat; we're 12 345 67890. I'LL say: naïve café", "def f(x):\n    return  x\r\n\n\t# 123 456 789\n" * 2,
    "你好，世界 مرحبا 안녕 😀👩\u200d👧 1234567", "word   word    word \n \n  end.", "<|im_start|>user\nHello<|im_end|>",
]  # fmt: skip
HARDER = AWKWARD[:-1] + SPACES + CORPUS + [
    "I'M IT'S we'Ll", "1234 12 ١٢٣ ½ ²", "...\n\n!!\r\n", "a\u00a0b\u2003c",
    "e\u0301 \u00e9 \u1100\u1161\u11a8 각", "ꦗꦮ 𐍈 \U0001f468\u200d\U0001f469",
]  # fmt: skip


def train(vocab_size, special, pre_tokenizer=None):
    """(vocabulary, merges) of a byte-level BPE trained on CORPUS, special tokens last as in Llama 3 and Qwen2."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"] | {token: len(model["vocab"]) + i for i, token in enumerate(special)}, [tuple(m) for m in model["merges"]]


def gguf_metadata(vocab, merges, pre, types, **more):
    tokens = sorted(vocab, key=vocab.get)
    known = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": [types.get(t, 1) for t in tokens]}
    known["merges"] = [" ".join(m) for m in merges]
    return {f"tokenizer.ggml.{key}": value for key, value in (known | more).items()}


def whole(pattern):
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def stock_of(family, vocab, merges, special):
    """The same tokenizer through transformers: its class where one has the family's cut, else a tokenizer.json in the published form."""
    if family in ("gpt-2", "qwen2"):
        stock = {"gpt-2": GPT2Tokenizer, "qwen2": Qwen2Tokenizer}[family](vocab=vocab, merges=merges)
    else:
        bpe = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
        bpe.pre_tokenizer, bpe.decoder = whole(LLAMA3), decoders.ByteLevel()
        bos = special[0]
        template = processors.TemplateProcessing(single=f"{bos}:0 $A:0", pair=None, special_tokens=[(bos, vocab[bos])])
        bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
        stock = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos)
    stock.add_special_tokens({"additional_special_tokens": special})
    return stock


SPECIAL = {
    "gpt-2": ["<|endoftext|>"], "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama-bpe": ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>"],
}  # fmt: skip


@pytest.mark.parametrize("family", SPECIAL)
def test_gguf_byte_level_bpe(tmp_path, family):
    special = SPECIAL[family]
    vocab, merges = train(400, special)
    stock = stock_of(family, vocab, merges, special)
    more = {"bos_token_id": vocab[special[0]], "eos_token_id": vocab[special[-1]]}
    ours = tokenizer.from_gguf(gguf_metadata(vocab, merges, family, dict.fromkeys(special, 3), **more))
    for text in HARDER + [f"a{token} b{token}" for token in special]:
        assert ours.encode(text) == stock.encode(text, add_special_tokens=False), text
        assert ours.decode(ours.encode(text)) == (unicodedata.normalize("NFC", text) if family == "qwen2" else text)
    assert ours.vocab_size == len(stock) == len(vocab)
    assert ours.bos_id == (vocab[special[0]] if family == "llama-bpe" else None)
    for name, content in ours.files.items():
        (tmp_path / name).write_bytes(content)
    again, theirs = tokenizer.load(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again.bos_id == ours.bos_id and again.encode_batch(HARDER) == [theirs.encode(t, add_special_tokens=False) for t in HARDER]
    assert theirs("cat").input_ids == [ours.bos_id] * (family == "llama-bpe") + ours.encode("cat")


def test_gguf_families_differ():
    """What a wrong pre-tokenizer would do: other ids, without any error."""
    vocab, merges = train(400, [])
    every = [tokenizer.from_gguf(gguf_metadata(vocab, merges, family, {}, add_bos_token=False)) for family in tokenizer.PRE_TOKENIZERS]
    ids = [ours.encode_batch(CORPUS) for ours in every]
    assert all(a != b for i, a in enumerate(ids) for b in ids[:i])


def test_gguf_llama_3_takes_a_whole_word_without_its_merges():
    """Some of Llama 3's tokens cannot be reached by merges: its tokenizer.json has ignore_merges."""
    vocab, merges = train(300, ["Ġunreachable"])
    ours = tokenizer.from_gguf(gguf_metadata(vocab, merges, "llama-bpe", {}, add_bos_token=False))
    assert ours.encode(" unreachable") == [vocab["Ġunreachable"]] and len(ours.encode(" unreachables")) > 1


@pytest.mark.parametrize("add, bos", [(True, 300), (False, None), (None, None)])
def test_gguf_bos(add, bos):
    vocab, merges = train(300, ["<|begin|>", "<tool>"])
    more = {"bos_token_id": 300} | ({} if add is None else {"add_bos_token": add})
    ours = tokenizer.from_gguf(gguf_metadata(vocab, merges, "qwen2", {"<|begin|>": 3, "<tool>": 4}, **more))
    assert ours.bos_id == bos and ours.encode("a<tool>b")[1] == 301  # a user-defined token is one token, though not a control token
    sentences = tokenizer.from_gguf(SENTENCEPIECE | ({} if add is None else {"tokenizer.ggml.add_bos_token": add}))
    assert sentences.bos_id == (None if add is False else 1)


def sentencepiece_metadata(model):
    """A tokenizer.model as llama.cpp's converter writes it into a GGUF file."""
    ids = range(model.vocab_size())
    kinds = [6 if model.is_byte(i) else 3 if model.is_control(i) else 2 if model.is_unknown(i) else 1 for i in ids]
    known = {"model": "llama", "pre": "default", "tokens": [model.id_to_piece(i) for i in ids], "token_type": kinds}
    known |= {"scores": [model.get_score(i) for i in ids]}
    known |= {"bos_token_id": model.bos_id(), "eos_token_id": model.eos_id(), "unknown_token_id": model.unk_id()}
    return {f"tokenizer.ggml.{key}": value for key, value in known.items()}


SENTENCEPIECE = sentencepiece_metadata(sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model")))


def test_gguf_sentencepiece(sp, tmp_path):
    ours = tokenizer.from_gguf(SENTENCEPIECE)
    for text in HARDER + AWKWARD + ["<s>", "</s> and more", "<unk>", "<0x0A>"]:
        assert ours.encode(text) == sp.encode(text), text
        assert ours.decode(ours.encode(text)) == text
    assert (ours.vocab_size, ours.bos_id) == (sp.vocab_size, sp.bos_id)
    rebuilt = sentencepiece.SentencePieceProcessor(model_proto=ours.files["tokenizer.model"])
    assert (rebuilt.bos_id(), rebuilt.eos_id(), rebuilt.unk_id(), rebuilt.pad_id()) == (1, 2, 0, -1)
    for name, content in ours.files.items():
        (tmp_path / name).write_bytes(content)
    assert tokenizer.load(tmp_path).encode_batch(HARDER) == sp.encode_batch(HARDER)


def test_gguf_sentencepiece_with_user_defined_tokens():
    """Added tokens, as chat models have: longest match before anything is merged, as SentencePiece itself does."""
    metadata = {key: list(value) if isinstance(value, list) else value for key, value in SENTENCEPIECE.items()}
    for key, value in (("tokens", "<tool>"), ("scores", -1000.0), ("token_type", 4)):
        metadata[f"tokenizer.ggml.{key}"].append(value)
    ours = tokenizer.from_gguf(metadata)
    ids = ours.encode("say <tool> now")
    assert ours.vocab_size == 2049 and 2048 in ids and ours.decode(ids) == "say <tool> now"


REFUSED = {
    "pre": ({"model": "gpt2", "pre": "tekken"}, "'gpt2'.*'tekken'"),
    "default": ({"model": "gpt2", "pre": "default"}, "'default'"),  # written when the converter did not know the family
    "no pre": ({"model": "gpt2"}, "pre-tokenizer None"),
    "kind": ({"model": "t5", "pre": "default"}, "'t5'"),
    "none": ({}, "GGUF tokenizer None"),
    "no tokens": ({"model": "gpt2", "pre": "qwen2"}, "tokenizer.ggml.tokens is missing"),
    "no scores": ({"model": "llama", "tokens": ["a"]}, "tokenizer.ggml.scores is missing"),
    "scores of no use": ({"model": "llama", "tokens": ["<unk>", "a", "b"], "scores": [-1000.0] * 3, "token_type": [2, 1, 1]}, "no scores"),
    "no unknown piece": ({"model": "llama", "tokens": ["a", "b", "c"], "scores": [0.0, -1.0, -2.0], "token_type": [1] * 3}, "not usable"),
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSED)
def test_gguf_tokenizer_that_cannot_be_rebuilt(how):
    metadata, told = REFUSED[how]
    with pytest.raises(UserError, match=told) as refusal:
        tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------- the published form of each family


def write(folder, **files):
    """write(folder, tokenizer_config={...}, ...): each keyword a .json file (merges a .txt)."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / (name + (".txt" if name == "merges" else ".json"))
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def llama3(vocab, merges, special):
    """tokenizer.json and tokenizer_config.json in the form of Llama 3's."""
    stock = stock_of("llama-bpe", vocab, merges, special)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[1]}
    return {"tokenizer": stock.backend_tokenizer.to_str(), "tokenizer_config": settings}


def qwen2(vocab, merges, special):
    settings = {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "bos_token": None, "eos_token": special[0]}
    return {"tokenizer": stock_of("qwen2", vocab, merges, special).backend_tokenizer.to_str(), "tokenizer_config": settings}


def smollm2(vocab, merges, special):
    bpe = tokenizers.Tokenizer(models.BPE(vocab, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(special)
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "bos_token": special[0], "eos_token": special[0]}
    return {"tokenizer": bpe.to_str(), "tokenizer_config": settings}


def mistral(vocab, merges, special):
    """The tokenizer.json that comes beside Mistral's and LLaMA 2's tokenizer.model: SentencePiece's BPE in the library's terms."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    merges = [m if isinstance(m, tuple) else tuple(m) for m in generate_merges(vocab)]
    bpe = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {"tokenizer": bpe.to_str(), "tokenizer_config": settings}


FAMILIES = {  # how the files are made, the control tokens, the one that a text begins with
    "llama 3": (llama3, SPECIAL["llama-bpe"], "<|begin_of_text|>"), "qwen2": (qwen2, SPECIAL["qwen2"], None),
    "smollm2": (smollm2, SPECIAL["qwen2"], None), "mistral": (mistral, ["<s>", "</s>"], "<s>"),
}  # fmt: skip


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
    for token in special:  # text that spells a control token becomes it, as in transformers: the file cannot tell the two apart
        assert ours.encode(f"a{token}b") == stock.encode(f"a{token}b", add_special_tokens=False)
        assert stock.convert_tokens_to_ids(token) in ours.encode(f"a{token}b")


@pytest.mark.parametrize("wanted", [True, False, None])
@pytest.mark.parametrize("template", TEMPLATES)
def test_json_template_stands_above_add_bos_token(tmp_path, template, wanted):
    """As in transformers 5. (In a tokenizer.model there is no template, so add_bos_token decides.)"""
    make_bpe(template).save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"} | ({} if wanted is None else {"add_bos_token": wanted})
    write(tmp_path, tokenizer_config=settings)
    stock = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (tokenizer.load(tmp_path).bos_id == 1) == (stock("cat").input_ids[0] == 1)


def test_baichuan_begins_with_nothing(tmp_path):
    """Its tokenizer.model has a <s>, its tokenizer_config.json (with tokens as objects) says that no text begins with it."""
    bos = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": True}
    write(tmp_path, tokenizer_config={"tokenizer_class": "BaichuanTokenizer", "add_bos_token": False, "bos_token": bos})
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    assert tokenizer.load(tmp_path).bos_id is None


def test_both_files(sp, tmp_path):
    """tokenizer.model and a tokenizer.json with tokens added to it: SentencePiece reads, the added ones stay text and decode to nothing."""
    files = mistral(None, None, None)
    bpe = tokenizers.Tokenizer.from_str(files["tokenizer"])
    bpe.add_special_tokens(["<|added|>"])
    write(tmp_path, tokenizer=bpe.to_str(), tokenizer_config=files["tokenizer_config"], added_tokens={"<|added|>": 2048})
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    ours = tokenizer.load(tmp_path)
    assert bpe.encode("<|added|>", add_special_tokens=False).ids == [2048]
    for text in HARDER + ["a<|added|>b", "<s>a</s>"]:
        assert ours.encode(text) == sp.encode(text) and ours.decode(ours.encode(text)) == text
    for text in HARDER:  # elsewhere the two files agree
        assert ours.encode(text) == bpe.encode(text, add_special_tokens=False).ids, text
    assert (ours.vocab_size, ours.bos_id) == (2048, 1) and ours.decode([*ours.encode("cat"), 2048]) == "cat"


def test_vocabulary_and_merges_alone(tmp_path):
    """How such a folder cuts text depends on code that it does not hold."""
    write(tmp_path, vocab={"a": 0}, merges="", tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    with pytest.raises(UserError, match="no tokenizer.model or tokenizer.json; save a tokenizer.json there"):
        tokenizer.load(tmp_path)
