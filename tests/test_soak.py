"""Load and faults: users ask more than the cache holds, leave, and change the policy; every answer is compared."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from patience import wait_until
from server_host import Server, ServerHost
from tiny_models import tiny_dflash, tiny_eagle3, tiny_target

pytestmark = [pytest.mark.server, pytest.mark.evidence, pytest.mark.timeout(1800)]

REQUESTS, USERS, TOKENS, GROWN_MIB = 1500, 12, 48, 100
"""Requests of each half, users at a time, tokens of an answer; no process may grow by more in the second half."""


def leave(server: Server, body: dict[str, Any], after: int) -> None:
    """Ask for a stream, and go away in mid-answer."""
    body = {**body, "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}, "stream": True}
    with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=None) as stream:
        for _ in zip(range(after), stream.iter_lines(), strict=False):
            pass


def load(server: Server, expected: dict[tuple[int, ...], list[int]], rng: random.Random) -> list[str]:
    """Faults while users asked, left, and changed the policy."""

    def act(n: int) -> str:
        prompt, tokens = rng.choice(list(expected)), rng.randint(1, TOKENS)
        body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": tokens}}
        if n % 25 == 0:
            server.post("/whiflash/policy", {"router": rng.choice(["auto", "none", "ar", "diffusion", "lookup"])})
            server.post("/whiflash/forget", {"all": True})
        if n % 5 == 0:
            leave(server, body, rng.randint(0, 20))
        elif server.generate(**body)["output_ids"] != expected[prompt][:tokens]:
            return f"{prompt}: another answer than plain decoding's"
        return ""

    with ThreadPoolExecutor(USERS) as pool:
        return list(filter(None, pool.map(act, range(REQUESTS))))


def sizes(server: Server) -> dict[int, int]:
    """MiB of each process of a server."""
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    return {process.pid: process.memory_info().rss // 2**20 for process in family}


def test_text_is_plain_decodings_and_nothing_is_left_behind(host: ServerHost, tmp_path: Path) -> None:
    target, rng = tiny_target(tmp_path / "target", peaked=True), random.Random(0)
    prompts = [tuple(rng.choices(range(32, 127), k=rng.randint(100, 160))) for _ in range(80)]
    ours = ["--speculative-algorithm", "WHIFLASH", "--speculative-draft-model-path"]
    ours += [str(tiny_dflash(tmp_path / "dflash", target)), "--whiflash-eagle-draft"]
    ours += [str(tiny_eagle3(tmp_path / "eagle3", target))]
    model = ("--model-path", str(target), "--dtype", "float32")
    with host.running(*model) as plain:
        asked = [{"input_ids": prompt, "sampling_params": {"max_new_tokens": TOKENS}} for prompt in prompts]
        answers = plain.generate_all(asked, concurrency=8)
    expected = {prompt: one["output_ids"] for prompt, one in zip(prompts, answers, strict=True)}
    with host.running(*model, *ours, "--max-total-tokens", "1200") as server:
        assert load(server, expected, rng) == []
        halfway = sizes(server)
        assert load(server, expected, rng) == []
        wait_until(lambda: server.get("/whiflash/state")["requests"] == 0)
        state, end = server.get("/whiflash/state"), sizes(server)
        assert state["memory"].get("lookup_index", 0) == 0
        assert not state["quarantined"]
        assert not any(state["left_out"].values())
        assert {pid: (mib, end[pid]) for pid, mib in halfway.items() if end[pid] - mib > GROWN_MIB} == {}
        assert "Traceback" not in server.log.read_text(errors="replace")
