"""Make the prompts of RULER (Hsieh et al. 2024), eleven tasks of any length, and score what is said to them.

The definition is NVIDIA's (github.com/NVIDIA/RULER): templates, needles, counts, places, worked examples,
tokens to generate and the score. Its other two tasks need data sets of questions and are left out.

Where these prompts differ:
- Five tasks hide their needles in the user's texts, from a random place on. NVIDIA takes essays by Paul
  Graham, from their beginning on. A sentence ends behind ".", "!" or "?"; NVIDIA asks NLTK.
- Words are our own 6,000 (words.txt). NVIDIA has 8,700 from wonderwords. No key occurs twice in a prompt. A
  list of common words that is too long for so many takes adjective-noun pairs; NVIDIA has more words for it.
- Every prompt is as long as whole units (lines, words) allow. NVIDIA searches for a number of units with
  other prompts than the ones it asks, and takes 5 to 500 units from a prompt that is too long with it; the
  frequent words grow in steps of a 32nd of the length. A BOS counts as part of the length.
- A prompt is a function of (seed, task, length, number). The worked example of variable tracking is new in
  each; NVIDIA changes only its names and its value.

A prompt is made of pieces that tokenizers do not join: each begins with a space or behind a line break. Each
different piece is encoded once, so that a prompt of 131,072 tokens takes a fraction of a second.
"""

import functools
import itertools
import re
import uuid
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import NamedTuple

import numpy as np

from hf.tokenizer import bos_ids
from storage.errors import InputError
from tasks.prompts import GARBAGE

# NVIDIA's templates, each with its answer prefix behind it: the answer begins where the prompt ends.
NIAH = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type_needle_v} afterwards.\n{context}\n"
    "What are all the special magic {type_needle_v} for {query} mentioned in the provided text? "
    "The special magic {type_needle_v} for {query} mentioned in the provided text are"
)
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
VARIABLE_TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above. "
    "Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are "
    "assigned the value {query}, they are: "
)
COMMON_WORDS = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list? "
    "Answer: The top 10 words that appear most often in the list are:"
)
FREQUENT_WORDS = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text? "
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)
NOISE = GARBAGE + "\n"
DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int)  # where needles stand among sentences, in %

CHAIN = 5  # names in a chain of assignments: one gets a value, four more get it by hops
EXAMPLE_TOKENS = 500  # of the worked example of variable tracking, at most
COMMON = 10  # words to be found in a list


class Prompt(NamedTuple):
    ids: list  # token ids
    references: list  # the texts that a full answer contains
    tokens_to_generate: int


def make_prompt(task, tokenizer, length, number, seed, corpus):
    """Return a Prompt of one of TASKS: number `number` of those of a length.

    It has as many whole lines or words of its haystack as fit, when the tokens to generate and a BOS count as
    part of `length`. corpus: a 1-d array of token ids, the texts in which some tasks hide their needles.
    Raise InputError if the length is too short, or if the texts have hardly any spaces.
    """
    try:
        return _draw_prompt(task, tokenizer, length, number, seed, corpus)
    except TooShort as too_short:
        raise InputError(_too_few(length, {task: too_short.missing})) from None


def check_length(tokenizer, length, seed, corpus):
    """Raise InputError if a length is too short for prompt number 0 of some tasks. It names all of them.

    The arguments are those of `make_prompt`.
    """
    missing = {}
    for task in TASKS:
        try:
            _draw_prompt(task, tokenizer, length, 0, seed, corpus)
        except TooShort as too_short:
            missing[task] = too_short.missing
    if missing:
        raise InputError(_too_few(length, missing))


def _too_few(length, missing):
    """Return the message for a length that is too short. missing: {task: tokens that it lacks}."""
    most_first = sorted(missing, key=missing.get, reverse=True)
    needed = ", ".join(f"{length + missing[task]} for {task}" for task in most_first)
    return f"{length} tokens are too few for RULER: this tokenizer needs about {needed}"


def _draw_prompt(task, tokenizer, length, number, seed, corpus):
    """Return what `make_prompt` does. Raise TooShort if the length is too short."""
    tokens_to_generate = TASKS[task].tokens_to_generate
    rng = np.random.default_rng((seed, list(TASKS).index(task), length, number))
    draft = Draft(tokenizer, length, length - tokens_to_generate, rng, corpus)
    pieces, references = TASKS[task].make(draft)
    return Prompt(draft.encode(pieces), references, tokens_to_generate)


