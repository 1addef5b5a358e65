"""The trace page in a real browser: geometry, pointer, keyboard, what is read aloud, light, dark and narrow."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser, browser
from test_render import HOSTILE, TEXT, trace

from whiflash_sdk import Trace
from whiflash_sdk.render import Turn, conversation_html

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

LONG_TOKENS = 1500


def long_turn() -> Turn:
    """An answer of many stretches, each token of which is one word."""
    chance, words, stretches = random.Random(0), ["once "], []
    while len(words) < LONG_TOKENS:
        counts = [chance.randint(1, 9) for _ in range(chance.randint(1, 6))]
        start, begin = len(words), sum(map(len, words))
        words += [f"{chance.choice(['the', 'answer', 'goes', 'on'])} " for _ in range(sum(counts))]
        stretches.append(
            {
                "start": start,
                "end": len(words),
                "arm": chance.choice(["ar", "diffusion", "lookup", "structure", "none"]),
                "rounds": len(counts),
                "proposed": 8 * len(counts),
                "accepted": sum(counts) - len(counts),
                "reason": "score",
                "span": "code" if 400 < start < 900 else None,
                "round_tokens": counts,
                "chars": [begin, sum(map(len, words))],
            }
        )
    arms: dict[str, dict[str, int]] = {}
    for stretch in stretches:
        totals = arms.setdefault(
            str(stretch["arm"]), dict.fromkeys(("rounds", "tokens", "proposed", "accepted"), 0)
        )
        for name in ("rounds", "proposed", "accepted"):
            totals[name] += stretch[name]  # type: ignore[operator]
        totals["tokens"] += stretch["end"] - stretch["start"]  # type: ignore[operator]
    sums: dict[str, Any] = {name: sum(arm[name] for arm in arms.values()) for name in ("rounds", "tokens")}
    found = {
        "version": 1,
        "policy": "auto",
        "arms": arms,
        "stretches": stretches,
        "seconds": 12.5,
        "gain": 1.7,
    }
    return Turn(
        "A long answer", "".join(words), Trace.model_validate({**found, **sums, "switches": 1}), "model"
    )


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    turns = [Turn(f"</title>{HOSTILE}", TEXT, trace(proposed=20), "<b>model</b>"), long_turn()]
    path = tmp_path_factory.mktemp("page") / "trace.html"
    path.write_text(conversation_html(turns, title="Recorded"), "utf-8")
    return path


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


def test_the_mouse_shows_the_same(chromium: Browser, page: Path) -> None:
    chromium.show(page)
    chromium.point("section .band.arm-lookup")
    ((words, is_whole),) = chromium.ask(SHOWN)
    assert is_whole
    assert "16 tokens · 1 round · acceptance length 16.00 · 15 of 20 drafts accepted" in words
    assert '{"city":' in words


def test_a_long_answer_zooms_and_its_text_collapses(chromium: Browser, page: Path) -> None:
    chromium.show(page)
    second = "document.querySelector('section:nth-of-type(2) {}')"
    track, text = second.format(".track"), second.format(".text")
    fitting = chromium.ask(f"{track}.offsetWidth")
    assert chromium.ask("document.querySelectorAll('section:nth-of-type(1) .zoom').length") == 0
    chromium.ask(second.format('[value="1"]') + ".focus()")
    for factor in (2, 4, 8):
        chromium.press("ArrowRight", 39)
        assert chromium.ask(f"{track}.offsetWidth") == pytest.approx(factor * fitting, abs=2)
        assert chromium.ask("document.documentElement.scrollWidth <= innerWidth")
    hidden, shown = chromium.ask(f"[{text}.scrollHeight, {text}.clientHeight]")
    assert shown < hidden / 2
    chromium.ask(second.format(".more input") + ".focus()")
    chromium.press(" ", 32)
    assert chromium.ask(f"[{text}.scrollHeight, {text}.clientHeight]") == [hidden, hidden]


def test_it_can_be_read_aloud(chromium: Browser, page: Path) -> None:
    """What a screen reader is given: bands by name, in the order of the answer, and tables of the same."""
    chromium.show(page)
    nodes = [node for node in chromium.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    read = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes]
    links = [name for role, name in read if role == "link"]
    assert links[0] == f"</title>{HOSTILE}"
    bands = [name for name in links if "tokens" in name]
    assert bands[0].startswith("Began with ar: most expected tokens for the time tokens 1–9 · 8 tokens")
    assert bands[1].startswith("Switched from ar to lookup, json began")
    listed = [node for node in nodes if node["role"]["value"] == "listitem"]
    assert len(bands) == len(trace(proposed=20).stretches) + len(long_turn().trace.stretches)
    assert len(listed) >= len(bands)
    assert "table" in {role for role, _ in read}
    assert {name for role, name in read if role == "heading"} >= {"Recorded", "2. A long answer"}
    assert not [name for role, name in read if role == "link" and not name]
