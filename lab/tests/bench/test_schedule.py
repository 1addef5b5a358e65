from hypothesis import given, settings
from hypothesis import strategies as st

from whiflash_lab.bench.cells import Load
from whiflash_lab.bench.runner import in_turn, sweep

ALONE, FOUR = Load(value=1), Load(value=4)


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
    assert set(together) == set(apart)
    assert len(together) == len(apart)
    assert len(set(together)) == arms * repetitions * (prompts + 1)
