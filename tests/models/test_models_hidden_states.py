import pytest
import torch

from holdfast.errors import EnvironmentProblem, InputError, SettingsError
from holdfast.models.batching import pad, with_batch_halving
from holdfast.models.hidden_states import final_states, project_states, read_states
from tiny_models import LAYERS, random_sequences

LENGTHS = [5, 40, 17, 3, 29, 29, 1, 11, 23, 8, 36, 14] * 3


def _directions(adapter, n=2):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(n, adapter.d_model, generator=generator)


@pytest.fixture(params=["qwen3", "llama"])
def adapter(request):
    return request.getfixturevalue(request.param)


def test_scores_do_not_depend_on_batch_size_or_padding(adapter):
    sequences = random_sequences(LENGTHS)
    directions = _directions(adapter)
    alone = project_states(adapter, sequences, directions, batch_size=1)
    assert [len(score) for score in alone] == LENGTHS
    for side in ("left", "right"):
        for batch_size in (7, 32):
            scores = project_states(
                adapter,
                sequences,
                directions,
                batch_size=batch_size,
                padding_side=side,
            )
            worst = max(
                float((a - b).abs().max()) for a, b in zip(alone, scores, strict=True)
            )
            assert worst <= 1e-4


def test_scores_are_the_projected_last_hidden_state(adapter):
    (sequence,) = random_sequences([12])
    directions, offset = _directions(adapter), torch.tensor([3.0, -1.0])
    with torch.no_grad():
        output = adapter.model(
            torch.tensor([sequence]), output_hidden_states=True, use_cache=False
        )
    (scores,) = project_states(adapter, [sequence], directions, offset)
    expected = output.hidden_states[-1][0] @ directions.T + offset
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_a_block_is_read_before_the_final_norm(adapter):
    (sequence,) = random_sequences([12])
    with torch.no_grad():
        hidden = adapter.base(
            torch.tensor([sequence]), output_hidden_states=True, use_cache=False
        ).hidden_states
    (first,) = read_states(adapter, [sequence], lambda states, _: states * 1, site=0)
    torch.testing.assert_close(first, hidden[1][0])
    last = read_states(
        adapter, [sequence], lambda states, _: states * 1, site=LAYERS - 1
    )[0]
    assert not torch.allclose(last, hidden[-1][0], atol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(adapter.final_norm(last), hidden[-1][0])


def test_final_states_are_those_of_the_position_asked_for(adapter):
    sequences = random_sequences([9, 4, 6])
    everywhere = read_states(adapter, sequences, lambda states, _: states * 1)
    found = final_states(adapter, sequences, [-1, 0, 3])
    expected = torch.stack([everywhere[0][8], everywhere[1][0], everywhere[2][3]])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    left = final_states(adapter, sequences, [-1, 0, 3], padding_side="left")
    torch.testing.assert_close(left, expected, atol=1e-5, rtol=1e-5)


def test_no_sequence_gives_no_state(qwen3):
    assert final_states(qwen3, []).shape == (0, qwen3.d_model)


def test_several_reductions_come_back_as_a_tuple_a_sequence(qwen3):
    sequences = random_sequences([4, 7])

    def reduce(states, mask):
        return (states * mask[..., None]).sum(1), mask.sum(1)

    results = read_states(qwen3, sequences, reduce, per_position=False)
    everywhere = read_states(qwen3, sequences, lambda states, _: states * 1)
    for (total, count), states in zip(results, everywhere, strict=True):
        assert int(count) == len(states)
        torch.testing.assert_close(total, states.sum(0), atol=1e-4, rtol=1e-4)


def test_results_are_ordinary_tensors_that_can_be_trained_on(qwen3):
    states = final_states(qwen3, random_sequences([4, 7]))
    weight = torch.zeros(qwen3.d_model, requires_grad=True)
    (states @ weight).sum().backward()
    torch.testing.assert_close(weight.grad, states.sum(0))


def test_hooks_are_gone_after_an_error(qwen3):
    def fail(states, mask):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read_states(qwen3, random_sequences([4]), fail)
    assert not qwen3.final_norm._forward_hooks


def test_a_position_outside_its_sequence_is_named(qwen3):
    with pytest.raises(InputError, match="sequence 1, which has 2 tokens"):
        final_states(qwen3, random_sequences([5, 2]), [4, 2])


@pytest.mark.parametrize("length", [0, 513])
def test_a_length_the_model_is_not_sound_for_is_refused(qwen3, length):
    with pytest.raises(InputError, match=f"{length} tokens in sequence 1"):
        project_states(qwen3, random_sequences([3, length]), _directions(qwen3))


def test_a_site_that_does_not_exist_is_refused(qwen3):
    with pytest.raises(SettingsError, match=f"from 0 to {LAYERS - 1}"):
        read_states(qwen3, random_sequences([3]), lambda s, m: s, site=LAYERS)


def test_the_batch_is_halved_until_it_fits():
    sizes = []

    def double(batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [2 * item for item in batch]

    results, size = with_batch_halving(double, list(range(10)), 8)
    assert results == [2 * item for item in range(10)]
    assert size == 2
    assert sizes == [8, 4, 2, 2, 2, 2, 2]


def test_memory_that_ends_at_a_single_item_is_an_error():
    def fail(batch):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(EnvironmentProblem, match="batch of one"):
        with_batch_halving(fail, [1, 2], 2)


def test_other_errors_are_not_taken_for_memory():
    def fail(batch):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        with_batch_halving(fail, [1, 2], 2)


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(SettingsError, match="at least 1"):
        with_batch_halving(list, [1], 0)


def test_capture_halves_its_batch_too(qwen3):
    sequences = random_sequences([6, 6, 6, 6])
    calls = []

    def reduce(states, mask):
        calls.append(len(states))
        if len(states) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return states[..., 0]

    results = read_states(qwen3, sequences, reduce, batch_size=4)
    assert calls == [4, 2, 1, 1, 1, 1]
    expected = read_states(qwen3, sequences, lambda states, _: states[..., 0])
    torch.testing.assert_close(torch.stack(results), torch.stack(expected))


def test_padding_goes_to_its_side():
    cpu = torch.device("cpu")
    assert pad([[1, 2], [3]], "left", cpu).token_ids.tolist() == [[1, 2], [0, 3]]
    assert pad([[1, 2], [3]], "right", cpu).token_ids.tolist() == [[1, 2], [3, 0]]
    assert pad([[1, 2], [3]], "left", cpu).positions().tolist() == [[0, 1], [0, 0]]
