"""sample.py says what transformers' generate says, draws what it should, and reads nothing twice."""

import io
import json
import re
import shutil
import signal
import sys
import time

import pytest
import torch
from conftest import ROOT, needs_gpu, scaling_of
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TemperatureLogitsWarper, TopPLogitsWarper

import sample
from hf import chat, tokenizer, weights
from hf.builtin import open_model
from storage.errors import InputError

TINY = ROOT / "assets" / "tiny"
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
greedy = sample.chooser(0.0, 1.0, 0)


@pytest.fixture(autouse=True)
def short_prefill(monkeypatch):
    """Prompts of these tests go through the model in several parts."""
    monkeypatch.setitem(sample.PREFILL_TOKENS, "cpu", 7)
    monkeypatch.setitem(sample.PREFILL_TOKENS, "cuda", 7)


def random_ids(n, seed=0):
    return torch.randint(3, 320, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def stream(model, prompt, n_new, stop_ids=(), choose=greedy):
    """Return the new tokens of a session that begins, a list."""
    return list(sample.Session(model).stream(prompt, n_new, stop_ids, choose))


# ---------------------------------------------------------------- greedy

SHAPES = {
    "llama": {},
    "qwen2": {"family": "Qwen2"},
    "yarn mistral": {
        "family": "Mistral",
        "sliding_window": None,
        "rope_parameters": {"rope_theta": 10000.0} | scaling_of("yarn"),
    },
    "scaled queries": {
        "family": "Ministral3",
        "rope_parameters": {
            "rope_theta": 10000.0,
            "rope_type": "default",
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.3,
        },
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_are_those_of_transformers(make_llama, shape):
    folder, theirs = make_llama(**SHAPES[shape])
    ours = weights.load(folder)
    said = set()
    for n in (1, 7, 37):
        prompt = torch.tensor([random_ids(n)])
        expected = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, **GREEDY
        )
        assert stream(ours, prompt[0].tolist(), 12) == expected[0, n:].tolist()
        said |= set(expected[0, n:].tolist())
    assert len(said) > 3  # else any cache would do


@pytest.mark.parametrize("mode, n", [("dynamic", 200), ("longrope", 200), ("longrope", 64), ("longrope", 65)])
def test_angles_that_depend_on_the_length_are_those_of_all_tokens(make_llama, mode, n):
    """Those of the n tokens that are read, as in model.generate, which is compared with transformers."""
    ours = weights.load(make_llama(rope_parameters={"rope_theta": 10000.0} | scaling_of(mode))[0])
    prompt = random_ids(n - 11)
    expected = ours.generate(torch.tensor([prompt]), 12)[0].tolist()
    session = sample.Session(ours)
    assert list(session.stream(prompt[:-5], 4, (), greedy)) != expected  # of another length
    assert list(session.stream(prompt, 12, (), greedy)) == expected


def test_an_answer_ends_before_a_stop(make_llama):
    ours = weights.load(make_llama()[0])
    free = stream(ours, random_ids(20), 15)
    stop = free[6]
    assert stream(ours, random_ids(20), 15, [999, stop]) == free[: free.index(stop)]
    assert stream(ours, random_ids(20), 15, [free[0]]) == []


@needs_gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gpu_says_what_generation_without_a_graph_says(make_llama, shape):
    ours = weights.load(make_llama(**SHAPES[shape])[0], "cuda")
    session = sample.Session(ours)
    said = []
    for n in (37, 60):  # the second prompt goes on from the first
        prompt = (random_ids(37) + said + random_ids(20))[:n]
        said = list(session.stream(prompt, 12, (), greedy))
        assert said == ours.generate(torch.tensor([prompt], device="cuda"), 12)[0].tolist()


# ---------------------------------------------------------------- what was read before


@pytest.mark.parametrize("mode", [None, "dynamic"])
def test_a_session_says_what_a_new_one_says(make_llama, mode):
    changes = {"rope_parameters": {"rope_theta": 10000.0} | scaling_of(mode)} if mode else {}
    ours = weights.load(make_llama(**changes)[0])
    session = sample.Session(ours)
    base = random_ids(30)
    said = stream(ours, base, 10)
    prompts = {
        "first": base,
        "the same again": base,
        "a conversation that goes on": base + said + random_ids(9, seed=1),
        "a shorter one": base[:12],
        "another end": base[:20] + random_ids(15, seed=2),
        "another": random_ids(25, seed=3),
        "one token": base[:1],
    }
    new = {}
    for name, prompt in prompts.items():
        session.model = Counting(ours)
        assert list(session.stream(prompt, 10, (), greedy)) == stream(ours, prompt, 10), name
        new[name] = session.model.tokens - 9  # tokens of the prompt that were read
    if mode is None:
        expected = {"first": 30, "the same again": 1, "a conversation that goes on": 10, "a shorter one": 1}
        expected |= {"another end": 23, "another": 25, "one token": 1}
        assert new == expected


class Counting:
    """A model that counts the tokens that it reads."""

    def __init__(self, model):
        self.tokens, self.model = 0, model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def hidden(self, tokens, **how):
        self.tokens += tokens.shape[1]
        return self.model.hidden(tokens, **how)

    def hidden_at(self, tokens, *rotation_and_cache):
        self.tokens += tokens.shape[1]
        return self.model.hidden_at(tokens, *rotation_and_cache)


def test_an_interrupt_leaves_the_session_whole(make_llama):
    """Wherever it comes: while the prompt is read, or while the answer is made."""
    ours = weights.load(make_llama()[0])
    prompt = random_ids(30)
    for tokens in (0, 10, 21, 25):
        session = sample.Session(ours)
        list(session.stream(prompt[:9] + [5, 6, 7], 4, (), greedy))
        session.model = Interrupted(ours, tokens)
        with pytest.raises(KeyboardInterrupt):
            list(session.stream(prompt, 10, (), greedy))
        session.model = ours
        assert list(session.stream(prompt, 10, (), greedy)) == stream(ours, prompt, 10)


class Interrupted(Counting):
    """A model that is interrupted after it has read so many tokens, in the middle of a forward pass."""

    def __init__(self, model, after):
        super().__init__(model)
        self.after = after

    def hidden(self, tokens, **how):
        return self.unless_interrupted(super().hidden(tokens, **how))

    def hidden_at(self, tokens, *rotation_and_cache):
        return self.unless_interrupted(super().hidden_at(tokens, *rotation_and_cache))

    def unless_interrupted(self, h):
        if self.tokens > self.after:
            raise KeyboardInterrupt
        return h


def test_a_terminal_shows_how_much_has_been_read(make_llama, monkeypatch):
    """At once here, elsewhere after half a second; and where stderr is no terminal, never."""
    ours = weights.load(make_llama()[0])
    monkeypatch.setattr(sample, "tqdm", lambda **how: tqdm(**(how | {"delay": 0, "mininterval": 0})))
    for kind in (Terminal, io.StringIO):
        monkeypatch.setattr(sys, "stderr", kind())
        stream(ours, random_ids(30), 2)
        shown = re.findall(r"reading: *(\d+)%", sys.stderr.getvalue())
        assert shown == (["0", "23", "47", "70", "93"] if kind is Terminal else [])


# ---------------------------------------------------------------- drawing


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.8), (2.0, 0.5), (1.3, 0.95), (1.0, 0.0)])
def test_draws_have_the_probabilities_of_transformers(temperature, top_p):
    """The frequencies of 4,000 draws are within four standard errors, and nothing else is ever drawn."""
    logits = 2 * torch.randn(24, generator=torch.Generator().manual_seed(1))
    warped = TemperatureLogitsWarper(temperature)(None, logits[None])
    expected = TopPLogitsWarper(top_p)(None, warped)[0].softmax(-1).double()
    # The nucleus by its definition: the fewest likeliest tokens that have so much together.
    likeliest_first = sorted(warped[0].double().softmax(-1).tolist(), reverse=True)
    nucleus = next(n for n in range(1, 25) if sum(likeliest_first[:n]) >= min(top_p, 1 - 1e-9))
    assert (expected > 0).sum() == nucleus
    choose, n = sample.chooser(temperature, top_p, seed=3), 4000
    counts = torch.bincount(torch.tensor([choose(logits) for _ in range(n)]), minlength=24)
    error = (expected * (1 - expected) / n).sqrt()
    assert ((counts / n - expected).abs() <= 4 * error).all()


