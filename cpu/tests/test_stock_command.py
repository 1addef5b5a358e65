"""The bare command: stock SGLang, installed beside this package, on a machine without an accelerator."""

import json
import os
import signal
from pathlib import Path

import psutil
import pytest
from patience import wait_until
from server_host import Server, ServerHost

from whiflash_cpu.cpu import DEFAULT_KV_TOKENS
from whiflash_lab.servers import runs

from .conftest import Checkpoints

pytestmark = pytest.mark.server

PROBE = Path(__file__).parents[2] / "tests" / "probe"
STAND_INS = ("whiflash_cpu/",)
"""Files of what the CPU platform puts in SGLang's place."""
OFFERED = {
    "sglang.srt.entrypoints.engine.Engine.server_args_class",
    "sglang.srt.server_args.ServerArgs.add_cli_args",
    "sglang.srt.server_args.ServerArgs.from_cli_args",
}
"""The flags: known before anybody can say whether WHIFLASH is asked for."""


def replaced(process: psutil.Process, directory: Path) -> dict[str, str]:
    """Names of SGLang's that a process runs as ours, and the files: see `tests/probe/sitecustomize.py`."""
    answer = directory / f"{process.pid}.json"
    process.send_signal(signal.SIGUSR2)
    wait_until(answer.exists)
    return dict(json.loads(answer.read_text()))


def test_the_bare_command_serves_and_leaves_no_process(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No flag beside the model: device, attention, graphs, overlap and sampling come from the platform.

    And nothing else comes from this package, in any process: nobody asked for WHIFLASH.
    """
    monkeypatch.chdir(tmp_path)
    path = os.pathsep.join(part for part in (str(PROBE), os.environ.get("PYTHONPATH")) if part)
    added = {"PYTHONPATH": path, "WHIFLASH_PROBE": str(tmp_path)}
    with Server(["--model-path", str(checkpoints.target)], env=added, log=tmp_path / "server.log") as server:
        launcher = psutil.Process(server.pid)
        family = launcher.children(recursive=True)
        info = server.get("/server_info")
        assert (info["device"], info["attention_backend"]) == ("cpu", "whiflash_cpu")
        assert info["max_total_num_tokens"] == DEFAULT_KV_TOKENS
        answer = server.post(
            "/v1/chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8},
        )
        assert answer["usage"]["completion_tokens"] > 0
        titled = [p for p in family if "sglang::" in " ".join(p.cmdline())]
        assert len(titled) == 2, "a scheduler and a detokenizer"
        for one in (launcher, *titled):
            names = replaced(one, tmp_path)
            asked_for = {name for name, file in names.items() if not file.startswith(STAND_INS)}
            assert asked_for <= OFFERED, one.cmdline()
        launcher.send_signal(signal.SIGTERM)
        launcher.wait()
        wait_until(lambda: not any(runs(child.pid) for child in family))


def test_sglangs_rust_server_starts(host: ServerHost, checkpoints: Checkpoints) -> None:
    """It refuses to where a scheduler sends anything beside tokens, as one of ours does."""
    with host.running(*checkpoints.arguments, env={"SGLANG_RUST_SERVER": "1"}) as server:
        answer = server.generate(text="Hello", sampling_params={"max_new_tokens": 8})
    assert answer["meta_info"]["completion_tokens"] == 8
