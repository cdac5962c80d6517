"""The documents: their length, their links, the results that they cite, the commands that they name.

What their tables say is compared with the files in results/ by test_figures.py.
"""

import argparse
import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parent.parent
WORD_LIMITS = {"README.md": 1600, "GUIDE.md": 3250, "RESULTS.md": 4500, "CONTRIBUTING.md": 500}
DOCUMENTS = (*WORD_LIMITS, "results/LOG.md")


def read(document):
    """Return the text of a document, named by its path in the repository."""
    return (ROOT / document).read_text(encoding="utf-8")


@pytest.mark.parametrize("document, limit", WORD_LIMITS.items())
def test_documents_stay_short(document, limit):
    words = len(read(document).split())  # as `wc -w` counts
    assert words <= limit


# ---------------------------------------------------------------- links and cited files


def anchors(document):
    """Return the anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", read(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_relative_link_points_to_something(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = ((ROOT / document).parent / path).resolve() if path else ROOT / document
        assert linked.exists(), f"{document} links to {target}"
        if anchor:
            assert anchor in anchors(linked.relative_to(ROOT)), f"{document} links to {target}"


def test_every_picture_is_shown():
    shown = set()
    for document in DOCUMENTS:
        shown |= set(re.findall(r"!\[[^]]*\]\((assets/[^)]+)\)", read(document)))
    assert shown == {f"assets/{path.name}" for path in (ROOT / "assets").glob("*.png")}


def expand_braces(text):
    """Return the list of paths that a citation stands for: `a/{b,c}.json` is a/b.json and a/c.json."""
    before, brace, rest = text.partition("{")
    if not brace:
        return [text]
    inside, _, after = rest.partition("}")
    return [before + name + after for name in inside.split(",")]


def cited_paths():
    """Return {path in results/: a document that cites it}. A citation is a path in code marks."""
    cited = {}
    for document in DOCUMENTS:
        for citation in re.findall(r"`(results/[^`]*)`", read(document)):
            cited |= dict.fromkeys(expand_braces(citation), document)
    return cited


def test_every_cited_result_exists():
    for path, document in cited_paths().items():
        assert (ROOT / path).exists(), f"{document} cites {path}"


def test_every_result_is_cited():
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "results").rglob("*") if path.is_file()}
    assert files - {"results/LOG.md"} - cited_paths().keys() == set()


# ---------------------------------------------------------------- commands


def commands(document):
    """Return the python and torchrun commands of a document, each a list of words: those in shell blocks
    and those in code marks inside a sentence."""
    text = read(document)
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose)]
    lines = "\n".join((*blocks, *inline)).replace("\\\n", " ").splitlines()
    found = []
    for command in "\n".join(lines).replace("&&", "\n").splitlines():
        words = shlex.split(command, comments=True)
        if words and words[0] in ("python", "torchrun"):
            found.append(words)
    return found


class ParserFound(BaseException):
    """Carries the argument parser of a script out of its main function, past any `except Exception`."""


@pytest.fixture
def parser_of(monkeypatch):
    """Return a function from a script, a path or a module's name, to the argument parser that it makes."""

    def interrupt(parser, *args, **kwargs):
        raise ParserFound(parser)

    def find(script):
        if script.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(script)
        with monkeypatch.context() as patched, pytest.raises(ParserFound) as caught:
            patched.setattr(sys, "argv", [script])
            patched.setattr(argparse.ArgumentParser, "parse_known_args", interrupt)
            module.main()
        return caught.value.args[0]

    return find


def check_options(parser, words):
    """Assert that a parser knows every `--option` among the words, and its value where there are choices."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and words[0] in action.choices:
            return check_options(action.choices[words[0]], words[1:])
    for word, following in zip(words, (*words[1:], None)):
        if not word.startswith("--"):
            continue
        option, _, value = word.partition("=")
        assert option in parser._option_string_actions, f"no {option} for {' '.join(words)}"
        action = parser._option_string_actions[option]
        if action.choices and action.nargs is None:
            value = value or following
            assert value in map(str, action.choices), f"no {option} {value} for {' '.join(words)}"


def test_every_command_uses_options_that_exist(parser_of):
    parsers, checked = {}, 0
    for document in WORD_LIMITS:
        for program, *words in commands(document):
            if program == "torchrun":
                own = [word for word in words if word.endswith(".py")]
                at = words.index(own[0]) if own else len(words)  # else a sentence names torchrun's options
                check_options(get_args_parser(), words[:at])
                words = words[at:]
            elif words[0] == "-m":
                words = words[1:]
            if not words or words[0] == "pytest":
                continue
            script = words[0]
            if script not in parsers:
                parsers[script] = parser_of(script)
            check_options(parsers[script], words[1:])
            checked += 1
    assert checked > 30
    assert {"train.py", "eval.py", "bench.py", "reproduce.py", "hf.weights", "tasks.coverage"} <= set(parsers)
