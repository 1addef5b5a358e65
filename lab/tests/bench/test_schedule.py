from whiflash_lab.bench.cells import Load
from whiflash_lab.bench.runner import sweep

ALONE, FOUR = Load(value=1), Load(value=4)


def test_interleaved_asks_each_prompt_of_every_arm_before_the_next() -> None:
    steps = list(sweep(["x", "y", "z"], [ALONE, FOUR], 0, ["p", "q"], ["p", "q"]))
    assert [(s.arm, s.prompts) for s in steps] == [
        *[(arm, ("p",)) for arm in "xyz"],
        *[(arm, ("q",)) for arm in "yzx"],
        *[(arm, ("p", "q")) for arm in "zxy"],
    ]
