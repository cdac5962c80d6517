"""tasks/ruler.py: prompts that have the properties of RULER's definition, with tokenizers of three kinds."""

import ast
import importlib.util
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import LLAMA3

from hf.builtin import open_model
from storage.errors import InputError
from tasks import ruler

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
STORY = 'Chapter {i}. The cat sat on the mat {i} times! "Was it so?"\nIt was,  said the dog of house {i}\n'
SOURCE = "".join(STORY.format(i=i) for i in range(150))
LENGTHS = (2048, 9000)  # below and above 4,096, where the counts of common words change
TEXTS = [ruler.NIAH, ruler.VARIABLE_TRACKING, ruler.COMMON_WORDS, ruler.FREQUENT_WORDS, ruler.NEEDLE]
TEXTS += ["a.\n\nThe", "a.\n\n", "a \nWhat", "a \n", "a  One", "... ..."] * 9


@pytest.fixture(scope="module")
def tiny():
    """The tokenizer of the built-in model, a SentencePiece one."""
    return open_model("tiny").load_tokenizer()


def known_texts():
    """Return the texts that byte-level tokenizers learn from here."""
    return [*TEXTS, *(" ".join(words) for words in ruler.word_lists()), NOISE, SOURCE]


@pytest.fixture(scope="module", params=["sentencepiece", "gpt2", "llama3"])
def tokenizer(request, tiny, make_byte_level):
    if request.param == "sentencepiece":
        return tiny
    return make_byte_level(known_texts(), 3000, LLAMA3 if request.param == "llama3" else None)


@pytest.fixture(scope="module")
def make(tokenizer):
    """make(task, length, number=0) -> the Prompt and its text."""
    corpus = np.array(tokenizer.encode(SOURCE), dtype=np.uint16)

    def draw(task, length, number=0, seed=0):
        prompt = ruler.make_prompt(task, tokenizer, length, number, seed, corpus)
        return prompt, tokenizer.decode(prompt.ids[tokenizer.bos_id is not None :])

    return draw


# ---------------------------------------------------------------- all tasks


def test_templates_are_those_of_lm_eval():
    """Word for word, but for a spelling that NVIDIA has corrected since. (They are read as text: importing
    them would ask the network for NLTK's data.)"""
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / "ruler"
    theirs = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                theirs.add(node.value.replace("assgined", "assigned"))
    assert ruler.NEEDLE in theirs and NOISE in theirs
    question, answer = ruler.NIAH.split("? ")
    assert question + "?" in theirs
    assert answer == "The special magic {type_needle_v} for {query} mentioned in the provided text are"
    for template in (ruler.VARIABLE_TRACKING, ruler.COMMON_WORDS, ruler.FREQUENT_WORDS):
        question, answer = template.split(" Answer: ")
        assert question in theirs and " Answer: " + answer in theirs


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", ruler.TASKS)
def test_the_length_is_filled_with_a_canonical_text(tokenizer, make, task, length):
    """What is left over is less than the unit that the haystack has more of in a longer prompt."""
    needle = "One of the special magic uuids for {0} is: {0}.\n"
    units = {
        "vt": NOISE + "\n",
        "cwe": " 1234. straightforwardly" * (3 if length >= 4096 else 1),
        "fwe": " ... abcdef bcdefg cdefgh defghi",  # the next of several words may be due at once
        "niah_single_1": NOISE + "\n",
        "niah_multikey_2": needle.format("disproportionate-acknowledgement"),
        "niah_multikey_3": needle.format("12345678-1234-1234-1234-123456789012"),
    }
    unit = " (Chapter 149.)" if ruler.TASKS[task].over_texts else units[task]
    for number in range(3):
        prompt, text = make(task, length, number)
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        assert prompt.ids == bos + tokenizer.encode(text)
        left_over = length - prompt.tokens_to_generate - len(prompt.ids)
        assert 0 <= left_over < len(tokenizer.encode(unit))


@pytest.mark.parametrize("task", ruler.TASKS)
def test_a_prompt_depends_on_seed_length_and_number_alone(make, task):
    prompts = [make(task, *arguments)[0] for arguments in ((2048, 5), (2048, 5), (2048, 6), (2100, 5))]
    prompts.append(make(task, 2048, 5, seed=1)[0])
    assert prompts[0] == prompts[1]
    assert len({tuple(prompt.references) for prompt in prompts}) == 4


