"""A real server of two ranks: answers, state and policy, and its end when a rank is killed."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from patience import wait_until
from reference import Comparison, ReferenceTarget
from scrape import scraped, total, values
from server_host import Server, ServerHost
from tensor_parallel import ARRIVALS, ENDS_AT_ONCE, RANKS, SAMPLE, Checkpoints, Outputs
from traffic import Arrival

from whiflash_lab.servers import runs

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]


@pytest.fixture
def server(host: ServerHost, checkpoints: Checkpoints) -> Iterator[Server]:
    flags = ["--tp-size", str(RANKS), "--random-seed", "7"]
    with host.running(*checkpoints.served("random"), *flags, env=ENDS_AT_ONCE) as running:
        yield running


def test_answers_until_a_rank_is_killed(server: Server, checkpoints: Checkpoints, plain: Outputs) -> None:
    arrivals = [a for a in ARRIVALS[:SAMPLE] if a.abort_after is None]

    def compare(some: list[Arrival]) -> None:
        bodies = [{"input_ids": list(a.prompt), "sampling_params": a.params} for a in some]
        answers = zip(some, server.generate_all(bodies, concurrency=6), strict=True)
        found = {a.rid: answer["output_ids"] for a, answer in answers}
        Comparison(ReferenceTarget(checkpoints.target)).check_all(some, plain, found)

    compare(arrivals)
    assert server.get("/whiflash/state")["policy"] == "random"
    # Rounds without drafts share steps, until the first rank finds mail.
    assert server.post("/whiflash/policy", {"router": "none"})["policy"] == "none"
    compare(arrivals[:12])
    assert server.post("/whiflash/policy", {"router": "auto"})["policy"] == "auto"
    compare(arrivals[12:24])
    compare(arrivals)

    # The first rank alone counts: a round of both is one.
    samples, state = scraped(server.url), server.get("/whiflash/state")
    assert values(samples, "tp_rank") == {"0"}
    assert total(samples, "rounds_total") == sum(arm["rounds"] for arm in state["by_arm"].values()) > 0

    killed = server.scheduler("_TP1")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.generate, input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 1900})
        os.kill(killed.pid, signal.SIGKILL)
        wait_until(lambda: not runs(server.pid))
        with pytest.raises(httpx.TransportError):
            waiting.result()
