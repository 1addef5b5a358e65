"""Reading one field of a hint: its value, or an error that names it. Raises nothing but `HintError`."""

import json
from collections.abc import Iterable
from typing import Any, TypeVar

Word = TypeVar("Word", bound=str)


class HintError(ValueError):
    """A hint that cannot be used: `field` is its path in the payload, `reason` says what to change."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


def refuse_unknown(field: str, raw: Iterable[str], known: frozenset[str]) -> None:
    """Raise for the first name that is not `known`."""
    for name in raw:
        if name not in known:
            raise HintError(f"{field}.{printable(name)}", f"is unknown; known are {', '.join(sorted(known))}")


def flag(field: str, value: object) -> bool:
    """A boolean."""
    if not isinstance(value, bool):
        raise HintError(field, "must be true or false")
    return value


def choice(field: str, value: object, allowed: tuple[Word, ...]) -> Word | None:
    """One of the words `allowed`; None: not given."""
    if value is None:
        return None
    for word in allowed:
        if value == word:
            return word
    raise HintError(field, f"must be one of {', '.join(allowed)}")


def short_text(field: str, value: object, most: int) -> str | None:
    """A text of 1 to `most` characters; None: not given."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise HintError(field, "must be a string")
    if not value:
        raise HintError(field, "is empty; leave it out instead")
    if len(value) > most:
        raise HintError(field, f"is {len(value)} characters long; at most {most} are allowed")
    utf8(field, value)
    return value


def short_list(field: str, value: object, what: str, most: int) -> list[object]:
    """A list of at most `most`; what: its entries are, in an error."""
    if not isinstance(value, list):
        raise HintError(field, "must be a list")
    if len(value) > most:
        raise HintError(field, f"holds {len(value)} {what}; at most {most} are allowed")
    return value


def utf8(field: str, text: str) -> bytes:
    """The text's bytes."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise HintError(field, "holds a lone surrogate, which is not text") from None


def json_of(text: str) -> Any:
    """`json.loads`, but a lone surrogate is refused: no tokenizer takes one.

    Raises: ValueError, RecursionError.
    """
    value = json.loads(text)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def printable(name: str) -> str:
    """A name that may be anything, as it may stand in an error."""
    return ascii(name[:32])[1:-1]