def test_tokens_to_generate():
    expected = dict.fromkeys(ruler.TASKS, 128) | {"vt": 30, "cwe": 120, "fwe": 50}
    assert {name: task.tokens_to_generate for name, task in ruler.TASKS.items()} == expected


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multiquery", "vt", "cwe", "fwe"])
def test_a_long_prompt_takes_no_minutes(tiny, task):
    corpus = np.array(tiny.encode(SOURCE), dtype=np.uint16)
    began = time.perf_counter()
    ruler.make_prompt(task, tiny, 131072, 0, 0, corpus)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("task", ruler.TASKS)
def test_a_length_that_is_too_short_is_refused(make, task):
    make(task, 2048)
    for length in (10, 150):
        too_few = rf"{length} tokens are too few for RULER: this tokenizer needs about \d+ for {task}$"
        with pytest.raises(InputError, match=too_few):
            make(task, length)


def test_all_tasks_that_a_length_is_too_short_for_are_named_at_once(tiny):
    """They are those that refuse it when asked one by one, with the same lengths, the longest first."""
    corpus = np.array(tiny.encode(SOURCE), dtype=np.uint16)
    for length, count in ((600, 2), (300, 6)):
        one_by_one = []
        for task in ruler.TASKS:
            try:
                ruler.make_prompt(task, tiny, length, 0, 3, corpus)
            except InputError as error:
                one_by_one.append(str(error).split("about ")[1])
        with pytest.raises(InputError) as error:
            ruler.check_length(tiny, length, 3, corpus)
        at_once = str(error.value).split("about ")[1].split(", ")
        assert sorted(at_once) == sorted(one_by_one) and len(at_once) == count
        needed = [int(each.split()[0]) for each in at_once]
        assert needed == sorted(needed, reverse=True)
    ruler.check_length(tiny, 1300, 3, corpus)


def test_texts_without_spaces_are_refused(make_byte_level):
    tokenizer = make_byte_level(known_texts(), 3000)
    corpus = np.array(tokenizer.encode("abc" * 900))
    with pytest.raises(InputError, match="too few words"):
        ruler.make_prompt("niah_single_2", tokenizer, 1024, 0, 0, corpus)


def test_score_is_the_share_of_references_that_are_said():
    assert ruler.score("The numbers are 12, 345 and ABC.", ["12", "345", "678", "abc"]) == 0.75
    assert ruler.score("7654321", ["1234567"]) == 0.0
    assert ruler.score(" 1234567. One of", ["1234567"]) == 1.0


# ---------------------------------------------------------------- needles

UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
WORDS = r"[a-z]+-[a-z]+"
NUMBER = r"\d{7}"
# task: form of a key, form of a value, kind of the values, keys, values of each, keys asked for
NIAH = {
    "niah_single_1": (WORDS, NUMBER, "number", 1, 1, 1),
    "niah_single_2": (WORDS, NUMBER, "number", 1, 1, 1),
    "niah_single_3": (WORDS, UUID, "uuid", 1, 1, 1),
    "niah_multikey_1": (WORDS, NUMBER, "number", 4, 1, 1),
    "niah_multikey_2": (WORDS, NUMBER, "number", None, 1, 1),
    "niah_multikey_3": (UUID, UUID, "uuid", None, 1, 1),
    "niah_multivalue": (WORDS, NUMBER, "number", 1, 4, 1),
    "niah_multiquery": (WORDS, NUMBER, "number", 4, 1, 4),
}


