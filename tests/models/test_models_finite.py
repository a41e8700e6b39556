"""Weights are added up piece by piece: every place is seen, and no copy is made."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from holdfast.errors import ModelError
from holdfast.models import finite


def _model(dtype, n=1000):
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones((n, 10)).to(dtype), requires_grad=False)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("row", [0, 500, 999])
def test_one_that_is_no_number_is_found_in_any_piece(monkeypatch, dtype, row):
    monkeypatch.setattr(finite, "PIECE", 64)
    model = _model(dtype)
    finite.check_numbers(model, "a model")
    model.weight[row, 3] = float("nan")
    with pytest.raises(ModelError, match=rf"the first at \[{row}, 3\]"):
        finite.check_numbers(model, "a model")


def test_what_is_finite_passes_though_its_sum_is_too_large_for_it():
    model = _model(torch.float16)
    model.weight.fill_(6e4)
    finite.check_numbers(model, "a model")


def test_weights_of_16_bits_are_not_copied(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from measure import peak_bytes

    model = _model(torch.bfloat16, 2**16)
    monkeypatch.setattr(finite, "PIECE", 2**12)
    assert peak_bytes(lambda: finite.check_numbers(model, "a model")) < 2**17
    monkeypatch.setattr(finite, "PIECE", 2**30)
    # In one piece, as a sum does it by itself, there would be 8 bytes for each.
    whole = peak_bytes(lambda: finite.check_numbers(model, "a model"))
    assert whole > 8 * model.weight.numel()
    del sys.modules["measure"]
