"""The bare command: stock SGLang, installed beside this package, on a machine without an accelerator."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from server_host import START_TIMEOUT_S, Server, answers, free_port, wait_until

from whiflash_sglang.platform.defaults import DEFAULT_KV_TOKENS

from .conftest import Checkpoints

pytestmark = pytest.mark.server


def test_the_bare_command_serves_and_leaves_no_process(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """No flag beside the model: device, attention, graphs, overlap and sampling come from the platform."""
    port, log = free_port(), tmp_path / "server.log"
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(checkpoints.target)]
    with log.open("w") as out:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=out, stderr=out, cwd=tmp_path)
    server = Server(process.pid, port, log)
    family = [psutil.Process(process.pid)]
    try:
        wait_until(
            lambda: process.poll() is not None or answers(server.url + "/health"),
            START_TIMEOUT_S,
            "the server did not become healthy",
        )
        assert process.poll() is None, log.read_text()[-4000:]
        family += family[0].children(recursive=True)
        info = server.get("/server_info")
        assert (info["device"], info["attention_backend"]) == ("cpu", "whiflash_cpu")
        assert info["max_total_num_tokens"] == DEFAULT_KV_TOKENS
        answer = server.post(
            "/v1/chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8},
        )
        assert answer["usage"]["completion_tokens"] > 0
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        _, left = psutil.wait_procs(family, timeout=20)
        for survivor in left:
            survivor.kill()
    assert left == []
