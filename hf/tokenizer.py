"""Text <-> token ids: SentencePiece's tokenizer.model and tokenizer.json behind one small interface.

A tokenizer has
- `vocab_size`, the number of ids;
- `bos_id`, the token that this model's windows begin with, None if it was trained without one;
- `encode(text)` and `encode_batch(texts)`, which return lists of ids without special tokens;
- `eos_id`, the token that ends a text, None if the files name none;
- `control_tokens`, {text: id} of the tokens with which a chat template says who speaks;
- `encode_with_control_tokens(text)`, which makes these of their texts, as transformers does;
- `encode_with_spans(text, spans)`, which also tells which tokens are in spans of the text;
- `n_embeddings`, of the model beside it, None if no model is: a control token may have an id beyond;
- `decode(ids)`, which returns the text;
- `files`, {name: bytes} of the files that it was read from.

Notable choices:
- Text that spells a control token ("<s>", "<|endoftext|>") stays text in SentencePiece's `encode` and becomes
  that token in a tokenizer.json, because transformers does the same. The two methods that are for templates
  and for prompts with completions make it a control token in both.
- In a folder with both files the tokenizer.model counts, since SentencePiece reads a whole book at once in
  linear time. Tokens that only the tokenizer.json adds are never produced. A tokenizer.model in tiktoken's
  format (Llama 3 has one) does not count.
"""

import contextlib
import functools
import os
import re
import sys
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

from storage.errors import InputError, naming
from storage.values import LARGEST_ID, parse_object

# The files that travel with a model, where it has them.
FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
# Those of them that hold settings.
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
# The first line of a tokenizer.model in tiktoken's format: a token in base64 and its id.
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


def load(folder):
    """Return the tokenizer of a Hugging Face folder. Raise InputError if there is none, or a broken one."""
    folder = Path(folder)
    files = read_files(folder)
    is_tiktoken = TIKTOKEN.match(files.get("tokenizer.model", b""))
    save_one = "save a tokenizer.json there with transformers"
    if "tokenizer.model" in files and not is_tiktoken:
        name, kind = "tokenizer.model", SentencePiece
    elif "tokenizer.json" in files:
        name, kind = "tokenizer.json", TokenizerJson
    elif is_tiktoken:
        raise InputError(f"{folder}: no tokenizer.json, and a tokenizer.model of tiktoken's; {save_one}")
    else:
        remedy = save_one if "merges.txt" in files else "put the model's own tokenizer file there"
        raise InputError(f"{folder}: no tokenizer.model or tokenizer.json; {remedy}")

    for settings in SETTINGS:
        try:
            json_object(files, settings)
        except ValueError as error:
            raise InputError(f"{folder / settings}: not readable ({error}); copy it again") from None
    if not files[name]:
        raise InputError(f"{folder / name}: not readable (it is empty); copy it again")
    try:
        with hidden_panics():
            return kind(files)
    except Exception as error:
        raise InputError(f"{folder / name}: not readable ({reason_of(error)}); copy it again") from None


def read_files(folder):
    """Return {name: bytes} of the FILES in a folder. They go into every model that is made of this one.

    Raise InputError for a link out of the folder, which could lead to anything on this machine. The blobs of
    the Hugging Face cache are what its snapshots link to.
    """
    files = {}
    for name in FILES:
        path = folder / name
        if not path.is_file():
            continue
        target = path.resolve()
        is_blob = target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
        if target.parent != folder.resolve() and not is_blob:
            raise InputError(f"{path}: a link out of the folder, to {target}; put the file itself there")
        with naming(path):
            files[name] = path.read_bytes()
    return files


def load_for(config, folder):
    """Return the tokenizer of a Hugging Face folder whose model has this Config.

    Raise InputError if there is none, or if it makes ids that the model has no embedding for.
    """
    loaded = load(folder)
    check_size(loaded, config.vocab_size, folder)
    loaded.n_embeddings = config.vocab_size
    return loaded


