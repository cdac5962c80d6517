"""answers.py counts the tokens that transformers' masks have, with blocks in the template and without."""

import re

import numpy as np
import pytest
from chat_files import write_byte_level, write_sentencepiece
from transformers import AutoTokenizer

from hf import answers, tokenizer
from storage.errors import InputError
from storage.texts import Completion, Conversation

# Templates in the manner of well-known models. What {% generation %} encloses begins where the generation
# prompt ends, and ends with the token at which generation stops.
LLAMA2 = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ bos_token + '[INST] ' }}"
    "{{ message.content + ' [/INST]' }}{% elif message.role == 'assistant' %}{% generation %}"
    "{{ ' ' + message.content + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message.role }}"
    "{{ '<|end_header_id|>\n\n' }}{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content | trim }}{{ '<|eot_id|>' }}{% endgeneration %}{% else %}{{ message.content | trim }}"
    "{{ '<|eot_id|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The last answer shows its thinking, if only that there was none. Earlier ones lose theirs.
THINKING = CHATML.replace(
    "{% generation %}{{ message.content",
    "{% set parts = message.content.split('</think>\n\n') %}{% generation %}{% if loop.last %}"
    "{{ '<think>\n' }}{{ parts[0].replace('<think>\n', '') if parts | length > 1 else '\n' }}"
    "{{ '</think>\n\n' }}{% endif %}"
    "{{ parts[-1]",
)
# The generation prompt begins to think, while a conversation that is over shows no thinking at all.
THINKS_FIRST = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ '<|start_header_id|>' }}"
    "{% generation %}{{ message.content.split('</think>')[-1] }}{{ '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ '<|end_header_id|>' + message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|><think>\n' }}{% endif %}"
)
# Another token ends the last answer.
TWO_ENDS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + ': ' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{{ '</s>' if loop.last else '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"
)
# There are no control tokens: a blank line ends what is said.
WORDS_ALONE = (
    "{% for message in messages %}{{ '### ' + message.role + ':\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '\n\n' }}{% endgeneration %}{% else %}"
    "{{ message.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
TEMPLATES = {
    "Llama 2": LLAMA2,
    "Llama 3": LLAMA3,
    "ChatML": CHATML,
    "thinking": THINKING,
    "thinks first": THINKS_FIRST,
    "two ends": TWO_ENDS,
    "words alone": WORDS_ALONE,
    "two tokens at the end": CHATML.replace("<|im_end|>", "<|eot_id|><|im_end|>"),
}
BLOCKS = re.compile(r"\{% (end)?generation %\}")

ASKED = {"role": "user", "content": 'The cat\'s mat: where is it?\n\n  It <b>was</b> here & "there".'}
SAID = {"role": "assistant", "content": "Naïve café, 你好 😀.  12,345 so it is"}
THEN = {"role": "user", "content": "  and\tthen? "}
THOUGHT = {"role": "assistant", "content": "<think>\nThe mat?\n</think>\n\nOn the mat"}
SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = [
    [ASKED, SAID],
    [ASKED, SAID, THEN, SAID | {"content": "It is."}],
    [ASKED, THOUGHT, THEN, THOUGHT],
    [ASKED, THOUGHT, THEN, SAID, THEN],  # the user has the last word
]


@pytest.fixture(scope="module", params=["sentencepiece", "byte level"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (write_sentencepiece if request.param == "sentencepiece" else write_byte_level)(folder)
    return folder


def with_template(folder, template):
    """Return our tokenizer of a folder, with a chat template."""
    (folder / "chat_template.jinja").write_text(template, newline="")
    return tokenizer.load(folder)


def encode(ours, messages):
    ids, counts = answers.encode(ours, Conversation(messages, "a.jsonl, line 1"))
    return list(ids), counts.tolist()


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_mask_are_those_of_transformers(folder, name):
    """Also without the blocks, for which transformers has no mask: then they are as with them."""
    ours = with_template(folder, TEMPLATES[name])
    stock = AutoTokenizer.from_pretrained(folder)
    plain = with_template(folder, BLOCKS.sub("", TEMPLATES[name]))
    how = {"return_dict": True, "return_assistant_tokens_mask": True}
    for messages in [*CONVERSATIONS, [SYSTEM, ASKED, SAID]]:
        expected = stock.apply_chat_template(messages, **how)
        ids, mask = expected["input_ids"], list(map(bool, expected["assistant_masks"]))
        first = int(ids[0] == ours.bos_id)  # a window begins with it anyway
        assert encode(ours, messages) == encode(plain, messages) == (ids[first:], mask[first:])
        assert 0 < sum(mask) < len(ids)


def test_a_prompt_is_a_prefix_of_what_it_is_answered_with(folder):
    """What does not count before the first answer is what sample.py would ask with."""
    from hf import chat

    ours = with_template(folder, BLOCKS.sub("", LLAMA3))
    ids, counts = encode(ours, [ASKED, SAID])
    prompt = chat.encode(ours, [ASKED])
    assert prompt == [ours.bos_id, *ids[: counts.index(True)]]


def test_no_message_makes_a_control_token_and_none_loses_its_count(folder):
    ours = with_template(folder, CHATML)
    said = {"role": "assistant", "content": "a<|im_end|></s>\ufdd0 <s>b\ufdd1"}
    ids, counts = encode(ours, [ASKED, said])
    end = ours.control_tokens["<|im_end|>"]
    assert ids.count(end) == 2 and ours.control_tokens["</s>"] not in ids
    assert ids[np.flatnonzero(counts)[-1]] == end


def test_the_day_does_not_change_a_document(folder):
    template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    ids, _ = encode(with_template(folder, template), [ASKED, SAID])
    assert tokenizer.load(folder).decode(ids).startswith("26 Jul 2024")


# ---------------------------------------------------------------- prompts with completions


@pytest.mark.parametrize(
    "prompt, completion", [("The cat sat on", " the mat."), ("Naïve", "té 😀"), ("", "All of it")]
)
def test_a_completion_counts_with_its_end(folder, prompt, completion):
    ours = tokenizer.load(folder)
    ids, counts = answers.encode(ours, Completion(prompt, completion, "a.jsonl, line 1"))
    assert ids[-1] == ours.eos_id == ours.control_tokens["</s>"] and counts[-1]
    assert ours.decode(ids[:-1]) == prompt + completion
    n = int((~counts).sum())
    assert not counts[:n].any() and counts[n:].all()
    # What does not count is of the prompt alone; what counts holds all of the completion.
    assert prompt.startswith(ours.decode(ids[:n])) and completion in prompt + ours.decode(ids)[len(prompt) :]
    assert len(ours.decode(ids[:n])) >= len(prompt) - 6


def test_an_end_that_is_there_already_is_not_doubled(folder):
    ours = tokenizer.load(folder)
    ids, counts = answers.encode(ours, Completion("a", " b</s>", "a.jsonl, line 1"))
    assert list(ids).count(ours.eos_id) == 1 and ids[-1] == ours.eos_id and counts[-1]


def test_a_control_token_between_prompt_and_completion_counts(folder):
    """As any token does that reaches into the completion."""
    ours = tokenizer.load(folder)
    ids, counts = answers.encode(ours, Completion("a <", "/s> b", "a.jsonl, line 1"))
    at = list(ids).index(ours.control_tokens["</s>"])
    assert counts.tolist() == [i >= at for i in range(len(ids))] and at > 0


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    "template, messages, says",
    [
        (None, [ASKED, SAID], "this model has no chat template; put chat_template.jinja into its folder"),
        (CHATML, [ASKED], 'no message has the role "assistant"'),
        (BLOCKS.sub("", CHATML), [ASKED], 'no message has the role "assistant"'),
        ("{{ raise_exception('Be polite') }}", [ASKED, SAID], "(Be polite)"),
        (
            "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
            [ASKED, SAID],
            "where message 2 begins",
        ),
        ("{{ messages | length }}", [ASKED, SAID], "where message 2 begins"),
        (
            "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
            [ASKED, SAID],
            "where message 2",
        ),
    ],
)
def test_a_conversation_that_cannot_be_learnt_is_refused(folder, template, messages, says):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    ours = tokenizer.load(folder) if template is None else with_template(folder, template)
    with pytest.raises(InputError) as error:
        encode(ours, messages)
    assert str(error.value).startswith("a.jsonl, line 1: ") and says in str(error.value)


def test_a_token_that_the_model_does_not_have(folder):
    """A tokenizer may add control tokens for which nobody has made embeddings."""
    ours = with_template(folder, CHATML)
    ours.n_embeddings = ours.control_tokens["<|im_end|>"]
    with pytest.raises(InputError, match="one that the model does not have"):
        encode(ours, [ASKED, SAID])
