"""Texts that are hard to tokenise, and small tokenizers of each family as transformers has them."""

import json

import tokenizers
from conftest import LLAMA3, ROOT
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

TINY = ROOT / "assets" / "tiny"
AWKWARD = [
    "", "a", "The pass key is 12345.", "0", "007 1234567890 3.14e-10", "\n", "\n\n\n", "a\n\tb\r\n c\n",
    "\t\ttabs\t", "if x:\n        return  1\n", "x ", "x    ", "naïve café e\u0301", "你好，世界",
    "😀👩\u200d👧 🇩🇪", "\x00\x01\x7f", "\u200b\u3000\ufeff", "ﬁ ½ Ⅷ", "العربية", "a" * 3000, "word " * 20000,
]  # fmt: skip
SPACES = [" ", "  ", " a", "    a", "  \n a", " " * 50 + "b"]
CORPUS = [
    "The cat's mat, the dog's mat; we're 12 345 67890. I'LL say: naïve café",
    "def f(x):\n    return  x\r\n\n\t# 123 456 789\n" * 2,
    "你好，世界 مرحبا 안녕 😀👩\u200d👧 1234567",
    "word   word    word \n \n  end.",
    "<|im_start|>user\nHello<|im_end|>",
]
HARDER = AWKWARD[:-1] + SPACES + CORPUS + [
    "I'M IT'S we'Ll", "1234 12 ١٢٣ ½ ²", "...\n\n!!\r\n", "a\u00a0b\u2003c",
    "e\u0301 \u00e9 \u1100\u1161\u11a8 각", "ꦗꦮ 𐍈 \U0001f468\u200d\U0001f469",
]  # fmt: skip
SPECIAL = {  # control tokens by the name that GGUF files have for the family
    "gpt-2": ["<|endoftext|>"],
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama-bpe": ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>"],
}


def train(vocab_size, special):
    """Return (vocabulary, merges) of a byte-level BPE trained on CORPUS. The special tokens are last."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(CORPUS * 3, trainer)
    model = json.loads(bpe.to_str())["model"]
    vocab = model["vocab"]
    for token in special:
        vocab[token] = len(vocab)
    return vocab, [tuple(merge) for merge in model["merges"]]


def stock_of(family, vocab, merges, special):
    """Return transformers' tokenizer: of the family's class, or of a tokenizer.json as it is published."""
    if family == "gpt-2":
        stock = GPT2Tokenizer(vocab=vocab, merges=merges)
    elif family == "qwen2":
        stock = Qwen2Tokenizer(vocab=vocab, merges=merges)
    else:
        bpe = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
        split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
        bpe.decoder = decoders.ByteLevel()
        bos = special[0]
        template = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=None, special_tokens=[(bos, vocab[bos])]
        )
        bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
        stock = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos)
    stock.add_special_tokens({"additional_special_tokens": special})
    return stock


def write_files(folder, files):
    """Write {name: bytes} into a folder."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
