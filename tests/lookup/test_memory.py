"""Memory across requests: one tenant's text is never another's, and the bounds hold under any load."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from whiflash_sglang.lookup.calibration import MatchCalibration
from whiflash_sglang.lookup.copier import Copier
from whiflash_sglang.lookup.memory import (
    SCOPES,
    SEARCHED,
    Tenant,
    TenantMemory,
    handle_of,
    nameless,
    tenant_of,
)
from whiflash_sglang.lookup.scopes import WHOLE, Scope

LIMIT = 64 << 10
MAX_AGE = 100.0
NAMES = tuple("abcde")
PLACES = tuple(Scope(agent, None, block) for agent in (None, "x", "y") for block in (None, "<p>"))


def tenant(name: str) -> Tenant:
    found = tenant_of(None, name)
    assert found is not None
    return found


def alphabet(name: str, place: Scope | None = None) -> range:
    """Token ids that only this tenant writes, and in `place` only."""
    first = 1000 * ord(name)
    if place is None:
        return range(first, first + 40 * len(PLACES))
    return range(first + 40 * PLACES.index(place), first + 40 * PLACES.index(place) + 40)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Load(RuleBasedStateMachine):
    """Any order of finished requests, queries, waiting and forgetting."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.memory = TenantMemory(LIMIT, MAX_AGE, self.clock)
        self.last: dict[tuple[str, Scope], float] = {}
        self.rng = random.Random(0)

    @rule(
        name=st.sampled_from(NAMES),
        place=st.sampled_from(PLACES),
        length=st.sampled_from([0, 1, 30, 200, 490, 600, 5000]),
    )
    def finish(self, name: str, place: Scope, length: int) -> None:
        self.memory.remember(tenant(name), self.rng.choices(alphabet(name, place), k=length), place)
        self.last[name, place] = self.clock.now

    @rule(seconds=st.sampled_from([1.0, 30.0, 49.0, 51.0, 99.0, 101.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    def tokens(self, name: str, place: Scope) -> set[int]:
        return {
            token for text in self.memory.texts(tenant(name), place) for token in text._tokens if token >= 0
        }

    @rule(name=st.sampled_from(NAMES), place=st.sampled_from(PLACES))
    def query(self, name: str, place: Scope) -> None:
        tokens = self.tokens(name, place)
        assert tokens <= set(alphabet(name))
        for other in PLACES:
            if self.clock.now - self.last.get((name, other), -MAX_AGE) >= MAX_AGE:
                assert not tokens & set(alphabet(name, other))

    @precondition(lambda self: self.last)
    @rule(name=st.sampled_from(NAMES))
    def forget(self, name: str) -> None:
        self.memory.forget(handle_of(tenant(name)))
        assert not any(len(text) for text in self.memory.texts(tenant(name)))

    @precondition(lambda self: self.last)
    @rule(
        name=st.sampled_from(NAMES), agent=st.sampled_from([None, "x"]), block=st.sampled_from([None, "<p>"])
    )
    def forget_a_part(self, name: str, agent: str | None, block: str | None) -> None:
        before = {place: self.memory._tenants.get(tenant(name), {}).get(place) for place in PLACES}
        self.memory.forget(handle_of(tenant(name), agent, block))
        after = self.memory._tenants.get(tenant(name), {})
        for place in PLACES:
            named = agent in (None, place.agent) and block in (None, place.block)
            assert after.get(place) is (None if named else before[place])

    @rule()
    def forget_all(self) -> None:
        self.memory.forget()
        assert (len(self.memory), self.memory.nbytes) == (0, 0)

    @invariant()
    def bytes_are_counted_and_bounded(self) -> None:
        held = [texts.nbytes for scopes in self.memory._tenants.values() for texts in scopes.values()]
        assert self.memory.nbytes == sum(held) <= LIMIT
        assert sum(own["bytes"] for own in self.memory.held().values()) == sum(held)
        assert all(self.memory._tenants.values()), "a tenant without texts is none"


Load.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
TestLoad = Load.TestCase


def test_no_key_no_tenant() -> None:
    assert tenant_of(None, None) is None
    assert tenant_of("", "") is None


def test_the_two_keys_do_not_run_into_each_other() -> None:
    keys = [("ab", "c"), ("a", "bc"), ("abc", None), (None, "abc"), ("1:a", ""), ("a", "")]
    assert len({tenant_of(*pair) for pair in keys}) == len(keys)
    assert handle_of(tenant("a")) < 2**63


def propose(memory: TenantMemory, name: str, text: Sequence[int]) -> list[int]:
    copier = Copier(MatchCalibration(), shared=lambda: memory.texts(tenant(name)))
    copier.extend(text)
    return list(copier.look(8, 0.0).tokens)


def test_another_tenants_text_is_never_proposed() -> None:
    """The same beginning, searched by its own tenant and by all others."""
    memory = TenantMemory(LIMIT, MAX_AGE)
    for number, name in enumerate(NAMES):
        memory.remember(tenant(name), [1, 2, 3, 100 + number, 200 + number])
    for number, name in enumerate(NAMES):
        assert propose(memory, name, [9, 1, 2, 3]) == [100 + number, 200 + number]
    assert propose(memory, "z", [9, 1, 2, 3]) == []


def test_one_tenant_does_not_take_all() -> None:
    memory = TenantMemory(LIMIT, MAX_AGE)
    memory.remember(tenant("b"), [1, 2, 3])
    for start in range(0, 100_000, 300):
        memory.remember(tenant("a"), range(start, start + 300))
    assert propose(memory, "b", [1, 2]) == [3]
    assert len(memory) == 2


def order(memory: TenantMemory, place: Scope) -> list[int]:
    """First tokens of the texts that are searched, in the order in which they are."""
    return [text._tokens[0] for text in memory.texts(tenant("a"), place) if len(text)]


def test_the_nearest_texts_come_first_and_few_are_searched() -> None:
    memory = TenantMemory(1 << 20, MAX_AGE)
    places = [
        Scope("a", "1", "p"),
        Scope("a", "2", "p"),
        Scope("a", "1", "q"),
        Scope("b", "1", "p"),
        Scope("b", "1", "q"),
        WHOLE,
    ]
    for number, place in enumerate(places):
        memory.remember(tenant("a"), [number, 9], place)
    assert order(memory, Scope("a", "1", "p")) == [0, 1, 2], (
        "the agent's own block, its other query's, its other block"
    )
    assert order(memory, Scope("b", None, "p")) == [3, 4, 0], (
        "then others' same block, and what was used last"
    )
    assert order(memory, Scope("b", "1", "q"))[:2] == [4, 3]
    assert order(memory, WHOLE)[0] == 5
    assert len(order(memory, WHOLE)) == SEARCHED
    memory.forget(handle_of(tenant("a"), "b"))
    assert order(memory, Scope("b", None, "p"))[0] == 0, "beyond the agent: the same block"


def test_a_tenant_keeps_a_bounded_number_of_scopes() -> None:
    memory = TenantMemory(16 << 20, MAX_AGE)
    memory.remember(tenant("b"), [1, 2, 3])
    for number in range(SCOPES + 5):
        memory.remember(tenant("a"), [number, 9], Scope(f"agent {number}"))
        memory.texts(tenant("a"), Scope("agent 0"))
    assert len(memory._tenants[tenant("a")]) == SCOPES
    assert order(memory, Scope("agent 0"))[0] == 0, "what is used stays"
    assert order(memory, Scope("agent 3"))[0] != 3
    assert propose(memory, "b", [1, 2]) == [3]


def test_what_scopes_hold_is_told_by_name_or_without() -> None:
    memory = TenantMemory(LIMIT, MAX_AGE)
    memory.remember(tenant("a"), [1, 2, 3], Scope("planner", "2", "<p>"))
    memory.remember(tenant("a"), [1] * 400)
    held = memory.held()
    digest = tenant("a").hex()[:12]
    assert list(held) == [f'["{digest}", null, null, null]', f'["{digest}", "planner", "2", "<p>"]']
    assert [own["tokens"] for own in held.values()] == [401, 4]
    assert list(nameless(held).values()) == list(held.values())
    assert "planner" not in str(nameless(held))


def test_the_least_recently_used_tenant_makes_room() -> None:
    memory = TenantMemory(LIMIT, MAX_AGE)
    for name in ("a", "b"):
        memory.remember(tenant(name), [7, 8, 9])
    assert propose(memory, "a", [7, 8]) == [9]  # used after b
    names = []
    while len(memory) == 2 + len(names):
        names.append(f"new {len(names)}")
        memory.remember(tenant(names[-1]), range(400))
    assert propose(memory, "b", [7, 8]) == []
    assert propose(memory, "a", [7, 8]) == [9]


@pytest.mark.parametrize("came", [0.0, 7 * MAX_AGE])
@pytest.mark.parametrize("age", [0.0, 49.0, 99.0])
def test_text_is_there_until_it_is_old(age: float, came: float) -> None:
    clock = Clock()
    clock.now = came
    memory = TenantMemory(LIMIT, MAX_AGE, clock)
    memory.remember(tenant("a"), [1, 2, 3])
    clock.now = came + age
    assert propose(memory, "a", [1, 2]) == [3]
    clock.now = came + MAX_AGE
    assert propose(memory, "a", [1, 2]) == []


def test_what_nobody_asks_for_is_freed_too() -> None:
    clock = Clock()
    memory = TenantMemory(LIMIT, MAX_AGE, clock)
    memory.remember(tenant("a"), [1, 2, 3])
    for clock.now in (MAX_AGE / 2, MAX_AGE):
        memory.remember(tenant("b"), [4])
    assert tenant("a") not in memory._tenants
