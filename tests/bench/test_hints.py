"""What hints bought, from the rounds of both arms."""

import pytest

from whiflash_sglang.lab.bench.arms import NO_HINTS
from whiflash_sglang.lab.bench.cells import Answer, Cell, Load, Round
from whiflash_sglang.lab.bench.report import LoadReport, Side, build_report, divide, spans_of

ALONE = Load(kind="closed", value=1)
GROUPS = {"p0": "chat", "p1": "chat", "t0": "tool_call", "t1": "tool_call"}
HINTED = (Round(2, None), Round(4, "tool_call"), Round(4, "tool_call"), Round(2, None))
UNHINTED = (Round(3, None), Round(3, None), Round(2, None), Round(2, None), Round(1, None), Round(1, None))


def answer(prompt: str, rounds: tuple[Round, ...], seconds: float, last: int = 0) -> Answer:
    tokens = (*range(sum(r.tokens for r in rounds)), last)
    return Answer(
        prompt=prompt, seconds=seconds, ttft=0.1, tokens=tokens, forwards=len(rounds), rounds=rounds
    )


def load_report(*, last: int = 0) -> LoadReport:
    """Two prompts without a span, two with one; hints make those a quarter faster. `last` is t1's last token."""
    cells = []
    for repetition in range(2):
        for arm, divided, plain, seconds in (
            ("auto", HINTED, ((Round(3, None),) * 4), 0.8),
            (NO_HINTS, UNHINTED, ((Round(3, None),) * 4), 1.0),
        ):
            for prompt in GROUPS:
                mixed = prompt.startswith("t")
                one = answer(
                    prompt,
                    divided if mixed else plain,
                    seconds if mixed else 1.0,
                    last if (arm, prompt) == (NO_HINTS, "t1") else 0,
                )
                cells.append(
                    Cell(load=ALONE, arm=arm, repetition=repetition, seconds=1, answers=(one,), rounds=None)
                )
    return build_report(cells, GROUPS, [], {}, {}).loads[0]


def test_rounds_belong_where_they_began() -> None:
    inside = spans_of(answer("t0", HINTED, 1.0))
    assert inside == [False] * 2 + [True] * 8 + [False] * 2
    assert divide(answer("t0", HINTED, 1.0), inside) == (Side(8, 2), Side(4, 2))
    # 0-3 | 3-6 | 6-8 | 8-10 | 10-11 | 11-12: the first began outside and reached inside.
    assert divide(answer("t0", UNHINTED, 1.0), inside) == (Side(7, 3), Side(5, 3))


def test_gain_by_category_inside_and_outside() -> None:
    hints = load_report().hints
    assert set(hints) == {"chat", "tool_call", "overall"}
    chat, tool = hints["chat"], hints["tool_call"]
    assert (chat.speed.ratio, chat.inside) == (1.0, None)
    assert chat.outside is not None
    assert chat.outside.ratio.ratio == 1.0
    assert tool.speed.ratio == pytest.approx(1.25)
    assert tool.inside is not None
    assert (tool.inside.with_hints, tool.inside.without_hints) == (4.0, pytest.approx(7 / 3))
    assert tool.inside.ratio.ratio == pytest.approx(4 / (7 / 3))
    assert tool.inside.tokens == 16
    assert tool.outside is not None
    assert tool.outside.ratio.ratio == pytest.approx(2 / (5 / 3))


def test_answers_that_differ_count_for_speed_only() -> None:
    tool = load_report(last=7).hints["tool_call"]
    assert tool.unequal == 2
    assert tool.speed.ratio == pytest.approx(1.25)
    assert tool.inside is not None
    assert tool.inside.tokens == 8


def test_one_arm_alone_has_no_gain() -> None:
    cell = Cell(load=ALONE, arm="auto", repetition=0, seconds=1, answers=(answer("p0", HINTED, 1.0),))
    assert build_report([cell], GROUPS, [], {}, {}).loads[0].hints == {}
