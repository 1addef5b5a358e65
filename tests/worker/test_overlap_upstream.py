"""SGLang's own overlap loop under the model of streams: what it ships has no race, and a wait left out is found."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from matrix import sampled
from model_set import Models
from overlap import overlapped
from plain import plain_texts
from streams import Event, Stream
from traffic import mixed, play

ARRIVALS = mixed(seed=21, count=6, shared=30, aborts=0.2, stops=0.3, tokens=20)
STEPS = 4


def upstream(models: Models, algorithm: str) -> dict[str, Any]:
    """Server arguments of what SGLang ships."""
    drafts = {
        "EAGLE3": {
            "speculative_draft_model_path": str(models.eagle3),
            "speculative_num_steps": STEPS,
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": STEPS + 1,
        },
        "DFLASH": {"speculative_draft_model_path": str(models.dflash)},
    }
    named = {} if algorithm == "none" else {"speculative_algorithm": algorithm}
    return {"max_running_requests": 4, **named, **drafts.get(algorithm, {})}


@pytest.fixture(scope="module")
def expected(models: Models) -> dict[str, list[int]]:
    return plain_texts(models.target, ARRIVALS, max_running_requests=4)


@pytest.mark.parametrize(
    ("algorithm", "host_lengths"),
    sampled(
        [("none", False), ("EAGLE3", True), ("DFLASH", False), ("NGRAM", True)],
        *[("DFLASH", False), ("NGRAM", True)],
    ),
)
def test_text_is_plain_decodings_and_nothing_races(
    models: Models, expected: dict[str, list[int]], algorithm: str, host_lengths: bool
) -> None:
    with overlapped(models.target, host_lengths=host_lengths, **upstream(models, algorithm)) as e:
        found = play(e, ARRIVALS)
        races, stalls = e.streams.races, e.streams.stalls
    for a in ARRIVALS:
        length = None if a.abort_after is None else len(found[a.rid])
        assert found[a.rid] == expected[a.rid][:length]
    assert not races
    # NGRAM reads the tokens of the round before; the others read nothing between their rounds.
    assert {site.split(":")[0] for site in stalls} == (
        {"sglang/srt/speculative/ngram_worker.py"} if algorithm == "NGRAM" else set()
    )


def leaving_out(waiting: str, on: str, kind: type) -> Callable[[Any, Any], bool]:
    """Skips every wait of `waiting` for a stream, or for an event that was recorded on it."""

    def forget(who: Any, what: Any) -> bool:
        name = who if isinstance(who, str) else who.name
        return name == waiting and isinstance(what, kind) and what.name.removeprefix("event of ") == on

    return forget


FAULTS = {
    "the forward does not wait for what was scheduled": (
        leaving_out("forward", "schedule", Stream),
        "forward reads what schedule wrote",
    ),
    "the next batch writes while the forward reads": (
        leaving_out("schedule", "forward", Stream),
        "schedule writes what forward reads",
    ),
    "lengths are copied before they are published": (
        leaving_out("lengths", "forward", Event),
        "lengths reads what forward wrote",
    ),
    "lengths are read before they have come": (
        leaving_out("host", "lengths", Stream),
        "host reads what lengths wrote",
    ),
    "results are copied before the forward has them": (
        leaving_out("copy", "forward", Stream),
        "copy reads what forward wrote",
    ),
    "results are read before they have come": (
        leaving_out("host", "copy", Event),
        "host reads what copy wrote",
    ),
}


def test_a_wait_that_is_left_out_is_found(models: Models) -> None:
    """Each of the waits that SGLang's loop is made of, in one engine; the last fault ends it."""
    with overlapped(models.target, **upstream(models, "EAGLE3")) as e:
        for fault, (forget, race) in FAULTS.items():
            e.submit(fault, list(range(30)), max_new_tokens=12)
            for _ in range(3):
                e.step()
            assert not e.streams.races
            e.streams.forget = forget
            # Results that have not come are nonsense, of which there may be no tokens.
            with pytest.raises(IndexError) if fault == list(FAULTS)[-1] else nullcontext():
                for _ in range(4):
                    e.step()
            found, e.streams.forget = set(e.streams.races), type(e.streams)().forget
            assert any(text.startswith(race) for text in found), f"{fault}: {found}"
            if fault != list(FAULTS)[-1]:
                e.abort(fault)
                e.run()
                e.streams.races.clear()


def test_memory_that_is_given_back_while_the_forward_uses_it_is_found(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang keeps what a forward was given for two passes of its loop."""
    from sglang.srt.managers.scheduler import Scheduler

    def keeps_nothing(self: Scheduler, batch: Any) -> None:
        self.batch_record_buf[self.batch_record_ct] = []

    monkeypatch.setattr(Scheduler, "record_batch_in_overlap", keeps_nothing)
    monkeypatch.setenv("WHIFLASH_DEVICE_RESIDENT", "1")
    with overlapped(
        models.target, whiflash=models.whiflash("ar"), host_lengths=False, max_running_requests=4
    ) as e:
        e.submit("one", list(range(30)), max_new_tokens=8)
        e.submit("other", list(range(50, 80)), max_new_tokens=12)
        for _ in range(3):
            e.step()
        e.submit("late", list(range(90, 120)), max_new_tokens=12)
        e.run()
        races = set(e.streams.races)
    assert any("schedule may write again what forward uses" in race for race in races), races
