"""Routes by prices that are looked up: nothing here has a clock."""

from dataclasses import replace

import pytest

from whiflash_sglang.prices.costs import FULL_LENGTH
from whiflash_sglang.prices.round_clock import RoundTime
from whiflash_sglang.prices.tables import CostTables, LookedUpCosts, Sizes, Verifications
from whiflash_sglang.routing.assign import assign

ROWS = (1, 2, 4, 8, 16)
SCORES = {"ar": 3.0, "diffusion": 2.5, "none": 1.0}


def costs(row: float = 0.1, ar: float = 0.5, context: float = 0.0) -> LookedUpCosts:
    """A verification of 10 and `row` a row, and `context` for each thousand tokens; two arms that draft three."""
    found = LookedUpCosts({"ar": 4, "diffusion": 4, "none": 1}.__getitem__)
    near = tuple(10.0 + row * n for n in ROWS)
    found.tables = CostTables(
        Verifications(0, 1000, Sizes(ROWS, near), Sizes(ROWS, tuple(s + context for s in near))),
        {"ar": Sizes((1, 2, 4), (ar, ar, ar)), "diffusion": Sizes((1, 2, 4), (0.5, 0.5, 0.5))},
        {"ar": Sizes((4, 8, 64), (0.1, 0.2, 1.6)), "diffusion": Sizes((4, 8, 64), (0.1, 0.2, 1.6))},
    )
    return found


def timed(work: RoundTime, seconds: float, gap: float = 0.0, tokens: int = 3) -> RoundTime:
    return replace(work, tokens=tokens, seconds=seconds, gap=gap)


@pytest.mark.parametrize(
    ("prices", "route"),
    [({}, "ar"), ({"row": 25.0}, "none"), ({"ar": 9.0}, "diffusion")],
    ids=["all cheap", "rows dear", "ar dear"],
)
def test_the_router_goes_by_the_tables(prices: dict[str, float], route: str) -> None:
    assert assign([SCORES], costs(**prices)) == [route]


def test_a_pass_is_as_long_as_pays() -> None:
    """And its price is that of its length. A length that is too short is left again."""
    found = costs()
    found.tables.shorter = {"ar": {2: Sizes((1, 2, 4), (0.2, 0.2, 0.2))}}
    assert found.length("ar", 1, 3) == 3, "before a rate is known"
    found.committed(3, 1.0)
    for kept, longest in ((1, 2), (2, 3), (3, 3), (1, 2)):
        for _ in range(100):
            found.wanted("ar", kept)
        assert found.length("ar", 1, 3) == longest
        assert found.tables.draft("ar", 1) == (0.2 if longest == 2 else 0.5)
    assert found.length("diffusion", 1, 3) == 3


def test_a_verification_is_looked_up_by_its_rows() -> None:
    assert costs().verify(3, 1) == costs().verify(4, 1) == pytest.approx(10.4)
    assert costs().verify(1, 1) == pytest.approx(10.1)


def test_a_block_that_is_always_full_takes_the_rows_that_it_has() -> None:
    found = costs()
    assert found.width("diffusion") == 4, "before any was seen"
    for _ in range(100):
        found.wanted("diffusion", 3)
    assert found.width("diffusion") == pytest.approx(4)


def test_room_is_made_for_what_differs_and_less_of_it_where_many_even_out() -> None:
    found = costs()
    for drafts in (0, 0, 0, 12) * 100:
        found.wanted("none", drafts)
    found.set_contexts([9])
    alone = found.room("none")
    assert alone == pytest.approx(3 + 5.2, rel=0.15)
    found.set_contexts([9] * 16)
    assert found.room("none") == pytest.approx(3 + 5.2 / 4, rel=0.15)
    assert found.width("none") == 1 + found.room("none")


def test_a_context_is_priced_as_that_of_the_batch() -> None:
    found = costs(context=2.0)
    found.set_contexts([300, 200])
    assert found.verify(1, 1) == pytest.approx(11.1)
    found.set_contexts([2000])
    assert found.verify(1, 1) == pytest.approx(14.1)


def test_rounds_move_all_prices_alike_and_no_route() -> None:
    found = costs()
    work = RoundTime(8, 1, 0, {"ar": 1}, {"ar": 4})
    for _ in range(60):
        found.observe(timed(work, 3 * (10.8 + 0.5 + 0.1)))
    assert found.tables.correction.factor == pytest.approx(3.0, rel=0.02)
    assert found.verify(8, 1) == pytest.approx(3 * 10.8, rel=0.02)
    assert found.draft("ar", 1) == pytest.approx(3 * 0.6, rel=0.02), "with the catch-up that is usual"
    assert found.draft("diffusion", 1) == pytest.approx(3 * 0.5, rel=0.02)
    assert assign([SCORES], found) == ["ar"]


def test_the_pause_between_rounds_is_charged_to_all_alike() -> None:
    found = costs()
    found.observe(timed(RoundTime(1, 1), 10.1, gap=2.0))
    assert found.verify(4, 1) - found.verify(1, 1) == pytest.approx(0.3)
    assert found.verify(1, 1) == pytest.approx(12.1)


def test_a_further_draft_must_bring_what_its_row_costs_at_this_load() -> None:
    found = costs()
    assert found.worth("ar") == FULL_LENGTH
    found.observe(timed(RoundTime(4, 1), 10.4, tokens=2))
    rate = 2 / 10.4
    assert found.worth("ar").row == pytest.approx(rate * 0.1)
    assert found.worth("ar").draft == 0.0, "a chain runs whole"


def test_what_an_arm_is_behind_by_is_part_of_its_price() -> None:
    found = costs()
    assert found.draft("ar", 2) == 0.5
    for _ in range(50):
        found.observe(timed(RoundTime(8, 2, 0, {"ar": 2}, {"ar": 6}), 10.8 + 0.5 + 0.2))
    assert found.draft("ar", 2) == pytest.approx(0.7, rel=0.01)
    assert found.draft("ar", 1) == pytest.approx(0.6, rel=0.01)


def test_prices_are_known_from_the_start() -> None:
    found = costs()
    assert found.knows_plain
    assert found.timings("ar") == found.timings("lookup") > 100
    fitted = found.fitted(("ar", "lookup"))
    assert fitted["verify", ""] == pytest.approx(10.1)
    assert fitted["draft", "ar"] == 0.5
    assert fitted["draft", "lookup"] == fitted["draft_request", "lookup"] == 0.0
    assert found.snapshot(("ar",))["draft"] == {"ar": 0.5}
