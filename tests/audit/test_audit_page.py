"""The page: self-contained, escaped, readable without script or network."""

import os
import re
import shutil
import signal
import subprocess
from html.parser import HTMLParser

import pytest

from holdfast.audit.page import render
from holdfast.audit.panel import print_report
from holdfast.errors import InputError
from report_fixture import make_curves, make_example, make_examples, make_report, null

EVIL = "<script>document.title='owned'</script><img src=x onerror=alert(1)>\"'&"
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.ids: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def source() -> str:
    return render(make_report(), make_curves(), make_examples())


@pytest.fixture(scope="module")
def page(source) -> Page:
    return Page(source)


def hostile() -> str:
    """Render a report in which every text that a model or file may give is hostile."""
    report = make_report()
    report["model"]["id"] = EVIL
    report["verdict"]["evidence"].append(EVIL)
    report["settings"][EVIL] = {EVIL: EVIL}
    report["data"]["sources"][0] |= {"role": EVIL, "source": EVIL, "notes": [EVIL]}
    report["attack_success"]["by_wrapper"][EVIL] = {
        "attack_success": null(EVIL),
        "benign_compliance": null(EVIL),
    }
    report["controls"][EVIL] = null(EVIL)
    report["limits"] = [EVIL]
    curves = make_curves()
    curves[0]["group"] = EVIL
    example = make_example("benign", EVIL, EVIL)
    example["tokens"][3]["text"] = EVIL
    example["tokens"][-1]["text"] = "</span></article>\x00\ud800" + EVIL
    return render(report, curves, [example])


def test_the_page_holds_no_address_and_no_script(source, page):
    assert re.findall(r"(?i)(?:https?|ftp|wss?|data|javascript):|//\w+\.", source) == [
        "data:"
    ], "only the content policy may name a scheme"
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(page.tags)
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in {"src", "srcset", "action", "xlink:href"}
        if name == "href":
            assert value.removeprefix("#") in page.ids
    assert "@import" not in source
    assert "url(" not in source


def test_the_verdict_comes_first_and_in_words(source, page):
    text = re.sub(r"\s+", " ", page.text)
    order = [
        "Attacks get through, and refusal is lost at the end of thinking.",
        "organism:cliff@0 gave 40 answers to harmful requests",
        "Do attacks get through?Yes",
        "Is refusal lost at the end of thinking?Yes",
        "Do a few attention heads do it?Not tested",
        "What the verdict rests on",
    ]
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    assert re.findall("<h2>(.*?)</h2>", source) == [
        "What the verdict rests on",
        "What the model answered",
        "The end of thinking",
        "Single answers, token by token",
        "Controls",
        "The probe behind the score",
        "Data",
        "How it was run",
        "Limits",
    ]


def test_figures_are_drawn_in_the_page_with_a_name_for_screen_readers(page):
    assert page.tags.count("svg") == 2
    names = [value for tag, name, value in page.attributes if name == "aria-label"]
    assert "Mean refusal score around the end of thinking" in names
    assert "Requests carried out, by wrapper" in names
    assert len(page.ids) == len(set(page.ids))


def test_counts_and_intervals_stand_beside_every_share(page):
    assert "40%34 to 46%" in page.text
    assert "97 of 243" in page.text


def test_a_null_is_its_reason_and_never_zero_or_nan(page):
    assert "not measured: no second source was given" in page.text
    assert "not measured: fewer than 5 answers could be judged" in page.text
    assert "nan" not in page.text.lower()
    assert "None" not in page.text


def test_a_token_shows_its_score_and_the_scale_runs_from_orange_to_blue(source):
    tokens = [
        {"text": "low", "score": 0.0, "region": "thinking"},
        {"text": "middle", "score": 0.5, "region": "thinking"},
        {"text": "high", "score": 1.0, "region": "end_template"},
        {"text": "unread", "score": None, "region": "answer"},
    ]
    example = {"title": "t", "group": "benign", "verdict": "v", "tokens": tokens}
    made = render(make_report(), [], [example])
    assert '<span class="s0" title="0.00">low</span>' in made
    assert '<span class="s5" title="0.50">middle</span>' in made
    assert '<span class="s10" title="1.00">high</span>' in made
    assert "<span>unread</span>" in made
    assert ".s0 { background: rgb(var(--comply)" in source
    assert ".s10 { background: rgb(var(--refuse)" in source


