"""What the retrieval tests hide and ask for: the paper's passkey prompt, and door codes in real text. Tokens only, no model.

A length is exact: the prompt with its answer has so many tokens (the passkey prompt a few less if a tokenizer has no filling that fits).
"""
import functools

import numpy as np

from errors import UserError

# Mohtashami & Jaggi 2023, the prompt of PoSE section 4.2.
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"

NEEDLE_TASK = "The text below hides the door codes of {keys} cities. Remember them: the last line asks for one."
NEEDLE = "The door code of {city} is {key}."
NEEDLE_QUESTION = "What is the door code of {city}? The door code of {city} is"
CITIES = (
    "Amsterdam", "Baghdad", "Cairo", "Delhi", "Edinburgh", "Florence", "Geneva", "Helsinki",
    "Istanbul", "Jakarta", "Kyoto", "Lisbon", "Madrid", "Nairobi", "Oslo", "Prague",
)  # fmt: skip


def passkey_prompt(tokenizer, length, depth, key):
    """Token ids of a prompt and of its answer, together `length` tokens: whole lines of garbage, and in front of them as much of the end of
    one more as fills the length: from a word on, after blank lines if need be, else from inside a word. (If none is exact with this tokenizer,
    the longest.) Behind the garbage a broken sentence would meet the question, and cost small models answers.
    depth 0 … 1: where among the lines the key stands. Raises UserError if the prompt does not fit at all."""
    encode = functools.partial(passkey_ids, tokenizer, key)
    four = len(encode(2, 2))
    line = len(encode(2, 3)) - four
    lines = max(0, 5 + (length - four) // line)
    while True:
        before = round(depth * lines)
        after = lines - before
        few = min(before, 2), min(after, 2)
        room = length - line * (lines - sum(few))  # for few lines and what is around them
        without = len(encode(*few))
        if without <= room:
            break
        if lines == 0:
            raise UserError(f"--lengths {length}: too short for the passkey prompt, which needs {len(encode(0, 0))} tokens with this tokenizer")
        lines -= 1

    fitting = {cut: more for cut, more in fillings(tokenizer, *few).items() if without + more <= room}
    cut = max(fitting, key=fitting.get)  # the first of the longest
    tokens = repeat(functools.partial(encode, cut=cut), before, after)
    answer_len = len(tokenizer.encode(f"{QUESTION} {key}")) - len(tokenizer.encode(QUESTION))
    return tokens[:-answer_len], tokens[-answer_len:]


def passkey_ids(tokenizer, key, before, after, cut=""):
    """Token ids of the prompt and its answer: the key between so many lines of garbage, with `cut` in front of them."""
    first = " ".join([cut] + [GARBAGE] * before).strip(" ")
    parts = [TASK, first, KEY.format(key=key), " ".join([GARBAGE] * after), f"{QUESTION} {key}"]
    ids = tokenizer.encode("\n".join(part for part in parts if part))
    return ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]


@functools.cache
def fillings(tokenizer, before, after):
    """{beginning of the garbage, with blank lines before it or not: tokens that it adds to a prompt of so many lines}, the nicest first.
    They do not touch the key, so that any key will do."""
    inside = [GARBAGE[n:] for n in range(1, len(GARBAGE) + 1)]
    words = [cut for cut, previous in zip(inside, GARBAGE) if previous == " " or not cut]
    cuts = [blank + cut for cuts in (words, inside) for blank in ("", "\n", "\n\n") for cut in cuts]
    lengths = {cut: len(passkey_ids(tokenizer, "12345", before, after, cut)) for cut in cuts}
    return {cut: n - lengths[""] for cut, n in lengths.items()}


def repeat(encode, before, after):
    """encode(before, after), the ids of a text with so many equal lines in two places, though only three are really encoded in each: every
    further one adds the same ids at the same place. (A million tokens take milliseconds, not seconds.)"""
    few = min(before, 2), min(after, 2)
    tokens = base = encode(*few)
    for more, times in (((0, 1), after - few[1]), ((1, 0), before - few[0])):  # the later place first: it does not move the earlier one
        if times:
            longer = encode(few[0] + more[0], few[1] + more[1])
            place = next(i for i, (a, b) in enumerate(zip(base, longer)) if a != b)
            tokens = tokens[:place] + longer[place : place + len(longer) - len(base)] * times + tokens[place:]
    return tokens


def needle_prompt(tokenizer, corpus, length, depth, rng, keys):
    """Token ids of a prompt and of its answer, together `length` tokens: a random stretch of `corpus` (1-d array of ids) with the door codes of
    `keys` cities in lines of their own, between sentences or lines of the text, and the question for one of them.
    depth 0 … 1: where in the text that one stands; the others stand anywhere. Raises UserError if the prompt or the stretch does not fit."""

    def inside(text):  # ids of a line in the middle of a text
        return tokenizer.encode("x\n" + text)[len(tokenizer.encode("x")) :]

    cities = rng.choice(CITIES, keys, replace=False).tolist()
    codes = rng.choice(np.arange(10000, 100000), keys, replace=False).tolist()
    head = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    head += tokenizer.encode(NEEDLE_TASK.format(keys=keys)) + inside("")
    needles = [inside(NEEDLE.format(city=city, key=code)) + inside("") for city, code in zip(cities, codes)]
    question = inside(NEEDLE_QUESTION.format(city=cities[0]))
    asked = inside(NEEDLE_QUESTION.format(city=cities[0]) + f" {codes[0]}")
    fixed = len(head) + sum(map(len, needles)) + len(asked)
    room = length - fixed
    if room < 1:
        raise UserError(f"--lengths {length}: too short for the needle prompt, which needs {fixed + 1} tokens with this tokenizer; lower --keys")
    if room > len(corpus):
        raise UserError(f"--data: {len(corpus):,} tokens in all, too few for --lengths {length}; add texts or lower it")
    start = rng.integers(len(corpus) - room + 1)
    text = corpus[start : start + room]
    ends = line_ends(tokenizer, text)
    places = [ends[np.abs(ends - depth * room).argmin()], *rng.choice(ends, keys - 1)]
    tokens, done = head, 0
    for place, needle in sorted(zip(places, needles), key=lambda pair: pair[0]):
        tokens = tokens + text[done:place].tolist() + needle
        done = place
    tokens += text[done:].tolist() + asked
    return tokens[: len(question) - len(asked)], tokens[len(question) - len(asked) :]


def line_ends(tokenizer, text):
    """Places in text (1-d array of ids) where a line or a sentence ends and something can be put in, 0 among them."""
    newline, stop, space = kinds(tokenizer)
    return np.concatenate([[0], 1 + np.flatnonzero(newline[text[:-1]] | stop[text[:-1]] & space[text[1:]])])


@functools.cache
def kinds(tokenizer):
    """Of every id, three arrays: does it end a line, may it end a sentence, does it begin with a space?"""
    texts = token_texts(tokenizer)
    tests = (lambda t: t.endswith("\n")), (lambda t: t.rstrip("\"')”’").endswith((".", "!", "?"))), (lambda t: t[:1].isspace())
    return [np.array([test(t) for t in texts]) for test in tests]


@functools.cache
def token_texts(tokenizer):
    """What each id adds in the middle of a text."""
    before = tokenizer.encode("x")
    return [tokenizer.decode([*before, i])[1:] for i in range(tokenizer.vocab_size)]


@functools.cache
def digit_tokens(tokenizer):
    """Ids that would make a number go on."""
    return {i for i, text in enumerate(token_texts(tokenizer)) if text[:1].isdigit()}
