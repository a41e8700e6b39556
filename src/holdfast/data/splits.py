"""Splits whose names are types, and overlap between them."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Generic, NamedTuple, TypeVar

from holdfast.data.prompts import normalise
from holdfast.errors import SettingsError, TooFewExamplesError

T = TypeVar("T")
MINIMUM_TEST_ROWS: Final = 20
WIDEST_TEST_FRACTION: Final = 0.5
_STEP: Final = 0.05
_TOLERANCE: Final = 1e-9


@dataclass(frozen=True)
class _Rows(Generic[T]):
    """What the three splits have in common: a length, and an order."""

    rows: tuple[T, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[T]:
        return iter(self.rows)


class Train(_Rows[T]):
    """Rows to fit on."""


class Validation(_Rows[T]):
    """Rows to choose settings and thresholds on."""


class Test(_Rows[T]):
    """Rows to report on, once."""

    # The name of the class would make pytest collect it.
    __test__: ClassVar[bool] = False


@dataclass(frozen=True)
class Splits(Generic[T]):
    """The three parts of one set of rows, each in the order of the input."""

    train: Train[T]
    validation: Validation[T]
    test: Test[T]


@dataclass(frozen=True)
class CheckedSplits(Generic[T]):
    """Splits with enough test rows, the fractions used, and sentences on them."""

    splits: Splits[T]
    fractions: tuple[float, float, float]
    notes: tuple[str, ...]


def split_by_hash(
    rows: Sequence[T],
    key: Callable[[T], str],
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
) -> Splits[T]:
    """Split rows by the SHA-256 of a key, so that equal keys stay together.

    The split of a row depends on its key and the fractions alone: neither the order
    nor the number of other rows moves it. A wider test fraction keeps every test row.

    `key`: The unit that must not straddle, for prompts the `request_id`.
    `fractions`: Shares of train, validation and test; they sum to 1.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > _TOLERANCE:
        raise SettingsError(
            "three fractions of at least 0 that sum to 1",
            ", ".join(f"{fraction:g}" for fraction in fractions),
            "For example 0.6, 0.2, 0.2.",
        )
    parts: tuple[list[T], list[T], list[T]] = ([], [], [])
    for row in rows:
        parts[_part(key(row), fractions)].append(row)
    train, validation, test = map(tuple, parts)
    return Splits(Train(train), Validation(validation), Test(test))


def require_test_rows(
    rows: Sequence[T],
    key: Callable[[T], str],
    label: Callable[[T], str],
    *,
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
    minimum: int = MINIMUM_TEST_ROWS,
    labels: Sequence[str] | None = None,
) -> CheckedSplits[T]:
    """Split rows so that every class has enough of them in the test part.

    Where the test part is too small, its fraction grows in steps of 0.05 up to one
    half, at the cost of the other two in proportion, and a note says so.

    `key`: The unit that must not straddle, as in `split_by_hash`.
    `labels`: Classes that must be there; None is those that occur.
    """
    wanted = tuple(dict.fromkeys(map(label, rows))) if labels is None else tuple(labels)
    for tried in _widening(fractions):
        splits = split_by_hash(rows, key, tried)
        counts = Counter(map(label, splits.test))
        if wanted and all(counts[name] >= minimum for name in wanted):
            notes = () if tried == fractions else (_widened(fractions, tried, minimum),)
            return CheckedSplits(splits, tried, notes)
    totals = Counter(map(label, rows))
    raise _too_few(wanted, counts, totals, minimum, tried[2])


