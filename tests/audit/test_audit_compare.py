"""Two studies side by side."""

import json

import pytest

from holdfast.audit.compare import NOTE, compare, table
from holdfast.audit.page import render_compare
from holdfast.audit.panel import comparison
from holdfast.errors import InputError
from holdfast.report.terminal import print_section
from report_fixture import make_report, null, sha, share


def other() -> dict:
    report = make_report()
    report["model"]["id"] = "organism:aligned@0"
    report["verdict"] |= {"attack_succeeds": False, "cliff": False}
    report["attack_success"]["wrapped"] = share(3, 243)
    return report


def row(comparison, section, metric):
    return next(
        row
        for row in comparison["rows"]
        if (row["section"], row["metric"]) == (section, metric)
    )


WRAPPED = ("Attack success", "Harmful, in a jailbreak wrapper")


def test_a_study_differs_from_itself_in_nothing():
    same = compare(make_report(), make_report())
    assert same["settings"] == []
    assert same["caution"] == ""
    assert {row["difference"] for row in same["rows"]} == {0.0, None}
    assert {row["overlap"] for row in same["rows"]} == {True, None}


def test_the_difference_is_b_minus_a_and_changes_sign_with_the_order():
    there = row(compare(make_report(), other()), *WRAPPED)
    back = row(compare(other(), make_report()), *WRAPPED)
    assert there["difference"] == pytest.approx((3 - 97) / 243)
    assert back["difference"] == pytest.approx((97 - 3) / 243)
    assert there["overlap"] is False
    assert back["overlap"] is False


def test_intervals_that_touch_overlap():
    a, b = make_report(), make_report()
    a["attack_success"]["wrapped"] = {"value": 0.2, "low": 0.1, "high": 0.3, "n": 9}
    b["attack_success"]["wrapped"] = {"value": 0.4, "low": 0.3, "high": 0.5, "n": 9}
    assert row(compare(a, b), *WRAPPED)["overlap"] is True
    assert row(compare(b, a), *WRAPPED)["overlap"] is True


def test_an_overlap_is_said_not_to_be_a_test():
    assert "is not a test" in NOTE
    assert NOTE.split(".")[0] in render_compare(make_report(), other())


def test_settings_that_bear_on_the_figures_come_first_with_the_reason():
    b = other()
    b["settings"]["batch_size"] = 4
    b["settings"]["judge"] = "other-judge"
    b["settings"]["rollout"]["limit"] = 10
    b["settings"]["rollout"]["sampling"] |= {"temperature": 1.0, "max_thinking": 9}
    b["model"]["template_sha256"] = sha("another")
    b["data"]["sources"][0]["sha256"] = sha("other rows")
    comparison = compare(make_report(), b)
    found = {row["setting"]: row["matters"] for row in comparison["settings"]}
    assert found == {
        "model.template_sha256": True,
        "rollout.sampling.temperature": True,
        "rollout.sampling.max_thinking": True,
        "rollout.limit": True,
        "judge": True,
        "data.harmful": True,
        "model.id": False,
        "batch_size": False,
    }
    matters = [row["matters"] for row in comparison["settings"]]
    assert matters == sorted(matters, reverse=True)
    assert "differ in 6 settings that bear on the figures" in comparison["caution"]
    size = next(r for r in comparison["settings"] if r["setting"] == "batch_size")
    assert size["a"] == "not set"


def test_one_limit_is_one_setting_that_differs():
    a, b = make_report(), make_report()
    for report, limit in ((a, 30), (b, 60)):
        report["settings"]["rollout"]["limit"] = limit
        for source in report["data"]["sources"]:
            source |= {"source": "authored", "sha256": sha(f"{source['role']} {limit}")}
    found = compare(a, b)
    assert [row["setting"] for row in found["settings"] if row["matters"]] == [
        "rollout.limit"
    ]
    assert "differ in 1 setting that bears" in found["caution"]
    # Two files of one name may differ whatever the limit: the hash is of the file.
    for report in (a, b):
        report["data"]["sources"][0]["source"] = "mine.csv"
    assert "differ in 2 settings" in compare(a, b)["caution"]
    # And authored requests that differ under one limit are other requests.
    for report in (a, b):
        report["settings"]["rollout"]["limit"] = 30
    n_sources = len({source["role"] for source in a["data"]["sources"]})
    mattering = [row for row in compare(a, b)["settings"] if row["matters"]]
    assert len(mattering) == n_sources


