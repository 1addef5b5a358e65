"""Greedy losslessness on the real target: SmolLM2-135M-Instruct in fp32 with the drafters that are shipped for it."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from embedded_prompts import Prompt, prompts
from engine import Engine, engine
from evidence import Result, cell
from reference import Comparison, ReferenceTarget
from traffic import Arrival, play

from whiflash_sglang.checkpoints.manifest import embedded_bundle
from whiflash_sglang.embedded import ensure_target
from whiflash_sglang.engine.scheduler.session_tree import LINE

KINDS = ("chat", "math", "code", "json", "tool_call")
POLICIES = ("ar", "diffusion", "entropy", "random")


@pytest.fixture(scope="module")
def target(request: pytest.FixtureRequest) -> Iterator[Path]:
    before = torch.get_num_threads()
    if request.config.getoption("--evidence"):
        # Beside other work threads wait for each other: the sample of every test run has one.
        torch.set_num_threads(2)
    yield ensure_target()
    torch.set_num_threads(before)


@contextmanager
def embedded_engine(target: Path, router: str | None, batch: int, **more: Any) -> Iterator[Engine]:
    """Plain decoding where `router` is None."""
    whiflash = None if router is None else {"draft": embedded_bundle(), "whiflash_router": router}
    options: dict[str, Any] = {"max_running_requests": batch, "max_total_tokens": 16384, **more}
    with engine(target, whiflash=whiflash, skip_tokenizer_init=False, **options) as e:
        yield e


def arrivals(chosen: Sequence[Prompt], tokens: int) -> list[Arrival]:
    """Requests at different times, ending at the model's own end of text or after `tokens`."""
    rng = random.Random(0)
    return [
        Arrival(
            p.name,
            rng.randint(0, 2 * len(chosen)),
            p.tokens,
            {"max_new_tokens": tokens, "ignore_eos": False, **p.params},
        )
        for p in chosen
    ]


def per_kind(target: Path, count: int) -> list[Prompt]:
    """The first `count` prompts of every kind."""
    return [p for kind in KINDS for p in [p for p in prompts(target) if p.kind == kind][:count]]


def test_a_sample(target: Path) -> None:
    """One prompt of each kind, 20 tokens, a policy that switches at random every round."""
    requests = arrivals(per_kind(target, 1), 20)
    with embedded_engine(target, None, 5) as e:
        expected = play(e, requests)
    with embedded_engine(target, "random", 5) as e:
        found = play(e, requests)
        rounds, accepted = (sum(n) for n in zip(*(e.rounds(a.rid) for a in requests), strict=True))
    Comparison(ReferenceTarget(target)).check_all(requests, expected, found)
    print(f"acceptance length {1 + accepted / rounds:.2f}")
    assert accepted > 0


def test_forty_turns_of_a_session_find_as_much_cached_as_in_plain_decoding(target: Path) -> None:
    """Each turn's prompt is the one before with its answer, and 12 new tokens."""
    found, words = list[list[tuple[int, list[int]]]](), random.Random(0)
    news = [words.choices(range(1000, 20000), k=12) for _ in range(40)]
    for router in (None, "random"):
        history, turns = list[int](), list[tuple[int, list[int]]]()
        with embedded_engine(target, router, 1, enable_session_radix_cache=True) as e:
            for number, new in enumerate(news):
                history += new
                answer = e.ask(f"turn {number}.", history, max_new_tokens=6, session_id=f"{LINE}a")
                turns.append((e.requests[f"turn {number}."].cached_tokens, answer))
                history += answer
        found.append(turns)
    assert found[1] == found[0]
    assert found[0][-1][0] > 39 * 16


@pytest.fixture(scope="module")
def plain(target: Path) -> dict[str, list[int]]:
    """Plain decoding of 40 prompts, 128 tokens each."""

    def measure() -> Result:
        with embedded_engine(target, None, 6) as e:
            return {"prompts": 40, "outputs": play(e, arrivals(per_kind(target, 8), 128))}

    return dict(cell("plain-embedded", "plain", measure)["outputs"])


@pytest.mark.evidence
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("policy", POLICIES)
def test_forty_prompts(target: Path, plain: dict[str, list[int]], policy: str, batch: int) -> None:
    requests = arrivals(per_kind(target, 8), 128)

    def measure() -> Result:
        with embedded_engine(target, policy, batch) as e:
            found = play(e, requests)
            rounds, accepted = (sum(n) for n in zip(*(e.rounds(a.rid) for a in requests), strict=True))
        comparison = Comparison(ReferenceTarget(target))
        comparison.check_all(requests, plain, found)
        return {
            "prompts": comparison.compared,
            "tokens": sum(len(tokens) for tokens in found.values()),
            "identical": comparison.compared - len(comparison.ties),
            "ties": len(comparison.ties),
            "largest tie": max(comparison.ties, default=0.0),
            "acceptance length": 1 + accepted / rounds,
        }

    result = cell("greedy-embedded", f"{policy}-batch{batch}", measure)
    assert result["identical"] + result["ties"] == 40
