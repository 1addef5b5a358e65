"""A real server's metrics, by its answers and by the arm; a real Prometheus' reading of them; the kill switch."""

import json
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
import pytest
from in_process import whiflash
from patience import wait_until
from prometheus_server import ROOT, Prometheus, program, prometheus
from scrape import Samples, scraped, total, values
from server_host import Server, ServerHost
from sse import TOOL
from tiny_models import CHAT_TEMPLATE, tiny_bundle, tiny_target

from whiflash_sglang import __version__
from whiflash_sglang.serve.metrics import PREFIX, SERIES

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

OURS = {"model_name", "engine_type", "tp_rank", "pp_rank", "moe_ep_rank"}


@dataclass
class Load:
    """A server, its samples before and behind some requests, and what those were answered."""

    server: Server
    prometheus: Prometheus | None
    before: Samples
    after: Samples = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    chats: list[dict[str, Any]] = field(default_factory=list)

    def grown(self, name: str, **labels: str) -> float:
        return total(self.after, name, **labels) - total(self.before, name, **labels)

    def said(self, name: str) -> int:
        return sum(answer["meta_info"][name] for answer in self.answers)


def prompts() -> list[str]:
    return [f"request {i}: " + "one two three four " * (2 + i % 3) for i in range(12)]


def native(load: Load, i: int, text: str) -> None:
    """Every third orders something."""
    hint = {1: '{"off": true}', 2: '{"spans": [{"kind": "prose", "open": true, "prefer": "ar", "pin": true}]}'}
    given = {"custom_params": {"whiflash": hint[i % 3]}} if i % 3 else {}
    load.answers.append(load.server.generate(text=text, sampling_params={"max_new_tokens": 40, **given}))