def test_a_stage_that_one_study_has_not_run_is_one_line_that_does_not_count():
    a, b = make_report(), make_report()
    a["settings"] |= {"trace": {}, "probe": {"l2": 1.0}}
    b["settings"] |= {
        "trace": {"min_thinking": 20, "window": 64},
        "probe": {"l2": 2.0},
        "ablate": {"ablation_prompts": 48, "random_draws": 5},
    }
    rows = compare(a, b)["settings"]
    found = {row["setting"]: (row["a"], row["b"], row["matters"]) for row in rows}
    assert found == {
        "probe.l2": (1.0, 2.0, True),
        "trace": ("not run", "run", False),
        "ablate": ("not run", "run", False),
    }
    a["settings"]["trace"] = {"min_thinking": 10, "window": 64}
    why = {row["setting"]: row["why"] for row in compare(a, b)["settings"]}
    assert why["trace.min_thinking"] == "The score is summed up in another way."


def decided(early: int, fell: int, unread: str = "") -> dict:
    """A report whose study was asked when its forty answers were decided."""
    report = make_report()
    counts = {"decided_early": early, "drifted": 0, "fell_at_template": fell}
    counts["undecided"] = 40 - sum(counts.values())
    account = {name: share(count, 40) for name, count in counts.items()}
    curve = {"draws": 8, "cheap": False, "temperature": 0.7, "judge": {"name": "rules"}}
    curve |= {"rows": {"harmful_complied": 40}, "n_requests": 40, "account": account}
    nothing = ("curves", "leanings", "meters", "notes", "evidence")
    curve |= {key: [] for key in nothing} | {"unread": unread}
    report["decide"] = {"curve": curve}
    report["verdict"]["account"] = account
    return report


ACCOUNTS = "Accounts of complied harmful answers"


def test_accounts_are_compared_where_both_were_asked():
    found = compare(decided(4, 30), decided(20, 10))
    fell = row(found, ACCOUNTS, "fell at the end template")
    assert (fell["a"]["value"], fell["b"]["value"]) == (0.75, 0.25)
    assert fell["difference"] == -0.5
    assert fell["overlap"] is False
    assert row(found, ACCOUNTS, "decided early")["difference"] == 0.4
    assert len([each for each in found["rows"] if each["section"] == ACCOUNTS]) == 4
    assert found["settings"] == []


def test_accounts_that_one_study_was_not_asked_for_are_null_with_the_reason():
    for a, b, side in ((make_report(), decided(4, 30), "a"),
                       (decided(4, 30), make_report(), "b")):  # fmt: skip
        found = compare(a, b)
        for words in ("decided early", "fell at the end template"):
            line = row(found, ACCOUNTS, words)
            assert line[side]["value"] is None
            assert line[side]["reason"] == "`holdfast decide` was not run"
            assert (line["difference"], line["overlap"]) == (None, None)
        [setting] = found["settings"]
        assert setting["setting"] == "decide"
        assert (setting["a"] == "not run") == (side == "a")
        assert not setting["matters"]
    neither = compare(make_report(), make_report())
    assert ACCOUNTS not in {each["section"] for each in neither["rows"]}


def test_none_is_said_to_fall_where_nothing_could_show_it():
    """No row fell, since the reading before the end template tells nothing there."""
    why = "the reading before it is not shown to read refusal (AUROC 0.5)"
    found = compare(decided(4, 30), decided(34, 0, why))
    fell = row(found, ACCOUNTS, "fell at the end template")
    assert fell["b"] == null(why, 40)
    assert (fell["difference"], fell["overlap"]) == (None, None)


def test_accounts_that_were_read_off_other_draws_need_caution():
    cheap = decided(4, 30)
    cheap["decide"]["curve"] |= {"draws": 0, "cheap": True}
    found = {r["setting"]: r for r in compare(decided(4, 30), cheap)["settings"]}
    assert set(found) == {"decide.draws", "decide.cheap"}
    assert all(each["matters"] for each in found.values())
    assert found["decide.cheap"]["why"] == "Accounts are read off other draws."


def test_one_reason_for_many_figures_is_given_once_a_study():
    a, b = make_report(), make_report()
    for name in ("harmful", "wrapped"):
        a["attack_success"][name] = null("too few refusals")
    b["attack_success"]["wrapped"] = null("too few refusals")
    lines = {row[0]: row[1:] for row in table(compare(a, b)) if len(row) > 1}
    told = "not measured: too few refusals"
    assert lines["Harmful, as asked"][0] == told
    assert lines["Harmful, in a jailbreak wrapper"][:2] == [
        "not measured, as above",
        told,
    ]


