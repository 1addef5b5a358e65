"""Two ranks that attend to requests of their own (DP attention), and what each is asked.

A rank without a request joins every forward of the other, so both step as often: until nobody has anything left.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import tensor_parallel
import traffic
from engine import Engine, engine
from overlapping_ranks import Overlapped, play_overlapping, twelve
from tensor_parallel import RANKS, Checkpoints, Outputs, Played, play_ours
from torch import distributed
from traffic import Arrival

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
    arrivals = twelve(
        lambda _, grammar: (
            {"max_new_tokens": 30},
            {"ignore_eos": False, "max_new_tokens": 60, **grammar},
            {"max_new_tokens": 24, **PENALTIES},
            {"max_new_tokens": 20, "return_logprob": True},
        ),
        aborts={4: 5},
    )
    prompt = tuple(range(40, 60))
    late = [Arrival("late", 14, prompt, {"max_new_tokens": 30}), Arrival("last", 150, prompt[5:])]
    return [arrivals, late]


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
    with patch.object(traffic, "_steps", together):
        return tensor_parallel.play_plain(checkpoints, shares[rank], rank, port, **{**OPTIONS, **arguments})


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
        return play_ours(checkpoints, router, shares[rank], known[rank], rank, port, **{**OPTIONS, **arguments})


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
        return play_overlapping(checkpoints, "random", known[rank], alike, rank, port, shares[rank], **OPTIONS, **HEAD)


def alike(rank: int) -> None:
    """No rank differs."""


def stays_away(rank: int) -> None:
    """The second rank takes part in nothing while it has no request."""
    from whiflash_sglang.engine.forward.target import Target

    if rank:
        patch.object(Target, "join", lambda *_: None).start()
