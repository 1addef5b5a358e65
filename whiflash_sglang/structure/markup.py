"""Follows a tool call in markup (`<function=…><parameter=…>`) by its parser's form and its request's tools.

Nothing in it is nested, so no grammar is needed: at every place a few texts may come next, with the blanks between
them that were written before.
"""

from collections.abc import Hashable, Mapping, Sequence
from enum import Enum, auto
from typing import NamedTuple

from whiflash_sglang.structure.chances import Kind, LikelyText
from whiflash_sglang.structure.guesses import Guesses, Uses, gather, of_words, parted
from whiflash_sglang.structure.layout import BLANKS, Copied, Free
from whiflash_sglang.structure.schemas import MOST_WORDS
from whiflash_sglang.structure.tools import Form, Tools, listed_of, properties_of, required_of

LONGEST = 256
"""Characters kept of the blanks around an open value."""

OTHER = "\0"
"""In place of any text in which nothing that matters begins."""


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


class MarkupCall(Copied):
    """A span of calls, from the end of its marker on.

    Args:
        tools: of the request. form: of its parser's calls. end: text that ends the span. seen: newest blanks before
            each part of earlier calls, which this call does not change. used: returns how often a text occurs in the
            conversation.
    """

    def __init__(self, tools: Tools, form: Form, end: str, seen: dict[str, str], used: Uses) -> None:
        self._functions = dict(tools.functions[:MOST_WORDS])
        self._form, self._end, self._used = form, end, used
        self.seen = seen
        self._place = _Place.CALL
        self._pending = ""
        self._calls = 0
        self._tool = ""
        self._key = ""
        self._written: frozenset[str] = frozenset()

    def follow(self, text: str) -> str | None:
        """Advance by `text`.

        Returns None while the span is open, else the text after it, or from the first character that no such call has.
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
            self.seen = {**self.seen, option.part: self._pending[: len(self._pending) - len(body)]}
            self._take(option)
            self._pending = body[len(option.text) :]
        return self._pending

    @property
    def place(self) -> Hashable:
        """Return a key as `Layout.place` does, of texts with the same tools and spans."""
        return *self._state, self._pending, frozenset(self.seen.items())

    @property
    def free(self) -> Free | None:
        """Return the tokens that continue the text if it ends in free text, as `Layout.free` does."""
        if self._place is not _Place.VALUE or self._fitting():
            return None
        if self._pending.endswith(OTHER):
            return Free(self._around[1][:1], ending=BLANKS)
        # Blanks that begin a value are kept.
        return None if self._pending.strip(BLANKS) else Free(self._around[1][:1] + BLANKS)

    def pieces(self, limit: int, guesses: Guesses | None) -> list[LikelyText]:
        """Return the probable continuation of the tool calls' text, at most `limit` characters."""
        return gather(self.copy()._step, limit)

    def _step(self) -> list[LikelyText] | None:
        """Advance by the probable rest of one part of the call, and return its pieces; None if nothing is probable.

        It is empty if the part was complete already.
        """
        if self._place is _Place.DONE:
            return None
        if self._place is _Place.VALUE:
            return self._rest_of_value()
        body = self._pending.lstrip(BLANKS)
        fitting = [option for option in self._options() if option.text.startswith(body)]
        if not fitting:
            return None
        option, rests = fitting[0], {option.text: option.text[len(body) :] for option in fitting}
        if self._place is _Place.CALL:
            option, pieces = max(fitting, key=lambda each: self._used(each.text)), _pieces(rests, self._used)
        else:
            kind = Kind.CLOSED if option.part == "end" else Kind.CHOICE
            pieces = parted(rests.pop(option.text), list(rests.values()), kind if rests else Kind.FORCED)
        blanks = [] if body else self._blanks(option.part, self._pending)
        self._take(option)
        self._pending = ""
        return blanks + pieces

    @property
    def _state(self) -> tuple[Hashable, ...]:
        """Return the part of `place` on which the options depend."""
        calls = self._calls if "{index}" in self._form.call else 0
        return self._end, self._place, calls, self._tool, self._key, self._written

    @property
    def _parameters(self) -> object:
        return self._functions.get(self._tool)

    def _options(self) -> Sequence[_Option]:
        """Return the texts that may come next, likelier ones first unless the conversation says otherwise."""
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
        """Return the texts before and after an argument's value."""
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
            self._shorten()
            return False
        if value.strip(BLANKS):
            first, last = len(value) - len(value.lstrip(BLANKS)), len(value.rstrip(BLANKS))
            self.seen = {**self.seen, "inside": value[:first], "behind": value[last:]}
        self._pending, self._place = behind, _Place.ARGUMENT
        return True

    def _shorten(self) -> None:
        """Keep of an open value only the text on which its end depends: blanks around it, and its end's beginning."""
        pending, part = self._pending, begun(self._pending, self._around[1])
        value = pending.removesuffix(part)
        if value.strip(BLANKS) and not self._fitting():
            before, behind = value[: len(value) - len(value.lstrip(BLANKS))], value[len(value.rstrip(BLANKS)) :]
            self._pending = before[:LONGEST] + OTHER + behind[-LONGEST:] + part

    def _fitting(self) -> list[str]:
        """Return the listed values of the open argument that have begun."""
        body, closing = self._pending.lstrip(BLANKS), self._closing
        words = listed_of(properties_of(self._parameters).get(self._key))
        return [word for word in words if (word + closing).startswith(body)]

    @property
    def _closing(self) -> str:
        """Return the text that ends a value, with the usual blanks before it."""
        return self._usual("behind")[0] + self._around[1]

    def _rest_of_value(self) -> list[LikelyText] | None:
        """Return the rest of an argument that its schema lists, or of its end marker if that has begun, else None."""
        pending, end, closing = self._pending, self._around[1], self._closing
        body, pieces = pending.lstrip(BLANKS), []
        if not body:
            pieces = self._blanks("inside", pending)
        fitting = self._fitting()
        if fitting:
            rests = {word: (word + closing)[len(body) :] for word in fitting}
            pieces += _pieces(rests, self._used)
        elif body:
            opened = ((mark, begun(pending, mark)) for mark in (closing, end))
            rest = next((mark[len(part) :] for mark, part in opened if part), "")
            if not rest:
                return None
            pieces = parted(rest, [], Kind.ENDED)
        else:
            self._pending += "".join(piece.text for piece in pieces)
            return pieces or None
        self._pending, self._place = "", _Place.ARGUMENT
        return pieces

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


def _pieces(rests: Mapping[str, str], used: Uses) -> list[LikelyText]:
    """Cut the likeliest of `rests` into pieces; the only one is forced."""
    if len(rests) > 1:
        return of_words(rests, used)
    return [LikelyText(rest, Kind.FORCED) for rest in rests.values() if rest]


def begun(text: str, mark: str) -> str:
    """Return the longest beginning of `mark`, but not all of it, that `text` ends with."""
    return next((mark[:size] for size in range(len(mark) - 1, 0, -1) if text.endswith(mark[:size])), "")