def check_size(tokenizer, vocab_size, path):
    """Raise InputError if a tokenizer makes ids that a model of `vocab_size` embeddings does not have.

    path: where both come from, for the message.
    """
    needed = max(tokenizer.vocab_size, (tokenizer.bos_id or 0) + 1)
    if needed > vocab_size:
        sizes = f"the tokenizer has {needed} tokens, the model only {vocab_size}"
        raise InputError(f"{path}: {sizes}; use the tokenizer it was trained with")


class SentencePiece:
    """A tokenizer.model. Windows begin with its bos token unless tokenizer_config.json says otherwise."""

    def __init__(self, files):
        self.files = files
        self._model = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
        self.vocab_size = self._model.vocab_size()
        self._settings = json_object(files, "tokenizer_config.json")
        has_bos = self._model.bos_id() >= 0
        self.bos_id = self._model.bos_id() if has_bos and self._settings.get("add_bos_token", True) else None
        self.n_embeddings = None

    @functools.cached_property
    def eos_id(self):
        own = self._model.eos_id() if self._model.eos_id() >= 0 else None
        return self.control_tokens.get(special_tokens(self).get("eos_token"), own)

    @functools.cached_property
    def control_tokens(self):
        control_tokens = added_tokens(self.files)
        for i in range(self.vocab_size):
            if self._model.is_control(i) or self._model.is_unknown(i):
                control_tokens[self._model.id_to_piece(i)] = i
        return control_tokens

    @functools.cached_property
    def _model_without_prefix(self):
        """The same model, but no space is put before a text."""
        # Of a message that a protobuf holds twice, the fields merge. This is a normalizer_spec (field 3) in
        # which add_dummy_prefix (field 3) is false.
        without_prefix = b"\x1a\x02\x18\x00"
        return sentencepiece.SentencePieceProcessor(
            model_proto=self.files["tokenizer.model"] + without_prefix
        )

    def encode_with_control_tokens(self, text):
        return self.encode_with_spans(text, [])[0]

    def encode_with_spans(self, text, spans):
        ids, inside = [], []
        for place, part, model in self._parts(text):
            of_part = [self.control_tokens[part]] if model is None else model.encode(part)
            is_inside = np.zeros(len(of_part), dtype=bool)
            ends = np.cumsum([len(piece) for piece in _pieces(model, part, of_part)]) if spans else None
            for begin, end in spans:
                first, _ = _tokens_at(model, part, ends, begin - place)
                _, last = _tokens_at(model, part, ends, end - place)
                is_inside[first:last] = True
            ids += of_part
            inside.append(is_inside)
        return ids, np.concatenate([np.zeros(0, dtype=bool), *inside])

    def _parts(self, text):
        """Yield (place in the text, part, model that encodes it). The model of a control token is None."""
        place, has_prefix = 0, True
        for part in re.split(f"({one_of(self.control_tokens)})", text):
            if part in self.control_tokens:
                yield place, part, None
                # As in transformers, a space is put before the first words, and with "legacy" after each
                # control token too, unless there is one.
                has_prefix = bool(self._settings.get("legacy"))
            elif part:
                has_prefix = has_prefix and not part.startswith(" ")
                yield place, part, self._model if has_prefix else self._model_without_prefix
                has_prefix = False
            place += len(part)

    def encode(self, text):
        return self._model.encode(text)

    def encode_batch(self, texts):
        return self._model.encode(texts, num_threads=-1)

    def decode(self, ids):
        # A model may have embeddings beyond this vocabulary, for added tokens or as padding: not text.
        return self._model.decode([int(i) for i in ids if i < self.vocab_size])


def _pieces(model, text, ids):
    """Return what each of a text's ids stands for, a list of bytes, with "▁" for spaces.

    model: None where the text is a control token.
    """
    if model is None:
        return [text.encode()]
    pieces = []
    for i, piece in zip(ids, model.encode(text, out_type=str)):
        is_byte = model.is_byte(i)  # such a piece is spelt as "<0x0A>"
        pieces.append(bytes([int(piece[1:-1], 16)]) if is_byte else piece.encode())
    return pieces