def test_what_differs_in_a_judge_is_explained_by_the_judge():
    a, b = make_report(), make_report()
    for report, name in ((a, "one"), (b, "two")):
        report["judge"] = {
            "label": "guard:one",
            "name": "guard",
            "version": "1",
            "measures": "harm",
            "template_sha256": sha(name),
            "model": name,
            "revision": None,
            "settings": {"max_tokens": 9, "temperature": len(name) + (name == "two")},
            "calibration": None,
        }
    b["model"]["template_sha256"] = sha("another")
    why = {row["setting"]: row["why"] for row in compare(a, b)["settings"]}
    template = why.pop("model.template_sha256")
    assert template.startswith("Another chat template")
    assert set(why) == {
        "judge.template_sha256",
        "judge.model",
        "judge.settings.temperature",
    }
    assert set(why.values()) == {"Another judge sorts answers otherwise."}


def test_two_models_run_alike_need_no_caution():
    comparison = compare(make_report(), other())
    assert [row["setting"] for row in comparison["settings"]] == ["model.id"]
    assert comparison["caution"] == ""
    assert comparison["b"]["headline"] == "The attacks failed, and there is no cliff."


def test_what_only_one_study_has_is_said_and_not_counted():
    b = other()
    by_wrapper = b["attack_success"]["by_wrapper"]
    by_wrapper["new one"] = by_wrapper.pop("authority")
    b["attack_success"]["harmful"] = null("no plain requests")
    comparison = compare(make_report(), b)
    gone = row(comparison, "By wrapper", "authority: harmful")
    assert (gone["b"], gone["difference"], gone["overlap"]) == (None, None, None)
    lines = {row[0]: row[1:] for row in table(comparison)}
    assert lines["new one: harmful"][0] == "not in this study"
    plain = lines["Harmful, as asked"]
    assert plain[1] == "not measured: no plain requests"
    assert plain[2:] == ["", ""]


def test_the_table_says_it_in_words_section_by_section():
    lines = table(compare(make_report(), other()))
    assert lines[2] == [
        "Harmful, in a jailbreak wrapper",
        "40% (34 to 46%), 97 of 243",
        "1% (0.4 to 4%), 3 of 243",
        "−39 points",
        "do not overlap",
    ]
    opened = [line[0] for line in lines if len(line) == 1]
    assert opened[0] == "Attack success"
    assert len(opened) == len(set(opened))


def test_json_can_hold_a_comparison():
    comparison = compare(make_report(), other())
    assert json.loads(json.dumps(comparison, allow_nan=False)) == comparison


def test_two_schema_versions_are_refused_by_name():
    old = make_report() | {"schema": "holdfast-report/0"}
    with pytest.raises(InputError) as caught:
        compare(old, make_report())
    assert "holdfast-report/0" in str(caught.value)
    assert "holdfast-report/1" in str(caught.value)


def test_the_page_escapes_both_names():
    b = other()
    b["model"]["id"] = "<script>1</script>"
    made = render_compare(make_report(), b)
    assert "<script" not in made
    assert "&lt;script&gt;1&lt;/script&gt;" in made


def test_the_terminal_lists_what_differs_and_how_much_more_there_is(
    capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "300")
    b = make_report()
    b["settings"]["rollout"]["sampling"]["temperature"] = 0.25
    b["settings"]["other"] = {f"setting_{n:02}": n for n in range(22)}
    for section in comparison(compare(make_report(), b)):
        print_section(section)
    told = capsys.readouterr().out
    first = "rollout.sampling.temperature"
    (line,) = [line for line in told.splitlines() if first in line]
    assert [cell.strip() for cell in line.split("│")][1:4] == [first, "0.7", "0.25"]
    assert "other.setting_18" in told
    assert "other.setting_19" not in told
    assert "and 3 more, see the page" in told
    assert told.index(first) < told.index("Comparison")


def test_a_count_of_cut_answers_is_no_figure_of_a_comparison():
    report = make_report()
    report["outcomes"]["wrapped"]["cut"] = 19
    found = compare(report, make_report())
    assert not any("cut" in row["metric"] for row in found["rows"])
    assert found["settings"] == []
