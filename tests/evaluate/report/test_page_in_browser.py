"""The page in a real browser, over the DevTools protocol: opened, clicked, resized; skipped where no Chromium is
installed.
"""

import pytest
from browser import Tab, needs_browser
from synthetic import synthetic_report
from tcsae.evaluate.report.page import render_page

DATA = "JSON.parse(document.getElementById('browser-data').textContent).saes[0].features"
pytestmark = needs_browser


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    page = tmp_path_factory.mktemp("page") / "index.html"
    page.write_text(render_page(synthetic_report(features=24)))
    return page.as_uri()


@pytest.fixture
def opened(tab, address) -> Tab:
    tab.width(1280)
    tab.open(address)
    tab.until("document.documentElement.dataset.browser === 'ready'")
    return tab


def heading(tab) -> str:
    return tab.js("document.querySelector('#feature-detail h3').textContent")


def test_opens_quietly_and_loads_nothing(opened):
    assert opened.js("document.querySelectorAll('main section').length") >= 9
    assert opened.said("Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening") == []
    asked = {event["params"]["request"]["url"].split("#")[0] for event in opened.said("Network.requestWillBeSent")}
    assert len(asked) == 1
    assert asked.pop().startswith("file:")


def test_a_click_shows_that_feature_and_its_passages(opened):
    opened.click("#option-7")
    assert heading(opened) == "Feature 7"
    assert opened.js("document.querySelectorAll('#feature-detail .passage').length") == 5
    assert opened.js("document.querySelectorAll('#feature-detail .passage:first-of-type .tok').length") == 60
    assert opened.js("location.hash") == "#feature=0.7"
    assert opened.js("document.querySelector('[aria-selected=true]').id") == "option-7"


def test_the_bar_over_a_token_is_its_activation(opened):
    opened.click("#option-7")
    shares = (
        "[...document.querySelectorAll('#feature-detail .tok')].map(t => "
        "Number(getComputedStyle(t).getPropertyValue('--a')))"
    )
    assert opened.js(f"JSON.stringify({shares}) === JSON.stringify({DATA}[7].p.flatMap(p => p.a.map(a => a / 100)))")
    assert opened.js(f"Math.max(...{shares})") == 1


def test_pointing_at_a_token_reads_its_position_and_value(opened):
    opened.click("#option-7")
    opened.click("#feature-detail .passage .tok[data-i='40']")
    read = opened.js("document.querySelector('#feature-detail .passage figcaption b').textContent")
    position = opened.js(f"{DATA}[7].p[0].s") + 40
    assert read.startswith(f"position {position}: ")
    opened.press("ArrowRight")
    read = opened.js("document.querySelector('#feature-detail .passage figcaption b').textContent")
    assert read.startswith(f"position {position + 1}: ")


def test_ordering_searching_and_keys(opened):
    opened.put("#pick-order", "density", "change")
    shown = opened.js("[...document.querySelectorAll('[role=option] > :nth-child(2)')].map(e => Number(e.textContent))")
    assert len(shown) == 24
    assert shown == sorted(shown, reverse=True)
    first = heading(opened)
    opened.js("document.getElementById('feature-list').focus()")
    opened.press("ArrowDown")
    assert heading(opened) != first
    opened.press("End")
    assert opened.js("document.querySelector('[role=option]:last-child').getAttribute('aria-selected')") == "true"
    opened.put("#pick-text", "17", "input")
    assert heading(opened) == "Feature 17"
    assert opened.js("document.getElementById('pick-count').textContent") == "1 of 24 features"


def test_undefined_numbers_sort_last_and_show_a_dash(opened):
    for order in ("eta_squared", "eta_squared:up"):
        opened.put("#pick-order", order, "change")
        assert opened.js("document.querySelector('[role=option]:last-child').textContent").startswith("3")
    assert "—" in opened.js("document.querySelector('[role=option]:last-child').textContent")


def test_another_autoencoder_and_a_link_into_the_page(tab, address):
    tab.open(address + "#feature=2.11")
    tab.until("document.documentElement.dataset.browser === 'ready'")
    assert heading(tab) == "Feature 11"
    assert "layer 12" in tab.js("document.querySelector('#feature-detail .why').textContent")
    tab.put("#pick-sae", "1", "change")
    assert tab.js("document.getElementById('feature-detail').className") == "detail heat-twin"
    tab.click("#feature-detail [data-goto]")
    assert heading(tab) == "Feature 18"


def test_hostile_tokens_do_nothing(opened):
    opened.click("#option-0")
    assert "<script>alert(1)</script>" in opened.js("document.querySelector('#feature-detail .tokens').textContent")
    assert opened.js("document.querySelectorAll('img, #feature-detail script, iframe').length") == 0
    assert opened.said("Page.javascriptDialogOpening", "Runtime.exceptionThrown") == []


@pytest.mark.parametrize("pixels", [360, 768, 1280])
def test_only_tables_scroll_sideways(opened, pixels):
    opened.width(pixels)
    assert opened.js("document.documentElement.scrollWidth") <= pixels
    outside = f"!e.closest('.scroll, svg, details') && e.getBoundingClientRect().right > {pixels} + 1"
    out = opened.js(
        f"[...document.querySelectorAll('main *')].filter(e => {outside}).map(e => e.tagName + '.' + e.className)"
    )
    assert out == []
    small = "[...document.querySelectorAll('.panel .chart text')].map(e => 11.5 * e.getCTM().a)"
    assert opened.js(f"Math.min(...{small})") >= 9


def test_on_a_phone_the_verdict_is_in_sight(opened):
    opened.width(360)
    words = "[...document.querySelectorAll('#twins > div > .scroll td.word')]"
    assert (
        opened.js(
            f"Math.max(...{words}.map(t => t.getBoundingClientRect().right - "
            "parseFloat(getComputedStyle(t).paddingRight)))"
        )
        <= 360
    )


def test_every_table_fits_an_a4_page_in_print(opened):
    opened.send("Emulation.setEmulatedMedia", media="print")
    try:
        opened.width(688)  # what the margins leave of 210 mm
        tables = (
            "[...document.querySelectorAll('#twins table, #table table, #published table')].filter(t => t.offsetWidth)"
        )
        assert opened.js(f"Math.max(...{tables}.map(t => t.getBoundingClientRect().right))") <= 689
    finally:
        opened.send("Emulation.setEmulatedMedia", media="")


def test_without_script_everything_but_the_browser_is_there(tab, address):
    tab.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.events.clear()
        tab.send("Page.navigate", url=address)
        tab.wait_for("Page.loadEventFired")
        root = tab.send("DOM.getDocument", depth=0)["root"]["nodeId"]
        html = tab.send("DOM.getOuterHTML", nodeId=root)["outerHTML"]
    finally:
        tab.send("Emulation.setScriptExecutionDisabled", value=False)
    assert 'id="browser" class="browser" hidden=""' in html
    assert "needs JavaScript" in html
    assert html.count('class="chart"') > 15