def _tokens_at(model, text, ends, place):
    """Return how many of a text's tokens end up to a place in it, and how many begin before it.

    ends: the sums of the tokens' bytes. The two numbers differ by one where a token reaches over the place.
    Each version of SentencePiece has another way to say where its tokens are in a text. It may also put a
    space before or behind the text or change characters. So the text before the place is encoded with an "x"
    behind it, and the bytes before the x are counted. A place inside of characters that the model makes one
    of, such as a letter and its accent, counts as behind them.
    """
    if place <= 0:
        return 0, 0
    if place >= len(text):
        return len(ends), len(ends)
    if model is None:  # a prompt and its completion make a control token between them
        return 0, 1
    head = text[:place] + "x"  # alone, it may lose a space at its end
    here = b"".join(_pieces(model, head, model.encode(head))).rindex(b"x")
    ended = np.searchsorted(ends, here, side="right")
    return ended, np.searchsorted(ends, here, side="left") + 1


class TokenizerJson:
    """A tokenizer.json. Its post-processor says what windows begin with, and not tokenizer_config.json.

    That is what transformers does since version 5.
    """

    def __init__(self, files):
        self.files = files
        self._model = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        self.vocab_size = max(self._model.get_vocab().values()) + 1  # ids may have gaps
        # Some files come with truncation or padding switched on, which would change every document.
        self._model.no_truncation()
        self._model.no_padding()
        example = self._model.encode("a")  # a panic of the library comes here, if at all
        begins_with_special_token = example.special_tokens_mask[:1] == [1]
        self.bos_id = example.ids[0] if begins_with_special_token else None
        # From here on it would only take the blanks around a token out of its offsets.
        self._model.post_processor = None
        self.n_embeddings = None
        added = self._model.get_added_tokens_decoder()
        self.control_tokens = {token.content: i for i, token in added.items() if token.special}

    @functools.cached_property
    def eos_id(self):
        return self._model.token_to_id(special_tokens(self).get("eos_token", ""))

    def encode(self, text):
        return self.encode_batch([text])[0]

    def encode_with_control_tokens(self, text):
        return self.encode(text)

    def encode_with_spans(self, text, spans):
        # A token that reaches over the edge of a span is in it, as in transformers' masks.
        with refusing_texts():
            encoded = self._model.encode(text, add_special_tokens=False)
        begins, ends = np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2).T
        inside = np.zeros(len(begins), dtype=bool)
        for begin, end in spans:
            inside |= (ends > begin) & (begins < end)
        return encoded.ids, inside

    def encode_batch(self, texts):
        with refusing_texts():
            return [encoded.ids for encoded in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids):
        return self._model.decode([int(i) for i in ids], skip_special_tokens=False)


@contextlib.contextmanager
def refusing_texts():
    """Turn the tokenizers library's error for a text that has no tokens into an InputError."""
    try:
        yield
    except Exception as error:  # such as a character that has no token, where there is none for unknown
        remedy = "take out what it has no token for, or use a model that has one"
        reason = f"tokenizer.json does not encode this text ({reason_of(error)})"
        raise InputError(f"{reason}; {remedy}") from None


@contextlib.contextmanager
def hidden_panics():
    """Turn a panic of the tokenizers library, which is written in Rust, into a RuntimeError.

    A panic is none of Python's Exceptions, and prints a trace of its own on stderr.
    """
    if sys.stderr is None:  # closed when the program began
        yield
        return
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise RuntimeError(str(error)) from None
        raise
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def reason_of(error):
    """Return in a few words what a tokenizer library says of a broken file.

    Both raise a bare Exception or RuntimeError. Any other error comes of a file that they did not check.
    """
    is_said = type(error) in (Exception, RuntimeError) and str(error).strip()
    return str(error).strip().splitlines()[0] if is_said else "damaged"


def json_object(files, name):
    """Return the JSON object in one of `files` {name: bytes}, {} if there is no such file.

    Raise ValueError if the file holds something else.
    """
    return parse_object(files.get(name, b"{}"))


@functools.cache
def special_tokens(tokenizer):
    """Return {name: text} of the special tokens that the settings name, such as eos_token."""
    named = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for name, token in json_object(tokenizer.files, file).items():
            text = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(text, str):
                named[name] = text
    return named


