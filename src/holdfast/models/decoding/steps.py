"""Steps of decoding, the same for both kinds of model, and what an observer sees.

A model that writes left to right takes one step per token; a masked-diffusion model
predicts the whole response at every step and commits to a part of it. An observer is
called once a step with the states that were computed anyway, and returns what is to
be kept of them: states themselves never outlive their step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from holdfast.errors import SettingsError

Kind = Literal["autoregressive", "diffusion"]
Positions = Literal["committed", "all_response", "producing"]
Region = Literal["completion", "answer"]
NOTHING = -1
"""Stands in ids where nothing has been predicted or decided."""


class StepView(NamedTuple):
    """What an observer is shown at one step, on the device; not to be kept."""

    kind: Kind  # How the text is decoded.
    step: int  # Number of the step, from 0; at 0 a new batch begins.
    # Which row of the batch each example is. Rows that are done leave.
    rows: Int[Tensor, "example"]
    # After the final norm, in the model's arithmetic. Diffusion: of every position of
    # the response in this step's forward pass. Left to right: of the one token that was
    # read, which is the last of the prompt at step 0.
    states: Float[Tensor, "example position d_model"]
    # The states that this step's tokens are predicted from, position by position;
    # `states` themselves unless the model is shifted.
    producing: Float[Tensor, "example position d_model"]
    # Where the response of the row is; shorter ones are padded on the right.
    real: Bool[Tensor, "example position"]
    # Positions that hold a token once the step is over.
    committed: Bool[Tensor, "example position"]
    # Those among them that got it at this step. Where there are none, the row is done
    # and runs along unread.
    fresh: Bool[Tensor, "example position"]
    # Whether the row's last token belongs to the answer, and not to thinking; of a
    # diffusion row always.
    answering: Bool[Tensor, "example"]


Observe = Callable[[StepView], Tensor]
"""From a look to one tensor whose first axis is the example, on the same device."""


class Step(NamedTuple):
    """One step of a batch."""

    number: int  # Number of the step, from 0.
    places: tuple[int, ...]  # Which prompt each example answers.
    # Token at each position of the response: the one committed to, and elsewhere what
    # the model would put there now; `NOTHING` beyond the response. Left to right: the
    # tokens so far.
    predicted: Int[Tensor, "example position"]
    # Probability of each token that was predicted at this step; NaN at positions
    # committed to before, and beyond the response.
    confidence: Float[Tensor, "example position"]
    # Positions that hold a token once the step is over.
    committed: Bool[Tensor, "example position"]
    # Those that got it at this step; none in a row that is done.
    fresh: Bool[Tensor, "example position"]
    observed: Tensor | None  # What the observer returned; None without one.

    @property
    def committed_ids(self) -> Int[Tensor, "example position"]:
        """The tokens committed to, `NOTHING` elsewhere."""
        return self.predicted.masked_fill(~self.committed, NOTHING)


@dataclass(frozen=True, eq=False)
class Trace:
    """One row from its first step to its last.

    Of a diffusion row `min_top2_gap` of the completion is the smallest difference of
    the two best tokens at a position when it was committed to, and `min_margin` the
    smallest one between the last position that was chosen and the first that was not:
    rows below 1e-5 of either may differ between batch plans or machines.
    """

    kind: Kind  # How it was decoded.
    # The whole response; a diffusion row goes on after its stop token.
    token_ids: Int[Tensor, "position"]
    # Step at which each position of the response got its token.
    committed_at: Int[Tensor, "position"]
    confidence: Float[Tensor, "position"]  # Probability of each token at that step.
    # Predicted tokens at every step, as in `Step`; None for a row that was written left
    # to right, where nothing was predicted ahead.
    predictions: Int[Tensor, "step position"] | None = None
    # Their probabilities; None likewise.
    confidences: Float[Tensor, "step position"] | None = None
    # What the observer returned at every step of this row; None without.
    observed: Tensor | None = None

    @property
    def n_steps(self) -> int:
        """Steps that this row took."""
        return int(self.committed_at.max()) + 1

    def committed_ids(self, step: int) -> Int[Tensor, "position"]:
        """Return the tokens committed to after a step, `NOTHING` elsewhere."""
        return self.token_ids.masked_fill(self.committed_at > step, NOTHING)

    def draft(self, step: int) -> Int[Tensor, "position"]:
        """Return the response as it stood at a step, predictions where it was open."""
        if self.predictions is None:
            return self.committed_ids(step)
        return self.predictions[step]


class Pooled:
    """An observer that keeps the mean state of the generated text at each step.

    - `committed`: Diffusion: positions that hold a token once the step is over, by
      their states in the step's own pass. Left to right: the tokens read so far,
      each by its own state; at the first step none has been read, and the state
      that produces the first token stands for them.
    - `all_response` (diffusion): every position of the response, also where nothing
      is decided yet.
    - `producing`: every token so far by the state it was predicted from when it was
      committed to.

    Means are in float32. With the region `answer`, tokens of the thinking do not
    count, and the mean is NaN until the answer begins.

    Source:
        Section 3.1 of https://arxiv.org/abs/2602.02600 means over generated tokens
        (`committed`); the authors' code takes `producing` left to right and
        `all_response` in diffusion.
    """

    def __init__(self, positions: Positions, region: Region = "completion") -> None:
        """Choose which positions count."""
        self.positions = positions
        self.region = region
        self._sums = self._counts = self._begun = torch.empty(0)

    def __call__(self, look: StepView) -> Float[Tensor, "example d_model"]:
        """Return the pooled states of the rows at this step.

        Raises:
            SettingsError: If masked positions are asked for left to right.
        """
        if look.kind == "diffusion" and self.positions != "producing":
            whole = self.positions == "all_response"
            counted = look.real if whole else look.committed
            return _sum(look.states, counted) / counted.sum(-1, keepdim=True)
        if self.positions == "all_response":
            raise SettingsError(
                "`committed` or `producing`, of a model that decodes left to right",
                "`all_response`, which also takes masked positions",
                "Choose other positions; the authors' code takes `producing` here.",
            )
        if look.step == 0:
            self._begin(look)
        counted = look.fresh
        if self.region == "answer":
            counted = counted & look.answering[:, None]
        if self.positions == "committed":
            return self._read_so_far(look, counted[:, -1])
        return self._add(look, counted)

    def _read_so_far(
        self, look: StepView, counted: Bool[Tensor, "example"]
    ) -> Float[Tensor, "example d_model"]:
        # What is read now is the token of the step before, if that one counted.
        begun = self._begun[look.rows]
        means = self._add(look, (counted & begun)[:, None])
        self._begun[look.rows] = begun | counted
        alone = (counted & ~begun)[:, None]
        return torch.where(alone, look.states[:, -1].float(), means)

    def _add(
        self, look: StepView, counted: Bool[Tensor, "example position"]
    ) -> Float[Tensor, "example d_model"]:
        self._sums[look.rows] += _sum(look.producing, counted)
        self._counts[look.rows] += counted.sum(-1, keepdim=True)
        return self._sums[look.rows] / self._counts[look.rows]

    def _begin(self, look: StepView) -> None:
        n_rows, d_model = len(look.rows), look.states.shape[-1]
        self._sums = look.states.new_zeros((n_rows, d_model), dtype=torch.float32)
        self._counts = look.rows.new_zeros((n_rows, 1))
        self._begun = torch.zeros_like(look.rows, dtype=torch.bool)


def _sum(
    states: Float[Tensor, "example position d_model"],
    counted: Bool[Tensor, "example position"],
) -> Float[Tensor, "example d_model"]:
    return torch.einsum("epd,ep->ed", states.float(), counted.float())


class Collected:
    """What an observer returned for a batch, put together row by row at its end."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._kept: list[tuple[tuple[int, ...], Tensor]] = []

    def add(self, places: Sequence[int], values: Tensor) -> None:
        """Keep the values of the rows of one step, on their device.

        Raises:
            SettingsError: If it is not one entry per row.
        """
        if values.shape[:1] != (len(places),):
            raise SettingsError(
                f"an observer that returns one entry for each of {len(places)} rows",
                f"a tensor of shape {tuple(values.shape)}",
                "Let its first axis be the example.",
            )
        self._kept.append((tuple(places), values))

    def rows(self) -> dict[int, Tensor]:
        """Return the values of every row, [step ...] on the CPU, by its prompt.

        A row that ran along after its end has values for that too; they are its
        last ones, and the caller cuts them off.
        """
        parts: dict[int, list[Tensor]] = {}
        for places, group in groupby(self._kept, key=lambda kept: kept[0]):
            # One transfer for all steps between which no row left.
            block = torch.stack([values for _, values in group], 1).to("cpu")
            for place, values in zip(places, block, strict=True):
                parts.setdefault(place, []).append(values)
        return {place: torch.cat(values) for place, values in parts.items()}
