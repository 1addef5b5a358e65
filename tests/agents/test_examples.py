"""Every example agent, started as a user starts it, against the real server on the embedded model."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_host import Server, ServerHost

from whiflash_sglang.cli.serve import server_arguments

AGENTS = Path(__file__).resolve().parents[2] / "examples" / "agents"
NEEDS = {
    "tool_loop.py": "whiflash_sdk",
    "extract.py": "whiflash_sdk",
    "fleet.py": "whiflash_sdk",
    "langgraph_agent.py": "langgraph",
    "handoff.py": "agents",
    "smolagents_agent.py": "smolagents",
    "pydantic_ai_agent.py": "pydantic_ai",
}

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """WHIFLASH on the embedded model and bundle; in fp32, where the text does not depend on batch shapes."""
    flags = ["--tool-call-parser", "hermes", "--context-length", "4096", "--dtype", "float32"]
    with ServerHost(omp_threads=2, env={"SGLANG_TOOL_STRICT_LEVEL": "2"}) as host:
        yield host.start(*server_arguments([*flags, "--constrained-json-disable-any-whitespace"]))


def run_example(name: str, server: Server, page: Path) -> str:
    """Its output; the example itself checks that its tools ran and their results reached the next prompt."""
    command = [sys.executable, name, "--base-url", f"{server.url}/v1", "--trace", str(page)]
    done = subprocess.run(command, cwd=AGENTS, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_all_examples_are_tested() -> None:
    assert {path.name for path in AGENTS.glob("*.py")} - {"session.py", "tools.py"} == set(NEEDS)


# The grammar of a tool call lets whitespace repeat, and this model goes on with it for ever inside some of them.
LOOPS_IN_WHITESPACE = {"handoff.py", "langgraph_agent.py"}
EXAMPLES = [
    pytest.param(name, marks=[pytest.mark.evidence] if name in LOOPS_IN_WHITESPACE else []) for name in NEEDS
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_agent_reaches_its_end_and_is_routed(name: str, server: Server, tmp_path: Path) -> None:
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    page = tmp_path / "trace.html"
    output = run_example(name, server, page)
    assert "acceptance length" in output, output
    assert ("[json" if name == "extract.py" else "[tool_call") in output
    assert page.read_text("utf-8").startswith("<!doctype html>")
