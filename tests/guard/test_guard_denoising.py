"""The monitor on denoising steps, against a loop over positions and steps."""

import math

import pytest
import torch

from holdfast.errors import SettingsError
from holdfast.guard.monitor.bundle import Direction
from holdfast.guard.monitor.denoising import StepScores
from holdfast.guard.monitor.rules import LiveDetector
from holdfast.models.diffusion.denoise import denoise
from holdfast.models.diffusion.unmasking import UnmaskingSchedule
from holdfast.models.loading.masked import load_masked
from masked_checkpoints import write_llada
from tiny_models import random_sequences

LENGTHS, GEN = [5, 9, 3, 12], 12
SAMPLERS = {
    "one block": UnmaskingSchedule(gen_length=GEN, steps=4),
    "threshold": UnmaskingSchedule(gen_length=GEN, steps=None, threshold=0.02),
}
DETECTORS = (
    LiveDetector("last", "a", "answer", "last"),
    LiveDetector("low", "a", "answer", "last", sign=-1.0),
    LiveDetector("rolling", "b", "answer", "rolling", 4, 2),
    LiveDetector("segment", "b", "answer", "segment", 4, 3),
    LiveDetector("hesitation", "a", "answer", "hesitation", 2, band=2.0),
)


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return load_masked(write_llada(tmp_path_factory.mktemp("llada")))


def directions(masked):
    draws = torch.Generator().manual_seed(0)
    return {
        name: Direction(torch.randn(masked.d_model, generator=draws) / 8, 0.1)
        for name in ("a", "b")
    }


def raw(look):
    marks = torch.stack([look.committed & look.real, look.fresh], -1).float()
    return torch.cat([look.states.float(), marks], -1)


def observed(masked, sampler, observe):
    prompts = [(ids, 7 + i) for i, ids in enumerate(random_sequences(LENGTHS))]
    batches = denoise(masked, prompts, sampler, observe=observe, batch_size=3)
    rows = [row for batch in batches for row in batch]
    return [row.trace.observed for row in sorted(rows, key=lambda row: row.index)]


def scored(detector, logits, settled, steps_near):
    """The score of one step, by the definition."""
    values = [value for value, own in zip(logits, settled, strict=True) if own]
    if detector.rule == "last":
        return sum(values) / len(values) if values else -math.inf
    if detector.rule == "hesitation":
        n = len(steps_near)
        return sum(steps_near) / n if n >= detector.window else -math.inf
    best = -math.inf
    for start in range(len(logits) - detector.window + 1):
        inside = [
            logits[i] for i in range(start, start + detector.window) if settled[i]
        ]
        if len(inside) >= detector.support:
            mean = sum(inside) / len(inside)
            agreed = sorted(inside)[-detector.support]
            best = max(best, mean if detector.rule == "rolling" else agreed)
    return best


@pytest.mark.parametrize("name", SAMPLERS)
def test_scores_are_those_of_the_definition_at_every_step(masked, name):
    own = directions(masked)
    found = observed(masked, SAMPLERS[name], StepScores(DETECTORS, own))
    for scores, states in zip(
        found, observed(masked, SAMPLERS[name], raw), strict=True
    ):
        best = [-math.inf] * len(DETECTORS)
        near = []
        for step, (score, look) in enumerate(zip(scores, states, strict=True)):
            settled = (look[:, -2] > 0).tolist()
            for column, detector in enumerate(DETECTORS):
                direction = own[detector.reads]
                logits = look[:, :-2] @ direction.weight + direction.offset
                values = (detector.sign * logits).tolist()
                if detector.rule == "hesitation":
                    kept = [v for v, on in zip(values, settled, strict=True) if on]
                    near.append(abs(sum(kept) / len(kept)) < detector.band)
                now = scored(detector, values, settled, near)
                best[column] = max(best[column], now)
                assert float(score[column]) == pytest.approx(best[column], abs=1e-4), (
                    step,
                    detector.name,
                )


def test_a_rule_without_meaning_here_is_refused(masked):
    cliff = LiveDetector("cliff", "a", "thinking", "cliff")
    with pytest.raises(SettingsError, match="detectors by last"):
        StepScores([cliff], directions(masked))
