"""How numbers and verdicts are put into words."""

import itertools

import pytest

from holdfast.audit import words
from holdfast.cliff.groups import CONTROL_FIGURES
from holdfast.report import labels, text
from report_fixture import fig, make_report, null, share


@pytest.mark.parametrize(
    ("count", "n", "written"),
    [
        (0, 40, "0%"),
        (40, 40, "100%"),
        (1, 40, "3%"),
        (5, 40, "13%"),
        (1, 1000, "0.1%"),
        (1, 100_000, "<0.1%"),
        (999, 1000, "99.9%"),
        (99_999, 100_000, ">99.9%"),
    ],
)
def test_only_none_and_all_read_as_none_and_all(count, n, written):
    assert text.value(share(count, n), share=True) == written


def test_a_score_close_to_one_does_not_read_as_one():
    assert text.value(fig(0.996, 80)) == "0.996"
    assert text.value(fig(1.0, 80)) == "1.00"
    assert text.value(fig(1, 80)) == "1.00"


def test_minus_is_a_true_minus_and_zero_has_none():
    assert text.plain(-0.5) == "−0.50"
    assert text.plain(-0.0001) == "0.00"


def test_a_count_is_told_of_shares_only_and_only_when_whole():
    assert text.count_of(share(18, 40), share=True) == "18 of 40"
    assert text.count_of(fig(0.55, 280)) == "n = 280"
    assert text.count_of(fig(0.333, 10), share=True) == "n = 10"
    assert text.count_of(null("none"), share=True) == "n = 0"


def test_a_missing_figure_is_its_reason():
    assert text.rate(null("no benign rows")) == "not measured: no benign rows"


def test_nothing_that_html_forbids_or_that_turns_the_page_survives():
    assert text.clean("a\x00b\x1b[0m\ud800\n\t") == "a\ufffdb\ufffd[0m\ufffd\n\t"
    assert text.shown_token("x\u202ey") == "x\ufffdy"
    assert text.shown_token("שלום") == "שלום"
    assert text.shown_token("a\n") == "a↵\n"
    assert text.shown_token("a\n", one_line=True) == "a↵"


def test_flatten_keeps_every_leaf_with_its_path():
    nested = {"a": {"b": 1, "c": {}}, "d": [1, {"e": 2}]}
    assert dict(text.flatten(nested)) == {"a.b": 1, "a.c": None, "d": [1, {"e": 2}]}


def test_every_pair_of_answers_has_a_headline_of_its_own():
    report = make_report()
    seen = set()
    for attack, cliff in itertools.product((True, False, None), repeat=2):
        report["verdict"] |= {"attack_succeeds": attack, "cliff": cliff}
        seen.add(labels.headline(report))
    assert len(seen) == 9


def test_answers_say_yes_no_and_why_not():
    report = make_report()
    report["verdict"] |= {"cliff": False}
    found = {answer.question: answer for answer in words.answers(report)}
    tones = [answer.tone for answer in found.values()]
    assert tones == ["yes", "no", "open"]
    heads = found["Do a few attention heads do it?"]
    assert heads.word == "Not tested"
    assert heads.meaning == "Heads are not traced by this version."


def test_heads_switched_off_on_too_few_requests_are_not_called_untested():
    report = make_report()
    report["ablation"] = {"sparse": {"n_requests": 5, "sizes": [{"n_heads": 1}]}}
    report["verdict"]["reasons"]["sparse"] = "Heads were switched off on 5 requests."
    heads = words.answers(report)[-1]
    assert (heads.word, heads.tone) == ("Could not be told", "open")
    assert heads.meaning == "Heads were switched off on 5 requests."
    report["ablation"]["sparse"]["sizes"] = []
    assert words.answers(report)[-1].word == "Not tested"


def test_what_was_asked_counts_the_answers_of_each_kind():
    assert words.asked(make_report()) == (
        "organism:cliff@0 gave 40 answers to harmful requests as they stand, 243 to "
        "harmful requests inside a jailbreak wrapper, 120 to harmless requests, "
        "243 to harmless requests inside a wrapper and 100 to harmless requests that "
        "sound dangerous."
    )


def test_few_examples_are_warned_of_and_many_are_not():
    report = make_report()
    assert not any("as few as" in line for line in words.sureness(report))
    report["trace"]["benign"]["cliff"]["n"] = 7
    assert any("as few as 7 examples" in line for line in words.sureness(report))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.5, "The whole range is above 0."),
        (-0.5, "The whole range is below 0."),
        (
            0.01,
            "The range −0.05 to 0.07 includes 0: this control does not rule it out.",
        ),
    ],
)
def test_an_excess_is_read_by_where_its_range_lies(value, said):
    assert words.reading(fig(value, 20), "excess_over_refused") == said
    assert words.reading(fig(value, 20), "benign_plateau") == ""


def test_every_control_that_the_stages_write_has_its_sentence():
    assert set(CONTROL_FIGURES) == set(labels.CONTROLS)
    names = [name for name, _ in labels.CONTROLS.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("key", CONTROL_FIGURES)
def test_a_control_says_in_which_unit_it_is(key):
    in_scores = key in ("benign_plateau", "shuffled_plateau", "neutral_final")
    sentence = labels.CONTROLS[key].sentence
    assert ("As a score from 0 to 1." in sentence) == in_scores
    assert ("gap between refusing and complying" in sentence) != in_scores


def test_the_excess_is_told_in_its_own_unit():
    [said] = [line for line in words.sureness(make_report()) if "gap" in line]
    assert said == (
        "Before complying, the score falls by 0.55 (0.47 to 0.63) more than before "
        "refusing, where 1 is the whole gap between refusing and complying."
    )


def test_only_differences_are_read_by_where_their_range_lies():
    read = [key for key in labels.CONTROLS if words.reading(fig(0.5, 20), key)]
    assert read == ["excess_over_refused", "excess_over_benign", "plateau_over_benign"]
