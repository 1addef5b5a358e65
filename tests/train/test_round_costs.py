"""Rounds of a real server: measured with its policy put back, under the neural policy, and in SGLang's own figures."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server_host import Server, ServerHost
from tiny_models import tiny_dflash, tiny_eagle3, tiny_target

from whiflash_sglang.errors import WhiflashError
from whiflash_sglang.lab.bench.load import RequestError
from whiflash_sglang.lab.bench.prompts import Prompt
from whiflash_sglang.lab.judging.calibration import measure_rounds
from whiflash_sglang.models.router import Router

pytestmark = pytest.mark.server

PROMPTS = [Prompt(f"p{i}", "chat", ({"role": "user", "content": "abc " * (i + 1)},)) for i in range(3)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, host: ServerHost) -> Iterator[Server]:
    root: Path = tmp_path_factory.mktemp("round-costs")
    target = tiny_target(root / "target")
    bundle = root / "bundle"
    tiny_eagle3(bundle / "eagle3", target)
    tiny_dflash(bundle / "dflash", target)
    (bundle / "router").mkdir()
    Router(64, 8, heads=True).save(bundle / "router" / "router.safetensors")
    manifest = {"schema_version": 1, "name": "tiny", "target": "tiny", "eagle3": "eagle3", "dflash": "dflash"}
    router = {"router": {"path": "router", "threshold": 0.25}}
    (bundle / "whiflash.json").write_text(json.dumps(manifest | router))
    arguments = ("--model-path", str(target), "--dtype", "float32", "--speculative-algorithm", "WHIFLASH")
    with host.running(
        *(*arguments, "--speculative-draft-model-path", str(bundle)),
        *("--enable-metrics", "--decode-log-interval", "1"),
    ) as running:
        yield running


def test_both_drafters_are_timed_and_the_policy_is_put_back(server: Server) -> None:
    seconds = measure_rounds(server.url, PROMPTS)
    assert seconds.keys() == {"eagle3", "dflash"}
    assert all(value > 0 for value in seconds.values())
    assert server.get("/whiflash/state")["policy"] == "auto"


def test_the_policy_is_put_back_after_an_error(server: Server) -> None:
    too_long = Prompt("long", "chat", ({"role": "user", "content": "abc " * 4000},))
    with pytest.raises(RequestError, match="prompt long"):
        measure_rounds(server.url, [too_long])
    assert server.get("/whiflash/state")["policy"] == "auto"


def test_the_neural_policy_over_http(server: Server) -> None:
    change = {"router": "neural", "neural_router_threshold": -0.5, "min_dwell": 2}
    assert server.post("/whiflash/policy", change)["policy"] == "neural"
    assert server.get("/whiflash/capabilities")["policy"] == "neural", (
        "what is in force, not what it started with"
    )
    messages = [{"role": "user", "content": "abc"}]
    body = {"model": "m", "temperature": 0, "max_tokens": 24, "messages": messages}
    neural = server.post("/v1/chat/completions", body)["choices"][0]["message"]
    server.post("/whiflash/policy", {"router": "none"})
    assert server.post("/v1/chat/completions", body)["choices"][0]["message"] == neural
    server.post("/whiflash/policy", {"router": "auto"})


def test_an_address_without_a_server_is_named() -> None:
    with pytest.raises(WhiflashError, match=r"127\.0\.0\.1:9.*/whiflash/state cannot be read"):
        measure_rounds("http://127.0.0.1:9", PROMPTS)


LOGGED = re.compile(r"accept len: ([\d.]+), accept rate: ([\d.]+), (?:cap len: ([\d.]+), )?")


@pytest.mark.parametrize("router", ["diffusion", "ar", "none", "random"])
def test_sglangs_own_figures_are_of_what_was_proposed(server: Server, router: str) -> None:
    """An answer's figures, its log lines and the gauges against the worker's own clock."""
    before = server.post("/whiflash/policy", {"router": router})
    logged = len(server.log.read_text())
    body = {
        "model": "m",
        "temperature": 0,
        "max_tokens": 24,
        "messages": [{"role": "user", "content": "abc"}],
    }
    asked = body | {"ignore_eos": True, "return_spec_tokens_details": True}
    answer = server.post("/v1/chat/completions", asked)
    found, told = answer["sglext"]["spec_tokens_details"], answer["metrics"]["speculative_decoding"]
    after = server.post("/whiflash/policy", {"router": "auto"})
    rounds, rows, tokens = (after[name] - before[name] for name in ("rounds", "rows", "tokens"))
    proposed = rows - rounds

    assert found["spec_verify_ct"] == rounds
    assert found["spec_num_proposed_drafts"] == proposed
    assert (proposed == 0) == (router == "none")
    assert (
        sum(n * drafts for drafts, n in enumerate(found["spec_correct_drafts_histogram"])) == tokens - rounds
    )
    assert found["spec_num_correct_drafts"] == tokens - rounds
    assert found["spec_accept_rate"] == ((tokens - rounds) / proposed if proposed else 0)
    assert found["spec_cap_length"] == rows / rounds
    assert sum(found["spec_cap_lens_histogram"]) == rounds
    histogram, widest = told.pop("acceptance_histogram"), told.pop("num_spec_tokens")
    assert len(histogram) == widest + 1
    assert sum(histogram) == rounds
    assert sum(n * drafts for drafts, n in enumerate(histogram)) == tokens - rounds
    assert told == {
        "mean_acceptance_length": pytest.approx(tokens / rounds),
        "draft_acceptance_rate": found["spec_accept_rate"],
        "num_spec_steps": rounds,
        "num_accepted_draft_tokens": tokens - rounds,
        "num_draft_tokens": proposed,
    }

    lines = LOGGED.findall(server.log.read_text()[logged:])
    assert lines
    for length, rate, cap in lines:
        drafts = float(cap) - 1
        assert float(rate) == pytest.approx((float(length) - 1) / drafts if drafts else 0, abs=0.006)
    gauges = httpx.get(f"{server.url}/metrics", timeout=None).text
    [gauge] = re.findall(r"^sglang:spec_accept_rate\{.*\} (.*)$", gauges, re.MULTILINE)
    assert float(gauge) == pytest.approx(float(lines[-1][1]), abs=0.006)


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_acceptance_is_told_as_vllm_tells_it(server: Server, route: str) -> None:
    """At the root of an answer, and of a stream's chunk without choices; of who asked, and of one choice."""
    server.post("/whiflash/policy", {"router": "diffusion"})
    said = {"messages": [{"role": "user", "content": "abc"}]} if "chat" in route else {"prompt": "abc"}
    body = {"model": "m", "temperature": 0, "max_tokens": 24, "ignore_eos": True, **said}
    asked = body | {"return_spec_tokens_details": True}
    told = server.post(route, asked)["metrics"]["speculative_decoding"]
    assert told["num_draft_tokens"] > 0
    streamed = httpx.post(f"{server.url}{route}", json=asked | {"stream": True}, timeout=None).text
    lines = [line.removeprefix("data: ") for line in streamed.splitlines() if line.startswith("data: {")]
    (chunk,) = [found for found in map(json.loads, lines) if "metrics" in found]
    assert chunk["choices"] == []
    assert set(chunk["metrics"]["speculative_decoding"]) == set(told)
    assert "metrics" not in server.post(route, body)
    assert "metrics" not in server.post(route, asked | {"n": 2})
    server.post("/whiflash/policy", {"router": "auto"})