def test_seeds_repeat_and_differ(make_llama):
    ours = weights.load(make_llama()[0])
    drawn = [stream(ours, random_ids(9), 20, choose=sample.chooser(1.0, 0.9, seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_temperatures_near_zero_and_tiny_nuclei_are_greedy():
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 100
    for temperature, top_p in ((1e-300, 1.0), (1e-6, 1.0), (1.0, 0.0), (100.0, 1e-300)):
        choose = sample.chooser(temperature, top_p, 0)
        assert {choose(logits) for _ in range(50)} == {int(logits.argmax())}
    certain = torch.full((9,), -torch.inf)
    certain[4] = 0.0
    assert sample.chooser(1.0, 1.0, 0)(certain) == 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(temperature):
    for bad in (torch.nan, torch.inf):
        with pytest.raises(InputError, match="not finite"):
            sample.chooser(temperature, 1.0, 0)(torch.tensor([0.0, bad, 1.0]))


# ---------------------------------------------------------------- the command

CHATML = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
STATUS = re.compile(
    r"\[([\d,]+) of 256 tokens, read in \d+\.\d s; ([\d,]+) new( \([^)]+\))?(, \d+ a second)?\]\n"
)


class Terminal(io.StringIO):
    """A standard input on which lines are typed."""

    def isatty(self):
        return True

    def reconfigure(self, **_):
        pass


def pipe(monkeypatch, content):
    """Make bytes the standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of tiny with a chat template, in the folder where the test runs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(CHATML)
    return tmp_path / "model"


@pytest.fixture
def ask(call):
    """ask(folder, *arguments) -> the finished command, with up to 20 new tokens on the CPU."""
    return lambda folder, *arguments: call(
        "sample", "--model", folder, "--device", "cpu", "--max_new_tokens", 20, *arguments
    )


@pytest.fixture(scope="module")
def tiny():
    return weights.load(TINY, dtype=torch.float32), open_model(TINY).load_tokenizer()


def continuation(tiny, ids, n_new=20, stops=(2,)):
    """Return the ids of a greedy continuation by model.generate, without the stop."""
    new = tiny[0].generate(torch.tensor([ids]), n_new)[0].tolist()
    return new[: next((i for i, token in enumerate(new) if token in stops), n_new)]


def test_a_prompt_is_gone_on_with(ask, folder, tiny):
    _, tok = tiny
    text = "import os\nimport sys\n\n\ndef main("
    ids = [1, *tok.encode(text)]
    expected = tok.decode(ids + continuation(tiny, ids))[len(text) :]
    done = ask(folder, "--prompt", text)
    assert (done.returncode, done.stdout) == (0, expected + "\n")
    status = STATUS.fullmatch(done.stderr)
    assert status[1] == str(len(ids)) and status[2] == "20"
    assert status[3] == " (the most that --max_new_tokens allows)"
    (folder / "chat_template.jinja").unlink()  # without a template, a question is no other thing
    assert ask(folder, "--ask", text).stdout == done.stdout
    drawn = [ask(folder, "--prompt", text, "--temperature", 1, "--seed", n) for n in (1, 1, 2**63 - 1)]
    assert [done.returncode for done in drawn] == [0, 0, 0]
    assert drawn[0].stdout == drawn[1].stdout != drawn[2].stdout


def test_a_question_goes_through_the_template(ask, folder, tiny, monkeypatch):
    """The same, from the command line and from a pipe with Windows' line ends, behind a file or alone."""
    stock = AutoTokenizer.from_pretrained(folder)
    (folder / "book.txt").write_bytes(b"\xef\xbb\xbfclass Book:\r\n    pages = 7\r\n")
    question = "How many pages\nare there?"
    for file, before in (([], ""), (["--file", folder / "book.txt"], "class Book:\n    pages = 7\n\n\n")):
        messages = [{"role": "user", "content": before + question}]
        ids = stock.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        expected = tiny[1].decode(continuation(tiny, ids)) + "\n"
        assert ask(folder, *file, "--ask", question).stdout == expected
        if file:  # the text may be piped in as well, and then the question may not
            pipe(monkeypatch, (folder / "book.txt").read_bytes())
            assert ask(folder, "--file", "-", "--ask", question).stdout == expected
            check_refused(ask(folder, "--file", "-"), "--file -")
        pipe(monkeypatch, question.replace("\n", "\r\n").encode() + b"\r\n")
        done = ask(folder, *file)
        assert done.stdout == expected and STATUS.fullmatch(done.stderr)[1] == str(len(ids))
    pipe(monkeypatch, question.encode())
    assert ask(folder, "--raw").stdout == ask(folder, "--prompt", question).stdout != expected


def test_a_model_with_dynamic_scaling_reads_past_its_old_window(ask, call, tiny, texts, tmp_path):
    """It says what transformers does without a cache, with the angles of all that is read.

    transformers takes them from the length of a pass, so each one is filled up to that length.
    """
    run = ("--model", "tiny", "--data", texts, "--rope", "dynamic", "--target_len", 2048, "--device", "cpu")
    assert call("train", *run, "--steps", 0, "--out", tmp_path / "run").returncode == 0
    folder, text = tmp_path / "run" / "model", "import os\nx = 1\n" * 60
    ids = [1, *tiny[1].encode(text)]
    assert len(ids) > 256  # which is what config.json says
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens, said = torch.full((1, len(ids) + 19), 3), list(ids)
    while len(said) < len(ids) + 20:
        tokens[0, : len(said)] = torch.tensor(said)
        with torch.no_grad():
            said.append(int(theirs(tokens, use_cache=False).logits[0, len(said) - 1].argmax()))
    assert 2 not in said[len(ids) :]  # the stop
    assert said[len(ids) :] != continuation(tiny, ids)  # which has the angles of the model before

    done = ask(folder, "--prompt", text)
    assert (done.returncode, done.stdout) == (0, tiny[1].decode(said)[len(text) :] + "\n")
    assert done.stderr.startswith(f"[{len(ids)} tokens, read in ")
    assert "; 20 new (the most that --max_new_tokens allows)" in done.stderr


def test_an_answer_ends_at_the_end_of_the_window(ask, folder):
    done = ask(folder, "--prompt", "x = 1\n" * 40, "--max_new_tokens", 10**9)
    prompt, new, reason = STATUS.fullmatch(done.stderr).groups()[:3]
    assert int(prompt) + int(new) == 256 and int(new) > 9 and reason == " (the window is full)"


def test_an_answer_ends_at_the_stop_of_generation_config(ask, folder, tiny):
    ids = [1, *tiny[1].encode("def main(")]
    new = continuation(tiny, ids)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, new[5]]}))
    n = new.index(new[5])
    expected = tiny[1].decode(ids + new[:n])[len("def main(") :] + "\n"
    done = ask(folder, "--prompt", "def main(")
    assert done.stdout == expected and STATUS.fullmatch(done.stderr).groups()[1:3] == (str(n), None)


