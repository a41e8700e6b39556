import pytest
import torch

from holdfast.engines.reading import parity
from holdfast.engines.reading.parity import (
    Reading,
    compare,
    local_reader,
    places,
    read_texts,
    recorded,
)
from holdfast.errors import InputError, ModelError
from holdfast.models.hidden_states import read_states
from holdfast.models.loading.load import load_language_model


@pytest.fixture(scope="module")
def adapter(thinker):
    return load_language_model(str(thinker), device="cpu")


@pytest.fixture(scope="module")
def texts(adapter):
    """Token ids of eight sentences, no two of one length."""
    words = "I must think about whether to help with this before I say no . ".split()
    whole = adapter.tokenizer(" ".join(words * 4))["input_ids"]
    return [whole[start : start + 12 + 3 * start] for start in range(8)]


@pytest.fixture(scope="module")
def known(adapter, texts):
    return read_texts(local_reader(adapter, 3), texts)


@pytest.fixture(scope="module")
def probe(adapter, known):
    """A direction on which the texts differ, and an offset that halves them."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(adapter.d_model, generator=generator).double()
    last = torch.stack([each.states[-1] for each in known]).double() @ direction
    return direction, -float(last.median()) - 1e-6


def moved(known, by):
    """What another reader would say whose states are moved."""
    return recorded([each._replace(states=by(each.states)) for each in known])


def spread(known, probe):
    logits = torch.cat([each.states.double() @ probe[0] for each in known])
    return float(logits.std(correction=0))


def test_the_last_position_is_compared_and_the_first_is_not():
    assert places(1) == [0]
    assert places(2) == [1]
    for n in range(1, 200):
        found = places(n)
        assert found[-1] == n - 1
        assert len(found) <= parity.PLACES
        assert n == 1 or found == sorted(set(found))
        assert n == 1 or found[0] > 0


def test_a_local_reading_is_the_state_of_each_position(adapter, texts, known):
    for text, reading in zip(texts, known, strict=True):
        with torch.inference_mode():
            whole = adapter.base(torch.tensor([text])).last_hidden_state[0]
        expected = whole[places(len(text))]
        assert reading.token_ids == tuple(text)
        torch.testing.assert_close(reading.states, expected, atol=1e-4, rtol=1e-4)


def test_a_reader_agrees_with_itself_and_with_other_batches(
    adapter, texts, known, probe
):
    found = compare(recorded(known), recorded(known), texts, probe)
    assert (found.apart, found.shift.value, found.largest, found.flipped) == (0,) * 4
    other = compare(recorded(known), local_reader(adapter, 8), texts, probe)
    assert other.apart < 1e-4
    assert other.n_texts == 8
    assert "8 texts" in other.said()
    assert other.record()["shift"]["low"] <= other.shift.value


def test_a_small_shift_is_measured_by_hand_and_allowed(texts, known, probe):
    direction, _ = probe
    shift = 0.05 * spread(known, probe)
    by = (shift * direction / (direction @ direction)).float()
    found = compare(recorded(known), moved(known, lambda x: x + by), texts, probe)
    assert found.shift.value == pytest.approx(shift, rel=1e-3)
    assert found.shift.low <= found.shift.value <= found.shift.high
    assert found.largest == pytest.approx(shift, rel=1e-3)
    assert found.tolerance == pytest.approx(0.1 * spread(known, probe))


def test_a_decision_that_flips_next_to_zero_is_counted_and_allowed(texts, known, probe):
    direction, offset = probe
    last = torch.stack([each.states[-1] for each in known]).double() @ direction
    least = float((last + offset).abs().min())
    by = 2 * least * torch.sign(-(last + offset)[(last + offset).abs().argmin()])
    unit = (direction / (direction @ direction)).float()
    other = moved(known, lambda x: x + by.float() * unit)
    found = compare(recorded(known), other, texts, probe)
    assert (found.flipped, found.near) == (1, 1)


def test_a_shift_along_the_probe_alone_is_refused(texts, known, probe):
    direction, _ = probe
    by = (0.3 * spread(known, probe) * direction / (direction @ direction)).float()
    other = moved(known, lambda x: x + by)
    # The states themselves are nearly the same.
    assert compare(recorded(known), other, texts).apart < parity.APART
    with pytest.raises(ModelError, match="shift of the probe's logit"):
        compare(recorded(known), other, texts, probe)


def test_one_text_that_is_shifted_far_is_refused_though_the_mean_is_not(
    texts, known, probe
):
    direction, _ = probe
    by = (0.6 * spread(known, probe) * direction / (direction @ direction)).float()
    other = [known[0]._replace(states=known[0].states + by), *known[1:]]
    with pytest.raises(ModelError, match="The largest shift"):
        compare(recorded(known), recorded(other), texts, probe)


def test_states_before_the_final_norm_are_refused(adapter, texts, known, probe):
    def unnormed(sequences, positions):
        site = adapter.n_layers - 1
        found = read_states(adapter, sequences, lambda states, _: states, site=site)
        for ids, states, kept in zip(sequences, found, positions, strict=True):
            yield Reading(tuple(ids), states[kept])

    with pytest.raises(ModelError, match="further apart"):
        compare(recorded(known), unnormed, texts, probe)


def test_a_norm_with_one_added_to_its_weight_is_refused(adapter, texts, known):
    # As a checkpoint of a family that keeps its weights less one would be misread.
    weight = adapter.final_norm.weight.detach()
    other = moved(known, lambda x: x / weight * (weight + 1))
    with pytest.raises(ModelError, match="further apart"):
        compare(recorded(known), other, texts)


def test_rows_in_another_order_are_refused(texts, known, probe):
    with pytest.raises(ModelError, match="token ids of text 0"):
        compare(recorded(known), recorded(known[::-1]), texts, probe)
    same = [text[:12] for text in texts]
    cut = [
        each._replace(token_ids=tuple(text))
        for each, text in zip(known, same, strict=True)
    ]
    shuffled = [
        each._replace(states=other.states)
        for each, other in zip(cut, cut[1:] + cut[:1], strict=True)
    ]
    with pytest.raises(ModelError, match="further apart"):
        compare(recorded(cut), recorded(shuffled), same, probe)


def test_states_that_are_none_are_refused(texts, known):
    for by, said in (
        (torch.zeros_like, "all zero"),
        (lambda x: torch.cat([torch.zeros_like(x[:1]), x[1:]]), "all zero"),
        (lambda x: x * float("nan"), "no numbers"),
        (lambda x: x[:-1], "of shape"),
        (lambda x: x[:, :-1], "of shape"),
    ):
        with pytest.raises(ModelError, match=said):
            compare(recorded(known), moved(known, by), texts)


def test_other_tokens_are_refused_and_named(texts, known):
    ids = list(known[3].token_ids)
    other = [*known]
    other[3] = known[3]._replace(token_ids=tuple([*ids[:5], ids[5] + 1, *ids[6:]]))
    with pytest.raises(ModelError, match=f"text 3, {ids[5]}; found {ids[5] + 1} at"):
        compare(recorded(known), recorded(other), texts)
    other[3] = known[3]._replace(token_ids=tuple(ids[:-1]))
    with pytest.raises(ModelError, match=f"found {len(ids) - 1} of them"):
        compare(recorded(known), recorded(other), texts)
    with pytest.raises(ModelError, match="8 readings; found 7"):
        compare(recorded(known), recorded(known[:-1]), texts)


def test_no_text_at_all_is_no_agreement(known):
    with pytest.raises(InputError, match="texts to read both ways"):
        compare(recorded(known), recorded(known), [])


def test_one_text_has_a_shift_without_an_interval(texts, known, probe):
    found = compare(recorded(known[:1]), recorded(known[:1]), texts[:1], probe)
    assert found.shift.value is None
    assert "one base request alone" in found.said()
    by = (0.4 * spread(known, probe) * probe[0] / (probe[0] @ probe[0])).float()
    with pytest.raises(ModelError, match="largest shift"):
        compare(
            recorded(known[:1]), moved(known[:1], lambda x: x + by), texts[:1], probe
        )
