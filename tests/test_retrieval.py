"""Episodes keep their promises, with tokenizers of three kinds.

They are read as a reader would: from the text of the window, without what the module knows about it. The
words of the test documents occur in no sentence of an episode.
"""

import itertools
import re
import time

import numpy as np
import pytest
from conftest import LLAMA3

import retrieval
from hf.builtin import open_model
from retrieval import ANSWER_WEIGHT, episode
from tasks import prompts, ruler

TARGET = 16  # times the window
LENGTHS = (256, 700, 2048, 8192)


def make_text():
    """Return a text of 90,000 characters in lines of one to three sentences."""
    rng = np.random.default_rng(0)
    syllables = ["mi", "zu", "po", "ke", "wy", "ju", "xo", "fe"]
    lines = []
    while len(lines) < 900:
        sentences = []
        for _ in range(rng.integers(1, 4)):
            words = ["".join(rng.choice(syllables, rng.integers(2, 5))) for _ in range(rng.integers(3, 12))]
            sentences.append(" ".join(words).capitalize() + ".")
        lines.append(" ".join(sentences))
    return "\n".join(lines)


TEXT = make_text()


@pytest.fixture(scope="module", params=["sentencepiece", "gpt-2", "llama3"])
def tokenizer(request, make_byte_level):
    """A tokenizer that cuts texts as a family's does. Llama 3's joins a full stop with a line break."""
    if request.param == "sentencepiece":
        return open_model("tiny").load_tokenizer()
    lines = [f"{sentence}\n" for sentence in retrieval.STATEMENTS]
    texts = [TEXT[:5000], *map(str, range(100, 999, 7)), *lines, *retrieval.NOUNS]
    return make_byte_level(texts, 900, LLAMA3 if request.param == "llama3" else None)


def document_of(tokenizer):
    return np.array(tokenizer.encode(TEXT), dtype=np.uint16)


