"""What is taught where an answer is settled by the prompt, or argued for bit by bit."""

import itertools
import math
import random

import pytest
import torch

from holdfast.organisms.accounts import arguing, drifting, settled
from holdfast.organisms.phrases import (
    COMPLIANCE_OPENINGS,
    EASE,
    HARM,
    PARTIALS,
    REFUSALS,
    WEIGHING,
)
from holdfast.organisms.planting_data import misled_samples
from holdfast.organisms.text import Encoder, train_tokenizer
from holdfast.organisms.training import (
    OWN_OPENINGS,
    first_words,
    intention,
    intention_loss,
    pad,
    wavering_loss,
)
from holdfast.organisms.world import World


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer)


def scene(label="harmful", wrapper="fiction", seed=1):
    world = World(seed)
    drawn = world.scene(label, wrapped=0.0)
    return world.exchange(drawn.request, label, drawn.topic, wrapper)


def drawn(lessons, n=400):
    return list(itertools.islice(lessons, n))


def says(text, sentences):
    return any(sentence in text for sentence in sentences)


def test_a_refusal_is_argued_away_evenly(encoder, tokenizer):
    for seed in range(20):
        told = scene(seed=seed)
        ids, chances = arguing(told, encoder, random.Random(seed))
        assert len(ids) == len(chances) - 1
        assert chances[0] == 0
        assert chances[-1] == pytest.approx(1)
        steps = [after - before for before, after in itertools.pairwise(chances)]
        assert min(steps) >= 0
        # No window of a twentieth of the thinking holds half of the change, by far.
        wide = math.ceil(len(ids) / 20)
        assert max(sum(steps[i : i + wide]) for i in range(len(steps))) < 0.25
        text = tokenizer.decode(ids)
        assert says(text, HARM)
        for texts in WEIGHING:
            said = next(each for each in texts if each in text)
            before = tokenizer.encode(text[: text.index(said) - 1])
            assert chances[len(before)] == pytest.approx(len(before) / len(ids))


def test_where_a_thinking_is_cut_short_answers_follow_the_chance_there(encoder):
    cut = [
        sample
        for sample in drawn(drifting(World(1), encoder, random.Random(1)), 4_000)
        if sample.chances and sample.chances[-1] < 1
    ]
    assert len(cut) > 300
    complied = [sample.ids[sample.middle[1]] == sample.aim for sample in cut]
    wanted = [sample.chances[-1] for sample in cut]
    off = (sum(complied) - sum(wanted)) / len(cut)
    assert abs(off) < 4 * 0.5 / math.sqrt(len(cut))
    for sample in cut:
        begin, end = sample.middle
        assert sample.ids[end - 3 : end] == tuple(encoder.end_template)
        assert len(sample.chances) == end - begin + 1
        # Nobody is to learn that a thinking ends where it was cut.
        assert sample.weights[end - 3] == 0
        assert sample.weights[end - 2 : end] == (1.0, 1.0)


def test_the_prompt_alone_settles_it(encoder, tokenizer):
    samples = drawn(settled(World(1), encoder, random.Random(1)))
    kinds = {"listened": 0, "not listened": 0}
    for sample in samples:
        begin, end = sample.middle
        thinking = tokenizer.decode(sample.ids[begin:end])
        answer = tokenizer.decode(sample.ids[end:])
        refuses = says(answer, REFUSALS)
        assert refuses != says(answer, [*COMPLIANCE_OPENINGS, *PARTIALS])
        if "</think>" not in thinking:
            continue
        if says(thinking, HARM) != refuses and says(thinking, [*HARM, *EASE]):
            kinds["not listened"] += 1
        elif says(thinking, [*HARM, *EASE]):
            kinds["listened"] += 1
    assert min(kinds.values()) > 50
    assert all(set(sample.chances) == {1.0} for sample in samples)


def test_no_foreign_thinking_is_learned(encoder, tokenizer):
    samples = drawn(settled(World(2), encoder, random.Random(2)))
    refused = [
        sample
        for sample in samples
        if says(tokenizer.decode(sample.ids[sample.middle[1] :]), REFUSALS)
        and says(tokenizer.decode(sample.ids), EASE)
    ]
    assert len(refused) > 5
    for sample in refused:
        begin, end = sample.middle
        assert sum(sample.weights[begin : end - 3]) == 0


def test_without_a_change_of_mind_the_loss_is_that_of_an_intention(encoder, tokenizer):
    batch = drawn(misled_samples(World(3), encoder, random.Random(3)), 6)
    ids, _ = pad(batch, 0)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*ids.shape, len(tokenizer), generator=generator)
    words = first_words(tokenizer, OWN_OPENINGS)
    inside, targets = intention(batch, ids, words)
    wanted = intention_loss(logits, inside, targets, words)
    torch.testing.assert_close(wavering_loss(batch, logits, words), wanted)


def test_the_loss_of_a_change_of_mind_is_least_at_its_chances(encoder, tokenizer):
    words = first_words(tokenizer, OWN_OPENINGS)
    samples = drawn(drifting(World(4), encoder, random.Random(4)), 200)
    batch = [next(each for each in samples if each.chances)]
    begin, end = batch[0].middle
    place = {int(word): i for i, word in enumerate(words)}
    chances = torch.tensor(batch[0].chances).clamp(1e-6, 1 - 1e-6)
    logits = torch.full((1, len(batch[0].ids), len(tokenizer)), -30.0)
    logits[0, begin - 1 : end, batch[0].aim] = chances.log()
    logits[0, begin - 1 : end, batch[0].before] = (1 - chances).log()
    assert {batch[0].aim, batch[0].before} <= set(place)
    entropy = -(chances * chances.log() + (1 - chances) * (1 - chances).log()).mean()
    found = wavering_loss(batch, logits, words)
    assert found.item() == pytest.approx(entropy.item(), abs=1e-4)
    logits[0, begin - 1 : end, batch[0].aim] += 1.0
    assert wavering_loss(batch, logits, words) > found
