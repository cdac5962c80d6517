"""data.py: the token cache, masks, and batches. A batch is a pure function of (seed, step, index)."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch

import data
from hf import tokenizer
from storage.errors import InputError
from storage.files import temporary_folder

TINY = Path(__file__).parent.parent / "assets" / "tiny"


class FakeTokenizer:
    """Its ids are consecutive: the document "7 12" has the tokens 7, 8, 9, 10, 11.

    Those of a prompt and its completion, "7 12" and " 12 15", are 7 to 14. `asked` counts the documents that
    it was asked for.
    """

    bos_id = eos_id = n_embeddings = None

    def __init__(self, vocab_size=1000, files=None):
        self.vocab_size, self.files, self.asked = vocab_size, files or {"tokenizer.model": b"one"}, 0

    def encode_with_spans(self, text, spans):
        self.asked += 1
        first, seam, _, end = map(int, text.split())
        assert spans == [(text.index(f" {seam} {end}"), len(text))]
        return list(range(first, end)), np.arange(first, end) >= seam

    def encode_batch(self, texts):
        self.asked += len(texts)
        return [list(range(*map(int, text.split()))) for text in texts]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def completion(first, seam, end):
    """Return a line of JSON with the tokens `first` to end - 1, of which those from `seam` on count."""
    return json.dumps({"prompt": f"{first} {seam}", "completion": f" {seam} {end}"}) + "\n"


# ---------------------------------------------------------------- token files


def test_tokens_are_the_tokenizers_own(tmp_path):
    """Each document by itself, in order, over more documents than go to the tokenizer at once."""
    texts = [f"Document {i} says:\n  the grass is green, {i * 'très '}字 {i**7}." for i in range(70)]
    write(tmp_path / "d" / "a.jsonl", jsonl(*texts[:67]))
    write(tmp_path / "d" / "b.txt", texts[67])
    write(tmp_path / "d" / "c.jsonl", jsonl(*texts[68:]))
    documents = data.tokenised([tmp_path / "d"], tokenizer.load(TINY), tmp_path / "cache")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    own = [documents[i].tolist() for i in range(len(documents))]
    assert own == [reference.encode(text) for text in texts]
    assert isinstance(documents.tokens, np.memmap) and not documents.tokens.flags.writeable


@pytest.mark.parametrize(
    "vocab_size, dtype", [(300, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32), (200_000, np.uint32)]
)
def test_every_id_of_the_vocabulary_fits(tmp_path, vocab_size, dtype):
    file = write(tmp_path / "a.txt", f"{vocab_size - 4} {vocab_size}")
    for _ in range(2):  # made, then found
        documents = data.tokenised([file], FakeTokenizer(vocab_size), tmp_path / "cache")
        assert documents[0].tolist() == list(range(vocab_size - 4, vocab_size))
        assert documents.tokens.dtype == dtype


def test_tokens_are_reused_until_something_changes(tmp_path):
    a, b = write(tmp_path / "a.txt", "0 9"), write(tmp_path / "b.jsonl", jsonl("10 20", "30 50"))

    def prepare(paths, expected, **changes):
        """Return how many documents the tokenizer was asked for.

        Documents must begin and end as expected.
        """
        fake = FakeTokenizer(**changes)
        documents = data.tokenised(paths, fake, tmp_path / "cache")
        every = [documents[i] for i in range(len(documents))]
        assert [(int(document[0]), int(document[-1]) + 1) for document in every] == expected
        return fake.asked

    all_three = [(0, 9), (10, 20), (30, 50)]
    assert prepare([a, b], all_three) == 3
    assert prepare([a, b], all_three) == 0
    assert prepare([str(a), str(b)], all_three) == 0
    assert prepare([b], all_three[1:]) == 2  # other files
    assert prepare([b, a], all_three[1:] + all_three[:1]) == 3  # in another order
    assert prepare([a, b], all_three, files={"tokenizer.model": b"two"}) == 3  # another tokenizer
    assert prepare([a, b], all_three) == 0  # the first one is still there

    time = a.stat().st_mtime_ns
    write(a, "3 9")  # of the same size and time
    os.utime(a, ns=(time, time))
    assert prepare([a, b], [(3, 9), *all_three[1:]]) == 3
    os.utime(a, ns=(time + 1, time + 1))
    assert prepare([a, b], [(3, 9), *all_three[1:]]) == 0
    moved = a.rename(tmp_path / "moved.txt")
    assert prepare([moved, b], [(3, 9), *all_three[1:]]) == 0
    as_text = moved.rename(tmp_path / "moved.md")  # the same bytes, read in the same way
    assert prepare([as_text, b], [(3, 9), *all_three[1:]]) == 3
    as_lines = b.rename(tmp_path / "b.txt")  # the same bytes, read in another way
    with pytest.raises(InputError, match="holds JSON"):
        prepare([as_text, as_lines], [])


def test_tokens_of_another_key_are_others(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"text": "10 20", "content": "30 50"}\n')
    for _ in range(2):
        for key, first in (("text", 10), ("content", 30)):
            documents = data.tokenised([file], FakeTokenizer(), tmp_path / "cache", key)
            assert documents[0][0] == first
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2


def test_tokens_of_another_number_of_embeddings_are_others(tmp_path):
    """Control tokens beyond them are refused when a conversation is tokenised, and not looked for later."""
    file = write(tmp_path / "a.txt", "0 9")
    for n_embeddings in (None, 1000, 999):
        for asked in (1, 0):
            fake = FakeTokenizer()
            fake.n_embeddings = n_embeddings
            data.tokenised([file], fake, tmp_path / "cache")
            assert fake.asked == asked


def test_a_mask_lies_beside_the_tokens_where_a_document_has_one(tmp_path):
    """What counts in a text is all, in a completion what is behind the prompt, in files that have both."""
    lines = [
        *jsonl("10 20", "30 50").splitlines(True),
        completion(60, 64, 70),
        *jsonl("80 90").splitlines(True),
    ]
    file = write(tmp_path / "a.jsonl", "".join(lines) + completion(90, 95, 99) + jsonl("100 103"))
    for _ in range(2):  # made, then found
        documents = data.tokenised([file], FakeTokenizer(), tmp_path / "cache")
        weights = [documents.token_weights(i, 0, 10**6).tolist() for i in range(len(documents))]
        assert weights == [[1] * 10, [1] * 20, [0] * 4 + [1] * 6, [1] * 10, [0] * 5 + [1] * 4, [1] * 3]
        assert documents.token_weights(2, 3, 6).tolist() == [0, 1, 1]
        assert len(documents.masked) == len(documents.tokens) and documents.masked.sum() == 9


def test_conversations_that_follow_each_other_are_put_together(make_masked):
    """All but the last in a row of them are in documents of more than 20 tokens, as short as that allows.

    No text, in which all counts, is joined to anything. A text without tokens, such as one of zero-width
    spaces may be, is not there.
    """
    rng = np.random.default_rng(0)
    for _ in range(200):
        documents = []
        for length in (*rng.integers(0, 30, size=rng.integers(1, 12)), 4, 0):
            is_text = length == 0 or rng.random() < 0.3
            documents.append((0 if is_text else rng.integers(1, length + 1), length, length))
        made = make_masked(*documents)
        masked = made.masked.copy()
        made.join_conversations(until=20)
        assert np.array_equal(made.masked, masked) and made.starts[-1] == len(made.tokens)

        left = [document for document in documents if document[2]]
        joined = []  # for each document that is made, those that it is made of
        for length in np.diff(made.starts):
            joined.append([])
            while sum(n for *_, n in joined[-1]) < length:
                joined[-1].append(left.pop(0))
            assert sum(n for *_, n in joined[-1]) == length
        assert not left
        for parts in joined:
            assert len(parts) == 1 or all(first > 0 for first, *_ in parts)
            assert sum(n for *_, n in parts[:-1]) <= 20
        for parts, following in zip(joined, joined[1:]):
            follow_each_other = parts[-1][0] > 0 and following[0][0] > 0
            assert not follow_each_other or sum(n for *_, n in parts) > 20


def test_the_hash_is_of_tokens_starts_and_mask(tmp_path):
    """Without a mask it is as it was before there were any, so that earlier runs can be resumed."""

    def hash_of(content):
        file = write(tmp_path / "a.jsonl", content)
        return data.tokenised([file], FakeTokenizer(), tmp_path / "cache").sha256

    parts = np.arange(10, 20, dtype=np.uint16).tobytes() + np.array([0, 10], dtype=np.int64).tobytes()
    assert hash_of(jsonl("10 20")) == hashlib.sha256(parts).hexdigest()[:16]
    assert (
        len({hash_of(jsonl("10 20")), hash_of(completion(10, 12, 20)), hash_of(completion(10, 13, 20))}) == 3
    )


def test_conversations_texts_and_completions_of_one_file(tmp_path):
    """With a real tokenizer and a chat template; another template makes other tokens."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    lines = [{"text": "The cat."}, {"messages": messages}, {"prompt": "The", "completion": " cat."}]
    file = write(tmp_path / "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        InputError, match="a.jsonl, line 2: this model has no chat template; put chat_template"
    ):
        data.tokenised([file], tokenizer.load(folder), tmp_path / "cache")
    for header in ("", "Be brief. "):
        template = header + "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        write(folder / "chat_template.jinja", template)
        documents = data.tokenised([file], tokenizer.load(folder), tmp_path / "cache")
        reference = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
        asked, end = reference.encode(header + "user: Where?"), reference.eos_id()
        conversation = documents[1].tolist()
        assert conversation[: len(asked) + 1] == [*asked, end] and conversation[-1] == end
        assert documents[0].tolist() == reference.encode("The cat.")
        assert documents[2].tolist() == [*reference.encode("The cat."), end]
        counted = [documents.token_weights(i, 0, 99).astype(bool) for i in range(3)]
        assert counted[0].all() and counted[2].tolist() == [False, *[True] * (len(documents[2]) - 1)]
        assert reference.decode(documents[1][counted[1]].tolist()) == "assistant: Here."


