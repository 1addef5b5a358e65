"""An extension of griffe: what docstrings say as text for people reads as such on the API pages, too.

The docstrings of this repository say what fields and parameters are in running text, `rows: [B] int64. limits: drafts
wanted.` or a line for each. Markdown would make one paragraph of it.
"""

import re
from typing import Any

import griffe


class DocstringFields(griffe.Extension):
    """Formats a docstring's text on the parameters of its function, or the fields of its class, as a list."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        self._rewrite(cls, set(cls.members))

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        self._rewrite(func, {parameter.name for parameter in func.parameters})

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        self._rewrite(attr, set())

    def _rewrite(self, documented: griffe.Object, names: set[str]) -> None:
        if documented.docstring is not None:
            documented.docstring.value = escaped(listed(documented.docstring.value, names))


def escaped(text: str) -> str:
    """Return `text` with asterisks between factors escaped outside code, which Markdown would read as emphasis.

    >>> print(escaped("[L*2*D, H], `a*b*c`"))
    [L\\*2\\*D, H], `a*b*c`
    """
    parts = text.split("`")
    parts[::2] = [re.sub(r"(?<=[\w)])\*(?=[\w(])", r"\\*", part) for part in parts[::2]]
    return "`".join(parts)


def listed(text: str, names: set[str]) -> str:
    """Return `text` with each paragraph that begins with one of `names` and a colon as a Markdown list.

    >>> print(listed("What it is.\\n\\na: the first. b, c: the rest\\n    of them.", {"a", "b", "c"}))
    What it is.
    <BLANKLINE>
    - **a**: the first.
    - **b, c**: the rest of them.
    """
    if not names:
        return text
    name = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    start = re.compile(rf"(?:^|(?<=[.;] ))((?:{name})(?:, (?:{name}))*): ")
    paragraphs = []
    for paragraph in text.split("\n\n"):
        line = " ".join(paragraph.split())
        if start.match(line):
            items = start.sub(r"\n- **\1**: ", line).split("\n")
            paragraph = "\n".join(item.rstrip(" ;") for item in items if item.strip())
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)
