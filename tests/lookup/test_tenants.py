"""Requests share how well copies fit, and no text: a proposal is what its request would get alone, cut elsewhere."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from drafting import propose
from hypothesis import given, settings
from hypothesis import strategies as st

from whiflash_sglang.arms.lookup import LookupArm
from whiflash_sglang.checkpoints.manifest import Lookup
from whiflash_sglang.drafts.candidates import NOTHING, Candidate, common_prefix
from whiflash_sglang.prices.costs import FULL_LENGTH
from whiflash_sglang.records.request import Request


def arm() -> LookupArm:
    return LookupArm(Lookup(max_width=24), late=False)


@dataclass
class Client:
    """Requests, one at a time."""

    arm: LookupArm
    text: list[int] | None = None
    request: Request = field(default_factory=lambda: Request("r"))
    seen: list[Candidate] = field(default_factory=list)

    def say(self, tokens: Sequence[int]) -> None:
        """A round that commits `tokens`, or the prompt of a new request; then a proposal. Nothing: the request ends."""
        if not tokens:
            self.text = None
            return
        if self.text is None:
            self.text, self.request = [], Request("r")
            self.arm.begin(self.request)
        self.text += tokens
        text = self.text
        self.seen.append(propose(self.arm, self.request, lambda start: text[start:], FULL_LENGTH) or NOTHING)


def proposals(mine: Iterable[Sequence[int]], between: Iterable[Sequence[Sequence[int]]]) -> list[Candidate]:
    client, other = (Client(shared) for shared in [arm()] * 2)
    for tokens, others in zip(mine, between, strict=True):
        for theirs in others:
            other.say(theirs)
        client.say(tokens)
    return client.seen


rounds = st.lists(st.integers(1, 4), max_size=12)
script = st.lists(st.tuples(rounds, st.lists(rounds, max_size=4)), min_size=1, max_size=25)


@settings(deadline=None, max_examples=150)
@given(script)
def test_others_move_where_a_proposal_is_cut_and_nothing_else(script: list[tuple[list[int], list[list[int]]]]) -> None:
    mine, between = zip(*script, strict=True)
    for alone, beside in zip(proposals(mine, [()] * len(mine)), proposals(mine, between), strict=True):
        shared = common_prefix(alone.tokens, beside.tokens)
        assert shared == min(len(alone.tokens), len(beside.tokens))
        assert (shared > 0) == bool(alone.tokens) == bool(beside.tokens)


def test_what_copied_well_for_one_is_believed_of_the_next_until_it_is_forgotten() -> None:
    server, text = arm(), [1, 2, 3, 4] * 30
    clients = [Client(server) for _ in range(3)]
    for number, client in enumerate(clients):
        if number == 2:
            server.forget()
        for at in range(0, 100, 4):
            client.say(text[at : at + 4])
    first, second, third = [client.seen[2].outlook().length for client in clients]
    assert second > first
    assert third == first
