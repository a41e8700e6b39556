"""The monitor on masked-diffusion decoding: positions apart, at every step.

A mean over a response hides what a few of its positions say, as it does in long text.
Here the rules of windows run over positions that stand side by side, and the highest
score over the steps so far counts.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from holdfast.errors import SettingsError
from holdfast.guard.monitor.bundle import Direction
from holdfast.guard.monitor.rules import LiveDetector
from holdfast.models.decoding.steps import StepView

_RULES = ("last", "rolling", "segment", "hesitation")


class StepScores:
    """An observer that returns the score so far of every detector at each step.

    It is given to `denoise(..., observe=...)` or `replay`. `last` reads the mean over
    the positions that are settled; `rolling` the highest mean of the settled ones among
    `window` that stand side by side, `support` of them at least; `segment` the highest
    value that `support` settled ones of a window reach; `hesitation` the share of steps
    at which the mean is within `band` of 0. Where nothing can be read yet a score is
    minus infinity.
    """

    def __init__(
        self, detectors: Sequence[LiveDetector], directions: dict[str, Direction]
    ) -> None:
        """Choose what is read.

        Raises:
            SettingsError: If a detector has a rule that has no meaning here.
        """
        odd = [each.rule for each in detectors if each.rule not in _RULES]
        if odd:
            raise SettingsError(
                f"detectors by {', '.join(_RULES)}",
                ", ".join(odd),
                "A response that is written all at once has no end of its thinking.",
            )
        self.detectors = tuple(detectors)
        self._names = list(directions)
        self._weights = torch.stack(
            [each.weight.float() for each in directions.values()]
        )
        self._offsets = torch.tensor([each.offset for each in directions.values()])
        self._best = self._near = self._steps = torch.empty(0)

    def __call__(self, look: StepView) -> Float[Tensor, "example detector"]:
        """Return the highest score of every detector so far, row by row."""
        device = look.states.device
        if look.step == 0:
            shape = (len(look.rows), len(self.detectors))
            self._best = torch.full(shape, -math.inf, device=device)
            self._near = torch.zeros(shape, device=device)
            self._steps = torch.zeros(shape, device=device)
            self._weights = self._weights.to(device)
            self._offsets = self._offsets.to(device)
        logits = look.states.float() @ self._weights.T + self._offsets
        settled = look.committed & look.real
        # Rows that are done run along; nothing of them counts any more.
        going = look.fresh.any(-1)
        for column, detector in enumerate(self.detectors):
            own = logits[..., self._names.index(detector.reads)] * detector.sign
            score = self._score(detector, own, settled, look, column, going)
            score = torch.where(going, score, torch.full_like(score, -math.inf))
            best = self._best[look.rows, column]
            self._best[look.rows, column] = torch.maximum(best, score)
        return self._best[look.rows].clone()

    def _score(
        self,
        detector: LiveDetector,
        logits: Float[Tensor, "example position"],
        settled: Bool[Tensor, "example position"],
        look: StepView,
        column: int,
        going: Bool[Tensor, "example"],
    ) -> Float[Tensor, "example"]:
        """Return what one detector makes of one step."""
        if detector.rule in ("rolling", "segment"):
            return _windowed(detector, logits, settled)
        n = settled.sum(-1)
        mean = (logits * settled).sum(-1) / n.clamp(min=1)
        none = torch.full_like(mean, -math.inf)
        if detector.rule == "last":
            return torch.where(n >= detector.window, mean, none)
        rows = look.rows
        self._near[rows, column] += (
            going & (n > 0) & (mean.abs() < detector.band)
        ).float()
        self._steps[rows, column] += going.float()
        steps = self._steps[rows, column]
        share = self._near[rows, column] / steps.clamp(min=1)
        return torch.where(steps >= detector.window, share, none)


def _windowed(
    detector: LiveDetector,
    logits: Float[Tensor, "example position"],
    settled: Bool[Tensor, "example position"],
) -> Float[Tensor, "example"]:
    """Return the highest score of a window of positions side by side."""
    width = min(detector.window, logits.shape[1])
    inside = settled.unfold(1, width, 1)
    values = logits.unfold(1, width, 1)
    support = min(detector.support, width)
    enough = inside.sum(-1) >= support
    if detector.rule == "rolling":
        found = (values * inside).sum(-1) / inside.sum(-1).clamp(min=1)
    else:
        found = values.masked_fill(~inside, -math.inf).topk(support, -1).values[..., -1]
    return found.masked_fill(~enough, -math.inf).max(-1).values
