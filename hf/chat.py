"""Chat templates: what a model was taught a conversation looks like, as a Jinja program in its folder.

Notable choices:
- A template is a program of whoever made the folder. It runs in Jinja's sandbox, as in transformers, which
  keeps it from everything but the conversation, and not for longer than RENDER_SECONDS.
- It computes what transformers' apply_chat_template does, and its control tokens become the same ids.
- Control tokens are the template's alone. Where a message spells one ("</s>" is a tag of HTML too), an
  invisible character goes into it, so that it stays text and no book can speak as somebody else.
"""

import contextlib
import datetime
import functools
import json
import re
import signal
import threading

import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from hf.tokenizer import json_object, one_of, special_tokens
from storage.errors import InputError

RENDER_SECONDS = 10  # that a template may take
ZERO_WIDTH_SPACE = "\u200b"
# What {% generation %} and {% endgeneration %} become in a rendered text, before they are taken out: two
# characters that Unicode keeps out of texts.
GENERATION, END_OF_GENERATION = "\ufdd0", "\ufdd1"
MARKS = re.compile(f"[{GENERATION}{END_OF_GENERATION}]")


@functools.cache
def find_template(tokenizer):
    """Return the chat template among a tokenizer's files, None if there is none.

    chat_template.jinja counts more than tokenizer_config.json, as in transformers. Of several templates the
    one named "default" is taken. Raise InputError if there are only others, or something else than text.
    """
    if "chat_template.jinja" in tokenizer.files:
        try:
            return tokenizer.files["chat_template.jinja"].decode()
        except UnicodeDecodeError as error:
            raise InputError(f"chat_template.jinja: not readable ({error}); copy it again") from None
    template = json_object(tokenizer.files, "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        for entry in template:
            if isinstance(entry, dict) and entry.get("name") == "default":
                template = entry.get("template")
    if template is None or isinstance(template, str):
        return template
    raise InputError(
        "tokenizer_config.json: chat_template is no text, nor has it a default; mend or remove it"
    )


def encode(tokenizer, messages):
    """Return the token ids of a conversation, up to where the assistant's next answer begins.

    messages: see `render`, which raises InputError.
    """
    text = render(tokenizer, without_control_tokens(tokenizer, messages))
    return tokenizer.encode_with_control_tokens(MARKS.sub("", text))


def without_control_tokens(tokenizer, messages):
    """Return the messages with an invisible character in each control token that one of them spells.

    MARKS are left out of them.
    """
    control_token = re.compile(one_of(tokenizer.control_tokens))
    harmless = []
    for message in messages:
        parts = {}
        for key, part in message.items():
            if isinstance(part, str):
                part = control_token.sub(_broken, MARKS.sub("", part))
            parts[key] = part
        harmless.append(parts)
    return harmless


def _broken(found):
    """Return the text of a control token that was found, with an invisible character behind its first one."""
    return found[0][0] + ZERO_WIDTH_SPACE + found[0][1:]


def render(tokenizer, messages, add_generation_prompt=True, day=None):
    """Return the text of a conversation as the model's chat template writes it.

    messages: dicts with role and content. add_generation_prompt: end with what the assistant's answer begins
    with. day: the datetime that the template takes for now, None for the present.
    Where the template has {% generation %} blocks, the text has MARKS. Raise InputError if the model has no
    template, or it fails or refuses these messages.
    """
    template = find_template(tokenizer)
    if template is None:
        raise InputError("this model has no chat template; put chat_template.jinja into its folder")
    variables = {"messages": messages, "add_generation_prompt": add_generation_prompt}
    variables |= {"tools": None, "documents": None} | special_tokens(tokenizer)
    variables["strftime_now"] = lambda pattern: (day or datetime.datetime.now()).strftime(pattern)
    try:
        with _time_limit(RENDER_SECONDS):
            return _compiled(template).render(variables)
    except Exception as error:  # whatever another's program raises is no bug of ours
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = f"it failed or does not fit this conversation ({said})"
        raise InputError(f"the model's chat template: {reason}; mend it, or do without") from None


# ---------------------------------------------------------------- what templates are written for


@functools.lru_cache(maxsize=4)
def _compiled(template):
    """Return a template compiled in the Jinja environment of transformers' chat templates."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise_exception
    return made.from_string(template)


class _Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}, which marks what the assistant says."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)], lineno=line)
            for mark in (GENERATION, END_OF_GENERATION)
        )
        return [begin, jinja2.nodes.Scope(body, lineno=line), end]


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Return JSON without Jinja's escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message):
    raise jinja2.TemplateError(message)


@contextlib.contextmanager
def _time_limit(seconds):
    """Raise TimeoutError in the body after so many seconds, if it runs in the main thread."""

    def stop(*_):
        raise TimeoutError(f"it takes longer than {seconds} seconds")

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread has signals
        return
    handler_before = signal.signal(signal.SIGALRM, stop)
    timer_before = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer_before)
        signal.signal(signal.SIGALRM, handler_before)
