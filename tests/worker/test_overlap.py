"""The worker under SGLang's overlap loop: plain decoding's text, no race, nothing kept, whatever comes and goes."""

import random
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from engine import Engine, engine
from matrix import sampled
from model_set import Models
from overlap import overlapped
from test_constrained import OPTIONS
from test_constrained import requests as constrained
from test_losslessness import compare
from traffic import Arrival, mixed, play

ENGINE: dict[str, Any] = OPTIONS | {"max_running_requests": 4, "chunked_prefill_size": 32}
ARRIVALS = [
    *mixed(seed=31, count=12, shared=40, aborts=0.2, stops=0.3, tokens=30),
    *constrained()[:6],
    Arrival("logprobs", 9, tuple(range(50, 80)), {"max_new_tokens": 15, "return_logprob": True}),
    Arrival("one token", 11, tuple(range(40, 70)), {"max_new_tokens": 1}),
]

Learned = dict[str, list[tuple[int, list[int]]]]
"""Per request, what each of its rounds is said to have committed: n when it began, and the tokens."""


@pytest.fixture(scope="module")
def expected(models: Models) -> dict[str, list[int]]:
    """Plain decoding in the normal loop; nothing is aborted there."""
    with engine(models.target, **ENGINE) as e:
        return play(e, [Arrival(a.rid, a.step, a.prompt, a.params) for a in ARRIVALS])


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> Learned:
    from whiflash_sglang.routing.controller import Controller

    found: Learned = defaultdict(list)
    committed = Controller.committed

    def noting(
        self: Controller, state: Any, decision: Any, arm: str, tokens: Any, width: int, start: int, *more: Any
    ) -> bool:
        found[state.rid].append((start, list(tokens)))
        return committed(self, state, decision, arm, tokens, width, start, *more)

    monkeypatch.setattr(Controller, "committed", noting)
    return found


def check_learned(e: Engine, learned: Learned) -> None:
    """Every token of a round was learned once, of the request that has it, where it has it, however late."""
    for rid, req in e.requests.items():
        prompt, output = len(req.origin_input_ids), e.output(rid)
        end = 1  # the first token is the prefill's, as is one behind every retraction
        for start, tokens in learned[rid]:
            begin = start + 1 - prompt
            assert end <= begin <= end + req.retraction_count
            assert tokens == output[begin : begin + len(tokens)]
            end = begin + len(tokens)
        assert end <= len(output) <= end + req.retraction_count or not learned[rid]
        assert sum(len(tokens) for _, tokens in learned[rid]) >= len(output) - 1 - req.retraction_count


