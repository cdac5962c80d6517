"""Folders with a tokenizer of each kind, and the same control tokens, for chat templates."""

import json
import shutil

from tokenizer_files import TINY, stock_of, train

ADDED = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def write_settings(folder, **changes):
    """Write a tokenizer_config.json with LLaMA's special tokens and those in ADDED. None takes a key out."""
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "add_bos_token": True}
    settings |= {"eos_token": {"__type": "AddedToken", "content": "</s>"} | flags, "unk_token": "<unk>"}
    settings["added_tokens_decoder"] = {
        str(2048 + i): {"content": token, "special": True} | flags for i, token in enumerate(ADDED)
    }
    settings = {key: value for key, value in (settings | changes).items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_sentencepiece(folder, **changes):
    """Write a tokenizer.model into a folder, to which tokenizer_config.json adds control tokens."""
    shutil.copy(TINY / "tokenizer.model", folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    write_settings(folder, **changes)


def write_byte_level(folder):
    """Write a tokenizer.json into a folder that has the same control tokens."""
    special = ["<s>", "</s>", *ADDED]
    stock = stock_of("llama-bpe", *train(500, special), special)
    stock.eos_token = "</s>"
    stock.save_pretrained(folder)
