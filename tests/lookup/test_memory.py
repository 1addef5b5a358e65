"""Memory across requests: one tenant's text is never another's, and the bounds hold under any load."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from whiflash_sglang.lookup.calibration import MatchCalibration
from whiflash_sglang.lookup.copier import Copier
from whiflash_sglang.lookup.memory import ENTRY_BYTES, Tenant, TenantMemory, handle_of, tenant_of

LIMIT = 64 << 10
MAX_AGE = 100.0
NAMES = tuple("abcde")


def tenant(name: str) -> Tenant:
    found = tenant_of(None, name)
    assert found is not None
    return found


def alphabet(name: str) -> range:
    """Token ids that only this tenant writes."""
    return range(1000 * ord(name), 1000 * ord(name) + 40)


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
        self.last: dict[str, float] = {}
        self.rng = random.Random(0)

    @rule(name=st.sampled_from(NAMES), length=st.sampled_from([0, 1, 30, 200, 490, 600, 5000]))
    def finish(self, name: str, length: int) -> None:
        self.memory.remember(tenant(name), self.rng.choices(alphabet(name), k=length))
        self.last[name] = self.clock.now

    @rule(seconds=st.sampled_from([1.0, 30.0, 49.0, 51.0, 99.0, 101.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(name=st.sampled_from(NAMES))
    def query(self, name: str) -> None:
        texts = self.memory.texts(tenant(name))
        tokens = {token for text in texts for token in text._tokens if token >= 0}
        assert tokens <= set(alphabet(name))
        if self.clock.now - self.last.get(name, -MAX_AGE) >= MAX_AGE:
            assert not tokens

    @precondition(lambda self: self.last)
    @rule(name=st.sampled_from(NAMES))
    def forget(self, name: str) -> None:
        others = {key: texts for key, texts in self.memory._tenants.items() if key != tenant(name)}
        self.memory.forget(handle_of(tenant(name)))
        assert self.memory._tenants == others

    @rule()
    def forget_all(self) -> None:
        self.memory.forget()
        assert (len(self.memory), self.memory.nbytes) == (0, 0)

    @invariant()
    def bytes_are_counted_and_bounded(self) -> None:
        held = [texts.nbytes for texts in self.memory._tenants.values()]
        assert self.memory.nbytes == sum(held) <= LIMIT
        assert max(held, default=0) <= LIMIT // 2 + ENTRY_BYTES
        assert not any(texts.empty for texts in self.memory._tenants.values()), (
            "a tenant without texts is none"
        )


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


def test_one_tenant_does_not_take_all() -> None:
    memory = TenantMemory(LIMIT, MAX_AGE)
    memory.remember(tenant("b"), [1, 2, 3])
    for start in range(0, 100_000, 300):
        memory.remember(tenant("a"), range(start, start + 300))
    assert propose(memory, "b", [1, 2]) == [3]
    assert len(memory) == 2


def test_both_generations_count_against_the_bound() -> None:
    memory, rng = TenantMemory(LIMIT, MAX_AGE), random.Random(0)
    for _ in range(300):
        memory.remember(tenant(rng.choice(NAMES)), range(rng.choice([200, 490])))
        assert memory.nbytes <= LIMIT


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
