"""Organisms with wider heads, for engines that have no kernel for theirs."""

import torch

from holdfast.models.loading.causal import load
from holdfast.organisms.catalogue import export


def test_wider_heads_compute_the_same_numbers(tmp_path):
    from engines_widened import WIDTH, widen

    plain = export("cliff", tmp_path / "plain")
    widen(plain, tmp_path / "wide")
    ours, wide = (load(str(tmp_path / name)) for name in ("plain", "wide"))
    assert {wide.head_widths[layer] for layer in wide.layers_with_heads} == {WIDTH}
    ids = torch.randint(3, 2000, (2, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [each.model(input_ids=ids).logits for each in (ours, wide)]
    assert torch.allclose(*logits, atol=1e-3)
