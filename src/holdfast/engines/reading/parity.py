"""Do two ways of reading a model say the same? Tried on a few texts before either runs.

A reader is handed token ids and positions, and gives back the tokens that it read and
their states after the final norm. Another norm, rows in another order, a tokenizer of
its own or a buffer that was never filled all give plausible numbers: here they differ.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.errors import InputError, ModelError
from holdfast.models.hidden_states import read_states
from holdfast.models.model import Adapter
from holdfast.stats.bootstrap import Estimate
from holdfast.stats.rates import clustered_mean

TEXTS, PLACES = 32, 8
"""Texts that are compared, and positions of each."""
APART = 0.1
"""Distance of two states from which they are others, in lengths of the reference's."""
SHIFT = 0.1
"""Mean shift of the logit that is too much, in spreads of the reference's logits."""
LARGEST = 5
"""How many times the tolerance of the mean the shift of one text may be."""
ENDS = ("value", "low", "high")
LEAST = 1e-3
"""Logits that differ by no more are the same, however little the texts differ."""


class Reading(NamedTuple):
    """What was read of one text."""

    token_ids: tuple[int, ...]  # The tokens, as the reader had them.
    # After the final norm, one for each position that was asked for, in float32.
    states: Float[Tensor, "position d_model"]


Reader = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], Iterable[Reading]]
"""From the token ids of texts and positions of each to readings in the same order."""


class Parity(NamedTuple):
    """What two readers of the same texts differ by."""

    n_texts: int
    # Mean distance of the states of the text where that is largest, in lengths of the
    # reference's states.
    apart: float
    # Of the probe's logit at the last token, other minus reference; None without probe.
    shift: Estimate | None = None
    largest: float | None = None  # The largest such shift, without its sign.
    flipped: int | None = None  # Texts that the probe decides otherwise.
    near: int | None = None  # Of these, texts too near to 0 to be decided.
    tolerance: float | None = None  # What the mean shift may be.

    def record(self) -> dict[str, Any]:
        """Return it for a record."""
        shift = self.shift and {key: getattr(self.shift, key) for key in ENDS}
        return self._asdict() | {"shift": shift, "limit_apart": APART}

    def said(self) -> str:
        """Return it as a sentence."""
        text = (
            f"{self.n_texts} texts read both ways, states apart by {self.apart:.2g} of "
            f"their length (at most {APART})"
        )
        if self.shift is None or self.tolerance is None:
            return f"{text}."
        shift = self.shift.reason or "{:.2g} ({:.2g} to {:.2g})".format(
            *(getattr(self.shift, key) for key in ENDS)
        )
        return (
            f"{text}; shift of the probe's logit {shift}, at most "
            f"{self.tolerance:.2g}; decisions flipped: {self.flipped}, of them too "
            f"near to 0: {self.near}."
        )


