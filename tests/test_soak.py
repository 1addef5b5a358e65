"""`scripts/soak.py` ends and says what it found, whatever becomes of a server: no part costs the hour of the others."""

import asyncio
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from loaded_scripts import load_script

script = load_script("soak")
NOBODY = "http://127.0.0.1:9"
GONE = "INFO: served\nTraceback (most recent call last):\nRuntimeError: lost a slot\n"


async def breaks_off(run: Any) -> None:
    (await run.client.get("/whiflash/state")).raise_for_status()


async def stands_still(run: Any) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("scenario", [breaks_off, stands_still])
def test_a_scenario_that_does_not_end_well_is_a_crash(
    scenario: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "STILL", 0.0 if scenario is stands_still else 1e6)
    monkeypatch.setitem(script.SCENARIOS, "some", (scenario, ()))
    log = tmp_path / "log"
    log.write_text(GONE)
    server = SimpleNamespace(base_url=NOBODY, pids=[], log=log)
    found = asyncio.run(script.play("some", server, NOBODY, 0.0, 0))
    assert found.crashes == 3, "the scenario, the state that nobody tells, and the traceback"
    said = capsys.readouterr().err
    assert "some broke off: " in said
    assert "RuntimeError: lost a slot" in said


@pytest.mark.parametrize(("busy", "leaks"), [(3, 0), (10**9, 2)], ids=["it ends", "it never ends"])
def test_what_is_kept_of_requests_that_are_gone_is_a_leak(
    busy: int, leaks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += request.url.path == "/whiflash/state"
        requests = 2 if asked <= busy else 0
        return httpx.Response(
            200, json={"requests": requests, "memory": {}, "quarantined": [], "left_out": {}}
        )

    async def settled() -> Any:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url=NOBODY) as client:
            found = script.Found("some")
            await script.settle(script.Run(None, client, None, 0.0, found, random.Random(0)))
            return found

    async def at_once(_: float) -> None:
        pass

    monkeypatch.setattr(script.asyncio, "sleep", at_once)
    found = asyncio.run(settled())
    assert (found.leaks, found.crashes) == (leaks, 0)


@pytest.mark.parametrize(
    ("grown", "leaks"), [(script.GROWN_MIB, 0), (script.GROWN_MIB + 1, 1)], ids=["full", "growing"]
)
def test_memory_that_goes_on_growing_is_a_leak(grown: int, leaks: int) -> None:
    found = script.Found("some")
    script.judge_growth(found, {1: 500, 2: 90, 3: 1}, {1: 510, 2: 90 + grown})
    assert found.leaks == leaks
    assert found.notes == {"rss_mib": 510, "rss_grown_mib": grown}