@pytest.mark.parametrize(
    "line, place",
    [({"text": "a c"}, "two.jsonl"), ({"prompt": "a", "completion": " c"}, "two.jsonl, line 1")],
    ids=["text", "completion"],
)
def test_a_text_that_the_tokenizer_refuses_is_named(tmp_path, line, place):
    """It has a word without a token, and none for unknown words."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    files = [write(tmp_path / "one.jsonl", jsonl("a b")), write(tmp_path / "two.jsonl", json.dumps(line))]
    told = f"{tmp_path / place}: tokenizer.json does not encode this text (WordLevel error: "
    with pytest.raises(InputError, match=re.escape(told)) as error:
        data.tokenised(files, tokenizer.load(tmp_path), tmp_path / "cache")
    assert str(error.value).endswith("; take out what it has no token for, or use a model that has one")
    assert not list((tmp_path / "cache" / "tokens").iterdir())


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": flip_a_bit,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + bytes(8)),
    "absent": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", ["tokens.bin", "starts.bin", "masked.bin", "dtype", "sha256"])
@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_tokens_are_made_anew(tmp_path, capfd, name, how):
    file = write(tmp_path / "a.jsonl", jsonl("10 20", "30 50") + completion(60, 64, 70))
    data.tokenised([file], FakeTokenizer(), tmp_path / "cache")
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    DAMAGE[how](folder / name)
    documents = data.tokenised([file], FakeTokenizer(), tmp_path / "cache")
    assert [documents[i].tolist() for i in range(2)] == [list(range(10, 20)), list(range(30, 50))]
    assert capfd.readouterr().err == f"warning: {folder}: damaged; the texts are tokenised again\n"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_dtype_that_was_swapped(tmp_path):
    """The checksum is of the tokens alone. Read two by two there are half as many."""
    file = write(tmp_path / "a.jsonl", jsonl("10 20", "30 50"))
    data.tokenised([file], FakeTokenizer(), tmp_path / "cache")
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    (folder / "dtype").write_text("uint32")
    fake = FakeTokenizer()
    assert data.tokenised([file], fake, tmp_path / "cache")[0].tolist() == list(range(10, 20))
    assert fake.asked == 2


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, RuntimeError, OSError])
def test_nothing_half_written_is_left_behind(tmp_path, stop):
    """It is stopped in the second batch, when the first one is on its way to the disk.

    The next call starts anew and is whole.
    """
    spans = [(i, i + 5) for i in range(100)]
    file = write(tmp_path / "a.jsonl", jsonl(*(f"{first} {last}" for first, last in spans)))
    fake = FakeTokenizer()

    def encode_some(texts):
        if fake.asked:
            raise stop("in the middle")
        return FakeTokenizer.encode_batch(fake, texts)

    fake.encode_batch = encode_some
    with pytest.raises(stop):
        data.tokenised([file], fake, tmp_path / "cache")
    assert 0 < fake.asked < 100
    assert not list((tmp_path / "cache" / "tokens").iterdir())

    documents = data.tokenised([file], FakeTokenizer(), tmp_path / "cache")
    assert [documents[i].tolist() for i in range(len(documents))] == [list(range(*span)) for span in spans]
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    assert {path.name for path in folder.iterdir()} == {"tokens.bin", "starts.bin", "dtype", "sha256"}


def test_what_a_kill_left_of_tokens_is_removed(tmp_path):
    file = write(tmp_path / "a.jsonl", jsonl("10 20"))
    data.tokenised([file], FakeTokenizer(), tmp_path / "cache")
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    shutil.rmtree(folder)
    write(temporary_folder(folder) / "tokens.bin", b"half")
    data.tokenised([file], FakeTokenizer(), tmp_path / "cache")
    assert list(folder.parent.iterdir()) == [folder]


def test_another_machine_that_was_faster(tmp_path, monkeypatch):
    """Where locks do not reach other machines, the folder that is there first stays: it may be in use."""
    file = write(tmp_path / "a.jsonl", jsonl("10 20"))
    monkeypatch.setattr(data, "only_one_process", lambda lock: contextlib.nullcontext())
    fake, first = FakeTokenizer(), []

    def encode_slowly(texts):
        data.tokenised([file], FakeTokenizer(), tmp_path / "cache")
        (folder,) = (path for path in (tmp_path / "cache" / "tokens").iterdir() if not path.suffix)
        first.append(folder.stat().st_ino)
        return FakeTokenizer.encode_batch(fake, texts)

    fake.encode_batch = encode_slowly
    assert data.tokenised([file], fake, tmp_path / "cache")[0].tolist() == list(range(10, 20))
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    assert first == [folder.stat().st_ino]


def test_a_process_that_waited_for_tokens_does_not_check_them(tmp_path, monkeypatch):
    """One after the other, eight processes would read all of them eight times."""
    file = write(tmp_path / "a.jsonl", jsonl("10 20"))
    lock = data.only_one_process

    @contextlib.contextmanager
    def wait_for_another_process(path):
        monkeypatch.setattr(data, "only_one_process", lock)
        data.tokenised([file], FakeTokenizer(), tmp_path / "cache")
        monkeypatch.setattr(data, "whole_documents", None)
        yield

    monkeypatch.setattr(data, "only_one_process", wait_for_another_process)
    assert data.tokenised([file], FakeTokenizer(), tmp_path / "cache")[0].tolist() == list(range(10, 20))


# ---------------------------------------------------------------- batches


@pytest.fixture
def make_documents(tmp_path):
    """make_documents(5, 80): documents of 5 and 80 tokens.

    Number i has the ids 1000 (i + 1), 1000 (i + 1) + 1, …
    """

    def make(*lengths):
        file = write(
            tmp_path / "documents.jsonl",
            jsonl(*(f"{1000 * i} {1000 * i + n}" for i, n in enumerate(lengths, 1))),
        )
        return data.tokenised([file], FakeTokenizer(vocab_size=100_000), tmp_path / "cache")

    return make


POSE = {"method": "pose", "train_len": 8, "target_len": 64, "chunks": 2, "offset": "uniform"}


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def together(batches, step, indices):
    """Return tokens, positions, targets and token weights of a step's examples, (windows, tokens) each."""
    (micro_batch,) = data.micro_batches(batches(step, indices), len(indices))
    return micro_batch


