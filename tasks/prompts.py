"""Make the prompts of the retrieval tests: the paper's passkey, and door codes hidden in real text.

Notable choices:
- A length is exact: a prompt and its answer have so many tokens together. (A passkey prompt has a few tokens
  less where no filling fits with a tokenizer.)
- Long passkey prompts repeat the ids of one line instead of encoding a long text: a million tokens take
  milliseconds.
- Needles stand in lines of their own, between lines or sentences of the text, so that no word of it is torn
  apart.
"""

import functools

import numpy as np

from hf.tokenizer import bos_ids, ids_of_line, line_ends, token_texts
from storage.errors import InputError

# The passkey prompt of Mohtashami & Jaggi (2023), used in section 4.2 of the paper.
PASSKEY_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
PASSKEY = "The pass key is {key}. Remember it. {key} is the pass key."
PASSKEY_QUESTION = "What is the pass key? The pass key is"

NEEDLE_TASK = (
    "The text below hides the door codes of {keys} cities. Remember them: the last line asks for one."
)
NEEDLE = "The door code of {city} is {key}."
NEEDLE_QUESTION = "What is the door code of {city}? The door code of {city} is"
CITIES = (
    "Amsterdam", "Baghdad", "Cairo", "Delhi", "Edinburgh", "Florence", "Geneva", "Helsinki",
    "Istanbul", "Jakarta", "Kyoto", "Lisbon", "Madrid", "Nairobi", "Oslo", "Prague",
)  # fmt: skip

FEW = 2  # lines of garbage on each side of the key that are encoded; every further one adds the same ids


# ---------------------------------------------------------------- passkey


def passkey_prompt(tokenizer, length, depth, key):
    """Return the token ids of a passkey prompt and of its answer, together `length` tokens.

    depth: from 0 to 1, where among the lines of garbage the key stands. key: its digits, a string. The
    prompt has as many whole lines of garbage as fit. What is left over is filled in front of them (see
    `fillings`): behind them a broken sentence would meet the question and cost small models answers. If no
    filling is exact, the longest that fits is taken. Raise InputError if the length is too short.
    """
    encode = functools.partial(passkey_ids, tokenizer, key)
    before, after, left_over = lines_that_fit(encode, length, depth)

    fitting = {}
    for cut, added_tokens in fillings(tokenizer, min(before, FEW), min(after, FEW)).items():
        if added_tokens <= left_over:
            fitting[cut] = added_tokens
    longest_cut = max(fitting, key=fitting.get)  # of equally long ones the first, which is the nicest

    tokens = repeat_lines(functools.partial(encode, cut=longest_cut), before, after)
    question_and_answer = tokenizer.encode(f"{PASSKEY_QUESTION} {key}")
    answer_len = len(question_and_answer) - len(tokenizer.encode(PASSKEY_QUESTION))
    return tokens[:-answer_len], tokens[-answer_len:]


def passkey_ids(tokenizer, key, before, after, cut=""):
    """Return the token ids of a passkey prompt with its answer.

    before, after: the lines of garbage on each side of the key. cut: a piece of garbage in front of them.
    """
    garbage_before = " ".join([cut] + [GARBAGE] * before).strip(" ")
    garbage_after = " ".join([GARBAGE] * after)
    statement, question_and_answer = PASSKEY.format(key=key), f"{PASSKEY_QUESTION} {key}"
    lines = [PASSKEY_TASK, garbage_before, statement, garbage_after, question_and_answer]
    ids = tokenizer.encode("\n".join(line for line in lines if line))
    return bos_ids(tokenizer) + ids


def lines_that_fit(encode, length, depth):
    """Return how many lines of garbage fit before and after the key, and how many tokens are left over.

    encode(before, after): the ids of the prompt with so many lines. Raise InputError if not even a prompt
    without lines fits.
    """
    tokens_of_four_lines = len(encode(2, 2))
    tokens_of_a_line = len(encode(2, 3)) - tokens_of_four_lines
    too_many = 5 + (length - tokens_of_four_lines) // tokens_of_a_line  # by one or two
    for lines in range(max(0, too_many), -1, -1):
        before = round(depth * lines)
        after = lines - before
        few_before, few_after = min(before, FEW), min(after, FEW)
        repeated_lines = lines - few_before - few_after
        left_over = length - len(encode(few_before, few_after)) - repeated_lines * tokens_of_a_line
        if left_over >= 0:
            return before, after, left_over
    needed = len(encode(0, 0))
    raise InputError(f"{length} tokens are too few for the passkey prompt: this tokenizer needs {needed}")


