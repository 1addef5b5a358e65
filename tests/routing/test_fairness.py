"""Effect of one request on the others' routes: the real controller and costs, simulated acceptance, no noise.

DFlash is right five times a round and EAGLE-3 never, of a text that is nobody's in particular; a request whose caller
orders an arm has a text that nothing drafts.
"""

import gc
from collections.abc import Mapping, Sequence

import pytest
from priced import priced
from whiflash_sdk.hints import Span

from whiflash_sglang.prices.round_clock import RoundTime
from whiflash_sglang.records.request import Request
from whiflash_sglang.records.signals import Signals
from whiflash_sglang.routing.controller import Controller
from whiflash_sglang.routing.estimate import AcceptanceEstimator
from whiflash_sglang.routing.policies import MOST_ADAPTERS, AutoPolicy
from whiflash_sglang.spans.hints import RequestHints

WIDTHS = {"ar": 6, "diffusion": 8, "none": 1}
SECONDS = {"ar": 0.007, "diffusion": 0.006}
GOOD = {"ar": 1, "diffusion": 5}
NOTHING: Mapping[str, int] = {}
FREE = RequestHints()


def ordered(**wish: object) -> RequestHints:
    return RequestHints(spans=(Span(kind="json", open=True, **wish),))  # type: ignore[arg-type]


ORDERS = {
    "pin-ar": ordered(prefer="ar", pin=True),
    "bias-none": ordered(bias={"none": 16.0}),
    "off": RequestHints(off=True),
}


class Server:
    """A batch that is stepped by hand. text: of every running request, what the arms accept of it."""

    def __init__(self) -> None:
        self.costs, self.policy = priced(WIDTHS.__getitem__, SECONDS), AutoPolicy()
        self.controller = Controller(self.policy, self.costs, [b"a"])
        self.text: dict[int, Mapping[str, int]] = {}

    def open(
        self, row: int, hints: RequestHints = FREE, text: Mapping[str, int] = GOOD, adapter: str | None = None
    ) -> None:
        self.controller.open(Request(f"r{row}", hints, row, adapter=adapter), [0])
        self.text[row] = text

    def close(self, row: int) -> None:
        self.controller.close(self.controller.states[row])
        del self.text[row]

    def round(self, rows: Sequence[int]) -> dict[int, str]:
        """The arm of every row."""
        routes = self.controller.route(
            [self.controller.states[row] for row in rows], [{"ar": None, "diffusion": None}] * len(rows)
        )
        drafted = {arm: routes.count(arm) for arm in sorted(SECONDS) if arm in routes}
        verified = sum(WIDTHS[arm] for arm in routes)
        work = sum(self.costs.tables.draft(*each) for each in drafted.items())
        seconds = work + self.costs.tables.verify(verified, len(rows), 0)
        self.costs.observe(RoundTime(verified, len(rows), 0, drafted, tokens=2 * len(rows), seconds=seconds))
        for row, arm in zip(rows, routes, strict=True):
            state = self.controller.states[row]
            self.controller.committed(state, state.decision, arm, [0] * self.text[row].get(arm, 1), WIDTHS[arm])
        return dict(zip(rows, routes, strict=True))

    def rounds(self, rows: Sequence[int], count: int) -> list[dict[int, str]]:
        """The same of so many rounds."""
        return [self.round(rows) for _ in range(count)]


@pytest.mark.parametrize("order", ORDERS)
def test_beside_a_request_that_ordered_its_arm_another_finds_the_best(order: str) -> None:
    """Wherever it stands in the batch, and however long the other one was there before."""
    for mine, theirs in ((0, 1), (1, 0)):
        server = Server()
        server.open(theirs, ORDERS[order], NOTHING)
        server.rounds([theirs], 500)
        server.open(mine)
        routes = [server.round([0, 1])[mine] for _ in range(100)]
        assert routes[-50:].count("diffusion") >= 48, "all but a probe of the other one"


@pytest.mark.parametrize("order", ORDERS)
def test_what_was_ordered_teaches_nobody_what_to_expect(order: str) -> None:
    """The means, the widths and the next request's routes are those of a server that never saw it."""
    taught, untouched = Server(), Server()
    taught.open(1, ORDERS[order], NOTHING)
    for server in (taught, untouched):
        server.open(0)
    taught.rounds([0, 1], 300)
    untouched.rounds([0], 300)
    for server in (taught, untouched):
        server.close(0)
        server.open(2)
    for arm in ("ar", "diffusion"):
        usual = [server.policy.estimator.usual(arm) for server in (taught, untouched)]
        assert usual[0] == pytest.approx(usual[1], abs=0.2), arm
        assert taught.costs.width(arm) == untouched.costs.width(arm)
    for server in (taught, untouched):
        assert server.rounds([2], 50).count({2: "diffusion"}) >= 48, "all but probes"


def test_an_order_costs_others_no_probe_and_no_arm() -> None:
    """Pinned to EAGLE-3, a request keeps that drafter running; its neighbour's text changes, and it notices."""
    server = Server()
    server.open(0, ORDERS["pin-ar"], NOTHING)
    server.open(1, FREE, NOTHING)
    server.rounds([0, 1], 2000)
    server.text[1] = {"ar": 6}
    routes = [server.round([0, 1])[1] for _ in range(1500)]
    assert routes[-1] == "ar", "it has never tried it again"