# ---------------------------------------------------------------- conversations


def talk(monkeypatch, lines):
    monkeypatch.setattr(sys, "stdin", Terminal("".join(line + "\n" for line in lines)))


def test_a_conversation_goes_on_until_its_end(ask, folder, tiny, monkeypatch):
    """A question stands behind all that was said; one that cannot be asked does not end it."""
    (folder / "book.txt").write_text("pages = 7\n")
    too_long = "word " * 300
    talk(monkeypatch, ["first?", "", too_long, "\udcff", "second?"])
    done = ask(folder, "--file", folder / "book.txt")
    messages, said = [], []
    for question in ("pages = 7\n\n\nfirst?", "second?"):
        messages.append({"role": "user", "content": question})
        ids = chat.encode(tokenizer.load(folder), messages)
        said.append(tiny[1].decode(continuation(tiny, ids)))
        messages.append({"role": "assistant", "content": said[-1]})
    assert (done.returncode, done.stdout) == (0, f"> {said[0]}\n> > > > {said[1]}\n> \n")
    told = done.stderr.splitlines()
    assert [line for line in told if line.startswith("error: ")] == [told[2], told[3]]
    assert "window of 256; shorten it" in told[2] and told[2].endswith("; /new begins a new conversation")
    assert "UTF-8" in told[3] and len(told) == 5


