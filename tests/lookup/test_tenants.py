"""A tenant's proposals are those that it would get alone, whatever others copy between its rounds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hypothesis import example, given, settings
from hypothesis import strategies as st

from whiflash_sglang.arms.lookup import LookupArm
from whiflash_sglang.checkpoints.manifest import Lookup
from whiflash_sglang.copying.calibration import Agreement, MatchCalibration, PerTenant
from whiflash_sglang.copying.tenants import Tenant, handle_of, tenant_of
from whiflash_sglang.device.transfers import EXACT
from whiflash_sglang.drafts.candidates import NOTHING
from whiflash_sglang.prices.costs import FULL_LENGTH
from whiflash_sglang.records.request import Request
from whiflash_sglang.spans.hints import RequestHints

WIDTH = 24


def arm() -> LookupArm:
    return LookupArm(Lookup(max_width=WIDTH), EXACT)


@dataclass
class Client:
    """One tenant's requests, one at a time."""

    arm: LookupArm
    tenant: Tenant | None
    scope: str = "on"
    text: list[int] | None = None
    request: Request = field(default_factory=lambda: Request("r"))
    seen: list[tuple[float, list[int]]] = field(default_factory=list)

    def say(self, tokens: Sequence[int]) -> None:
        """A round that commits `tokens`, or the prompt of a new request; then a proposal. Nothing: the request ends."""
        if not tokens:
            if self.text is not None:
                self.arm.end(self.request)
            self.text = None
            return
        if self.text is None:
            self.text = []
            hints = RequestHints(lookup=self.scope)  # type: ignore[arg-type]
            self.request = Request("r", hints, tenant=self.tenant)
            self.arm.begin(self.request)
        self.text += tokens
        text = self.text
        said = self.arm.propose(self.request, len(text), lambda start: text[start:], FULL_LENGTH) or NOTHING
        self.seen.append((said.outlook().length, list(said.tokens)))


def proposals(
    mine: Iterable[Sequence[int]], between: Iterable[Sequence[Sequence[int]]], other: Client
) -> list[object]:
    client = Client(other.arm, tenant_of(None, "mine"))
    for tokens, others in zip(mine, between, strict=True):
        for theirs in others:
            other.say(theirs)
        client.say(tokens)
    return list(client.seen)


rounds = st.lists(st.integers(1, 4), max_size=12)
script = st.lists(st.tuples(rounds, st.lists(rounds, max_size=4)), min_size=1, max_size=25)
ALWAYS_RIGHT = [([1, 2, 3, 4] * 3, [[9, 8, 7] * 20] * 8)] * 6


@settings(deadline=None, max_examples=150)
@given(script, st.sampled_from([None, "theirs"]), st.sampled_from(["on", "context", "off"]))
@example(ALWAYS_RIGHT, "theirs", "on")
@example(ALWAYS_RIGHT, None, "on")
def test_a_tenants_proposals_are_those_it_gets_alone(
    script: list[tuple[list[int], list[list[int]]]], salt: str | None, scope: str
) -> None:
    mine = [own for own, _ in script]
    alone = proposals(mine, [()] * len(mine), Client(arm(), None))
    other = Client(arm(), tenant_of(None, salt), scope)
    beside = proposals(mine, [others for _, others in script], other)
    assert beside == alone


def test_requests_without_a_key_learn_together_and_from_no_tenant() -> None:
    server = arm()
    first, second, keyed = (Client(server, tenant) for tenant in (None, None, tenant_of(None, "a")))
    text = [1, 2, 3, 4] * 30
    for client in (keyed, first, second):
        client.say(text[:8])
        for at in range(8, 100, 4):
            client.say(text[at : at + 4])
        client.say([])
    assert first.seen == keyed.seen, "each began with the seed"
    assert second.seen[0] > first.seen[0], "what copied well for one is believed of the next"


def test_a_request_that_keeps_nothing_leaves_no_chances() -> None:
    server = arm()
    tenant = tenant_of(None, "a")
    private, alone = Client(server, tenant, "context"), Client(arm(), tenant)
    for _ in range(5):
        private.say([1, 2, 3] * 10)
    after = Client(server, tenant)
    for client in (after, alone):
        client.say([1, 2, 3] * 10)
    assert after.seen == alone.seen


def test_forgetting_a_tenant_forgets_what_its_text_taught() -> None:
    tenants = [tenant_of(None, name) or b"" for name in "ab"]
    book = PerTenant(MatchCalibration)
    for tenant in (*tenants, None):
        book.of(tenant).observe(3, Agreement.ALONE, True)
    running = book.of(tenants[0])
    book.forget(handle_of(tenants[0]))
    running.observe(3, Agreement.ALONE, True)
    chances = [book.of(tenant).chance(3, Agreement.ALONE) for tenant in (*tenants, None)]
    assert chances[0] == 0.5 < chances[1] == chances[2]
    book.forget()
    assert [book.of(tenant).chance(3, Agreement.ALONE) for tenant in (*tenants, None)] == [0.5] * 3


def test_who_runs_while_its_tenant_is_forgotten_leaves_and_teaches_nothing() -> None:
    server, tenant = arm(), tenant_of(None, "a") or b""
    for handle in (handle_of(tenant), None):
        running = Client(server, tenant)
        running.say([1, 2, 3] * 3)
        server.forget(handle, [running.request])
        for _ in range(3):
            running.say([1, 2, 3])
        running.say([])
        assert server.snapshot([])["tenants"] == 0
        after, alone = Client(server, tenant), Client(arm(), tenant)
        for client in (after, alone):
            client.say([1, 2, 3] * 10)
        assert after.seen == alone.seen


def test_tenants_are_bounded_and_the_least_recent_one_begins_again() -> None:
    book = PerTenant(MatchCalibration, limit=2)
    for name in ("a", "b", "a", "c"):
        book.of(tenant_of(None, name)).observe(3, Agreement.ALONE, True)
    assert len(book) == 2
    assert book.of(tenant_of(None, "a")).chance(3, Agreement.ALONE) > 0.6
    assert book.of(tenant_of(None, "b")).chance(3, Agreement.ALONE) == 0.5


def test_it_learns_from_rounds_that_others_draft() -> None:
    """Nothing of it is ever verified; what it would have proposed is compared with what was committed."""

    def looks(text: list[int]) -> list[float]:
        own = arm()
        request = Request("r", tenant=tenant_of(None, "a"))
        own.begin(request)
        found = [
            (own.propose(request, at, lambda start, at=at: text[start:at], FULL_LENGTH) or NOTHING).outlook()  # type: ignore[misc]
            for at in range(8, 100, 2)
        ]
        assert all(1 <= look.length <= look.rows <= 1 + WIDTH for look in found)
        return [look.length for look in found]

    always_right = looks([1, 2, 3, 4] * 30)
    often_wrong = looks([1, 2, 3, 4, *[1, 2, 9, 4, 1, 2, 8, 4, 1, 2, 7, 4] * 9])
    assert always_right[-1] > always_right[0] + 5
    assert max(often_wrong[-8:]) < max(always_right)
