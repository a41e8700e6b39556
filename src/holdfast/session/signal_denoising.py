"""The steps of an answer of a masked-diffusion model, run once more."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from holdfast.analysis.dynamics import positions_of, steps_at_fractions
from holdfast.analysis.recovery import HARMFUL, HARMLESS, UNPARSED
from holdfast.errors import InputError
from holdfast.judges.drafts import is_half_decoded
from holdfast.judges.rules import judge
from holdfast.judges.verdict import Outcome
from holdfast.models.masked import MaskedModel
from holdfast.models.replaying import Script, replay
from holdfast.models.rows import Drafting
from holdfast.models.stepping import Look, Pooled, Positions
from holdfast.session.rows import Rollout
from holdfast.session.signal_reading import (
    CHANGED,
    READING,
    TEXT,
    Batch,
    Readers,
    on_device,
)
from holdfast.session.signal_settings import SignalSettings

_READINGS: dict[Outcome, int] = {
    "refused": HARMLESS,
    "complied": HARMFUL,
    "partial": HARMFUL,
    "degenerate": UNPARSED,
    "ended_inside": UNPARSED,
    "unparsed": UNPARSED,
}


class Replay:
    """States of answers at the steps that were taken, forward pass by forward pass."""

    def __init__(
        self,
        masked: MaskedModel,
        batch_size: int,
        drafts: Mapping[str, Drafting],
        settings: SignalSettings,
    ) -> None:
        """Remember how the answers came about.

        Args:
            masked: The model.
            batch_size: Answers at once.
            drafts: The steps of every row.
            settings: Mode, steps, and what a step is.
        """
        self._masked, self._batch_size = masked, batch_size
        self._drafts, self._settings = drafts, settings

    @property
    def extras(self) -> tuple[str, ...]:
        """Channels that are not read off states."""
        return TEXT, READING, CHANGED

    def pooled(self, batch: Batch) -> Sequence[Float[Tensor, "step d_model"]]:
        """Return the pooled state of each row at each step."""
        return [means for means, _ in self._states(batch)]

    def read(
        self, batch: Batch, readers: Readers
    ) -> Sequence[Float[Tensor, "step channel"]]:
        """Return what is read off the states of each row."""
        there = on_device(readers, torch.device("cpu"))
        found = []
        for means, first in self._states(batch):
            columns = [gauge.logit(means[None])[0] for gauge in there.gauges]
            if there.probe is not None:
                direction, offset = there.probe
                columns.append(torch.sigmoid(means @ direction + offset))
            if there.difference is not None:
                columns.append((first @ there.difference).expand(len(means)))
            found.append(torch.stack(columns, -1))
        return found

    def beside(self, batch: Batch) -> Float[Tensor, "example step channel"]:
        """Return what the rules read in the draft of each step."""
        return torch.stack([self._said(row) for row, _ in batch])

    def _states(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Return pooled states, and the one that the first token comes from."""
        known = [(row, self._drafts[row.row_id]) for row, _ in batch]
        scripts = [
            Script(row.token_ids[: row.spans.prompt[1]], how.response, how.committed_at)
            for row, how in known
        ]
        positions = positions_of(self._settings.mode, "diffusion")
        seen = replay(
            self._masked,
            scripts,
            lambda: _Seen(positions),
            batch_size=self._batch_size,
        )
        width = self._masked.d_model
        return [
            (each[step_indices(how, self._settings), :width], each[0, width:])
            for each, (_, how) in zip(seen, known, strict=True)
        ]

    def _said(self, row: Rollout) -> Float[Tensor, "step channel"]:
        """Return for each step: no refusal; harmless, harmful or neither; changed."""
        how = self._drafts[row.row_id]
        steps = step_indices(how, self._settings).tolist()
        final = how.drafts[-1]
        known: dict[tuple[int, ...], tuple[Outcome, int]] = {}
        made = []
        for step in steps:
            draft = how.drafts[step]
            if draft not in known:
                text = text_of(self._masked, draft)
                outcome = judge(row.prompt, text).outcome
                # The response itself is read as its verdict says, whole or not.
                broken = draft != final and is_half_decoded(text)
                known[draft] = outcome, UNPARSED if broken else _READINGS[outcome]
            outcome, reading = known[draft]
            said = outcome != "refused", reading, draft != final
            made.append([float(each) for each in said])
        return torch.tensor(made)


class _Seen:
    """Keeps the pooled state, and beside it the one behind the first position."""

    def __init__(self, positions: Positions) -> None:
        self._pooled = Pooled(positions)

    def __call__(self, look: Look) -> Tensor:
        return torch.cat([self._pooled(look), look.producing[:, 0].float()], -1)


def step_indices(how: Drafting, settings: SignalSettings) -> Int[Tensor, "step"]:
    """Return which step of a response is read at each step of the signal.

    Args:
        how: The steps of the response.
        settings: Steps, and what a step is.
    """
    if settings.time == "step":
        return torch.arange(settings.steps).clamp(max=how.n_steps - 1)
    counts = torch.bincount(torch.tensor(how.committed_at), minlength=how.n_steps)
    shares = counts.cumsum(0).double() / len(how.response)
    return steps_at_fractions(shares[None], settings.steps)[0]


def text_of(masked: MaskedModel, draft: Sequence[int]) -> str:
    """Return the text of a draft up to its first stop token."""
    stops = [place for place, token in enumerate(draft) if token in masked.stop_ids]
    end = stops[0] if stops else len(draft)
    return str(
        masked.tokenizer.decode(
            list(draft[:end]),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
    )


def require_no_thinking(masked: MaskedModel, settings: SignalSettings) -> None:
    """Refuse a region that a response which is written all at once does not have.

    Raises:
        InputError: If the model thinks, and only its answer is to be watched.
    """
    if masked.thinking is not None and settings.region == "answer":
        raise InputError(
            "--region completion with a masked-diffusion model that thinks, whose "
            "thinking and answer are written together",
            "--region answer",
            "Add --region completion.",
        )
