"""Tool calls that no grammar constrains: follows an output from call to call, and proposes how the open call continues
by the request's tools.

Nothing is forbidden. After unexpected text nothing is proposed until another call begins. A marker that a line has
begun with is continued. The beginning of a call is guessed while an answer, or the text after its reasoning, is blank.
A call that is one JSON object follows a grammar of its probable form.
"""

import json
from bisect import bisect_left
from collections.abc import Hashable, Mapping, Sequence
from enum import Enum, auto
from functools import lru_cache
from typing import Any, Final, Self

import xgrammar
from whiflash_sdk.hints import Span

from whiflash_sglang.structure.chances import Kind, LikelyText
from whiflash_sglang.structure.guesses import Ahead, Guesses, Uses, likely
from whiflash_sglang.structure.layout import ASKED, BLANKS, Copied, Free, Layout
from whiflash_sglang.structure.markup import OTHER, MarkupCall, begun
from whiflash_sglang.structure.matchers import Matcher, XGrammarMatcher
from whiflash_sglang.structure.schemas import Essence, has_alternatives, words_of_places
from whiflash_sglang.structure.tools import ARGUMENTS, KEPT, PARSERS, read_tools

NO_ARGUMENTS: Final = {"type": "object", "properties": {}, "additionalProperties": False}

USUAL_LEAD = "\n"
"""Text between a call's marker and the call until one is seen: as chat templates show it to their models."""

LEAD: Final = "lead"
"""Key of `JsonCall.seen` for the text between a marker and its call."""

_NO_VOCABULARY = ("a", "</s>")
"""Vocabulary of a matcher that is asked only for text: it needs no tokens, and compiles in a millisecond."""


@lru_cache(maxsize=KEPT)
def schema_of(tools: str) -> str | None:
    """Return the JSON schema of a call; None if calls are not JSON, or the tools' names too long together."""
    read = read_tools(tools)
    if read is None or read.form not in ARGUMENTS.values():
        return None
    essence = Essence()
    if not all(essence.knows(name) for name, _ in read.functions):
        return None
    calls = [
        _call(read.form, function, essence.of(parameters) if parameters else NO_ARGUMENTS)
        for function, parameters in read.functions
    ]
    return json.dumps({"anyOf": calls})


@lru_cache(maxsize=KEPT)
def compiled(tools: str) -> xgrammar.CompiledGrammar | None:
    """Compile the grammar of `schema_of`; None without a schema, or if xgrammar refuses it.

    It is compiled in the scheduler's thread, alike in every rank, so schemas are cut to their essence: a client's
    schema must not decide how long all requests wait.

    Args:
        tools: text of `carried_tools`, or any other text.
    """
    schema = schema_of(tools)
    if schema is None:
        return None
    try:
        return _compiler().compile_json_schema(schema, any_whitespace=True)
    except (ValueError, TypeError, RecursionError, RuntimeError):
        return None


def _call(name: str, function: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": function}, name: parameters},
        "required": ["name", name],
        "additionalProperties": False,
    }


@lru_cache(maxsize=1)
def _compiler() -> xgrammar.GrammarCompiler:
    info = xgrammar.TokenizerInfo(list(_NO_VOCABULARY), vocab_size=2, stop_token_ids=[1])
    return xgrammar.GrammarCompiler(info, cache_enabled=False)


class _State(Enum):
    LEAD = auto()
    """After a marker, before the call."""
    INSIDE = auto()
    CLOSING = auto()
    """After a complete call, before the text that closes it."""


class _CallMatcher(XGrammarMatcher):
    """A matcher that moves from one call's text to another by their difference. `_ends`: its text's length by step."""

    def __init__(self, grammar: xgrammar.CompiledGrammar) -> None:
        super().__init__(xgrammar.GrammarMatcher(grammar))
        self._text, self._ends = "", [0]

    def move(self, text: str) -> bool:
        """Go to the end of a text; not inside `trying`. Returns False, before its end, if the grammar forbids it."""
        same = bisect_left(self._ends, True, key=lambda end: not text.startswith(self._text[:end]))
        if steps := sum(self._steps[same - 1 :]):
            self._rollback(steps)
            del self._steps[same - 1 :], self._ends[same:]
            self._text, self._goes_on = self._text[: self._ends[-1]], None
        rest = text[len(self._text) :]
        if not rest or not self.accept_text(rest):
            return not rest
        self._text = text
        self._ends.append(len(text))
        return True


