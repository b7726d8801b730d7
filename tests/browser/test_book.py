"""The built book in a real browser: search finds, a page without a kernel says so, nothing runs off a phone's screen."""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import re
import threading
from pathlib import Path
from urllib.parse import urlencode

import pytest

from book.builder import planner
from course_lib.common.project import PROJECT
from course_lib.common.units import gib
from support.hygiene_code import MAX_WIDTH
from support.lab import PATIENCE_MS, QUIET, browser

SHOTS = PROJECT / "book" / "_build" / "screenshots"
THEMES = ("light", "dark")


@pytest.fixture(scope="module")
def site(built: Path):
    """The book behind a web server of this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=os.fspath(built)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def window():
    """One browser for all tests of this file, which keeps the scripts that it has compiled, as a reader's does."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=list(QUIET))
        yield chromium.new_context(viewport={"width": 1300, "height": 900})
        chromium.close()


@contextlib.contextmanager
def watched(window, site: str, built: Path):
    """A page that fails the test if it asks another machine for anything, or if a script of it fails."""
    opened = window.new_page()
    opened.set_default_timeout(PATIENCE_MS)
    elsewhere: list[str] = []
    failures: list[str] = []
    opened.on("pageerror", lambda error: failures.append(str(error)))
    own = (site, built.as_uri(), "data:", "blob:")
    opened.on("request", lambda request: None if request.url.startswith(own) else elsewhere.append(request.url))
    yield opened
    opened.close()
    assert elsewhere == [] and failures == []


@pytest.fixture
def page(window, site: str, built: Path):
    """A fresh page."""
    with watched(window, site, built) as opened:
        yield opened


@pytest.fixture(scope="module")
def lesson(window, site: str, built: Path):
    """The small lesson, opened once for all tests that only look at it, each at parts of its own."""
    with watched(window, site, built) as opened:
        opened.goto(f"{site}/lessons/07_small.html")
        yield opened


def test_search_finds_a_page(page, site: str) -> None:
    """A word of the glossary is found from the search page, with a link that leads there."""
    page.goto(f"{site}/search.html?q=microbatches")
    page.wait_for_selector("#search-results li a")
    targets = [link.get_attribute("href") for link in page.locator("#search-results li a").all()]
    assert any("glossary" in target for target in targets)
    page.screenshot(path=str(_shot("book_search.png")))


def test_a_control_without_a_kernel_says_so(lesson) -> None:
    """A widget is drawn, cannot be turned in vain, and a sentence says where it works; in the dark theme it is readable."""
    lesson.wait_for_selector(".widget-dropdown select")
    lesson.wait_for_selector(".needs-a-kernel >> text=Run this lesson")
    assert lesson.locator(".widget-dropdown select").is_disabled() and lesson.locator(".needs-a-kernel").count() == 1
    lesson.evaluate("document.documentElement.dataset.theme = 'dark'")
    label = lesson.locator(".widget-dropdown label")
    colour = label.evaluate("label => getComputedStyle(label).color")
    assert min(map(int, colour.removeprefix("rgb(").split(")")[0].split(",")[:3])) > 150, "dark words on a dark page"
    lesson.screenshot(path=str(_shot("book_widget_dark.png")))


def test_a_question_unfolds_its_reason_without_a_kernel(lesson) -> None:
    """Nothing is told before a click; then the reason stands below its option, readable in the dark theme, too."""
    lesson.evaluate("document.documentElement.dataset.theme = 'dark'")
    options = lesson.locator(".quiz details")
    reason = options.first.locator("p")
    assert options.count() == 9 and not reason.is_visible()
    options.first.locator("summary").click()
    assert reason.is_visible() and not options.last.locator("p").is_visible()
    colour = reason.evaluate("words => getComputedStyle(words).color")
    assert min(map(int, colour.removeprefix("rgb(").split(")")[0].split(",")[:3])) > 150, "dark words on a dark page"
    behind = lesson.locator(".output.text_html", has=lesson.locator(".quiz")).evaluate(
        "box => getComputedStyle(box).backgroundColor"
    )
    assert behind == "rgba(0, 0, 0, 0)", "a light card behind light words"
    lesson.screenshot(path=str(_shot("book_quiz_dark.png")))


def test_the_path_shows_the_place(page, site: str) -> None:
    """At the head of a lesson the present step is filled, and its number can be read on it in both themes."""
    page.goto(f"{site}/lessons/07_small.html")
    here = page.locator(".course-path [aria-current=page]")
    assert here.inner_text() == "07" and here.get_attribute("aria-label").startswith("Lesson 07 ")
    for theme in THEMES:
        page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        words, behind = here.evaluate(
            "step => ['color', 'backgroundColor']"
            ".map(name => getComputedStyle(step)[name].match(/\\d+/g).slice(0, 3).map(Number))"
        )
        assert abs(sum(words) - sum(behind)) > 250, f"{theme}: as dark as what is behind it"
        page.screenshot(path=str(_shot(f"book_path_{theme}.png")))
    page.goto(f"{site}/troubleshooting.html")
    page.locator(".course-path a").first.click()
    assert page.url.endswith("/lessons/07_small.html"), "a page beside the lessons shows the path, too"


def test_a_symptom_is_found_by_its_words(page, site: str) -> None:
    """A pasted line leaves the rows that fit and hides empty tables; other words say so; nothing asked shows everything."""
    page.goto(f"{site}/troubleshooting.html")
    field, said = page.locator("#find-a-symptom input"), page.locator("#find-a-symptom [role=status]")
    rows = page.locator("table:has(thead :text-is('what you see')) tbody tr:visible")
    total = int(said.inner_text().split()[0])
    assert total >= 45 and rows.count() >= total
    field.fill("RuntimeError: EADDRINUSE")
    assert said.inner_text().startswith("No row has all of these words; nearest, with 1 of 2: 1 row")
    assert rows.count() == 1 and "Address already in use" in rows.first.inner_text()
    assert not page.get_by_role("heading", name="The setup fails").is_visible()
    field.fill("Connection closed by peer")
    assert re.fullmatch(rf"\d+ rows? of {total}", said.inner_text()) and "rank 3 is gone" in rows.first.inner_text()
    for theme in THEMES:
        page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        page.screenshot(path=str(_shot(f"book_symptom_{theme}.png")))
    field.fill("qwertz")
    assert said.inner_text() == "No row has any of these words." and rows.count() == 0
    field.fill("")
    assert said.inner_text() == f"{total} symptoms"
    page.goto(f"{site}/troubleshooting.html?symptom=eaddrinuse")
    assert said.inner_text() == f"1 row of {total}"


def test_a_slider_steps_through_a_pipeline_without_a_kernel(lesson) -> None:
    """At the end all passes are seen, at time 1 the first alone, and a stage keeps what it has not taken back yet."""
    lesson.evaluate("document.documentElement.dataset.theme = 'dark'")
    steps, strong = (
        lesson.locator("figure.steps"),
        "marks => marks.filter(mark => +getComputedStyle(mark).opacity === 1)",
    )
    passes = f"{strong}.length"
    kept = f"{strong}.map(mark => mark.textContent)"
    assert steps.locator("g").evaluate_all(passes) == 8
    assert steps.locator("text[style]").evaluate_all(kept) == ["keeps 0", "keeps 0"]
    slider = steps.get_by_role("slider", name="time")
    slider.fill("1")
    assert steps.locator("g").evaluate_all(passes) == 1
    assert steps.locator("text[style]").evaluate_all(kept) == ["keeps 1", "keeps 0"]
    steps.get_by_role("button", name="Play").click()
    lesson.wait_for_function("document.querySelector('figure.steps input').value === '1'")
    lesson.wait_for_function("document.querySelector('figure.steps input').value === '6'")
    assert steps.locator("g").evaluate_all(passes) == 8
    lesson.screenshot(path=str(_shot("book_steps_dark.png")), full_page=True)


def test_the_planners_frames_move(page, site: str) -> None:
    """A reader steps from one planned layout to the next, without a kernel."""
    page.goto(f"{site}/lessons/08_frames.html")
    frame = page.locator(".jupyter-widgets img")
    frame.locator("visible=true").first.wait_for()
    first = frame.locator("visible=true").first.get_attribute("alt")
    page.locator(".widget-toggle-button", has_text="TP=2").click()
    page.locator('.jupyter-widgets img[alt*="TP=2"]').wait_for(state="visible")
    shown = frame.locator("visible=true")
    assert "TP=1" in first and shown.count() == 1 and "TP=2" in shown.get_attribute("alt")
    page.locator(".widget-toggle-button", has_text="TP=1").scroll_into_view_if_needed()
    page.screenshot(path=str(_shot("book_frames.png")))


PAGES = ("index", "eight_gpu_plan", "memory_planner", "before_the_first_step", "troubleshooting", "lessons/07_small")


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_shows_the_whole_width(page, site: str, name: str) -> None:
    """At 390 pixels no page is wider than the screen."""
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(f"{site}/{name}.html")
    page.wait_for_timeout(500)
    root = "document.documentElement"
    assert page.evaluate(f"{root}.scrollWidth - {root}.clientWidth") == 0
    page.screenshot(path=str(_shot(f"book_phone_{name.replace('/', '_')}.png")))


@pytest.mark.parametrize("name", ["troubleshooting", "what_runs_where", "trust", "versions"])
def test_a_table_of_words_fits_a_phone(page, site: str, name: str) -> None:
    """Names of code go on below at their joints, so that nobody scrolls sideways from a symptom to its cure."""
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(f"{site}/{name}.html")
    beyond = "tables => tables.map(table => table.scrollWidth - table.parentElement.clientWidth)"
    assert max(page.locator("table.table").evaluate_all(beyond)) <= 0


def test_a_figure_on_a_phone_keeps_its_words_readable(page, site: str) -> None:
    """It is not shrunk to the width of the screen: it moves sideways in its own frame, and the page does not."""
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(f"{site}/lessons/07_small.html")
    figure = page.locator("div.cell_output > a.image-reference").first
    assert figure.locator("img").bounding_box()["width"] > 500 and figure.bounding_box()["width"] <= 390


def test_a_wide_table_fits(lesson) -> None:
    """Long names go on below in their cells: nobody scrolls sideways to find a column, and no number is cut in two."""
    table = lesson.locator("div.cell_output table").first
    width, room = table.evaluate("table => [table.scrollWidth, table.closest('.output').clientWidth]")
    assert width <= room
    number = table.locator("td", has_text="3e-05")
    lines = number.evaluate(
        "cell => { const words = document.createRange(); words.selectNodeContents(cell);"
        " return words.getClientRects().length }"
    )
    assert lines == 1


LOOK = """table => ['th', 'td'].map(name => getComputedStyle(table.querySelector(`${name}:not([class*=blank])`)))
    .flatMap(style => ['fontSize', 'padding', 'borderTop', 'borderLeft', 'borderBottom', 'backgroundColor', 'color',
        'verticalAlign'].map(property => style[property]))"""


def test_tables_look_the_same_wherever_they_stand(lesson) -> None:
    """A table of the page, a table with its long cells whole, and a frame of pandas have one size, one room, one line."""
    for theme in THEMES:
        lesson.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        looks = [table.evaluate(LOOK) for table in lesson.locator(".bd-article table").all()]
        assert len(looks) == 3 and looks[0] == looks[1] == looks[2], theme


LONG_LINES = """blocks => blocks.filter(block => {
    const style = getComputedStyle(block), lines = block.textContent.replace(/\\n$/, '').split('\\n').length;
    const inner = block.clientHeight - parseFloat(style.paddingTop) - parseFloat(style.paddingBottom);
    return Math.round(inner / parseFloat(style.lineHeight)) > lines || block.scrollWidth > block.clientWidth;
}).map(block => block.textContent)"""


def test_no_code_wraps_or_scrolls(page, site: str, built: Path) -> None:
    """At 1,300 pixels each line of code is one line: those of all pages, and the widest that a lesson may have."""
    widest = 0
    for path in sorted(built.glob("*.html")) + [built / "lessons" / "07_small.html"]:
        page.goto(f"{site}/{path.relative_to(built)}")
        page.evaluate("document.querySelectorAll('details').forEach(folded => { folded.open = true })")
        blocks = page.locator("div.highlight pre")
        assert blocks.evaluate_all(LONG_LINES) == [], path.name
        widest = max([widest, *(len(line) for text in blocks.all_text_contents() for line in text.splitlines())])
    assert widest >= MAX_WIDTH


def test_the_side_bar_has_the_parts_and_the_numbers(page, site: str) -> None:
    """Captions in the order of the contents, a part without a lesson left out, and the number before a lesson's title."""
    page.goto(f"{site}/index.html")
    side = page.locator(".bd-sidebar-primary")
    captions = side.locator(".caption-text").all_inner_texts()
    assert captions == ["II. Execution", "Beside the lessons", "For teachers and maintainers"]
    assert "07 · A small lesson" in side.locator("a").all_inner_texts()


