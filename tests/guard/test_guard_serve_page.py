"""The page in a real browser: keys alone, no request but its own, and who cannot see.

Runs where Playwright is installed and a Chromium of the system is found.
"""

import shutil

import pytest
from guard_server import LAMP, WINDOW, serving

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def server(nursery, word_guard, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    words = ("--guard", word_guard, "--policy", "observe")
    with serving(nursery, folder, *words) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, server):
    contexts = []

    def open_page(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.asked, page.faults = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda line: page.faults.append(line.text))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.goto(server.url)
        page.wait_for_function(
            "() => document.getElementById('about').textContent.includes('policy')"
        )
        return page

    yield open_page
    for context in contexts:
        context.close()


def ask(page, text):
    """By keys alone: type where the focus is, and send."""
    page.keyboard.type(text)
    page.keyboard.press("Control+Enter")
    page.wait_for_function(
        "() => /guard/i.test(document.getElementById('status').textContent)"
    )
    return page.locator("#status").inner_text()


def test_an_answer_is_watched_by_keys_alone_and_nothing_else_is_asked(opened, server):
    page = opened()
    told = ask(page, LAMP)
    assert "The guard fired, and let it go on." in told
    assert "Put the parts together" in page.locator("#answer").inner_text()
    assert "nothing wrong with it" in page.locator("#thinking").inner_text()
    # Readable without colour: the token is marked, and its score stands in words.
    # It is the one behind which the word comes.
    fired = page.locator("#answer .fired")
    assert fired.count() == 1
    assert fired.evaluate("e => e.nextSibling.textContent") == " parts"
    mark = fired.evaluate("e => getComputedStyle(e, '::after').content")
    assert mark == '"▲"'
    assert "threshold 8.00" in page.locator("#score").inner_text()
    page.locator("#told summary").focus()
    page.keyboard.press("Enter")
    rows = page.locator("#rows tr")
    assert rows.count() > 40
    assert "word" in rows.last.inner_text()
    own = {"", "page.css", "page.js", "v1/models", "v1/chat/completions"}
    assert {url.removeprefix(f"{server.url}/") for url in page.asked} <= {
        *own,
        "favicon.ico",
    }
    assert [f for f in page.faults if "favicon" not in f and "404" not in f] == []


def test_an_answer_that_does_not_fire_is_said_to_be_fine(opened):
    page = opened()
    assert "The guard did not fire." in ask(page, WINDOW)
    assert page.locator("#answer .fired").count() == 0


def test_every_control_is_reached_by_keys_and_shows_it(opened):
    page = opened()
    page.locator("details summary").first.click()
    reached = []
    page.locator("#prompt").focus()
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("() => document.activeElement.id || 'summary'"))
    assert {"temperature", "seed", "key", "send"} <= set(reached)
    page.locator("#send").focus()
    outline = "() => getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) != "none"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_accessibility_check_has_no_serious_findings(opened, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    # The check is a script of its own, which the page's policy would refuse.
    page = opened(color_scheme=scheme, bypass_csp=True)
    ask(page, LAMP)
    page.locator("#told summary").click()
    found = axe.Axe().run(page).response["violations"]
    serious = [
        f"{each['id']}: {each['help']}: {[n['target'] for n in each['nodes'][:3]]}"
        for each in found
        if each["impact"] in {"serious", "critical"}
    ]
    assert serious == []


def test_what_the_page_may_load_is_its_own_alone(opened):
    page = opened()
    page.evaluate("() => { new Image().src = 'http://127.0.0.1:9/leak.png'; }")
    page.wait_for_timeout(200)
    assert any("Content Security Policy" in fault for fault in page.faults)


def test_a_narrow_window_does_not_scroll_sideways(opened):
    page = opened(viewport={"width": 360, "height": 740})
    ask(page, WINDOW)
    width = page.evaluate("() => document.documentElement.scrollWidth")
    assert width <= 360