@lru_cache(maxsize=32)
def common_matcher(tools: str) -> _CallMatcher:
    """Return the matcher of all calls of these tools, which have a grammar. It takes 3 MB for 120 tools."""
    grammar = compiled(tools)
    assert grammar is not None
    return _CallMatcher(grammar)


class JsonCall(Copied):
    """A tool call in JSON, from the end of its marker on.

    Args:
        matcher: over the grammar of a probable call, shared by calls. seen: layout of earlier calls, with
            the blanks before them (`LEAD`). end: text that marks its end; empty: nothing does. tools: of the request.
    """

    def __init__(self, matcher: _CallMatcher, seen: dict[str, str], end: str, tools: str) -> None:
        self._matcher, self._end = matcher, end
        schema = schema_of(tools) or ""
        self._layout = Layout(seen=seen, words=words_of_places(schema), decides=has_alternatives(schema))
        self._state = _State.LEAD
        self._text = self._waiting = ""

    @property
    def seen(self) -> dict[str, str]:
        """Return the newest blanks at each place of earlier calls and this one, keyed as `Layout.seen`."""
        return self._layout.seen

    @property
    def _lead(self) -> str:
        return self.seen.get(LEAD, USUAL_LEAD)

    @property
    def matcher(self) -> Matcher:
        """Return the matcher at the end of the call's text."""
        self._matcher.move(self._text)
        return self._matcher

    def copy(self) -> Self:
        """Return a copy, and a copy of its layout."""
        ahead = super().copy()
        ahead._layout = self._layout.copy()
        return ahead

    @property
    def place(self) -> Hashable:
        """Return a key as `Layout.place` does."""
        place = self._layout.place
        return place and (self._state, self._waiting, self._lead, self._end, place)

    @property
    def free(self) -> Free | None:
        """Return the tokens that continue the text if it ends in free text, as `Layout.free` does."""
        return self._layout.free(self.matcher) if self._state is _State.INSIDE else None

    def follow(self, text: str) -> str | None:
        """Advance by `text`.

        Returns the text after the call and its end, or from where it stops being one; None while it is open.
        """
        rest: str | None = text
        if self._state is _State.LEAD and rest:
            rest = self._before(rest)
        if self._state is _State.INSIDE and rest:
            rest = self._inside(rest)
        if self._state is _State.CLOSING and rest:
            return self._closing(rest)
        return rest or None

    def pieces(self, limit: int, guesses: Guesses | None) -> list[LikelyText]:
        """Return its probable continuation, at most `limit` characters."""
        ending = self._lead + self._end if self._end else ""
        if self._state is _State.CLOSING:
            return [LikelyText(ending.removeprefix(self._waiting)[:limit], Kind.CLOSED)]
        lead: list[LikelyText] = []
        if self._state is _State.LEAD and self._lead.startswith(self._waiting):
            rest = self._lead[len(self._waiting) :][:limit]
            lead = [LikelyText(rest, Kind.OPENED)] if rest else []
            limit -= len(rest)
        return lead + likely(Ahead(self.matcher, self._layout, guesses), limit, ending)

    def _before(self, text: str) -> str:
        """Follow the blanks before a call. Returns the text after them."""
        stripped = text.lstrip(BLANKS)
        self._waiting += text[: len(text) - len(stripped)]
        if stripped:
            self._layout.seen = {**self.seen, LEAD: self._waiting}
            self._waiting, self._state = "", _State.INSIDE
        return stripped

    def _inside(self, text: str) -> str:
        """Advance by the call's text. Returns the rest: after the call, or from what the schemas do not allow."""
        matcher, before, size = self._matcher, self._text, len(text)
        if not matcher.move(before + text):
            size = bisect_left(range(1, size), True, key=lambda count: not matcher.move(before + text[:count]))
        self._text += text[:size]
        self._layout.follow(text[:size])
        if size < len(text) and self._end and self.matcher.may_end:
            self._state = _State.CLOSING
        return text[size:]

    def _closing(self, text: str) -> str | None:
        """Skip the text that closes the call. Returns what follows it, or the whole text if nothing closes it."""
        whole, ending = self._waiting + text, self._lead + self._end
        if len(whole) < len(ending) and ending.startswith(whole):
            self._waiting = whole
            return None
        return whole.removeprefix(ending)


