"""Scripts that measure: what they count, and what they ask servers for."""

import json
from pathlib import Path

from loaded_scripts import load_script

long_answers, aiperf = load_script("long_answers"), load_script("aiperf")


def test_a_round_counts_for_the_stretch_that_it_began_in() -> None:
    found = long_answers.by_stretch([[127, 3, 200], [100]])
    assert {end: (own["rounds"], own["tokens_a_round"]) for end, own in found.items()} == {
        128: (2, 113.5),
        256: (2, 101.5),
    }


def test_held_out_prompts_become_conversations_of_one_turn(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    rows = [
        {
            "category": kind,
            "messages": [{"role": "user", "content": f"{kind} {n}"}],
            "id": f"{kind}{n}",
            **more,
        }
        for kind, more in (("chat", {}), ("tools", {"tools": [tool]}))
        for n in range(3)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sessions = [json.loads(line) for line in aiperf.asked(file, 2)]
    assert len({session["session_id"] for session in sessions}) == 4
    assert [len(session["turns"]) for session in sessions] == [1] * 4
    assert sum("tools" in session["turns"][0] for session in sessions) == 2


def test_the_table_has_a_row_for_each_set_and_server() -> None:
    figures = {"request_count": {"avg": 7.0}, "output_token_throughput": {"avg": 1234.5}}
    table = aiperf.table({("prompts", "plain"): figures, ("prompts", "WHIFLASH"): {}})
    assert "| prompts | plain | 7.00 |  | 1,234 |" in table
    assert len(table.splitlines()) == 4
