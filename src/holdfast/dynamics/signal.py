"""The step-wise signal: near which anchor the state of a response is, at every step.

`compliance` is near 1 where the state is nearer to that of complied requests and near
0 where it is nearer to that of refused ones. The published plots call the same number
a refusal score; here it is named for what 1 means.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from holdfast.dynamics.anchors import Anchors, cosine_distance
from holdfast.errors import InputError

TAU = 0.1
"""Temperature: the log-ratio of distances is divided by it."""
EPS = 1e-8
"""Added to each distance before its logarithm is taken."""
OUTLIER_RATIO = 20.0
"""Multiple of the median root mean square, over steps and sides, from which a
dimension of the anchors is masked in the mode `robust`."""
FRACTION_TOLERANCE = 1e-6
Mode = Literal["paper", "repo", "robust"]
Positions = Literal["committed", "all_response", "producing"]
Kind = Literal["autoregressive", "diffusion"]


@dataclass(frozen=True)
class AnchorSignal:
    """A pair of anchors, ready to compare states with: the signal is its log-odds."""

    # Anchor of complying at every step, in the coordinates of the mode.
    compliant: Float[Tensor, "step d_model"]
    refused: Float[Tensor, "step d_model"]  # Anchor of refusing, likewise.
    # Subtracted from a state first; zeros where nothing is centred.
    origin: Float[Tensor, "step d_model"]
    kept: Bool[Tensor, "d_model"]  # Dimensions that count.

    @property
    def n_steps(self) -> int:
        """Steps that the anchors have."""
        return len(self.origin)

    def logit(
        self, states: Float[Tensor, "example step d_model"]
    ) -> Float[Tensor, "example step"]:
        """Return the log-odds of compliance of each state at each step.

        Args:
            states: Pooled states; they are brought to float32 first, whatever they
                were computed in.

        Raises:
            InputError: If the steps or the width are not those of the anchors.
        """
        if states.shape[1:] != self.origin.shape:
            raise InputError(
                f"states of {self.n_steps} steps and width {self.origin.shape[1]}, as "
                "the anchors have",
                f"{states.shape[1]} steps and width {states.shape[2]}",
                "Fit anchors with these settings; they read no other number of steps.",
            )
        return self._log_ratio(states, slice(None))

    def logit_at(
        self,
        step: int | Int[Tensor, "example"],
        states: Float[Tensor, "example d_model"],
    ) -> Float[Tensor, "example"]:
        """Return the log-odds of compliance at one step, for use while decoding.

        Args:
            step: The step, counted from 0: one for all rows, or one per row, which
                is then not checked, since an accelerator would have to be waited for.
            states: Pooled states of the rows at that step.

        Raises:
            InputError: If the anchors have no such step.
        """
        if isinstance(step, int) and not 0 <= step < self.n_steps:
            raise InputError(
                f"a step from 0 to {self.n_steps - 1}, as the anchors have",
                str(step),
                "Fit anchors for so many steps.",
            )
        return self._log_ratio(states, step)

    def compliance(
        self, states: Float[Tensor, "example step d_model"]
    ) -> Float[Tensor, "example step"]:
        """Return the signal in [0, 1]: 1 complies, 0 refuses, 0.5 is as far from both.

        Raises:
            InputError: As `logit` does.
        """
        return torch.sigmoid(self.logit(states))

    def to(self, device: torch.device) -> "AnchorSignal":
        """Return the same on another device."""
        return AnchorSignal(*(part.to(device) for part in vars(self).values()))

    def _log_ratio(self, states: Tensor, step: slice | int | Tensor) -> Tensor:
        exact = torch.promote_types(states.dtype, torch.float32)
        centred = (states.to(exact) - self.origin[step]) * self.kept
        to_refused = cosine_distance(centred, self.refused[step].to(exact))
        to_compliant = cosine_distance(centred, self.compliant[step].to(exact))
        return ((to_refused + EPS).log() - (to_compliant + EPS).log()) / TAU


def anchor_signal(anchors: Anchors, mode: Mode = "paper") -> AnchorSignal:
    """Return anchors in the coordinates in which a mode compares states with them.

    Args:
        anchors: The anchors.
        mode: `paper` and `repo` compare with the anchors as they are and differ in
            the positions that states are pooled over (`positions_of`). `robust`
            first subtracts the midpoint of the two anchors from every state, and
            leaves out `outlier_dimensions`: a few such dimensions make every cosine
            near 1.

    Source:
        Section 3.1 of https://arxiv.org/abs/2602.02600, with tau 0.1 and eps 1e-8.
        The authors' code computes distances in the precision of the model, which in
        bfloat16 moves the signal by up to 0.47; here it is float32 in every mode.
        `robust` is ours; on such dimensions see https://arxiv.org/abs/2402.17762.
    """
    compliant, refused = anchors.compliant, anchors.refused
    if mode != "robust":
        everything = torch.ones(compliant.shape[1], dtype=torch.bool)
        return AnchorSignal(compliant, refused, torch.zeros_like(compliant), everything)
    middle = (compliant + refused) / 2
    kept = ~outlier_dimensions(anchors)
    centred = (compliant - middle) * kept
    # The midpoint lies between them, so the other is the same way in reverse.
    return AnchorSignal(centred, -centred, middle, kept)


def outlier_dimensions(anchors: Anchors) -> Bool[Tensor, "d_model"]:
    """Return which dimensions are far larger in the anchors than the others are."""
    both = torch.stack([anchors.compliant, anchors.refused]).double()
    size = both.square().mean((0, 1)).sqrt()
    return size > OUTLIER_RATIO * size.median()


def positions_of(mode: Mode, kind: Kind) -> Positions:
    """Return the positions over which a mode pools states.

    Args:
        mode: The mode.
        kind: How the text is decoded.

    Returns:
        `committed`: tokens that are settled by then. `all_response`: every position
        of the response, masked ones as well. `producing`: the position from which
        each token was predicted, the last one of the prompt first.
    """
    if mode != "repo":
        return "committed"
    return "producing" if kind == "autoregressive" else "all_response"


def pool_steps(
    states: Float[Tensor, "position d_model"],
    n_steps: int,
    positions: Positions = "committed",
    *,
    repeat_last: bool = False,
) -> Float[Tensor, "step d_model"]:
    """Pool the states of a text that is written one token a step.

    Args:
        states: State that each token was predicted from, in order. The first is that
            of the token before the text; each other is that of the token before it.
        n_steps: Steps to return; later states are not looked at.
        positions: With `producing` all of these count. With `committed` the tokens
            that were read count, which the first state is not of; it stands alone at
            the first step, where nothing has been read.
        repeat_last: What a text does that ends early. If true, its last state counts
            again at every further step, as in the authors' code; else the mean stays
            as it was, since no more tokens are there.

    Returns:
        At each step the mean over the states so far, in float32.

    Raises:
        InputError: If there is no state, or masked positions are asked for.
    """
    if not len(states) or positions == "all_response":
        raise InputError(
            "a text of a token or more that is written from left to right",
            "no token" if not len(states) else "positions that are still masked",
            "Leave the row out, or pool over `committed` or `producing`.",
        )
    seen = states[:n_steps].double()
    index = torch.arange(n_steps, device=states.device)
    if repeat_last:
        seen = seen[index.clamp(max=len(seen) - 1)]
    mean = _running_mean(seen)
    if positions == "committed" and len(seen) > 1:
        mean = torch.cat([mean[:1], _running_mean(seen[1:])])
    return mean[index.clamp(max=len(mean) - 1)].float()


def _running_mean(states: Tensor) -> Tensor:
    counts = torch.arange(1, len(states) + 1, device=states.device)
    return states.cumsum(0) / counts[:, None]


def steps_at_fractions(
    fractions: Float[Tensor, "example step"], n_points: int
) -> Int[Tensor, "example _"]:
    """Return the step at which so much of each response was settled.

    Samplers take different numbers of steps, so that equal steps are different
    stages of the text. The points of the common grid are 1/n, 2/n, ..., 1; each is
    given the first step that has reached it. No state is invented between steps: a
    sampler that settles the same share at each of `n_points` steps is left as it is.

    Args:
        fractions: Share of the response that is settled after each step; it never
            falls and ends at 1. Rows of fewer steps repeat their last.
        n_points: Points of the grid.

    Returns:
        One step, counted from 0, per row and point.

    Raises:
        InputError: If a share falls, or a row does not end at 1.
    """
    shares = fractions.double()
    falls = bool((shares.diff(dim=1) < -FRACTION_TOLERANCE).any())
    short = bool(((shares[:, -1] - 1).abs() > FRACTION_TOLERANCE).any())
    if falls or short:
        raise InputError(
            "shares of settled tokens that never fall and end at 1",
            "one that falls" if falls else "one that ends elsewhere",
            "Give the shares after each step of the whole response.",
        )
    grid = torch.arange(1, n_points + 1, dtype=torch.float64) / n_points
    reached = shares[:, None, :] >= grid[:, None].to(shares) - FRACTION_TOLERANCE
    return reached.int().argmax(-1)
