"""Prices that are looked up, and routes by them: nothing here has a clock but what measures, and that one is moved."""

from dataclasses import replace

import pytest
from device_clock import DeviceClock

from whiflash_sglang.device.clock import measure
from whiflash_sglang.drafts.rates import Mean
from whiflash_sglang.prices.correction import WINDOW, Correction
from whiflash_sglang.prices.costs import FULL_LENGTH, LEFT_OUT, PLAIN_ROUNDS, Costs
from whiflash_sglang.prices.round_clock import RoundTime
from whiflash_sglang.prices.tables import CostTables, Sizes, Verifications
from whiflash_sglang.routing.assign import assign

ROWS = (1, 2, 4, 8, 16)
SCORES = {"ar": 3.0, "diffusion": 2.5, "none": 1.0}


def costs(row: float = 0.1, ar: float = 0.5, context: float = 0.0, short: float = 0.0) -> Costs:
    """A verification of 10 and `row` a row, and `context` for each thousand tokens beyond a hundred; two arms that
    draft three. short: a pass of EAGLE-3 with two drafts; 0: there is none.
    """
    found = Costs({"ar": 4, "diffusion": 4, "none": 1}.__getitem__)
    near = tuple(10.0 + row * n for n in ROWS)
    catch_up = Sizes((4, 8, 64), (0.1, 0.2, 1.6))
    found.tables = CostTables(
        Verifications(100, 1100, Sizes(ROWS, near), Sizes(ROWS, tuple(s + context for s in near))),
        {"ar": Sizes((1, 2, 4), (ar, ar, ar)), "diffusion": Sizes((1, 2, 4), (0.5, 0.5, 0.5))},
        {"ar": catch_up, "diffusion": catch_up},
        {"ar": {2: Sizes((1, 2, 4), (short, short, short))}} if short else {},
    )
    return found


@pytest.mark.parametrize(("options", "seconds"), [({}, 2.5), ({"repeats": 3, "of": min}, 1.0)])
def test_a_measurement_is_behind_a_first_run_and_waits_for_each(options: dict, seconds: float) -> None:
    clock, durations = DeviceClock(), iter([0.5, 1.0, 9.0, 2.0, 3.0, 2.5])

    def body() -> None:
        clock.now += next(durations)

    assert measure(body, clock, **options) == seconds


def test_a_price_does_not_hold_the_time_in_which_the_host_issues_the_work() -> None:
    clock = DeviceClock()
    assert measure(lambda: clock.issues(host=1.0, device=2.5), clock) == 2.5


def test_a_price_is_the_graphs_that_holds_the_rows() -> None:
    table = Sizes.measured([4, 1, 2, 8], {1: 1.0, 2: 1.5, 4: 1.4, 8: 3.0}.__getitem__)
    assert table.sizes == (1, 2, 4, 8)
    assert [table.at(n) for n in (1, 2, 3, 4, 5, 8, 16)] == [1.0, 1.5, 1.5, 1.5, 3.0, 3.0, 6.0]


def test_without_graphs_a_price_is_on_the_line_between_two_sizes() -> None:
    """The second row may cost more than all behind it; no size is rounded up, and no draft left out for that."""
    table = Sizes((1, 2, 8), (1.0, 1.6, 2.2), steps=False)
    assert [table.at(n) for n in (0.5, 1, 1.5, 2, 5, 8, 16)] == pytest.approx([1.0, 1.0, 1.3, 1.6, 1.9, 2.2, 4.4])
    assert table.slope(1) == pytest.approx(1.2 / 7)
    found = Costs(lambda arm: 8)
    found.tables = CostTables(Verifications(1, 2, table, table), {}, {})
    found.set_contexts([1])
    assert [found.packed(1, drafts) for drafts in range(9)] == list(range(9))


def test_tables_without_order_are_refused() -> None:
    with pytest.raises(ValueError, match="ascend"):
        Sizes((2, 1), (1.0, 1.0))
    with pytest.raises(ValueError, match="differ"):
        Verifications(10, 10, Sizes((1,), (1.0,)), Sizes((1,), (1.0,)))


def test_a_verification_grows_with_the_context_of_its_batch() -> None:
    found = costs(context=2.0)
    for contexts, seconds in (([], 10.4), ([100], 10.4), ([300, 300], 11.4), ([1100], 12.4), ([2100], 14.4)):
        found.set_contexts(contexts)
        assert [found.verify(rows, 1) for rows in (3, 4)] == pytest.approx([seconds] * 2)


