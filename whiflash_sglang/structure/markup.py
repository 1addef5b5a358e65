"""Follows a tool call in markup (`<function=…><parameter=…>`) by its parser's form and its request's tools.

Nothing in it is nested, so no grammar is needed: at every place a few texts may come next, with the blanks between
them that were written before.
"""

from collections.abc import Callable, Hashable, Sequence
from enum import Enum, auto
from typing import Any, NamedTuple

from whiflash_sglang.structure.chances import Kind, LikelyText
from whiflash_sglang.structure.guesses import Guesses, Likelihood, gather, parted
from whiflash_sglang.structure.layout import BLANKS
from whiflash_sglang.structure.schemas import MOST_WORDS
from whiflash_sglang.structure.tools import Form, Tools, listed_of, properties_of, required_of

MOST_KNOWN = 256
"""Largest number of answers in a cache, which is cleared when it is full."""

LONGEST = 256
"""Characters kept of an open value, in which its end is looked for."""


class _Place(Enum):
    CALL = auto()
    ARGUMENT = auto()
    """After a tool's name or a value: another argument follows, or the end of the call."""
    OPENING = auto()
    """After an argument's name: the text that begins its value follows."""
    VALUE = auto()
    CLOSED = auto()
    DONE = auto()


class _Option(NamedTuple):
    """A text that may come next. part: its part of the form, which determines the blanks before it. then: the place
    after it. name: of the tool or the argument in it.
    """

    text: str
    part: str
    then: _Place
    name: str = ""


