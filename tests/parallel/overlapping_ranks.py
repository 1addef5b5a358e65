"""Two ranks in SGLang's overlap loop on a CPU (`overlap.py`), and what they are asked."""

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any
from unittest.mock import patch

import torch
from tensor_parallel import Checkpoints, Outputs, Played, play_ours
from traffic import Arrival
from watching import unwatched

OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": False,
    "constrained_json_disable_any_whitespace": True,
    "enable_deterministic_inference": True,
}
GRAMMARS: tuple[dict[str, Any], ...] = (
    {"json_schema": '{"type": "object", "properties": {"a": {"enum": ["red", "green"]}}, "required": ["a"]}'},
    {"regex": "(red|green|blue), and once more: (red|green|blue)(; never again){2}"},
    {"ebnf": 'root ::= "begin " word " then " word " end"\nword ::= [a-z]{2,9}'},
)


@dataclass(frozen=True)
class Overlapped:
    """Counts of one rank. passes: decoding ones of the scheduler. apart: those of them that did not overlap. races,
    waits: as of `Streams`, the waits of our lines only.
    """

    played: Played
    passes: int
    apart: int
    races: dict[str, int]
    waits: dict[str, int]
    retracted: frozenset[str]


def asked() -> list[Arrival]:
    """Requests by turns greedy, under a grammar and sampled with a seed, two of which are aborted.

    A seed's tokens depend in SGLang on whether anybody in the batch has a top-p or is greedy. So the sampled ones have
    one: a grammar's time to compile decides who is prefilled beside whom.
    """
    return twelve(
        lambda i, grammar: (
            {"max_new_tokens": 40},
            {"ignore_eos": False, "max_new_tokens": 90, **grammar},
            {"max_new_tokens": 30, "temperature": 1.0, "top_p": 0.95, "sampling_seed": i},
        ),
        aborts={6: 6, 8: 6},
    )


def twelve(kinds: Callable[[int, Any], Sequence[dict[str, Any]]], aborts: Mapping[int, int]) -> list[Arrival]:
    """Requests by turns of these kinds, which know their number and have a grammar. aborts: after how many tokens."""
    rng = random.Random(5)
    asked = [kinds(i, grammar) for i, grammar in zip(range(12), cycle(GRAMMARS), strict=False)]
    return [
        Arrival(
            f"r{i:02d}",
            2 * i,
            tuple(rng.choices(range(32, 127), k=rng.randint(8, 40))),
            each[i % len(each)],
            aborts.get(i),
        )
        for i, each in enumerate(asked)
    ]


def play_overlapping(
    checkpoints: Checkpoints,
    router: str,
    known: Outputs,
    differs: Callable[[int], None],
    rank: int,
    port: int,
    arrivals: Sequence[Arrival] = (),
    **arguments: Any,
) -> Overlapped:
    """`play_ours`, with retractions. differs: what every rank but the first does otherwise. arrivals: in place of what
    is `asked`.
    """
    from overlap import overlapped, publishing
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.scheduler_components import dp_attn

    from whiflash_sglang.engine.forward import parallel
    from whiflash_sglang.engine.forward.peers import Peers
    from whiflash_sglang.engine.forward.target import Target

    disables, disabled, engines = Scheduler.is_disable_overlap_for_batch, list[bool](), list[Any]()

    def noted(scheduler: Any, batch: Any, last_batch: Any) -> bool:
        does = bool(disables(scheduler, batch, last_batch))
        if batch is not None and batch.forward_mode.is_decode():
            disabled.append(does)
        return does

    @contextlib.contextmanager
    def start(*args: Any, **named: Any) -> Iterator[Any]:
        with overlapped(*args, host_lengths=False, **named) as started:
            engines.append(started)
            yield started

    if rank:
        differs(rank)
    with (
        patch.object(parallel, "broadcast_pyobj", between_hosts(parallel.broadcast_pyobj)),
        patch.object(torch.distributed, "all_gather_object", between_hosts(torch.distributed.all_gather_object)),
        patch.object(dp_attn, "exchange_sync_rows", between_hosts(dp_attn.exchange_sync_rows)),
        patch.object(Peers, "agree", between_hosts(Peers.agree)),
        patch.object(Target, "verify", publishing(Target.verify)),
        patch.object(Scheduler, "is_disable_overlap_for_batch", noted),
    ):
        played = play_ours(
            checkpoints,
            router,
            arrivals or asked(),
            known,
            rank,
            port,
            start=start,
            retract=2,
            **{**OPTIONS, **arguments},
        )
    streams, requests = engines[0].streams, engines[0].requests
    waits = {
        f"{kind}: {site}": count
        for kind in ("stalls", "pageable", "waits_of_host")
        for site, count in getattr(streams, kind).items()
        if site.startswith("whiflash")
    }
    retracted = frozenset(rid for rid, req in requests.items() if req.retraction_count)
    return Overlapped(played, len(disabled), sum(disabled), dict(streams.races), waits, retracted)


def between_hosts(call: Callable[..., Any]) -> Callable[..., Any]:
    """Messages between hosts are no work of the device."""

    def called(*args: Any, **named: Any) -> Any:
        with unwatched():
            return call(*args, **named)

    return called
