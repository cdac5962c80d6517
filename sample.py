"""Ask a model something, about a whole book if its window holds one, or let it go on with a text.

    python sample.py --model out/model --file book.txt --ask "Who is Mr. Hyde?"
    python sample.py --model out/model --prompt "The capital of France is"
    python sample.py --model out/model < question.txt
    python sample.py --model out/model            # a conversation, line by line; the line /new begins another

Notable choices:
- A question goes through the chat template of the model's folder where it has one (hf/chat.py). A prompt
  does not: the model goes on with the text as it is.
- Text appears as it is made, on stdout; everything else is on stderr.
- What the model has read stays in its cache, so that of a conversation, and of a book that two questions are
  asked about, only what is new is read.
"""

import contextlib
import math
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import rope
from cli import arguments, process
from hf import builtin, chat, weights
from hf.tokenizer import Detokenizer, bos_ids, stop_ids
from storage import texts
from storage.errors import InputError

NEW = "/new"  # a line that begins a new conversation
BEGIN_ANEW = f"; {NEW} begins a new conversation"
# Tokens of a prompt that go through the model at once. A GPU reads a book in one go, for which PyTorch has
# faster attention than for a piece behind others. A CPU shows how far it is.
PREFILL_TOKENS = {"cuda": 2**18, "cpu": 1024}

# ---------------------------------------------------------------- from ids to ids


class Session:
    """A model with the keys and values of what it read last, so that the same beginning is read once."""

    def __init__(self, model):
        self.model = model
        self.read = []  # the ids whose keys and values are in the cache
        self.cache = model.new_cache(1, 0)

    @torch.no_grad()
    def stream(self, prompt, max_new_tokens, stop_ids, choose):
        """Yield the ids of new tokens one by one, up to one of stop_ids, which is not yielded.

        prompt: a list of ids. choose(logits): a function that returns the id of the next token, given float32
        logits (V,). Where angles depend on the length, it is that of max_new_tokens, see model.generate.
        """
        seq_len = len(prompt) + max_new_tokens - 1  # the last token is not read
        start = self._keep_beginning(prompt, seq_len)
        size = PREFILL_TOKENS[self.model.embed.weight.device.type]
        with tqdm(total=len(prompt), initial=start, desc="reading", unit=" tokens", unit_scale=True,
                  leave=False, delay=0.5, disable=None) as bar:  # fmt: skip
            for begin in range(start, len(prompt), size):
                h = self._read(prompt[begin : begin + size], seq_len)
                bar.update(min(size, len(prompt) - begin))
        logits = self.model.head(h[:, -1])[0]
        step = None
        for n in range(1, max_new_tokens + 1):
            token = choose(logits.float())
            if token in stop_ids:
                return
            yield token
            if n < max_new_tokens:
                step = step or DecodeStep(self.model, self.cache, len(prompt), seq_len)
                logits = step(token)
                self.read.append(token)

    def _keep_beginning(self, prompt, seq_len):
        """Make room for seq_len tokens. Return how many of the prompt's first ones have been read already."""
        same = 0
        if not rope.depends_on_length(self.model.config.rope_scaling):  # else they had other angles
            # The last one is read again, for what follows it.
            while same < min(len(self.read), len(prompt) - 1) and self.read[same] == prompt[same]:
                same += 1
        self.read = self.read[:same]
        for i, keys_and_values in enumerate(self.cache):
            missing = seq_len - keys_and_values[0].shape[1]
            if missing > 0:  # The new places must hold finite numbers: a DecodeStep's attention meets them.
                self.cache[i] = tuple(F.pad(x, (0, 0, 0, 0, 0, missing)) for x in keys_and_values)
        return same

    def _read(self, ids, seq_len):
        """Return the hidden states (1, len(ids), C) of the next ids, and keep their keys and values."""
        tokens = torch.tensor([ids], device=self.model.embed.weight.device)
        h = self.model.hidden(tokens, cache=self.cache, start=len(self.read), seq_lens=[seq_len])
        self.read += ids
        return h


class DecodeStep:
    """Reads one token after the other, and returns the logits (V,) for what follows each.

    On a GPU, launching a step's kernels one by one from Python takes ten times as long as they run. So they
    are recorded as a CUDA graph there and launched together. Its shapes and addresses are fixed: attention
    goes over all places up to `end`, of which a mask hides those that are not filled yet.
    """

    def __init__(self, model, cache, start, end):
        """Make a step for the tokens at the places from `start` to `end` of the cache, in this order."""
        device = model.embed.weight.device
        self.model, self.start = model, start
        # After an earlier, longer text the cache has more places.
        self.cache = [(keys[:, :end], values[:, :end]) for keys, values in cache]
        # Of all these places at once. What a CUDA graph holds must not come from the CPU.
        self.rotations = model.rotations(torch.arange(start, end, device=device)[None], start, end, [end])
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.place = torch.tensor([start], device=device)
        self.graph = None
        if device.type == "cuda":
            self.record()

    def __call__(self, token):
        """Read the id of the token at the next place. The logits are overwritten by the next call."""
        self.token.fill_(token)
        if self.graph:
            self.graph.replay()
        else:
            self.logits = self.read()
        self.place += 1
        return self.logits

    def read(self):
        """Return the logits (V,) behind self.token at self.place, and keep its keys and values."""
        here = self.place - self.start
        rotation = (None if x is None else x.index_select(1, here) for x in self.rotations)
        return self.model.head(self.model.hidden_at(self.token, *rotation, self.cache, self.place))[0, 0]

    def record(self):
        """Record `read` as a CUDA graph."""
        # What libraries set up in their first call must not be recorded, so there is a call before.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self.read()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.read()


