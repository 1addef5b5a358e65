"""A request's hints, if no HTTP process has looked at them first."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import pytest

from whiflash_sglang.arms.base import TextDrafter
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.serve import lifecycle
from whiflash_sglang.spans.hints import RequestHints


def request(custom_params: Any) -> Any:
    return SimpleNamespace(rid="r7", sampling_params=SimpleNamespace(custom_params=custom_params))


def test_malformed_hints_are_dropped_and_told(caplog: pytest.LogCaptureFixture) -> None:
    assert lifecycle._hints_of(request({"whiflash": '{"off": 1}'})) == RequestHints()
    [record] = caplog.records
    assert record.name == "whiflash_sglang.serve.lifecycle"
    assert "r7" in record.getMessage()
    assert "custom_params.whiflash.off" in record.getMessage()


def test_hints_that_are_right_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    assert lifecycle._hints_of(request({"whiflash": '{"off": true}'})) == RequestHints(off=True)
    assert not caplog.records


def test_flushing_forgets_every_request() -> None:
    sync, controller, drafter = Mock(), Mock(states={3: Mock(), 5: Mock()}), Mock(spec=TextDrafter)
    told_only = {"quarantine": Quarantine(["ar"]), "tally": Mock(), "publisher": Mock()}
    lifecycle.Lifecycle(
        {"ar": drafter}, sync, controller, Mock(), Mock(), Mock(), Mock(), **told_only
    ).forget_all()
    for told in (sync.forget, controller.forget, drafter.release):
        assert told.call_args_list == [call(3), call(5)]
