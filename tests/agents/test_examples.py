"""Every example agent, started as a user starts it, against the real server on the embedded model; and whose text is
drafted there, among answers to one prompt and among tenants.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_host import Server, ServerHost
from whiflash_sdk import Hints, Span, routing

from whiflash_lab.demo import MAX_TOKENS, QUESTIONS
from whiflash_sglang.cli.serve import server_arguments
from whiflash_sglang.embedded import STRICT_TOOLS, TARGET_NAME

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
    flags = ["--context-length", "4096", "--dtype", "float32", "--enable-metrics", "--enable-session-radix-cache"]
    with host.running(*server_arguments(flags), env=STRICT_TOOLS, threads=2) as running:
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


COPIES = Span(kind="prose", open=True, prefer="lookup", pin=True)
"""Only copies are drafted, so prices, which depend on the machine, change no round."""
LINES = "|".join(
    f"{name} has {n} sheep, {n + 7} goats and no wolf[.]\\n" for n, name in enumerate(["Ann", "Bob", "Eve"], 3)
)
ASKED: dict[str, Any] = {"model": TARGET_NAME, "temperature": 0, "max_tokens": 160, "regex": f"({LINES}){{6}}"}
ASKED |= {"tools": QUESTIONS["tool call"]["tools"], "messages": [{"role": "user", "content": "Who has how many?"}]}


def four_answers(server: Server, temperature: float) -> tuple[list[str], list[str], int]:
    """Stream four answers and abort the third on its way. Return texts and reasons, and how much came from others'."""
    hints = Hints(trace=True, spans=(COPIES,)).extra_body()
    body = {**ASKED, "n": 4, "temperature": temperature, "stream": True, **hints}
    texts, reasons, copied = [""] * 4, [""] * 4, 0
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=None) as response:
        for line in response.iter_lines():
            chunk = json.loads(line[6:]) if line.startswith("data: {") else {"choices": []}
            for choice in chunk["choices"]:
                index, text = choice["index"], choice["delta"].get("content") or ""
                if index == 2 and len(texts[2]) < 60 <= len(texts[2] + text):
                    httpx.post(f"{server.url}/abort_request", json={"rid": chunk["id"]}, timeout=None)
                texts[index] += text
                reasons[index] += choice["finish_reason"] or ""
            for trace in filter(None, (routing(chunk, index) for index in range(4))):
                copied += trace.sources["group"].accepted if "group" in trace.sources else 0
    return texts, reasons, copied


def test_four_answers_copy_from_each_other_while_they_are_written(server: Server) -> None:
    """Greedy texts are those without drafts, and the end of one answer ends no other."""
    off = server.post("/v1/chat/completions", {**ASKED, **Hints(off=True).extra_body()})
    plain = off["choices"][0]["message"]["content"]
    for temperature in (0, 0.6):
        texts, reasons, copied = four_answers(server, temperature)
        assert [reason == "abort" for reason in reasons] == [False, False, True, False]
        assert len(texts[2]) < len(plain)
        if temperature:
            assert copied > 0
        else:
            assert [text == plain for text in texts] == [True, True, False, True]
            assert plain.startswith(texts[2])
    assert server.get("/whiflash/state")["memory"]["lookup_groups"] == 0, "the group ends with its answers"


def test_a_hostile_tenant_gets_what_it_gets_beside_nobody(server: Server) -> None:
    """It sends another tenant's text, task and session as its own: drafts, rounds and cached tokens are equal."""

    def ask(tenant: str, *turns: str, **hints: Any) -> tuple[str, int, int, dict[str, int]]:
        said = [{"role": role, "content": text} for role, text in zip(("assistant", "user"), turns, strict=False)]
        asked = {**ASKED, "messages": [*ASKED["messages"], *said], "cache_salt": tenant, "session_id": "line:s"}
        given = Hints(trace=True, task="t", spans=(COPIES,), **hints).extra_body()
        answer = server.post("/v1/chat/completions", {**asked, **given})
        trace = routing(answer)
        assert trace is not None
        accepted = {name: source.accepted for name, source in trace.sources.items()}
        return answer["choices"][0]["message"]["content"], trace.rounds, sum(trace.cached.values()), accepted

    worlds = []
    for left in ({}, {"lookup": "context"}):  # the second leaves nothing, and teaches chances as the first
        httpx.post(f"{server.url}/flush_cache", timeout=None).raise_for_status()
        server.post("/whiflash/forget", {"all": True})
        text = ask("victim", **left)[0]
        worlds.append([ask("hostile"), ask("villain", text, "Count again.")])
        if not left:
            assert ask("victim")[3]["group"] > 0
    assert worlds[0] == worlds[1]
    assert all(cached == 0 and "group" not in sources for _, _, cached, sources in worlds[0])
    metrics = httpx.get(f"{server.url}/metrics", timeout=None).text
    assert "whiflash_draft_tokens_total" in metrics
    assert not any(name in metrics for name in ("victim", "hostile", "villain", 'tenant="'))
