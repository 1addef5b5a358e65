"""Prompt files, their mixing, and the grammar that goes with a row."""

import json
from collections import Counter
from pathlib import Path

import pytest

from whiflash_train.answers.prompts import balanced, read_rows


def rows(**counts: int) -> list[dict[str, object]]:
    return [{"id": f"{name}{i}", "category": name} for name, count in counts.items() for i in range(count)]


def test_every_prefix_is_mixed_by_weight() -> None:
    order = [row["category"] for row in balanced(rows(chat=400, code=400, agent=400), {"agent": 0.5}, seed=3)]
    for length in (10, 50, 200):
        count = Counter(order[:length])
        assert abs(count["chat"] - 0.4 * length) <= 1
        assert abs(count["agent"] - 0.2 * length) <= 1


def test_everything_comes_once_and_the_seed_decides() -> None:
    data = rows(chat=30, code=7)
    first, again, other = (list(balanced(data, {}, seed)) for seed in (1, 1, 2))
    assert sorted(row["id"] for row in first) == sorted(row["id"] for row in data)
    assert first == again != other


def test_a_weight_of_zero_leaves_a_category_out() -> None:
    assert {row["category"] for row in balanced(rows(chat=5, code=5), {"code": 0}, 0)} == {"chat"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompts"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n{oops', "line 2: not JSON"),
        ('{"category": "chat"}', "line 1: messages: Field required .*; a row needs 'messages'"),
        ('{"messages": "hello"}', "line 1: messages: "),
        ('{"messages": [{"content": "x"}]}', "line 1: messages.0.role: "),
        ('{"messages": [{"role": "user"}], "id": 7}', "line 1: id: "),
        ('{"messages": [{"role": "user"}], "id": ["a"]}', "line 1: id: "),
        ('{"messages": [{"role": "user"}], "category": null}', "line 1: category: "),
        ('{"messages": [{"role": "a", "tool_calls": [{}]}]}', "line 1: messages.0.tool_calls.0.function: "),
        ('{"messages": [{"role": "a"}], "response_format": {"type": "json_schema"}}', "line 1: response_format: "),
    ],
)
def test_unusable_files_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(file)


def test_rows_without_an_id_get_a_stable_one(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}))
    assert read_rows(file)[0]["id"] == read_rows(file)[0]["id"]
