"""Vocabularies in the files of other libraries, beside the one that is read.

A folder may hold one vocabulary in two or three forms. Which of two a model was trained
with is not written anywhere, so files that say different things are refused.
"""

import json
import logging
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers.convert_slow_tokenizer import bytes_to_unicode

TEKKEN = "tekken.json"
SENTENCES = "tokenizer.model"

log = logging.getLogger("holdfast")


def others(path: Path, known: Mapping[str, int]) -> list[str]:
    """Return tokens with other numbers than in the vocabulary that is read.

    Whoever converts such a file may move the special tokens and spell single ones anew,
    so it is of the same vocabulary where most of its tokens are at one distance.

    Args:
        path: A `tekken.json`, or a `tokenizer.model` of SentencePiece or tiktoken,
            which need not be there. One that cannot be read is told, not refused:
            nothing reads it.
        known: Numbers of the tokens that are read, by token.
    """
    if not path.is_file():
        return []
    try:
        data = path.read_bytes()
        if path.name == TEKKEN:
            tokens = list(_tekken(data))
        else:
            tokens = list(_pieces(data) if data[:1] == b"\n" else _ranks(data))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        log.warning(
            "%s cannot be compared with the tokenizer.json beside it, which is read "
            "(%s).",
            path,
            type(error).__name__,
        )
        return []
    distances = Counter(known[token] - n for token, n in tokens if token in known)
    if 2 * max(distances.values(), default=0) >= len(tokens):
        return []
    return [token for token, n in tokens if known.get(token) != n]


def _tekken(data: bytes) -> Iterator[tuple[str, int]]:
    for number, entry in enumerate(json.loads(data)["vocab"]):
        yield _spelt(entry["token_bytes"]), number


def _ranks(data: bytes) -> Iterator[tuple[str, int]]:
    """Yield the tokens of tiktoken: a line each, in base 64 and with a number."""
    for line in data.splitlines():
        token, number = line.split()
        yield _spelt(token), int(number)


def _spelt(token: str | bytes) -> str:
    """Return bytes in base 64 as vocabularies of bytes spell them."""
    letters = bytes_to_unicode()
    return "".join(letters[each] for each in b64decode(token, validate=True))


def _pieces(data: bytes) -> Iterator[tuple[str, int]]:
    """Yield the pieces of SentencePiece, which its file lists in the order of numbers.

    The file is a protocol buffer: field 1 is a piece, and field 1 of that its text.
    """
    pieces = (body for field, body in _fields(data) if field == 1)
    for number, piece in enumerate(pieces):
        text = next(body for field, body in _fields(piece) if field == 1)
        yield text.decode(), number


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the fields of a protocol buffer that have a length; others are skipped."""
    place = 0
    while place < len(data):
        key, place = _number(data, place)
        kind = key & 7
        if kind == 0:
            _, place = _number(data, place)
            continue
        size = {1: 8, 5: 4}.get(kind)
        if size is None:
            size, place = _number(data, place)
        if kind not in (1, 2, 5) or place + size > len(data):
            raise ValueError("no protocol buffer")
        if kind == 2:
            yield key >> 3, data[place : place + size]
        place += size


def _number(data: bytes, place: int) -> tuple[int, int]:
    """Return a number of seven bits a byte, and the place behind it."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
