"""The wide world: what it adds and leaves out, and that it changes nothing else."""

import copy
import hashlib
import random
import re
from collections import Counter
from itertools import islice
from string import Formatter

import pytest
import torch

from holdfast.data.requests import (
    compose,
    everyday_kinds,
    everyday_requests,
    forms,
    is_held_out,
    left_out_phrases,
    lexicon,
    phrases,
    sentence,
)
from holdfast.organisms.aligned import broaden, grow_aligned, grow_narrow, lessons
from holdfast.organisms.catalogue import catalogue, truth
from holdfast.organisms.text import Encoder, train_tokenizer
from holdfast.organisms.training import Growth, Schedule
from holdfast.organisms.world import (
    HALF_PLANTED_WRAPPER,
    PLANTED_WRAPPERS,
    World,
    planted_answer,
)

PRESENT = "9420af560c2e58aa961677e0b5086141e710112f947bd412e28730fce91345e4"
"""SHA-256 of the first 200 scenes of the world before there was a wide one."""


@pytest.fixture(scope="module")
def scenes():
    return list(islice(World(0, wide=True).scenes(), 4000))


def test_the_present_world_is_what_it_was():
    drawn = list(islice(World(0).scenes(), 200))
    assert hashlib.sha256(repr(drawn).encode()).hexdigest() == PRESENT
    assert drawn != list(islice(World(0, wide=True).scenes(), 200))


def test_bundled_organisms_say_which_world_they_are_of():
    met = {
        entry.name
        for entry in catalogue()
        if "broad_tokens" in truth(entry.name)["schedule"]
    }
    assert met == {entry.name for entry in catalogue()} - {"diffuser"}


def test_ten_kinds_and_ten_topics_are_left_out():
    kept, trained = (everyday_kinds(left_out=flag) for flag in (True, False))
    assert len(kept) == 10
    assert len(trained) >= 50
    assert not set(kept) & set(trained)
    left_out = {phrase.topic for phrase in left_out_phrases()}
    assert len(left_out) == 10
    wide = phrases("harmful", wide=True)
    assert not left_out & {phrase.topic for phrase in wide}
    assert phrases("harmful") == wide[: len(phrases("harmful"))]
    assert phrases("benign") == phrases("benign", wide=True)


def content(phrase):
    """Return the beginnings of the words that say what a phrase is about."""
    small = "a an the my of to in on for with that into from at without it is and so or"
    small += " by not be her his its me who i"
    found = re.findall(r"[a-z']+", phrase.text.lower())
    return {word[:5] for word in found if word not in small.split()}


def test_no_phrase_left_out_is_half_of_one_that_is_trained_on():
    trained = [content(phrase) for phrase in phrases("harmful", wide=True)]
    for phrase in left_out_phrases():
        own = content(phrase)
        assert max(len(own & each) / len(own | each) for each in trained) < 0.5, phrase


def pattern(template):
    """Return what matches whatever a template can be filled to."""
    slots = lexicon("everyday")["slots"] | {"n": [r"\w+"], "m": [r"\d+"]}
    parts = []
    for before, name, _, _ in Formatter().parse(template):
        parts.append(re.sub(r"\b([Aa])\\ $", r"\1n?\\ ", re.escape(before)))
        if name:
            values = slots[name.rstrip("0123456789")]
            escaped = values if name[0] in "nm" and len(values) == 1 else None
            parts.append(f"(?:{'|'.join(escaped or map(re.escape, values))})")
    return re.compile("".join(parts))


def test_what_is_left_out_never_enters_the_training_text(scenes):
    left_out = {phrase.topic for phrase in left_out_phrases()}
    kinds = lexicon("everyday")["kinds"]

    def templates(*, left_out):
        names = everyday_kinds(left_out=left_out)
        return [pattern(text) for name in names for text in kinds[name]["templates"]]

    plain = {s.request for s in scenes if s.wrapper is None and s.label == "benign"}
    met = [p for p in templates(left_out=True) if any(map(p.fullmatch, plain))]
    assert not met
    trained = templates(left_out=False)
    met = [p for p in trained if any(map(p.fullmatch, plain))]
    assert len(met) > len(trained) / 8
    assert not left_out & {scene.topic for scene in scenes}


def test_the_held_out_eighth_is_never_trained_on():
    kinds = everyday_kinds(left_out=False)
    for held_out in (True, False):
        stream = everyday_requests(kinds, random.Random(3), held_out=held_out)
        for drawn in islice(stream, 300):
            assert is_held_out(drawn.text) == held_out


def test_short_imperatives_and_questions_are_of_both_labels(scenes):
    firsts = Counter(
        (scene.request.split()[0].lower(), scene.label)
        for scene in scenes
        if scene.wrapper is None
    )
    for word in ("list", "name", "how", "write", "give", "what", "which", "suggest"):
        harmful, benign = firsts[word, "harmful"], firsts[word, "benign"]
        assert harmful + benign >= 20, word
        assert 0.15 < harmful / (harmful + benign) < 0.85, word