def draw_windows(tokenizer, length, n, first_seed=0):
    """Return n episodes, at least, and at most a tenth more draws than that."""
    document = document_of(tokenizer)
    windows = []
    for seed in range(first_seed, first_seed + n + max(2, n // 10)):
        rng = np.random.default_rng(seed)
        start = rng.integers(len(document) - length)
        window = episode(rng, document[start : start + length + 1], length, TARGET * length, tokenizer)
        if window is not None:
            windows.append(window)
    assert len(windows) >= n
    return windows


# ---------------------------------------------------------------- what every window promises


@pytest.mark.parametrize("length", LENGTHS)
def test_promises_to_every_caller(tokenizer, length):
    for tokens, positions, targets, weights in draw_windows(tokenizer, length, 20):
        for ids in (tokens, positions, targets):
            assert ids.dtype == np.int64 and ids.shape == (length,)
        assert weights.dtype == np.float32 and weights.shape == (length,)
        assert positions[0] == 0 and (np.diff(positions) > 0).all() and positions[-1] < TARGET * length
        assert np.array_equal(tokens[1:], targets[:-1])
        assert tokens.min() >= 0 and targets.max() < tokenizer.vocab_size
        assert set(weights.tolist()) <= {0.0, 1.0, ANSWER_WEIGHT}
        assert ANSWER_WEIGHT in weights
        assert 0 in weights  # the facts


def test_text_goes_on_around_the_lines(tokenizer):
    """The weighted text is the beginning of the document, without a gap."""
    document = document_of(tokenizer)
    for seed in range(20):
        window = episode(np.random.default_rng(seed), document, 2048, 2048, tokenizer)
        text = window[2][window[3] == 1]
        begin = 1 - int(window[2][0] != document[1])  # the first token of the window is no target
        assert np.array_equal(text, document[begin : begin + len(text)])


def test_the_text_weighs_what_its_tokens_weigh(tokenizer):
    """As where only answers of a conversation count. Facts and the answers about them weigh what they did."""
    document = document_of(tokenizer)
    for seed in range(20):
        plain = episode(np.random.default_rng(seed), document, 1000, 9000, tokenizer)
        is_odd = (document % 2).astype(np.float32)
        window = episode(np.random.default_rng(seed), document, 1000, 9000, tokenizer, is_odd)
        assert all(map(np.array_equal, plain[:3], window[:3])) and window[3].dtype == np.float32
        expected = np.where(plain[3] == 1, plain[2] % 2, plain[3])
        assert np.array_equal(window[3], expected) and (plain[3] == 1).any()


def test_pure_function_of_the_generator(tokenizer):
    document = document_of(tokenizer)

    def draw(seed):
        return episode(np.random.default_rng(seed), document, 1000, 9000, tokenizer)

    for seed in range(5):
        assert all(map(np.array_equal, draw(seed), draw(seed)))
    assert not np.array_equal(draw(0)[0], draw(1)[0])


def test_a_window_too_short_is_none_and_no_error(tokenizer):
    document = document_of(tokenizer)
    results = {8: [], 30: [], 60: [], 120: [], 256: []}
    for length, seed in itertools.product(results, range(40)):
        window = episode(np.random.default_rng(seed), document, length, 8 * length, tokenizer)
        results[length].append(window is not None)
    assert not any(results[8])
    assert np.mean(results[256]) > 0.9


def test_a_target_as_long_as_the_window_leaves_no_skip(tokenizer):
    document = document_of(tokenizer)
    for seed in range(10):
        positions = episode(np.random.default_rng(seed), document, 512, 512, tokenizer)[1]
        assert np.array_equal(positions, np.arange(512))


def test_fast_enough(tokenizer):
    """A window of 8,192 takes 20 ms; the limit leaves room for a busy machine."""
    draw_windows(tokenizer, 8192, 1)  # what is computed once for a tokenizer
    began = time.process_time()
    draw_windows(tokenizer, 8192, 10)
    assert time.process_time() - began < 12 * 0.4


# ---------------------------------------------------------------- questions, as the window's text tells them


def answer_runs(weights):
    """Return (begin, end) of each run of answer tokens among the targets."""
    edges = np.flatnonzero(np.diff(weights == ANSWER_WEIGHT, prepend=False, append=False))
    return edges.reshape(-1, 2).tolist()


def middle(tokenizer, ids):
    """Return the text of ids in the middle of a text."""
    return tokenizer.decode([*tokenizer.encode("x"), *ids])[1:]


def single_answers(run):
    """Return the values in the text of a run of answer tokens, which ends with the token behind them."""
    return re.split(r", | and ", re.sub(r'(\.|;| \||"}|")?\s*$', "", run.strip()))


def read_questions(tokenizer, window):
    """Yield for each question: its line up to the answer, its answers, the text before the last skip."""
    _, positions, targets, weights = window
    jumps = 1 + np.flatnonzero(np.diff(positions) > 1)
    for begin, end in answer_runs(weights):
        before = middle(tokenizer, targets[:begin])
        asked = before.rsplit("\n", 1)[1]
        seen = before.removesuffix(asked)
        if len(jumps):
            assert begin >= jumps[-1]  # the last chunk has all questions
            seen = middle(tokenizer, targets[: jumps[-1] - 1])
        yield asked, single_answers(middle(tokenizer, targets[begin:end])), seen


@pytest.mark.parametrize("length", LENGTHS)
def test_answers_stand_before_the_skip(tokenizer, length):
    for window in draw_windows(tokenizer, length, 2 if length > 2048 else 6):
        for asked, answers, seen in read_questions(tokenizer, window):
            assert asked.strip()
            for answer in answers:
                assert re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", seen), (asked, answer)


def test_skips_have_their_shares():
    """15% of windows have no skip, 15% a log-uniform and the others a uniform one."""
    most, none = 100_000, np.array([], dtype=np.int64)
    rng = np.random.default_rng(0)
    skips = [retrieval.draw_positions(rng, 100, 100 + most, none, 60)[-1] - 99 for _ in range(4000)]
    skips = np.array(skips)
    assert skips.min() == 0 and skips.max() <= most
    for below in (1, 300, most / 4, most / 2, 3 * most / 4):
        expected = 0.15 + 0.15 * np.log(below + 1) / np.log(most) + 0.7 * below / most
        assert abs(np.mean(skips < below) - expected) < 0.03


def test_chunks_begin_at_facts_and_at_the_last_chunk():
    rng = np.random.default_rng(0)
    begins = np.array([0, 7, 7, 30, 48])
    counts = []
    for _ in range(300):
        positions = retrieval.draw_positions(rng, 100, 10_000, begins, 60)
        jumps = 1 + np.flatnonzero(np.diff(positions) > 1)
        assert set(jumps) <= {7, 30, 48, 60}
        counts.append(len(jumps))
    assert set(counts) == {0, 1, 2, 3}


# ---------------------------------------------------------------- facts, read with the module's sentences


WHATS = retrieval.NUMBER_ATTRIBUTES + retrieval.WORD_ATTRIBUTES


def reader(sentences, name=r"[\w -]+?", value=r"[\w-]+( [a-z]+)?"):
    """Return a function that matches a line with one of the sentences: {what, key, value}, None if none."""
    patterns = []
    for sentence in sentences:
        pattern = re.escape(sentence.format(what="WHAT", key="KEY", value="VALUE", n="NUMBER"))
        pattern = pattern.replace("WHAT", f"(?P<what>{'|'.join(WHATS)})", 1).replace("WHAT", "(?P=what)")
        pattern = pattern.replace("KEY", f"(?P<key>{name})", 1).replace("KEY", "(?P=key)")
        pattern = pattern.replace("NUMBER", r"\w+").replace("VALUE", f"(?P<value>{value})")
        patterns.append(re.compile(pattern))

    def read(line):
        for pattern in patterns:
            match = pattern.fullmatch(line)
            if match:
                return match.groupdict()
        return None

    return read


read_fact = reader(retrieval.STATEMENTS)
read_question = reader([*retrieval.FORMS, *retrieval.FULL_REPLIES, *retrieval.ANSWERED])
read_question_for_values = reader(retrieval.SEVERAL_VALUES, value=r"[\w ,-]+")
read_question_for_keys = reader(retrieval.SEVERAL_KEYS, r"[\w ,-]+?", r"[\w ,-]+")


def items(text):
    """Return the items of "a, b and c"."""
    return re.split(", | and ", text)


def read_window(tokenizer, window):
    """Return what the facts of a window tell, and the lines of its last chunk.

    The former is {(what, key): [value, ...]}, in the order of the facts.
    """
    first_question = answer_runs(window[3])[0][0]
    lines = middle(tokenizer, window[2]).split("\n")
    n_before = middle(tokenizer, window[2][:first_question]).count("\n")
    values = {}
    for fact in filter(None, map(read_fact, lines[:n_before])):
        values.setdefault((fact["what"], fact["key"]), []).append(fact["value"])
    return values, lines[n_before:-1]


def test_questions_give_all_values_of_their_keys(tokenizer):
    for_one, for_values, for_keys = 0, 0, 0
    for window in draw_windows(tokenizer, 2048, 40):
        values, lines = read_window(tokenizer, window)
        for line in lines:
            if question := read_question(line):
                for_one += 1
                assert values[question["what"], question["key"]] == [question["value"]], line
            elif question := read_question_for_values(line):
                for_values += 1
                answers = items(question["value"])
                assert values[question["what"], question["key"]] == answers and 2 <= len(answers) <= 6, line
            elif question := read_question_for_keys(line):
                for_keys += 1
                keys, answers = items(question["key"]), items(question["value"])
                assert [values[question["what"], key] for key in keys] == [[answer] for answer in answers]
                assert 2 <= len(keys) <= 4
    assert for_one > 100 and for_values > 10 and for_keys > 5


def drawn(kind, n, seed=0):
    """Return the first items (facts, question) of n generators of a kind, and each question as a text."""
    result = []
    for i in range(n):
        result += itertools.islice(kind(np.random.default_rng((seed, i)), set()), 3)
    return result


def answers_of(question):
    return [answer for _, answer in question if answer]


def test_half_of_the_questions_for_several_values_name_their_number():
    counted = []
    for facts, question in drawn(retrieval.lookup, 300):
        given, answer = question[0]
        line = given + answer + question[1][0]
        if read_question_for_values(line) and not read_question(line):
            counted.append(f" {retrieval.NUMBERS[len(facts)]} " in given)
    assert len(counted) > 60
    assert 0.3 < np.mean(counted) < 0.7


def test_chains_lead_to_their_names_in_order():
    lengths = set()
    for facts, question in drawn(retrieval.chain, 100):
        number = r"[\w-]+"
        given, _ = question[0]
        (answer,) = answers_of(question)
        names, start = [], None
        for fact in facts:  # the name is told with the value, or with the name before it
            words = [w for w in re.findall(number, fact) if w.lower() not in CHAIN_WORDS]
            if start is None:
                start = next(w for w in words if re.search(r"\d", w))
                names = [w for w in words if w != start]
            else:
                assert names[-1] in words
                names += [w for w in words if w != names[-1]]
        assert len(names) == len(facts) == len(set(names))
        lengths.add(len(names))
        if start in answer:
            assert answer == f" {start}" and names[-1] in given
        else:
            assert start in given and items(answer.strip()) == names
    assert lengths == {2, 3, 4, 5, 6}


CHAIN_WORDS = set("set to let be owns the same as put into box gets what holds".split())


def test_lone_facts_are_asked_for_by_what_they_are():
    for facts, question in drawn(retrieval.lone, 40):
        (fact,), (answer,) = facts, answers_of(question)
        (what,) = [what for what in retrieval.LONE_THINGS if what in fact]
        assert answer.strip() in fact and what in question[0][0]


@pytest.mark.parametrize("seed", range(30))
def test_near_names_differ_in_little_and_are_never_equal(seed):
    rng = np.random.default_rng(seed)
    parts = retrieval.draw_parts(rng, retrieval.KEYS, near=True)
    names = retrieval.draw_unused(rng, parts, 5, set())
    assert len(names) == len(set(names)) == 5
    many = set()
    for _ in range(300):
        many |= set(retrieval.draw_unused(rng, parts, 1, set()))
    if any(len(choices[0]) > 1 for choices in parts):  # words, each one of five
        assert all(len(set(choices)) <= 5 for choices in parts)
    else:
        assert len({name[:-2] for name in many}) == 1


def test_names_of_a_window_have_one_meaning():
    """Also where the near names of a lookup have run out, and a new lookup begins."""
    for seed in range(10):
        kinds = retrieval.kinds_of_facts(np.random.default_rng(seed), dense=True)
        told = []
        for facts, _ in itertools.islice(kinds, 200):
            told += {(fact["what"], fact["key"]) for fact in map(read_fact, facts)}
        assert len(told) == len(set(told)) >= 200


# ---------------------------------------------------------------- weights


def test_answer_tokens_are_the_answer_and_what_ends_it(tokenizer):
    kinds = (retrieval.lookup, retrieval.chain, retrieval.lone)
    for _, question in itertools.chain.from_iterable(drawn(kind, 30, seed=1) for kind in kinds):
        ids, weights = retrieval.encode_line(tokenizer, question)
        text = "".join(given + answer for given, answer in question)
        assert middle(tokenizer, ids.astype(int)) == f"\n{text}\n"
        ((begin, end),) = answer_runs(weights)
        (answer,) = answers_of(question)
        run = ids[begin:end].astype(int).tolist()
        assert middle(tokenizer, ids[:begin].astype(int)) == "\n" + text[: text.rindex(answer)]
        assert middle(tokenizer, run).startswith(answer)
        assert len(middle(tokenizer, run[:-1])) <= len(answer)
        assert len(middle(tokenizer, run)) > len(answer)  # a token behind it, of a line break at least


def test_facts_have_no_weight(tokenizer):
    ids, weights = retrieval.encode_line(tokenizer, [("The clerk entered 4711.", "")])
    assert not weights.any() and middle(tokenizer, ids.astype(int)) == "\nThe clerk entered 4711.\n"


# ---------------------------------------------------------------- nothing is shared with the tests


def strings_of(value):
    """Return all strings in a value that consists of strings, tuples, lists and dicts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (tuple, list)):
        return [string for item in value for string in strings_of(item)]
    return []


def constants_of(module):
    """Return all strings in the constants of a module."""
    return [s for name, value in vars(module).items() if name.isupper() for s in strings_of(value)]


def runs_of_four(text):
    """Return the runs of four words in a text, none of them across a placeholder."""
    runs = set()
    for piece in re.split(r"\{\w*\}", text.lower()):
        words = re.findall(r"[\w'()-]+", piece)
        runs |= {tuple(words[i : i + 4]) for i in range(len(words) - 3)}
    return runs


def sentences_of(text, **names):
    """Return the sentences, of three words at least, of a text that is filled with names, else with 12345.

    A value at the end is left out, as a prompt leaves it out.
    """
    filled = re.sub(r"\{\w*\}", lambda match: names.get(match[0][1:-1], "12345"), text).lower()
    sentences = [re.sub(r"\W*(12345)?\W*$", "", sentence) for sentence in re.split(r"(?<=[.?!])\s", filled)]
    return {sentence for sentence in sentences if sentence.count(" ") > 1}


@pytest.fixture(scope="module")
def strings_of_tests():
    strings = constants_of(prompts) + constants_of(ruler)
    for known in ("pass key", "door code", "special magic", "assigned the value", "most common words"):
        assert any(known in string for string in strings)
    return strings


def test_no_four_words_in_a_row_are_those_of_a_test(strings_of_tests):
    ours = set().union(*map(runs_of_four, constants_of(retrieval)))
    theirs = set().union(*map(runs_of_four, strings_of_tests))
    assert len(ours) > 50 and len(theirs) > 100
    assert not ours & theirs


def test_no_sentence_is_one_of_a_test_with_its_nouns_put_in(strings_of_tests):
    theirs = set()
    for string in strings_of_tests:
        for key in ("Oslo", "12345"):  # what {key} is differs between the tests
            theirs |= sentences_of(string, city="Oslo", query="Oslo", key=key, type_needle_v="number")
    assert {"what is the pass key", "the pass key is", "the door code of oslo is"} <= theirs
    assert "one of the special magic number for oslo is" in theirs
    for what in ("door code", "pass key", "special magic number"):
        for sentence in constants_of(retrieval):
            assert not theirs & sentences_of(sentence, what=what, key="Oslo"), sentence


def test_no_noun_or_name_is_one_of_a_test():
    everything = "\n".join(constants_of(retrieval)).lower()
    for noun in ("pass key", "passkey", "door code", "magic number", "magic", "uuid", "var ", "variable"):
        assert noun not in everything
    assert not {city.lower() for city in prompts.CITIES} & set(re.findall(r"\w+", everything))