def chat(load: Load, text: str) -> None:
    """With a tool, so that the server infers spans."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": text}],
        "tools": [TOOL],
        "temperature": 0,
        "max_tokens": 20,
        "ignore_eos": True,
    }
    load.chats.append(load.server.post("/v1/chat/completions", body))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, host: ServerHost) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("checkpoints")
    target = tiny_target(root / "target", peaked=True)
    template = root / "template.jinja"
    template.write_text(CHAT_TEMPLATE)
    bundle = tiny_bundle(root / "bundle", target)
    arguments = [
        *("--model-path", target, "--served-model-name", "tiny", "--dtype", "float32", "--enable-metrics"),
        *("--speculative-algorithm", "WHIFLASH", "--speculative-draft-model-path", bundle),
        *("--whiflash-router", "random", "--tool-call-parser", "hermes", "--chat-template", template),
        *("--decode-log-interval", "1", "--enable-cache-report"),
        *("--whiflash-learn", root / "learning"),
    ]
    with host.running(*map(str, arguments)) as running:
        yield running


@pytest.fixture(scope="module")
def load(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    """The same server under load, which a Prometheus watches where there is one."""
    if program("prometheus") is None:
        yield run(Load(server, None, scraped(server.url)))
        return
    address = server.url.removeprefix("http://")
    with prometheus(tmp_path_factory.mktemp("prometheus"), [address]) as watching:
        wait_until(lambda: watching.query(f"{PREFIX}info"))
        found = run(Load(server, watching, scraped(server.url)))
        rounds = total(found.after, "rounds_total")
        wait_until(lambda: watching.total(f"sum({PREFIX}rounds_total)") == rounds)
        yield found


def run(load: Load) -> Load:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda one: native(load, *one), enumerate(prompts())))
        list(pool.map(lambda text: chat(load, text), prompts()[:4]))
    load.after = scraped(load.server.url)
    return load


def test_every_series_is_there_with_sglangs_labels(load: Load) -> None:
    for series in SERIES:
        name = series.full_name + ("_count" if series.kind == "histogram" else "")
        found = [dict(labels) for (one, labels) in load.after if one == name]
        assert found, series.name
        for labels in found:
            assert labels.keys() == OURS | set(series.labels)
            assert (labels["model_name"], labels["tp_rank"]) == ("tiny", "0")
    assert values(load.after, "arm") == {"ar", "diffusion", "lookup", "structure", "none", ""}
    assert total(load.after, "info", version=__version__, bundle="tiny") == 1
    assert total(load.after, "policy") == total(load.after, "policy", policy="random") == 1


def test_counters_are_there_before_anything_was_counted(load: Load) -> None:
    """Else the first increase of each would be lost to Prometheus."""
    counters = {series.full_name for series in SERIES if series.kind == "counter"}
    assert {name for name, _ in load.before if name.startswith(PREFIX)} >= counters


def test_figures_are_those_of_the_answers(load: Load) -> None:
    assert load.grown("requests_total") == len(load.answers) + len(load.chats)
    assert load.grown("requests_total", hints="request") == 8
    assert load.grown("requests_total", hints="inferred") == 4
    assert load.grown("requests_total", hints="none") == 4
    for reason in ("policy", "pin", "off"):
        assert load.grown("routes_total", reason=reason) > 0

    # SGLang's own counters of the same requests.
    requests = load.grown("sglang:num_requests_total")
    assert requests == 16
    assert load.grown("rounds_total") == load.grown("sglang:spec_verify_calls_total")
    assert load.grown("tokens_total") == load.grown("sglang:generation_tokens_total") - requests
    assert load.grown("accepted_draft_tokens_total") == load.grown("tokens_total") - load.grown("rounds_total")
    assert load.grown("rounds_total", arm="none") >= load.grown("routes_total", reason="off") > 0
    assert load.grown("joined_draft_tokens_total") > 0
    assert load.grown("request_acceptance_length_count", arm="none") >= 4

    # Figures of the native answers about themselves are part of it.
    assert 0 < load.said("spec_verify_ct") <= load.grown("rounds_total")
    assert 0 < load.said("spec_num_proposed_drafts") <= load.grown("draft_tokens_total")
    assert load.said("spec_num_correct_drafts") <= load.grown("accepted_draft_tokens_total")


def test_the_state_says_the_same(load: Load) -> None:
    state = load.server.get("/whiflash/state")
    for arm, counts in state["by_arm"].items():
        assert counts["rounds"] == total(load.after, "rounds_total", arm=arm)
        assert counts["proposed"] == total(load.after, "draft_tokens_total", arm=arm)
    for part, series, label in (("reasons", "routes_total", "reason"), ("memory", "memory_bytes", "scope")):
        for name, number in state[part].items():
            assert number == total(load.after, series, **{label: name})


def queries() -> list[tuple[str, str]]:
    """Title and expression of every query of the dashboard, with what Grafana puts in for its variables."""
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "whiflash.json").read_text("utf-8"))
    return [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", ())]


WITHOUT_LOADS = {"Acceptance length after a load"}
"""Their quotients are 0 / 0 here: this server has no hierarchical cache, so no prompt comes from the host."""


def asked(expression: str) -> str:
    replaced = expression.replace("$__rate_interval", "5m").replace("$model", "tiny").replace("$instance", ".*")
    assert "$" not in replaced
    return replaced


@pytest.fixture(scope="module")
def watching(load: Load) -> Prometheus:
    if load.prometheus is None:
        pytest.skip("needs Prometheus: make prometheus")
    return load.prometheus


def test_every_query_of_the_dashboard_has_an_answer(watching: Prometheus) -> None:
    assert len(queries()) > 20
    for title, expression in queries():
        found = wait_until(partial(watching.query, asked(expression)))
        finite = any(math.isfinite(value) for _, value in found)
        assert finite or title in WITHOUT_LOADS, f"{title}: {expression} gives {found}"


def test_the_dashboards_variables_have_values(watching: Prometheus, server: Server) -> None:
    for label, value in (("model_name", "tiny"), ("instance", server.url.removeprefix("http://"))):
        assert watching.ask(f"label/{label}/values", **{"match[]": f"{PREFIX}info"}) == [value]


def test_prometheus_computes_what_the_answers_say(watching: Prometheus, load: Load) -> None:
    """Not only that there is an answer: the share of right drafts, and tokens a round, are those of the samples."""
    expressions = {title: asked(expression) for title, expression in queries()}
    for labels, value in watching.query(expressions["Drafts that were right"]):
        proposed = load.grown("draft_tokens_total", arm=labels["arm"])
        if proposed:
            right = load.grown("accepted_draft_tokens_total", arm=labels["arm"]) / proposed
            # A rate is extrapolated to the ends of its window, of each series by itself.
            assert value == pytest.approx(right, rel=0.2)
    shares = {labels["arm"]: value for labels, value in watching.query(expressions["Rounds by arm"])}
    assert sum(shares.values()) == pytest.approx(1)


def test_every_alert_can_be_computed_and_a_busy_server_has_none(watching: Prometheus) -> None:
    wait_until(lambda: all(rule["health"] != "unknown" for rule in watching.rules()))
    rules = watching.rules()
    shipped = (ROOT / "deploy" / "prometheus" / "whiflash.rules.yml").read_text("utf-8")
    assert {rule["name"] for rule in rules} == set(re.findall(r"- alert: (\w+)", shipped))
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []
    for rule in rules:
        # Both sides of each comparison find series: what is compared with nothing would never fire.
        for part in " ".join(rule["query"].split()).split(" and "):
            side = re.split(" (?:<|>|==) ", part.removeprefix("on (model_name, instance, dp_rank) "))[0]
            # A scrape that is late on a busy machine leaves no series for a moment.
            wait_until(partial(watching.query, side))


# ---------------------------------------------------------------- the kill switch


LONG = 400


def streamed(server: Server, text: str, begun: list[str]) -> list[int]:
    body = {
        "text": text,
        "stream": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": LONG, "ignore_eos": True},
    }
    tokens: list[int] = []
    with httpx.stream("POST", server.url + "/generate", json=body, timeout=None) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                tokens = json.loads(line.removeprefix("data: "))["output_ids"]
                if text not in begun:
                    begun.append(text)
    return tokens


def policy(server: Server, *arguments: str) -> str:
    return whiflash("policy", *arguments, "--url", server.url).stdout.strip()


def test_the_kill_switch(load: Load) -> None:
    """`whiflash policy none` while four requests are under way: their text stays, nothing is drafted from then on."""
    server, texts = load.server, prompts()[:4]
    begun: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(streamed, server, text, begun) for text in texts]
        wait_until(lambda: len(begun) == 4 or all(answer.done() for answer in answers))
        # A tiny model may answer before the command is read.
        server.post("/pause_generation", {"mode": "in_place"})
        try:
            paused = scraped(server.url)
            running = server.get("/whiflash/state")["requests"]
            assert policy(server, "none") == f"{server.url}: none"
            switched = scraped(server.url)
        finally:
            server.post("/continue_generation", {})
        found = [answer.result() for answer in answers]
    behind = scraped(server.url)
    assert running == 4, "they were answered before the switch"
    assert total(paused, "policy", policy="random") == 1
    assert total(switched, "policy") == total(switched, "policy", policy="none") == 1
    # Not one draft behind the switch: all that was committed before it is in what was written with it.
    assert total(behind, "draft_tokens_total") == total(switched, "draft_tokens_total") > 0
    assert total(behind, "tokens_total") > total(switched, "tokens_total")

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda text: streamed(server, text, []), texts)) == found
    last = scraped(server.url)
    assert total(last, "draft_tokens_total") == total(behind, "draft_tokens_total")
    plain = total(last, "rounds_total", arm="none") - total(behind, "rounds_total", arm="none")
    assert plain == total(last, "rounds_total") - total(behind, "rounds_total") == 4 * (LONG - 1)
    assert policy(server) == f"{server.url}: none"
    assert policy(server, "random") == f"{server.url}: random"


LOGGED = re.compile(r"accept len: ([\d.]+), accept rate: ([\d.]+), (?:cap len: ([\d.]+), )?")


@pytest.mark.parametrize("router", ["diffusion", "ar", "none", "random"])
def test_sglangs_own_figures_are_of_what_was_proposed(server: Server, router: str) -> None:
    """An answer's figures, its log lines and the gauges against the worker's own clock."""
    before = server.post("/whiflash/policy", {"router": router})
    logged = len(server.log.read_text())
    said = {"messages": [{"role": "user", "content": "abc"}], "return_spec_tokens_details": True}
    asked = {"model": "m", "temperature": 0, "max_tokens": 24, "ignore_eos": True, **said}
    answer = server.post("/v1/chat/completions", asked)
    found, told = answer["sglext"]["spec_tokens_details"], answer["metrics"]["speculative_decoding"]
    after = server.post("/whiflash/policy", {"router": "random"})
    rounds, rows, tokens = (after[name] - before[name] for name in ("rounds", "rows", "tokens"))
    proposed = rows - rounds

    assert found["spec_verify_ct"] == rounds
    assert found["spec_num_proposed_drafts"] == proposed
    assert (proposed == 0) == (router == "none")
    assert sum(n * drafts for drafts, n in enumerate(found["spec_correct_drafts_histogram"])) == tokens - rounds
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
    server.post("/whiflash/policy", {"router": "random"})
