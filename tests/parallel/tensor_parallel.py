"""Engines of two ranks, what is asked of them, and what a rank tells of its rounds."""

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

from engine import Engine, engine
from oracle_arm import OracleArm
from previewed import talk
from tiny_models import tiny_dflash, tiny_eagle3
from traffic import Arrival, mixed, play
from watching import unwatched

from whiflash_sglang.device.clock import Clock
from whiflash_sglang.records.core import Round
from whiflash_sglang.round import epilogue
from whiflash_sglang.round.draft import DraftStage
from whiflash_sglang.structure import spending

RANKS = 2
ENDS_AT_ONCE = {"SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0"}
"""Else a server of SGLang's that loses a process waits 65 s for what could be found out about its GPU."""
SAMPLE = 16
"""Arrivals of the sample in `make test`."""
ARRIVALS = mixed(seed=1, count=200, shared=40, aborts=0.1, stops=0.3, tokens=20)

Outputs = dict[str, list[int]]


@dataclass(frozen=True)
class Checkpoints:
    target: Path
    eagle3: Path
    dflash: Path

    @classmethod
    def of(cls, root: Path, target: Path) -> Self:
        """A target and two random drafters of it, written under `root`."""
        return cls(target, tiny_eagle3(root / "eagle3", target), tiny_dflash(root / "dflash", target))

    def served(self, router: str) -> list[str]:
        """Arguments of `host.running(...)`."""
        return [
            *("--model-path", str(self.target), "--dtype", "float32", "--enable-metrics"),
            *("--speculative-algorithm", "WHIFLASH", "--speculative-draft-model-path", str(self.dflash)),
            *("--whiflash-eagle-draft", str(self.eagle3), "--whiflash-router", router),
        ]

    def whiflash(self, router: str, **flags: Any) -> dict[str, Any]:
        """Arguments of `engine(whiflash=...)`."""
        return {"draft": self.dflash, "whiflash_eagle_draft": str(self.eagle3), "whiflash_router": router, **flags}


@dataclass(frozen=True)
class Played:
    """Record of one rank. rounds: routes of each, requests that caught up, and every draft that was verified."""

    outputs: Outputs
    rounds: list[tuple[Any, ...]]
    arms: set[str]
    retracted: int
    accepted: int


def of_rank(rank: int, port: int, **arguments: Any) -> dict[str, Any]:
    """Arguments of `engine`. The seed, which SGLang's launcher draws for all ranks, is fixed."""
    return {"tp_size": RANKS, "rank": rank, "port": port, "random_seed": 7, "max_running_requests": 6, **arguments}


def play_plain(
    checkpoints: Checkpoints, arrivals: Sequence[Arrival], rank: int, port: int, **arguments: Any
) -> Outputs:
    """Without drafts and aborts."""
    with engine(checkpoints.target, **of_rank(rank, port, **arguments)) as e:
        return play(e, [replace(arrival, abort_after=None) for arrival in arrivals]) | jobs(e)