def test_a_row_costs_the_slope_of_the_hull_at_the_load() -> None:
    sizes = (1, 2, 4, 8, 16, 32)
    near, far = Sizes(sizes, (1.0, 1.0, 1.6, 2.4, 2.4, 5.6)), Sizes(sizes, (2.0, 2.2, 2.6, 4.4, 4.4, 7.6))
    slope = Verifications(100, 1100, near, far).slope
    for rows in (1, 2, 4, 8, 16):
        assert slope(rows, 100) == pytest.approx(1.4 / 14), "no step makes a row free or dear"
    assert slope(17, 100) == slope(32, 100) == pytest.approx(3.2 / 16)
    assert slope(100, 100) == pytest.approx(5.6 / 32), "beyond the largest, seconds are in proportion"
    assert slope(8, 1100) == pytest.approx(2.4 / 15)
    assert slope(8, 600) == pytest.approx((1.4 / 14 + 2.4 / 15) / 2)
    assert Sizes((4,), (2.0,)).slope(1) == 0.5


def test_few_drafts_do_not_begin_a_larger_graph() -> None:
    """A step from 16 to 32 rows costs 4: three drafts of it are left out, and twelve are worth it."""
    found, sizes = Costs(lambda arm: 8), Sizes((1, 8, 16, 32), (1.0, 2.0, 3.0, 7.0))
    found.tables = CostTables(Verifications(1, 2, sizes, sizes), {}, {})
    found.set_contexts([1] * 4)
    assert found.packed(4, 15) == 12
    assert found.packed(4, 24) == 24
    assert found.packed(4, 12) == 12
    assert found.packed(4, 0) == 0
    row = found.tables.verifications.slope(19, 4)
    assert found.verify(19, 4) == pytest.approx(3.0 + 3 * LEFT_OUT * row), "routes are priced so, too"
    assert found.packed(17, 1) == 1, "each request keeps the row of its own token"


def test_a_slow_moment_moves_little_and_a_slower_machine_is_believed() -> None:
    correction = Correction()
    for _ in range(100):
        correction.add(1.0, 1.0)
    correction.add(1.0, 1000.0)
    assert correction.factor < 1.05
    for _ in range(WINDOW):
        correction.add(1.0, 5.0)
    assert correction.factor == pytest.approx(5.0, rel=0.1)


@pytest.mark.parametrize(
    ("prices", "route"),
    [({}, "ar"), ({"row": 25.0}, "none"), ({"ar": 9.0}, "diffusion")],
    ids=["all cheap", "rows dear", "ar dear"],
)
def test_the_router_goes_by_the_tables(prices: dict[str, float], route: str) -> None:
    assert assign([SCORES], costs(**prices))[0] == [route]


@pytest.mark.parametrize(
    ("score", "wide", "length"), [(3.0, 0.0, 3), (1.4, 0.0, 2), (3.0, 2.0, 2)], ids=["pays", "brings little", "tile"]
)
def test_a_pass_is_as_long_as_pays(score: float, wide: float, length: int) -> None:
    """Drafts beyond its end count by the chance that they would have been right; rows, by the tile that they take."""
    found = costs(short=0.2)
    dear = Sizes(ROWS, tuple(10.0 + wide + 0.1 * n for n in ROWS))
    found.tables = replace(found.tables, wider={3: Verifications(100, 1100, dear, dear)})
    accepted = [0.0, 0.3, 0.39, 0.417]
    routes, lengths = assign([{"ar": score, "none": 1.0}], found, accepted=lambda _, drafts: accepted[int(drafts)])
    assert (routes, lengths) == (["ar"], {"ar": length})
    found.limit(lengths)
    assert found.draft("ar", 1) == (0.2 if length == 2 else 0.5), "a route's price is that of its length"
    assert [found.length(arm) for arm in ("ar", "diffusion")] == [length, 3]


def test_rows_are_priced_by_the_tile_of_their_requests() -> None:
    found = costs()
    dear = Sizes(ROWS, tuple(14.0 + 0.1 * n for n in ROWS))
    found.tables = replace(found.tables, wider={4: Verifications(100, 1100, dear, dear)})
    assert [found.tables.verify(8, requests, 0) for requests in (2, 1)] == pytest.approx([10.8, 14.8])
    assert found.tables.verify(9, 2, 0) == pytest.approx(11.6 + 2.0), "one has four rows, the other five"


