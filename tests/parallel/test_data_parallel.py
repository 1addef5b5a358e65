"""Two replicas of one server: controls reach both, text is right, conversations stay where they say, and a replica that
does not answer is named."""

import random
import re
from typing import Any

import httpx
import pytest
from openai import OpenAI
from patience import wait_until
from scrape import scraped, total, values
from server_host import Server, ServerHost
from tensor_parallel import ENDS_AT_ONCE, Checkpoints

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]


def texts(server: Server) -> list[list[int]]:
    rng, params = random.Random(3), {"sampling_params": {"max_new_tokens": 24}}
    bodies = [{"input_ids": rng.choices(range(256), k=20), "cache_salt": f"tenant-{i}", **params} for i in range(8)]
    return [answer["output_ids"] for answer in server.generate_all(bodies, concurrency=8)]


def assert_policies_keep_texts(server: Server) -> None:
    """Two replicas first decode plainly. Drafts under other policies change none of their texts."""
    plain = texts(server)
    assert all(own["rounds"] for own in server.get("/whiflash/state")["replicas"])
    for router in ("random", "lookup"):
        state = server.post("/whiflash/policy", {"router": router})
        assert [own["policy"] for own in state["replicas"]] == [router, router]
        assert texts(server) == plain


def assert_both_count_and_forget(server: Server) -> None:
    """Each replica for itself."""
    samples = scraped(server.url)
    for own in server.get("/whiflash/state")["replicas"]:
        for arm, counts in own["by_arm"].items():
            published = total(samples, "rounds_total", dp_rank=str(own["replica"]), arm=arm)
            assert published == counts["rounds"]
    assert values(samples, "dp_rank") == {"0", "1"}
    assert len(server.post("/whiflash/forget", {"all": True})["replicas"]) == 2


def test_replicas(host: ServerHost, checkpoints: Checkpoints) -> None:
    flags = ("--dp-size", "2", "--enable-cache-report", "--enable-session-radix-cache")
    with host.running(*checkpoints.served("none"), *flags, env=ENDS_AT_ONCE) as server:
        assert_policies_keep_texts(server)
        state = server.get("/whiflash/state")
        assert [own["replica"] for own in state["replicas"]] == [0, 1]
        assert state["rounds"] == sum(own["rounds"] for own in state["replicas"])
        assert_both_count_and_forget(server)
        assert server.get("/whiflash/capabilities")["policy"] == "lookup"
        conversations_stay_where_they_say(server)
        a_replica_that_stands_still_is_named(server)


def conversations_stay_where_they_say(server: Server) -> None:
    """With OpenAI's client: the next turn finds its prefix on the replica that its request or session names, which
    takes previews, too. Closing a session reaches both."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=None)

    def ask(messages: list[Any], **more: Any) -> Any:
        return client.chat.completions.create(
            model="any", messages=messages, max_tokens=8, temperature=0, extra_body={"ignore_eos": True, **more}
        )

    sessions: list[dict[str, Any]] = [{"session_id": "one"}, {"session_id": "two"}]
    for replica, place in enumerate([{"routed_dp_rank": 0}, {"routed_dp_rank": 1}, *sessions]):
        messages = [{"role": "user", "content": f"on {place}, please"}]
        rounds = [own["rounds"] for own in server.get("/whiflash/state")["replicas"]]
        before = 0
        for _ in range(3):
            if place in sessions:
                marked = {"role": "user", "content": f"{messages[-1]['content']} END"}
                hints = {"whiflash": '{"preview": "END"}'}
                before = ask([*messages[:-1], marked], custom_params=hints, **place).usage.prompt_tokens
            answer = ask(messages, **place)
            assert answer.usage.prompt_tokens_details.cached_tokens >= before - 1
            before = answer.usage.prompt_tokens
            messages += [
                {"role": "assistant", "content": answer.choices[0].message.content or ""},
                {"role": "user", "content": "and then?"},
            ]
        after = [own["rounds"] for own in server.get("/whiflash/state")["replicas"]]
        assert [number for number in (0, 1) if after[number] > rounds[number]] == [replica % 2]
    httpx.post(f"{server.url}/close_session", json=sessions[0], timeout=None).raise_for_status()
    wait_until(lambda: re.findall("release_session \x1fone: indexed (.)", server.log.read_text())[1:2])


def a_replica_that_stands_still_is_named(server: Server) -> None:
    stopped = server.scheduler("_DP1")
    stopped.suspend()
    answer = httpx.get(server.url + "/whiflash/state", params={"timeout": 1}, timeout=None)
    assert answer.status_code == 504
    assert "1 of 2 ha" in answer.json()["error"]["message"]
    stopped.resume()
    assert [own["replica"] for own in server.get("/whiflash/state")["replicas"]] == [0, 1]
