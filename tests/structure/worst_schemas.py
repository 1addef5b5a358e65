"""Schemas of tools whose grammars cost much: a client may send any of them."""

from typing import Any


def optional(count: int, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(count)}, **more}


def nested(levels: int) -> dict[str, Any]:
    return optional(0, properties={"a": nested(levels - 1)}) if levels else {"type": "string"}


def doubled(levels: int) -> dict[str, Any]:
    part = {"type": "string"} if not levels else doubled(levels - 1)
    return {"anyOf": [part, {"type": "array", "items": part}]} if levels else part


WORST: dict[str, dict[str, Any]] = {
    "minProperties": optional(240, minProperties=3),
    "maxProperties": optional(120, maxProperties=7),
    "many": optional(1000),
    "nested": nested(400),
    "alternatives": doubled(9),
    "pattern": optional(0, properties={"a": {"type": "string", "pattern": "^(a|b|ab){1,20000}$"}}),
    "listed": optional(0, properties={"a": {"enum": [f"{i}" * 50 for i in range(300)]}}),
    "items": optional(0, properties={"a": {"type": "array", "minItems": 10**6, "items": {"type": "string"}}}),
    "lengths": optional(0, properties={"a": {"type": "string", "minLength": 10**6, "maxLength": 10**9}}),
    "all of": {"allOf": [optional(60, minProperties=i) for i in range(9)]},
}
"""Parameters whose whole grammar takes xgrammar seconds to hours, or gigabytes."""
