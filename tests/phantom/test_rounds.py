"""Whole rounds on the phantom card: plain decoding's text, and nothing that the host waits for."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from launches import kernels_taken
from places import missed_by_rounds, places_for_cards, reached
from streams import Streams
from tiny_server import CUDA, Target, TinyServer
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from whiflash_sglang.drafters.base import with_kv
from whiflash_sglang.drafters.profile import profile_drafts
from whiflash_sglang.round.catch_up import DraftSync
from whiflash_sglang.round.epilogue import Epilogue
from whiflash_sglang.routing.costs import MeasuredCosts

PROMPTS = [[5, 6, 7, 8, 5, 6, 7], [9, 10, 11], [3, 4, 3, 4, 3, 4, 3, 4]]
ROUNDS = 14


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target.made(tmp_path_factory.mktemp("models"))


class Reissued:
    """In place of graphs: a replay issues the pass again, and writes to where its first results are."""

    def __init__(self) -> None:
        self.replays = 0

    def record(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        first = body()

        def again() -> None:
            self.replays += 1
            for place, found in zip(tree_leaves(first), tree_leaves(body()), strict=True):
                place.copy_(found)

        return again, first


def serve(
    target: Target,
    world: Streams,
    rounds: int = ROUNDS,
    *,
    warmed: bool = False,
    recorder: Reissued | None = None,
) -> TinyServer:
    """Requests that every arm drafts for, from their starts to their ends; what is noted of `world` is of the rounds.

    warmed: with what a server does before its first request. recorder: of its passes.
    """
    with kernels_taken(world) as launches, torch.no_grad():
        server = TinyServer(target, world, len(PROMPTS), seed=1)
        if warmed:
            warm(server, world, recorder)
        server.route_at_random()
        for index, prompt in enumerate(PROMPTS):
            server.prefill(index, prompt)
        for found in (world.stalls, world.pageable):
            found.clear()
        for number in range(1, rounds + 1):
            server.round()
            if (
                number % 4 == 0
            ):  # one ends or is aborted while a round is under way, and another begins in its row
                index = server.random.randrange(server.size)
                server.end(index, kept=server.random.random() < 0.7)
                server.prefill(
                    index, [server.random.randrange(3, 12) for _ in range(server.random.randint(1, 9))]
                )
        server.learn()
        for index in range(server.size):
            server.end(index, kept=True)
    print(dict(launches.counts))
    return server


def warm(server: TinyServer, world: Streams, recorder: Reissued | None) -> None:
    """Launch every kernel and capture every pass without a wait, then time drafts."""
    world.stalls.clear()
    world.pageable.clear()
    server.drafting.capture(recorder, server.size)
    assert not world.stalls
    assert not world.pageable
    costs, nobodys = MeasuredCosts(lambda arm: 8), torch.zeros_like(server.table)
    profile_drafts(with_kv(server.drafters).values(), server.sync.rings, nobodys, costs, server.host)


@pytest.mark.parametrize("captured", [False, True])
def test_rounds_wait_for_nothing_and_write_what_plain_decoding_writes(
    target: Target, world: Streams, captured: bool
) -> None:
    recorder = Reissued() if captured else None
    server = serve(target, world, warmed=captured, recorder=recorder)
    assert recorder is None or recorder.replays > ROUNDS
    assert not world.stalls
    assert not world.pageable
    assert not world.races
    rounds = {arm: counts.rounds for arm, counts in server.learner.tally.by_arm.items()}
    assert all(rounds[arm] for arm in ("ar", "diffusion", "lookup", "none")), rounds
    assert sum(server.quarantine.faults.values()) == 0
    assert len(server.ended) == len(PROMPTS) + ROUNDS // 4
    texts = [req.output_ids for req in server.ended]
    with _disable_current_modes():
        assert texts == [target.likeliest(req.origin_input_ids, req.output_ids) for req in server.ended]
    assert sum(map(len, texts)) > (ROUNDS + 1) * len(PROMPTS), "no draft was right"


def reads(self: Any, *given: Any) -> None:
    given[0].indptr.tolist()


def uploads(self: Any, *given: Any) -> None:
    torch.tensor([1], device=CUDA)


def races(self: Any, *given: Any) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        self._text.add_(0)


@pytest.mark.parametrize(
    ("planted", "seen"),
    [(reads, "stalls"), (uploads, "pageable"), (races, "races")],
    ids=["reads", "uploads", "races"],
)
def test_what_waits_or_races_in_a_round_is_seen(
    target: Target, world: Streams, monkeypatch: pytest.MonkeyPatch, planted: Callable[..., None], seen: str
) -> None:
    commit = Epilogue.commit

    def spoiled(self: Any, *given: Any) -> Any:
        planted(self, *given)
        return commit(self, *given)

    monkeypatch.setattr(Epilogue, "commit", spoiled)
    serve(target, world, rounds=2)
    found = {name: bool(getattr(world, name)) for name in ("stalls", "pageable", "races")}
    assert found[seen]


def test_a_launch_refuses_a_tensor_of_the_host(
    target: Target, world: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a plan would be that was never uploaded."""
    catch_up = DraftSync.catch_up

    def without_upload(self: DraftSync, due: Any, flags: torch.Tensor, *rest: Any) -> None:
        catch_up(self, due, torch.ones(flags.shape, dtype=torch.int64), *rest)

    monkeypatch.setattr(DraftSync, "catch_up", without_upload)
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        serve(target, world)


def test_places_that_ask_for_a_card_are_reached(target: Target, world: Streams) -> None:
    places = places_for_cards()
    with reached(places) as found:
        serve(target, world, rounds=2, warmed=True)
    print(f"{len(found)} of {len(places)} places: {sorted(found)}")
    assert Counter(path for path, _ in places - found) == missed_by_rounds()
