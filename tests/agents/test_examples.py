"""Every example agent, started as a user starts it, against the real server on the embedded model."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from server_host import Server, ServerHost

from whiflash_lab.demo import MAX_TOKENS, QUESTIONS
from whiflash_sglang.cli.serve import server_arguments, server_environment
from whiflash_sglang.embedded import TARGET_NAME

ROOT = Path(__file__).resolve().parents[2]
AGENTS = ROOT / "examples" / "agents"
IN_THIS_ENVIRONMENT = {
    "tool_loop.py": "whiflash_sdk",
    "extract.py": "whiflash_sdk",
    "fleet.py": "whiflash_sdk",
    "langgraph_agent.py": "langgraph",
    "handoff.py": "agents",
    "smolagents_agent.py": "smolagents",
}
"""Each with the package that it needs."""
ISOLATED = "pydantic_ai_agent.py"

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(host: ServerHost) -> Iterator[Server]:
    """A server of `whiflash serve`; in fp32, so that the text does not depend on batch shapes."""
    flags = ["--context-length", "4096", "--dtype", "float32"]
    with host.running(*server_arguments(flags), env=server_environment(flags), threads=2) as running:
        yield running


@pytest.fixture(scope="module")
def isolated() -> list[str]:
    """Python with pydantic-ai, which wants a newer openai than the one SGLang pins."""
    uv = shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = [uv, "run", "--isolated", "--no-project", "--no-config", "--quiet", "--python", python]
    command += ["--with-editable", f"{ROOT / 'sdk'}[pydantic-ai]", "python"]
    try:
        done = subprocess.run([*command, "-c", "import pydantic_ai"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("an environment for pydantic-ai is built with uv, which is not installed")
    if done.returncode != 0:
        pytest.skip(f"no environment for pydantic-ai could be built: {done.stderr.strip()[-300:]}")
    return command


def run_example(name: str, url: str, page: Path, python: Sequence[str] = (sys.executable,)) -> str:
    """Its output; the example itself checks that its tools ran and their results reached the next prompt.

    Args:
        url: of the server. page: takes the trace, where there is one. python: the interpreter's command.
    """
    command = [*python, name, "--base-url", f"{url}/v1", "--trace", str(page)]
    done = subprocess.run(command, cwd=AGENTS, capture_output=True, text=True)
    assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout


def test_all_examples_are_tested() -> None:
    examples = {path.name for path in AGENTS.glob("*.py")} - {"session.py", "tools.py"}
    assert examples == {*IN_THIS_ENVIRONMENT, ISOLATED}


def check(output: str, page: Path, kind: str) -> None:
    """The example said what routing did, and its spans were seen."""
    assert "acceptance length" in output, output
    assert f"[{kind}" in output
    assert page.read_text("utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("name", sorted(IN_THIS_ENVIRONMENT))
def test_the_agent_reaches_its_end_and_is_routed(name: str, server: Server, tmp_path: Path) -> None:
    pytest.importorskip(IN_THIS_ENVIRONMENT[name])
    page = tmp_path / "trace.html"
    check(run_example(name, server.url, page), page, "json" if name == "extract.py" else "tool_call")


def test_pydantic_ai_reaches_its_end_and_is_routed(server: Server, isolated: list[str], tmp_path: Path) -> None:
    page = tmp_path / "trace.html"
    check(run_example(ISOLATED, server.url, page, isolated), page, "tool_call")


def test_the_demos_tool_call_is_one_that_would_run(server: Server) -> None:
    asked = {"model": TARGET_NAME, "temperature": 0, "max_tokens": MAX_TOKENS, **QUESTIONS["tool call"]}
    message = server.post("/v1/chat/completions", asked)["choices"][0]["message"]
    [call] = message["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris", "unit": "celsius"}
