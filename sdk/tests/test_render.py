"""The renderers: nothing the model writes acts, and everything the trace says shows. A real browser: test_timeline."""

import re
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import pytest
from fake_server import TRACE

from whiflash_sdk import Stretch, Trace
from whiflash_sdk.render import Turn, conversation_html, html, terminal
from whiflash_sdk.render.aligned import held_back
from whiflash_sdk.render.page import zooms

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;'\""
STRETCHES: list[dict[str, Any]] = [
    {"start": 1, "end": 9, "arm": "ar", "rounds": 2, "accepted": 6, "reason": "score", "round_tokens": [5, 3]},
    {"start": 9, "end": 25, "arm": "lookup", "rounds": 1, "accepted": 15, "reason": "span", "span": "json"},
    {"start": 25, "end": 27, "arm": "diffusion", "rounds": 1, "accepted": 1, "reason": "pin", "span": "json"},
    {"start": 27, "end": 28, "arm": '"><b>x', "rounds": 1, "accepted": 0, "reason": HOSTILE},
]
TEXTS = [f"hi {HOSTILE}\n", '{"city": ', '"Zürich"}', "\x00\x1b[31m\x9b2J\u202edone\ud800"]


def trace(text: str | None = None, *, cut: bool = True, proposed: int | None = None) -> Trace:
    """A response whose first character is the prefill's. cut: whether offsets point into its text."""
    stretches: list[dict[str, Any]] = []
    end = 1
    for stretch, own in zip(STRETCHES, TEXTS, strict=True):
        stretches.append({**stretch, "chars": [end, end + len(own)] if cut else None, "proposed": proposed})
        end += len(own)
    arms = {s["arm"]: {"rounds": s["rounds"], "tokens": s["end"] - s["start"]} for s in STRETCHES}
    totals = {"rounds": 5, "tokens": 27, "switches": 3, "arms": arms, "stretches": stretches, "text": text}
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
    assert not {"script", "img", "b", "link", "iframe"} & {name for name, _ in elements.tags}
    assert all(str(link["href"]).startswith("#") for link in elements.named("a"))
    assert not [name for _, attributes in elements.tags for name in attributes if name.startswith("on")]
    assert HOSTILE in elements.text
    assert "default-src 'none'" in str(elements.named("meta")[1]["content"])
    assert not re.search(r"https?://|url\(", page)


def test_stretches_spans_rounds_and_totals_show() -> None:
    elements = Elements(html(trace(), TEXT))
    bands = elements.named("a")
    arms = ["ar", "lookup", "diffusion", "other"]
    assert [a["class"] for a in bands] == [f"band arm-{arm}" for arm in arms]
    texts = {str(a["id"]): a["class"] for a in elements.named("span") if a.get("id")}
    assert [texts[str(a["href"])[1:]] for a in bands] == [f"stretch arm-{arm}" for arm in arms]
    assert [a["style"] for a in elements.named("i")[:3]] == [
        "flex:5;--k:5",
        "flex:3;--k:3",
        "flex:1;--k:16.000;background-size:100.0000% 100%",
    ]
    assert elements.text.count("[json ") == 1
    assert elements.text.count(" json]") == 1
    assert "tokens 9–25 · 16 tokens · 1 round · acceptance length 16.00" in elements.text
    assert "Switched from ar to lookup, json began: most expected tokens" in elements.text
    assert "Switched from lookup to diffusion: a hint demanded it" in elements.text


def test_columns_are_as_wide_as_tokens_and_a_gap_is_one() -> None:
    """Token 0 is the prefill's, and so is token 9, after a retraction."""
    first, second = STRETCHES[0], {**STRETCHES[1], "start": 10}
    found = trace().model_copy(update={"stretches": tuple(map(Stretch.model_validate, (first, second)))})
    (track,) = (a for a in Elements(html(found)).named("div") if a.get("class") == "track")
    assert re.findall(r"minmax\(0,(\d+)fr\)", str(track["style"])) == ["1", "8", "1", "15"]


@pytest.mark.parametrize(("tokens", "deepest"), [(0, 1), (200, 1), (201, 2), (1600, 8), (10**18, 64)])
def test_a_timeline_is_drawn_as_wide_as_its_tokens_need(tokens: int, deepest: int) -> None:
    assert zooms(tokens)[-1] == deepest


def test_no_count_makes_a_page_long() -> None:
    """A server may claim any number of rounds."""
    huge = {"start": 1, "end": 10**15, "arm": "ar", "rounds": 10**14, "accepted": 0}
    backwards = {"start": 5, "end": 2, "arm": "lookup", "rounds": 0, "accepted": 0}
    found = trace().model_copy(update={"stretches": tuple(map(Stretch.model_validate, (huge, backwards)))})
    assert len(html(found)) < 100_000
    assert len(terminal(found)) < 200_000
    torn = trace().model_copy(
        update={"stretches": (Stretch.model_validate({**STRETCHES[0], "round_tokens": [-9, 1]}),)}
    )
    assert "▁█" in terminal(torn, colour=False)