def chooser(temperature, top_p, seed):
    """Return a function that takes logits (V,) and returns the id of the next token.

    temperature: 0 takes the likeliest. top_p: draw from the fewest tokens, likeliest first, that have so much
    of the probability (nucleus sampling, Holtzman et al. 2020). Logits that are not finite raise InputError.
    """
    generator = torch.Generator().manual_seed(seed)

    def choose(logits):
        largest, likeliest = logits.max(-1)
        if not largest.isfinite():
            raise InputError("the model's logits are not finite; look at its weights")
        if temperature == 0:
            return int(likeliest)
        # Without the subtraction, a temperature near 0 would make infinite numbers.
        probabilities = ((logits.double() - largest) / temperature).softmax(-1)
        probabilities, ids = probabilities.sort(descending=True, stable=True)
        sums = probabilities.cumsum(-1)
        n_kept = 1 + (sums[:-1] < top_p).sum()
        drawn = torch.rand((), generator=generator, dtype=torch.float64).to(sums.device) * sums[n_kept - 1]
        return int(ids[torch.searchsorted(sums, drawn, right=True)])

    return choose


# ---------------------------------------------------------------- from text to text


def checked(question):
    """Return a question or prompt. Raise InputError if it is empty or not UTF-8."""
    if not question.strip():
        raise InputError("nothing is asked: give a question, or a text to go on with")
    try:
        question.encode()
    except UnicodeEncodeError:  # what is not UTF-8 came in as surrogates
        raise InputError("the question is not UTF-8; convert it first") from None
    return question


def prompt_ids(tokenizer, messages, config, raw):
    """Return the ids of a conversation, a list of {"role", "content"} that ends with the user's.

    raw: without a chat template. Then the last message alone is a text to go on with. Raise InputError if the
    model has no room for them.
    """
    if raw:
        ids = bos_ids(tokenizer) + tokenizer.encode(messages[-1]["content"])
    else:
        ids = chat.encode(tokenizer, messages)
        if not ids or max(ids) >= config.vocab_size:
            reason = "writes nothing, or a token that the model does not have"
            raise InputError(f"the chat template {reason}; leave it out with --raw")
    window = window_of(config)
    if len(ids) >= window:
        remedy = "shorten it, or give the model a longer window with train.py"
        raise InputError(f"the text has {len(ids):,} tokens, the model a window of {window:,}; {remedy}")
    return ids


def window_of(config):
    """Return how many tokens the model of this Config has room for, infinity where that is written nowhere.

    So it is with `dynamic` scaling. Its angles are made for the length at hand, whatever the window was that
    it was trained for; config.json keeps the one before, where stock loaders begin to scale (hf/families.py).
    """
    is_dynamic = (config.rope_scaling or {}).get("rope_type") == "dynamic"
    return math.inf if is_dynamic else config.max_position_embeddings


def answer(session, tokenizer, prompt, args, goes_on=False):
    """Print what the model says after a prompt, a list of ids, as it is made. Return it.

    goes_on: an interrupt ends the answer alone. Say on stderr how many tokens there were, and how fast.
    """
    config = session.model.config
    window = window_of(config)
    most = min(args.max_new_tokens, window - len(prompt))
    tokens = session.stream(
        prompt, most, stop_ids(tokenizer, config), chooser(args.temperature, args.top_p, args.seed)
    )
    detokenizer = Detokenizer(tokenizer, starts_text=not args.raw)
    pieces = []  # texts
    times = [time.perf_counter()]  # of the beginning, then of each new token
    try:
        for token in tokens:
            times.append(time.perf_counter())
            pieces.append(detokenizer.add(token))
            print(pieces[-1], end="", flush=True)
    except KeyboardInterrupt:
        if not goes_on:
            raise
    finally:
        pieces.append(detokenizer.rest())
        print(pieces[-1], flush=True)
    n = len(times) - 1
    said = f"{n:,} new"
    if len(prompt) + n == window:
        said += f" (the window is full{BEGIN_ANEW if goes_on and not args.raw else ''})"
    elif n == most:
        said += " (the most that --max_new_tokens allows)"
    if n > 1:
        said += f", {(n - 1) / (times[-1] - times[1]):.0f} a second"
    reading = (times[1] if n else time.perf_counter()) - times[0]
    of_window = f" of {window:,}" if math.isfinite(window) else ""
    print(f"[{len(prompt):,}{of_window} tokens, read in {reading:.1f} s; {said}]", file=sys.stderr)
    return "".join(pieces)


