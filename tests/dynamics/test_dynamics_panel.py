"""What the page shows of the step-wise signal and of detectors on it."""

import re

import pytest

from holdfast.audit.page import render
from holdfast.dynamics.panel import step_figure, trajectory_figure
from holdfast.errors import InputError
from holdfast.guard.panel import recommendation
from holdfast.report.schema import validate
from report_fixture import fig, make_report, null

LEVELS = {"benign_complied": 0.95, "attack_complied": 0.4, "attack_refused": 0.1}


def curve(level, steps=4):
    return [
        {"step": s, "mean": level, "low": level - 0.05, "high": level + 0.05, "n": 30}
        for s in range(1, steps + 1)
    ]


def signal_block():
    empty = {"rows": 0, "requests": 0}
    measures = {"dip": fig(0.2, 30), "recovered_below_0.5": null("nothing complied")}
    return {
        "mode": "paper",
        "identity": {"steps": 4, "region": "answer", "time": "step"},
        "anchors": {
            "published": {
                "n_compliant": 40,
                "n_refused": 41,
                "separation": [0.4, 0.3, 0.2, 0.1],
                "least_separation_step": 4,
            }
        },
        "matched_reason": "too few of the same topics",
        "channels": ["compliance_logit", "text"],
        "missing_channels": [],
        "figures": {"last_step_auroc": fig(0.98, 60, 0.01)},
        "groups": {name: {"rows": 30, "requests": 30} | measures for name in LEVELS}
        | {"benign_refused": empty},
        "curves": {
            "compliance_logit": {name: curve(level) for name, level in LEVELS.items()},
            "text": {name: curve(1.0) for name in LEVELS},
        },
        "held_out": 90,
        "not_read": 3,
    }


def level(rate):
    groups = ("benign_complied", "benign_refused", "attack_complied", "attack_refused")
    return {
        "level": rate,
        "false_positives": fig(0.01, 100, 0.009),
        **{name: fig(0.5, 20) for name in groups},
    }


def guard_block():
    best = {"detector": "dip", "auroc": fig(0.91, 50), "levels": [level(0.01)]}
    other = {"detector": "autoencoder", "auroc": fig(0.8, 50), "levels": [level(0.01)]}
    table = [other, best | {"auroc_minus_published": fig(0.11, 50)}]
    return {
        "facts": {"requests": {"train": 1000, "calibration": 1001}},
        "chosen_on": ["<b>song</b>"],
        "reported_on": ["maybe"],
        "recommended": {"detector": "dip", "auroc": fig(0.95, 60, 0.02)},
        "chosen": table,
        "reported": table,
        "by_family": {"maybe": {"rows": 50, "table": table}},
        "by_domain": {"in wrappers": {"rows": 70, "table": table}},
        "by_length": {},
        "within_wrappers": [{"detector": "dip", "auroc": fig(0.52, 50)}],
        "streaming": {
            "level": 0.01,
            "table": [
                {
                    "detector": "dip",
                    "false_positives": fig(0.01, 90, 0.005),
                    "detected": fig(0.4, 50),
                    "detected_median_step": 3,
                }
            ],
        },
        "notes": ["There are fewer than 1000 benign test rows."],
    }


def example(scores=(0.9, 0.3, 0.8)):
    words = ("First", " <do>", " that")
    return {
        "title": "song",
        "group": "attack_complied",
        "verdict": "complied: no refusal was found",
        "steps": [
            {"text": word, "compliance": score, "text_signal": 1.0}
            for word, score in zip(words, scores, strict=True)
        ],
    }


def page(steps=()):
    report = make_report() | {"signal": signal_block(), "guard": guard_block()}
    return render(report, [], [], steps)


def test_the_page_has_the_curves_the_words_and_the_detector_table():
    drawn = page([example()])
    text = " ".join(re.sub(r"<[^>]+>", " ", drawn).split())
    assert "Step by step" in text
    assert "autoencoder (published) 0.80" in text
    # The recommended detector, where it was chosen and where it is reported.
    assert "deepest dip (AUROC 0.95" in text
    assert "on other families 0.91" in text
    assert "There are fewer than 1000 benign test rows." in text
    assert "too few of the same topics" in text
    assert "3 answers are in no group" in text


def test_what_a_model_wrote_is_escaped_and_has_its_tone():
    drawn = page([example()])
    assert " &lt;do&gt;" in drawn
    assert "<do>" not in drawn
    assert "<b>song</b>" not in drawn
    # 1 complies and has the tone of complying: the scale of scores turned round.
    assert re.search(r'class="s1" title="step 1: 0.90">First', drawn)
    assert re.search(r'class="s7" title="step 2: 0.30"', drawn)


def test_without_a_signal_the_page_has_no_such_section():
    drawn = render(make_report(), [], [])
    assert 'id="signal"' not in drawn
    assert 'id="guard"' not in drawn


def test_lines_stand_where_their_numbers_are():
    svg = trajectory_figure(signal_block()["curves"])
    assert svg.count("<title>") == 1
    heights = {
        round(float(y), 1)
        for y in re.findall(r'aria-roledescription="line mark"[^>]*d="M0,([\d.]+)', svg)
    }
    # Panels are 220 pixels high, from 1 at the top to 0.
    for level_ in LEVELS.values():
        assert round(220 * (1 - level_), 1) in heights
    one = step_figure(example())
    points = re.findall(r'transform="translate\(([\d.]+),([\d.]+)\)"', one)
    assert (260.0, 63.0) in {(float(x), round(float(y), 1)) for x, y in points}


def test_a_score_outside_its_range_is_refused():
    with pytest.raises(InputError, match=r"steps\[1\].compliance within 0 and 1"):
        page([example((0.9, 1.3, 0.8))])


def test_the_schema_wants_the_parts_that_programs_read():
    report = make_report() | {"signal": signal_block(), "guard": guard_block()}
    validate(report)
    for name, key in (("signal", "matched_reason"), ("guard", "within_wrappers")):
        broken = report | {name: {k: v for k, v in report[name].items() if k != key}}
        with pytest.raises(InputError, match=key):
            validate(broken)


def test_no_choice_is_said_to_be_none():
    block = guard_block() | {
        "recommended": {"detector": None, "reason": "no attack succeeded"}
    }
    assert "No detector can be recommended: no attack succeeded." in recommendation(
        block
    )
    alone = guard_block() | {"reported": []}
    assert "no other family" in recommendation(alone)
