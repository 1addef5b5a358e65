"""Texts that a grammar's own masks choose at random, and what the structure arm would propose at each of their tokens.

    python tests/structure/schema_walks.py JSONSchemaBench/data --schemas 200

walks schemas of JSONSchemaBench (arXiv 2501.10868; a checkout of guidance-ai/jsonschemabench), drawn at random, with
the tokenizer of the tests, and prints what was proposed, how much of it the grammar forbade, and the most work of a
look.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import llguidance.hf
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from structure_grammars import Grammars, small_tokenizer

from whiflash_sglang.spans.vocabulary import Vocabulary, vocabulary_of
from whiflash_sglang.structure.chances import Kind, StructureChances
from whiflash_sglang.structure.guesses import Guesses
from whiflash_sglang.structure.layout import Layout
from whiflash_sglang.structure.schemas import words_of
from whiflash_sglang.structure.sketch import Token, sketch, text_of

WIDTH = 16
"""Tokens of a proposal, as the arm has it."""

FREE = 0.7
"""How often a text goes on with what was proposed, where anything was: else it would hardly leave its first string."""


@dataclass
class Walked:
    """Sums over texts. refused: schemas that the engine does not compile. most_cut: characters that one look gave to
    the tokenizer; most_looks: times that it did.
    """

    schemas: int = 0
    refused: int = 0
    tokens: int = 0
    proposed: int = 0
    forbidden: int = 0
    moved: int = 0
    most_cut: int = 0
    most_looks: int = 0


class _Counting:
    """A tokenizer whose work of one look is counted."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.calls: list[int] = []
        self._encode = vocabulary.encode
        self.vocabulary = vocabulary._replace(encode=self._counted)

    def _counted(self, text: str) -> Any:
        self.calls.append(len(text))
        return self._encode(text)


def walk_schema(
    grammars: Grammars, vocabulary: Vocabulary, schema: Any, rng: random.Random, tokens: int, done: Walked
) -> None:
    """One text of at most `tokens` tokens; `done` is added to."""
    done.schemas += 1
    try:
        raw, judge = (grammars.raw(schema, blanks=True) for _ in range(2))
    except RuntimeError:
        done.refused += 1
        return
    if grammars.engine == "llguidance" and raw.is_error():
        done.refused += 1
        return
    counting, layout = _Counting(vocabulary), Layout()
    matcher = grammars.matcher(raw, counting.vocabulary)
    guesses = Guesses(words_of(json.dumps(schema)), lambda words: {})
    written: list[int] = []
    while len(written) < tokens:
        before = grammars.allowed(raw)
        counting.calls.clear()
        found = sketch(
            matcher,
            counting.vocabulary,
            written,
            WIDTH,
            end=grammars.end,
            likelihood=StructureChances().of,
            guesses=guesses,
            layout=layout,
        )
        if (
            grammars.engine == "xgrammar"
        ):  # llguidance takes tokens only, so it is given every text that is tried
            done.most_cut = max(done.most_cut, sum(counting.calls))
            done.most_looks = max(done.most_looks, len(counting.calls))
        done.moved += not np.array_equal(before, grammars.allowed(raw))
        done.proposed += len(found)
        done.forbidden += _forbidden(grammars, judge, found)
        going = found[0].token if found and rng.random() < FREE else _drawn(before, rng)
        if going is None or going == grammars.end:
            break
        layout.follow(text_of(vocabulary, [going]))
        written.append(going)
        for engine in (raw, judge):
            grammars.accept(engine, going)
    done.tokens += len(written)


def _drawn(allowed: Any, rng: random.Random) -> int | None:
    """Any token that may follow; what ends the text only where nothing else may."""
    choices = np.flatnonzero(allowed)
    return int(rng.choice(choices)) if len(choices) else None


def _forbidden(grammars: Grammars, judge: Any, found: list[Token]) -> int:
    """How many of the tokens the engine's own masks do not allow, one behind the other; `judge` stays as it was."""
    steps = forbidden = 0
    for number, token in enumerate(found):
        if not grammars.allowed(judge)[token.token]:
            forbidden = len(found) - number
        if forbidden or token.kind is Kind.END:
            break
        grammars.accept(judge, token.token)
        steps += 1
    if steps:
        judge.rollback(steps)
    return forbidden


def published(folder: Path, count: int, rng: random.Random) -> Iterator[Any]:
    """Schemas of JSONSchemaBench, drawn from all its files."""
    paths = sorted(folder.rglob("*.json"))
    for path in rng.sample(paths, min(count, len(paths))):
        yield json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--engine", choices=["xgrammar", "llguidance"], default="xgrammar")
    arguments = parser.parse_args()
    tokenizer, rng, done = small_tokenizer(), random.Random(18), Walked()
    grammars = Grammars(arguments.engine, tokenizer, llguidance.hf.from_tokenizer(tokenizer))
    for schema in published(arguments.folder, arguments.schemas, rng):
        walk_schema(grammars, vocabulary_of(tokenizer), schema, rng, arguments.tokens, done)
    print(json.dumps({"engine": arguments.engine, **asdict(done)}))


if __name__ == "__main__":
    main()