def play_ours(
    checkpoints: Checkpoints,
    router: str,
    arrivals: Sequence[Arrival],
    known: Outputs,
    rank: int,
    port: int,
    *,
    start: Callable[..., Any] = engine,
    flags: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Played:
    """The same on an engine that `start` starts, with all arms, and one that knows most of the answers `known`. It
    raises if slots or rows are lost.
    """
    rounds: list[tuple[Any, ...]] = []
    proposers: set[str] = set()
    original = DraftStage.draft

    def noting(self: DraftStage, round_: Round) -> None:
        original(self, round_)
        with unwatched():
            tokens, widths = round_.chosen.tokens.tolist(), round_.chosen.widths.tolist()
        drafts = [each[: width - 1] for each, width in zip(tokens, widths, strict=True)]
        rounds.append((round_.plan.routes, round_.due, drafts))
        if found := round_.plan.candidates:
            proposers.update(arm for i, arm in enumerate(self.sources.proposing) if found.sizes[:, i].any())

    oracle = OracleArm(0.93, seed=3).knowing((a for a in arrivals if a.rid in known), known)
    with (
        patch.object(DraftStage, "draft", noting),
        start(
            checkpoints.target,
            whiflash=checkpoints.whiflash(router, **(flags or {})),
            arms=[oracle],
            **of_rank(rank, port, **arguments),
        ) as e,
    ):
        outputs = play(e, arrivals) | jobs(e)
        requests = e.requests.values()
        return Played(
            outputs,
            rounds,
            proposers | {arm for routes, *_ in rounds for arm in routes},
            sum(req.retraction_count for req in requests),
            sum(req.spec_num_correct_drafts for req in requests),
        )


def jobs(e: Engine) -> Outputs:
    """If the engine has sessions: turns with a preview between them beside another request; then tries of a task, also
    of another tenant, once after an answer that nobody may copy. `cached` of the second turn, `rounds` of the tries.
    """
    if not e.scheduler.enable_session_radix_cache:
        return {}
    from sglang.srt.managers import scheduler

    scheduler.TEST_RETRACT = False  # `engine` puts back what was before
    ours = e.scheduler.draft_worker is not None
    outputs, cached, *_ = talk(e, ahead=ours, beside=120)
    tries = [("a", "task", "t"), ("b", "task", "t"), ("a", "task", "t"), ("a", "lookup", "context"), ("b", "task", "t")]
    for number, (tenant, name, value) in enumerate(tries):
        if ours and number in (0, 3):
            e.start_over("lookup")
        said = {"cache_salt": tenant, "custom_params": {"whiflash": json.dumps({name: value})}}
        outputs[f"try{number}"] = e.ask(f"try{number}", range(40, 64), max_new_tokens=60, **said)
    e.check_leaks()
    counts = {"cached": [cached], "rounds": [e.rounds(f"try{number}")[0] for number in range(len(tries))]}
    return outputs | (counts if ours else {})


def go_wild(rank: int) -> None:
    """From now on clocks jump in this process, mail comes and goes, times are known late and grammars look dear."""
    rng = random.Random(rank)
    clock = [0.0]

    def jumping() -> float:
        clock[0] += rng.expovariate(10.0)
        return clock[0]

    for p in (
        patch.object(time, "perf_counter", jumping),
        patch.object(time, "monotonic", jumping),
        patch.object(Clock, "passed", lambda *_: rng.random() < 0.5),
        patch.object(spending, "REQUEST_SECONDS", 0.0),
    ):
        p.start()


def goes_astray(checkpoints: Checkpoints, log: Path, rank: int, port: int) -> None:
    """From one round on the second rank commits other tokens than the target gave; rounds are told in `log`."""
    accept, rounds = epilogue.accept_and_commit, 0

    def committing(predictions: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal rounds
        rounds += 1
        with log.open("a") as lines:
            lines.write(f"rank {rank} verifies round {rounds}\n")
        return accept((predictions + (rank if rounds >= 4 else 0)) % 256, *args, **kwargs)

    with patch.object(epilogue, "accept_and_commit", committing):
        play_ours(checkpoints, "random", mixed(seed=2, count=6, tokens=60), {}, rank, port)


def draws_alone(checkpoints: Checkpoints, rank: int, port: int) -> Played:
    """In batches with a grammar the second rank draws other tokens than the first."""
    draw = epilogue.sample_rows

    def drawing(*args: Any, masks: Any = None, **named: Any) -> Any:
        return draw(*args, masks=masks, **named) + (0 if masks is None else rank)

    regex = {"regex": "(red|green|blue)( (red|green|blue)){5}", "max_new_tokens": 24, "temperature": 1.0}
    arrivals = [Arrival(f"r{i}", i, tuple(range(i, 20)), regex if i % 2 else {}) for i in range(4)]
    with patch.object(epilogue, "sample_rows", drawing):
        return play_ours(checkpoints, "random", arrivals, {}, rank, port, skip_tokenizer_init=False)