def score(said, references):
    """Return the share of the references that occur in a text, whatever their case (string_match_all)."""
    said = said.lower()
    return sum(reference.lower() in said for reference in references) / len(references)


# ---------------------------------------------------------------- pieces of text and their tokens


class Draft:
    """What the maker of a prompt needs: room for tokens, random numbers, texts.

    length: of the prompt and what is generated, in tokens. room: of the prompt alone, in tokens. rng: a numpy
    Generator. corpus: see `make_prompt`.
    """

    def __init__(self, tokenizer, length, room, rng, corpus):
        self.tokenizer, self.length, self.room, self.rng, self.corpus = tokenizer, length, room, rng, corpus
        self._ids = {}  # of each piece that was encoded, as it is inside a text

    def encode(self, pieces):
        """Return the token ids of a text in pieces, with a BOS if the model has one.

        Each piece but the first begins with a space or a line break, or follows a line break.
        """
        first, *others = pieces
        tokens = bos_ids(self.tokenizer) + self._encode_inside([first], before=[""])[0]
        for ids in self._ids_inside(others):
            tokens += ids
        return tokens

    def sizes(self, pieces):
        """Return how many tokens each piece has inside a text, int64 (len(pieces),)."""
        return np.array([len(ids) for ids in self._ids_inside(pieces)], dtype=np.int64)

    def _ids_inside(self, pieces):
        """Return the token ids of each piece inside a text, lists. They are kept for the next call."""
        unknown = [piece for piece in dict.fromkeys(pieces) if piece not in self._ids]
        before = ["x" if piece.startswith((" ", "\n")) else "x\n" for piece in unknown]
        self._ids.update(zip(unknown, self._encode_inside(unknown, before)))
        return [self._ids[piece] for piece in pieces]

    def _encode_inside(self, pieces, before):
        """Return the token ids of each piece with a text before it, without those of that text.

        Something stands behind a line break too: tokenizers see white space at the end differently.
        """
        behind = ["x" if piece.endswith("\n") else "" for piece in pieces]
        texts = [first + piece + last for first, piece, last in zip(before, pieces, behind)]
        to_cut = {text: len(self.tokenizer.encode(text)) for text in ("", "x", "x\n")}
        of_last = len(self.tokenizer.encode("x\nx")) - to_cut["x\n"]
        encoded = []
        for first, last, ids in zip(before, behind, self.tokenizer.encode_batch(texts)):
            encoded.append(ids[to_cut[first] : len(ids) - of_last * len(last)])
        return encoded


class TooShort(Exception):
    """Not even the smallest prompt fits. missing: tokens that a prompt would need in addition."""

    def __init__(self, missing):
        super().__init__(missing)
        self.missing = int(missing)


def units_that_fit(sizes, room, least):
    """Return how many units of a haystack fit into `room` tokens. Raise TooShort if fewer than `least` do.

    sizes: the tokens of each, in order, an array.
    """
    ends = np.cumsum(sizes)
    count = int(np.searchsorted(ends, room, side="right"))
    if count < least:
        raise TooShort(ends[least - 1] - room)
    return count


def around_context(template, **values):
    """Return what stands before and after the context in a template, filled in. The context ends its line."""
    before, after = template.split("{context}\n")
    return before.format(**values), after.format(**values)


# ---------------------------------------------------------------- random names and values


@functools.cache
def word_lists():
    """Return adjectives, nouns and verbs, three lists of words."""
    paragraphs = (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").split("\n\n")
    return [paragraph.split() for paragraph in paragraphs]


def random_pairs(rng, count):
    """Return so many different adjective-noun pairs, such as "amber-river"."""
    adjectives, nouns, _ = word_lists()
    chosen = rng.choice(len(adjectives) * len(nouns), count, replace=False)
    return [f"{adjectives[i % len(adjectives)]}-{nouns[i // len(adjectives)]}" for i in chosen.tolist()]


def random_names(rng, count, alphabet, length):
    """Return so many different names of `length` letters."""
    names = []
    for number in rng.choice(len(alphabet) ** length, count, replace=False).tolist():
        letters = ""
        for _ in range(length):
            number, letter = divmod(number, len(alphabet))
            letters += alphabet[letter]
        names.append(letters)
    return names


def random_values(rng, count, kind):
    """Return so many values of a kind: "numbers" of seven digits, or "uuids"."""
    if kind == "numbers":
        return [str(number) for number in rng.integers(10**6, 10**7, count)]
    return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]