def test_a_conversation_that_fills_the_window_can_begin_anew(ask, folder, tiny, monkeypatch):
    """After /new a question is answered as the first one, behind the file again."""
    (folder / "book.txt").write_text("pages = 7\n")
    talk(monkeypatch, ["first?", "second?", " /new ", "first?"])
    done = ask(folder, "--file", folder / "book.txt", "--max_new_tokens", 1000)
    first, *others, again = done.stderr.splitlines()
    assert "/new" in first and "Ctrl-D" in first
    assert any("(the window is full; /new begins a new conversation)" in line for line in others)
    assert any(line.startswith("error: ") and "/new" in line for line in others)
    answers = done.stdout.split("> ")
    messages = [{"role": "user", "content": "pages = 7\n\n\nfirst?"}]
    ids = chat.encode(tokenizer.load(folder), messages)
    expected = tiny[1].decode(continuation(tiny, ids, n_new=256 - len(ids)))
    assert answers[1] == answers[-2] == expected + "\n" and STATUS.fullmatch(again + "\n")[1] == str(len(ids))


def test_an_interrupt_before_a_question_says_how_to_leave(ask, folder, monkeypatch):
    talk(monkeypatch, ["first?"])
    real, interrupts = Terminal.readline, iter([True, True])

    def readline(terminal, *size):
        if next(interrupts, None):
            raise KeyboardInterrupt
        return real(terminal, *size)

    monkeypatch.setattr(Terminal, "readline", readline)
    done = ask(folder)
    assert done.returncode == 0 and done.stdout.count("> ") == 4  # one question, and the end
    assert done.stderr.count("Ctrl-D leaves") == 3 and "Traceback" not in done.stderr