SUMMARY = Trace.model_validate(
    {
        "version": 1,
        "policy": "auto",
        "rounds": 2,
        "tokens": 8,
        "arms": {"ar": {"rounds": 2, "tokens": 8, "proposed": 10, "accepted": 6}},
        "reasons": {"score": 1, HOSTILE: 1},
    }
)
EMPTY = Trace.model_validate({"version": 1, "policy": "none", "rounds": 0, "tokens": 0})
ESTIMATES = ("estimated speed over plain decoding", "tokens a second")
MEANINGS = ("without a drafter it is 1", "DFlash or DSpark: a block of tokens at once", "a hint demanded it")
SHOWN: dict[str, tuple[Trace, tuple[str, ...], tuple[str, ...]]] = {
    "timed": (
        trace().model_copy(update={"seconds": 3.0, "gain": 1.25}),
        (*ESTIMATES, "1.25×", "9.0", "5.40", "tokens in 5 rounds"),
        ("Responses",),
    ),
    "full": (trace(), MEANINGS, (*ESTIMATES, "plain decoding", "Responses")),
    "summary": (SUMMARY, ("the text", 'trace="full"', "6 of 10", "1 round by score", "EAGLE-3", HOSTILE), ()),
    "empty": (EMPTY, ("0.00", "No round ran"), (*ESTIMATES, "is a summary")),
}
"""Texts that a trace's page shows, and those that it does not: what is unknown or was not used needs no word."""


@pytest.mark.parametrize("case", SHOWN)
def test_a_page_has_what_is_known_and_nothing_else(case: str) -> None:
    found, shown, not_shown = SHOWN[case]
    page = Elements(html(found, "the text"))
    assert [word for word in shown if word not in page.text] == []
    assert [word for word in not_shown if word in page.text] == []
    assert not page.named("script")


def test_turns_have_places() -> None:
    two = Elements(conversation_html([Turn("First", TEXT, trace()), Turn("Second", TEXT, trace())]))
    assert [link["href"] for link in two.named("a")][:2] == ["#turn-1", "#turn-2"]


def test_a_trace_prints_as_a_few_lines() -> None:
    assert "\n9.0 tokens a second · estimated gain 1.25×\n" in str(SHOWN["timed"][0])
    for words in ("the text", "1 round by score", "6 of 10"):
        assert words in terminal(SUMMARY, "the text", colour=False)
    assert "acceptance length 0.00" in terminal(EMPTY, "")
    assert str(Trace.model_validate(TRACE)) == (
        "policy auto · 14 tokens · 3 rounds · acceptance length 4.67 · 1 switch\n"
        "2 rounds by score · 1 round by span\n"
        "drafter     rounds tokens acceptance length drafts accepted\n"
        "ar               2      6              3.00          4 of 8\n"
        "lookup           1      8              8.00          7 of 9\n"
        "all              3     14              4.67        11 of 17"
    )
    assert "\x1b" not in str(trace())
    assert repr(trace()).startswith("Trace(version=1"), "all of it, for who debugs"


def test_what_no_round_wrote_between_two_stretches_is_shown() -> None:
    """After a retraction a token comes from a prefill."""
    first, second = ({**STRETCHES[1], "chars": chars, "span": "json"} for chars in ([1, 3], [4, 6]))
    found = trace().model_copy(update={"stretches": tuple(map(Stretch.model_validate, (first, second)))})
    assert "[json a‹lookup›bcd‹lookup›ef json]g" in terminal(found, "abcdefg", colour=False)


def test_offsets_that_lie_beyond_the_text_colour_nothing() -> None:
    assert "not coloured" in Elements(html(trace(), TEXT[:20])).text


SOURCES = {
    "context": {"proposed": 9, "accepted": 1, "saved": -0.06},
    "prediction": {"proposed": 40, "accepted": 38, "saved": 0.42},
    HOSTILE: {"proposed": 1, "accepted": 0, "saved": 0.0},
}


def test_what_each_hint_brought_is_shown_and_called_an_estimate() -> None:
    arms = {"lookup": {"rounds": 3, "tokens": 42, "proposed": 50, "accepted": 39, "saved": 0.36}}
    given = {"version": 1, "policy": "auto", "rounds": 3, "tokens": 42, "arms": arms, "sources": SOURCES}
    found = Trace.model_validate(given)
    elements = Elements(html(found, "the text"))
    for words in ("the answer that was predicted", "38 of 40", "0.42 s", "-0.06 s", "0.36 s", HOSTILE):
        assert words in elements.text
    assert elements.text.count("Estimated time saved") == 2
    assert not elements.named("script")
    assert str(found).split("\n")[1:] == [
        "drafter     rounds tokens acceptance length drafts accepted estimated time saved",
        "lookup           3     42             14.00        39 of 50               0.36 s",
        "all              3     42             14.00        39 of 50               0.36 s",
        "drafts from           accepted   estimated time saved",
        "context                 1 of 9                -0.06 s",
        "prediction            38 of 40                 0.42 s",
        f"{HOSTILE}            0 of 1                 0.00 s",
    ]
    unpriced = {name: {**counts, "saved": None} for name, counts in SOURCES.items()}
    shown = html(Trace.model_validate({**given, "arms": {}, "sources": unpriced}))
    assert "38 of 40" in shown
    assert "stimated" not in shown


