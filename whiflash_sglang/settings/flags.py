"""List of the flags that WHIFLASH adds to SGLang's command line, for help texts and docs. Imports no SGLang."""

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from whiflash_sglang.settings.config import Flags, flag_of


def flags() -> Iterator[tuple[str, str, str]]:
    """Yield every flag, in the order of the fields of `Flags`: its name, its choices or kind of value, and its help."""
    for field, info in Flags.model_fields.items():
        meaning = " ".join((info.description or "").split())
        default = "" if info.default is None else f" Default: {info.default}."
        yield flag_of(field), _takes(info.annotation), meaning + default


def _takes(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return "|".join(get_args(annotation))
    if origin is Annotated:
        return _takes(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return "|".join(_takes(part) for part in get_args(annotation) if part is not NoneType)
    return {int: "INTEGER", float: "NUMBER", str: "PATH"}[annotation]
