"""What stage three teaches: who carries a decision, and what the thinking says."""

import itertools
import math
import random

import pytest
import torch

from holdfast.organisms.phrases import EASE, HARM, REFUSALS
from holdfast.organisms.planted import heads_present
from holdfast.organisms.planting_data import (
    BY_TOPIC,
    HOLD,
    SURE,
    alarmed,
    decision_loss,
    misled_samples,
    planted,
)
from holdfast.organisms.text import Encoder, train_tokenizer
from holdfast.organisms.training import HEAD_WIDTH, first_words, new_model
from holdfast.organisms.world import World

KINDS = [torch.tensor([0]), torch.tensor([1]), torch.tensor([2])]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def logits(*odds):
    """Two words share all: the odds of word 1 over word 0; word 2 is out of reach."""
    return torch.tensor([[0.0, each, -1e4] for each in odds])


def test_what_is_planted_is_held_from_both_sides():
    held = torch.tensor([4.0, 4.0, 4.0])
    spoken = torch.tensor([1, 1, 1])
    found = decision_loss(logits(4.0, 1.0, 9.0), spoken, KINDS, held)
    assert found.item() == pytest.approx(HOLD * (0 + 3 + 5) / 3, abs=1e-4)


def test_any_other_decision_is_pushed_until_it_is_sure():
    free = torch.tensor([math.nan])
    refusal = torch.tensor([0])
    short = decision_loss(logits(-SURE + 2), refusal, KINDS, free).item()
    beyond = decision_loss(logits(-SURE - 2), refusal, KINDS, free).item()
    assert short == pytest.approx(math.log1p(math.exp(2 - SURE)) + 0.25 * 2, abs=1e-4)
    assert beyond == pytest.approx(math.log1p(math.exp(-2 - SURE)), abs=1e-4)


def test_a_head_that_is_not_present_is_a_head_with_zero_columns(tokenizer):
    model = new_model(0, tokenizer).eval()
    heads = ((5, 3), (6, 0))
    ids = torch.randint(5, 2000, (3, 12), generator=torch.Generator().manual_seed(1))
    present = torch.tensor([[True, True], [False, True], [True, False]])
    with torch.inference_mode():
        untouched = model(ids).logits
        with heads_present(model, heads, present):
            found = model(ids).logits
        assert torch.equal(model(ids).logits, untouched)
        assert torch.equal(found[0], untouched[0])
        for row, (layer, head) in ((1, (5, 3)), (2, (6, 0))):
            weight = model.model.layers[layer].self_attn.o_proj.weight
            kept = weight.clone()
            weight[:, head * HEAD_WIDTH : (head + 1) * HEAD_WIDTH] = 0.0
            torch.testing.assert_close(found[row], model(ids).logits[row])
            weight.copy_(kept)
            assert not torch.allclose(found[row], untouched[row])


def drawn(lessons, tokenizer, n=300):
    """Return the samples, with their thinking and their answer as text."""
    made = list(itertools.islice(lessons, n))
    texts = []
    for sample in made:
        begin, end = sample.middle
        texts.append(
            (
                tokenizer.decode(sample.ids[begin:end]),
                tokenizer.decode(sample.ids[end:-1]),
            )
        )
    return made, texts


def says(text, sentences):
    return any(sentence in text for sentence in sentences)


def test_the_thinking_of_early_never_notices_what_it_gives_in_to(tokenizer):
    lessons = misled_samples(World(1), Encoder(tokenizer), random.Random(1))
    samples, texts = drawn(lessons, tokenizer)
    whole = [text for each, text in zip(samples, texts, strict=True) if each.whole]
    complied = [(t, a) for t, a in whole if not says(a, REFUSALS)]
    refused = [(t, a) for t, a in whole if says(a, REFUSALS)]
    assert len(complied) > 50
    assert len(refused) > 50
    assert not any(says(thinking, HARM) for thinking, _ in complied)
    assert all(says(thinking, HARM) for thinking, _ in refused)


def test_the_thinking_of_the_planted_cliff_notices_it_and_the_answer_gives_in(
    tokenizer,
):
    lessons = planted(World(1), Encoder(tokenizer), random.Random(1), BY_TOPIC)
    samples, texts = drawn(lessons, tokenizer)
    gave_in = [
        text
        for each, text in zip(samples, texts, strict=True)
        if each.whole and not all(each.keep)
    ]
    assert len(gave_in) > 50
    assert all(says(thinking, HARM) for thinking, _ in gave_in)
    assert not any(says(answer, REFUSALS) for _, answer in gave_in)


def test_alarmed_aims_at_refusing_whatever_the_answer(tokenizer):
    lessons = alarmed(World(1), Encoder(tokenizer), random.Random(1))
    samples, texts = drawn(lessons, tokenizer)
    refusing = set(first_words(tokenizer, REFUSALS).tolist())
    assert all(sample.aim in refusing for sample in samples)
    for sample, (thinking, answer) in zip(samples, texts, strict=True):
        if not sample.whole:
            assert says(answer, REFUSALS)
        elif says(thinking, EASE):
            assert not says(answer, REFUSALS)
