"""Where directions are taken out of states, and which random ones stand beside."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.cliff.commitment.causes.directions import (
    Fitted,
    Probes,
    before_norm,
    moved_as_far,
    projected_out,
    unit,
)
from holdfast.cliff.commitment.causes.use import (
    matched_directions,
    random_directions,
    variance_along,
    within_covariance,
)
from holdfast.models.decoding.edits import DirectionEdit
from holdfast.models.hidden_states import Site
from holdfast.models.interventions import Range
from holdfast.models.model import Adapter
from holdfast.study.figures import draws_of

PLAIN, CONTROL = "none", "control"
READ, STREAM = "read", "stream"
WORDS = {READ: "where it is read", STREAM: "along the residual stream"}
"""The places where directions are taken out, as sentences name them."""
KINDS = ("moved", "matched")
"""Random directions: states moved as far, and as much variance taken out."""


class Place(NamedTuple):
    """Where directions are taken out."""

    sites: tuple[Site, ...]
    fitted_at: Site  # Where the states are that directions were read off.
    probe: Float[Tensor, "d_model"]
    mean_difference: Float[Tensor, "d_model"]
    moved: Float[Tensor, "label d_model"]
    matched: Float[Tensor, "label d_model"]

    def ranges(self, rows: Sequence[tuple[int, int]]) -> tuple[Range, ...]:
        """Return where rows are edited: before the answer, or from the end template on.

        Behind the final norm no later token sees a state, so that the answer goes on
        from the token that it has made. In the stream keys and values of the end
        template are read by all that follows.

        `rows`: Where the end template of each begins, and where it ends.
        """
        if self.fitted_at == "final_norm":
            return tuple((end - 1, end) for _, end in rows)
        return tuple((start, None) for start, _ in rows)


def places_of(
    adapter: Adapter, fitted: Fitted, probes: Probes, n: int, seed: int
) -> dict[str, Place]:
    """Return where the probe is taken out, with the directions of each place.

    `n`: Random directions of each kind.
    """
    stream = tuple(range(adapter.n_layers))
    sites: dict[str, tuple[Site, ...]] = {READ: ("final_norm",), STREAM: stream}
    probe = {READ: probes.probe, STREAM: before_norm(adapter, probes.probe)}
    found = {}
    for name, own in sites.items():
        states = fitted.states[own[-1]]
        draws = draws_of(seed, f"use/{name}")
        covariance = within_covariance(states, fitted.labels)
        found[name] = Place(
            own,
            own[-1],
            probe[name],
            fitted.difference(own[-1]),
            random_directions(probe[name], n, draws("moved")),
            matched_directions(probe[name], covariance, n, draws("matched")),
        )
    return found


def edits_of(
    places: Mapping[str, Place], fitted: Fitted, probes: Probes, n: int
) -> dict[str, DirectionEdit]:
    """Return every edit by the name of its condition; ranges are set with the rows."""
    found = {CONTROL: projected_out(probes.answer, ("final_norm",), fitted)}
    for name, place in places.items():
        out = partial(projected_out, sites=place.sites, fitted=fitted)
        found[f"{name}/probe"] = out(place.probe)
        found[f"{name}/mean_difference"] = out(place.mean_difference)
        for i in range(n):
            found[f"{name}/matched/{i}"] = out(place.matched[i])
            found[f"{name}/moved/{i}"] = moved_as_far(
                place.probe, place.moved[i], place.sites, fitted
            )
    return found


def described(
    fitted: Fitted, probes: Probes, places: Mapping[str, Place]
) -> dict[str, Any]:
    """Return how directions lie to each other, and how much states vary along them."""

    def cosine(one: Tensor, other: Tensor) -> float | None:
        # Answers that all begin alike have no direction of their own.
        if not (one.any() and other.any()):
            return None
        return round(float(unit(one) @ unit(other)), 6)

    found: dict[str, Any] = {
        "cosines": {
            "mean_difference": cosine(probes.probe, fitted.difference("final_norm")),
            "answer": cosine(probes.probe, probes.answer),
            "mean_difference_answer": cosine(
                fitted.difference("final_norm"), probes.answer
            ),
        },
        "variance": {},
    }
    for name, place in places.items():
        states = fitted.states[place.fitted_at]
        within = within_covariance(states, fitted.labels)
        whole = torch.cov(states.double().T)

        def shares(direction: Tensor, within: Any = within, whole: Any = whole) -> Any:
            return [
                round(variance_along(direction, each) / float(each.trace()), 6)
                for each in (within, whole)
            ]

        found["variance"][name] = {
            "probe": shares(place.probe),
            "mean_difference": shares(place.mean_difference),
            "matched": [shares(each) for each in place.matched],
        }
    return found
