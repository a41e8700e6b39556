"""The page in a real browser: no request, keyboard, print, narrow, dark, 5,000 answers.

Runs where Playwright is installed and a Chromium of the system is found; the page is
opened from its file, as a reader opens it.
"""

import shutil

import pytest

from holdfast.audit.browse import BrowsedAnswer
from holdfast.audit.page import render
from report_fixture import make_report

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
ROWS = 5000
OUTCOMES = ("refused", "complied", "partial", "degenerate", "unparsed")


def answer(number):
    return BrowsedAnswer(
        group="Harmful, as asked" if number % 2 else "Harmless, as asked",
        wrapper=(None, "role-play", "as fiction")[number % 3],
        outcome=OUTCOMES[number % len(OUTCOMES)],
        prompt=f"How do I polish lamp number {number} in the hall?",
        thinking="The lamp is old. " * 20 + f"It is lamp {number}.",
        answer=f"Take a soft cloth to lamp number {number} ." + " Rub it." * 30,
        note="" if number % 7 else "no phrase of a refusal",
        file="rollouts.parquet",
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    answers = [answer(number) for number in range(ROWS)]
    path.write_text(render(make_report(), [], [], (), answers), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, path):
    """Open the page; yields it with what it asked for and what went wrong in it."""
    contexts = []

    def open_page(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.asked, page.faults = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda line: page.faults.append(line.text))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


def status(page):
    return page.locator("#answers-status").inner_text()


def filtered(page, words):
    """Type a search, and ask for it at once."""
    page.locator('#answers-filter input[name="words"]').fill(words)
    page.keyboard.press("Enter")
    return status(page)


def test_no_request_leaves_the_file_and_nothing_goes_wrong(opened, path):
    page = opened()
    page.locator("#answers-pages button").last.click()
    page.locator("details").first.evaluate("each => { each.open = true; }")
    assert page.asked == [path.as_uri()]
    assert page.faults == []


def test_a_request_that_does_leave_would_be_seen_and_is_refused(opened):
    page = opened()
    page.evaluate("() => { new Image().src = 'http://127.0.0.1:9/leak.png'; }")
    page.wait_for_timeout(100)
    assert any("Content Security Policy" in fault for fault in page.faults)


def test_every_answer_is_found_by_filter_and_by_search(opened):
    page = opened()
    assert status(page) == "1 to 50 of 5,000 answers"
    assert filtered(page, "number 4321") == "1 to 1 of 1 answers, out of 5,000"
    row = page.locator("#answers-table tbody tr")
    assert "lamp number 4321" in row.inner_text()
    assert filtered(page, "zeppelin") == "None of 5,000 answers fits this filter."
    page.locator("#answers-filter button").click()
    page.wait_for_function(
        "() => document.getElementById('answers-status').textContent"
        " === '1 to 50 of 5,000 answers'"
    )
    page.select_option('#answers-filter select[name="outcome"]', index=1)
    page.select_option('#answers-filter select[name="wrapper"]', index=1)
    page.select_option('#answers-filter select[name="group"]', index=1)
    shares = len(OUTCOMES) * 3 * 2
    page.wait_for_function(
        "() => document.getElementById('answers-status').textContent.includes('out of')"
    )
    of = int(status(page).split(" of ")[1].split()[0])
    assert of in {ROWS // shares, ROWS // shares + 1}


def test_thinking_is_folded_and_opens_where_the_search_is(opened):
    page = opened()
    folded = page.locator("#answers-table details")
    assert folded.first.get_attribute("open") is None
    filtered(page, "it is lamp 17.")
    assert folded.first.get_attribute("open") is not None


def test_the_table_is_worked_by_keys_alone(opened):
    page = opened()
    page.locator("#answers-filter input").focus()
    page.keyboard.type("number 4377")
    page.keyboard.press("Enter")
    assert status(page) == "1 to 1 of 1 answers, out of 5,000"
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "() => document.activeElement.name || document.activeElement.tagName"
            )
        )
    assert {"group", "wrapper", "outcome", "BUTTON", "SUMMARY"} <= reached
    # Whatever has the focus shows it.
    page.locator("#answers-filter button").focus()
    shown = page.evaluate(
        "() => getComputedStyle(document.querySelector('#answers-filter button'))"
        ".outlineStyle"
    )
    assert shown != "none"


def test_pages_turn_by_keys_and_end_where_the_answers_end(opened):
    page = opened()
    before, after = page.locator("#answers-pages button").all()
    assert before.is_disabled()
    after.focus()
    page.keyboard.press("Enter")
    assert status(page) == "51 to 100 of 5,000 answers"
    assert before.is_enabled()


def test_a_narrow_window_scrolls_in_tables_and_not_as_a_whole(opened):
    page = opened(viewport={"width": 360, "height": 740})
    width = page.evaluate("() => document.documentElement.scrollWidth")
    assert width <= 360


def test_print_shows_what_can_be_printed(opened, tmp_path):
    page = opened()
    page.emulate_media(media="print")
    assert not page.locator("#answers-filter").is_visible()
    assert page.locator("h1").is_visible()
    pdf = page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert pdf.startswith(b"%PDF")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dark_mode_turns_the_page_dark(opened, scheme):
    page = opened(color_scheme=scheme)
    red, green, blue = page.evaluate(
        "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g)"
        ".slice(0, 3).map(Number)"
    )
    light = (red + green + blue) / 3
    assert light > 200 if scheme == "light" else light < 80


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_accessibility_check_has_no_serious_findings(opened, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    # The check is a script of its own, which the page's policy would refuse.
    page = opened(color_scheme=scheme, bypass_csp=True)
    found = axe.Axe().run(page).response["violations"]
    serious = [
        f"{each['id']}: {each['help']}: {[n['target'] for n in each['nodes'][:3]]}"
        for each in found
        if each["impact"] in {"serious", "critical"}
    ]
    assert serious == []


def test_the_accessibility_check_would_find_a_fault(opened):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = opened(bypass_csp=True)
    page.evaluate("() => { document.documentElement.removeAttribute('lang'); }")
    found = {each["id"] for each in axe.Axe().run(page).response["violations"]}
    assert "html-has-lang" in found


def test_the_page_draws_50_rows_however_many_answers_there_are(opened):
    """So that nothing stalls: what is drawn does not grow with what is held."""
    page = opened()
    assert page.locator("#answers-table tbody tr").count() == 50
    assert filtered(page, "lamp") == "1 to 50 of 5,000 answers"
    assert page.locator("#answers-table tbody tr").count() == 50
    assert page.evaluate("() => document.querySelectorAll('*').length") < 6000
