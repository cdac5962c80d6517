"""How assets/tiny was made: a 2-million-parameter LLaMA with a window of 256 tokens that can look things up.

    python assets/make_tiny.py --data books_train.jsonl.gz latex_train.jsonl.gz gov_train.jsonl.gz --out assets/tiny

Half of each batch is text (the files of --data and Python's standard library), half synthetic records: a number is stated
among filler and asked for later, in many wordings, the passkey prompt of the paper among them. Nothing is longer than 256 tokens.
"""
import io
import random
import sys
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import errors
import tokenizer as tokenizers
import weights
from model import Config, Transformer
from prompts import GARBAGE, KEY, QUESTION, TASK

WINDOW = 256
NOUNS = "pass key,secret code,magic number,door code,room number,account number,locker number,order number,flight number,ticket number".split(",")
NAMES = "Alice,Bob,Carol,David,Emma,Frank,Grace,Henry,Irene,Jack,Karen,Louis,Maria,Nina,Oscar,Paul".split(",")


def record(rng, snippet):
    """One synthetic text: something is stated, filler follows, the statement is asked for. snippet(): a piece of real text."""
    number = "".join(rng.choice("0123456789") for _ in range(5 if rng.random() < 0.7 else rng.randint(3, 7)))
    kind = rng.random()
    if kind < 0.5:  # the passkey prompt, all lengths that fit and all depths
        lines = rng.randint(0, 6)
        before = rng.randint(0, lines)
        parts = [TASK, " ".join([GARBAGE] * before), KEY.format(key=number), " ".join([GARBAGE] * (lines - before)), f"{QUESTION} {number}"]
        return "\n".join(p for p in parts if p) + "\n"
    filler = [" ".join([GARBAGE] * rng.randint(0, 3)) if rng.random() < 0.5 else snippet() for _ in range(2)]
    if kind < 0.8:  # other nouns, other filler
        noun = rng.choice(NOUNS)
        stated = f"The {noun} is {number}. Remember it. {number} is the {noun}."
        return f"{filler[0]}\n{stated}\n{filler[1]}\nWhat is the {noun}? The {noun} is {number}.\n"
    entries = {name: rng.randint(1000, 99999) for name in rng.sample(NAMES, rng.randint(2, 6))}  # one of several keys
    asked = rng.choice(list(entries))
    table = "\n".join(f"The number of {name} is {value}." for name, value in entries.items())
    return f"{table}\n{filler[0]}\nWhat is the number of {asked}? The number of {asked} is {entries[asked]}.\n"


def synthetic_windows(n, texts, tokenizer, rng):
    """n windows of WINDOW + 1 tokens, uint16, each filled up with whole records where they fit."""

    def snippet():
        text = rng.choice(texts)
        at = rng.randrange(max(1, len(text) - 400))
        return text[at : at + rng.randint(20, 400)]

    windows = np.empty((0, WINDOW + 1), dtype=np.uint16)
    while len(windows) < n:
        rows, row = [], []
        for ids in tokenizer.encode_batch([record(rng, snippet) for _ in range(20000)]):
            if len(row) + len(ids) > WINDOW:  # never cut a record short: pad the window with real text
                row += tokenizer.encode(snippet() + "\n" + snippet())
                if len(row) > WINDOW:
                    rows.append([tokenizer.bos_id] + row[:WINDOW])
                row = []
            if len(ids) <= WINDOW:
                row += ids
        windows = np.concatenate([windows, np.array(rows, dtype=np.uint16)])
    return windows[:n]


def train_tokenizer(texts, rng, folder):
    """SentencePiece BPE with 2,048 pieces: digits split, unknown bytes kept, white space untouched."""
    sample = [t[i : i + 2000] for t in texts for i in range(0, len(t), 20000)]
    lines = [line for text in sample for line in text.split("\n") if line] + [record(rng, lambda: "") for _ in range(2000)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=2048, split_digits=True, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, character_coverage=0.999,
        max_sentence_length=100000, minloglevel=1, num_threads=1,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", '
        '"add_bos_token": true, "legacy": false}\n'
    )


def main():
    p = errors.ArgumentParser(prog="assets/make_tiny.py")
    p.add_argument("--data", nargs="+", required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--steps", type=int, default=3000)
    p.add_argument("--batch_size", type=int, default=512)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--records", type=int, default=200_000, help="synthetic windows in the pool")
    args = p.parse_args()
    rng = random.Random(0)
    files = data.find_files(args.data) + data.find_files([])
    texts = [text for path in files for text in data.read_documents(path)]
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "tokenizer.model").exists():
        train_tokenizer(texts, rng, args.out)
    tokenizer = tokenizers.load(args.out)

    pool = synthetic_windows(args.records, texts, tokenizer, rng)
    texts = data.Batches(
        data.prepare(files, tokenizer, weights.cache_dir()), 0, tokenizer.bos_id,
        method="pi", train_len=WINDOW, target_len=WINDOW, chunks=1, offset="zero",
    )  # fmt: skip
    config = Config(
        vocab_size=tokenizer.vocab_size, hidden_dim=192, intermediate_dim=512, n_layers=4, n_heads=3, n_kv_heads=3, head_dim=64,
        max_position_embeddings=WINDOW, tie_embeddings=True, bos_token_id=1, eos_token_id=2, dtype="bfloat16",
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Transformer(config)
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    began, draw = time.time(), np.random.default_rng(0)
    forward = torch.compile(model) if device == "cuda" else model
    half = args.batch_size // 2
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / 100, (args.steps - step) / args.steps)
        rows = pool[draw.integers(len(pool), size=half)].astype(np.int64)
        tokens, _, targets = texts(step, range(half))
        tokens = torch.from_numpy(np.concatenate([rows[:, :-1], tokens])).to(device)
        targets = torch.from_numpy(np.concatenate([rows[:, 1:], targets])).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = forward(tokens, targets=targets) / targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == args.steps - 1:
            print(f"step {step} loss {loss.item():.3f} {time.time() - began:.0f} s", flush=True)
    weights.save(model, tokenizer, args.out)


if __name__ == "__main__":
    errors.run(main)