@pytest.mark.parametrize("task", NIAH)
def test_needles_and_the_question_for_them(make, task):
    key, value, kind, n_keys, n_values, n_asked = NIAH[task]
    prompt, text = make(task, 2048, number=2)
    needles = re.findall(rf"One of the special magic {kind}s for ({key}) is: ({value})\.", text)
    values_of_key = {}
    for name, number in needles:
        values_of_key.setdefault(name, []).append(number)
    assert {len(values) for values in values_of_key.values()} == {n_values}
    if n_keys:
        assert len(values_of_key) == n_keys
    else:
        assert len(values_of_key) > 10 and len(values_of_key) == len(needles)

    first, last = text[: text.index("\n")], text[text.rindex("\n") + 1 :]
    if n_asked * n_values == 1:
        hidden = f"A special magic {kind} is hidden within the following text."
        asks = rf"What is the special magic {kind} for (.+) mentioned in the provided text\?"
        says = rf"The special magic {kind} for (.+) mentioned in the provided text is"
    else:
        hidden = f"Some special magic {kind}s are hidden within the following text."
        asks = rf"What are all the special magic {kind}s for (.+) mentioned in the provided text\?"
        says = rf"The special magic {kind}s for (.+) mentioned in the provided text are"
        kind += "s"
    assert first == f"{hidden} Make sure to memorize it. I will quiz you about the {kind} afterwards."
    query, again = re.fullmatch(f"{asks} {says}", last).groups()
    assert query == again
    asked = re.split(", and |, ", query)
    assert len(asked) == len(set(asked)) == n_asked and (", and " in query) == (n_asked > 1)
    assert sorted(prompt.references) == sorted(value for name in asked for value in values_of_key[name])


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2", "niah_multikey_3"])
def test_needles_stand_among_lines_in_many_places(make, task):
    places = set()
    for number in range(8):
        prompt, text = make(task, 2048, number)
        _, *lines, _ = text.split("\n")
        (place,) = (i for i, line in enumerate(lines) if prompt.references[0] in line)
        places.add(place)
        others = lines[:place] + lines[place + 1 :]
        if task == "niah_single_1":
            assert set(others) == {NOISE}
        else:
            assert all(line.startswith("One of the special magic") for line in others)
        assert place < len(others)  # never the last line
    assert len(places) > 4


def test_needles_stand_before_any_line_but_never_last():
    seen = set()
    for seed in range(60):
        lines = ruler.among_lines(np.random.default_rng(seed), ["a", "b", "c"], ["1", "2"])
        seen.add("".join(lines))
    assert seen == {"1a2bc", "1ab2c", "a1b2c"}


@pytest.mark.parametrize("task", ["niah_multivalue", "niah_multiquery"])
def test_needles_stand_in_any_order(make, task):
    orders = set()
    for number in range(6):
        prompt, text = make(task, 1024, number)
        orders.add(tuple(np.argsort([text.index(value) for value in prompt.references]).tolist()))
    assert len(orders) > 3


@pytest.mark.parametrize("task", [name for name, task in ruler.TASKS.items() if task.over_texts])
def test_needles_stand_between_sentences_at_some_of_the_forty_depths(make, task):
    words_of_source = SOURCE.split() * 3
    for number in range(8):
        _, text = make(task, 2048, number)
        _, context, _ = text.split("\n")
        stretches = re.split(rf"One of the special magic \w+ for {WORDS} is: [0-9a-f-]+\.", context)
        words = [word for stretch in stretches for word in stretch.split()]
        assert any(words == words_of_source[i : i + len(words)] for i in range(len(SOURCE.split())))

        ends = [i for i, word in enumerate(words, 1) if re.search(r'[.!?]"?$', word) and i < len(words)]
        sentence_ends = [0, *ends, len(words)]
        depths = np.round(np.linspace(0, 100, 40)).astype(int)
        allowed = {sentence_ends[int(depth / 100 * (len(sentence_ends) - 1))] for depth in depths}
        read = np.cumsum([len(stretch.split()) for stretch in stretches])
        assert len(stretches) > 1 and set(read[:-1].tolist()) <= allowed


def test_empty_stretches_leave_their_spaces():
    """The definition joins stretches of text and needles with spaces, and some stretches are empty."""
    words = [" A.", " B.", " c"]
    joined = {
        (0,): " N0. A. B. c\n",
        (50,): "A. N0. B. c\n",
        (100,): "A. B. c N0. \n",
        (0, 3, 100): " N0.  N1. A. B. c N2. \n",
    }
    for depths, expected in joined.items():
        needles = [f" N{i}." for i in range(len(depths))]
        assert "".join(ruler.insert_needles(words, needles, np.array(depths))) == expected


# ---------------------------------------------------------------- variable tracking