def places(n_tokens: int) -> list[int]:
    """Return the positions of a text that are compared, the last one among them.

    The first is left out where there are others: all texts are alike there.
    """
    steps = min(PLACES, max(1, n_tokens - 1))
    return [(n_tokens - 1) * step // steps for step in range(1, steps + 1)]


def local_reader(adapter: Adapter, batch_size: int) -> Reader:
    """Return the reader that runs the model in this process."""

    def read(
        sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
    ) -> Iterator[Reading]:
        for start in range(0, len(sequences), batch_size):
            part = sequences[start : start + batch_size]
            found = read_states(
                adapter, part, lambda states, _: states, batch_size=batch_size
            )
            kept = positions[start : start + batch_size]
            for ids, states, wanted in zip(part, found, kept, strict=True):
                assert isinstance(states, Tensor)
                yield Reading(tuple(ids), states[list(wanted)])

    return read


def recorded(readings: Sequence[Reading]) -> Reader:
    """Return a reader that says what another has read."""
    return lambda sequences, positions: readings


def read_texts(reader: Reader, texts: Sequence[Sequence[int]]) -> list[Reading]:
    """Return what a reader says of the positions that are compared."""
    return list(reader(texts, [places(len(each)) for each in texts]))


def compare(
    reference: Reader,
    other: Reader,
    texts: Sequence[Sequence[int]],
    probe: tuple[Float[Tensor, "d_model"], float] | None = None,
) -> Parity:
    """Read texts both ways, and refuse a reader that says something else.

    Args:
        reference: The reader that is believed.
        other: The reader that is tried.
        texts: Token ids of texts, of the kind that is going to be read.
        probe: Direction and offset of a probe, `logit = direction · state + offset`.

    Raises:
        InputError: If there is no text.
        ModelError: If the other reader read other tokens, gives states that are none
            (another shape, not finite, all zero), states further apart than `APART`, or
            a logit that is shifted or decided otherwise beyond the tolerance.
    """
    if not texts:
        raise InputError("texts to read both ways", "none", "Give rows that are whole.")
    known, found = (read_texts(reader, texts) for reader in (reference, other))
    if len(found) != len(texts):
        raise _refused(f"{len(texts)} readings", f"{len(found)}")
    for index, pair in enumerate(zip(texts, known, found, strict=True)):
        _require_states(index, *pair)
    apart = [_apart(a.states, b.states) for a, b in zip(known, found, strict=True)]
    worst = max(apart)
    if not worst <= APART:
        raise _refused(
            f"states no further apart than {APART} of their length",
            f"{worst:.2g} in text {apart.index(worst)}",
        )
    if probe is None:
        return Parity(len(texts), worst)
    parity = _shift(known, found, probe)._replace(apart=worst)
    _require_same(parity)
    return parity


def _require_states(
    index: int, text: Sequence[int], known: Reading, found: Reading
) -> None:
    """Refuse a reading of other tokens, and states that are none."""
    ids = tuple(found.token_ids)
    if ids != tuple(text):
        pairs = enumerate(zip(text, ids, strict=False))
        at = next((place for place, (a, b) in pairs if a != b), None)
        told = f"{len(ids)} of them" if at is None else f"{ids[at]} at position {at}"
        expected = f"the {len(text)} token ids of text {index}"
        raise _refused(f"{expected}" + ("" if at is None else f", {text[at]}"), told)
    states = found.states
    if states.shape != known.states.shape:
        wanted, shape = tuple(known.states.shape), tuple(states.shape)
        raise _refused(f"states of shape {wanted} for text {index}", f"{shape}")
    if not torch.isfinite(states).all():
        raise _refused(f"finite states of text {index}", "some that are no numbers")
    if not states.any(-1).all():
        raise _refused(f"states of text {index}", "states that are all zero")


def _apart(known: Tensor, found: Tensor) -> float:
    distance = (found.double() - known.double()).norm(dim=-1)
    return float((distance / known.double().norm(dim=-1)).mean())


def _shift(
    known: Sequence[Reading],
    found: Sequence[Reading],
    probe: tuple[Tensor, float],
) -> Parity:
    direction, offset = probe[0].double(), probe[1]
    ours = [each.states.double() @ direction + offset for each in known]
    theirs = [each.states.double() @ direction + offset for each in found]
    spread = float(torch.cat(ours).std(correction=0))
    tolerance = max(LEAST, SHIFT * spread)
    before = torch.stack([each[-1] for each in ours])
    after = torch.stack([each[-1] for each in theirs])
    flipped = (before > 0) != (after > 0)
    near = torch.maximum(before.abs(), after.abs()) <= tolerance
    names = [str(index) for index in range(len(known))]
    mean = clustered_mean(after - before, names, torch.Generator().manual_seed(0))
    return Parity(
        n_texts=len(known),
        apart=math.nan,
        shift=mean,
        largest=float((after - before).abs().max()),
        flipped=int(flipped.sum()),
        near=int((flipped & near).sum()),
        tolerance=tolerance,
    )


def _require_same(parity: Parity) -> None:
    """Refuse a logit that is shifted, or decided otherwise, beyond the tolerance."""
    shift, tolerance, largest = parity.shift, parity.tolerance, parity.largest
    assert shift is not None
    assert tolerance is not None
    assert largest is not None
    ends = [each for each in (shift.value, shift.low, shift.high) if each is not None]
    # Of one text alone there is no interval, and its own shift stands for it.
    beyond = max(map(abs, ends), default=largest) > tolerance
    decided = (parity.flipped or 0) - (parity.near or 0)
    if beyond or decided or largest > LARGEST * tolerance:
        raise _refused(
            f"the probe's logit within {tolerance:.2g} on average and "
            f"{LARGEST * tolerance:.2g} in each text, and every decision the same",
            f"{parity.said()} The largest shift is {largest:.2g}",
        )


def _refused(expected: str, found: str) -> ModelError:
    return ModelError(
        f"two readers of one model to agree: {expected}",
        found,
        "Give the other reader the same weights, --dtype and chat template, "
        "or read in one process. Nothing was read this way.",
    )