@functools.cache
def fillings(tokenizer, before, after):
    """Return what can be put in front of the garbage, {text: tokens that it adds}, the nicest first.

    A filling is the end of one more line of garbage: best from the beginning of a word on, next best after
    one or two blank lines, else from inside a word. before, after: lines of garbage in the prompt, as for
    `passkey_ids`.
    """
    from_inside_a_word = [GARBAGE[i:] for i in range(1, len(GARBAGE) + 1)]
    from_a_word = [end for end in from_inside_a_word if GARBAGE.endswith(" " + end) or not end]
    lengths = {}
    for ends in (from_a_word, from_inside_a_word):
        for blank_lines in ("", "\n", "\n\n"):
            for end in ends:
                cut = blank_lines + end
                # The filling does not touch the key, so the lengths hold for any key.
                lengths[cut] = len(passkey_ids(tokenizer, "12345", before, after, cut))
    without = lengths[""]
    return {cut: length - without for cut, length in lengths.items()}


def repeat_lines(encode, before, after):
    """Return encode(before, after), the ids of a prompt, without encoding all of its lines.

    From the line FEW + 1 on, each adds the same ids at the same place, so they are repeated there.
    """
    few_before, few_after = min(before, FEW), min(after, FEW)
    base = encode(few_before, few_after)
    tokens = base
    # The later place comes first: what is inserted there does not move the earlier one.
    if after > few_after:
        tokens = _insert_repeatedly(tokens, base, encode(few_before, few_after + 1), after - few_after)
    if before > few_before:
        tokens = _insert_repeatedly(tokens, base, encode(few_before + 1, few_after), before - few_before)
    return tokens


def _insert_repeatedly(tokens, base, longer, times):
    """Return `tokens` with what `longer` has more than `base` inserted so many times.

    All are lists of ids. The place is where `longer` and `base` begin to differ.
    """
    place = next(i for i, (a, b) in enumerate(zip(base, longer)) if a != b)
    added = longer[place : place + len(longer) - len(base)]
    return tokens[:place] + added * times + tokens[place:]


# ---------------------------------------------------------------- needle


def needle_prompt(tokenizer, corpus, length, depth, rng, keys):
    """Return the token ids of a needle prompt and of its answer, together `length` tokens.

    The prompt is a random stretch of `corpus` (a 1-d array of ids) in which the door codes of `keys` cities
    stand in lines of their own, and a question for one of them. depth: from 0 to 1, where in the text that
    one stands, as nearly as a line or a sentence ends there; the others stand anywhere. rng: a numpy
    Generator. Raise InputError if the length is too short, or the corpus too short for the length.
    """
    cities = rng.choice(CITIES, keys, replace=False).tolist()
    codes = rng.choice(np.arange(10000, 100000), keys, replace=False).tolist()
    newline = ids_of_line(tokenizer, "")
    opening = bos_ids(tokenizer) + tokenizer.encode(NEEDLE_TASK.format(keys=keys)) + newline
    needles = []
    for city, code in zip(cities, codes):
        needles.append(ids_of_line(tokenizer, NEEDLE.format(city=city, key=code)) + newline)
    question = NEEDLE_QUESTION.format(city=cities[0])
    question_and_answer = ids_of_line(tokenizer, f"{question} {codes[0]}")

    fixed = len(opening) + sum(len(needle) for needle in needles) + len(question_and_answer)
    room = room_for_text(length, fixed, len(corpus), keys)
    start = rng.integers(len(corpus) - room + 1)
    text = corpus[start : start + room]

    ends = line_ends(tokenizer, text)
    nearest_to_depth = ends[np.abs(ends - depth * room).argmin()]
    places = [nearest_to_depth, *rng.choice(ends, keys - 1)]
    text = np.insert(text, np.repeat(places, [len(needle) for needle in needles]), np.concatenate(needles))
    tokens = opening + text.tolist() + question_and_answer
    answer_len = len(question_and_answer) - len(ids_of_line(tokenizer, question))
    return tokens[:-answer_len], tokens[-answer_len:]


def room_for_text(length, fixed, available, keys):
    """Return how many tokens of text a needle prompt of `length` tokens holds.

    fixed: its tokens that are no text. available: tokens of the corpus. Raise InputError if the prompt is
    too short for any text, or the corpus for the prompt.
    """
    room = length - fixed
    if room < 1:
        needed = f"this tokenizer needs {fixed + 1}; hide fewer codes or take a longer prompt"
        raise InputError(f"{length} tokens are too few for the needle prompt with {keys} codes: {needed}")
    if room > available:
        too_few = f"the texts have {available:,} tokens in all, too few for a needle prompt of {length}"
        raise InputError(f"{too_few}; add texts or take a shorter prompt")
    return room


# ---------------------------------------------------------------- answers


@functools.cache
def digit_tokens(tokenizer):
    """Return the set of token ids that would make a number go on."""
    return {i for i, text in enumerate(token_texts(tokenizer)) if text[:1].isdigit()}
