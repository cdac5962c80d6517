"""Which tokens of a conversation the model should say: those that count in the loss.

Notable choices:
- A conversation is tokenised as a whole, as the chat template writes it, so that its ids are transformers'.
  What counts are stretches of that text: a token that reaches into one counts.
- A template with {% generation %} blocks says itself what the assistant says. For others it is found by
  rendering the conversation again, up to an answer and with another answer in its place: from where the
  generation prompt ends to the token that ends the turn, at which generation stops. That holds for templates
  that write earlier answers without their thinking (Qwen3) or begin an answer in another way than their
  generation prompt (DeepSeek-R1). Where the renderings do not fit together the template is refused.
- All conversations are rendered as of one day, since a template may write the date, and training texts must
  not change over night.
"""

import datetime
import os
import re

import numpy as np

from hf import chat
from hf.tokenizer import one_of
from storage.errors import InputError
from storage.texts import Completion, Conversation

RENDER_DAY = datetime.datetime(2024, 7, 26)
STAND_IN = "Zyqqvorx"  # a word that stands in for an answer; nobody says it


def encode(tokenizer, document):
    """Return the token ids (n,) of a Conversation or a Completion, and whether each counts, booleans (n,).

    What counts is what the assistant says, or the completion with the token that ends a text behind it. A BOS
    in front is left out, since windows begin with one anyway. Raise InputError, which names the place, for a
    conversation that the chat template refuses, or in which the assistant has no message.
    """
    try:
        if isinstance(document, Conversation):
            messages = chat.without_control_tokens(tokenizer, document.messages)
            text, spans = conversation_text(tokenizer, messages)
        else:
            text = document.prompt + document.completion
            spans = [(len(document.prompt), len(text))]
        ids, counts = tokenizer.encode_with_spans(text, spans)
        if ids and isinstance(document, Completion) and tokenizer.eos_id not in (None, ids[-1]):
            ids, counts = [*ids, tokenizer.eos_id], np.append(counts, True)
        if not ids or (tokenizer.n_embeddings and max(ids) >= tokenizer.n_embeddings):
            raise InputError("no tokens, or one that the model does not have; look at its chat template")
    except InputError as error:
        raise InputError(f"{document.place}: {error}") from None
    if ids[0] == tokenizer.bos_id:
        ids, counts = ids[1:], counts[1:]
    return ids, counts


def conversation_text(tokenizer, messages):
    """Return the text of a conversation and the (begin, end) of what the assistant says, in characters."""
    marked = render(tokenizer, messages)
    if chat.GENERATION in marked:
        spans = marked_spans(marked)
    else:
        spans = found_spans(tokenizer, messages, marked)
    if not spans:
        raise InputError('no message has the role "assistant", so there is nothing to learn; remove it')
    return chat.MARKS.sub("", marked), spans


def render(tokenizer, messages, add_generation_prompt=False):
    """Return the text of a conversation with the marks of {% generation %} blocks."""
    return chat.render(tokenizer, messages, add_generation_prompt, RENDER_DAY)


def marked_spans(marked):
    """Return the (begin, end) of marked stretches, in characters of the text without the marks."""
    spans, place = [], 0
    for part in re.split(f"({chat.GENERATION}.*?{chat.END_OF_GENERATION})", marked, flags=re.DOTALL):
        length = len(chat.MARKS.sub("", part))
        if part.startswith(chat.GENERATION):
            spans.append((place, place + length))
        place += length
    return spans


def found_spans(tokenizer, messages, text):
    """Return the (begin, end) of the assistant's turns in the text that a template without blocks writes.

    Raise InputError if the template's renderings do not fit together.
    """
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        other = {**message, "content": STAND_IN}
        before, *after = render(tokenizer, [*messages[:i], other, *messages[i + 1 :]]).split(STAND_IN)
        prompt = render(tokenizer, messages[:i], add_generation_prompt=True) if i else before
        begin = len(prompt) if text.startswith(prompt) else len(before)
        fits = len(after) == 1 and text.endswith(after[0]) and begin <= len(text) - len(after[0])
        if not fits or not text.startswith((prompt, before)):
            remedy = "put {% generation %} and {% endgeneration %} around what the assistant says in it"
            where = f"where message {i + 1} begins and ends"
            raise InputError(f"the model's chat template does not show {where}; {remedy}")
        alone = render(tokenizer, [*messages[:i], other]).rpartition(STAND_IN)[2]
        end = len(text) - len(after[0]) + len(end_of_turn(tokenizer, after[0], alone))
        spans.append((begin, end))
    return spans


def end_of_turn(tokenizer, after, alone):
    """Return what ends an answer: the part of `after` up to the token at which generation stops.

    after: all that the template writes behind the answer. alone: the same where no message follows.
    """
    control_token = one_of(tokenizer.control_tokens)
    end = os.path.commonprefix([after, alone])
    stops = [found.end() for found in re.finditer(control_token, end)]
    if stops:
        return end[: stops[-1]]
    # Another token may end the last answer, or the name of who speaks next stops generation.
    stop = re.match(rf"\s*(?:{control_token})", after)
    return stop[0] if stop else end