def converse(session, tokenizer, text, args):
    """Answer line by line: each question behind all that was said, or alone where there is no chat template.

    text: what stands before a question with nothing before it.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  with it, input() lets lines be edited
    print(f"Ctrl-C ends an answer, Ctrl-D leaves{'' if args.raw else BEGIN_ANEW}.", file=sys.stderr)
    messages = []
    while True:
        try:
            line = input("> ")
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print("\nCtrl-D leaves.", file=sys.stderr)
            continue
        if not line.strip():
            continue
        if line.strip() == NEW and not args.raw:
            messages = []
            continue
        before = [] if args.raw else messages
        try:
            asked = {"role": "user", "content": checked(line) if before else text + checked(line)}
            prompt = prompt_ids(tokenizer, [*before, asked], session.model.config, args.raw)
            said = answer(session, tokenizer, prompt, args, goes_on=True)
        except InputError as error:  # another question may do
            print(f"error: {error}{BEGIN_ANEW if before else ''}", file=sys.stderr)
            continue
        messages = [*before, asked, {"role": "assistant", "content": said}]


def parse_arguments():
    p = arguments.ArgumentParser(description="Ask a model something, or let it go on with a text.")
    # fmt: off
    p.add_argument("--model", type=arguments.path_name,
        help="a Hugging Face folder or a built-in name (default: out/model, which train.py writes, else the "
        "built-in one)")
    p.add_argument("--file", type=arguments.path_name,
        help="a text that stands before the question or the prompt; - for standard input")
    group = p.add_mutually_exclusive_group()
    group.add_argument("--ask", metavar="QUESTION",
        help="a question, which goes through the model's chat template (default: what is piped in, else a "
        "conversation)")
    group.add_argument("--prompt", metavar="TEXT",
        help="a text that the model goes on with as it is, without a chat template")
    p.add_argument("--raw", action="store_true",
        help="no chat template for anything else either (so it is where the model's folder has none)")
    p.add_argument("--max_new_tokens", type=arguments.whole_number(1), default=512,
        help="tokens of an answer at most; the angles of dynamic scaling are those of the text with so many "
        "more (default: 512)")
    p.add_argument("--temperature", type=arguments.number(0, 100), default=0.0,
        help="0 takes the likeliest token, 1 draws from the model's probabilities (default: 0)")
    p.add_argument("--top_p", type=arguments.number(0, 1), default=1.0,
        help="draw from the likeliest tokens that have so much of the probability (default: 1)")
    p.add_argument("--seed", type=arguments.whole_number(0, arguments.LARGEST_SEED), default=0,
        help="of the draws (default: 0)")
    p.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    # fmt: on
    return p.parse_args()


def main():
    args = parse_arguments()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # who closes the pipe has read enough, and needs no trace
    sys.stdout.reconfigure(errors="replace")  # not every terminal has every character
    args.device = process.device(args.device)
    if args.model is None:
        has_run = Path("out/model/config.json").is_file()
        args.model = "out/model" if has_run else builtin.default_model(args.device)
        print(f"model: {args.model}", file=sys.stderr)
    arguments.warn_if_half_trained(args.model)
    folder = builtin.open_model(args.model)
    tokenizer = folder.load_tokenizer()
    args.raw = args.raw or args.prompt is not None or chat.find_template(tokenizer) is None
    asked = args.ask if args.prompt is None else args.prompt
    text = ""
    if args.file:
        if args.file == texts.STANDARD_INPUT and asked is None:
            raise InputError("--file -: standard input holds the text, so add --ask or --prompt")
        (path,) = texts.with_saved_stdin([args.file])
        text = "\n\n".join([*texts.read_texts(Path(path)), ""])
        if not text:
            raise InputError(f"{args.file}: there is no text in it")
    if asked is None:
        if sys.stdin is None:
            raise InputError("nothing is asked: standard input is closed; give --ask or --prompt")
        sys.stdin.reconfigure(errors="surrogateescape")  # see `checked`
        if not sys.stdin.isatty():
            asked = sys.stdin.read().rstrip("\n")
    if asked is not None:  # what cannot be asked is refused before the weights are read
        messages = [{"role": "user", "content": text + checked(asked)}]
        prompt = prompt_ids(tokenizer, messages, folder.config, args.raw)
    dtype = getattr(torch, process.compute_dtype(args.device))
    session = Session(weights.load(args.model, args.device, dtype))
    if asked is None:
        converse(session, tokenizer, text, args)
    else:
        answer(session, tokenizer, prompt, args)


if __name__ == "__main__":
    process.run(main)