@pytest.fixture(autouse=True)
def as_with_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured verification lets the next batch write to the slot table when it has read it, as early as it can."""
    from whiflash_sglang.compat.forward.target import Target

    verify = Target.verify

    def publishing(self: Target, *args: Any) -> Any:
        found = verify(self, *args)
        self.runner.shared_read_done_event = torch.cpu.Event()
        self.runner.shared_read_done_event.record()
        return found

    monkeypatch.setattr(Target, "verify", publishing)


@pytest.mark.parametrize(
    ("router", "host_lengths"),
    sampled(
        [("ar", True), ("diffusion", False), ("lookup", True), ("random", False), ("auto", False)],
        *[("lookup", True), ("random", False)],
    ),
)
def test_text_is_plain_decodings_and_nothing_races(
    models: Models,
    expected: dict[str, list[int]],
    learned: Learned,
    router: str,
    host_lengths: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang.srt.managers import scheduler

    monkeypatch.setenv("WHIFLASH_DEVICE_RESIDENT", "1")
    monkeypatch.setattr(scheduler, "TEST_RETRACT", True)
    monkeypatch.setattr(scheduler, "TEST_RETRACT_INTERVAL", 5)
    whiflash = models.whiflash(router)
    with overlapped(models.target, whiflash=whiflash, host_lengths=host_lengths, **ENGINE) as e:
        assert e.scheduler.future_map.needs_cpu_seq_lens is host_lengths
        found = play(e, ARRIVALS)
        races, stalls = e.streams.races, e.streams.stalls
        requests = list(e.requests.values())
        assert not e.states, "something is kept of requests that have ended"
        check_learned(e, learned)
    for race, count in races.most_common():
        print(f"race {count} x {race}")
    for site, count in stalls.most_common():
        print(f"the host waited {count} x {site}")
    compare(models, ARRIVALS, expected, found)
    assert not races
    # What happens between them depends on when grammars are compiled, so the least is asked of each.
    happened = {
        "retractions": sum(req.retraction_count for req in requests),
        "tokens from the tree": sum(req.cached_tokens for req in requests),
        "accepted drafts": sum(req.spec_num_correct_drafts for req in requests),
    }
    print(happened)
    assert min(happened.values()) > 0


def test_a_flush_that_does_not_follow_the_forward_is_found(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a request parked goes into the tree's slots when it ends, while a round of it is under way."""
    from whiflash_sglang.compat.scheduler import releases

    monkeypatch.setattr(releases, "behind_forward", lambda _: nullcontext())
    with overlapped(models.target, whiflash=models.whiflash("none"), host_lengths=False) as e:
        e.submit("ends first", list(range(20)), max_new_tokens=9)
        e.submit("goes on", list(range(30, 60)), max_new_tokens=30)
        e.run()
        races = set(e.streams.races)
    assert any("schedule reads what forward wrote" in race and "backlog" in race for race in races), races


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_host_waits_for_nothing(
    models: Models, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole loop of the scheduler: prefills in chunks and from the tree, rounds, results, releases, an abort.

    SGLang's own wait for the results of the round before is an event's, and no copy is pageable.
    """
    monkeypatch.setenv("WHIFLASH_DEVICE_RESIDENT", "1")
    prompts = [(1 + i, 2, 3, 1 + i, 2, 3, *range(40, 70), 1 + i, 2) for i in range(6)]
    arrivals = [
        Arrival(f"r{i}", 3 * i, prompt, {"max_new_tokens": 12 + 7 * i, "temperature": temperature}, aborted)
        for i, (prompt, aborted) in enumerate(zip(prompts, [None, None, 6, None, 5, None], strict=True))
    ]
    arrivals.append(Arrival("again", 20, (*prompts[0], 5), {"max_new_tokens": 9, "temperature": temperature}))
    with overlapped(
        models.target, whiflash=models.whiflash("random"), host_lengths=False, chunked_prefill_size=24
    ) as e:
        play(e, arrivals)
        stalls, pageable, races = dict(e.streams.stalls), dict(e.streams.pageable), dict(e.streams.races)
        assert e.requests["again"].cached_tokens
    assert not races
    assert not stalls, stalls
    print("pageable", pageable)
    ours = {site: count for site, count in pageable.items() if site.startswith("whiflash")}
    assert not ours, ours


def test_what_is_said_a_round_late_is_drafted(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prediction, of which the host knows how far the text is only when the next round has begun."""
    monkeypatch.setenv("WHIFLASH_DEVICE_RESIDENT", "1")
    prompt, tokens = [random.Random(3).randrange(256) for _ in range(20)], 60
    with overlapped(models.target, whiflash=models.whiflash("lookup"), host_lengths=False) as e:
        e.submit("first", prompt, max_new_tokens=tokens)
        e.run()
        custom = {"whiflash_prediction": e.output("first")}
        e.submit("again", prompt, max_new_tokens=tokens, custom_params=custom)
        e.run()
        races, stalls, pageable = dict(e.streams.races), dict(e.streams.stalls), set(e.streams.pageable)
        assert e.output("again") == e.output("first")
        verified, accepted = e.rounds("again")
    assert accepted > 0.8 * tokens
    assert verified < tokens / 4
    assert not races
    assert not stalls
    assert not {site for site in pageable if site.startswith("whiflash")}