USUAL_BLANKS = "\n\n"
"""Text between the end of reasoning and a call, as chat templates show it."""

LOOKED_AT = 4
"""Number of a prompt's newest calls whose layout is read."""

LOOKED_AT_CHARS = 1024
"""Characters that are read of each of them."""


PROMPT_CHARS = 1 << 16
"""Characters at a prompt's end that a round may search, so that a long prompt does not delay other requests."""

OpenCall = JsonCall | MarkupCall
"""A call that has begun, from the end of its marker on."""


class Calls(Copied):
    """Follows an output, and the call in it that is open.

    Args:
        tools: text of `carried_tools`. spans: of the request; those of kind `tool_call` give the markers, those of
            kind `reasoning` the end of thinking. prompt: the end of its text, which shows the layout of earlier calls.
            uses: of calls and values in markup; None: those in `prompt`.
    """

    def __init__(self, tools: str, spans: Sequence[Span], prompt: str = "", uses: Uses | None = None) -> None:
        self._tools, self._uses = tools, uses or prompt.count
        self._spans = [span for span in spans if span.kind == "tool_call" and span.begin]
        self._waiting = "\n"
        """The end of the text, as far as a marker may begin in it. An answer begins a line."""
        thoughts = [span for span in spans if span.kind == "reasoning"]
        self._ends = [span.end for span in thoughts if span.end]
        self._begins = [span.begin or "" for span in self._spans]
        self._marks = [*self._ends, *self._begins]
        self._firsts = frozenset(mark[0] for mark in self._marks)
        self._blanks = None if any(span.open for span in thoughts) else ""
        """Blanks since the answer or the text after its reasoning began; None: something else was written."""
        self._usual = ""
        """The usual blanks there."""
        self._call: OpenCall | None = None
        self._seen: dict[str, str] | None = None
        self._before = {span.begin: self._habits_of_prompt(span, prompt) for span in self._spans}
        """The blanks by place of the prompt's newest calls after each marker."""

    @property
    def place(self) -> Hashable:
        """Return a key as `Layout.place` does, of texts with the same tools and spans."""
        place = None if self._call is None else self._call.place
        if self._call is not None and place is None:
            return None
        seen = self._before.values() if self._seen is None else [self._seen]
        return self._waiting, self._blanks, self._usual, place, *map(_habit, seen)

    @property
    def has_places(self) -> bool:
        """Whether all calls of these tools have a `place`."""
        schema = schema_of(self._tools)
        return schema is None or words_of_places(schema) is not None

    @property
    def free(self) -> Free | None:
        """Return the tokens that continue the text if it ends in free text, as `Layout.free` does."""
        if self._call is not None:
            return self._call.free
        return Free("".join(self._firsts) + "\n") if self._blanks is None and self._waiting in ("\n", OTHER) else None

    def copy(self) -> Self:
        """Return a copy, and a copy of its open call."""
        ahead = super().copy()
        ahead._call = self._call and self._call.copy()
        return ahead

    def pieces(self, limit: int, guesses: Guesses | None) -> list[LikelyText]:
        """Return the probable continuation, at most `limit` characters; empty if nothing is known."""
        if self._call is not None:
            return self._call.pieces(limit, guesses)
        opened, blanks, first = self._begun(), "", Kind.OPENED
        if opened is None and self._spans and self._blanks is not None:
            blanks = self._usual[len(self._blanks) :] if self._usual.startswith(self._blanks) else ""
            opened, first = (self._spans[0], self._spans[0].begin or ""), Kind.BEGUN
        call = self._behind_marker(opened[0]) if opened else None
        if opened is None or call is None:
            return []
        # The first character of a marker is the guess that a call begins; the others follow from it.
        parts = (blanks, Kind.USUAL), (opened[1][:1], first), (opened[1][1:], Kind.OPENED)
        pieces = [LikelyText(text[:limit], kind) for text, kind in parts if text]
        return pieces + call.pieces(limit - len(blanks + opened[1]), guesses)

    def follow(self, text: str) -> None:
        """Advance by `text`, in which calls begin and end."""
        if not self._spans:
            return
        while text:
            if self._call is None:
                text = self._outside(text)
                continue
            rest = self._call.follow(text)
            if rest is None:
                return
            self._seen, self._call, text = self._call.seen, None, rest
            self._blanks = None

    def _begun(self) -> tuple[Span, str] | None:
        """Return the span whose marker the last line begins, and the marker's rest; None if there is none."""
        line = self._waiting[self._waiting.rfind("\n") + 1 :]
        pairs = [(span, begin) for span, begin in zip(self._spans, self._begins, strict=True) if line]
        return next(((span, begin[len(line) :]) for span, begin in pairs if begin.startswith(line)), None)

    def _outside(self, text: str) -> str:
        """Look for the beginning of a call. Returns the text after its marker; empty if there is none."""
        self._note_blanks(text)
        text = self._waiting + text
        places = [(text.find(begin), span, begin) for span, begin in zip(self._spans, self._begins, strict=True)]
        at, span, begin = min(
            (place for place in places if place[0] >= 0), default=(-1, None, ""), key=lambda one: one[0]
        )
        if span is None:
            self._waiting = self._open_end(text)
            return ""
        self._waiting = ""
        self._call = self._behind_marker(span)
        return text[at + len(begin) :]

    def _open_end(self, text: str) -> str:
        """Return the end of `text` in which a marker may have begun: its last line if the opener of a call begins with
        that, else the longest beginning of a marker."""
        line = text[text.rfind("\n") + 1 :]
        if any(begin.startswith(line) for begin in self._begins):
            return "\n" + line
        return OTHER + max((begun(text, mark) for mark in self._marks), key=len)

    def _note_blanks(self, text: str) -> None:
        """Add `text` to the blanks since the answer began or its reasoning ended; they are None after other text."""
        whole = self._waiting + text
        ended = max((whole.rfind(end) + len(end) for end in self._ends if end in whole), default=0)
        if ended > len(self._waiting):
            self._blanks, self._usual, text = "", USUAL_BLANKS, whole[ended:]
        if self._blanks is not None:
            self._blanks = None if text.strip(BLANKS) else (self._blanks + text)[:LOOKED_AT_CHARS]

    def _behind_marker(self, span: Span) -> OpenCall | None:
        """Make the call that is expected after a span's marker; None if nothing is known of such calls."""
        assert span.begin is not None
        read, end = read_tools(self._tools), span.end or ""
        if read is None:
            return None
        seen = self._before[span.begin] if self._seen is None else self._seen
        if (form := PARSERS.get(read.form)) is not None:
            return MarkupCall(read, form, end, seen, self._uses)
        grammar = compiled(self._tools)
        if grammar is None:
            return None
        # A request without places asks about all of a call, however long, so it keeps its place in it.
        matcher = common_matcher(self._tools) if self.has_places else _CallMatcher(grammar)
        if not span.begin.startswith("{"):
            return JsonCall(matcher, seen, end, self._tools)
        call = JsonCall(matcher, {**(self._seen or {}), LEAD: ""}, end, self._tools)
        # Llama 3's marker is the beginning of the call itself.
        return call if call.follow(span.begin) is None else None

    def _habits_of_prompt(self, span: Span, prompt: str) -> dict[str, str]:
        """Return the blanks by place (`Layout.seen`) of the prompt's newest calls after a span's marker."""
        seen: dict[str, str] = {}
        read = read_tools(self._tools)
        form = PARSERS.get(read.form) if read else None
        for text in _earlier(prompt, span.begin or ""):
            if read is not None and form is not None:
                written = MarkupCall(read, form, span.end or "", seen, self._uses)
                written.follow(text)
                seen = written.seen
            elif (call := text.lstrip(BLANKS)).startswith("{"):
                seen = {**seen, LEAD: text[: len(text) - len(call)]}
        return seen


def _habit(seen: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    """Return the blanks by place, without places whose blanks change no guess."""
    return frozenset(item for item in seen.items() if len(item[0]) > 2 or ASKED.issuperset(item[0]))


def _earlier(prompt: str, begin: str) -> list[str]:
    """Return the text after each of the newest `LOOKED_AT` markers, `LOOKED_AT_CHARS` at most, the newest last."""
    end, texts = len(prompt), list[str]()
    while len(texts) < LOOKED_AT and (end := prompt.rfind(begin, 0, end)) >= 0:
        texts.append(prompt[end + len(begin) :][:LOOKED_AT_CHARS])
    return texts[::-1]
