"""Words, openings and long sentences that this project does without: `python scripts/words.py [FILE …]`.

Exits with 1 if it finds one. The rules are those of CONTRIBUTING.md. Pages are checked for all three; Python files for
words, in their comments, docstrings and messages, for openings, in comments and docstrings, and for modules that are
not there; tests for openings. Code, tables of code and quotations in backticks are skipped.
"""

import ast
import importlib.util
import io
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
BANNED = re.compile(
    r"\b(tells?|told|lies?|lay|lying|stands?(?!-in)|stood|mends?|mended|goes? by|anew|(?:by|at) hand|of before)\b",
    re.IGNORECASE,
)
OPENING = re.compile(r"(?:^|(?<=[.!?:] )|(?<=[.!?:]\*\* ))(What|Who|Of|Where|Whoever|Whatever)\b(?![^.!?]*\?)")
FIRST = re.compile(
    r"(Of|Who|What|Where|Itself|As|Those|For|In|With|By|To|Equal|Not|None|So|The same|Same|How|Its|That|Such)\b"
)
"""Words with which no docstring of a function or class begins: a verb, "Whether" or the thing returned stands there."""
CODE = re.compile(r"^```.*?^```|^<!-- (\w+): written.*?<!-- end of \1 -->|`[^`\n]+`", re.MULTILINE | re.DOTALL)


SENTENCE = re.compile(r"(?<=[.!?:;])\s+|\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )|\||\n(?=#)")
LINK = re.compile(r"\]\([^)]*\)")
LONGEST = 32
"""Words of a sentence; CONTRIBUTING.md asks for 25."""

DATA = "# words: data"
CODE_FOLDERS = ("whiflash_sglang", "cpu", "kernels", "lab", "sdk", "train", "scripts", "examples")
PARTS = ("cpu", "lab", "train")
NAME = re.compile(r"(:mod:)?`[~.]*(\w+(?:\.\w+)*)`")
PLACES = ("", "whiflash_sglang", *PARTS)
FILE = re.compile(r"`(([a-z]\w*)/[\w/]+\.py)`")


def pages() -> list[Path]:
    """Return the paths of the Markdown pages for users and developers."""
    packages = (*CODE_FOLDERS, "tests", "training_data")
    described = [page for folder in packages for page in sorted((ROOT / folder).rglob("README.md"))]
    return [*sorted(ROOT.glob("*.md")), *described, *sorted((ROOT / "docs").rglob("*.md"))]


def found(text: str) -> list[tuple[int, str]]:
    """Return line numbers of a page, from 1 on, and the fault of each: a banned word, an opening or a long sentence."""
    prose = CODE.sub(lambda match: re.sub(r"[^\n]", "x", match[0]), text)
    wrong = []
    for number, line in enumerate(prose.splitlines(), 1):
        if not line.startswith("#"):
            wrong += [(number, f"{match[0]!r}") for match in BANNED.finditer(line)]
            wrong += [(number, f"a sentence opens with {match[1]!r}") for match in OPENING.finditer(line)]
    return wrong + [(line, f"a sentence of {words} words") for line, words in too_long(text)]


def too_long(text: str) -> Iterator[tuple[int, int]]:
    """Yield the line, from 1 on, at which each sentence ends that is too long, and its number of words."""
    # Code in a sentence is a word of it; a block of lines is none, however many it has.
    prose = CODE.sub(lambda match: "\n" * match[0].count("\n") or "x", text)
    prose = LINK.sub("]", prose)
    start = 0
    for end in [*(match.start() for match in SENTENCE.finditer(prose)), len(prose)]:
        if (words := len(prose[start:end].split())) > LONGEST:
            yield prose.count("\n", 0, end) + 1, words
        start = end


def modules() -> list[Path]:
    """Return the Python files of packages, scripts, examples and tests without this one, which lists the words."""
    files = (path for folder in (*CODE_FOLDERS, "tests") for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in files if path != Path(__file__).resolve()]