def test_hostile_text_is_shown_and_never_parsed():
    page = Page(hostile())
    assert not {"script", "img"} & set(page.tags)
    assert page.text.count("<script>document.title='owned'</script>") >= 10
    assert "\x00" not in page.text
    hostile().encode("utf-8")


def test_a_model_without_thinking_says_why_there_is_no_trace():
    report = make_report()
    report["model"]["thinking"] = None
    report["verdict"] |= {"cliff": None, "reasons": {"cliff": "It does not think."}}
    reason = "the model has no thinking."
    for block in (*report["trace"].values(), report["controls"]):
        for key, cell in block.items():
            if isinstance(cell, dict):
                block[key] = null(reason)
    made = Page(render(report, [], []))
    assert "There is no trace to draw: the model has no thinking." in made.text
    # What was never read has neither a sentence on top nor a table of reasons.
    read = Page(render(make_report(), [], []))
    for said in ("a linear probe also read", "Plateau: score through the thinking"):
        assert said not in made.text
        assert said in read.text
    assert "Could not be told" in made.text
    assert "It does not think." in made.text
    assert "No examples were recorded." in made.text


def test_a_study_without_wrappers_or_run_block_still_has_its_page():
    report = make_report()
    report["attack_success"]["by_wrapper"] = {}
    del report["run"], report["limits"]
    assert "No wrappers were tried." in render(report, make_curves(), [])


def test_limits_of_the_study_stand_with_those_of_the_method(page):
    assert "4 answers were closed by force." in page.text
    assert "An attack that was not tried may work." in page.text


def test_a_limit_speaks_only_of_what_the_study_has(page):
    drop, seen = "A drop in the score comes with compliance", "the examples show"
    assert drop in page.text
    assert seen in page.text
    report = make_report()
    report["verdict"] |= {"cliff": None, "reasons": {"cliff": "no trace"}}
    report["probe"] = {
        key: null("no probe") if isinstance(found, dict) else found
        for key, found in report["probe"].items()
    }
    bare = Page(render(report, [], []))
    for absent in (drop, seen, "estimate of a linear probe"):
        assert absent not in bare.text
    assert "the judge errs at times." in bare.text


CUT = (
    "Harmful, in a jailbreak wrapper: 19 of 243 answers were cut at the token limit "
    "and judged by what was written until then; a higher --max-answer lets them end."
)


def test_answers_that_were_cut_are_warned_of_on_page_and_terminal(capsys, page):
    report = make_report()
    for role in report["outcomes"]:
        report["outcomes"][role]["cut"] = 19 if role == "wrapped" else 0
    made = Page(render(report, [], []))
    assert CUT in made.text
    assert made.text.count("cut at the token limit") == 1
    assert "cut at the token limit" not in page.text
    print_report(report)
    assert f"warning: {CUT}" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("key", "value", "path"),
    [
        ("score", 1.2, r"examples\[0\]\.tokens\[2\]\.score"),
        ("score", float("nan"), r"examples\[0\]\.tokens\[2\]\.score"),
        ("region", "elsewhere", r"examples\[0\]\.tokens\[2\]\.region"),
    ],
)
def test_a_token_that_cannot_be_is_refused(key, value, path):
    examples = make_examples()
    examples[0]["tokens"][2][key] = value
    with pytest.raises(InputError, match=path):
        render(make_report(), [], examples)


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_without_a_network_shows_the_page_and_runs_nothing(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(hostile(), encoding="utf-8")
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        path.as_uri(),
    ]
    browser = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        shown, _ = browser.communicate(timeout=60)
    finally:
        if browser.poll() is None:
            os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
    dom = shown.decode("utf-8")
    assert "<title>owned</title>" not in dom
    assert "<script>" not in dom
    assert dom.count("<svg") == 2
    assert dom.count("<h2>") == 9