@pytest.mark.parametrize("share", [0, 0.3])
def test_batch_is_a_pure_function_of_seed_step_and_index(make_documents, share):
    documents = make_documents(200, 300, 90)
    episodes = data.Episodes(share, 12, 4, fake_episode)
    batches = data.Batches(documents, 7, episodes=episodes, **POSE)
    whole = batches(3, range(12))
    for tokens, positions, targets, weights in whole:
        assert tokens.shape == positions.shape == targets.shape == weights.shape in ((1, 8), (2, 4))
        assert tokens.dtype == positions.dtype == targets.dtype == np.int64 and weights.dtype == np.float32
    batches(4, range(5))  # leaves nothing behind
    by_processes = {1: [range(12)], 2: [range(6), range(6, 12)], 12: [[i] for i in range(12)]}
    for groups in by_processes.values():
        others = [data.Batches(documents, 7, episodes=episodes, **POSE)(3, group) for group in groups]
        assert all(map(same, whole, itertools.chain(*others)))
    assert all(map(same, [whole[8], whole[2], whole[2]], batches(3, [8, 2, 2])))


def test_steps_indices_and_seeds_all_make_other_examples(make_documents):
    """Also across the three: (seed, step, index) is no sum.

    There are millions of examples to draw, so 216 never repeat by chance.
    """
    documents = make_documents(900)
    examples = []
    for seed in range(6):
        batches = data.Batches(documents, seed, **POSE | {"target_len": 10**6})
        for step in range(6):
            tokens, positions, _, _ = together(batches, step, range(6))
            examples += [(t.tobytes(), p.tobytes()) for t, p in zip(tokens, positions)]
    assert len(examples) == len(set(examples)) == 216


