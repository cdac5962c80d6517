"""Ask a model something, about a whole book if its window holds one, or let it go on with a text.

    python sample.py --model out/model --file book.txt --ask "Who is Mr. Hyde?"
    python sample.py --model out/model --prompt "The capital of France is"
    python sample.py --model out/model            (a conversation, line by line)

What is asked goes through the model's chat template where its folder has one. The text appears as it is made.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import cli
import rope
from hf import builtin, chat, weights
from storage.files import InputError

PREFILL_TOKENS = {"cuda": 16384, "cpu": 1024}  # of a prompt that go through the model at once
CONTEXT = 8  # ids that are decoded again with a new one


# ---------------------------------------------------------------- making text


class Session:
    """A model with the keys and values of what it read last, so that the same beginning is read once."""

    def __init__(self, model):
        self.model = model
        self.read = []  # the ids whose keys and values are in the cache
        self.cache = None

    @torch.no_grad()
    def stream(self, prompt, max_new_tokens, stop_ids, choose):
        """Yield the ids of new tokens one by one, up to one of stop_ids, which is not yielded.

        prompt: a list of ids. choose(logits): a function that returns the id of the next token, given float32
        logits (V,).
        """
        seq_len = len(prompt) + max_new_tokens - 1  # the last token is not read
        start = self._begin(prompt, seq_len)
        size = PREFILL_TOKENS[self.model.embed.weight.device.type]
        with tqdm(total=len(prompt), initial=start, desc="reading", leave=False, disable=None) as bar:
            for begin in range(start, len(prompt), size):
                h = self._read(prompt[begin : begin + size], seq_len)
                bar.update(min(size, len(prompt) - begin))
        for _ in range(max_new_tokens):
            token = choose(self.model.head(h[:, -1])[0].float())
            if token in stop_ids:
                return
            yield token
            if len(self.read) < seq_len:
                h = self._read([token], seq_len)

    def _begin(self, prompt, seq_len):
        """Make a cache for seq_len tokens. Return how many of the prompt's first tokens it has already."""
        same = len(os.path.commonprefix([self.read, prompt[:-1]]))  # the last one is read for what follows
        if rope.depends_on_length(self.model.config.rope_scaling):
            same = 0  # the angles of what was read were those of another length
        cache = self.model.new_cache(1, seq_len)
        for new, old in zip(cache, self.cache or []):
            for to, from_ in zip(new, old):
                to[:, :same] = from_[:, :same]
        self.cache, self.read = cache, prompt[:same]
        return same

    def _read(self, ids, seq_len):
        """Return the hidden states (1, len(ids), C) of the next ids, and keep their keys and values."""
        tokens = torch.tensor([ids], device=self.model.embed.weight.device)
        h = self.model.hidden(tokens, cache=self.cache, start=len(self.read), seq_lens=[seq_len])
        self.read = self.read + ids
        return h


def chooser(temperature, top_p, seed):
    """Return a function that takes logits (V,) and returns the id of the next token.

    temperature: 0 takes the likeliest. top_p: draw from the fewest tokens whose probabilities sum to so much
    (nucleus sampling, Holtzman et al. 2020).
    """
    generator = torch.Generator().manual_seed(seed)

    def choose(logits):
        if temperature == 0:
            return int(logits.argmax())
        probabilities, ids = (logits.cpu() / temperature).softmax(-1).sort(descending=True)
        before = probabilities.cumsum(-1) - probabilities  # what likelier tokens have together
        probabilities[before >= top_p] = 0.0
        return int(ids[torch.multinomial(probabilities, 1, generator=generator)])

    return choose


class Detokenizer:
    """Turns ids into text as they come.

    A character can take several tokens, and a space before a word is only there after another token. So a
    few ids that were shown already are decoded again with the new ones, and only what these add is returned.
    """

    def __init__(self, tokenizer, before):
        """before: the ids before the first new one."""
        self.tokenizer = tokenizer
        self.shown, self.pending = list(before[-CONTEXT:]), []

    def add(self, token):
        """Return the text that a token adds, "" while a character is not complete."""
        self.pending.append(token)
        text = self.rest()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.shown, self.pending = (self.shown + self.pending)[-CONTEXT:], []
        return text

    def rest(self):
        """Return the text of the tokens that were not shown, an incomplete character included."""
        already = self.tokenizer.decode(self.shown)
        return self.tokenizer.decode(self.shown + self.pending)[len(already) :]