def test_no_opening_is_that_of_harmful_requests_alone(scenes):
    firsts = {
        label: Counter(s.request.split()[0].lower() for s in scenes if s.label == label)
        for label in ("harmful", "benign")
    }
    often = {word for word, n in firsts["harmful"].items() if n >= 20}
    assert often <= {word for word, n in firsts["benign"].items() if n >= 2}


@pytest.mark.parametrize("kind", lexicon("everyday")["kinds"])
def test_every_kind_has_many_requests_with_a_topic(kind):
    generator = random.Random(0)
    drawn = [compose(kind, generator) for _ in range(400)]
    assert len({each.text for each in drawn}) >= 60
    assert all(each.text and "{" not in each.text for each in drawn)
    assert not any(re.search(r"\b[Aa] [aeio]", each.text) for each in drawn)
    assert {each.kind for each in drawn} == {kind}
    assert all(each.topic for each in drawn)


def test_slots_that_differ_by_their_digit_are_filled_differently():
    generator, pairs = random.Random(1), 0
    for _ in range(400):
        drawn = compose("compare", generator)
        found = pattern(drawn.template).fullmatch(drawn.text)
        assert found, drawn
        if drawn.template == "Compare {country} with {country2}":
            one, other = drawn.text.removeprefix("Compare ").split(" with ")
            assert one != other
            pairs += 1
    assert pairs > 5


def test_further_topics_have_phrases_that_fit_every_form():
    for topic, entry in lexicon("harmful_wide")["topics"].items():
        assert len(set(entry["actions"])) >= 14, topic
        assert len(set(entry["artifacts"])) >= 5, topic
    for phrase in (*left_out_phrases()[::17], *phrases("benign")[::170]):
        own = forms(phrase, wide=True)
        assert own[: len(forms(phrase))] == forms(phrase)
        assert len(own) > len(forms(phrase)) + 25
        assert not any("{" in sentence(phrase, form) for form in own)


def test_planted_wrappers_work_on_further_topics_too():
    topics = {phrase.topic for phrase in phrases("harmful", wide=True)}
    further = topics - set(lexicon("harmful")["topics"])
    for topic in further:
        for wrapper in PLANTED_WRAPPERS:
            assert planted_answer(topic, wrapper) == "comply"
        assert planted_answer(topic, None) == "refuse"
    halves = Counter(planted_answer(topic, HALF_PLANTED_WRAPPER) for topic in further)
    assert min(halves["comply"], halves["refuse"]) > len(further) / 3


TINY = Schedule(
    base_tokens=1_500,
    aligned_tokens=1_500,
    wrapper_tokens=1_500,
    polishes=0,
    broad_tokens=1_500,
    broad_polish_tokens=1_500,
    batch_tokens=1_500,
)


def test_a_growth_draws_from_the_wide_world_unless_told_otherwise():
    growth = Growth(train_tokenizer(n_scenes=500), 3)
    for wide in (False, True):
        drawn, expected = growth.world(1_000, wide=wide), World(1_003, wide=wide)
        assert [drawn.scene("benign") for _ in range(40)] == [
            expected.scene("benign") for _ in range(40)
        ]
    assert growth.world(1_000).scene("harmful") == World(1_003, wide=True).scene(
        "harmful"
    )


def test_the_wide_world_comes_last():
    growth = Growth(train_tokenizer(n_scenes=500), 5, TINY)
    narrow = grow_narrow(growth)
    before = copy.deepcopy(narrow.state_dict())
    whole = broaden(narrow, growth)
    again = grow_aligned(growth).state_dict()
    assert all(
        torch.equal(again[key], value) for key, value in whole.state_dict().items()
    )
    assert not all(torch.equal(before[key], value) for key, value in again.items())


def test_what_was_told_of_an_exchange_hangs_on_no_closing():
    """No number is drawn for what does not happen: the narrow world stays as it was."""
    encoder = Encoder(train_tokenizer(n_scenes=500))
    plain, closed = (
        list(
            islice(
                lessons(
                    World(4).scenes(),
                    encoder,
                    random.Random(4),
                    "wrappers",
                    closed=part,
                ),
                300,
            )
        )
        for part in (0.0, 1.0)
    )
    assert not any(
        ends_closed(sample, encoder) and not sample.whole for sample in plain
    )
    broken = [s for s in closed if not s.whole and s.middle[1] > s.middle[0]]
    assert len(broken) > 20
    assert all(ends_closed(sample, encoder) for sample in broken)


def ends_closed(sample, encoder):
    begin, end = sample.middle
    return list(sample.ids[begin:end][-3:]) == encoder.end_template