@pytest.mark.parametrize("bos_id", [None, 1])
@pytest.mark.parametrize(
    "sampling",
    [
        POSE,
        POSE | {"chunks": 8},
        POSE | {"offset": "skip"},
        POSE | {"offset": "zero"},
        POSE | {"method": "pi"},
        POSE | {"method": "randpos"},
        POSE | {"method": "full", "target_len": 8},
        POSE | {"train_len": 1},
    ],
)
def test_target_is_the_token_that_follows_in_the_document(make_documents, sampling, bos_id):
    """Ids are consecutive, so a target is its token + 1.

    It is so at the seam of two chunks, before the end, and for the token that BOS replaced.
    """
    train_len = sampling["train_len"]
    batches = data.Batches(make_documents(9, 10, 500), seed=0, bos_id=bos_id, **sampling)
    tokens, positions, targets, weights = together(batches, 0, range(300))
    assert (weights == 1).all()
    if bos_id is None:
        assert (targets == tokens + 1).all()
    else:
        assert (tokens[:, 0] == bos_id).all() and (targets[:, 1:] == tokens[:, 1:] + 1).all()
        without_bos = data.Batches(make_documents(9, 10, 500), seed=0, **sampling)
        assert same(together(without_bos, 0, range(300))[1:], (positions, targets, weights))
    documents, places = np.divmod(targets, 1000)
    assert (documents == documents[:, :1]).all()  # no example crosses from one document into the next
    assert (places < np.array([0, 9, 10, 500])[documents]).all() and (places >= 1).all()
    if sampling["method"] == "pose" and sampling["offset"] == "uniform" and train_len > 1:
        assert (np.diff(targets) > 1).any()  # there are seams


