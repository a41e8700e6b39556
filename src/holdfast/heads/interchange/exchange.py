"""What a head of one run does in another, at the cost of a few tokens.

Every run is read up to the positions that are exchanged once, and its cache serves all
heads: only the tokens from there on run again, many heads side by side in one pass.
The pass that shows what a run itself has written there is the first of them, so that a
pair of runs costs two prefills, whichever way heads go between them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from holdfast.errors import InputError
from holdfast.models.batching import with_batch_halving
from holdfast.models.decoding.head_swap import HeadSwap
from holdfast.models.decoding.shared_prefix import (
    MAX_BYTES,
    RepeatedPrefix,
    SharedPrefix,
    copies_at_once,
    read_prefix,
)
from holdfast.models.finite import check_finite
from holdfast.models.hidden_states import check_lengths
from holdfast.models.model import Adapter

Readout = Callable[[Float[Tensor, "*_ d_model"]], Float[Tensor, "*_"]]
"""From states after the final norm to the number that is followed, in float32."""


class Run(NamedTuple):
    """A run whose heads are exchanged with those of other runs."""

    # Up to and with the token whose state is read.
    token_ids: Sequence[int]
    # Positions at which heads are exchanged. Where a source has fewer of them, its last
    # stand for the last ones here, and the first stay as they are.
    span: tuple[int, int]
    # Of which run each source is, by its place; None writes nothing.
    sources: tuple[int | None, ...] = ()
    # Which source each head of each copy is taken from (see `HeadSwap.take`); None for
    # a run that only gives. Runs that share one table are read together.
    take: Int[Tensor, "copy layer head"] | None = None


class Exchanged(NamedTuple):
    """What was read off a run as it is, and off each of its copies."""

    plain: float
    # After the exchange; empty for a run that only gives.
    after: Float[Tensor, "copy"]

    @property
    def change(self) -> Float[Tensor, "copy"]:
        """Return what the exchange of each copy changes."""
        return self.after - self.plain


class _Part(NamedTuple):
    """Runs that are read together, behind one cache."""

    places: list[int]
    prefix: SharedPrefix | RepeatedPrefix
    tokens: Int[Tensor, "example position"]


_Written = Mapping[int, Float[Tensor, "_ _"]]
"""Heads side by side at the positions of a span, by layer."""


def exchange(
    adapter: Adapter,
    runs: Sequence[Run],
    readout: Readout,
    *,
    max_bytes: int = MAX_BYTES,
) -> list[Exchanged]:
    """Read every run as it is, and with heads of other runs in the place of its own.

    Args:
        adapter: The model.
        runs: All runs, those that only give among them.
        readout: What is read off the state after the last token.
        max_bytes: Most bytes that copies may take beside the caches.

    Returns:
        One entry a run, in their order.

    Raises:
        InputError: If a span is empty, or not inside its tokens, or has none before it.
        AdapterError: If heads of this model cannot be read.
    """
    adapter.require("heads")
    check_lengths(adapter, [run.token_ids for run in runs])
    _check_spans(runs)
    plain, after = _read(adapter, runs, readout, max_bytes)
    check_finite(torch.cat([plain, *after]), "the states with heads of other runs")
    # Copied, so that they are ordinary tensors outside inference mode.
    return [
        Exchanged(value, torch.tensor(each.tolist()))
        for value, each in zip(plain.tolist(), after, strict=True)
    ]


@torch.inference_mode()
def _read(
    adapter: Adapter, runs: Sequence[Run], readout: Readout, max_bytes: int
) -> tuple[Float[Tensor, "run"], list[Float[Tensor, "_"]]]:
    """Return what is read of each run as it is, and of its copies."""
    parts, plain, written = [], torch.empty(len(runs)), dict[int, _Written]()
    for places in _alike(runs):
        rows = [(list(runs[each].token_ids), runs[each].span[0]) for each in places]
        prefix = read_prefix(adapter, [ids[:start] for ids, start in rows])
        tokens = torch.tensor([ids[start:] for ids, start in rows])
        part = _Part(places, prefix, tokens.to(adapter.device))
        states, heads = prefix.record(part.tokens)
        plain[places] = readout(states).to("cpu", torch.float32)
        for row, place in enumerate(places):
            written[place] = {layer: each[row] for layer, each in heads.items()}
        if runs[places[0]].take is not None:
            parts.append(part)
    after = [torch.empty(0)] * len(runs)
    for part in parts:
        found = _after(part, runs, written, readout, max_bytes)
        for row, place in enumerate(part.places):
            after[place] = found[row]
    return plain, after


def _alike(runs: Sequence[Run]) -> list[list[int]]:
    """Return the places of runs that can be read together without padding."""
    groups: dict[tuple[int, int], list[int]] = {}
    for place, run in enumerate(runs):
        key = (len(run.token_ids) - run.span[0], id(run.take))
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def _after(
    part: _Part,
    runs: Sequence[Run],
    written: Mapping[int, _Written],
    readout: Readout,
    max_bytes: int,
) -> Float[Tensor, "example copy"]:
    """Return what is read of each run of a part under each exchange."""
    take = runs[part.places[0]].take
    assert take is not None
    length = part.tokens.shape[1]
    layers = torch.argwhere((take >= 0).any(-1).any(0))[:, 0].tolist()
    swap = HeadSwap(take, *_sources(part.places, runs, written, layers, length))

    def read(copies: Sequence[int]) -> list[Tensor]:
        some = swap.of(slice(copies[0], copies[-1] + 1))
        states = part.prefix.swapped_states(part.tokens, some)
        return list(readout(states).to("cpu", torch.float32).T)

    size = copies_at_once(part.prefix, length, max_bytes)
    found, _ = with_batch_halving(read, range(len(take)), size)
    return torch.stack(found, -1)


def _sources(
    places: Sequence[int],
    runs: Sequence[Run],
    written: Mapping[int, _Written],
    layers: Sequence[int],
    length: int,
) -> tuple[
    dict[int, Float[Tensor, "source example position _"]],
    Bool[Tensor, "source example position"],
]:
    """Lay what the sources have written beside the tokens of these runs."""
    n_sources = len(runs[places[0]].sources)
    known = torch.zeros((n_sources, len(places), length), dtype=torch.bool)
    some = written[places[0]]
    values = {
        layer: some[layer].new_zeros(
            (n_sources, len(places), length, some[layer].shape[-1])
        )
        for layer in layers
    }
    for row, place in enumerate(places):
        own = _width(runs[place])
        for source, other in enumerate(runs[place].sources):
            if other is None:
                known[source, row, :own] = True
                continue
            theirs = _width(runs[other])
            shared = min(own, theirs)
            known[source, row, own - shared : own] = True
            for layer in layers:
                given = written[other][layer][theirs - shared : theirs]
                values[layer][source, row, own - shared : own] = given
    return values, known


def _width(run: Run) -> int:
    return run.span[1] - run.span[0]


def _check_spans(runs: Sequence[Run]) -> None:
    for place, run in enumerate(runs):
        start, stop = run.span
        if not 0 < start < stop <= len(run.token_ids):
            raise InputError(
                f"positions within the {len(run.token_ids)} tokens of run {place}, "
                "with something before them",
                f"{start}:{stop}",
                "Leave out rows whose thinking has not ended.",
            )