def added_tokens(files):
    """Return {text: id} of the tokens that the settings of a tokenizer.model add to it.

    Raise InputError if the settings say something else than texts and ids.
    """
    added = json_object(files, "added_tokens.json")  # transformers wrote it before it had the other one
    by_id = json_object(files, "tokenizer_config.json").get("added_tokens_decoder") or {}
    try:
        added |= {token["content"]: int(i) for i, token in by_id.items()}
        return {text: i for text, i in added.items() if len(text) > 0 and i >= 0}
    except (AttributeError, KeyError, TypeError, ValueError):
        reason = "the added tokens of added_tokens.json or tokenizer_config.json are not texts and ids"
        raise InputError(f"{reason}; copy these files again") from None


def one_of(texts):
    """Return a regular expression for one of these texts, of several that fit the longest."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


def bos_ids(tokenizer):
    """Return the ids that this model's windows begin with, a list of one or none."""
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def stop_ids(tokenizer, config):
    """Return the ids at which an answer ends, a list: those of generation_config.json, else the Config's.

    Raise InputError if that file says something else than ids.
    """
    eos = json_object(tokenizer.files, "generation_config.json").get("eos_token_id")
    if eos is None:
        eos = config.eos_token_id
    if eos is None:
        return []
    ids = eos if isinstance(eos, list) else [eos]  # Llama 3 has several
    if not all(type(i) is int and abs(i) <= LARGEST_ID for i in ids):
        raise InputError(f"generation_config.json: eos_token_id is {eos!r}, not an id or a list; mend it")
    return ids


# ---------------------------------------------------------------- lines and tokens in the middle of a text


def ids_of_line(tokenizer, line):
    """Return the token ids of a newline and a line behind it, as they are in the middle of a text."""
    return tokenizer.encode("x\n" + line)[len(ids_of_x(tokenizer)) :]


@functools.cache
def ids_of_x(tokenizer):
    """Return the token ids of "x", which stands before what is encoded or decoded as the inside of a text."""
    return tokenizer.encode("x")


def line_ends(tokenizer, text):
    """Return the places in a text, a 1-d array of ids, where a line or a sentence ends, 0 among them."""
    newline, stop, space = token_kinds(tokenizer)
    # Ids beyond the vocabulary are control tokens, which all are of the last kind.
    text = np.minimum(text.astype(np.int64), tokenizer.vocab_size)
    this, following = text[:-1], text[1:]
    ends_here = newline[this] | (stop[this] & space[following])
    return np.concatenate([[0], 1 + np.flatnonzero(ends_here)])


@functools.cache
def token_kinds(tokenizer):
    """Return whether each token ends a line, may end a sentence, begins with a space.

    Three boolean arrays (vocab_size + 1,). The last entries are of all ids that are no words.
    """
    texts = [*token_texts(tokenizer), ""]
    ends_line = [text.endswith("\n") for text in texts]
    may_end_sentence = [text.rstrip("\"')”’").endswith((".", "!", "?")) for text in texts]
    begins_with_space = [text[:1].isspace() for text in texts]
    return np.array(ends_line), np.array(may_end_sentence), np.array(begins_with_space)


@functools.cache
def token_texts(tokenizer):
    """Return, for each token id, the text that it adds in the middle of a text."""
    return [tokenizer.decode([*ids_of_x(tokenizer), i])[1:] for i in range(tokenizer.vocab_size)]


class Detokenizer:
    """Turns ids into text as they come, a character or more at a time.

    A character may take several tokens, and a decoder leaves out the space before a text's first word. So a
    token waits until its characters are complete, and is decoded behind a letter unless it is the first.
    """

    def __init__(self, tokenizer, starts_text):
        """Begin before any token. starts_text: whether the first one starts a text, or goes on with one."""
        self.tokenizer = tokenizer
        self.before = [] if starts_text else ids_of_x(tokenizer)
        self.waiting = []

    def add(self, token):
        """Return the text that one more token adds, "" if it ends inside a character."""
        self.waiting.append(token)
        text = self.rest()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.before, self.waiting = ids_of_x(self.tokenizer), []
        return text

    def rest(self):
        """Return the text of the tokens that still wait, with a replacement for an incomplete character."""
        return self.tokenizer.decode(self.before + self.waiting)[1 if self.before else 0 :]
