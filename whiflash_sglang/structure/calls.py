"""Tool calls that no grammar constrains: the tools of a request as a grammar of what its calls probably look like.

It forbids nothing. It follows what is written between the markers of a call, and says what a call of these tools would
go on with; a marker that a line has begun with goes on, too. Where something else is written it is silent until
another call begins.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from enum import Enum, auto
from functools import lru_cache
from typing import Any, Final, NamedTuple

import xgrammar

from whiflash_sglang.spans.hints import MAX_TOOLS_CHARS, SpanHint
from whiflash_sglang.structure.chances import Kind
from whiflash_sglang.structure.layout import BLANKS, Layout
from whiflash_sglang.structure.matchers import Matcher, XGrammarMatcher
from whiflash_sglang.structure.pieces import Piece
from whiflash_sglang.structure.schemas import MOST_WORDS, words_of

ARGUMENTS: Final = {**dict.fromkeys(("hermes", "qwen", "qwen25"), "arguments"), "llama3": "parameters"}
"""Parsers whose calls are one JSON object, and the name of the arguments in it."""

KEPT = 128
"""Lists of tools that are kept compiled, whoever sent them: equal lists share one."""

NO_ARGUMENTS: Final = {"type": "object", "properties": {}, "additionalProperties": False}

USUAL_LEAD = "\n"
"""Between a call's marker and the call, where nobody has written one yet: as templates show it to their models."""

LOOKED_AT = 4
"""Calls of a prompt that are looked at for what stands there, the newest first."""

_NO_VOCABULARY = ("a", "</s>")
"""A matcher that is asked for text alone needs no tokens, and compiles in a millisecond."""


def carried_tools(functions: Sequence[tuple[str | None, object]], parser: str | None) -> str | None:
    """What a request's tools tell of its calls, for `custom_params`.

    None where calls of this parser are no JSON, or where they tell too much.

    Args:
        functions: name and schema of the parameters of each. parser: the server's `--tool-call-parser`.
    """
    name = ARGUMENTS.get(parser or "")
    if name is None:
        return None
    text = json.dumps([name, functions])
    return text if len(text) <= MAX_TOOLS_CHARS else None


@lru_cache(maxsize=KEPT)
def compiled(tools: str) -> xgrammar.CompiledGrammar | None:
    """The grammar of a call; None where `carried_tools` did not write it, or xgrammar refuses a schema in it."""
    if len(tools) > MAX_TOOLS_CHARS:
        return None
    try:
        name, functions = json.loads(tools)
        calls = [_call(str(name), function, parameters) for function, parameters in functions]
        return _compiler().compile_json_schema(json.dumps({"anyOf": calls}), any_whitespace=True)
    except (ValueError, TypeError, RecursionError, RuntimeError):
        return None


def _call(name: str, function: object, parameters: object) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": str(function)}, name: parameters or NO_ARGUMENTS},
        "required": ["name", name],
        "additionalProperties": False,
    }


@lru_cache(maxsize=1)
def _compiler() -> xgrammar.GrammarCompiler:
    info = xgrammar.TokenizerInfo(list(_NO_VOCABULARY), vocab_size=2, stop_token_ids=[1])
    return xgrammar.GrammarCompiler(info, cache_enabled=False)


def words_of_tools(tools: str) -> tuple[str, ...]:
    """Names of the tools, then the words of their schemas."""
    try:
        _, functions = json.loads(tools)
        names = [name for name, _ in functions if isinstance(name, str)]
    except (ValueError, TypeError, RecursionError):
        return ()
    return tuple(dict.fromkeys((*names, *words_of(tools))))[:MOST_WORDS]


class Ahead(NamedTuple):
    """What a call goes on with.

    opening: text that stands before what `matcher` says, where the call has not begun. matcher: behind what was written
    of the call; None: only its closing is missing. layout: of the call so far. ending: what closes it when it is
    complete.
    """

    opening: Piece | None
    matcher: Matcher | None
    layout: Layout
    ending: str


class _State(Enum):
    OUTSIDE = auto()
    LEAD = auto()
    """Behind a marker, before the call."""
    INSIDE = auto()
    CLOSING = auto()
    """Behind a complete call, before what closes it."""