def test_without_a_template_each_line_is_gone_on_with(ask, folder, monkeypatch):
    lines = ["def main(", "/new", "class A"]  # where nothing is kept, /new is a text like any other
    talk(monkeypatch, lines)
    done = ask(folder, "--raw")
    alone = [ask(folder, "--prompt", text).stdout for text in lines]
    assert done.stdout == f"> {alone[0]}> {alone[1]}> {alone[2]}> \n"
    assert "/new" not in done.stderr


def test_an_interrupt_ends_the_answer_and_not_the_conversation(ask, folder, tiny, monkeypatch):
    """What was said until then is part of the conversation. Elsewhere an interrupt ends the program."""
    chooser = sample.chooser

    def interrupting(*settings):
        choose, numbers = chooser(*settings), iter(range(6))
        return lambda logits: choose(logits) if next(numbers, None) is not None else interrupt()

    def interrupt():
        monkeypatch.setattr(sample, "chooser", chooser)
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "chooser", interrupting)
    talk(monkeypatch, ["first?", "second?"])
    done = ask(folder)
    messages = [{"role": "user", "content": "first?"}]
    said = tiny[1].decode(continuation(tiny, chat.encode(tokenizer.load(folder), messages))[:6])
    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "second?"}]
    ids = chat.encode(tokenizer.load(folder), messages)
    expected = tiny[1].decode(continuation(tiny, ids))
    assert (done.returncode, done.stdout) == (0, f"> {said}\n> {expected}\n> \n")

    monkeypatch.setattr(sample, "chooser", interrupting)
    done = ask(folder, "--ask", "first?")
    assert (done.returncode, done.stdout, done.stderr) == (130, said + "\n", "stopped\n")


# ---------------------------------------------------------------- what is refused


def check_refused(done, *words):
    assert done.returncode == 2 and done.stdout == "", done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert str(word) in done.stderr, (word, done.stderr)