# ---------------------------------------------------------------- what is asked


def prompt_ids(tokenizer, messages, raw):
    """Return the ids of a conversation, a list of {"role", "content"} that ends with the user's.

    raw: without a chat template. Then the last message alone is a text to go on with.
    """
    if not raw:
        return tokenizer.encode(chat.render(tokenizer, messages))
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return bos + tokenizer.encode(messages[-1]["content"])


def read_text(path):
    """Return the text of a UTF-8 file. Raise InputError if it is something else."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from None


def questions(args):
    """Yield what the user asks: the one question of the command line or of a pipe, or line by line."""
    asked = args.ask or args.prompt
    if asked is None and not sys.stdin.isatty():
        asked = sys.stdin.read().rstrip("\n")
    if asked is not None:
        yield asked
        return
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if line.strip():
            yield line


def answer(session, tokenizer, prompt, args, stop_ids):
    """Print what the model says after a prompt as it is made, and return it. Say the speed on stderr."""
    window = session.model.config.max_position_embeddings
    if len(prompt) >= window:
        raise InputError(
            f"the prompt has {len(prompt):,} tokens and the model's window {window:,}; shorten it, or extend "
            "the model with train.py --target_len"
        )
    n_new = min(args.max_new_tokens, window - len(prompt))
    began = time.perf_counter()
    first, text, n = None, "", 0
    detokenizer = Detokenizer(tokenizer, prompt)
    choose = chooser(args.temperature, args.top_p, args.seed)
    for n, token in enumerate(session.stream(prompt, n_new, stop_ids, choose), 1):
        first = first or time.perf_counter()
        new = detokenizer.add(token)
        print(new, end="", flush=True)
        text += new
    print(detokenizer.rest(), flush=True)
    ended = time.perf_counter()
    reading = (first or ended) - began
    speed = f", {(n - 1) / (ended - first):.0f} a second" if n > 1 else ""
    print(f"[{len(prompt):,} of {window:,} tokens, {reading:.1f} s; {n} new{speed}]", file=sys.stderr)
    return text + detokenizer.rest()


def parse_arguments():
    p = cli.ArgumentParser(
        description="Ask a model something, or let it go on with a text.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # fmt: off
    p.add_argument("--model",
        help="a folder or a built-in name (default: the result of the run in out/, else the built-in one)")
    p.add_argument("--file", type=Path, help="a text that stands before what is asked")
    group = p.add_mutually_exclusive_group()
    group.add_argument("--ask", metavar="QUESTION", help="what to ask, about the file if there is one")
    group.add_argument("--prompt", metavar="TEXT",
        help="the same as --ask (default: what is piped in; without a pipe, a conversation)")
    p.add_argument("--raw", action="store_true",
        help="no chat template: the model goes on with the text (so it does where its folder has none)")
    p.add_argument("--max_new_tokens", type=cli.whole_number(1), default=512, help="default: 512")
    p.add_argument("--temperature", type=cli.number(0, 100), default=0.0,
        help="0 takes the likeliest token, 1 draws from the model's probabilities (default: 0)")
    p.add_argument("--top_p", type=cli.number(0, 1), default=1.0,
        help="draw from the likeliest tokens that have so much of the probability (default: 1)")
    p.add_argument("--seed", type=cli.whole_number(0), default=0, help="of the drawing (default: 0)")
    p.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    # fmt: on
    return p.parse_args()


def main():
    args = parse_arguments()
    args.device = cli.device(args.device)
    if args.model is None:
        has_run = Path("out/model/config.json").is_file()
        args.model = "out/model" if has_run else builtin.default_model(args.device)
    folder = builtin.open_model(args.model)
    tokenizer = folder.load_tokenizer()
    text = read_text(args.file) + "\n\n" if args.file else ""
    raw = args.raw or chat.find_template(tokenizer) is None
    stop_ids = chat.stop_ids(tokenizer, folder.config)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    session = Session(weights.load(args.model, args.device, dtype))
    messages = []
    for question in questions(args):
        content = question if messages and not raw else text + question
        messages.append({"role": "user", "content": content})
        said = answer(session, tokenizer, prompt_ids(tokenizer, messages, raw), args, stop_ids)
        messages.append({"role": "assistant", "content": said})


if __name__ == "__main__":
    cli.run(main)
