"""tasks/prompts.py: prompts that are what they promise, to the token, with tokenizers of two kinds."""

import re
import time

import numpy as np
import pytest

from hf.builtin import open_model
from tasks import prompts


@pytest.fixture(scope="module")
def tiny():
    """The tokenizer of the built-in model, a SentencePiece one."""
    return open_model("tiny").load_tokenizer()


@pytest.fixture(scope="module")
def byte_level(make_byte_level):
    """A byte-level BPE tokenizer without BOS, which cuts newlines, spaces and digits as GPT-2's."""
    cat = "the cat sat. It is a cat."
    return make_byte_level(
        [prompts.PASSKEY_TASK, prompts.GARBAGE, prompts.PASSKEY_QUESTION, prompts.NEEDLE, cat], 500
    )


@pytest.mark.parametrize("which", ["sentencepiece", "byte_level"])
@pytest.mark.parametrize("length", [160, 211, 256, 257, 312, 5003])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_prompt_is_the_papers_and_has_its_length(tiny, byte_level, which, length, depth):
    tokenizer = tiny if which == "sentencepiece" else byte_level
    prompt, answer = prompts.passkey_prompt(tokenizer, length, depth, "81501")
    assert len(prompt) + len(answer) == length
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert prompt[: len(bos)] == bos
    assert tokenizer.decode(answer).strip() == "81501"
    text = tokenizer.decode(prompt[len(bos) :])
    assert prompt + answer == bos + tokenizer.encode(text + " 81501")
    garbage = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    before, key, after = text.partition("The pass key is 81501. Remember it. 81501 is the pass key.")
    opening = before.split("\n", 1)[1].removesuffix("\n")
    before, after = before.count(garbage), after.count(garbage)
    cut = opening.removesuffix(" ".join([garbage] * before)).rstrip(" ")
    assert garbage.endswith(cut.strip("\n")) and cut.strip("\n") != garbage and cut.count("\n") <= 2
    lines = [
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
        "I will quiz you about the important information there.",
        " ".join([cut] + [garbage] * before).strip(" "),
        key,
        " ".join([garbage] * after),
        "What is the pass key? The pass key is",
    ]
    assert text == "\n".join(line for line in lines if line)
    assert before == round(depth * (before + after))


def test_a_prompt_of_a_million_tokens_takes_no_minutes(tiny):
    began = time.perf_counter()  # encoding such a text once takes two seconds
    prompt, answer = prompts.passkey_prompt(tiny, 2**20, 0.4, "81501")
    assert len(prompt) + len(answer) == 2**20
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("which", ["sentencepiece", "byte_level"])
@pytest.mark.parametrize("length, depth, keys", [(400, 0.5, 4), (1200, 0.05, 1), (3000, 0.95, 16)])
def test_needles_stand_between_lines_of_the_text(tiny, byte_level, which, length, depth, keys):
    tokenizer = tiny if which == "sentencepiece" else byte_level
    chapter = "Chapter {i}. The cat sat on the mat {i} times! Was it so?\nIt was, said the dog of house {i}\n"
    source = "".join(chapter.format(i=i) for i in range(300))
    corpus = np.array(tokenizer.encode(source), dtype=np.uint16)

    def draw(seed):
        return prompts.needle_prompt(tokenizer, corpus, length, depth, np.random.default_rng(seed), keys)

    drawn = [draw(7), draw(7), draw(8)]
    assert drawn[0] == drawn[1] != drawn[2]
    prompt, answer = drawn[0]
    assert len(prompt) + len(answer) == length
    text = tokenizer.decode(prompt[tokenizer.bos_id is not None :])
    task, *lines, question = text.split("\n")
    promise = f"The text below hides the door codes of {keys} cities."
    assert task == f"{promise} Remember them: the last line asks for one."
    is_needle = re.compile(r"The door code of (\w+) is (\d{5})\.").fullmatch
    codes = dict(m.groups() for line in lines if (m := is_needle(line)))
    assert len(codes) == len(set(codes.values())) == keys
    asked = re.fullmatch(r"What is the door code of (\w+)\? The door code of (\w+) is", question)
    assert asked[1] == asked[2] and codes[asked[1]] == tokenizer.decode(answer).strip()

    # Without the needles (each brings two newlines) it is one stretch of the source, and each stands at the
    # end of a line or sentence.
    stretch, places = "", []
    for i, line in enumerate(lines):
        if is_needle(line):
            if not is_needle(lines[i - 1]):
                stretch = stretch.removesuffix("\n")
            places.append((line, len(stretch)))
        else:
            stretch += line + "\n"
    stretch = stretch.removesuffix("\n")
    at = source.find(stretch.strip("\n"))
    assert at >= 0 and len(stretch) > 100
    for line, place in places:
        is_end = place == 0 or stretch[place - 1] in ".!?\n" or stretch[place] == "\n"
        assert is_end, (line, stretch[place - 20 : place])
    place = next(place for line, place in places if asked[1] in line)
    assert abs(place / len(stretch) - depth) < 60 / len(stretch) + 0.05


@pytest.mark.parametrize("which", ["sentencepiece", "byte_level"])
def test_tokens_that_make_a_number_go_on(tiny, byte_level, which):
    """What counts is what they add to a text.

    SentencePiece's "▁8" begins another number, though alone it decodes to "8".
    """
    tokenizer = tiny if which == "sentencepiece" else byte_level
    digits = prompts.digit_tokens(tokenizer)
    base = tokenizer.encode("x")
    for i in range(tokenizer.vocab_size):
        assert (i in digits) == (re.match(r"x\d", tokenizer.decode([*base, i])) is not None)
    assert 10 <= len(digits) < 200