@pytest.mark.parametrize("first, steps", [(0, 5), (3, 4)])
def test_batches_made_ahead_are_those_of_their_steps(make_documents, first, steps):
    """They are so from the first step of a run and of a resumed one.

    They may be taken at once, or with time in between for the thread.
    """
    batches = data.Batches(make_documents(200, 300, 90), seed=7, bos_id=1, **POSE)
    ahead = data.prefetched(batches, first, range(2, 8), 2, torch.device("cpu"))
    for step, micro_batches in zip(range(first, first + steps), ahead):
        assert [tokens.shape for tokens, *_ in micro_batches] == 3 * [(2, 8)]
        for i, (*ids, weights) in zip((2, 4, 6), micro_batches):
            assert {column.dtype for column in ids} == {torch.int64} and weights.dtype == torch.float32
            assert same((*ids, weights), together(batches, step, (i, i + 1)))
        time.sleep(0.02 * (step % 2))


def test_an_error_in_a_batch_made_ahead_comes_out(make_documents):
    def batches(step, indices):
        return data.Batches(make_documents(200), seed=7, **POSE)(step, indices) if step < 2 else 1 / 0

    ahead = data.prefetched(batches, 0, range(2), 2, torch.device("cpu"))
    assert len([next(ahead), next(ahead)]) == 2
    with pytest.raises(ZeroDivisionError):
        next(ahead)


def test_every_place_where_a_window_can_begin_is_equally_likely(make_documents):
    """So a document is drawn in proportion to length - train_len, and short ones never.

    (The last token is a target only.)
    """
    lengths, n = [8, 9, 12, 30, 3, 20], 8000
    batches = data.Batches(make_documents(*lengths), seed=1, **POSE | {"method": "pi"})
    assert batches.n_too_short == 2  # of 8 and 3 tokens
    first = Counter(together(batches, 0, range(n))[0][:, 0].tolist())
    places = [1000 * i + start for i, length in enumerate(lengths, 1) for start in range(length - 8)]
    assert set(first) <= set(places) and len(places) == 1 + 4 + 22 + 12
    expected = n / len(places)
    statistic = sum((first[place] - expected) ** 2 / expected for place in places)
    halves = torch.tensor([(len(places) - 1) / 2, statistic / 2], dtype=torch.float64)
    assert float(torch.special.gammaincc(*halves)) > 1e-6  # chi-square


