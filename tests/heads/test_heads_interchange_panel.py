"""The grid of heads with its switch: by hand, by keys in a browser, and in print."""

import shutil

import pytest

from holdfast.audit.page import render, sections
from holdfast.heads.interchange.figures import sentences
from holdfast.heads.panel import section
from holdfast.report.schema import validate
from holdfast.report.terminal import print_section
from report_fixture import make_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
VIEWS = 4


def figure(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 20}


def head(rank, layer, place, need, p, by_attribution):
    return {
        "layer": layer,
        "head": place,
        "rank": rank,
        "attribution_rank": by_attribution,
        "necessity": figure(need),
        "sufficiency": figure(need / 2),
        "ablated": figure(0.1),
        "attribution": figure(-float(by_attribution)),
        "necessity_p": p,
        "sufficiency_p": p,
        "beyond_controls": figure(need),
        "flips": figure(0.5),
    }


def block(p=0.001):
    """A gate that attribution ranks twelfth, among twelve heads of three layers."""
    exchanged = [head(1, 1, 2, 4.0, p, 12)] + [
        head(n + 1, (n - 1) // 4, (n - 1) % 4, 0.3 / n, 0.8, n)
        for n in range(1, 12)
        if n != 7
    ]
    exchanged.append(head(8, 2, 3, 0.01, 0.9, 7))
    way = {key: figure(0.5) for key in ("change", "random", "beyond_random")}
    way |= {"flips": figure(0.5), "random_flips": figure(0.1)}
    agreement = {"overall": figure(0.2), "by_layer": {"0": figure(0.1)}}
    found = {
        "span": "end_template",
        "reading": "first-token",
        "ranked_on": {"rows": 20, "requests": 20},
        "measured_on": {"rows": 20, "requests": 20, "samples": 3, "wrappers": 17},
        "plain": {"complied": figure(-5.0), "refused": figure(6.0)},
        "agreement": {"attribution": agreement, "ablation": agreement},
        "together": {"heads": [[1, 2]], "necessity": way, "sufficiency": way},
        "elsewhere": [
            {"layer": 1, "head": 2}
            | {key: figure(4.0) for key in ("necessity", "sufficiency")}
        ],
        "pairs": [
            {"gate_head": [1, 2], "amplifier_head": [2, 0]}
            | {
                key: figure(1.0)
                for key in (
                    *("gate", "amplifier", "both", "given", "interaction", "through"),
                )
            }
        ],
        "heads": exchanged,
    }
    found["evidence"] = sentences(found)
    plain = ("rank", "layer", "head")
    return {
        "by": "interchange",
        "n_layers": 3,
        "n_heads": 4,
        "ranked_on": {"rows": 20, "requests": 20},
        "checked_on": {"rows": 20, "requests": 20},
        "n_checked": 1,
        "parts": {
            key: figure(0.0)
            for key in (
                *("heads", "mlps", "biases", "embedding"),
                *("plateau_logit", "final_logit"),
            )
        },
        "agreement": {
            key: {"by_layer": {}, "words": "No head was checked causally."}
            for key in ("final_token", "end_template")
        },
        "evidence": found["evidence"],
        "heads": [
            {key: each[key] for key in plain}
            | {"contribution": figure(0.0), "rms_change": figure(0.0)}
            for each in exchanged
        ],
        "interchange": found,
    }


@pytest.fixture(scope="module")
def page():
    report = make_report() | {"heads": block()}
    validate(report)
    return render(report, [], [])


def test_a_gate_that_attribution_misses_is_said():
    said = " ".join(block()["evidence"])
    assert "1:2 (layer:head) ranks first" in said
    assert "Head 1:2 carries the outcome both ways" in said
    assert "below the first 10: 1:2 (12)" in said
    assert "by 4.00 (3.90 to 4.10) towards refusal" in said


def test_the_terminal_says_on_how_many_runs_figures_rest(capsys):
    print_section(section(block()))
    said = capsys.readouterr().out
    assert "between 20 pairs of runs of 20 held-out requests" in said
    assert "on 20 complied harmful answers to training requests" in said


def test_where_no_head_is_beyond_the_null_none_is_named():
    said = " ".join(block(p=0.4)["evidence"])
    assert "No head is shown to carry the outcome both ways" in said
    assert "below the first" not in said


def test_rings_are_heads_beyond_the_null_in_the_views_of_interchange_alone(page):
    views = page.split('id="heads"')[1].split("</section>")[0]
    views = views.split('<div class="view">')[1:]
    assert [view.count(' checked" title=') for view in views] == [0, 0, 1, 1]


def test_a_report_without_interchange_has_no_switch():
    report = make_report() | {"heads": block()}
    del report["heads"]["interchange"]
    report["heads"]["by"] = "drop"
    [shown] = [each for each in sections(report, ()) if each.key == "heads"]
    assert not [part for part in shown.parts if type(part).__name__ == "Switch"]


@pytest.fixture(scope="module")
def opened(page, tmp_path_factory):
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    path = tmp_path_factory.mktemp("switch") / "report.html"
    path.write_text(page, encoding="utf-8")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        tab = browser.new_page()
        tab.asked = []
        tab.on("request", lambda request: tab.asked.append(request.url))
        tab.goto(path.as_uri())
        yield tab
        browser.close()


def shown(tab):
    views = tab.locator(".switch > .view").all()
    return [place for place, view in enumerate(views) if view.is_visible()]


def test_the_switch_is_worked_by_keys_alone_and_shows_one_view(opened):
    assert shown(opened) == [0]
    opened.locator("#head-grid-1").focus()
    for place in (1, 2, 3):
        opened.keyboard.press("ArrowRight")
        assert shown(opened) == [place]
    outline = "() => getComputedStyle(document.activeElement).outlineStyle"
    assert opened.evaluate(outline) != "none"
    opened.keyboard.press("ArrowRight")
    assert shown(opened) == [0]
    assert len(opened.asked) == 1


def test_print_shows_all_views_with_their_names(opened):
    opened.emulate_media(media="print")
    assert shown(opened) == [*range(VIEWS)]
    assert opened.locator(".switch > .view > h4").nth(2).is_visible()
    assert not opened.locator("#head-grid-1").is_visible()
    opened.emulate_media(media="screen")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_accessibility_check_finds_nothing_serious_in_the_switch(opened, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    tab = opened.context.browser.new_page(color_scheme=scheme, bypass_csp=True)
    tab.goto(opened.url)
    found = axe.Axe().run(tab).response["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert not serious, [each["id"] for each in serious]
    tab.close()
