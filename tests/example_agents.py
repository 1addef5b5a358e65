"""The agents of `examples/agents`, run as a user runs them: unchanged, by their command line."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
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


def run_example(name: str, url: str, page: Path, python: Sequence[str] = (sys.executable,)) -> str:
    """Its output; the example itself checks that its tools ran and their results reached the next prompt.

    Args:
        url: of the server. page: takes the trace, where there is one. python: the interpreter's command.
    """
    command = [*python, name, "--base-url", f"{url}/v1", "--trace", str(page)]
    done = subprocess.run(command, cwd=AGENTS, capture_output=True, text=True)
    assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout
