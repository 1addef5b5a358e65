"""The trace page in a real browser: geometry, keyboard, light, dark and narrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, browser
from test_render import HOSTILE, TEXT, trace

from whiflash_sdk import Stretch
from whiflash_sdk.render import Turn, conversation_html

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    turns = [Turn(f"</title>{HOSTILE}", TEXT, trace(proposed=20), "<b>model</b>"), Turn("Second", TEXT, trace())]
    path = tmp_path_factory.mktemp("page") / "trace.html"
    path.write_text(conversation_html(turns, title="Recorded"), "utf-8")
    return path


def test_text_that_runs_to_the_left_is_read_from_the_right(chromium: Browser, tmp_path: Path) -> None:
    words = ["שלום ", "עולם ", "טוב"]
    ends = [0, 5, 10, 13]
    stretches = [
        {"start": n, "end": n + 1, "arm": "ar", "rounds": 1, "accepted": 0, "chars": [ends[n], ends[n + 1]]}
        for n in range(3)
    ]
    hebrew = trace().model_copy(update={"stretches": tuple(map(Stretch.model_validate, stretches))})
    (tmp_path / "page.html").write_text(conversation_html([Turn("Hebrew", "".join(words), hebrew)]), "utf-8")
    chromium.show(tmp_path / "page.html")
    lefts = [left for left, *_ in boxes(chromium, ".text .stretch")]
    assert lefts == sorted(lefts, reverse=True)
    assert len(lefts) == 3


SIZES = {"light": {}, "dark": {"dark": True}, "narrow": {"width": 360}}


@pytest.mark.parametrize("size", SIZES)
def test_it_shows_whole_and_fetches_nothing(chromium: Browser, page: Path, size: str, tmp_path: Path) -> None:
    chromium.show(page, **SIZES[size])
    chromium.shoot(tmp_path / f"{size}.png")
    assert (tmp_path / f"{size}.png").stat().st_size > 20_000
    asked = {event["request"]["url"] for event in chromium.methods("Network.requestWillBeSent")}
    assert asked == {page.as_uri()}
    assert not chromium.methods("Log.entryAdded")
    assert not chromium.methods("Runtime.consoleAPICalled")
    assert chromium.ask("document.title") == "Recorded", "hostile text set another"
    assert chromium.ask("document.querySelectorAll('script, img, b').length") == 0
    assert chromium.ask("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    ground = chromium.ask("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(13, 17, 23)" if size == "dark" else "rgb(246, 248, 250)")


def boxes(chromium: Browser, selector: str) -> list[list[float]]:
    """left, right, top, bottom of every element."""
    found: list[list[float]] = chromium.ask(
        f"[...document.querySelectorAll({selector!r})].map(e => {{ const r = e.getBoundingClientRect();"
        " return [r.left, r.right, r.top, r.bottom] })"
    )
    return found


def test_a_band_lies_in_its_lane_where_its_tokens_are(chromium: Browser, page: Path) -> None:
    chromium.show(page)
    first = "section:nth-of-type(1) "
    ((left, right, _, _),) = boxes(chromium, first + ".track")
    places = [(left, right) for left, right, _, _ in boxes(chromium, first + ".band")]
    tokens = [(1, 9), (9, 25), (25, 27), (27, 28)]
    for (begin, end), (start, stop) in zip(places, tokens, strict=True):
        assert begin == pytest.approx(left + (right - left) * start / 28, abs=0.5)
        assert end == pytest.approx(left + (right - left) * stop / 28, abs=0.5)
    lanes = [top for *_, top, _ in boxes(chromium, first + ".lane")]
    names = [top for *_, top, _ in boxes(chromium, first + ".name")]
    assert lanes == names == sorted(set(lanes))
    # Lanes are those of ar, diffusion, lookup, and what nobody knows.
    assert [lanes.index(top) for *_, top, _ in boxes(chromium, first + ".band")] == [0, 2, 1, 3]
    ((start, stop, top, bottom),) = boxes(chromium, first + ".track > .span")
    assert (start, stop) == pytest.approx((places[1][0], places[2][1]), abs=0.5)
    assert top < min(lanes)
    assert bottom > max(lanes)
    rounds = [right - left for left, right, _, _ in boxes(chromium, first + ".band:first-child i")][:2]
    assert rounds[0] / rounds[1] == pytest.approx(5 / 3, rel=0.02)


SHOWN = """[...document.querySelectorAll('.tip')].filter(e => getComputedStyle(e).clipPath == 'none').map(e => {
const c = e.closest('.timeline').querySelector('.chart'); c.scrollIntoView();
const t = e.getBoundingClientRect(), f = c.getBoundingClientRect();
const seen = document.elementFromPoint(t.x + t.width / 2, t.y + t.height / 2);
return [e.innerText, e.contains(seen) && t.top >= f.bottom && t.left >= f.left && t.right <= f.right + 1] })"""
"""Text of the explanation, and whether it is visible, below the lanes and as wide as they are."""


def test_tab_walks_the_timeline_and_says_why_it_switched(chromium: Browser, page: Path) -> None:
    chromium.show(page)
    chromium.ask("document.querySelector('section .scroll').focus()")
    assert chromium.ask(SHOWN) == []
    said = []
    for _ in range(4):
        chromium.press("Tab", 9)
        ((words, is_whole),) = chromium.ask(SHOWN)
        assert is_whole
        said.append(words.split("\n")[0])
    assert said[0] == "Began with ar: most expected tokens for the time"
    assert said[1].startswith("Switched from ar to lookup, json began")
    assert said[2] == "Switched from lookup to diffusion: a hint demanded it"
    assert said[3].startswith('Switched from diffusion to "><b>x, json ended: by <script>')
    chromium.press("Enter", 13)
    assert chromium.ask("location.hash") == "#turn-1-text-4"
    assert chromium.ask("getComputedStyle(document.querySelector(':target')).outlineStyle") == "solid"
