import pytest
import torch

from holdfast.errors import InputError
from holdfast.models.loading.causal import adapt
from holdfast.models.sink_mass import read_sinks
from tiny_models import (
    HEADS,
    LAYERS,
    random_sequences,
    tiny_model,
    tiny_of_every_kind,
)

SEQUENCES = random_sequences([7, 19, 12, 2])


@pytest.fixture(scope="module")
def adapter():
    return adapt(tiny_model(initializer_range=0.15), None)


def by_hand(adapter, sequence, start=1):
    model = tiny_model(initializer_range=0.15)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(torch.tensor([sequence]), output_attentions=True).attentions
    return torch.stack([layer[0, :, start:, 0].mean(-1) for layer in found])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_masses_are_those_of_each_text_alone(adapter, side, batch_size):
    starts = [1, 1, 9, 1]
    found = read_sinks(
        adapter, SEQUENCES, starts, batch_size=batch_size, padding_side=side
    )
    expected = [by_hand(adapter, *each) for each in zip(SEQUENCES, starts, strict=True)]
    torch.testing.assert_close(found.mass, torch.stack(expected), atol=1e-6, rtol=0)
    assert found.seen.tolist() == [[n] * LAYERS for n in (6, 18, 3, 1)]
    assert not found.mass.is_inference()
    assert adapter.model.config._attn_implementation == "sdpa"


def test_what_follows_a_text_changes_nothing_of_it(adapter):
    whole = read_sinks(adapter, [SEQUENCES[1][:9]]).mass
    longer = read_sinks(adapter, [SEQUENCES[1]]).mass
    assert (longer - whole).abs().max() > 1e-3
    # The mean over all is that over both parts, weighted by their queries.
    rest = read_sinks(adapter, [SEQUENCES[1]], [9]).mass
    torch.testing.assert_close((8 * whole + 10 * rest) / 18, longer)


def test_a_window_that_has_moved_on_sees_no_sink():
    adapter = adapt(tiny_model("mistral", sliding_window=6), None)
    found = read_sinks(adapter, SEQUENCES[:3], [1, 8, 4])
    assert found.seen.tolist() == [[5] * LAYERS, [0] * LAYERS, [2] * LAYERS]
    assert torch.equal(found.mass[1], torch.zeros(LAYERS, HEADS))
    assert (found.mass[[0, 2]] > 0).all()


def test_a_start_for_each_text_and_texts_that_fit(adapter):
    with pytest.raises(InputError, match="4 texts"):
        read_sinks(adapter, SEQUENCES, [1])
    with pytest.raises(InputError, match="1 to 512 tokens"):
        read_sinks(adapter, [[]])


@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2", "olmo_hybrid", "falcon_h1"])
def test_layers_without_attention_have_no_mass_and_the_others_their_own(kind):
    model = tiny_of_every_kind(kind)
    adapter = adapt(model, None)
    sequences = random_sequences([14, 9])
    found = read_sinks(adapter, sequences)
    own = list(adapter.layers_with_heads)
    without = sorted(set(range(adapter.n_layers)) - set(own))
    assert not found.seen[:, without].any()
    assert not found.mass[:, without].any()
    model.set_attn_implementation("eager")
    for row, ids in enumerate(sequences):
        with torch.no_grad():
            seen = model(input_ids=torch.tensor([ids]), output_attentions=True)
        held = [each for each in seen.attentions if each is not None]
        expected = torch.stack([each[0, :, 1:, 0].mean(-1) for each in held])
        torch.testing.assert_close(found.mass[row, own], expected, atol=1e-5, rtol=0)
        assert (found.seen[row, own] == len(ids) - 1).all()