def test_paper_shows_the_article_alone(page, site: str) -> None:
    """In print sidebars and folded solutions are gone, and the page stays black on white even from the dark theme."""
    page.goto(f"{site}/eight_gpu_plan.html")
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.emulate_media(media="print")
    assert not page.locator(".bd-sidebar-primary").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    printed = page.pdf(path=str(_shot("eight_gpu_plan.pdf")), format="A4")
    assert b"/Count 1\n" in printed, "the plan on one page prints on one page"

    page.emulate_media(media="screen")
    page.goto(f"{site}/lessons/07_small.html")
    folded = page.locator("details.hide")
    assert folded.count() and all(each.is_visible() for each in folded.all())
    page.emulate_media(media="print")
    assert not any(each.is_visible() for each in folded.all())


def shown(page) -> dict[str, str]:
    """The planner's table: GiB by component, as the page says them."""
    rows = page.locator("#memory-planner tbody tr")
    return dict(zip(rows.locator("th").all_inner_texts(), rows.locator("td").all_inner_texts(), strict=True))


@pytest.mark.parametrize("width", [1300, 390])
def test_the_planner_plans_without_a_kernel(page, site: str, width: int) -> None:
    """Choices that an address hands on show the bytes and the lines of the data, whatever the width of the screen."""
    plans = planner.read()
    page.set_viewport_size({"width": width, "height": 800})
    checked = (
        "[...document.querySelectorAll('#memory-planner :checked')].map(input => `${input.name}=${input.value}`).sort()"
    )
    for choice in planner.sample(60, seed=7):
        page.goto(f"{site}/memory_planner.html#{urlencode(choice)}")
        wanted = sorted(f"{lever}={value}" for lever, value in choice.items())
        page.wait_for_function(f"wanted => String({checked}) === String(wanted)", arg=wanted)
        planned, told = planner.planned(choice, plans), page.locator("#memory-planner").inner_text()
        if isinstance(planned, str):
            assert all(word in told for word in planned.split()[:12])
            assert "refused" in told or "not planned" in told
            continue
        total = sum(planned.values())
        expected = {part: f"{gib(size):.1f}" for part, size in planned.items() if part != "whole layers" or size}
        expected["together"] = f"{gib(total):.1f}"
        assert expected.items() <= shown(page).items()
        usable = planner.row_of(choice, plans)["usable"][choice["micro"]]["usable"]
        assert ("does not fit" in told) == (total > usable)
        assert page.locator("#memory-planner pre").text_content() == planner.code(choice)
    root = "document.documentElement"
    assert page.evaluate(f"{root}.scrollWidth - {root}.clientWidth") == 0


def test_the_planner_answers_to_keys_and_keeps_its_choice_in_the_address(page, site: str) -> None:
    """Arrow keys change a lever, the address follows, and whoever opens that address sees the same; a wrong one is told."""
    page.goto(f"{site}/memory_planner.html")
    page.get_by_role("group", name="Tensor parallel (TP)").get_by_role("radio", name=re.compile("^2 ")).focus()
    before = shown(page)["together"]
    page.keyboard.press("ArrowRight")
    assert "TP=4" in page.locator("#memory-planner .verdict").inner_text() and shown(page)["together"] != before
    address, now = page.url, shown(page)
    assert "tp=4" in address
    page.goto("about:blank")
    page.goto(address)
    assert shown(page) == now
    page.goto(address.replace("tp=4", "tp=3"))
    assert "tp=3, which is no choice here" in page.locator("#memory-planner .verdict").inner_text()
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.screenshot(path=str(_shot("book_planner_dark.png")))


def test_the_planner_works_from_a_file(page, built: Path) -> None:
    """The archive is opened without a server: the plans are in the page, so nothing has to be fetched."""
    page.goto((built / "memory_planner.html").as_uri())
    page.get_by_role("group", name="Model").get_by_role("radio", name="3B").check()
    assert page.locator("#memory-planner .verdict").inner_text().startswith("3B, TP=2")


def _shot(name: str) -> Path:
    SHOTS.mkdir(parents=True, exist_ok=True)
    return SHOTS / name
