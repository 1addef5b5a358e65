"""Own times of nested operators, and what may go wrong between the server and its trace."""

import gzip
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from whiflash_sglang.cli.running import table
from whiflash_sglang.errors import WhiflashError
from whiflash_sglang.lab.bench.profile import kind_of, own_times, profile


def op(name: str, ts: float, dur: float, tid: int = 1, **more: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": "cpu_op", "name": name, "ts": ts, "dur": dur, "tid": tid, **more}


EVENTS = [
    op("linear", 0, 100),
    op("mm", 10, 80),
    op("copy", 20, 30),
    op("mm", 200, 50),
    op("mm", 0, 1000, tid=2),
    op("python", 0, 500, cat="python_function"),
    {"ph": "i", "name": "mark", "ts": 3},
]


def test_an_operator_owns_what_its_callees_do_not() -> None:
    found, elsewhere = own_times(EVENTS)
    assert {name: calls for name, (_, calls) in found.items()} == {"linear": 1, "mm": 2, "copy": 1}
    seconds = {name: spent for name, (spent, _) in found.items()}
    assert seconds == pytest.approx({"linear": 20e-6, "mm": 100e-6, "copy": 30e-6})
    assert elsewhere == pytest.approx(100e-6), "nothing ran between 100 and 200"
    assert own_times([]) == ({}, 0.0)


class Server:
    """Answers like a server whose clock gains two rounds an answer; `writes`: whether it leaves a trace."""

    def __init__(self, *, writes: bool = True, whiflash: bool = True, rounds: int = 2) -> None:
        self.asked: list[str] = []
        self.rounds, self.gain, self.writes, self.whiflash = 0, rounds, writes, whiflash
        self.directory = Path()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        self.asked.append(path)
        if path == "/whiflash/state":
            state = {"rounds": self.rounds, "round_seconds": self.rounds * 0.04}
            return httpx.Response(200 if self.whiflash else 404, json=state)
        if path == "/start_profile":
            self.directory = Path(json.loads(request.content)["output_dir"])
        if path == "/v1/chat/completions":
            self.rounds += self.gain
        if path == "/stop_profile" and self.writes:
            with gzip.open(self.directory / "1-TP-0.trace.json.gz", "wt") as text:
                json.dump({"traceEvents": EVENTS}, text)
        return httpx.Response(200, json={})

    @property
    def client(self) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(self), base_url="http://server")


def test_a_round_operator_by_operator(tmp_path: Path) -> None:
    (tmp_path / "old.trace.json.gz").write_bytes(b"not this one")
    found = profile(Server().client, [{"messages": []}], tmp_path)
    assert (found.rounds, found.round_ms) == (2, pytest.approx(40))
    assert [operator.name for operator in found.operators] == ["mm", "copy", "linear"]
    assert found.operators[0].ms == pytest.approx(0.05)
    assert found.operators[0].calls == 1.0
    assert len(list(tmp_path.iterdir())) == 2, "the trace is kept where it was asked for"
    assert table(found, top=1).row_count == 4
    assert found.kinds == {"small operators": pytest.approx(0.075)}


def test_operators_are_sorted_by_kind() -> None:
    """The compiled kernels' names are those under which torch's profiler finds them."""
    kinds = {
        "products": ("aten::addmm", "mkldnn::_linear_pointwise", "whiflash::product"),
        "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu", "whiflash::attention"),
        "small operators": ("aten::copy_", "whiflash::norm"),
    }
    for kind, names in kinds.items():
        assert {kind_of(name) for name in names} == {kind}


def test_what_goes_wrong_is_said() -> None:
    with pytest.raises(WhiflashError, match="answered 404: give --server a server"):
        profile(Server(whiflash=False).client, [{}])
    with pytest.raises(WhiflashError, match="wrote no trace"):
        profile(Server(writes=False).client, [{}])
    with pytest.raises(WhiflashError, match="no round"):
        profile(Server(rounds=0).client, [{}])
