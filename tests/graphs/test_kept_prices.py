"""A server that starts again has the prices of the start before, if it is the same in all that they depend on."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated import emulated_graphs
from engine import Engine, engine
from model_set import Models

from whiflash_sglang.device.clock import Clock
from whiflash_sglang.device.ranks import Message, Ranks
from whiflash_sglang.engine.scheduler import pricing
from whiflash_sglang.prices.costs import Costs
from whiflash_sglang.prices.tables import CostTables

SMALL: dict[str, Any] = {"max_running_requests": 2, "context_length": 128, "max_total_tokens": 512}
H100 = "NVIDIA H100 80GB HBM3"
ARGUMENTS = """
    attention_backend bf16_gemm_backend context_length cpu_offload_gb cuda_graph_config deepep_mode dtype enable_lora
    disable_custom_all_reduce disable_overlap_schedule enable_deterministic_inference enable_dp_lm_head enable_nccl_nvls
    enable_symm_mem enable_tf32_matmul enable_torch_compile fuseep_mode kv_cache_dtype page_size quantization tp_size
"""
"""Some that change what work takes."""


class Start:
    """Starts of one engine as on a card. runs: works that the last of them timed. device: its name. delay: seconds that
    every work takes longer."""

    def __init__(self, e: Engine) -> None:
        self.worker, self.device, self.runs, self.delay = e.worker, H100, 0, 0.0

    def price(self, ranks: Ranks | None = None, requests: int = 2) -> CostTables:
        worker, costs, self.runs = self.worker, Costs(lambda arm: 2), 0
        start = worker.target, worker.drafters, worker.sync, Clock(), requests
        with torch.no_grad():
            pricing.price(costs, pricing.Start(*start), ranks or Ranks())
        return costs.tables


@pytest.fixture(scope="module")
def module_start(models: Models) -> Iterator[Start]:
    with (
        engine(models.target, whiflash=models.whiflash("auto"), **SMALL) as e,
        emulated_graphs(e),
        pytest.MonkeyPatch.context() as patch,
    ):
        made = Start(e)

        def measure(body: Callable[[], object], **_: Any) -> float:
            body()
            made.runs += 1
            return made.runs / 1000 + made.delay

        patch.setattr(pricing, "measure", measure)
        patch.setattr(pricing, "_name", lambda device: made.device)
        yield made


@pytest.fixture
def start(module_start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Start:
    monkeypatch.setenv("WHIFLASH_CACHE", str(tmp_path))
    module_start.device, module_start.delay = H100, 0.0
    return module_start


def kept(root: Path) -> list[Path]:
    return sorted(root.joinpath("prices").iterdir())


def test_the_second_start_measures_nothing(start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "whiflash_sglang")
    first = start.price()
    assert start.runs > 20
    [file] = kept(tmp_path)
    assert f"are kept in {file}" in caplog.text
    caplog.clear()
    assert start.price() == first
    assert start.runs == 0
    assert f"those of {file}, measured at {json.loads(file.read_text())['measured']}" in caplog.text


def test_another_server_measures_its_own(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another device, number of processes or requests, target, drafter, argument or kernel."""
    target, worker = start.worker.target, start.worker
    start.price()
    model = vars(worker.drafters["diffusion"])["model"]
    ranks = Ranks(0, 2, lambda message: message)
    others: list[Callable[[], Any]] = [
        lambda: setattr(start, "device", "NVIDIA L4"),
        lambda: monkeypatch.setattr(target.runner.model_config.hf_config, "intermediate_size", 1),
        lambda: monkeypatch.setattr(model, "config", "another"),
        lambda: monkeypatch.setattr(pricing, "get_context", lambda: SimpleNamespace(resolved_server_args_dict=dict)),
        lambda: monkeypatch.setattr(pricing.supported, "installed", lambda: "9.9.9"),
        lambda: monkeypatch.setattr(pricing, "_kernels", lambda: "another"),
    ]
    assert all(map(pricing.PRICED.search, ARGUMENTS.split()))
    for number, change in enumerate(others, start=2):
        change()
        start.price()
        assert (start.runs > 0, len(kept(tmp_path))) == (True, number)
    for more in ({"requests": 1}, {"ranks": ranks}):
        start.price(**more)
        assert start.runs > 0
    assert len(kept(tmp_path)) == len(others) + 3
    start.price()
    assert start.runs == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda known: json.dumps(known)[:200],
        lambda known: "",
        lambda known: "[]",
        lambda known: json.dumps(known | {"key": {}}),
        lambda known: json.dumps(known | {"tables": {}}),
        lambda known: json.dumps(known).replace("0.001", "-1.0"),
        lambda known: json.dumps(known).replace("0.001", "0.0"),
        lambda known: json.dumps(known).replace("0.001", "1e300"),
        lambda known: json.dumps(known).replace("0.001", '"x"'),
        lambda known: json.dumps(known).replace('"short": ', '"short": 1000'),
    ],
)
def test_a_file_that_is_broken_or_anothers_is_replaced(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Any], str]
) -> None:
    first = start.price()
    [file] = kept(tmp_path)
    file.write_text(spoil(json.loads(file.read_text())))
    assert start.price() == first
    assert start.runs > 0
    assert [r.message.count("measured again") for r in caplog.records if r.levelname == "WARNING"] == [1]
    start.price()
    assert start.runs == 0


def test_a_directory_that_cannot_be_written_is_no_reason_to_end(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WHIFLASH_CACHE", str(tmp_path / "file"))
    start.price()
    assert "the next start measures prices again" in caplog.text


def test_all_processes_do_what_the_first_one_does(start: Start, tmp_path: Path) -> None:
    """The others look for no file, and keep none: to measure is a collective call. Their own clocks count for nothing,
    so all wait as many rounds with a preview."""
    sent: list[Message] = []

    def send(message: Message | None) -> Any:
        if message is not None:
            sent.append(message)
        return message or sent.pop(0)

    first, second = (Ranks(rank, 2, send) for rank in (0, 1))
    tables = start.price(first)
    [file] = kept(tmp_path)
    start.delay = 1.0
    assert start.price(second) == tables
    assert start.runs > 0
    file.unlink()
    start.price(Ranks(1, 2, lambda _: Message(0, 0, tables)))
    assert (start.runs, kept(tmp_path)) == (0, [])
