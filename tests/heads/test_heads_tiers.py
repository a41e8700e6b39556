"""What ranking says of families whose layers are not those of Llama."""

import pytest
import torch

from holdfast.heads.rank import Checked, _removal_gap, layers_named
from holdfast.heads.ranking import Head, Readings, rank_heads
from holdfast.heads.readings import Read
from holdfast.models.loading.causal import adapt
from tiny_models import tiny_of_every_kind

HEADS = (Head(0, 1), Head(2, 3))


def readings(final):
    level, ones = torch.zeros_like(final), torch.ones(len(final))
    return Readings(level, level, ones, final, ones, final)


@pytest.mark.parametrize(("times", "gap"), [(-1.0, 0.0), (-2.0, 0.5), (1.0, 2.0)])
def test_removal_and_closed_form_differ_by_a_share_of_the_effect(times, gap):
    final = torch.randn((8, 4, 4), generator=torch.Generator().manual_seed(0))
    effects = times * final[:, [0, 2], [1, 3]]
    clusters = [f"r{row}" for row in range(8)]
    checked = Checked(HEADS, 1, {"final_token": effects}, clusters)
    found = Read(readings(final), torch.zeros(8, 1), clusters)
    gemma, llama = (adapt(tiny_of_every_kind(k), None) for k in ("gemma2", "llama"))
    said = _removal_gap(gemma, found, checked, 0)["removal_gap"]
    assert said["value"] == pytest.approx(gap, abs=1e-6)
    assert said["n"] == 8
    assert _removal_gap(llama, found, checked, 0) == {}


def test_layers_without_attention_are_in_no_ranking():
    """Their columns are zeros, which would stand above every head that holds up."""
    hybrid = adapt(tiny_of_every_kind("qwen3_5_text"), None)
    assert layers_named(hybrid) == {"layers_with_heads": [1, 3]}
    final = torch.ones((4, 4, 4))
    final[:, [0, 2]] = 0
    ranking = rank_heads(
        readings(final),
        ["a", "b", "c", "d"],
        torch.Generator().manual_seed(0),
        layers=hybrid.layers_with_heads,
    )
    assert {row.head.layer for row in ranking} == {1, 3}
    assert [row.rank for row in ranking] == [*range(1, 9)]
