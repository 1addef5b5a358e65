"""Time that rounds may spend on grammars, on a clock that only the tests move."""

import pytest

from whiflash_sglang.structure.spending import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    LOOKING,
    QUESTION_SECONDS,
    REQUEST_SECONDS,
    ROUND_SECONDS,
    Spending,
)

DEAR = 2 * REQUEST_SECONDS


class Work:
    """Steps of `seconds` each, until its time is up or `most` were made."""

    def __init__(self, *, cuts: bool = True) -> None:
        self.now = 0.0
        self.idle = 0.0
        self.spending = Spending(lambda: self.now, lambda: self.now + self.idle, cuts=cuts)

    def steps(self, rid: str, seconds: float, most: int = 1000, *, asks: bool = False) -> int:
        done = 0

        def work() -> None:
            nonlocal done
            while done < most and not self.spending.exhausted():
                self.now, done = self.now + seconds, done + 1

        (self.spending.ask if asks else self.spending.on)(rid, work)
        return done


def test_a_request_has_its_share_and_a_round_has_its_own() -> None:
    work = Work()
    step = REQUEST_SECONDS / 7.5
    work.spending.begin(["a"])
    assert work.steps("a", step, asks=True) == int(7.5 * LOOKING) + 1
    assert work.steps("a", step) == 4, "the rest is left for the masks"
    assert work.steps("a", step) == 0
    assert not work.spending.exhausted(), "nobody works"
    rids = [str(number) for number in range(100)]
    for _ in range(2):  # the first shows how many there are
        work.spending.begin(rids)
        began = work.now
        for rid in rids:
            work.steps(rid, ROUND_SECONDS / 1000)
    assert work.now - began == pytest.approx(ROUND_SECONDS, rel=0.2)


def test_questions_have_a_time_of_their_own_and_who_waits_is_first() -> None:
    work, rids = Work(), ["a", "b", "c"]
    work.spending.begin(rids)
    most = QUESTION_SECONDS * len(rids)
    assert [work.steps(rid, 0.6 * most, 1, asks=True) for rid in rids] == [1, 1, 0]
    assert work.steps("c", 1e-6, 3) == 3, "masks are made all the same"
    work.spending.begin(rids)
    assert work.spending.late == "c"
    assert work.steps("c", 0.6 * most, 1, asks=True)
    work.spending.begin(rids)
    assert work.spending.late is None


def test_a_busy_machine_is_nobodys_work() -> None:
    work = Work()

    def waits() -> bool:
        work.idle = 10 * REQUEST_SECONDS
        return work.spending.exhausted()

    assert not work.spending.on("a", waits)
    assert not work.spending.is_dear("a")


def test_a_dear_request_pauses_and_each_time_twice_as_long() -> None:
    work, lengths = Work(), []
    work.spending.begin(["a", "b"])
    for _ in range(9):
        assert not work.spending.is_dear("a")
        work.steps("a", DEAR, most=1)
        work.steps("b", REQUEST_SECONDS / 2, most=1)
        work.spending.begin(["a", "b"])
        lengths.append(0)
        while work.spending.is_dear("a"):
            assert not work.spending.is_dear("b")
            lengths[-1] += 1
            work.spending.begin(["a", "b"])
    assert lengths[:4] == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE, 8 * FIRST_PAUSE]
    assert lengths[-1] == LONGEST_PAUSE
    work.spending.begin(["a"])  # a cheap round
    work.steps("a", DEAR, most=1)
    check_first_pause(work)


def check_first_pause(work: Work) -> None:
    """Request `a` takes no drafts for the shortest pause, and then some again."""
    for _ in range(FIRST_PAUSE):
        work.spending.begin(["a"])
        assert work.spending.is_dear("a")
    work.spending.begin(["a"])
    assert not work.spending.is_dear("a")


def test_a_pause_lasts_while_the_text_itself_is_dear() -> None:
    work = Work()
    for _ in range(3 * FIRST_PAUSE):
        work.spending.begin(["a"])
        work.steps("a", DEAR, most=1)
    check_first_pause(work)
    work.steps("a", DEAR, most=1)
    work.spending.begin(["b"])
    assert not work.spending.is_dear("a"), "requests that are not in the batch are forgotten"


def test_several_ranks_end_no_work_early_and_judge_it_later() -> None:
    work = Work(cuts=False)
    work.spending.begin(["a"])
    assert work.steps("a", DEAR, most=7) == 7
    work.spending.begin(["a"])
    assert work.spending.is_dear("a")
