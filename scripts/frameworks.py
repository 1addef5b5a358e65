"""The recipes of `examples/frameworks` against the newest releases: `python scripts/frameworks.py [NAME …]`.

Each recipe runs in an environment of its own and asks one server of the embedded model. A row names how the framework
sends hints, the agents' names that arrived and the number of traces that came back. Rows of earlier runs are kept.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import outcome
from servers_beside import address

ROOT = Path(__file__).parents[1]
RECIPES = {
    "openai-agents": ("openai_agents.py", "openai-agents"),
    "pydantic-ai": ("pydantic_ai_model.py", "pydantic-ai-slim[openai]"),
    "LangGraph": ("langgraph_node.py", "langgraph", "langchain-openai"),
    "smolagents": ("smolagents_model.py", "smolagents[openai]"),
    "google-adk": ("google_adk.py", "google-adk", "litellm"),
    "litellm": ("litellm_session.py", "litellm"),
    "instructor": ("instructor_client.py", "instructor"),
    "CrewAI": ("crewai_llm.py", "crewai[litellm]"),
    "AG2": ("ag2_agent.py", "ag2[openai]"),
    "DSPy": ("dspy_lm.py", "dspy[litellm]"),
}
"""Each with its file and what it needs beside the SDK."""


def command(requirements: Sequence[str]) -> list[str]:
    """Python with the newest releases of these, and the SDK as it is here."""
    uv = shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    line = [uv, "run", "--isolated", "--no-project", "--no-config", "--quiet", "--python", python]
    more = [part for one in requirements for part in ("--with", one)]
    return [*line, "--with-editable", str(ROOT / "sdk"), *more, "python"]


def run(name: str, url: str, seconds: float) -> dict[str, Any]:
    """The last line of a recipe, or the reason why it failed."""
    file, *requirements = RECIPES[name]
    line = [*command(requirements), file, "--base-url", f"{url}/v1"]
    folder = ROOT / "examples" / "frameworks"
    try:
        own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(line, cwd=folder, env=own, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {seconds:g} s"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode != 0:
        print(done.stderr[-3000:], file=sys.stderr)
        return {"error": lines[-1][:200] if lines else f"exit status {done.returncode}"}
    return dict(json.loads(lines[-1]))


def row(name: str, found: dict[str, Any]) -> str:
    """A line of the table."""
    if "error" in found:
        return f"| {name} | | fails: {found['error']} | | |"
    agents = ", ".join(found["agents"]) or "no name"
    return f"| {name} | {found['version']} | {found['way']} | {agents} | {found['traces']} |"


def main() -> None:
    """The command line; its exit status is 1 where a recipe failed or brought no trace."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}; default: all")
    parser.add_argument("--seconds", type=float, default=600, help="for a recipe, its installation included")
    parser.add_argument("--json", type=Path, default=ROOT / "results" / "frameworks.json")
    parser.add_argument("--markdown", type=Path, default=ROOT / "results" / "frameworks.md")
    parser.add_argument("--url", help="ask this server; default: start one")
    given = parser.parse_args()
    names = given.names or list(RECIPES)
    if unknown := set(names) - RECIPES.keys():
        parser.error(f"no recipe of {', '.join(sorted(unknown))}: give {', '.join(RECIPES)}")
    found = json.loads(given.json.read_text("utf-8")) if given.json.exists() else {}
    with address(given.url) as url:
        for name in names:
            found[name] = run(name, url, given.seconds)
            print(name, found[name], file=sys.stderr, flush=True)
            given.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    rows = [row(name, found[name]) for name in RECIPES if name in found]
    head = ["| framework | version | hints by | agents seen | traces |", "|---|---|---|---|---|"]
    about = [part.replace("\n", " ") for part in (__doc__ or "").strip().split("\n\n")[1:]]
    outcome.write(given.markdown, "Agents by framework", *about, "\n".join([*head, *rows]))
    if not all(found[name].get("traces") for name in names):
        sys.exit(1)


if __name__ == "__main__":
    main()
