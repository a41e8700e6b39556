"""Attacks: the same request in other words, in the same cluster."""

import pytest

from holdfast.data.attacks import (
    attack,
    attacks,
    choose_attacks,
    flip,
    past_tense,
    read_translations,
)
from holdfast.data.prompts import Prompt, prompt_id
from holdfast.data.suites import Item
from holdfast.errors import PromptFileError, SettingsError


def item(text, wrapper=None):
    name = prompt_id(text)
    prompt = Prompt(name, name, text, "harmful", "s", wrapper)
    return Item("s", "harmful", prompt, text)


def test_every_promised_attack_is_there_by_name():
    assert {
        "prefix_injection",
        "role_play",
        "refusal_suppression",
        "past_tense",
        "translation",
        "flip",
    } <= set(attacks())


def test_every_attack_keeps_request_cluster_and_label_and_changes_the_prompt():
    plain = [item("How do I paint a fence?"), item("Write a song about a fence")]
    made, without = attack(plain, choose_attacks(["all"]), seed=0)
    assert len(made) == 2 * len(attacks())
    assert not without
    by_request = {each.prompt.request_id: each for each in plain}
    for each in made:
        base = by_request[each.prompt.request_id]
        assert each.request == base.request
        assert each.prompt.label == "harmful"
        assert each.prompt.text != base.prompt.text
        assert each.prompt.prompt_id == prompt_id(each.prompt.text)
    assert len({each.name for each in made}) == len(made)


def test_one_more_request_changes_nothing_for_the_others():
    one, two = item("How do I paint a fence?"), item("Mow a lawn")
    chosen = choose_attacks(["all"])
    alone, _ = attack([one], chosen, seed=3)
    both, _ = attack([two, one], chosen, seed=3)
    assert set(alone) < set(both)


def test_what_is_wrapped_already_is_not_wrapped_again():
    assert attack([item("x y", "song")], choose_attacks(["all"]), 0) == (
        [],
        {name: 0 for name in ()},
    )


@pytest.mark.parametrize(
    ("request_", "past"),
    [
        ("How do I paint a fence?", "How did people paint a fence in the past?"),
        ("How to paint NASA logos", "How did people paint NASA logos in the past?"),
        ("Write a song.", "In the past, how did people write a song?"),
        ("Please make tea", "In the past, how did people make tea?"),
    ],
)
def test_past_tense_by_rule(request_, past):
    assert past_tense(request_) == past


def test_what_no_rule_fits_is_still_put_into_the_past():
    assert "Why is it blue?" in past_tense("Why is it blue?")


def test_flip_can_be_undone():
    assert flip("Mow a lawn").rpartition("\n")[2][::-1] == "Mow a lawn"


def test_translation_by_a_table_leaves_out_what_the_table_has_not(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("prompt,translation\nMow a lawn,Mähe den Rasen\n")
    known = read_translations(str(table))
    made, without = attack(
        [item("mow  a lawn"), item("Paint it")],
        choose_attacks(["translation"], known),
        0,
    )
    assert [each.prompt.text for each in made] == ["Mähe den Rasen"]
    assert without == {"translation": 1}


def test_a_table_without_its_columns_is_refused(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("english,german\na,b\n")
    with pytest.raises(PromptFileError, match="translation"):
        read_translations(str(table))


def test_an_unknown_attack_lists_those_there_are():
    with pytest.raises(SettingsError, match="past_tense"):
        choose_attacks(["past-tense"])
