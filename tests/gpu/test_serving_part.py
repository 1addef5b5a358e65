"""The serving parts' own code, rehearsed on tiny models; and the faults that its checks are there for."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import run
import serving
import torch
from checks import LEFT_OUT


def rehearse(out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[int, Any]:
    """Exit status and figures of a rehearsal."""
    status = serving.main(["--attention", "triton", "--device", "cpu", "--out", str(out), *options])
    return status, json.loads(out.read_text())


def test_waits_and_a_wrong_token_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a round, in a prefill and in a release."""
    from whiflash_sglang.cache.backlog import Watermarks
    from whiflash_sglang.round.catch_up import DraftSync
    from whiflash_sglang.serve.verify import VerifyStage

    verify, put, leave = VerifyStage.verify, Watermarks.put, DraftSync.leave

    def put_waiting(self: Watermarks, rows: Any, lengths: Any) -> None:
        put(self, rows, lengths.new_tensor(lengths.tolist()))

    def leave_waiting(self: DraftSync, row: int, end: int) -> None:
        torch.tensor([row], device=self.watermarks.device.device)
        leave(self, row, end)

    monkeypatch.setattr(Watermarks, "put", put_waiting)
    monkeypatch.setattr(DraftSync, "leave", leave_waiting)

    def planted(self: Any, *args: Any) -> Any:
        verified = verify(self, *args)
        verified.predictions[0].item()
        return verified._replace(predictions=(verified.predictions + 1) % 256)

    monkeypatch.setattr(VerifyStage, "verify", planted)
    status, found = rehearse(tmp_path / "out.json", monkeypatch)
    failed = {name: check["why"] for name, check in found["checks"].items() if check["status"] == "failed"}
    assert status == 1
    assert failed.keys() == {"agents", "waits", "equality"}  # a wrong token is none that the grammar allows
    assert all(place in failed["waits"] for place in ("worker.py", "catch_up.py", "lifecycle.py"))
    assert "differ" in failed["equality"]


def test_what_whiflash_refuses_is_left_out_and_what_fails_to_start_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from whiflash_sglang.errors import ConfigError

    monkeypatch.setattr(serving.Case, "engine", Mock(side_effect=ConfigError("not on this card")))
    status, found = rehearse(tmp_path / "refused.json", monkeypatch)
    assert (status, found["why"]) == (LEFT_OUT, "refused: not on this card")
    monkeypatch.setattr(serving.Case, "engine", Mock(side_effect=RuntimeError("no kernel image")))
    status, found = rehearse(tmp_path / "failed.json", monkeypatch)
    assert status == 1
    assert found["checks"]["starts"]["why"] == "RuntimeError: no kernel image"


def test_every_backend_that_is_allowed_has_its_part() -> None:
    from whiflash_sglang.engine.launch.refusals import CUDA_ATTENTIONS

    served = {part.name.removeprefix("serving-") for part in run.PARTS if part.name.startswith("serving-")}
    # TRT-LLM's latent attention needs a target that has it, which no pair of `make gpu` does.
    assert served == set(CUDA_ATTENTIONS) - {"trtllm_mla"}