def comments(text: str) -> list[tuple[int, str]]:
    """Return line numbers, from 1 on, with the comments there."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]


def found_in_code(text: str) -> list[tuple[int, str]]:
    """Return line numbers, from 1 on, with the banned words there, in comments and in strings of several words.

    A word before a colon is the name of an argument. Lines that end with `# words: data` are skipped.
    """
    strings = [
        (node.lineno, node.value)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
    ]
    prose = (
        (start, CODE.sub(lambda match: re.sub(r"[^\n]", "x", match[0]), said))
        for start, said in comments(text) + strings
    )
    lines = ((start + after, line) for start, said in prose for after, line in enumerate(said.splitlines()))
    skipped = {number for number, comment in comments(text) if comment == DATA}
    return sorted(
        (number, f"{match[0]!r}")
        for number, line in lines
        if number not in skipped
        for match in BANNED.finditer(line)
        if not line.startswith(":", match.end())
    )


def openings(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines, from 1 on, of comments and docstrings in which a sentence opens with a word of `OPENING`."""
    docstrings = [
        (node.lineno, paragraph)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for paragraph in str(node.value.value).split("\n\n")
    ]
    for number, prose in sorted(docstrings + comments(text)):
        for match in OPENING.finditer(" ".join(prose.lstrip("#: ").split())):
            yield number, f"a sentence opens with {match[1]!r}"


def first_words(text: str) -> Iterator[tuple[int, str]]:
    """Yield lines, from 1 on, of functions and classes whose docstring begins with a word of `FIRST`."""
    for node in ast.walk(ast.parse(text)):
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if named and (match := FIRST.match(ast.get_docstring(node) or "")):
            yield node.lineno, f"the docstring of {node.name} begins with {match[0]!r}"


@cache
def defined() -> dict[str, set[str]]:
    """Return last part of a module's or package's name → names that it defines."""
    names = defaultdict[str, set[str]](set)
    for file in (file for folder in CODE_FOLDERS[:6] for file in (ROOT / folder).rglob("*.py")):
        *_, outer, own = (file.parent if file.stem == "__init__" else file.with_suffix("")).parts
        names[outer].add(own)
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names[own].add(node.id)
            elif hasattr(node, "name") and (file.stem == "__init__" or not isinstance(node, ast.alias)):
                names[own].add(str(node.name))
    return names


def stale(text: str) -> Iterator[tuple[int, str]]:
    """Yield lines, from 1 on, that name a missing module, a missing class or constant of one, or a missing file."""
    known = defined()
    for number, line in enumerate(text.splitlines(), 1):
        for match in NAME.finditer(line):
            first, name = [*match[2].split("."), ""][:2]
            if match[1]:
                gone = match[2].rpartition(".")[2] not in known
            elif first in known:
                package = name and (ROOT / "whiflash_sglang" / first).is_dir()
                gone = name not in known[first] and (package or name[:1].isupper())
            else:  # somebody else's module, unless the name is ours
                moved = name[:1].isupper() and first.islower() and any(name in own for own in known.values())
                gone = moved and importlib.util.find_spec(first) is None
            if gone:
                yield number, f"{match[0]} is not there"
        for path, folder in FILE.findall(line):
            known_folder = any((ROOT / part / folder).is_dir() for part in PLACES)
            if known_folder and not any((ROOT / part / path).exists() for part in PLACES):
                yield number, f"`{path}` is not there"


def main(arguments: list[str]) -> int:
    wrong = []
    for file in [Path(name) for name in arguments] or pages() + modules():
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".py":
            in_tests = any(ROOT / part / "tests" in file.resolve().parents for part in ("", *PARTS))
            reasons = [*openings(text), *([] if in_tests else (*found_in_code(text), *stale(text)))]
            reasons += [] if "tests" in file.parts else first_words(text)
        else:
            reasons = found(text)
        wrong += [f"{file}:{number}: {reason}" for number, reason in reasons]
    print("\n".join(wrong) or "no banned word or opening, no long sentence, no module that is gone")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
