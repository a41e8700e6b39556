"""A sequence read piece by piece, held against one pass over all of it."""

import pytest
import torch

from holdfast.errors import AdapterError
from holdfast.models.batching import pad
from holdfast.models.decoding.reader import Reader
from holdfast.models.loading.causal import adapt
from tiny_models import tiny_model

IDS = [5, 17, 3, 99, 42, 7, 7, 250, 12, 31, 8]


def whole(adapter, ids):
    with torch.inference_mode():
        return adapter.states(pad([ids], "right", adapter.device))[0]


@pytest.mark.parametrize("cuts", [(1,), (4, 5), (3, 3, 9), ()])
def test_pieces_have_the_states_of_one_pass(qwen3, cuts):
    reader, parts = Reader(qwen3), []
    with torch.inference_mode():
        for start, end in zip((0, *cuts), (*cuts, len(IDS)), strict=True):
            if end > start:
                parts.append(reader.read(IDS[start:end]))
    torch.testing.assert_close(torch.cat(parts), whole(qwen3, IDS), atol=1e-5, rtol=0)
    assert reader.n_read == len(IDS)


def test_what_was_forgotten_changes_nothing_behind(qwen3):
    reader = Reader(qwen3)
    with torch.inference_mode():
        reader.read(IDS[:6])
        reader.read([1, 2, 3, 4])
        reader.forget_behind(6)
        found = reader.read(IDS[6:])
        # And where it is not forgotten, it does.
        other = Reader(qwen3)
        other.read([*IDS[:6], 1, 2, 3, 4])
        different = other.read(IDS[6:])
    wanted = whole(qwen3, IDS)[6:]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert (different - wanted).abs().max() > 1e-2


def test_a_model_that_forgets_by_itself_is_refused(tokenizer):
    adapter = adapt(tiny_model("mistral"), tokenizer)
    with pytest.raises(AdapterError, match="full attention in every layer"):
        Reader(adapter)