# ---------------------------------------------------------------- needles in a haystack


def niah(draft, haystack, key_kind="words", value_kind="numbers", n_keys=1, n_values=1, n_queries=1):
    """Return the pieces of a prompt with needles, and the references: the values of the keys asked for.

    haystack: "noise" (one line again and again), "needles" (of other keys) or "texts". key_kind: "words" or
    "uuids". value_kind: "numbers" or "uuids". n_keys: how many keys there are, each with n_values values.
    n_queries: how many keys are asked for.
    """
    rng = draft.rng
    values_of_key = {}
    needles = []
    for key in random_keys(rng, n_keys, key_kind):
        values_of_key[key] = random_values(rng, n_values, value_kind)
        needles += needle_lines(value_kind, [key] * n_values, values_of_key[key])
    rng.shuffle(needles)
    asked = rng.choice(list(values_of_key), n_queries, replace=False).tolist()
    references = [value for key in asked for value in values_of_key[key]]
    query = asked[0] if n_queries == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]

    template, kind = NIAH, value_kind
    if len(references) == 1:
        template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
        kind = kind.removesuffix("s")
    before, after = around_context(template, type_needle_v=kind, query=query)

    if haystack == "texts":
        return among_sentences(draft, before, needles, after), references
    room = draft.room - len(draft.encode([before, *needles, after]))
    if haystack == "noise":
        lines = lines_of_noise(draft, room, least=len(needles))
    else:
        lines = lines_of_needles(draft, room, key_kind, value_kind, taken=asked)
    return [before, *among_lines(rng, lines, needles), after], references


def random_keys(rng, count, kind):
    """Return so many keys of a kind: "words" (different pairs) or "uuids"."""
    return random_pairs(rng, count) if kind == "words" else random_values(rng, count, "uuids")


def needle_lines(value_kind, keys, values):
    """Return a needle for each key and its value, lines."""
    needles = []
    for key, value in zip(keys, values):
        needles.append(NEEDLE.format(type_needle_v=value_kind, key=key, value=value) + "\n")
    return needles


