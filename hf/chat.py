"""Chat templates: what a model was taught a conversation looks like, as Jinja in its folder.

A template is a program of whoever made the folder. It runs in Jinja's sandbox, as in transformers, and can
neither import nor change anything.
"""

import datetime
import json

import jinja2.ext
import jinja2.sandbox
import numpy as np

from storage.files import InputError


def find_template(tokenizer):
    """Return the chat template among a tokenizer's files, None if there is none.

    chat_template.jinja counts more than tokenizer_config.json, as in transformers. Of several templates the
    one named "default" is taken.
    """
    if "chat_template.jinja" in tokenizer.files:
        return tokenizer.files["chat_template.jinja"].decode()
    template = settings(tokenizer).get("chat_template")
    if isinstance(template, list):
        by_name = {entry["name"]: entry["template"] for entry in template}
        template = by_name.get("default")
    return template


def settings(tokenizer):
    """Return what a tokenizer's tokenizer_config.json says, {} without one."""
    return json.loads(tokenizer.files.get("tokenizer_config.json", b"{}"))


def render(tokenizer, messages, add_generation_prompt=True):
    """Return the text of a conversation as the model's chat template writes it.

    messages: dicts with role and content. add_generation_prompt: end with what the assistant's answer begins
    with. Raise InputError if the model has no template, or it refuses these messages.
    """
    template = find_template(tokenizer)
    if template is None:
        raise InputError("this model has no chat template")
    special_tokens = {}
    for name, token in settings(tokenizer).items():
        if name.endswith("_token") and token:
            special_tokens[name] = token["content"] if isinstance(token, dict) else token
    try:
        compiled = environment().from_string(template)
        return compiled.render(
            messages=messages, add_generation_prompt=add_generation_prompt, **special_tokens
        )
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template: {str(error).splitlines()[0]}") from None


def stop_ids(tokenizer, config):
    """Return the ids at which an answer ends, a list: those of generation_config.json, else the Config's."""
    generation = json.loads(tokenizer.files.get("generation_config.json", b"{}"))
    eos = generation.get("eos_token_id", config.eos_token_id)
    return [] if eos is None else np.atleast_1d(eos).tolist()


def environment():
    """Return the Jinja environment that chat templates are written for."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return made


def _to_json(value, indent=None):
    """Write JSON without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message):
    raise jinja2.TemplateError(message)
