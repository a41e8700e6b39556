"""The signal while a response is being decoded, from the states of the decoding."""

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.analysis.dynamics import Gauge
from holdfast.models.stepping import Look, Pooled, Positions, Region


class LiveSignal:
    """An observer that returns the log-odds of compliance of every row at each step.

    It costs one mean and two distances a row, on the device; no state is kept.
    """

    def __init__(
        self, gauge: Gauge, positions: Positions, region: Region = "completion"
    ) -> None:
        """Choose what states are held against, and which of them.

        Args:
            gauge: Anchors, on the device of the model.
            positions: Those that the anchors were fitted over.
            region: Where the steps begin.
        """
        self.gauge = gauge
        self.region = region
        self._pooled = Pooled(positions, region)
        self._taken = torch.empty(0)

    def __call__(self, look: Look) -> Float[Tensor, "example"]:
        """Return the log-odds of compliance at this step of each row.

        It is not a number before the region begins, and after the last step that the
        anchors have.
        """
        states = self._pooled(look)
        if look.step == 0:
            self._taken = torch.zeros_like(look.rows)
        counted = look.fresh.any(-1)
        if self.region == "answer":
            counted = counted & look.answering
        step = self._taken[look.rows]
        self._taken[look.rows] = step + counted.long()
        last = self.gauge.n_steps - 1
        found = self.gauge.logit_at(step.clamp(max=last), states)
        return found.masked_fill(~counted | (step > last), torch.nan)