def test_a_request_that_never_ends_does_not_speak_for_all() -> None:
    """Ten thousand rounds in which nothing was right weigh no more than some hundred of another request's."""
    server = Server()
    server.open(0, FREE, {"ar": 1, "diffusion": 2})
    server.rounds([0], 10_000)
    server.close(0)
    for _ in range(2):
        server.open(1)
        routes = [server.round([1])[1] for _ in range(300)]
        server.close(1)
    assert routes[-1] == "diffusion"


def test_probes_of_requests_that_are_aborted_come_again() -> None:
    """Requests that come and go after a round each: whoever is there when a probe is due makes it."""
    server = Server()
    server.open(0, FREE, NOTHING)
    server.rounds([0], 100)
    tried = 0
    for _ in range(PROBES):
        server.open(1, FREE, NOTHING)
        tried += server.round([0, 1])[1] != "none"
        server.close(1)
    assert 0 < tried < PROBES / 10, "a new request is no reason for a probe"


PROBES = 2000


def test_a_probe_leaves_the_others_their_arms() -> None:
    """It binds one request of two. Scored above everything, it made the cheapest routes of all others the best."""
    server = Server()
    server.open(0)
    server.rounds([0], 100)
    server.open(1)
    for _ in range(1500):
        routes = server.round([0, 1])
        assert "none" not in routes.values()
        assert "diffusion" in routes.values()


def test_a_batch_that_decodes_plainly_probes_one_of_two_idle_arms_at_a_time() -> None:
    """With half of its requests: the others go on."""
    server = Server()
    for row in range(16):
        server.open(row, text=NOTHING)
    probed = [sum(arm != "none" for arm in server.round(range(16)).values()) for _ in range(300)]
    assert 8 in probed[20:]
    assert max(probed[20:]) == 8


def test_requests_go_back_after_a_probe_of_an_arm_that_is_no_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """The margin kept half of the batch on an arm that is nearly as good, so that every round paid both passes."""
    for arm, seconds in (("ar", 0.001), ("diffusion", 0.0012)):
        monkeypatch.setitem(SECONDS, arm, seconds)
        monkeypatch.setitem(WIDTHS, arm, 6)
    server = Server()
    for row in range(16):
        server.open(row, text={"ar": 4, "diffusion": 4})
    server.rounds(range(16), 400)
    used = [set(server.round(range(16)).values()) for _ in range(400)]
    assert sum(len(arms) > 1 for arms in used) < 8


def test_an_adapter_teaches_another_nothing() -> None:
    """Rounds of one in which EAGLE-3 is always right move neither the target's routes nor another adapter's.

    They do move when an arm is probed.
    """
    taught, untouched = Server(), Server()
    taught.open(3, FREE, {"ar": 6}, adapter="one")
    taught.rounds([3], 300)
    taught.close(3)
    for adapter in (None, "two"):
        routes = []
        for server in (taught, untouched):
            server.open(0, adapter=adapter)
            routes.append([server.round([0])[0] for _ in range(200)].count("ar"))
            server.close(0)
        assert abs(routes[0] - routes[1]) <= 3
    taught.open(4, FREE, {"ar": 6}, adapter="one")
    assert [taught.round([4])[4] for _ in range(20)].count("ar") >= 19, "what it has learned itself it knows"


def test_an_adapter_begins_with_what_the_target_has_taught() -> None:
    server = Server()
    server.open(0)
    server.rounds([0], 200)
    server.open(1, adapter="new")
    assert [server.round([1])[1] for _ in range(4)][1:] == ["diffusion"] * 3, "all but a probe that is due"
    taught, new = server.policy.estimator, AcceptanceEstimator(server.policy.estimator)
    for context in (Signals(allowed=frozenset(GOOD)), Signals(allowed=frozenset(GOOD), entropy=0.3)):
        for arm in GOOD:
            assert new.expect(arm, context) == pytest.approx(taught.expect(arm, context))
    before = taught.expect("ar", context)
    for _ in range(100):
        new.observe("ar", context, 4)
    assert new.expect("ar", context) == pytest.approx(4, abs=0.2)
    assert taught.expect("ar", context) == before
    unseen, shift = Signals(allowed=frozenset(GOOD), entropy=2.0), new.usual("ar") - taught.usual("ar")
    assert abs(shift) > 0.1
    assert new.expect("ar", unseen) == pytest.approx(taught.expect("ar", unseen) + shift), "in all contexts"


def test_adapters_that_nobody_uses_are_forgotten() -> None:
    server = Server()
    for number in range(3 * MOST_ADAPTERS):
        for adapter in ("used", f"once {number}"):
            server.open(0, adapter=adapter)
            server.round([0])
            server.close(0)
    policy = server.policy
    assert len(policy._adapters) == MOST_ADAPTERS
    assert "used" in policy._adapters
    for number in range(2000):  # no round is observed meanwhile
        policy.score(Signals(allowed=frozenset(GOOD), adapter=f"dropped {number % (2 * MOST_ADAPTERS)}"))
    means = [each for each in gc.get_objects() if isinstance(each, AcceptanceEstimator)]
    assert sum(each._base is policy.estimator for each in means) == MOST_ADAPTERS, "dropped ones stay alive"


def test_each_adapter_of_a_batch_tries_its_arms() -> None:
    server = Server()
    for row, adapter in enumerate((None, "one", "two")):
        server.open(row, FREE, {"ar": 3, "diffusion": 5}, adapter=adapter)
    tried: dict[int, set[str]] = {row: set() for row in range(3)}
    for _ in range(60):
        for row, arm in server.round([0, 1, 2]).items():
            tried[row].add(arm)
    assert all(arms >= {"ar", "diffusion"} for arms in tried.values()), tried