class Calls:
    """Follows an output, and the call in it that is open.

    Args:
        tools: what `carried_tools` wrote. spans: of the request; those of kind `tool_call` tell the markers.
        prompt: its text, asked for where the blanks behind a call's marker are to be known.
    """

    def __init__(self, tools: str, spans: Sequence[SpanHint], prompt: Callable[[], str] = str) -> None:
        self._tools = tools
        self._spans = [span for span in spans if span.kind == "tool_call" and span.begin]
        self.prompt = prompt
        self._state = _State.OUTSIDE
        self._waiting = (
            "\n"  # the end of the text, as far as a marker may begin in it; it begins a line itself
        )
        self._lead: str | None = None
        self._span: SpanHint | None = None
        self._open: Matcher | None = None
        self._layout = Layout()

    def behind(self, text: str) -> "Calls":
        """As it would be behind `text`; inside `trying` alone."""
        ahead = copy(self)
        ahead._layout = self._layout.copy()
        ahead.follow(text)
        return ahead

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Look ahead: afterwards everything is as it was."""
        if self._open is None:
            yield
        else:
            with self._open.trying():
                yield

    @property
    def ahead(self) -> Ahead | None:
        """What probably follows; None: nothing is known."""
        if self._state is _State.INSIDE:
            return Ahead(None, self._open, self._layout, self._ending)
        if self._state is _State.CLOSING:
            rest = self._ending.removeprefix(self._waiting)
            return Ahead(Piece(rest, Kind.CLOSED), None, self._layout, "")
        if self._state is _State.LEAD:
            assert self._span is not None
            return self._opened(self._span, "", self._waiting, self._open)
        begun = self._begun()
        return None if begun is None else self._opened(*begun, "", self._matcher())

    def _opened(self, span: SpanHint, rest: str, blanks: str, matcher: Matcher | None) -> Ahead | None:
        """A call whose marker goes on with `rest`, or has `blanks` behind it."""
        assert span.begin is not None
        if matcher is None:
            return None
        layout = Layout(seen=dict(self._layout.seen))
        if _of_the_call(span.begin):
            if not matcher.accept_text(span.begin):
                return None
            layout.follow(span.begin)
            return Ahead(Piece(rest, Kind.OPENED), matcher, layout, span.end or "")
        lead = self._usual_lead(span.begin)
        rest += lead.removeprefix(blanks) if lead.startswith(blanks) else ""
        return Ahead(Piece(rest, Kind.OPENED) if rest else None, matcher, layout, lead + (span.end or ""))

    def follow(self, text: str) -> None:
        """Go on with what was written."""
        if not self._spans:
            return
        steps = {
            _State.OUTSIDE: self._outside,
            _State.LEAD: self._before,
            _State.INSIDE: self._inside,
            _State.CLOSING: self._closing,
        }
        while text:
            text = steps[self._state](text)

    @property
    def _ending(self) -> str:
        end = self._span.end if self._span else None
        return (self._lead or "") + end if end else ""

    def _matcher(self) -> Matcher | None:
        grammar = compiled(self._tools)
        return None if grammar is None else XGrammarMatcher(xgrammar.GrammarMatcher(grammar))

    def _begun(self) -> tuple[SpanHint, str] | None:
        """The span whose marker a line has begun with, and the rest of the marker."""
        line = self._waiting[self._waiting.rfind("\n") + 1 :]
        if not line:
            return None
        for span in self._spans:
            assert span.begin is not None
            if span.begin.startswith(line):
                return span, span.begin[len(line) :]
        return None

    def _usual_lead(self, begin: str) -> str:
        """Blanks behind a marker: as in this answer, else as in the prompt's newest calls."""
        if self._lead is None:
            prompt, self._lead = self.prompt(), USUAL_LEAD
            end = len(prompt)
            for _ in range(LOOKED_AT):
                end = prompt.rfind(begin, 0, end)
                if end < 0:
                    break
                rest = prompt[end + len(begin) :][:64]
                call = rest.lstrip(BLANKS)
                if call.startswith("{"):
                    self._lead = rest[: len(rest) - len(call)]
                    break
        return self._lead

    def _outside(self, text: str) -> str:
        """Look for where a call begins. Returns what follows it."""
        text = self._waiting + text
        found = [(text.find(span.begin or ""), span) for span in self._spans]
        at, span = min(
            ((at, span) for at, span in found if at >= 0), default=(-1, None), key=lambda one: one[0]
        )
        if span is None or span.begin is None:
            longest = max(len(one.begin or "") for one in self._spans)
            self._waiting = text[-longest:]
            return ""
        self._open = self._matcher()
        self._waiting = ""
        behind = at + len(span.begin)
        if self._open is None:
            return text[behind:]
        self._span, self._state = span, _State.LEAD
        return text[at if _of_the_call(span.begin) else behind :]

    def _before(self, text: str) -> str:
        """Blanks before a call. Returns what follows them."""
        stripped = text.lstrip(BLANKS)
        self._waiting += text[: len(text) - len(stripped)]
        if stripped:
            self._lead, self._waiting, self._state = self._waiting, "", _State.INSIDE
            self._layout = Layout(seen=dict(self._layout.seen))
        return stripped

    def _inside(self, text: str) -> str:
        """Follow the call. Returns what stands behind it, or behind what no call of these tools has."""
        assert self._open is not None
        if self._open.accept_text(text):
            self._layout.follow(text)
            return ""
        for at, character in enumerate(text):
            complete = self._open.may_end
            if not self._open.accept_text(character):
                self._open = None
                self._state = _State.CLOSING if complete and self._ending else _State.OUTSIDE
                return text[at:]
            self._layout.follow(character)
        return ""

    def _closing(self, text: str) -> str:
        """What closes the call. Returns what follows it, or all that closes none."""
        whole, ending = self._waiting + text, self._ending
        if len(whole) < len(ending) and ending.startswith(whole):
            self._waiting = whole
            return ""
        self._state, self._waiting = _State.OUTSIDE, ""
        return whole.removeprefix(ending)


def _of_the_call(marker: str) -> bool:
    """Whether what marks a call is its own beginning (Llama 3's)."""
    return marker.startswith("{")