@pytest.mark.parametrize("lengths, skipped", [([9], 0), ([8, 9], 1), ([1, 7, 8, 40, 2], 4)])
def test_short_documents_are_counted_and_never_drawn(make_documents, lengths, skipped):
    batches = data.Batches(make_documents(*lengths), seed=0, **POSE)
    assert batches.n_too_short == skipped
    drawn = set((together(batches, 0, range(100))[0] // 1000).ravel().tolist())
    assert drawn == {i for i, length in enumerate(lengths, 1) if length > 8}


def test_only_short_documents(make_documents):
    with pytest.raises(
        InputError, match="longer than the training window of 8 tokens: the longest of 3 has 8"
    ):
        data.Batches(make_documents(5, 8, 1), seed=0, **POSE)


def test_text_of_an_example_spans_at_most_five_windows(make_documents):
    tokens, _, _, _ = together(data.Batches(make_documents(900), seed=0, **POSE), 0, range(4000))
    spans = tokens[:, -1] - tokens[:, 0] + 1
    assert spans.max() == 5 * 8 and spans.min() == 8  # both ends are reached


def test_text_offset_skip_reaches_as_far_as_the_positions(make_documents):
    """There the text of a chunk is where its positions say, wherever the document goes on that far.

    That is up to target_len tokens away.
    """
    batches = data.Batches(make_documents(900), seed=0, **POSE | {"offset": "skip"})
    tokens, positions, _, _ = together(batches, 0, range(1000))
    enough = tokens[:, 0] - 1000 + 64 < 900
    assert enough.sum() > 500 and positions[enough].max() == 63
    assert np.array_equal((tokens - tokens[:, :1])[enough], positions[enough])


# ---------------------------------------------------------------- what counts


@pytest.fixture
def make_masked(tmp_path):
    """make_masked((5, 5, 30), (9, 12, 80)): documents with these (first counted token, last, length).

    Number i has the ids 1000 (i + 1), 1000 (i + 1) + 1, … What counts begins at the first place and ends
    before the second.
    """

    def make(*documents):
        starts = np.cumsum([0, *(length for *_, length in documents)])
        made = data.Documents.__new__(data.Documents)
        made.starts, made.sha256 = starts, ""
        made.tokens = np.concatenate([1000 * i + np.arange(n) for i, (*_, n) in enumerate(documents, 1)])
        counts = [(np.arange(n) >= first) & (np.arange(n) < last) for first, last, n in documents]
        made.masked = (~np.concatenate(counts)).astype(np.uint8)
        return made

    return make


@pytest.mark.parametrize("method", ["pose", "pi", "randpos"])
@pytest.mark.parametrize("bos_id", [None, 1])
def test_weights_are_those_of_the_targets_and_none_of_the_windows_is_empty(make_masked, method, bos_id):
    """The answer may be short, at the end, the beginning or in the middle of a long document."""
    documents = make_masked((10**4 - 3, 10**4, 10**4), (2, 4, 5000), (3000, 3001, 6000), (0, 20, 20))
    documents.tokens = np.arange(len(documents.tokens))
    batches = data.Batches(documents, 0, bos_id, **POSE | {"method": method})
    _, positions, targets, weights = together(batches, 0, range(400))
    assert np.array_equal(weights, 1 - documents.masked[targets]) and weights.dtype == np.float32
    assert (weights.sum(1) > 0).all()
    drawn = np.searchsorted(documents.starts, targets[:, 0], side="right")
    assert set(drawn.tolist()) == {1, 2, 3, 4}
    assert batches.counted_share == pytest.approx((3 + 2 + 1 + 20) / len(documents.tokens))


def test_windows_in_which_something_counts_are_equally_likely(make_masked):
    documents, n = [(0, 12, 12), (40, 42, 60), (5, 5, 30), (0, 1, 30)], 8000
    batches = data.Batches(make_masked(*documents), seed=1, **POSE | {"method": "pi"})
    first = Counter(together(batches, 0, range(n))[0][:, 0].tolist())
    places = []
    for i, (begin, end, length) in enumerate(documents, 1):
        for start in range(length - 8):
            if any(begin <= target < end for target in range(start + 1, start + 9)):
                places.append(1000 * i + start)
    assert set(first) == set(places) and len(places) == 4 + 9
    expected = n / len(places)
    statistic = sum((first[place] - expected) ** 2 / expected for place in places)
    halves = torch.tensor([(len(places) - 1) / 2, statistic / 2], dtype=torch.float64)
    assert float(torch.special.gammaincc(*halves)) > 1e-6  # chi-square


@pytest.mark.parametrize("documents", [[(5, 5, 30)], [(0, 1, 30)], [(0, 8, 8), (3, 3, 20)]])
def test_documents_in_which_nothing_counts(make_masked, documents):
    """The first token of a document is no target, and one that is too short does not count."""
    with pytest.raises(InputError, match="no token counts in the documents longer than .* 8 tokens"):
        data.Batches(make_masked(*documents), seed=0, **POSE)


def test_an_episode_is_made_of_a_text_and_its_weights(make_masked):
    documents = make_masked((100, 130, 200))
    seen = []

    def make(rng, text, weights):
        seen.append((text, weights))

    episodes = data.Episodes(1, 1, 8, make)
    data.Batches(documents, 0, episodes=episodes, **POSE)(0, range(50))
    for text, weights in seen:
        assert len(text) == len(weights) > 8
        assert np.array_equal(weights, (text >= 1100) & (text < 1130))


# ---------------------------------------------------------------- episodes among the examples


def fake_episode(rng, text, weights):
    """Return a window of 4 that begins somewhere in a text, of weight 5, or None as often."""
    start = rng.integers(len(text) - 4)
    if rng.random() < 0.5:
        return None
    window = text[start : start + 5]
    return window[:-1], 7 * np.arange(4), window[1:], np.full(4, 5, dtype=np.float32)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.3, 0.5, 1])
