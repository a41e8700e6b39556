"""Heads taken away at every token, many sets in one pass."""

import pytest
import torch
from greedy import effects_everywhere

from holdfast.errors import SettingsError
from holdfast.models.hidden_states import project_states
from holdfast.models.interventions import HeadEdit, head_factors, scale_heads
from holdfast.models.loading.causal import adapt
from tiny_models import HEADS, LAYERS, random_sequences, tiny_model

SETS = [[(2, 1)], [(0, 0), (2, 3)], [(1, 2)], []]


def _one_by_one(adapter, sequences, sets, direction, offset):
    """The slow way round: edit, run the whole sequence, read the last logit."""

    def last(edit):
        with scale_heads(adapter, edit):
            found = project_states(
                adapter, sequences, direction[None], torch.tensor([offset])
            )
        return torch.tensor([float(each[-1, 0]) for each in found])

    plain = last(None)
    edits = [HeadEdit(head_factors(adapter, heads)) for heads in sets]
    return plain, torch.stack([last(edit) - plain for edit in edits], -1)


@pytest.mark.parametrize("kind", ["qwen3", "mistral", "phi3", "mixtral"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_all_sets_in_one_pass_are_each_set_by_itself(kind, batch_size):
    adapter = adapt(tiny_model(kind), None)
    sequences = random_sequences([9, 5, 12])
    direction = torch.randn(adapter.d_model, generator=torch.Generator().manual_seed(1))
    found = effects_everywhere(
        adapter, sequences, SETS, direction, 0.5, batch_size=batch_size
    )
    plain, change = _one_by_one(adapter, sequences, SETS, direction, 0.5)
    torch.testing.assert_close(found.plain, plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.change, change, atol=2e-4, rtol=1e-4)
    assert found.change[:, :3].abs().min() > 1e-3
    assert float(found.change[:, 3].abs().max()) < 1e-4


def test_blocks_before_the_first_edit_are_read_once(qwen3):
    seen = []
    handles = [
        layer.self_attn.q_proj.register_forward_hook(
            lambda _, arguments, __: seen.append(len(arguments[0]))
        )
        for layer in qwen3.layers
    ]
    sets = [[(2, head)] for head in range(HEADS)]
    effects_everywhere(qwen3, random_sequences([6]), sets, torch.ones(qwen3.d_model))
    for handle in handles:
        handle.remove()
    assert seen == [1] * (LAYERS - 1) + [1 + HEADS]


def test_a_head_that_does_not_exist_is_refused(qwen3):
    with pytest.raises(SettingsError, match="9:0"):
        effects_everywhere(
            qwen3, random_sequences([6]), [[(9, 0)]], torch.ones(qwen3.d_model)
        )
    assert not qwen3.layers[0]._forward_pre_hooks
