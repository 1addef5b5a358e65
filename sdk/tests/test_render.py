"""The renderers: nothing the model writes acts, everything the trace says shows, and a real browser agrees."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from whiflash_sdk import Stretch, Trace, routing, wrap
from whiflash_sdk.render import Turn, conversation_html, html, terminal

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;'\""
STRETCHES: list[dict[str, Any]] = [
    {
        "start": 1,
        "end": 9,
        "arm": "ar",
        "rounds": 2,
        "accepted": 6,
        "reason": "score",
        "round_tokens": [5, 3],
    },
    {"start": 9, "end": 25, "arm": "lookup", "rounds": 1, "accepted": 15, "reason": "span", "span": "json"},
    {"start": 25, "end": 27, "arm": "diffusion", "rounds": 1, "accepted": 1, "reason": "pin", "span": "json"},
    {"start": 27, "end": 28, "arm": '"><b>x', "rounds": 1, "accepted": 0, "reason": HOSTILE},
]
TEXTS = [f"hi {HOSTILE}\n", '{"city": ', '"Zürich"}', "\x00\x1b[31m\x9b2J\u202edone\ud800"]


def trace(*, cut: bool = True) -> Trace:
    stretches = [{**s, "text": t if cut else None} for s, t in zip(STRETCHES, TEXTS, strict=True)]
    arms = {s["arm"]: {"rounds": s["rounds"], "tokens": s["end"] - s["start"]} for s in STRETCHES}
    totals = {"rounds": 5, "tokens": 27, "switches": 3, "arms": arms, "stretches": stretches}
    return Trace.model_validate({"version": 1, "policy": "auto", **totals})


TEXT = "I" + "".join(TEXTS) + "!"


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text outside of style and title."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_what_the_model_writes_stays_text() -> None:
    page = html(trace(), TEXT, title=HOSTILE)
    page.encode()
    elements = Elements(page)
    assert not {"script", "img", "b", "a", "link", "iframe"} & {name for name, _ in elements.tags}
    assert not [name for _, attributes in elements.tags for name in attributes if name.startswith("on")]
    assert HOSTILE in elements.text
    assert "default-src 'none'" in str(elements.named("meta")[1]["content"])
    assert not re.search(r"https?://|url\(", page)


def test_stretches_spans_rounds_and_totals_show() -> None:
    elements = Elements(html(trace(), TEXT))
    focusable = [a for a in elements.named("span") if a.get("tabindex") == "0"]
    expected = ["stretch arm-ar", "stretch arm-lookup", "stretch arm-diffusion", "stretch arm-other"]
    assert [a["class"] for a in focusable] == expected
    assert [a["class"] for a in elements.named("i")] == [
        "arm-ar",
        "arm-ar",
        "arm-lookup",
        "arm-diffusion",
        "arm-other",
    ]
    assert elements.text.count("[json ") == 1
    assert elements.text.count(" json]") == 1
    assert "lookup · 16 tokens · 1 round · acceptance length 16.00 · by span · in json" in elements.text
    assert "policy auto · 27 tokens · 5 rounds · acceptance length 5.40 · 3 switches" in elements.text


def pointing(text: str | None = None) -> Trace:
    """The same response as servers send it now: offsets into the text, whose first character is the prefill's."""
    stretches, end = [], 1
    for stretch, own in zip(STRETCHES, TEXTS, strict=True):
        stretches.append({**stretch, "chars": [end, end + len(own)], "proposed": 20})
        end += len(own)
    return trace().model_copy(
        update={"stretches": tuple(map(Stretch.model_validate, stretches)), "text": text}
    )


@pytest.mark.parametrize(("given", "own"), [(TEXT, None), ("", TEXT), ("f(x)", TEXT)])
def test_offsets_show_as_texts_did(given: str, own: str | None) -> None:
    assert html(pointing(own), given) == html(trace(), TEXT)
    assert terminal(pointing(own), given) == terminal(trace(), TEXT)


def test_what_no_round_wrote_between_two_stretches_is_shown() -> None:
    """After a retraction a token comes from a prefill."""
    first, second = ({**STRETCHES[1], "chars": chars, "span": "json"} for chars in ([1, 3], [4, 6]))
    found = trace().model_copy(update={"stretches": tuple(map(Stretch.model_validate, (first, second)))})
    assert "[json a‹lookup›bcd‹lookup›ef json]g" in terminal(found, "abcdefg", colour=False)


def test_offsets_that_lie_beyond_the_text_colour_nothing() -> None:
    assert "not coloured" in Elements(html(pointing(), TEXT[:20])).text


def test_a_summary_shows_its_sums_and_says_what_it_is() -> None:
    arms = {"ar": {"rounds": 2, "tokens": 8, "proposed": 10, "accepted": 6}}
    totals = {"rounds": 2, "tokens": 8, "arms": arms, "reasons": {"score": 1, HOSTILE: 1}}
    found = Trace.model_validate({"version": 1, "policy": "auto", **totals})
    elements = Elements(html(found, "the text"))
    for words in ("the text", 'trace="full"', "6 of 10", "1 round by score", "EAGLE-3", HOSTILE):
        assert words in elements.text
    assert not elements.named("script")
    shown = terminal(found, "the text", colour=False)
    for words in ("the text", "1 round by score", "6 of 10"):
        assert words in shown