def test_what_cannot_be_asked(ask, folder, monkeypatch):
    """It is refused before the weights are read."""
    monkeypatch.setattr(weights, "load", None)
    check_refused(ask(folder, "--ask", ""), "nothing is asked")
    check_refused(ask(folder, "--prompt", " \n"), "nothing is asked")
    check_refused(ask(folder, "--ask", "a", "--prompt", "b"), "--ask", "--prompt")
    check_refused(ask(folder, "--ask", "a\udcffb"), "UTF-8")
    check_refused(ask(folder, "--ask", "a", "--file", "no.txt"), "no.txt")
    check_refused(ask(folder, "--ask", "a", "--file", folder), folder)
    (folder / "empty.txt").write_text("\n")
    check_refused(ask(folder, "--ask", "a", "--file", folder / "empty.txt"), "empty.txt: there is no text")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    check_refused(ask(folder, "--ask", "a", "--file", folder / "latin.txt"), "latin.txt", "UTF-8 at byte 0")
    check_refused(
        ask(folder, "--ask", "word " * 300), "tokens, the model a window of 256; shorten it", "train.py"
    )
    for content in (b"", b"\n", b"a\xffb"):
        pipe(monkeypatch, content)
        check_refused(ask(folder), "nothing is asked" if content.isspace() or not content else "UTF-8")


def test_folders_with_something_wrong(ask, folder, monkeypatch):
    monkeypatch.setattr(weights, "load", None)
    template = folder / "chat_template.jinja"
    template.write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    check_refused(ask(folder, "--ask", "a"), "chat template", "unsafe")
    template.write_text("{# nothing #}")
    check_refused(ask(folder, "--ask", "a"), "writes nothing", "--raw")
    template.write_text("<|im_start|>{{ messages[0].content }}")
    (folder / "added_tokens.json").write_text('{"<|im_start|>": 2048}')
    check_refused(ask(folder, "--ask", "a"), "a token that the model does not have", "--raw")
    (folder / "generation_config.json").write_text('{"eos_token_id": ')
    check_refused(ask(folder, "--ask", "a"), folder / "generation_config.json")


# ---------------------------------------------------------------- as a process


SAMPLE = f"""
sys.path[0] = {str(ROOT)!r}
runpy.run_path({str(ROOT / "sample.py")!r}, run_name="__main__")
"""
SLOW = f"""import runpy, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.path[0] = {str(ROOT)!r}
import model
read = model.Transformer.hidden
model.Transformer.hidden = lambda *args, **options: (time.sleep(0.05), read(*args, **options))[1]
"""
CLOSED = """import os, runpy, sys
reading, writing = os.pipe()
os.close(reading)
os.dup2(writing, 1)
"""


def test_interrupts_and_closed_pipes_leave_no_trace(start, folder, tmp_path):
    arguments = ("--model", TINY, "--device", "cpu", "--prompt", "def main(", "--max_new_tokens", 250)
    (tmp_path / "slow.py").write_text(SLOW + SAMPLE)  # so that it is interrupted before its answer ends
    started = start(tmp_path / "slow.py", *arguments)
    while not (started.output / "stdout").read_text() and started.poll() is None:
        time.sleep(0.01)
    started.kill(signal.SIGINT)
    done = started.wait()
    assert (done.returncode, done.stderr) == (130, "stopped\n") and done.stdout.endswith("\n")

    (tmp_path / "closed.py").write_text(CLOSED + SAMPLE)  # standard output is a pipe that nobody reads
    done = start(tmp_path / "closed.py", *arguments).wait()
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


def test_standard_streams_that_are_closed(start, folder, tmp_path):
    """As by a shell's `>&-` and the like: what cannot be shown is lost, and nothing can be asked."""

    def sample_without(streams, *arguments):
        """Run it as Python begins where these streams, {descriptor: name}, are closed."""
        closing = "".join(f"os.close({number}); sys.{name} = None\n" for number, name in streams.items())
        (tmp_path / "closed.py").write_text(f"import os, runpy, sys\n{closing}{SAMPLE}")
        model = ("--model", TINY, "--device", "cpu", "--max_new_tokens", 5)
        return start(tmp_path / "closed.py", *model, *arguments).wait()

    prompt = ("--prompt", "def main(")
    whole = sample_without({}, *prompt)
    assert whole.returncode == 0 and STATUS.fullmatch(whole.stderr)
    done = sample_without({1: "stdout"}, *prompt)
    assert (done.returncode, done.stdout) == (0, "") and STATUS.fullmatch(done.stderr)
    done = sample_without({0: "stdin", 2: "stderr"}, *prompt)
    assert (done.returncode, done.stdout, done.stderr) == (0, whole.stdout, "")
    check_refused(sample_without({0: "stdin"}), "standard input is closed", "--ask", "--prompt")