def lines_of_noise(draft, room, least):
    """Return as many lines of noise as fit into `room` tokens. Raise TooShort if fewer than `least` do."""
    size = draft.sizes([NOISE])[0]
    if room < least * size:
        raise TooShort(least * size - room)
    return [NOISE] * int(room // size)


def lines_of_needles(draft, room, key_kind, value_kind, taken):
    """Return as many needles as fit into `room` tokens, none of them with one of the keys in `taken`."""
    count = 100  # lines, from which one sees how many are needed
    while True:
        keys = [key for key in random_keys(draft.rng, count, key_kind) if key not in taken]
        lines = needle_lines(value_kind, keys, random_values(draft.rng, len(keys), value_kind))
        sizes = draft.sizes(lines)
        if sizes.sum() > room:
            return lines[: units_that_fit(sizes, room, least=1)]
        count = max(count + 100, int(1.05 * room / sizes.mean()))


def among_lines(rng, lines, needles):
    """Return the lines with the needles among them, in their order. No needle is the last line."""
    places = np.sort(rng.choice(len(lines), len(needles), replace=False))
    lines = list(lines)
    for place, needle in zip(places[::-1].tolist(), needles[::-1]):  # an earlier place stays where it is
        lines.insert(place, needle)
    return lines


# ---------------------------------------------------------------- needles in texts


def among_sentences(draft, before, needles, after):
    """Return the pieces of a prompt whose needles stand between sentences of the texts, in one long line."""
    needles = [" " + needle.removesuffix("\n") for needle in needles]
    depths = draft.rng.choice(DEPTHS, len(needles), replace=False)
    room = draft.room - len(draft.encode([before, *needles, "\n", after]))
    words = words_of_texts(draft, room, least=len(needles))
    count = units_that_fit(draft.sizes(words), room, least=len(needles))
    while True:
        pieces = [before, *insert_needles(words[:count], needles, depths), after]
        if len(draft.encode(pieces)) <= draft.room:
            return pieces
        count -= 1  # Two needles at one place, or one at the end, bring a space that was not counted.


def words_of_texts(draft, room, least):
    """Return consecutive words of the texts, each with a space before it: more than fit into `room` tokens.

    There are at least `least`. They begin anywhere, and after the texts' end comes their beginning. Raise
    InputError if hardly any spaces are in the texts.
    """
    start = draft.rng.integers(len(draft.corpus))
    needed = 64 + max(0, room)
    for tokens in (needed + needed // 4, 4 * needed, 16 * needed):  # Much of code is white space, which goes.
        stretch = np.take(draft.corpus, np.arange(start, start + tokens), mode="wrap")
        whole_words = draft.tokenizer.decode(stretch.tolist()).split()[1:-1]
        words = [" " + word for word in whole_words]
        if len(words) >= least and draft.sizes(words).sum() > room:
            return words
    raise InputError("the texts have too few words with spaces between them for RULER; add other texts")


def insert_needles(words, needles, depths):
    """Return words and needles, pieces with a space before them, in one line. depths: see DEPTHS.

    NVIDIA joins stretches of text and needles with spaces. A stretch without any sentence leaves its
    space there too.
    """
    sentence_ends = [0]
    for i, word in enumerate(words[:-1], 1):
        if re.search(r"""[.!?。！？]["'”’)\]]*$""", word):
            sentence_ends.append(i)
    sentence_ends.append(len(words))
    sentences = len(sentence_ends) - 1

    pieces = []
    done = 0
    for needle, depth in zip(needles, np.sort(depths)):
        place = sentence_ends[int(sentences * (depth / 100))]
        pieces += words[done:place]
        pieces.append(" " + needle if pieces and place == done else needle)
        done = place
    pieces += words[done:]
    if pieces[0] == words[0]:
        pieces[0] = pieces[0].removeprefix(" ")
    pieces[-1] += " \n" if done == len(words) else "\n"
    return pieces


# ---------------------------------------------------------------- variable tracking


def variable_tracking(draft):
    """Return the pieces of a prompt with a chain of assignments, behind a worked example, and its names."""
    example_names = random_names(draft.rng, CHAIN, ascii_uppercase, 3)
    names = random_names(draft.rng, CHAIN, ascii_uppercase, 5)
    first, second = draft.rng.integers(10000, 99999, 2)

    before, after = around_context(VARIABLE_TRACKING, query=first, num_v=CHAIN)
    chain = assignments(example_names, first)
    fixed = len(draft.encode([before, *chain, after])) - len(bos_ids(draft.tokenizer))
    room = max(EXAMPLE_TOKENS - fixed, CHAIN * draft.sizes([NOISE])[0])
    lines = among_lines(draft.rng, lines_of_noise(draft, room, CHAIN), chain)
    between = after + " " + " ".join(example_names) + "\n\n" + before
    example = [before, *lines, between]

    _, after = around_context(VARIABLE_TRACKING, query=second, num_v=CHAIN)
    chain = assignments(names, second)
    room = draft.room - len(draft.encode([*example, *chain, after]))
    lines = among_lines(draft.rng, lines_of_noise(draft, room, CHAIN), chain)
    return [*example, *lines, after], names


def assignments(names, value):
    """Return the lines that give a value to the first name, and to each other name that of the one before."""
    lines = [f"VAR {names[0]} = {value}\n"]
    for name, earlier in zip(names[1:], names):
        lines.append(f"VAR {name} = VAR {earlier} \n")
    return lines


# ---------------------------------------------------------------- common words


def common_words(draft):
    """Return the pieces of a prompt with a numbered list, behind a worked example, and its common words."""
    if draft.length < 4096:
        example_words, example_repeats, repeats = 20, (3, 1), (6, 1)
    else:
        example_words, example_repeats, repeats = 40, (10, 3), (30, 3)
    before, after = around_context(COMMON_WORDS)
    words = random_words(draft.rng, example_words)
    answers = " ".join(f"{i}. {word}" for i, word in enumerate(words[:COMMON], 1))
    example = [before, *numbered_list(draft.rng, words, *example_repeats), f"{after} {answers}\n{before}"]

    room = draft.room - len(draft.encode([*example, "\n", after]))
    words = words_that_fit(draft, room, *repeats)
    return [*example, *numbered_list(draft.rng, words, *repeats), after], words[:COMMON]


def random_words(rng, count):
    """Return at most so many different words of all lists, fewer if they have not so many."""
    words = list(dict.fromkeys(itertools.chain(*word_lists())))  # each once, though it may be of two kinds
    return rng.choice(words, min(count, len(words)), replace=False).tolist()


def words_that_fit(draft, room, often, seldom):
    """Return as many words as a list in `room` tokens has: pairs of words if the words are not enough.

    often, seldom: how many times each of the first ten is in the list, and each other one.
    """
    at_most = COMMON + max(0, room) // (3 * seldom)  # An entry such as " 17. river" has three tokens or more.
    for draw in (random_words, random_pairs):
        words = draw(draft.rng, at_most)
        sizes = sizes_of_words(draft, words, often, seldom)
        fitting = words[: COMMON - 1 + units_that_fit(sizes, room, least=1)]
        if len(fitting) < len(words):
            break
    return fitting


def sizes_of_words(draft, words, often, seldom):
    """Return the tokens that a list has with the first ten words, and that each other word adds, an array.

    The rest is as in `words_that_fit`.
    """
    repeats = np.full(len(words), seldom)
    repeats[:COMMON] = often
    ends = np.cumsum(repeats)  # entries of the list with so many words
    numbers = draft.sizes(["1."] + [f" {i}." for i in range(2, ends[-1] + 1)])
    by_word = repeats * draft.sizes([" " + word for word in words])
    totals = np.cumsum(by_word) + np.cumsum(numbers)[ends - 1]
    return np.diff(totals[COMMON - 1 :], prepend=0)


def numbered_list(rng, words, often, seldom):
    """Return pieces "1.", " word", " 2.", … in random order. The rest is as in `sizes_of_words`."""
    entries = rng.permutation(words[:COMMON] * often + words[COMMON:] * seldom).tolist()
    pieces = []
    for i, word in enumerate(entries, 1):
        pieces += [f" {i}.", " " + word]
    pieces[0] = "1."
    pieces[-1] += "\n"
    return pieces


# ---------------------------------------------------------------- frequent words


def frequent_words(draft):
    """Return the pieces of a text of coded words and the three that are most frequent after "...".

    The k-th word has the share k^-2 / zeta(2) of all.
    """
    before, after = around_context(FREQUENT_WORDS)
    before = before.removesuffix(" ")  # it belongs to the first coded word
    n_words = max(4, draft.room // 50)
    words = [" ..."] + [" " + word for word in random_names(draft.rng, n_words - 1, ascii_lowercase, 6)]
    sizes = draft.sizes(words)
    ranks = np.arange(1, n_words + 1)

    def repeats(total):
        return (total * ranks**-2.0 / (np.pi**2 / 6)).astype(int)

    room = draft.room - len(draft.encode([before, "\n", after]))
    least = 30  # with fewer, the first words are not apart
    # The largest total that fits, found by halving: its tokens grow with it.
    total = bisect_right(range(2 * draft.length), room, key=lambda n: repeats(n) @ sizes) - 1
    if total < least:
        raise TooShort(repeats(least) @ sizes - room)
    pieces = draft.rng.permutation(np.repeat(words, repeats(total))).tolist()
    pieces[-1] += "\n"
    return [before, *pieces, after], [word.removeprefix(" ") for word in words[1:4]]


# ---------------------------------------------------------------- the tasks


class Task(NamedTuple):
    make: Callable  # Draft -> (pieces, references)
    tokens_to_generate: int
    over_texts: bool = False  # it hides its needles in the user's texts


def _niah(haystack, **kinds_and_counts):
    return Task(functools.partial(niah, haystack=haystack, **kinds_and_counts), 128, haystack == "texts")


TASKS = {
    "niah_single_1": _niah("noise"),
    "niah_single_2": _niah("texts"),
    "niah_single_3": _niah("texts", value_kind="uuids"),
    "niah_multikey_1": _niah("texts", n_keys=4),
    "niah_multikey_2": _niah("needles"),
    "niah_multikey_3": _niah("needles", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": _niah("texts", n_values=4),
    "niah_multiquery": _niah("texts", n_keys=4, n_queries=4),
    "vt": Task(variable_tracking, 30),
    "cwe": Task(common_words, 120),
    "fwe": Task(frequent_words, 50),
}
