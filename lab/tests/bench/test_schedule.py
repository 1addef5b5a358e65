from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whiflash_lab.bench.cells import Answer, Cell, Journal, Load
from whiflash_lab.bench.runner import Step, in_turn, remaining, sweep, whole
from whiflash_sglang.errors import ConfigError

ALONE, FOUR = Load(value=1), Load(value=4)


def cell_of(step: Step) -> Cell:
    answers = tuple(Answer(prompt=p, seconds=1, ttft=0.1, tokens=(1, 2), forwards=1) for p in step.prompts)
    return Cell(load=step.load, arm=step.arm, repetition=step.repetition, seconds=1, answers=answers)


def test_interleaved_asks_each_prompt_of_every_arm_before_the_next() -> None:
    steps = list(sweep(["x", "y", "z"], [ALONE, FOUR], 0, ["p", "q"], ["p", "q"]))
    assert [(s.arm, s.prompts) for s in steps] == [
        *[(arm, ("p",)) for arm in "xyz"],
        *[(arm, ("q",)) for arm in "yzx"],
        *[(arm, ("p", "q")) for arm in "zxy"],
    ]


@given(arms=st.integers(1, 5), prompts=st.integers(1, 6), repetitions=st.integers(1, 4))
@settings(deadline=None)
def test_both_orders_hold_the_same_steps(arms: int, prompts: int, repetitions: int) -> None:
    names, ids = [f"arm{i}" for i in range(arms)], [f"p{i}" for i in range(prompts)]
    together = [s for r in range(repetitions) for s in sweep(names, [ALONE, FOUR], r, ids, ids)]
    apart = list(in_turn(names, [ALONE, FOUR], repetitions, ids, ids))
    assert sorted(s.key for s in together) == sorted(s.key for s in apart)
    assert len(set(together)) == arms * repetitions * (prompts + 1)


def test_a_journal_resumes_where_it_was_cut(tmp_path: Path) -> None:
    steps = list(sweep(["x", "y"], [ALONE, FOUR], 0, ["p", "q"], ["q", "p"]))
    journal = Journal(tmp_path / "cells.jsonl", "plan")
    assert journal.read() == []
    journal.begin()
    for step in steps[:3]:
        journal.append(cell_of(step))
    assert journal.read() == [cell_of(step) for step in steps[:3]]
    assert remaining(steps, journal.read()) == steps[3:]
    with journal.path.open("a") as lines:
        lines.write(cell_of(steps[3]).model_dump_json()[:40])
    assert remaining(steps, journal.read()) == steps[3:], "half a line is not a cell"
    journal.begin(journal.read())
    for step in steps[3:]:
        journal.append(cell_of(step))
    assert journal.read() == [cell_of(step) for step in steps], "nothing is lost and the half line is gone"


def test_cells_of_another_plan_are_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "cells.jsonl", "one").begin()
    with pytest.raises(ConfigError, match="another plan"):
        Journal(tmp_path / "cells.jsonl", "other").read()
    (tmp_path / "cells.jsonl").write_text("[]\n")
    with pytest.raises(ConfigError, match="another plan"):
        Journal(tmp_path / "cells.jsonl", "other").read()


def test_an_earlier_run_stays_beside_a_new_one(tmp_path: Path) -> None:
    (step,) = sweep(["x"], [FOUR], 0, ["p"], ["p"])
    journal = Journal(tmp_path / "cells.jsonl", "plan")
    journal.begin([cell_of(step)])
    journal.begin()
    assert journal.read() == []
    assert Journal(tmp_path / "cells.jsonl.before", "plan").read() == [cell_of(step)]


def test_a_repetition_that_a_resumed_run_did_not_end_is_left_out() -> None:
    steps = [step for number in range(3) for step in sweep(["x", "y"], [ALONE], number, ["p", "q"], ["p"])]
    cells = [cell_of(step) for step in steps]
    assert whole(cells[:-1]) == cells[:8]
    assert whole(cells) == cells


def test_answers_in_any_order_are_the_same_step() -> None:
    step = Step(FOUR, "x", 0, ("b", "a"))
    assert cell_of(step._replace(prompts=("a", "b"))).key == step.key
