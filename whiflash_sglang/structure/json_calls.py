"""A tool call that is one JSON object: the tools of its request as a grammar of what it probably looks like."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from enum import Enum, auto
from functools import lru_cache
from typing import Any, Final

import xgrammar

from whiflash_sglang.structure.chances import Kind, Piece
from whiflash_sglang.structure.guesses import Guesses, Likelihood, likely
from whiflash_sglang.structure.layout import BLANKS, Layout
from whiflash_sglang.structure.matchers import Matcher, XGrammarMatcher
from whiflash_sglang.structure.schemas import Essence
from whiflash_sglang.structure.tools import ARGUMENTS, KEPT, read_tools

NO_ARGUMENTS: Final = {"type": "object", "properties": {}, "additionalProperties": False}

USUAL_LEAD = "\n"
"""Between a call's marker and the call, where nobody has written one yet: as templates show it to their models."""

LEAD: Final = "lead"
"""Where it is kept, of what was seen of calls."""

_NO_VOCABULARY = ("a", "</s>")
"""A matcher that is asked for text alone needs no tokens, and compiles in a millisecond."""


@lru_cache(maxsize=KEPT)
def compiled(tools: str) -> xgrammar.CompiledGrammar | None:
    """The grammar of a call; None where its calls are no JSON, their names too long, or xgrammar refuses a schema.

    It is compiled in the scheduler's thread, alike in every rank, so schemas are cut to their essence: a client's
    text must not decide how long everybody waits.

    Args:
        tools: what `carried_tools` wrote, or anything.
    """
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
    try:
        return _compiler().compile_json_schema(json.dumps({"anyOf": calls}), any_whitespace=True)
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


def matcher_of(tools: str) -> Matcher | None:
    """A new one; None where there is no grammar of these tools."""
    grammar = compiled(tools)
    return None if grammar is None else XGrammarMatcher(xgrammar.GrammarMatcher(grammar))


class _State(Enum):
    LEAD = auto()
    """Behind a marker, before the call."""
    INSIDE = auto()
    CLOSING = auto()
    """Behind a complete call, before what closes it."""


class JsonCall:
    """One call, from behind its marker on.

    Args:
        matcher: of what a call looks like, at its beginning. seen: how earlier calls were laid out, the blanks before
            them among it (`LEAD`). end: marks its end; empty: nothing does.
    """

    def __init__(self, matcher: Matcher, seen: dict[str, str], end: str) -> None:
        self._matcher, self._end = matcher, end
        self._layout = Layout(seen=dict(seen))
        self._state = _State.LEAD
        self._waiting = ""

    @property
    def seen(self) -> dict[str, str]:
        """How it is laid out."""
        return self._layout.seen

    @property
    def _lead(self) -> str:
        return self.seen.get(LEAD, USUAL_LEAD)

    def copy(self) -> "JsonCall":
        """To look ahead with, inside `trying` alone."""
        ahead = copy(self)
        ahead._layout = self._layout.copy()
        return ahead

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Look ahead: afterwards its matcher is as it was."""
        with self._matcher.trying():
            yield

    def follow(self, text: str) -> str | None:
        """Go on with what was written.

        Returns the text after the call and its end, or the text that no call of these tools has; None while it is open.
        """
        rest: str | None = text
        if self._state is _State.LEAD and rest:
            rest = self._before(rest)
        if self._state is _State.INSIDE and rest:
            rest = self._inside(rest)
        if self._state is _State.CLOSING and rest:
            return self._closing(rest)
        return rest or None

    def pieces(self, limit: int, guesses: Guesses | None, likelihood: Likelihood) -> list[Piece]:
        """Its probable continuation: at most `limit` characters."""
        ending = self._lead + self._end if self._end else ""
        if self._state is _State.CLOSING:
            return [Piece(ending.removeprefix(self._waiting)[:limit], Kind.CLOSED)]
        found: list[Piece] = []
        if self._state is _State.LEAD and self._lead.startswith(self._waiting):
            rest = self._lead[len(self._waiting) :][:limit]
            found = [Piece(rest, Kind.OPENED)] if rest else []
            limit -= len(rest)
        return found + likely(self._matcher, limit, guesses, self._layout, likelihood, ending)

    def _before(self, text: str) -> str:
        """Blanks before a call. Returns what follows them."""
        stripped = text.lstrip(BLANKS)
        self._waiting += text[: len(text) - len(stripped)]
        if stripped:
            self.seen[LEAD], self._waiting, self._state = self._waiting, "", _State.INSIDE
        return stripped

    def _inside(self, text: str) -> str:
        """Follow the call. Returns the text after it, or from where no call of these tools matches."""
        if self._matcher.accept_text(text):
            self._layout.follow(text)
            return ""
        for at, character in enumerate(text):
            complete = self._matcher.may_end
            if not self._matcher.accept_text(character):
                if complete and self._end:
                    self._state = _State.CLOSING
                return text[at:]
            self._layout.follow(character)
        return ""

    def _closing(self, text: str) -> str | None:
        """Skip what closes the call. Returns what follows it, or the whole text if nothing closes it."""
        whole, ending = self._waiting + text, self._lead + self._end
        if len(whole) < len(ending) and ending.startswith(whole):
            self._waiting = whole
            return None
        return whole.removeprefix(ending)
