"""Directions at the last token before the answer: of a probe, and of two means."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from holdfast.cliff.commitment.opened import Opened
from holdfast.cliff.probe_files import check_current, names, read_own_probe
from holdfast.data.splits import Train
from holdfast.errors import TooFewExamplesError
from holdfast.models.batching import batched, pad
from holdfast.models.decoding.edits import DirectionEdit, move_states
from holdfast.models.folds import rms_weight
from holdfast.models.hidden_states import Site, check_lengths, watched
from holdfast.models.interventions import LiveEdit
from holdfast.models.model import Adapter
from holdfast.rollout.rows import Rollout, is_refused, plain

MIN_FITTED = 2
TINY = 1e-30


class Fitted(NamedTuple):
    """States of training rows at the last token of the end template, by site."""

    labels: Bool[Tensor, "example"]  # Which rows were refused.
    states: dict[Site, Float[Tensor, "example d_model"]]

    def means(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return the mean state of refused and of complied rows."""
        states = self.states[site].double()
        return states[self.labels].mean(0), states[~self.labels].mean(0)

    def difference(self, site: Site) -> Float[Tensor, "d_model"]:
        """Return the mean of refused minus that of complied rows."""
        refused, complied = self.means(site)
        return refused - complied

    def middle(self, site: Site) -> Float[Tensor, "d_model"]:
        """Return the state halfway between the two means."""
        return torch.stack(self.means(site)).mean(0)


def train_rows(rows: Sequence[Rollout]) -> Train[Rollout]:
    """Return the rows that the probe was fitted on.

    Raises:
        TooFewExamplesError: If an outcome is missing among them.
    """
    own = [row for row in plain(rows) if row.split == "train"]
    refused = sum(row.is_refused for row in own)
    if min(refused, len(own) - refused) < MIN_FITTED:
        raise TooFewExamplesError(
            "refused harmful and complied benign training answers, without a wrapper",
            f"{refused} and {len(own) - refused}",
            "Add plain prompts of the kind that is missing.",
        )
    return Train(tuple(own))


def read_fitted(
    adapter: Adapter, train: Train[Rollout], sites: Sequence[Site], batch_size: int
) -> Fitted:
    """Read the states of training rows at the last token of the end template."""
    rows = list(train)
    states = last_states(
        adapter, [row.token_ids[: row.final + 1] for row in rows], sites, batch_size
    )
    return Fitted(is_refused(rows), states)


def last_states(
    adapter: Adapter,
    sequences: Sequence[Sequence[int]],
    sites: Sequence[Site],
    batch_size: int,
    edit: DirectionEdit | None = None,
) -> dict[Site, Float[Tensor, "example d_model"]]:
    """Return the state at the end of each sequence, at every site, from one pass.

    `edit`: What is done to states meanwhile; a site shows them behind it.
    """
    check_lengths(adapter, sequences)

    def read_batch(rows: Sequence[int]) -> list[list[Tensor]]:
        batch = pad([sequences[row] for row in rows], "right", adapter.device)
        ends = [len(sequences[row]) - 1 for row in rows]
        lines, found = torch.arange(len(rows)), dict[Site, Tensor]()

        def keep(site: Site, states: Tensor) -> None:
            found[site] = states[lines, ends].to("cpu")

        with torch.inference_mode(), ExitStack() as stack:
            if edit is not None:
                live = stack.enter_context(move_states(adapter, edit))
                _tell(live, rows, batch.positions())
            for site in sites:
                reader = lambda states, site=site: keep(site, states)  # noqa: E731
                stack.enter_context(watched(adapter, site, reader))
            adapter.states(batch)
        return [[found[site][line].clone() for site in sites] for line in lines]

    read = batched(read_batch, sequences, batch_size)
    return {
        site: torch.stack([row[place] for row in read])
        for place, site in enumerate(sites)
    }


def _tell(live: LiveEdit, rows: Sequence[int], positions: Tensor) -> None:
    live.take(rows)
    live.locate(positions)


class Probes(NamedTuple):
    """Directions that were read from the study's probe."""

    probe: Float[Tensor, "d_model"]  # Of the logistic probe, in the normed state.
    answer: Float[Tensor, "d_model"]  # Unembedding of refusals minus compliances.


def read_probes(opened: Opened) -> Probes:
    """Read the study's probe and the direction beside it.

    Raises:
        InputError: If there is none, or it belongs to another model.
    """
    check_current(opened.study)
    probe, others = read_own_probe(opened.study, "published")
    return Probes(probe.raw()[0].double(), others["difference"].double())


PROBE_FILES = names("published")


def before_norm(
    adapter: Adapter, direction: Float[Tensor, "d_model"]
) -> Float[Tensor, "d_model"]:
    """Return what a direction of the normed state is in the residual stream.

    A root-mean-square norm multiplies every coordinate by its weight, and all of them
    by one number: what is read along `d` behind it is read along `weight * d` before.

    Raises:
        AdapterError: If the norm is another one.
    """
    weight, _ = rms_weight(adapter.final_norm, adapter.d_model, adapter.device)
    return direction * weight.double().cpu()


def unit(direction: Float[Tensor, "d_model"]) -> Float[Tensor, "d_model"]:
    """Return a direction with norm 1; what is none stays at 0, and moves nothing."""
    along: Tensor = direction / direction.norm().clamp(min=TINY)
    return along


def projected_out(
    direction: Float[Tensor, "d_model"], sites: Sequence[Site], fitted: Fitted
) -> DirectionEdit:
    """Return the edit that puts states halfway between both outcomes along a direction.

    The rest of a state stays. Halfway, not at zero: what all states have in common
    along the direction is nothing that tells outcomes apart.
    """
    along = unit(direction)
    return DirectionEdit(
        tuple(sites),
        along.float().repeat(len(sites), 1),
        -1.0,
        torch.stack([fitted.middle(site) @ along for site in sites]).float(),
    )


def moved_as_far(
    direction: Float[Tensor, "d_model"],
    other: Float[Tensor, "d_model"],
    sites: Sequence[Site],
    fitted: Fitted,
) -> DirectionEdit:
    """Return the edit that moves states along another direction as far as that one.

    Where `projected_out` moves a state by some distance along `direction`, this puts it
    at that distance from the middle along `other`, and leaves `direction` be. Told of
    every layer it does so once, not once in each.
    """
    edit = projected_out(direction, sites, fitted)
    along, reader = unit(other), unit(direction)
    if len(sites) > 1:
        reader = reader + along
    shifts = torch.stack([fitted.middle(site) @ reader for site in sites])
    return replace(
        edit,
        units=along.float().repeat(len(sites), 1),
        readers=reader.float().repeat(len(sites), 1),
        shifts=shifts.float(),
    )