def _part(key: str, fractions: tuple[float, float, float]) -> int:
    digest = hashlib.sha256(key.encode("utf-8", errors="surrogatepass")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    # The test rows lie at the top, so that a wider test part contains a narrower one.
    if place >= 1 - fractions[2]:
        return 2
    return 0 if place < fractions[0] else 1


def _widening(
    fractions: tuple[float, float, float],
) -> Iterator[tuple[float, float, float]]:
    yield fractions
    rest = fractions[0] + fractions[1]
    step = 1
    # Rounded, so that sums of 0.05 stay the numbers that the notes print.
    while (test := round(fractions[2] + step * _STEP, 9)) <= WIDEST_TEST_FRACTION:
        train = (1 - test) * fractions[0] / rest
        yield train, 1 - test - train, test
        step += 1


def _widened(
    before: tuple[float, float, float],
    after: tuple[float, float, float],
    minimum: int,
) -> str:
    return (
        f"the test fraction was widened from {before[2]:.2f} to {after[2]:.2f}, so that"
        f" every class has at least {minimum} test rows."
    )


def _too_few(
    wanted: Sequence[str],
    counts: Counter[str],
    totals: Counter[str],
    minimum: int,
    fraction: float,
) -> TooFewExamplesError:
    short = [name for name in wanted if counts[name] < minimum]
    found = ", ".join(
        f"{counts[name]} {name} (of {totals[name]} rows)" for name in short
    )
    add = ", ".join(
        # A hash splits unevenly: the missing test rows cost at least 1 / fraction each.
        f"{math.ceil((minimum - counts[name]) / fraction)} {name}"
        for name in short
    )
    return TooFewExamplesError(
        f"at least {minimum} test rows in each class",
        f"{found or 'no row'}, with a test fraction of {fraction:.2f}",
        f"Add about {add} prompts." if add else "Give prompts of both classes.",
    )


# Chinese and Japanese write no spaces, so each of their characters is a word.
_WORD: Final = re.compile(
    "[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
    "|[^\\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)
Shingles = frozenset[tuple[str, ...]]


class Overlap(NamedTuple):
    """Overlap of two lists of texts, each distinct normalised text counted once."""

    exact: int  # Texts that are in both.
    similar: int  # Pairs of different texts at or above the threshold.
    # (index in a, index in b, Jaccard similarity) of every pair counted, the index
    # being that of the first copy; exact pairs have similarity 1.
    pairs: tuple[tuple[int, int, float], ...]


def overlap(
    a: Sequence[str], b: Sequence[str], *, threshold: float = 0.6, shingle: int = 3
) -> Overlap:
    """Find equal and similar texts in two lists.

    Similarity is the Jaccard index of the sets of word n-grams. Only pairs that share
    one of their rarest n-grams are compared, which loses none: two sets of similarity
    t share an n-gram within the first |set| - ceil(t |set|) + 1 of any common order.

    `threshold`: Least similarity of a similar pair, in (0, 1].

    Source:
        Prefix filter of Chaudhuri, Ganti and Kaushik, ICDE 2006.
    """
    if not 0 < threshold <= 1 or shingle < 1:
        raise SettingsError(
            "a threshold in (0, 1] and n-grams of at least one word",
            f"threshold {threshold:g}, n-grams of {shingle}",
            "The defaults are 0.6 and 3.",
        )
    left, right = _distinct(a), _distinct(b)
    exact = [(i, right[text], 1.0) for text, i in left.items() if text in right]
    similar = _similar(
        {i: shingles(text, shingle) for text, i in left.items()},
        {j: shingles(text, shingle) for text, j in right.items()},
        threshold,
        skip={(i, j) for i, j, _ in exact},
    )
    return Overlap(len(exact), len(similar), tuple(sorted(exact + similar)))


def shingles(text: str, words: int) -> Shingles:
    """Return the set of word n-grams of a text.

    `text`: A text; case and punctuation do not matter.
    """
    found = tuple(_WORD.findall(normalise(text))) or (normalise(text),)
    last = max(len(found) - words, 0)
    return frozenset(found[start : start + words] for start in range(last + 1))


def _distinct(texts: Sequence[str]) -> dict[str, int]:
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        first.setdefault(normalise(text), index)
    return first


def _similar(
    left: dict[int, Shingles],
    right: dict[int, Shingles],
    threshold: float,
    skip: set[tuple[int, int]],
) -> list[tuple[int, int, float]]:
    frequency = Counter(
        gram for side in (left, right) for s in side.values() for gram in s
    )

    def prefix(grams: Shingles) -> list[tuple[str, ...]]:
        ordered = sorted(grams, key=lambda gram: (frequency[gram], gram))
        # A hair below the product, so that rounding cannot shorten the prefix.
        return ordered[: len(grams) - math.ceil(threshold * len(grams) - 1e-9) + 1]

    index: dict[tuple[str, ...], list[int]] = {}
    for j, grams in right.items():
        for gram in prefix(grams):
            index.setdefault(gram, []).append(j)
    pairs = []
    for i, grams in left.items():
        candidates = {j for gram in prefix(grams) for j in index.get(gram, ())}
        for j in candidates:
            shared = len(grams & right[j])
            value = shared / (len(grams) + len(right[j]) - shared)
            if value >= threshold and (i, j) not in skip:
                pairs.append((i, j, value))
    return pairs
