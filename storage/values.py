"""Reading JSON files and the numbers in them, with one-line errors."""

import json
import math
from pathlib import Path

from storage.errors import InputError

MAX_JSON_BYTES = 2**28
MAX_DEPTH = 100  # lists and objects inside each other
MAX_DIGITS = 400  # digits of a whole number
LARGEST_ID = 2**63 - 1  # of a token: ids are int64


def read_record(path):
    """Return what read_json does of a file that this program wrote.

    It may hold the name of another file that is no UTF-8.
    """
    return read_json(path, "surrogateescape")


def read_json(path, errors="strict"):
    """Return the JSON object in a file as a dict. Raise InputError if there is none, see parse_object.

    errors: see check_characters.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'not a regular file' if path.exists() else 'missing'}; copy it again")
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES:,} bytes")
        return parse_object(path.read_bytes(), errors)
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror}); check its permissions") from None
    except ValueError as error:
        raise InputError(f"{path}: not readable ({error}); copy it again") from None


def parse_object(content, errors="strict"):
    """Return the JSON object in bytes as a dict. errors: see check_characters.

    Raise ValueError if they hold something else, or values that this code refuses: numbers that are NaN,
    infinite or thousands of digits long, lone surrogates, lists and objects nested deeper than MAX_DEPTH.
    """
    parsed = parse_json(content)
    if not isinstance(parsed, dict):
        raise ValueError("not a JSON object")
    level = [parsed]
    for _ in range(MAX_DEPTH):
        inside = []
        for value in level:
            if isinstance(value, dict):
                inside += [*value, *value.values()]
            elif isinstance(value, list):
                inside += value
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError("a number that is NaN or infinite")
            elif isinstance(value, str):
                check_characters(value, errors)
        if not inside:
            return parsed
        level = inside
    raise ValueError("nested too deeply")


def parse_json(content):
    """Return the value of JSON in UTF-8 bytes. Raise ValueError if they are something else."""
    try:
        return json.loads(content.decode("utf-8-sig"), parse_int=_whole_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON at character {error.pos}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_characters(text, errors="strict"):
    """Raise ValueError for a lone surrogate: half a character, which JSON can spell and UTF-8 cannot.

    errors: "surrogateescape" lets those pass that stand for bytes in a name of a file (os.fsdecode).
    """
    try:
        text.encode(errors=errors)
    except UnicodeEncodeError:
        raise ValueError("half a character, which is no text") from None


def _whole_number(digits):
    """Return the int that the digits spell. Raise ValueError if there are more than MAX_DIGITS."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def positive(values, key, kind=float, most=1e30, default=None):
    """Return the positive number under a key of a dict that was read from a file.

    kind: int for whole numbers alone, float for any. default: what stands for a key that is absent or null.
    Raise ValueError if there is no number, or one that is not positive or larger than `most`.
    """
    value = default if values.get(key) is None else values[key]
    if value is None:
        raise ValueError(f"{key} is missing")
    allowed = (int,) if kind is int else (int, float)
    if type(value) not in allowed or not 0 < value:
        raise ValueError(f"{key} is {value!r}, not a positive {'whole ' if kind is int else ''}number")
    if value > most:
        raise ValueError(f"{key} is {value}, more than the {most:,} that a model may have")
    return kind(value)


def describe_changes(earlier, now):
    """Return in words which settings of `now` have another value in `earlier`, "" if none.

    Both are records {setting: value}. Settings that `now` lacks are not compared.
    """
    differences = []
    for key, value in now.items():
        if earlier.get(key) != value:
            differences.append(f"{key} was {earlier.get(key)}, now {value}")
    return "; ".join(differences)