def test_the_style_is_of_what_is_ours_alone() -> None:
    """A page may be part of somebody else's."""
    style = files("whiflash_sdk.render").joinpath("page.css").read_text("utf-8")
    style = re.sub(r"/\*.*?\*/", "", style, flags=re.DOTALL)
    depth, outermost, current = 0, [], ""
    for character in style:
        if character == "{":
            if depth == 0 or (depth == 1 and outermost[-1].startswith("@")):
                outermost.append(current.strip())
            depth, current = depth + 1, ""
        elif character == "}":
            depth, current = depth - 1, ""
        else:
            current = "" if character == ";" else current + character
    assert depth == 0
    assert {rule for rule in outermost if not rule.startswith("@")} == {".whiflash"}


def test_the_prefills_token_is_part_of_the_text_and_of_its_span() -> None:
    stretch = {**STRETCHES[1], "start": 1, "span": "tool_call", "chars": [1, 18]}
    totals = {"rounds": 1, "tokens": 16, "arms": {"lookup": {"rounds": 1, "tokens": 16}}}
    given = {"version": 1, "policy": "auto", **totals, "stretches": [stretch], "text": '<tool_call>{"name"'}
    found = Trace.model_validate(given)
    assert '[tool_call <tool_call>{"name"' in Elements(html(found, "parsed: name()")).text
    assert "[tool_call <‹lookup›tool_call>" in terminal(found, colour=False)


@pytest.mark.parametrize(
    ("arm", "round_chars", "shown"),
    [
        ("structure", [[8, 5], [1, 0]], '{"city":'),
        ("structure", [[8, 5]], ""),  # another text's
        ("none", [[0, 6], [0, 8]], ""),  # all of it is the target's
    ],
)
def test_tokens_of_the_target_have_no_colour(arm: str, round_chars: list[list[int]], shown: str) -> None:
    text = '{"city":"Paris'
    stretch = {**STRETCHES[1], "arm": arm, "chars": [0, len(text)], "round_chars": round_chars}
    cut = Trace.model_validate({"version": 1, "policy": "auto", "rounds": 2, "tokens": 14, "stretches": [stretch]})
    elements = Elements(html(cut, text))
    assert text in elements.text
    assert len(elements.named("u")) == bool(shown)
    painted = terminal(cut, text)
    assert re.search(r"\x1b\[\d+m" + re.escape(shown or text) + r"\x1b\[0m", painted)
    assert text in re.sub(r"\x1b\[\d+m", "", painted)


def test_text_that_could_not_be_cut_is_shown_whole() -> None:
    elements = Elements(html(trace(cut=False), "plain text"))
    assert "plain text" in elements.text
    assert "not coloured" in elements.text
    assert not elements.named("a"), "there is no text to go to"
    assert len([a for a in elements.named("span") if a.get("tabindex") == "0"]) == len(STRETCHES)


def test_parsed_text_gives_way_to_what_was_generated() -> None:
    assert html(trace(TEXT), "something else") == html(trace(TEXT), TEXT)
    assert "something else" not in terminal(trace(TEXT), "something else")


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
    light, dark = re.findall(r"\.whiflash \{\s+(?:color-scheme: light dark;)?(\s+--page.*?)\}", style, re.DOTALL)
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", light if scheme == "light" else dark))
    for ground in ("page", "card", "lane-ground"):
        assert contrast(colours["ink"], colours[ground]) >= 7
        assert contrast(colours["quiet"], colours[ground]) >= 4.5
    for arm in ("ar", "diffusion", "lookup", "structure", "none", "other"):
        assert contrast(colours["ink"], colours[arm]) >= 7
        for ground in ("card", "lane-ground", arm):
            assert contrast(colours[f"{arm}-edge"], colours[ground]) >= 3


def test_a_page_names_the_drafter_that_brought_least() -> None:
    """Beside others: a response that one drafter wrote has nothing to compare."""
    made: dict[str, Any] = {"version": 1, "policy": "auto"}
    quick = {"rounds": 2, "tokens": 16, "proposed": 16, "accepted": 14}
    slow = {"rounds": 6, "tokens": 8, "proposed": 30, "accepted": 2}
    both = Trace(**made, rounds=8, tokens=24, arms={"lookup": quick, "ar": slow})
    said = "Why not more: ar took 6 of 8 rounds for 8 of 24 tokens; 2 of its 30 drafts were accepted."
    assert held_back(both) == said
    assert said in html(both)
    assert held_back(Trace(**made, rounds=2, tokens=16, arms={"lookup": quick})) == ""
    undrafted = Trace(**made, rounds=7, tokens=20, arms={"lookup": quick, "none": {"rounds": 5, "tokens": 5}})
    assert held_back(undrafted) == "Why not more: none took 5 of 7 rounds for 5 of 20 tokens."
