"""How assets/tiny was made: a 2-million-parameter LLaMA with a window of 256 tokens that can look things up.

    python assets/make_tiny.py --data books_train.jsonl.gz latex_train.jsonl.gz --out assets/tiny

Half of each batch is text (the files of --data and Python's standard library). The other half is synthetic
records: a number is stated among filler and asked for later, in many wordings, the passkey prompt of the
paper among them. Nothing is longer than 256 tokens.
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
from cli import arguments, process
from hf import tokenizer as tokenizers
from hf import weights
from model import Config, Transformer
from storage.files import cache_dir
from storage.texts import find_files, read_texts
from tasks.prompts import GARBAGE, PASSKEY, PASSKEY_QUESTION, PASSKEY_TASK

WINDOW = 256
NOUNS = (
    "pass key", "secret code", "magic number", "door code", "room number", "account number", "locker number",
    "order number", "flight number", "ticket number",
)  # fmt: skip
NAMES = (
    "Alice", "Bob", "Carol", "David", "Emma", "Frank", "Grace", "Henry",
    "Irene", "Jack", "Karen", "Louis", "Maria", "Nina", "Oscar", "Paul",
)  # fmt: skip
TOKENIZER_CONFIG = (
    '{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", '
    '"add_bos_token": true, "legacy": false}\n'
)


# ---------------------------------------------------------------- synthetic records


def record(rng, snippet):
    """Return one synthetic text: something is stated, filler follows, and the statement is asked for.

    rng: a random.Random. snippet(): returns a piece of real text.
    """
    n_digits = 5 if rng.random() < 0.7 else rng.randint(3, 7)
    number = "".join(rng.choice("0123456789") for _ in range(n_digits))
    kind = rng.random()
    if kind < 0.5:
        return passkey_record(rng, number)
    filler = [" ".join([GARBAGE] * rng.randint(0, 3)) if rng.random() < 0.5 else snippet() for _ in range(2)]
    if kind < 0.8:
        noun = rng.choice(NOUNS)
        stated = f"The {noun} is {number}. Remember it. {number} is the {noun}."
        return f"{filler[0]}\n{stated}\n{filler[1]}\nWhat is the {noun}? The {noun} is {number}.\n"
    return table_record(rng, filler[0])


def passkey_record(rng, number):
    """Return the passkey prompt with its answer, at any of the lengths that fit and at any depth."""
    n_lines = rng.randint(0, 6)
    before = rng.randint(0, n_lines)
    parts = [
        PASSKEY_TASK,
        " ".join([GARBAGE] * before),
        PASSKEY.format(key=number),
        " ".join([GARBAGE] * (n_lines - before)),
        f"{PASSKEY_QUESTION} {number}",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def table_record(rng, filler):
    """Return a table of names with numbers, filler, and a question for one of them."""
    entries = {name: rng.randint(1000, 99999) for name in rng.sample(NAMES, rng.randint(2, 6))}
    asked = rng.choice(list(entries))
    table = "\n".join(f"The number of {name} is {value}." for name, value in entries.items())
    question = f"What is the number of {asked}? The number of {asked} is {entries[asked]}."
    return f"{table}\n{filler}\n{question}\n"


def synthetic_windows(n, texts, tokenizer, rng):
    """Return n windows of whole records, uint16 (n, WINDOW + 1), filled up with real text."""

    def snippet():
        text = rng.choice(texts)
        start = rng.randrange(max(1, len(text) - 400))
        return text[start : start + rng.randint(20, 400)]

    windows = []
    while len(windows) < n:
        window = []
        for ids in tokenizer.encode_batch([record(rng, snippet) for _ in range(20000)]):
            if len(window) + len(ids) > WINDOW:  # a record is never cut short: real text fills the window
                window += tokenizer.encode(snippet() + "\n" + snippet())
                if len(window) > WINDOW:
                    windows.append([tokenizer.bos_id] + window[:WINDOW])
                window = []
            if len(ids) <= WINDOW:
                window += ids
    return np.array(windows[:n], dtype=np.uint16)


# ---------------------------------------------------------------- tokenizer and model


def train_tokenizer(texts, rng, folder):
    """Write a SentencePiece BPE with 2,048 pieces.

    Digits are split, unknown bytes are kept, white space is untouched.
    """
    samples = [text[i : i + 2000] for text in texts for i in range(0, len(text), 20000)]
    lines = [line for sample in samples for line in sample.split("\n") if line]
    lines += [record(rng, lambda: "") for _ in range(2000)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=2048,
        split_digits=True,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.999,
        max_sentence_length=100000,
        minloglevel=1,
        num_threads=1,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(TOKENIZER_CONFIG)


def make_model(tokenizer, device):
    """Return the model with random weights."""
    config = Config(
        vocab_size=tokenizer.vocab_size,
        hidden_dim=192,
        intermediate_dim=512,
        n_layers=4,
        n_heads=3,
        n_kv_heads=3,
        head_dim=64,
        max_position_embeddings=WINDOW,
        tie_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = Transformer(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.to(device)


def train(model, pool, batches, args, device):
    """Train on batches whose first half are windows of the pool and whose second half is text."""
    settings = {"betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, **settings)
    forward = torch.compile(model) if device == "cuda" else model
    half = args.batch_size // 2
    rng = np.random.default_rng(0)
    began = time.time()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / 100, (args.steps - step) / args.steps)
        windows = pool[rng.integers(len(pool), size=half)].astype(np.int64)
        tokens, _, targets, _ = next(data.micro_batches(batches(step, range(half)), half))
        tokens = torch.from_numpy(np.concatenate([windows[:, :-1], tokens])).to(device)
        targets = torch.from_numpy(np.concatenate([windows[:, 1:], targets])).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = forward(tokens, targets=targets) / targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == args.steps - 1:
            print(f"step {step} loss {loss.item():.3f} {time.time() - began:.0f} s", flush=True)


def main():
    p = arguments.ArgumentParser(prog="assets/make_tiny.py", description="Make the built-in tiny model.")
    # fmt: off
    p.add_argument("--data", nargs="+", required=True,
        help="texts, as for train.py")
    p.add_argument("--out", type=Path, required=True,
        help="the folder to write")
    p.add_argument("--steps", type=arguments.whole_number(1), default=3000,
        help="optimizer steps (default: 3000)")
    p.add_argument("--batch_size", type=arguments.whole_number(2), default=512,
        help="windows in a step (default: 512)")
    p.add_argument("--lr", type=arguments.number(0, arguments.LARGEST_LR), default=3e-3,
        help="peak learning rate (default: 3e-3)")
    p.add_argument("--records", type=arguments.whole_number(1), default=200_000,
        help="synthetic windows to draw from (default: 200,000)")
    # fmt: on
    args = p.parse_args()

    rng = random.Random(0)
    files = find_files(args.data) + find_files([])
    texts = [text for path in files for text in read_texts(path)]
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "tokenizer.model").exists():
        train_tokenizer(texts, rng, args.out)
    tokenizer = tokenizers.load(args.out)
    pool = synthetic_windows(args.records, texts, tokenizer, rng)
    documents = data.tokenised(files, tokenizer, cache_dir())
    sampling = {"method": "pi", "train_len": WINDOW, "target_len": WINDOW}
    batches = data.Batches(documents, 0, tokenizer.bos_id, **sampling)

    device = process.device(None)
    model = make_model(tokenizer, device)
    train(model, pool, batches, args, device)
    weights.save(model, tokenizer, args.out)


if __name__ == "__main__":
    process.run(main)
