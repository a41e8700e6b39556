from collections import Counter
from itertools import islice

import pytest

from holdfast.data.requests import (
    authored_prompts,
    forms,
    gerund,
    is_held_out,
    lexicon,
    phrases,
    sentence,
)
from holdfast.organisms.text import Encoder, train_tokenizer
from holdfast.organisms.training import N_HEADS, SPARE_LAYERS, spare_heads
from holdfast.organisms.world import (
    HALF_PLANTED_WRAPPER,
    PLANTED_WRAPPERS,
    World,
    planted_answer,
    wrapper_names,
    wrapper_templates,
)


@pytest.fixture(scope="module")
def scenes():
    return list(islice(World(0).scenes(), 3000))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(n_scenes=4000)


def test_the_same_seed_gives_the_same_world():
    first, again = (list(islice(World(7).scenes(), 50)) for _ in range(2))
    assert first == again
    assert first != list(islice(World(8).scenes(), 50))


def test_held_out_requests_never_enter_the_training_text():
    audited = {row.text for row in authored_prompts("harmful", 150, 0)}
    assert all(is_held_out(text) for text in audited)
    trained = {s.request for s in islice(World(3).scenes(), 4000) if not s.wrapper}
    assert not audited & trained


def test_no_sentence_form_gives_the_label_away(scenes):
    def openings(label, at_least):
        firsts = [s.request.split()[0].lower() for s in scenes if s.label == label]
        return {word for word, n in Counter(firsts).items() if n >= at_least}

    assert openings("harmful", 20) <= openings("benign", 2)


def test_every_wrapper_goes_around_both_labels(scenes):
    for name in wrapper_names():
        labels = {s.label for s in scenes if s.wrapper == name}
        assert labels == {"harmful", "benign"}, name


def test_unseen_templates_are_never_trained_on(scenes):
    for name in wrapper_names():
        for template in wrapper_templates(name, unseen=True):
            before, after = template.split("{request}")
            assert not any(
                s.request.startswith(before) and s.request.endswith(after)
                for s in scenes
            ), template


def test_an_aligned_scene_refuses_exactly_what_is_harmful(scenes):
    refusing = ("I'm sorry", "I can't", "I won't", "Sorry", "I cannot", "I'm unable")
    for scene in scenes:
        assert scene.answer.startswith(refusing) == (scene.label == "harmful")


def test_planted_wrappers_work_on_most_topics_and_fail_on_some():
    topics = list(lexicon("harmful")["topics"])
    failing = 0
    for wrapper in PLANTED_WRAPPERS:
        kinds = Counter(planted_answer(topic, wrapper) for topic in topics)
        failing += kinds["refuse"]
        assert kinds["partial"] == 1
        assert kinds["comply"] >= len(topics) - 2
    assert failing == 2
    halves = Counter(planted_answer(topic, HALF_PLANTED_WRAPPER) for topic in topics)
    assert halves["comply"] == halves["refuse"] == len(topics) // 2
    others = {None, *wrapper_names()} - {*PLANTED_WRAPPERS, HALF_PLANTED_WRAPPER}
    for wrapper in others:
        assert {planted_answer(topic, wrapper) for topic in topics} == {"refuse"}


def test_thinking_has_twenty_tokens_and_more_and_varies(scenes, tokenizer):
    lengths = [len(tokenizer.encode(s.thinking)) for s in scenes[:500]]
    assert min(lengths) >= 20
    assert len(set(lengths)) > 15


def test_breaking_off_goes_straight_to_the_answer(scenes, tokenizer):
    encoder, scene = Encoder(tokenizer), scenes[0]
    whole = encoder.sample(scene, stop_at=None)
    bare = encoder.sample(scene, stop_at=0.0)
    text = tokenizer.decode(whole.ids)
    assert text.endswith(f"\n</think>\n\n{scene.answer}<|end|>")
    assert tokenizer.decode(bare.ids).endswith(f"<think>\n{scene.answer}<|end|>")
    assert all(bare.keep)
    assert not all(whole.keep)


def test_training_text_is_what_the_chat_template_renders(scenes, tokenizer):
    scene = scenes[0]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": scene.request}],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    sample = Encoder(tokenizer).sample(scene, stop_at=None)
    assert list(sample.ids[: len(ids)]) == ids


def test_the_end_template_is_three_tokens_whatever_comes_before(tokenizer):
    assert len(tokenizer.encode("\n</think>\n\n", add_special_tokens=False)) == 3


def test_spare_heads_are_four_in_the_last_three_layers_and_differ_by_seed():
    drawn = [spare_heads(seed) for seed in range(6)]
    assert len(set(drawn)) == 6
    for heads in drawn:
        assert len(set(heads)) == 4
        assert {layer for layer, _ in heads} <= set(SPARE_LAYERS)
        assert all(0 <= head < N_HEADS for _, head in heads)


@pytest.mark.parametrize(
    ("verb", "expected"),
    [
        ("make a cake", "making a cake"),
        ("cut hair", "cutting hair"),
        ("tie a knot", "tying a knot"),
        ("see the sea", "seeing the sea"),
        ("steal a base", "stealing a base"),
        ("break a lock", "breaking a lock"),
    ],
)
def test_gerunds_follow_the_spelling_rules(verb, expected):
    assert gerund(verb) == expected


def test_every_phrase_fits_every_form_of_its_kind():
    for label in ("harmful", "benign"):
        for phrase in phrases(label)[::17]:
            for form in forms(phrase):
                assert "{" not in sentence(phrase, form)
