"""Engines of two ranks that attend to requests of their own, with features that keep or send KV."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import traffic
from decode_loop import run
from dp_attention import together
from engine import engine
from pictures import words
from safetensors.torch import load_file
from tensor_parallel import RANKS, Checkpoints, Outputs, of_rank
from torch import distributed
from traffic import Arrival, play

KEEPS: dict[str, Any] = {
    "attn_dp_size": RANKS,
    "chunked_prefill_size": 16 * RANKS,
    "max_total_tokens": 448,
    "enable_hierarchical_cache": True,
    "hicache_ratio": 6.0,
    "hicache_write_policy": "write_through",
}
"""Host memory."""
COLD = (*words(3, 30), *words(14, 8))
"""A prompt that begins as another one does."""


@dataclass(frozen=True)
class Kept:
    """By request: outputs, tokens that came from host memory, rounds, and drafts that were right."""

    outputs: Outputs
    host: Mapping[str, int]
    rounds: Mapping[str, tuple[int, int]]


def play_keeping(
    checkpoints: Checkpoints,
    router: str | None,
    shares: Sequence[Sequence[Arrival]],
    chained: int,
    other: Path,
    rank: int,
    port: int,
) -> Kept:
    """This rank's share, in which the first rank has a session `talk`.

    Args:
        router: None: plain decoding. chained: step from which on EAGLE-3 drafts alone. other: the same target with
            another head, which it is given in the end.
    """
    whiflash = None if router is None else checkpoints.whiflash(router)
    steps = itertools.count()
    with (
        patch.object(traffic, "_steps", together),
        engine(checkpoints.target, whiflash=whiflash, **of_rank(rank, port, **KEEPS)) as e,
    ):
        if not rank:
            e.open_session("talk", streaming=False)

        def on_step() -> None:
            if router is not None and next(steps) == chained:
                e.worker.reconfigure({"router": "ar"})

        outputs = play(e, shares[rank], on_step)
        if router is not None:
            quarantine = e.worker.quarantine
            assert not any((*quarantine.faults.values(), *quarantine.left_out.values()))
            head = e.worker.drafters["diffusion"].model.target_lm_head
            passes = itertools.count()

            def hear() -> None:
                """The second rank does two passes later."""
                if next(passes) == 2 + 2 * rank:
                    e.update_target(other)

            play(e, [Arrival("after", 0, COLD)][rank:], hear)
            torch.testing.assert_close(head, load_file(other / "model.safetensors")["lm_head.weight"])
        host = {rid: req.cached_tokens_host for rid, req in e.requests.items()}
        return Kept(outputs, host, {rid: e.rounds(rid) for rid in e.requests})


def play_arrived(
    target: Path, whiflash: dict[str, Any] | None, prompts: Sequence[int], rank: int, port: int
) -> tuple[Outputs, int]:
    """Outputs of a decode server for as many prompts as this rank's number, and drafts that were right."""
    import test_disaggregation as decode

    def ended(here: bool) -> bool:
        """Ranks end together: each pass of the loop is one of all."""
        every: list[Any] = [here] * RANKS
        distributed.all_gather_object(every, here, group=e.scheduler.tp_cpu_group)
        return all(every)

    arguments = of_rank(rank, port, **{**decode.SERVER, "attn_dp_size": RANKS})
    with engine(target, whiflash=whiflash, **arguments) as e, patch.object(decode, "run", partial(run, ends=ended)):
        outputs = decode.texts(e, decode.PROMPTS[: prompts[rank]])
        e.check_leaks()
        return outputs, sum(req.spec_num_correct_drafts for req in e.requests.values())
