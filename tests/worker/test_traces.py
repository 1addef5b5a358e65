"""Traces at the scheduler: recorded on the requests that asked, sent with their last output, and gone with them."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
from engine import Engine, engine
from model_set import Models

from whiflash_sglang.telemetry.trace import Recording, build_trace

TRACED = {"custom_params": {"whiflash": '{"trace":"full"}'}}
CHUNK = 32


class Sent:
    """Payloads of the scheduler to the detokeniser: outputs by request, and the recordings among them."""

    def __init__(self) -> None:
        self.payloads: list[Any] = []

    def send_output(self, payload: Any, *_: Any, **__: Any) -> None:
        self.payloads.append(payload)

    def recordings(self) -> dict[str, list[Recording]]:
        """Recordings by request id; a request that is not among them never shared an output with one that is."""
        from sglang.srt.managers.io_struct import unwrap_from_pickle

        found: dict[str, list[Recording]] = {}
        for payload in self.payloads:
            info = unwrap_from_pickle(payload.customized_info)
            if info is not None:
                for rid, recordings in zip(payload.rids, info["whiflash"], strict=True):
                    found.setdefault(rid, []).extend(recordings)
        return found


@pytest.fixture(scope="module")
def traced(models: Models) -> Iterator[Engine]:
    with engine(
        models.target, whiflash=models.whiflash("random"), chunked_prefill_size=CHUNK, max_running_requests=4
    ) as e:
        yield e


@pytest.fixture
def sent(traced: Engine) -> Sent:
    traced.scheduler.output_streamer.send_to_detokenizer = found = Sent()
    return found


def prompt(length: int) -> list[int]:
    return random.Random(length).choices(range(256), k=length)


def check(recording: Recording, req: Any) -> None:
    """Every output token is of a round, but those that a prefill sampled: the first, and one after each retraction."""
    tokens = len(req.output_ids_through_stop)
    trace = build_trace(recording, "random", tokens)
    written = [i for s in trace["stretches"] for i in range(s["start"], s["end"])]
    assert written == sorted(set(written))
    assert set(written) < set(range(tokens))
    assert trace["tokens"] == len(written) == tokens - 1 - req.retraction_count
    for arm in trace["arms"].values():
        assert arm["accepted"] == arm["tokens"] - arm["rounds"] <= arm["proposed"]
    for name in ("proposed", "accepted"):
        by_source = sum(source[name] for source in trace.get("sources", {}).values())
        assert by_source == sum(arm[name] for arm in trace["arms"].values()), "each draft is of one source"


def test_only_who_asked_has_a_trace(traced: Engine, sent: Sent) -> None:
    traced.submit("asked", prompt(20), max_new_tokens=20, **TRACED)
    traced.submit("plain", prompt(21), max_new_tokens=40)
    traced.submit("short", prompt(22), max_new_tokens=5)
    traced.run()
    found = sent.recordings()
    (recording,) = found.pop("asked")
    check(recording, traced.requests["asked"])
    assert not any(found.values())
    assert len([p for p in sent.payloads if p.customized_info is not None]) == 1


def test_an_abort_in_a_chunked_prefill_leaves_nothing(traced: Engine, sent: Sent) -> None:
    traced.submit("gone", prompt(3 * CHUNK), max_new_tokens=20, **TRACED)
    traced.step()
    assert not traced.requests["gone"].output_ids
    traced.abort("gone")
    traced.run()
    traced.ask("after", prompt(23), max_new_tokens=20)
    assert traced.states == {}
    assert not any(sent.recordings().get("after", []))
    assert all(p.customized_info is None for p in sent.payloads if "gone" not in p.rids)


def test_an_abort_ends_no_request_whose_id_begins_alike(traced: Engine) -> None:
    for rid in ("1", "10"):
        traced.submit(rid, prompt(20), max_new_tokens=20)
    traced.step()
    traced.abort("1")
    traced.run()
    assert len(traced.output("1")) < 20 == len(traced.output("10"))


def test_retractions_leave_whole_traces_and_aborts_between_them_nothing(
    traced: Engine, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.managers import scheduler

    for i in range(4):
        traced.submit(f"kept{i}", prompt(10 + i), max_new_tokens=24, **TRACED)
    traced.submit("waits", prompt(15), max_new_tokens=200, **TRACED)
    monkeypatch.setattr(scheduler, "TEST_RETRACT", True)  # every third step
    aborted: list[str] = []

    def abort_what_was_retracted() -> None:
        queue = [req.rid for req in traced.scheduler.waiting_queue if req.retraction_count]
        if not aborted and "waits" in queue:
            traced.abort("waits")
            aborted.append("waits")

    traced.run(abort_what_was_retracted)
    monkeypatch.setattr(scheduler, "TEST_RETRACT", False)
    assert aborted
    kept = [traced.requests[f"kept{i}"] for i in range(4)]
    assert any(req.retraction_count for req in kept)
    found = sent.recordings()
    for req in kept:
        (recording,) = found[req.rid]
        check(recording, req)
    sent.payloads.clear()
    traced.ask("last", prompt(24), max_new_tokens=20)
    assert all(payload.customized_info is None for payload in sent.payloads)
