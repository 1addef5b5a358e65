"""A stretch of text that is likely to follow."""

from typing import NamedTuple

from whiflash_sglang.structure.chances import Kind


class Piece(NamedTuple):
    """text: never empty. kind: why it is likely."""

    text: str
    kind: Kind
