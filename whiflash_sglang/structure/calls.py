"""Tool calls that no grammar constrains: the tools of a request as a grammar of what its calls probably look like.

It forbids nothing. It follows what is written between the markers of a call, and says what a call of these tools would
go on with; where something else is written it is silent until the next call begins.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import xgrammar

from whiflash_sglang.spans.hints import MAX_TOOLS_CHARS, SpanHint
from whiflash_sglang.structure.layout import BLANKS
from whiflash_sglang.structure.matchers import Matcher, XGrammarMatcher
from whiflash_sglang.structure.schemas import MOST_WORDS, words_of

ARGUMENTS: Final = {**dict.fromkeys(("hermes", "qwen", "qwen25"), "arguments"), "llama3": "parameters"}
"""Parsers whose calls are one JSON object, and the name of the arguments in it."""

KEPT = 128
"""Lists of tools that are kept compiled, whoever sent them: equal lists share one."""

NO_ARGUMENTS: Final = {"type": "object", "properties": {}, "additionalProperties": False}

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


class Calls:
    """Follows an output, and the call in it that is open.

    Args:
        tools: what `carried_tools` wrote. spans: of the request; those of kind `tool_call` tell the markers.
    """

    def __init__(self, tools: str, spans: Sequence[SpanHint]) -> None:
        self._tools = tools
        self._span = next((s for s in spans if s.kind == "tool_call" and (s.begin or s.open)), None)
        self._waiting = ""
        self._lead: str | None = None
        self._open: Matcher | None = None

    @property
    def matcher(self) -> Matcher | None:
        """Of the call that is open, behind what was written of it; None: none is."""
        return self._open if self._lead is not None else None

    @property
    def ending(self) -> str:
        """What closes a call, laid out like what opened it."""
        end = self._span.end if self._span else None
        return (self._lead or "") + end if end else ""

    def follow(self, text: str) -> None:
        """Go on with what was written."""
        if self._span is None:
            return
        while text:
            text = self._inside(text) if self._open is not None else self._outside(text)

    def _outside(self, text: str) -> str:
        """Look for where a call begins. Returns what follows it."""
        assert self._span is not None
        begin = self._span.begin
        if begin is None:
            return ""
        text = self._waiting + text
        at = text.find(begin)
        if at < 0:
            self._waiting = text[max(len(text) - len(begin) + 1, 0) :]
            return ""
        grammar = compiled(self._tools)
        self._waiting, self._lead = "", None
        self._open = None if grammar is None else XGrammarMatcher(xgrammar.GrammarMatcher(grammar))
        return text[at + len(begin) :]

    def _inside(self, text: str) -> str:
        """Follow the call. Returns what stands behind it, or behind what no call of these tools has."""
        assert self._open is not None
        if self._lead is None:
            stripped = text.lstrip(BLANKS)
            self._waiting += text[: len(text) - len(stripped)]
            if not stripped:
                return ""
            self._lead, self._waiting, text = self._waiting, "", stripped
        if self._open.accept_text(text):
            return ""
        for at, character in enumerate(text):
            if not self._open.accept_text(character):
                self._open, self._lead = None, None
                return text[at:]
        return ""
