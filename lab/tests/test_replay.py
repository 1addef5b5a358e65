"""`whiflash lab replay`: tokens a round by source, and calls that are known before they are written."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_target
from transformers import AutoTokenizer
from typer.testing import CliRunner

from whiflash_lab.conversations import RecordedTurn
from whiflash_lab.replay import Guess, Walk, curve, known_ahead
from whiflash_sglang.checkpoints.manifest import Lookup, Structure
from whiflash_sglang.cli.app import app
from whiflash_sglang.spans.vocabulary import vocabulary_of

TOOL = {"name": "find", "parameters": {"type": "object", "properties": {"path": {"type": "string"}}}}
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": TOOL}]
CALL = '<tool_call>\n{"name": "find", "arguments": {"path": "src/one/two"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("replay") / "target")


def walk_of(tokenizer: Path, parser: str | None = "hermes") -> tuple[Walk, Any]:
    read = AutoTokenizer.from_pretrained(tokenizer)
    return Walk(vocabulary_of(read), Lookup(max_width=16), Structure(max_width=16), parser), read


def test_tokens_are_counted_by_their_source(tokenizer: Path) -> None:
    walk, read = walk_of(tokenizer)

    def turn(prompt: str, answer: str) -> RecordedTurn:
        return RecordedTurn(read.encode(prompt), [*read.encode(answer), read.eos_token_id])

    new = walk.answer(RecordedTurn([1], list(range(300, 340))), ())
    assert (new.tokens, new.rounds, sum(new.accepted.values())) == (39, 39, 0), "no token comes twice"
    for _ in range(4):  # chances are learned
        copied = walk.answer(turn("one two three four five six seven eight. ", "one two three four five six seven"), ())
    assert set(copied.accepted) == {"own text"}
    assert copied.rounds < copied.tokens <= copied.rounds + copied.accepted["own text"]
    assert copied.rows >= copied.rounds + copied.accepted["own text"]
    new = "zyx wvu tsr qpo nml kji hgf"
    theirs = [walk.answer(turn(f"{i}. ", new), (), task=task) for i, task in enumerate("aaab")]
    assert theirs[2].accepted["group"] > 0
    assert not theirs[0].accepted["group"] + theirs[3].accepted["group"], "no other answer of its task"
    first = walk.answer(turn("Find it. ", CALL), TOOLS)
    assert first.accepted["forced"] > 0
    assert walk.calls == 1
    again = [walk.answer(turn(f"{CALL} Again. ", CALL), TOOLS) for _ in range(6)][-1]
    assert again.tokens / again.rounds > first.tokens / first.rounds
    last = [guess for guess in walk.guesses if guess.call == walk.calls]
    assert last[0].right
    assert last[0].left > 40, "known at its beginning"
    unknown, _ = walk_of(tokenizer, None)
    assert not unknown.answer(turn("Find it. ", CALL), TOOLS).accepted["forced"]
    assert not unknown.guesses


def test_guesses_are_tabulated_by_their_chance() -> None:
    guesses = [Guess(0.0, False, 30, 1), Guess(0.85, True, 20, 1), Guess(0.97, True, 2, 1), Guess(0.85, False, 9, 2)]
    rows = curve(guesses)
    assert [(row["least"], row["rounds"], row["right"]) for row in rows] == [(0.0, 1, 0), (0.8, 2, 0.5), (0.95, 1, 1)]
    assert known_ahead(guesses, 4, 0.8) == {"least": 0.8, "calls": 0.5, "right": 0.5, "left": 14.5}
    assert known_ahead(guesses, 4, 0.99)["calls"] == 0


def test_a_log_is_replayed_by_category(tokenizer: Path, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "one two three four five six"}
    said = [{"role": "user", "content": "Say one two three four five six"}, answer]
    records = [{"messages": said * turns, "category": name} for name, turns in (("short", 1), ("long", 3))]
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, records)))
    line = ["lab", "replay", str(log), "--tokenizer", str(tokenizer)]
    found = json.loads(CliRunner().invoke(app, [*line, "--json"], catch_exceptions=False).stdout)["by_category"]
    assert [found[name]["answers"] for name in ("short", "long", "all")] == [1, 3, 4]
    assert found["all"]["tokens"] == found["short"]["tokens"] + found["long"]["tokens"]
    assert found["long"]["tokens_per_round"] > 1.5
    shown = CliRunner().invoke(app, line)
    assert "+ own text" in shown.stdout
    assert "replaying conversations" in shown.stderr