def test_a_trace_prints_as_a_few_lines(client: OpenAI) -> None:
    answer = wrap(client).completions.create(model="m", prompt="x")
    assert f"{routing(answer)}" == (
        "policy auto · 14 tokens · 3 rounds · acceptance length 4.67 · 1 switch\n"
        "2 rounds by score · 1 round by span\n"
        "drafter       rounds  tokens  acceptance length   drafts accepted\n"
        "ar                 2       6               3.00            4 of 8\n"
        "lookup             1       8               8.00            7 of 9\n"
        "all                3      14               4.67          11 of 17"
    )
    assert "\x1b" not in str(trace())
    assert repr(trace()).startswith("Trace(version=1"), "all of it, for who debugs"


def test_a_notebook_shows_the_figures_and_obeys_nothing() -> None:
    elements = Elements(trace()._repr_html_())
    tables = {"table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td"}
    assert {name for name, _ in elements.tags} <= {
        "div",
        "p",
        "ul",
        "li",
        "em",
        "details",
        "summary",
        *tables,
    }
    assert {name for _, attributes in elements.tags for name in attributes} <= {"scope", "class"}
    for words in ("policy auto", "Acceptance length", "5 rounds", HOSTILE, "json"):
        assert words in elements.text


def test_a_newcomer_is_told_what_the_words_mean() -> None:
    elements = Elements(html(trace(), TEXT))
    for words in ("without a drafter it is 1", "DFlash: a block of tokens at once", "a hint demanded it"):
        assert words in elements.text
    assert "plain decoding" not in elements.text, "what was not used needs no explanation"


def test_the_prefills_token_is_part_of_the_text_and_of_its_span() -> None:
    stretch = {**STRETCHES[1], "start": 1, "span": "tool_call", "text": 'tool_call>{"name"'}
    totals = {"rounds": 1, "tokens": 16, "arms": {"lookup": {"rounds": 1, "tokens": 16}}}
    given = {"version": 1, "policy": "auto", **totals, "stretches": [stretch], "prefill_text": "<"}
    found = Trace.model_validate(given)
    assert '[tool_call <tool_call>{"name"' in Elements(html(found, "parsed: name()")).text
    assert "[tool_call <‹lookup›tool_call>" in terminal(found, colour=False)


def test_text_that_could_not_be_cut_is_shown_whole() -> None:
    elements = Elements(html(trace(cut=False), "plain text"))
    assert "plain text" in elements.text
    assert "not coloured" in elements.text
    assert not [a for a in elements.named("span") if a.get("tabindex") == "0"]


def test_parsed_text_gives_way_to_what_was_generated() -> None:
    assert "something else" not in Elements(html(trace(), "something else")).text
    assert '"Zürich"}' in Elements(html(trace())).text


def test_an_empty_trace_is_a_page() -> None:
    empty = Trace.model_validate({"version": 1, "policy": "none", "rounds": 0, "tokens": 0})
    assert "acceptance length 0.00" in html(empty, "")
    assert "acceptance length 0.00" in terminal(empty, "")


@pytest.mark.parametrize("colour", [True, False])
def test_the_terminal_shows_the_same_and_obeys_nothing(colour: bool) -> None:
    shown = terminal(trace(), TEXT, title=f"x\x1b]0;owned\x07{HOSTILE}", colour=colour)
    shown.encode()
    own = re.sub(r"\x1b\[(?:1|\d\d)?0?m", "", shown)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", own)
    assert "acceptance length 5.40" in shown
    assert "[json " in shown
    assert ("‹lookup›" in shown) is not colour


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, section 1.4.3."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(scheme: str) -> None:
    style = files("whiflash_sdk.render").joinpath("page.css").read_text("utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", light if scheme == "light" else dark))
    assert contrast(colours["ink"], colours["page"]) >= 7
    assert contrast(colours["quiet"], colours["page"]) >= 4.5
    for arm in ("ar", "diffusion", "lookup", "none", "other"):
        assert contrast(colours["ink"], colours[arm]) >= 7
        assert contrast(colours[f"{arm}-edge"], colours["page"]) >= 3


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_shows_it(tmp_path: Path) -> None:
    page, shot = tmp_path / "trace.html", tmp_path / "trace.png"
    turns = [Turn("First", TEXT, trace()), Turn(f"</title>{HOSTILE}", "plain", trace(cut=False))]
    page.write_text(conversation_html(turns, title="Recorded"), "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    actions = ["--window-size=1000,1200", f"--screenshot={shot}", "--dump-dom"]
    command = [str(CHROMIUM), *flags, *actions, "--enable-logging=stderr", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shot.stat().st_size > 20_000
    dom = Elements(done.stdout)
    assert "<title>Recorded</title>" in done.stdout
    assert len([a for a in dom.named("span") if a.get("tabindex") == "0"]) == 4
    assert not dom.named("script")
    assert not dom.named("img")
    assert "CONSOLE" not in done.stderr
