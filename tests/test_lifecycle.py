"""A request's hints, if no HTTP process has looked at them first; and what is kept of it, until when."""

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import pytest

from whiflash_sglang.arms.base import TextDrafter
from whiflash_sglang.records.request import Request
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.routing.controller import Controller
from whiflash_sglang.routing.policies import AutoPolicy
from whiflash_sglang.serve import lifecycle
from whiflash_sglang.spans.hints import RequestHints


def request(custom_params: Any) -> Any:
    return SimpleNamespace(rid="r7", sampling_params=SimpleNamespace(custom_params=custom_params))


def test_malformed_hints_are_dropped_and_told(caplog: pytest.LogCaptureFixture) -> None:
    assert lifecycle._hints_of(request({"whiflash": '{"off": true}'})) == RequestHints(off=True)
    assert not caplog.records
    assert lifecycle._hints_of(request({"whiflash": '{"off": 1}'})) == RequestHints(lookup="context")
    [record] = caplog.records
    assert record.name == "whiflash_sglang.serve.lifecycle"
    assert "r7" in record.getMessage()
    assert "custom_params.whiflash.off" in record.getMessage()


class Req:
    """A request as SGLang has it."""

    session = lora_id = extra_key = cache_salt = multimodal_inputs = None
    finished_reason = SimpleNamespace(to_json=lambda: {"type": "stop"})
    sampling_params = SimpleNamespace(custom_params=None, max_new_tokens=9)

    def __init__(self, rid: str) -> None:
        self.rid, self.origin_input_ids, self.output_ids = rid, [1, 2, 3], list[int]()
        self.kv, self.retracted_stain, self.ended = SimpleNamespace(req_pool_idx=None), False, False

    def finished(self) -> bool:
        return self.ended

    def owned_kv_len(self) -> int:
        return len(self.origin_input_ids) + len(self.output_ids)

    @property
    def output_ids_through_stop(self) -> list[int]:
        return self.output_ids


class Noting(TextDrafter):
    """Keeps of each request that it is this one's, and notes what became of it."""

    arm = "noting"

    def __init__(self) -> None:
        self.running, self.ended = set[Request](), 0

    def begin(self, request: Request) -> None:
        assert not request.kept
        assert not any(other.row == request.row for other in self.running), "its predecessor has ended"
        request.kept[self.arm] = request.rid
        self.running.add(request)

    def end(self, request: Request) -> None:
        assert request.kept == {self.arm: request.rid}
        self.running.remove(request)
        self.ended += 1


class History:
    """SGLang's requests, waiting and in `rows` of its table, and what is kept of them here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lifecycle, "sampling", Mock())
        for name, found in {"recording_of": None, "cached_of": {}, "grammar_of": None, "urgency": 0}.items():
            monkeypatch.setattr(lifecycle, name, Mock(return_value=found))
        self.arm, self.sync, self.waiting, self.rows = Noting(), Mock(), list[Req](), dict[int, Req]()
        self.tally, self.publisher = Mock(requests=Counter()), Mock()
        self.controller = Controller(AutoPolicy(), Mock(), ())
        self.lifecycle = lifecycle.Lifecycle(
            {"noting": self.arm},
            self.sync,
            self.controller,
            *[Mock(return_value=None) for _ in range(5)],
            forcing=None,
            quarantine=Quarantine(["noting"]),
            tally=self.tally,
            publisher=self.publisher,
            spool=None,
        )

    def begin(self, row: int) -> None:
        """A prefill of the next request, or another chunk of the one that has the row."""
        if row not in self.rows:
            if not self.waiting:
                self.waiting.append(Req(f"r{self.arm.ended}"))
                self.lifecycle.arrived(self.waiting[0])
            self.rows[row] = self.waiting.pop(0)
            self.rows[row].kv.req_pool_idx = row
        self.lifecycle.begin(row, self.rows[row], Mock())

    def commit(self, row: int) -> None:
        if row in self.rows:
            self.rows[row].output_ids.append(row)

    def release(self, row: int, how: str) -> None:
        if (req := self.rows.pop(row, None)) is None:
            return
        req.ended = how != "retract"
        self.lifecycle.released(req, kept=how == "finish")
        self.lifecycle.released(req, kept=True)  # SGLang may tell it twice
        req.kv.req_pool_idx = None
        if how == "retract":
            req.retracted_stain = True
            self.waiting.append(req)

    def check(self) -> None:
        table = self.controller.states
        assert {row: request.rid for row, request in table.items()} == {row: req.rid for row, req in self.rows.items()}
        assert self.arm.running == set(table.values())
        assert all(request.running for request in table.values())


@pytest.mark.parametrize("seed", range(5))
def test_what_is_kept_is_what_sglang_runs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After any history of prefills, chunks, retractions, aborts and ends, and of rows that were not given up."""
    history, rng = History(monkeypatch), random.Random(seed)
    for _ in range(200):
        row = rng.randrange(3)
        step = rng.choice(["begin", "begin", "commit", "retract", "abort", "finish", "replace"])
        before = history.controller.states.get(row)
        if step == "replace":
            history.rows.pop(row, None)
        if step in ("begin", "replace"):
            history.begin(row)
        elif step == "commit":
            history.commit(row)
        else:
            history.release(row, step)
        history.check()
        assert step != "begin" or before in (None, history.controller.states[row]), "a chunk changes nothing"
        if before is not None and before is not history.controller.states.get(row):
            assert not before.running
            assert not before.kept
            history.sync.forget.assert_called_with(row)
    for row in range(3):
        history.release(row, "abort")
    history.check()
    assert not history.controller.states


def test_flushing_forgets_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(monkeypatch)
    for row in (0, 2):
        history.begin(row)
    history.lifecycle.forget_all()
    history.rows.clear()
    history.check()
    assert history.sync.forget.call_args_list == [call(0), call(2)]
    assert not history.tally.ended.called, "nobody finished"


def test_a_request_is_counted_when_its_last_round_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(monkeypatch)
    history.begin(0)
    history.release(0, "finish")
    assert not history.tally.ended.called, "under overlap it follows"
    history.lifecycle.settle()
    history.tally.ended.assert_called_once_with({}, {})
    history.publisher.flush.assert_called_once_with()