class MarkupCall:
    """A span of calls, from the end of its marker on.

    Args:
        tools: of the request. form: of its parser's calls. end: text that ends the span. seen: newest blanks before
            each part of a call; this call adds its own. used: returns how often a text occurs in the conversation.
            known: cache that the request's calls share, by all that an answer depends on; None: a new one. Options are
            cached with their tools.
    """

    def __init__(
        self,
        tools: Tools,
        form: Form,
        end: str,
        seen: dict[str, str],
        used: Callable[[str], int],
        known: dict[Hashable, Any] | None = None,
    ) -> None:
        self._functions = dict(tools.functions[:MOST_WORDS])
        self._form, self._end, self._used = form, end, used
        self.seen = seen
        self._place = _Place.CALL
        self._pending = ""
        self._calls = 0
        self._known = {} if known is None else known
        self._known_options = tools.known
        self._tool = ""
        self._key = ""
        self._written: frozenset[str] = frozenset()

    def copy(self) -> "MarkupCall":
        """Return a copy to look ahead with."""
        ahead = object.__new__(MarkupCall)
        ahead.__dict__.update(self.__dict__)
        ahead.seen = dict(self.seen)
        return ahead

    def follow(self, text: str) -> str | None:
        """Advance by `text`.

        Returns the text after the span, or from where no call of these tools matches; None while it is open.
        """
        self._pending += text
        while self._place is not _Place.DONE:
            if self._place is _Place.VALUE:
                if not self._value_ended():
                    return None
                continue
            body = self._pending.lstrip(BLANKS)
            if not body:
                return None
            options = self._options()
            if any(option.text.startswith(body) and option.text != body for option in options):
                return None
            fitting = [option for option in options if body.startswith(option.text)]
            if not fitting:
                return self._pending
            option = max(fitting, key=lambda spelling: len(spelling.text))
            self.seen[option.part] = self._pending[: len(self._pending) - len(body)]
            self._take(option)
            self._pending = body[len(option.text) :]
        return self._pending

    def pieces(self, limit: int, guesses: Guesses | None, likelihood: Likelihood) -> list[LikelyText]:
        """Return the probable continuation of the tool calls' text, at most `limit` characters."""
        return gather(self.copy()._step, limit, likelihood)

    def _step(self) -> list[LikelyText] | None:
        """Advance by the probable rest of one part of the call, and return its pieces; None if nothing is probable.

        Empty: the part was complete without more.
        """
        if self._place is _Place.DONE:
            return None
        if self._place is _Place.VALUE and self._pending:
            return self._rest_of_value()
        before = *self._state, self._pending, *self.seen.items()
        pieces: list[LikelyText] | None
        pieces, after = kept(self._known, before, lambda: (self._step_now(), (*self._state[1:], self._pending)))
        self._place, self._calls, self._tool, self._key, self._written, self._pending = after
        return pieces

    def _step_now(self) -> list[LikelyText] | None:
        if self._place is _Place.VALUE:
            return self._rest_of_value()
        body = self._pending.lstrip(BLANKS)
        fitting = [option for option in self._options() if option.text.startswith(body)]
        if not fitting:
            return None
        option, kind = self._likeliest(fitting)
        blanks = [] if body else self._blanks(option.part, self._pending)
        others = [other.text[len(body) :] for other in fitting if other is not option]
        self._take(option)
        self._pending = ""
        return blanks + _pieces(option.text[len(body) :], others, kind)

    def _options(self) -> Sequence[_Option]:
        """Return the texts that may come next, likelier ones first unless the conversation says otherwise."""
        options: Sequence[_Option] = kept(self._known_options, self._state, self._options_now)
        return options

    @property
    def _state(self) -> tuple[Hashable, ...]:
        """Return all that the options depend on."""
        return self._end, self._place, self._calls, self._tool, self._key, self._written

    @property
    def _parameters(self) -> object:
        return self._functions.get(self._tool)

    def _options_now(self) -> Sequence[_Option]:
        form = self._form
        calls: Sequence[_Option] = ()
        if self._place in (_Place.CALL, _Place.CLOSED):
            calls = [_Option(self._call(name), "call", _Place.ARGUMENT, name) for name in self._functions]
        ended = [_Option(self._end, "end", _Place.DONE)] if self._end else []
        if self._place is _Place.CALL:
            return calls
        if self._place is _Place.CLOSED:
            return [*ended, *calls] if form.several else ended
        if self._place is _Place.OPENING:
            return [_Option(self._around[0], "value", _Place.VALUE, self._key)]
        closing = [_Option(form.close.lstrip(BLANKS), "close", _Place.CLOSED)] if form.close else ended
        needed, free, required = list[_Option](), list[_Option](), required_of(self._parameters)
        keys = list(properties_of(self._parameters))[:MOST_WORDS]
        for key in (key for key in keys if key not in self._written):
            then = _Place.OPENING if self._around[0] else _Place.VALUE
            option = _Option(self._argument(key), "argument", then, key)
            (needed if key in required else free).append(option)
        return [*needed, *closing, *free]

    @property
    def _around(self) -> tuple[str, str]:
        """Return the texts that begin and end a value."""
        begin, end = self._form.value.split("{value}")
        return begin.strip(BLANKS), end.lstrip(BLANKS).replace("{key}", self._key)

    def _call(self, name: str) -> str:
        text = self._form.call.lstrip(BLANKS).replace("{index}", str(self._calls + 1))
        return text.replace("{name}", name)

    def _argument(self, key: str) -> str:
        schema = properties_of(self._parameters).get(key)
        kind = schema.get("type") if isinstance(schema, dict) else None
        kind = "number" if kind == "integer" else kind
        text = self._form.argument.lstrip(BLANKS).replace("{type}", str(kind or "string"))
        return text.replace("{string}", "true" if kind in ("string", None) else "false").replace("{key}", key)

    def _take(self, option: _Option) -> None:
        """Advance by the text of `option`."""
        self._place = option.then
        if option.part == "call":
            self._calls += 1
            self._tool, self._written = option.name, frozenset()
        elif option.part == "argument":
            self._key = option.name
            self._written |= {option.name}

    def _value_ended(self) -> bool:
        """Advance past the text that ends the open value, if it has been written; return whether it has."""
        value, end, behind = self._pending.partition(self._around[1])
        if not end:
            self._pending = self._pending[-LONGEST:]
            return False
        if value.strip(BLANKS):
            self.seen["inside"] = value[: len(value) - len(value.lstrip(BLANKS))]
            self.seen["behind"] = value[len(value.rstrip(BLANKS)) :]
        self._pending, self._place = behind, _Place.ARGUMENT
        return True

    def _rest_of_value(self) -> list[LikelyText] | None:
        """Return the rest of an argument that its schema lists, or of its end marker if that has begun, else None."""
        pending, end = self._pending, self._around[1]
        closing = self._usual("behind")[0] + end
        body, pieces = pending.lstrip(BLANKS), []
        if not body:
            pieces = self._blanks("inside", pending)
        words = listed_of(properties_of(self._parameters).get(self._key))
        fitting = [word for word in words if (word + closing).startswith(body)]
        if fitting:
            best = max(fitting, key=self._used)
            rest, *others = ((word + closing)[len(body) :] for word in sorted(fitting, key=lambda own: own != best))
            pieces += _pieces(rest, others, Kind.WORD)
        elif body:
            begun = _begun(pending, closing) or _begun(pending, end)
            if not begun:
                return None
            pieces = parted(begun, [], Kind.ENDED)
        else:
            self._pending += "".join(piece.text for piece in pieces)
            return pieces or None
        self._pending, self._place = "", _Place.ARGUMENT
        return pieces

    def _likeliest(self, fitting: Sequence[_Option]) -> tuple[_Option, Kind]:
        """Choose the likeliest of the texts that may come next, and its kind."""
        if self._place is not _Place.CALL:
            return fitting[0], Kind.CLOSED if fitting[0].part == "end" else Kind.CHOICE
        used = [self._used(option.text) for option in fitting]
        highest = max(used)
        return fitting[used.index(highest)], Kind.USED if used.count(highest) == 1 and highest else Kind.WORD

    def _usual(self, place: str) -> tuple[str, bool]:
        """Return the likely blanks before a part of a call, and whether a call had them; else they are the form's."""
        if place in self.seen:
            return self.seen[place], True
        before, behind = self._form.value.split("{value}")
        values = {"value": before, "inside": before if not self._around[0] else "", "behind": behind}
        text = {**self._form._asdict(), **values}[place]
        return text[: len(text) - len(text.lstrip(BLANKS))], False

    def _blanks(self, place: str, written: str) -> list[LikelyText]:
        """Return the blanks before a part that are still to be written, as at most one piece."""
        usual, seen = self._usual(place)
        if not usual.startswith(written) or usual == written:
            return []
        return [LikelyText(usual[len(written) :], Kind.LAYOUT if seen else Kind.USUAL)]


def kept(known: dict[Hashable, Any], key: Hashable, ask: Callable[[], Any]) -> Any:
    """Return the cached answer for `key`; `ask` is called if there is none."""
    if key not in known:
        answer = ask()
        if len(known) >= MOST_KNOWN:
            known.clear()
        known[key] = answer
    return known[key]


def _pieces(text: str, others: Sequence[str], kind: Kind) -> list[LikelyText]:
    """Cut `text` into pieces: it is forced unless `others` may follow, too."""
    if not text:
        return []
    return parted(text, others, kind) if others else [LikelyText(text, Kind.FORCED)]


def _begun(text: str, ending: str) -> str:
    """Return the rest of `ending` if `text` ends with its beginning; else an empty text."""
    lengths = range(len(ending) - 1, 0, -1)
    return next((ending[length:] for length in lengths if text.endswith(ending[:length])), "")
