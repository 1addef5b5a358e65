"""`assign` as a pure function of scores and costs."""

from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st
from priced import priced

from whiflash_sglang.drafts.candidates import Forecast
from whiflash_sglang.prices.costs import Costs
from whiflash_sglang.routing.assign import MARGIN, assign, weights_of

ARMS = ("ar", "diffusion", "lookup")


DRAFT_SECONDS = {"ar": 0.010, "diffusion": 0.006}
WIDTHS = {"ar": 6, "diffusion": 8, "lookup": 12, "none": 1}


def costs(
    drafts: Mapping[str, float] = DRAFT_SECONDS, widths: Mapping[str, int] = WIDTHS, row: float = 0.0005
) -> Costs:
    """Prices of passes that any number of requests share, and of a verification of 20 ms beside its rows."""
    return priced(widths.__getitem__, drafts, base=0.020, row=row, more=0.0)


def test_without_costs_every_request_takes_its_best_arm() -> None:
    scores = [{"ar": 2.0, "diffusion": 3.0, "none": 1.0}, {"ar": 2.5, "diffusion": 1.0, "none": 1.0}, {"none": 1.0}]
    assert assign(scores)[0] == ["diffusion", "ar", "none"]


def test_where_rows_are_scarce_the_urgent_get_them() -> None:
    scores, dear = [{"ar": 3.0, "none": 1.0}] * 2, costs({"ar": 0.0}, row=0.004)
    for priorities, routes in (((0, 0), ["ar", "ar"]), ((7, -(2**63)), ["ar", "none"]), ((0, 9), ["none", "ar"])):
        assert assign(scores, dear, weights=weights_of(priorities))[0] == routes
    assert len(set(weights_of(range(64)))) == 3, "each weight multiplies the choices that are rated"
    assert assign(scores, costs({"ar": 0.0}, row=0.0), weights=weights_of((0, 9)))[0] == ["ar", "ar"]


def test_what_is_promised_without_a_pass_is_charged_for_its_rows() -> None:
    """Its rows may not pay at all: then the request decodes plainly."""
    prices = costs({"ar": 0.0})
    scores = [{"ar": 2.0, "promised": 2.0, "none": 1.0}] * 2
    assert assign(scores, prices, promised=[Forecast(2.0, 3), Forecast(2.0, 40)])[0] == ["promised", "ar"]
    one = [{"ar": 2.0, "promised": 1.9, "none": 1.0}]
    assert assign(one, prices, promised=[Forecast(1.9, 2)])[0] == ["promised"]
    assert assign(one, prices, promised=[Forecast(1.9, 40)])[0] == ["ar"]
    dear = [{"promised": 1.2, "none": 1.0}]
    assert assign(dear, costs(), promised=[Forecast(1.2, 12)])[0] == ["none"]
    assert assign(dear, costs(), promised=[Forecast(1.2, 2)])[0] == ["promised"]


def test_margin_keeps_the_previous_routes() -> None:
    scores = [{"ar": 2.00, "diffusion": 1.80, "none": 1.0}]
    prices = costs({"ar": 0.006, "diffusion": 0.006}, {"ar": 8, "diffusion": 8, "none": 1})
    assert assign(scores, prices)[0] == ["ar"]
    assert assign(scores, prices, previous=["diffusion"], margin=0.2)[0] == ["diffusion"]
    assert assign(scores, prices, previous=["diffusion"], margin=0.05)[0] == ["ar"]


def test_a_margin_reckons_with_promised_rows_too() -> None:
    scores, promised = [{"ar": 2.37, "promised": 1.5, "none": 1.0}], [Forecast(1.5, 2)]
    assert assign(scores, costs(), promised=promised)[0] == ["ar"]
    assert assign(scores, costs(), ["promised"], MARGIN, promised)[0] == ["promised"]


def test_previous_arm_that_may_no_longer_draft_is_replaced() -> None:
    assert assign([{"ar": 2.0, "none": 1.0}], costs(), previous=["lookup"], margin=10.0)[0] == ["ar"]


def test_pinned_requests_keep_their_arm_beside_free_ones() -> None:
    scores = [{"ar": 1.0}, {"none": 1.0}, {"ar": 1.01, "diffusion": 9.0, "none": 1.0}, {}]
    assert assign(scores, costs())[0] == ["ar", "none", "diffusion", "none"]
    assert assign([{"lookup": 1.0}], costs(), previous=["ar"], margin=MARGIN)[0] == ["lookup"]
    assert assign([{}], costs(), previous=[None], margin=MARGIN)[0] == ["none"]


def test_empty_batch() -> None:
    assert assign([], costs())[0] == []


score = st.fixed_dictionaries({"none": st.just(1.0)}, optional={arm: st.floats(1.0, 12.0) for arm in ARMS})


def test_a_request_without_scores_adds_nothing() -> None:
    """Beside one that decodes plainly, 1.9 tokens are not worth a draft; beside one that brings nothing they are."""
    own = {"ar": 1.9, "none": 1.0}
    assert assign([own, {"none": 1.0}], costs())[0] == ["none", "none"]
    assert assign([own, {}], costs())[0] == ["ar", "none"]


def rate_of(scores: list[dict[str, float]], routes: list[str], prices: Costs) -> float:
    """Expected tokens a second under `routes`."""
    rows = sum(prices.width(arm) for arm in routes)
    drafting = sum(prices.draft(arm, routes.count(arm)) for arm in set(routes) - {"none"})
    tokens = sum(own[arm] for own, arm in zip(scores, routes, strict=True))
    return tokens / (drafting + prices.verify(rows, len(routes)))


def test_scores_below_zero_only_order_arms() -> None:
    """A bias may leave nothing above zero: the dearest arm must not look best for losing the least a second."""
    assert assign([{"ar": -2.5, "diffusion": -2.4, "none": -9.0}], costs())[0] == ["diffusion"]


@settings(deadline=None, max_examples=150)
@given(st.lists(score, min_size=1, max_size=5))
def test_no_single_change_of_one_request_is_better(scores: list[dict[str, float]]) -> None:
    """The result is at least a local optimum, and at least as good as each static choice."""
    prices = costs()
    routes = assign(scores, prices)[0]
    rate = rate_of(scores, routes, prices)
    for arm in (*ARMS, "none"):
        static = [arm if arm in s else "none" for s in scores]
        assert rate >= rate_of(scores, static, prices) * (1 - 1e-9)
    assert all(route in s for route, s in zip(routes, scores, strict=True))