@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_episodes_have_their_share_of_the_run_and_are_spread_evenly(share, batch_size):
    """It holds for small batches too, in which a share has no whole number of examples."""
    episodes = data.Episodes(share, batch_size, 4, fake_episode)
    flags = np.array([episodes.includes(step, i) for step in range(60) for i in range(batch_size)])
    for end in range(1, len(flags)):
        for start in {0, max(0, end - 10), max(0, end - 2 * batch_size)}:
            assert abs(flags[start:end].sum() - share * (end - start)) < 1 + 1e-9


def test_an_example_of_episodes_holds_as_many_as_fit_and_plain_windows_for_want_of_one(make_documents):
    """They have the length of an episode and its positions reach as far as those of any other window.

    A BOS token begins each of them.
    """
    episodes = data.Episodes(0.5, 100, 4, fake_episode)
    batches = data.Batches(make_documents(200, 300, 90), 7, bos_id=1, episodes=episodes, **POSE)
    examples = batches(0, range(100))
    assert {column.shape for example in examples[::2] for column in example} == {(1, 8)}
    plain = data.Batches(make_documents(200, 300, 90), 7, bos_id=1, **POSE)(0, range(100))
    assert all(map(same, examples[::2], plain[::2]))  # episodes leave the other examples as they are
    tokens, positions, targets, weights = map(np.concatenate, zip(*examples[1::2]))
    assert tokens.shape == positions.shape == targets.shape == weights.shape == (100, 4)
    assert (tokens[:, 0] == 1).all() and (targets[:, 1:] == tokens[:, 1:] + 1).all()
    made = weights[:, 0] == 5
    assert 30 < made.sum() < 70 and set(np.unique(weights[~made])) == {1}
    assert (positions[made] == 7 * np.arange(4)).all()
    assert positions[~made].max() > 50 and (np.diff(positions[~made]) > 0).all()


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_the_mean_window_is_that_of_a_token(make_documents, share):
    episodes = data.Episodes(share, 100, 4, fake_episode) if share else None
    batches = data.Batches(make_documents(200), 7, episodes=episodes, **POSE)
    lengths = [np.full(tokens.shape, tokens.shape[1]) for tokens, *_ in batches(0, range(100))]
    assert batches.mean_window == np.concatenate([window.ravel() for window in lengths]).mean()
