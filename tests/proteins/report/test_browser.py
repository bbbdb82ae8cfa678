"""The page in headless Chromium: layout, colours, keyboard, labels, hostile names, no requests."""

import pytest

from performers.proteins.report.page import write_report
from tests.proteins.report.browser import CHROMIUM, Browser
from tests.proteins.report.test_payload import reading
from tests.proteins.report.test_report import (
    HISTORY,
    HOSTILE,
    METRICS,
    SEQUENCE,
    _analysis,
    described,
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    markup = "<img src=x onerror=window.struck=1>"
    proteins = [
        reading(HOSTILE, SEQUENCE * 3, f"family={markup} {HOSTILE}", 1),
        reading(markup, SEQUENCE[:21], "family=b", 2),
        reading("x" * 10_000, SEQUENCE * 2, "family=b " + "y" * 10_000, 3),
        reading("too-long", SEQUENCE * 20, "family=c", 4),
        reading("蛋白質\u202e", SEQUENCE, f"family={markup}", 5),
    ]
    model = described(
        HOSTILE,
        settings={HOSTILE: HOSTILE},
        metrics={HOSTILE: METRICS["test"]},
        history=HISTORY,
        analysis=_analysis(name=HOSTILE, description=HOSTILE, sites=(3, 7)),
        proteins=proteins,
        available=5,
    )
    folder = tmp_path_factory.mktemp("report")
    return write_report(folder, models=[model], title=HOSTILE, permutations=9, max_residues=300)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def centre(browser, selector):
    """The middle of an element, scrolled into view."""
    return browser.run(
        f"""(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{
        block: "center", behavior: "instant" }}); const r = e.getBoundingClientRect();
        return [r.x + r.width / 2, r.y + r.height / 2]; }})()"""
    )


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_asks_for_nothing(browser, page, width, scheme):
    browser.open(page, width=width, scheme=scheme)
    assert browser.errors == []
    assert {url.split(":")[0] for url in browser.requests} == {"file", "data", "about"} & {
        url.split(":")[0] for url in browser.requests
    }
    assert [u for u in browser.requests if u.startswith("file")] == [page.resolve().as_uri()]
    assert browser.run("document.documentElement.scrollWidth") == width
    # Nothing reaches beyond the window but what scrolls by itself.
    beyond = browser.run(
        "[...document.querySelectorAll('body *')].filter((e) => !e.closest('.wide, dialog') &&"
        " e.getBoundingClientRect().right > innerWidth + 1)"
        ".map((e) => `${e.closest('[id]').id} ${e.textContent} ${e.outerHTML.slice(0, 99)}`)"
    )
    assert beyond == []
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is (scheme == "light")
    ink = browser.run(
        "[...document.querySelectorAll('[data-chart] svg text')].map((e) => e.getAttribute('fill'))"
    )
    assert len(ink) > 100
    assert set(ink) <= ({"#1d2430", "#566070"} if scheme == "light" else {"#e6e9ee", "#a9b3c1"}), (
        "texts of charts have the colours of the scheme"
    )


def test_names_stay_text_everywhere(browser, page):
    browser.open(page)
    for number in range(5):
        browser.run(f"document.querySelectorAll('#proteins tbody button')[{number}].click()")
    browser.run("document.querySelector('.head').click()")
    browser.wait("document.querySelector('dialog').open")
    assert "alert(1)" in browser.run("document.querySelector('#large-title').textContent")
    browser.press("Escape")
    browser.run("document.querySelectorAll('input[name=colour]')[2].click()")
    browser.wait("document.querySelector('#map svg').textContent.includes('<img')")
    # The tooltip of each dot, where the library writes markup of its own.
    for number in range(5):
        dot = f"#map .mark-symbol.role-mark path:nth-child({number + 1})"
        browser.point(*centre(browser, dot))
        browser.wait("document.querySelector('#vg-tooltip-element.visible')")
        told = browser.run("document.querySelector('#vg-tooltip-element').textContent")
        assert "guessed right" in told
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert browser.run("document.querySelectorAll('script').length") == 3
    assert browser.run("window.struck === undefined")
    assert browser.errors == []


def test_the_keyboard_does_what_the_mouse_does(browser, page):
    browser.open(page)
    order = (
        "[...document.querySelectorAll('#proteins tbody td:nth-child(2)')].map((e) => +e.innerText)"
    )
    browser.run("document.querySelector('[data-key=length]').focus()")
    browser.press("Enter")
    rising = browser.run(order)
    assert rising == sorted(rising)
    heading = "document.querySelector('[data-key=length]').closest('th').ariaSort"
    assert browser.run(heading) == "ascending"
    browser.press("Enter")
    assert browser.run(order) == rising[::-1]
    assert browser.run(heading) == "descending"
    browser.run("document.querySelector('#letters').focus()")
    browser.press("ArrowRight", "ArrowRight", "ArrowDown")
    told = browser.run("document.querySelector('#letters').getAttribute('aria-valuetext')")
    assert told.startswith("Residue 12: "), told
    assert "Likeliest others: " in told
    assert browser.run("document.querySelector('#reading').textContent") == told
    assert browser.run("document.querySelector('#letters b.here').innerText") == SEQUENCE[11]
    browser.press("End")
    assert browser.run("document.querySelector('#letters').ariaValueNow") == "99"
    browser.run("document.querySelectorAll('.head')[1].focus()")
    browser.press("Enter")
    browser.wait("document.querySelector('dialog').open")
    assert "layer 1, head 2" in browser.run("document.querySelector('#large-title').textContent")
    browser.run("document.querySelector('#canvas').focus()")
    browser.press("ArrowDown", "ArrowRight", "ArrowRight")
    weights = _analysis().maps[0][1]
    told = browser.run("document.querySelector('#value').textContent")
    share = float(told.split("gives ")[1].split("%")[0]) / 100
    assert abs(share - weights[1, 2]) < 0.005 * weights.max() + 1e-4
    browser.press("Escape")
    assert not browser.run("document.querySelector('dialog').open")


def test_the_mouse_chooses_proteins_residues_and_cells(browser, page):
    browser.open(page)
    chosen = "document.querySelector('tr.chosen .link').textContent"
    browser.point(*centre(browser, "#map .mark-symbol.role-mark path:nth-child(2)"), click=True)
    browser.wait("document.querySelector('#about').textContent.startsWith('<img src=x')")
    assert browser.run(chosen).startswith("<img src=x")
    assert browser.run("document.querySelectorAll('#letters b').length") == 21
    browser.point(*centre(browser, "#letters div:nth-child(2) b:nth-of-type(3)"))
    assert browser.run("document.querySelector('#reading').textContent").startswith("Residue 13:")
    browser.run("document.querySelector('#next').click()")
    assert browser.run(chosen).startswith("xxx")
    # A protein whose residues were left out is told, with what changes it.
    browser.run("document.querySelectorAll('#proteins tbody button')[3].click()")
    assert "--max-residues" in browser.run("document.querySelector('#about').textContent")
    browser.run("document.querySelector('#find').value = 'TOO'")
    browser.run("document.querySelector('#find').dispatchEvent(new Event('input'))")
    assert browser.run("document.querySelector('#found').textContent") == "1 of 5 proteins"
    browser.run("document.querySelector('.head').click()")
    browser.wait("document.querySelector('dialog').open")
    browser.point(*centre(browser, "#canvas"))
    assert "of its attention to" in browser.run("document.querySelector('#value').textContent")


def test_everything_that_is_operated_has_a_name(browser, page):
    browser.open(page)
    browser.call("Accessibility.enable")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "slider", "combobox", "searchbox", "radio", "region", "link", "columnheader")
    found = [node for node in nodes if node.get("role", {}).get("value") in roles]
    assert {node["role"]["value"] for node in found} == set(roles)
    assert [node["role"] for node in found if not node.get("name", {}).get("value")] == []
    labels = browser.run(
        "[...document.querySelectorAll('[data-chart][role=graphics-document]')]"
        ".map((element) => element.ariaLabel)"
    )
    assert all(labels)
    assert len(labels) == 7


def test_colours_follow_the_scheme_while_the_page_is_open(browser, page):
    browser.open(page, width=400)
    text = "document.querySelector('#map svg text').getAttribute('fill')"
    light = browser.run(text)
    browser.prefer("dark")
    browser.wait(f"{text} !== {light!r}")
    assert browser.errors == []
