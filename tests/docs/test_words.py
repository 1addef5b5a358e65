"""The check of words (`scripts/words.py`): what it finds in code and in pages, and what it leaves alone."""

from types import ModuleType

import pytest
from loaded_scripts import load_script


@pytest.fixture(scope="module")
def words() -> ModuleType:
    return load_script("words")


CODE = '''"""The file stands here.

And `stands` is a name.
"""

import re

PATTERN = re.compile("told")
LINE = "written anew"  # words: data
"""Of a file."""


def place(told: str) -> str:
    """Args:
        told: a message.

    What is it? A word. Where it is, is said.
    """
    # It lies there.
    # Whoever reads it.
    return f"{told} tells all: {len(told)}"
'''


def test_code_is_checked_in_comments_docstrings_and_messages(words: ModuleType) -> None:
    assert words.found_in_code(CODE) == [(1, "'stands'"), (19, "'lies'"), (21, "'tells'")]
    openings = [(number, reason.split()[-1]) for number, reason in words.openings(CODE)]
    assert openings == [(10, "'Of'"), (14, "'Where'"), (20, "'Whoever'")]
    begun = "".join(f'def f{i}():\n    """{line}"""\n' for i, line in enumerate(("Return it.", "Its parts.", "As f0.")))
    assert [number for number, _ in words.first_words(begun)] == [3, 5]


STALE = """Names `queue.Queue`, `metrics.SERIES`, :mod:`.tables`, `costs.Costs.draft` and `prices/costs.py`.

Names `metrics.SERIALS`, `gone.SERIES`, :mod:`.looked_up`, `telemetry.series` and `routing/looked_up.py`.
"""


def test_names_of_modules_that_are_gone_are_found(words: ModuleType) -> None:
    found = list(words.stale(STALE))
    assert [line for line, _ in found] == [3] * 5
    assert {reason.removesuffix(" is not there") for _, reason in found} == {
        "`metrics.SERIALS`",
        "`gone.SERIES`",
        ":mod:`.looked_up`",
        "`telemetry.series`",
        "`routing/looked_up.py`",
    }


def test_pages_are_checked_for_words_openings_and_length(words: ModuleType) -> None:
    page = f"It stands.\n\n`It stands`\n\nWhat it does.\n\n{'word ' * 32}\n\n{'word ' * 33}"
    assert words.found(page) == [(1, "'stands'"), (5, "a sentence opens with 'What'"), (9, "a sentence of 33 words")]
