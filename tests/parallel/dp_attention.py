"""Two ranks that attend to requests of their own (DP attention), and what each is asked.

A rank without a request joins every forward of the other, so both step as often: until nobody has anything left.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any
from unittest.mock import patch

import traffic
from engine import Engine, engine
from overlapping_ranks import GRAMMARS, Overlapped, play_overlapping
from tensor_parallel import RANKS, Checkpoints, Outputs, Played, of_rank, play_ours
from torch import distributed
from traffic import Arrival, play

Shares = Sequence[Sequence[Arrival]]
"""Requests by rank."""
OPTIONS: dict[str, Any] = {
    "attn_dp_size": RANKS,
    "skip_tokenizer_init": False,
    "constrained_json_disable_any_whitespace": True,
}
SEEDS: dict[str, Any] = {"enable_deterministic_inference": True}
"""They count."""
HEAD: dict[str, Any] = {"enable_dp_lm_head": True}
"""Each rank has the whole head."""
EXPERTS: dict[str, Any] = {**HEAD, "ep_size": RANKS}
PENALTIES = {"frequency_penalty": 0.8, "presence_penalty": 0.3}


def asked() -> list[list[Arrival]]:
    """Twelve requests of the first rank, of which one is aborted; two of the second, one of which comes when the first
    rank has been decoding for long, and one long after it has ended."""
    rng, grammars = random.Random(5), cycle(GRAMMARS)

    def params(i: int) -> dict[str, Any]:
        kinds: tuple[dict[str, Any], ...] = (
            {"max_new_tokens": 30},
            {"ignore_eos": False, "max_new_tokens": 60, **next(grammars)},
            {"max_new_tokens": 24, **PENALTIES},
            {"max_new_tokens": 20, "return_logprob": True},
        )
        return kinds[i % len(kinds)]

    arrivals = [
        Arrival(
            f"r{i:02d}",
            2 * i,
            tuple(rng.choices(range(32, 127), k=rng.randint(8, 40))),
            params(i),
            abort_after=5 if i == 4 else None,
        )
        for i in range(12)
    ]
    prompt = tuple(range(40, 60))
    late = [Arrival("late", 14, prompt, {"max_new_tokens": 30}), Arrival("last", 150, prompt[5:])]
    return [arrivals, late]


def sampled_ones() -> list[list[Arrival]]:
    """Requests that draw by a seed: six of the first rank, two of the second."""
    arrivals = [
        Arrival(
            f"s{seed}",
            3 * seed,
            tuple(range(100 + seed, 130)),
            {"max_new_tokens": 24, "sampling_seed": seed, "temperature": 1.0},
        )
        for seed in range(8)
    ]
    return [arrivals[:6], arrivals[6:]]


def together(e: Engine, arrivals: Sequence[Arrival]) -> Iterator[int]:
    """In place of `traffic._steps`: the last step is that in which no rank has anything left."""
    from sglang.srt.runtime_context import get_parallel

    group = get_parallel().tp_group
    last = max((a.step + (a.abort_after or 0) for a in arrivals), default=0)
    for step in itertools.count():
        ended: list[Any] = [step > last and not e.waiting and e.scheduler.is_fully_idle()] * group.world_size
        distributed.all_gather_object(ended, ended[0], group=group.cpu_group)
        if all(ended):
            return
        yield step


def play_plain(checkpoints: Checkpoints, shares: Shares, rank: int, port: int, **arguments: Any) -> Outputs:
    """Without drafts and aborts."""
    whole = [Arrival(a.rid, a.step, a.prompt, a.params) for a in shares[rank]]
    with (
        patch.object(traffic, "_steps", together),
        engine(checkpoints.target, **of_rank(rank, port, **{**OPTIONS, **arguments})) as e,
    ):
        return play(e, whole)


def play_shares(
    checkpoints: Checkpoints,
    router: str,
    shares: Shares,
    known: Sequence[Outputs],
    differs: Callable[[int], None],
    rank: int,
    port: int,
    **arguments: Any,
) -> Played:
    """`play_ours` of this rank's share. differs: what a rank does otherwise."""
    differs(rank)
    with patch.object(traffic, "_steps", together):
        return play_ours(
            checkpoints, router, shares[rank], known[rank], rank, port, **{**OPTIONS, **arguments}
        )


def play_replayed(
    checkpoints: Checkpoints, shares: Shares, known: Sequence[Outputs], rank: int, port: int
) -> tuple[Played, list[int]]:
    """`play_shares` by emulated graphs, and rows of those that were replayed."""
    from emulated import emulated_graphs

    graphs: list[Any] = []

    @contextmanager
    def start(*args: Any, **named: Any) -> Iterator[Engine]:
        with engine(*args, **named) as e, emulated_graphs(e) as captured:
            graphs.append(captured)
            yield e

    small = {"context_length": 128, "max_total_tokens": 1024, **HEAD}
    played = play_shares(checkpoints, "random", shares, known, alike, rank, port, start=start, **small)
    return played, graphs[0].backend.replayed


def play_overlapped(
    checkpoints: Checkpoints, shares: Shares, known: Sequence[Outputs], rank: int, port: int
) -> Overlapped:
    """`play_shares` in SGLang's overlap loop."""
    with patch.object(traffic, "_steps", together):
        return play_overlapping(
            checkpoints, "random", known[rank], alike, rank, port, shares[rank], **OPTIONS, **HEAD
        )


def alike(rank: int) -> None:
    """No rank differs."""


def stays_away(rank: int) -> None:
    """The second rank takes part in nothing while it has no request."""
    from whiflash_sglang.engine.forward.target import Target

    if rank:
        patch.object(Target, "join", lambda *_: None).start()