def test_a_block_that_is_always_full_takes_the_rows_that_it_has() -> None:
    found = costs()
    assert found.width("diffusion") == 4, "before any was seen"
    for _ in range(100):
        found.wanted("diffusion", 3, Mean())
    assert found.width("diffusion") == pytest.approx(4)


def test_room_is_made_for_what_differs_and_less_of_it_where_many_even_out() -> None:
    found = costs()
    for drafts in (0, 0, 0, 12) * 100:
        found.wanted("none", drafts, Mean())
    found.set_contexts([9])
    assert found.room("none") == pytest.approx(3 + 5.2, rel=0.15)
    found.set_contexts([9] * 16)
    assert found.room("none") == pytest.approx(3 + 5.2 / 4, rel=0.15)
    assert found.width("none") == 1 + found.room("none")


def test_a_requests_own_rounds_say_what_room_it_needs() -> None:
    """Two whose drafts never differ from their own need no room for the other's."""
    found, own = costs(), (Mean(), Mean())
    found.set_contexts([9, 9])
    for _ in range(100):
        for drafts, mean in zip((1, 7), own, strict=True):
            found.wanted("ar", drafts, mean)
    assert [found.room("ar", mean) for mean in own] == pytest.approx([1.5, 6.7], abs=0.6)


def test_rounds_move_all_prices_alike_and_no_route() -> None:
    """An arm's price has the catch-up that is usual of it, for as many requests as draft."""
    found = costs()
    assert found.draft("ar", 2) == 0.5
    for _ in range(60):
        found.observe(RoundTime(8, 2, 0, {"ar": 2}, {"ar": 6}, seconds=3 * (10.8 + 0.5 + 0.2)))
    assert found.correction.factor == pytest.approx(3.0, rel=0.02)
    assert found.verify(8, 1) == pytest.approx(3 * 10.8, rel=0.02)
    assert found.draft("ar", 2) == pytest.approx(3 * 0.7, rel=0.02)
    assert found.draft("ar", 1) == pytest.approx(3 * 0.6, rel=0.02)
    assert found.draft("diffusion", 1) == pytest.approx(3 * 0.5, rel=0.02)
    assert assign([SCORES], found)[0] == ["ar"]


def test_a_round_that_waits_for_the_host_lasts_as_long_whatever_it_does() -> None:
    """Its rows are free; once none waits the host's time is forgotten, and rows cost what they do."""
    found = costs()
    for _ in range(100):
        found.observe(RoundTime(4, 1, tokens=2, seconds=10.4, gap=4.0))
    assert [found.lasts(work) for work in (1.0, 12.0, 16.0)] == pytest.approx([14.4, 14.4, 16.0])
    assert found.worth().row == pytest.approx(0.0, abs=0.01)
    found.observe(RoundTime(4, 1, tokens=2, seconds=10.4))
    assert found.lasts(1.0) == pytest.approx(10.4), "it was not longer than that"
    for _ in range(2000):
        found.observe(RoundTime(4, 1, tokens=2, seconds=10.4))
    assert found.lasts(1.0) == 1.0
    assert found.worth().row == pytest.approx(2 / 10.4 * 0.1, rel=0.01)


def test_a_further_draft_must_bring_what_its_row_costs_at_this_load() -> None:
    found = costs()
    assert found.worth() == FULL_LENGTH
    found.observe(RoundTime(4, 1, tokens=2, seconds=10.4))
    assert found.worth().row == pytest.approx(2 / 10.4 * 0.1)


def test_prices_are_known_from_the_start_and_compared_with_rounds_before_gains_are_shown() -> None:
    found = costs()
    for _ in range(PLAIN_ROUNDS):
        assert found.plain(1) is None
        found.observe(RoundTime(4, 1, tokens=2, seconds=10.4))
    assert found.plain(1) == pytest.approx(found.verify(1, 1))
    found = costs()
    fitted = found.fitted(("ar", "lookup"))
    assert fitted["verify", ""] == pytest.approx(10.1)
    assert fitted["draft", "ar"] == 0.5
    assert fitted["draft", "lookup"] == fitted["draft_request", "lookup"] == found.draft("ar", 0) == 0.0
    assert found.snapshot(("ar",))["draft"] == {"ar": 0.5}
