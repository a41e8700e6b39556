import pytest
import torch

from holdfast.errors import AdapterError, InputError, SettingsError
from holdfast.heads.attribution import Parts, attribute
from holdfast.models.folds import head_contributions
from holdfast.models.hidden_states import project_states
from holdfast.models.interventions import head_factors, scale_heads
from holdfast.models.loading.causal import adapt
from tiny_models import HEADS, LAYERS, random_sequences, tiny_model

FAMILIES = ["llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3"]
OFFSET = -0.7
SEQUENCES = random_sequences([23, 9, 17, 12])
PLATEAUS = [(4, 19), (2, 6), (3, 14), (1, 12)]


@pytest.fixture(scope="module", params=FAMILIES)
def adapter(request):
    return adapt(tiny_model(request.param), None)


def _direction(adapter, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(adapter.d_model, generator=generator)


def _attribute(adapter, sequences=SEQUENCES, plateaus=PLATEAUS, **named):
    direction = _direction(adapter)
    return attribute(adapter, sequences, plateaus, direction, OFFSET, **named)


def test_the_parts_and_the_offset_sum_to_the_logit_at_every_token(adapter):
    logits = project_states(
        adapter, SEQUENCES, _direction(adapter)[None], torch.tensor([OFFSET])
    )
    rows = zip(_attribute(adapter), logits, PLATEAUS, SEQUENCES, strict=True)
    for found, expected, (start, stop), ids in rows:
        assert found.tail_logits.shape == (len(ids),)
        torch.testing.assert_close(
            found.tail.total() + OFFSET, expected[:, 0], atol=1e-3, rtol=0
        )
        torch.testing.assert_close(
            found.tail_logits, expected[:, 0], atol=1e-4, rtol=1e-4
        )
        mean = float(expected[start:stop].mean())
        assert float(found.plateau.total()) + OFFSET == pytest.approx(mean, abs=1e-3)
        assert found.plateau_logit == pytest.approx(mean, abs=1e-4)
        assert found.gap < 1e-5


def test_a_heads_part_is_what_it_writes_folded_through_the_norm(adapter):
    """The slow way round: materialise each head's vector, then norm and project."""
    ids, norm = SEQUENCES[0], adapter.final_norm
    seen, entering = [], []
    handles = [
        adapter.output_projection(layer).register_forward_pre_hook(
            lambda _, arguments: seen.append(arguments[0])
        )
        for layer in range(LAYERS)
    ]
    handles.append(norm.register_forward_pre_hook(lambda _, a: entering.append(a[0])))
    with torch.no_grad():
        adapter.base(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        rms = (entering[0][0].square().mean(-1) + norm.variance_epsilon).sqrt()
        direction = _direction(adapter)
        written = torch.stack(
            [head_contributions(adapter, i, heads)[0] for i, heads in enumerate(seen)],
            1,
        )
        folded = (written * norm.weight) @ direction
        expected = folded / rms[:, None, None]
        unit = written[-1] @ (direction / direction.norm())
    (found,) = _attribute(adapter, [ids], [(4, 19)])
    torch.testing.assert_close(found.tail.heads, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        found.plateau.heads, expected[4:19].mean(0), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        found.plateau_unscaled, folded[4:19].mean(0), atol=1e-3, rtol=1e-4
    )
    torch.testing.assert_close(found.tail_inverse_rms, 1 / rms, atol=1e-5, rtol=1e-4)
    assert found.plateau_inverse_rms == pytest.approx(float((1 / rms[4:19]).mean()))
    torch.testing.assert_close(found.published, unit, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def alone(adapter):
    return _attribute(adapter, batch_size=1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_neither_batch_nor_padding_changes_a_contribution(
    adapter, alone, side, batch_size
):
    batched = _attribute(adapter, batch_size=batch_size, padding_side=side)
    for one, other in zip(alone, batched, strict=True):
        pairs = [*zip(one.tail, other.tail, strict=True)]
        pairs += zip(one.plateau, other.plateau, strict=True)
        pairs += [(one.plateau_unscaled, other.plateau_unscaled)]
        pairs += [(one.published, other.published)]
        for a, b in pairs:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_biases_of_the_projection_are_counted_apart(llama):
    (found,) = _attribute(llama, SEQUENCES[:1], PLATEAUS[:1])
    assert found.tail.biases.abs().min() > 1e-4
    by_inverse = found.tail.biases / found.tail_inverse_rms[:, None]
    torch.testing.assert_close(by_inverse, by_inverse[:1].expand_as(by_inverse))
    without = _attribute(adapt(tiny_model("qwen3"), None))[0].tail.biases
    assert without.abs().max() == 0


def test_only_the_last_positions_are_kept_in_full(qwen3):
    whole, short = _attribute(qwen3), _attribute(qwen3, tail=10)
    for one, other, ids in zip(whole, short, SEQUENCES, strict=True):
        kept = min(10, len(ids))
        assert other.tail.heads.shape == (kept, LAYERS, HEADS)
        torch.testing.assert_close(other.tail.heads, one.tail.heads[-kept:])
        torch.testing.assert_close(other.plateau.heads, one.plateau.heads)


def test_an_ablated_head_contributes_nothing(qwen3):
    with scale_heads(qwen3, head_factors(qwen3, [(1, 2)])):
        (found,) = _attribute(qwen3, SEQUENCES[:1], PLATEAUS[:1])
    assert found.tail.heads[:, 1, 2].abs().max() == 0
    assert found.tail.heads[:, 1, 1].abs().min() > 0
    assert found.gap < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_sums_stay_within_their_rounding(dtype):
    exact = adapt(tiny_model().to(dtype).float(), None)
    rounded = adapt(tiny_model().to(dtype), None)
    limit = 0.1 if dtype == torch.bfloat16 else 0.02
    for one, other in zip(_attribute(exact), _attribute(rounded), strict=True):
        assert 1e-6 < other.gap < limit
        scale = one.plateau.heads.abs().max()
        off = (one.plateau.heads - other.plateau.heads).abs().max()
        assert off / scale < limit


def test_results_are_ordinary_tensors(qwen3):
    (found,) = _attribute(qwen3, SEQUENCES[:1], PLATEAUS[:1])
    tensors = [*found.tail, *found.plateau, found.published, found.plateau_unscaled]
    assert not any(tensor.is_inference() for tensor in tensors)


def test_a_norm_that_is_not_what_it_seems_is_refused():
    adapter = adapt(tiny_model("qwen3"), None)
    adapter.final_norm.forward = lambda states: adapter.final_norm.weight * states
    with pytest.raises(AdapterError, match="sum to the logit"):
        _attribute(adapter)


def test_a_norm_of_another_kind_is_named():
    adapter = adapt(tiny_model("qwen3"), None)
    object.__setattr__(adapter, "final_norm", torch.nn.Identity())
    with pytest.raises(AdapterError, match="a Identity"):
        _attribute(adapter)


@pytest.mark.parametrize("plateau", [(4, 4), (5, 30), (-1, 3)])
def test_a_plateau_outside_its_sequence_is_named(qwen3, plateau):
    with pytest.raises(InputError, match="tokens of sequence 1"):
        _attribute(qwen3, SEQUENCES[:2], [(0, 3), plateau])


def test_as_many_plateaus_as_sequences_are_needed(qwen3):
    with pytest.raises(InputError, match="each of 4 sequences"):
        _attribute(qwen3, plateaus=PLATEAUS[:3])


def test_a_direction_of_zero_is_refused(qwen3):
    with pytest.raises(SettingsError, match="direction that is not zero"):
        attribute(qwen3, SEQUENCES, PLATEAUS, torch.zeros(qwen3.d_model))


def test_hooks_are_gone_afterwards_and_after_an_error(qwen3):
    _attribute(qwen3)
    with pytest.raises(InputError):
        _attribute(qwen3, [[]], [(0, 1)])
    joints = [block.joint for block in qwen3.blocks]
    projections = [block.projection for block in qwen3.blocks]
    modules = [*qwen3.layers, *joints, *projections]
    for module in [*modules, qwen3.final_norm]:
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_total_is_the_sum_of_all_numbers():
    generator = torch.Generator().manual_seed(0)
    parts = Parts(
        *(
            torch.randn(s, generator=generator)
            for s in [(5, 3, 4), (5, 3), (5, 3), (5,), (5, 3)]
        )
    )
    expected = parts.heads.sum((1, 2)) + parts.mlps.sum(1) + parts.biases.sum(1)
    expected = expected + parts.mixers.sum(1)
    torch.testing.assert_close(parts.total(), expected + parts.embedding)
