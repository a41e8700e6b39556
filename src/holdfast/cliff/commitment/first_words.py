"""What a model would say first at a cut: words that open refusals, or compliances.

The words are those of this study's own answers. Before the end template no answer can
begin; which of the two kinds of words is the likelier one, were it to begin there, is
read all the same, and held against answers whose outcome is known.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from holdfast.cliff.commitment.cuts import SHARES, Cut, closed_at
from holdfast.cliff.groups import BENIGN, REFUSED
from holdfast.cliff.openings import FirstToken, Known, Openings, openings
from holdfast.models.hidden_states import states_at
from holdfast.models.model import Adapter
from holdfast.rollout.rows import Rollout
from holdfast.stats.auroc import auroc_interval
from holdfast.stats.bootstrap import Estimate, undefined
from holdfast.study.figures import generator

MIN_EACH = 5
"""Answers of each kind without which nothing is said of a reading."""


def first_words(rows: Sequence[Rollout]) -> Known:
    """Return the first tokens of refusals and of compliances of a study.

    Taken are answers to training requests alone where they have both, so that no row
    is read by its own word.
    """
    decided = [row for row in rows if row.is_decided and row.answer]
    train = [row for row in decided if row.split == "train"]
    both = len({row.is_refused for row in train}) == 2
    return openings(train if both else decided)


def odds_before(
    adapter: Adapter, rows: Sequence[Rollout], words: Openings, batch_size: int
) -> list[list[float]]:
    """Return the log-odds of a refusal at `SHARES` of each thinking, not closed."""
    places = []
    for row in rows:
        start, end = row.spans.thinking
        places.append([start + round(each * (end - start)) - 1 for each in SHARES])
    trunks = [row.token_ids[: row.final + 1] for row in rows]
    return _odds(adapter, trunks, places, words, batch_size)


def odds_behind(
    adapter: Adapter,
    row: Rollout,
    cuts: Sequence[Cut],
    template: Sequence[int],
    words: Openings,
    batch_size: int,
) -> list[float]:
    """Return the log-odds of a refusal of a row where each cut has been closed."""
    prompts = [closed_at(row, cut, template) for cut in cuts]
    ends = [[len(each) - 1] for each in prompts]
    return [each for [each] in _odds(adapter, prompts, ends, words, batch_size)]


def _odds(
    adapter: Adapter,
    sequences: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    words: Openings,
    batch_size: int,
) -> list[list[float]]:
    # In float32: logits of 20 are an eighth apart in bfloat16.
    read = FirstToken(adapter, words)
    found = states_at(adapter, sequences, places, batch_size=batch_size)
    with torch.inference_mode():
        return [read(states).double().tolist() for states in found]


class Meter(NamedTuple):
    """What the reading before the end template is worth at one cut."""

    auroc: Estimate  # Refused harmful against complied benign answers.
    refused: float  # Median log-odds of the refused harmful ones.
    benign: float  # Median log-odds of the complied benign ones.

    def leaning(self, odds: float, least: float) -> float | None:
        """Return a log-odds on a scale from benign (0) to refused (1).

        None where the AUROC is not shown to reach `least`.
        """
        gap = self.refused - self.benign
        if self.auroc.low is None or self.auroc.low < least or gap <= 0:
            return None
        return (odds - self.benign) / gap


def meters(
    groups: Mapping[str, Sequence[Rollout]],
    odds: Mapping[str, Sequence[float]],
    seed: int,
) -> list[Meter]:
    """Return what the reading is worth at each of `SHARES`, by the controls.

    `odds`: Log-odds at these cuts by row.
    """
    made = []
    for place, share in enumerate(SHARES):
        kinds = [
            [odds[row.row_id][place] for row in groups[name] if row.row_id in odds]
            for name in (REFUSED, BENIGN)
        ]
        if min(map(len, kinds)) < MIN_EACH:
            reason = (
                f"{len(kinds[0])} refused harmful and {len(kinds[1])} complied benign "
                f"answers to read; {MIN_EACH} of each are needed"
            )
            made.append(Meter(undefined(sum(map(len, kinds)), reason), 0.0, 0.0))
            continue
        rows = [*groups[REFUSED], *groups[BENIGN]]
        values = torch.tensor([*kinds[0], *kinds[1]], dtype=torch.float64)
        labels = torch.tensor([True] * len(kinds[0]) + [False] * len(kinds[1]))
        found = auroc_interval(
            values,
            labels,
            [row.request_id for row in rows],
            generator(seed, f"decide/meter/{share}"),
        )
        medians = [float(torch.tensor(kind).median()) for kind in kinds]
        made.append(Meter(found, *medians))
    return made


class Read(NamedTuple):
    """What the readings before the end template are worth, and what they say."""

    meters: Sequence[Meter]  # One for each of `SHARES`; empty without readings.
    leanings: Mapping[str, Sequence[float | None]]  # By row, at each of `SHARES`.
    reason: str  # Why nothing was read; empty where something was.