def names_with_value(lines, value):
    """Return the names that have a value after these assignments, in order."""
    values = {}
    for line in lines:
        if assignment := re.fullmatch(r"VAR (\w+) = (?:VAR (\w+) |(\d+))", line):
            name, earlier, number = assignment.groups()
            values[name] = number or values[earlier]
    return [name for name, of_name in values.items() if of_name == value]


@pytest.mark.parametrize("length", LENGTHS)
def test_the_chain_has_the_five_names(tokenizer, make, length):
    for number in range(4):
        prompt, text = make("vt", length, number)
        task = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        before, example, rest = text.split(task)
        assert before == "" and len(tokenizer.encode(task + example.rsplit("  ", 1)[0])) <= 500
        for part, letters, ending in ((example, 3, "\n\n"), (rest, 5, "")):
            *lines, question = part.removesuffix("\n\n").split("\n")
            query, again, said = re.fullmatch(
                r"Question: Find all variables that are assigned the value (\d{5}) in the text above. "
                r"Answer: According to the chain\(s\) of variable assignment in the text above, "
                r"5 variables are assigned the value (\d{5}), they are: (.*)",
                question,
            ).groups()
            names = names_with_value(lines, query)
            assert query == again and len(names) == 5 and all(len(name) == letters for name in names)
            assert said == (" " + " ".join(names) if part is example else "") and part.endswith(ending)
            assert {line for line in lines if not line.startswith("VAR")} == {NOISE}
            assert sum(line.startswith("VAR") for line in lines) == 5
            assert part is example or prompt.references == names


# ---------------------------------------------------------------- common and frequent words


@pytest.mark.parametrize("length", LENGTHS)
def test_common_words_are_the_most_frequent_by_counting(make, length):
    if length < 4096:
        example_words, example_repeats, repeats = 20, [3, 1], [6, 1]
    else:
        example_words, example_repeats, repeats = 40, [10, 3], [30, 3]
    prompt, text = make("cwe", length)
    before = "Below is a numbered list of words. In these words, some appear more often than others. "
    before += "Memorize the ones that appear most often.\n"
    after = "\nQuestion: What are the 10 most common words in the above list? "
    after += "Answer: The top 10 words that appear most often in the list are:"
    nothing, example, question = text.split(before)
    assert nothing == ""
    shown, answers = example.removesuffix("\n").split(after)
    asked, nothing = question.split(after)
    assert nothing == ""
    answers = re.findall(r" \d+\. (\S+)", answers)
    lists = [(shown, answers, example_repeats), (asked, prompt.references, repeats)]
    for shown_list, common, expected in lists:
        entries = [entry.split(". ") for entry in re.findall(r"\d+\. \S+", shown_list)]
        assert " ".join(". ".join(entry) for entry in entries) == shown_list
        assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
        counts = Counter(word for _, word in entries)
        assert sorted(common) == sorted(word for word, _ in counts.most_common(10))
        assert sorted(set(counts.values()), reverse=True) == expected
        assert list(counts.values()).count(expected[0]) == 10
        assert len(counts) == example_words or shown_list is asked


def test_pairs_of_words_stand_in_for_words_where_they_are_not_enough(make, monkeypatch):
    monkeypatch.setattr(ruler, "word_lists", lambda: [["old", "new"] * 50, [f"w{i}" for i in range(60)], []])
    prompt, text = make("cwe", 9000)
    assert all(re.fullmatch(r"(old|new)-w\d+", word) for word in prompt.references)
    assert len(set(re.findall(r"\d+\. (\S+-\S+)", text))) > 60


@pytest.mark.parametrize("length", LENGTHS)
def test_frequent_words_have_the_shares_of_a_zeta_distribution(make, length):
    prompt, text = make("fwe", length)
    before = "Find the three most frequently appeared coded words. "
    coded = text.split(before)[1].split("\nQuestion: ")[0].split(" ")
    counts = Counter(coded).most_common()
    assert counts[0][0] == "..." and [word for word, _ in counts[1:4]] == prompt.references
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in counts[1:])
    most = range(counts[0][1] * 3)
    shares = np.arange(1, (length - 50) // 50 + 1) ** -2.0 / (np.pi**2 / 6)
    totals = [total for total in most if int(total * shares[0]) == counts[0][1]]
    expected = [[int(n) for n in total * shares if n >= 1] for total in totals]
    assert [count for _, count in counts] in expected
