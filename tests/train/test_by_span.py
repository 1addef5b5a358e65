"""Which drafter is better in which span, on answers and replays made by hand."""

import numpy as np
import pytest
import torch

from whiflash_sglang.lab.judging.evaluation import PROSE, by_span, kinds_of, spans_table
from whiflash_sglang.train.replay import LOOKUP, Replay

PIECES = [b"So: ", b"<tool_", b"call>", b'{"a"', b": 1}", b"</tool_call>", b"```", b"x = 1", b"\n"]
TOOLS = {"tools": [{"type": "function"}]}


def answer(name: str, eagle3: list[int], dflash: list[int], loop_from: int) -> Replay:
    none = np.zeros(len(eagle3))
    lengths = {"eagle3": np.array(eagle3), "dflash": np.array(dflash), LOOKUP: none.astype(int)}
    return Replay(
        name, "agent", lengths, torch.zeros(len(eagle3), 2), loop_from, none, none > 0, none.astype(int)
    )


@pytest.mark.parametrize(
    ("row", "tokens", "kinds"),
    [
        ({}, [0, 6, 7, 6, 0], [PROSE, PROSE, "code", "code", PROSE]),
        ({"response_format": {"type": "json_schema"}}, [3, 4], ["json", "json"]),
        (TOOLS, [1, 2, 3, 5, 0], ["tool_call"] * 4 + [PROSE]),
        ({}, [1, 2, 3], [PROSE] * 3),
    ],
)
def test_a_token_is_written_into_what_a_server_would_infer(
    row: dict[str, object], tokens: list[int], kinds: list[str]
) -> None:
    assert kinds_of(row, tokens, "hermes", PIECES) == kinds


def test_rounds_are_of_the_span_that_their_drafts_begin_in() -> None:
    answers = [answer("a", [3, 0, 1, 9], [1, 0, 2, 0], loop_from=3), answer("b", [1, 1], [1, 4], loop_from=2)]
    kinds = {"a": ["json", PROSE, PROSE, "code", "code"], "b": [PROSE, PROSE, "code"]}
    found = by_span(answers, kinds)
    assert list(found) == [PROSE, "code"]
    assert found[PROSE] == {
        "positions": 3,
        "acceptance_length": {"eagle3": pytest.approx(7 / 3), "dflash": pytest.approx(5 / 3)},
        "rounds_won": {"eagle3": pytest.approx(1 / 3), "dflash": 0.0},
    }
    assert found["code"]["acceptance_length"] == {"eagle3": 2.0, "dflash": 4.0}
    assert found["code"]["rounds_won"] == {"eagle3": 0.0, "dflash": 1.0}
    assert spans_table(found).row_count == 2
