"""Text is plain decoding's: one table of server arguments, requests, policies and modes.

Rows with the same arguments share an engine, all rows plain decoding's answers. Behind every row both drafters' KV in
the radix tree is that of one pass over each text, and nothing is kept of requests that have ended.
"""

import itertools
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from engine import Engine, engine
from model_set import Models, build_models
from oracle_arm import ARM, OracleArm
from overlap import overlapped, publishing
from plain import Answers, check, plain_sets, read
from request_sets import CASES, CONTEXT, OPTIONS, SETS
from sglang.srt.layers import sampler
from sglang.srt.managers import scheduler
from traffic import Arrival, play
from transformers import AutoTokenizer
from trees import assert_tree_is_true

from whiflash_sglang.cache import backlog
from whiflash_sglang.engine.forward.target import Target
from whiflash_sglang.prices.costs import FULL_LENGTH, MeasuredCosts
from whiflash_sglang.routing.controller import Controller
from whiflash_sglang.routing.policies import Pinned
from whiflash_sglang.serve import worker

EVERYTHING = {
    **OPTIONS,
    "enable_custom_logit_processor": True,
    "enable_return_hidden_states": True,
    "chunked_prefill_size": 32,
}
ENTROPY = {"entropy": {"tau": 2.0, "min_dwell": 1}}
"""Nats; near the tiny target's median, so that the entropy policy switches."""


@dataclass(frozen=True)
class Setting:
    """Settings of an engine. plain: arguments that change plain decoding's text, too. mode: `host`, `resident` (the
    host reads nothing from the device) or `overlap` (the same in SGLang's overlap loop). host_lengths: as of
    `overlapped`. layers: those of EAGLE-3. ring: tokens of one.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    plain: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    mode: str = "host"
    host_lengths: bool = False
    layers: int = 1
    ring: int = 64


SEEDS = {"enable_deterministic_inference": True, "max_running_requests": 16, "chunked_prefill_size": None}
THINKING = {"reasoning_parser": "deepseek-r1", "enable_strict_thinking": True}
SETTINGS = {
    **{name: Setting(arguments) for name, arguments in CASES.items()},
    "two requests": Setting({"max_running_requests": 2}),
    "small rings": Setting(ring=32),
    "as for agents": Setting(
        {
            "page_size": 64,
            "chunked_prefill_size": 64,
            "enable_priority_scheduling": True,
            "stream_interval": 50,
            "scheduler_recv_interval": 30,
            "schedule_policy": "lpm",
        }
    ),
    "whole prompts": Setting(plain={"chunked_prefill_size": None}),
    "fp8": Setting(plain={"kv_cache_dtype": "fp8_e4m3", "chunked_prefill_size": None}),
    "priorities": Setting(
        {
            "max_running_requests": 2,
            "enable_priority_scheduling": True,
            "priority_scheduling_preemption_threshold": 1,
        }
    ),
    "everything at once": Setting(
        {
            "max_running_requests": 4,
            "chunked_prefill_size": 16,
            "max_total_tokens": 240,
            "enable_priority_scheduling": True,
            "priority_scheduling_preemption_threshold": 1,
        },
        plain={"context_length": CONTEXT},
    ),
    "thinking": Setting(plain=THINKING),
    "thinking, overlap": Setting(plain=THINKING, mode="overlap"),
    "seeded": Setting(plain=SEEDS),
    "two layers": Setting(CASES["pages"], layers=2),
    "two layers, full pool": Setting(CASES["full pool"], layers=2),
    "resident": Setting(mode="resident"),
    "overlap": Setting({"max_running_requests": 4}, mode="overlap"),
    "overlap, llguidance": Setting(
        {"max_running_requests": 4}, plain={"grammar_backend": "llguidance"}, mode="overlap"
    ),
    "overlap, lengths": Setting({"max_running_requests": 4}, mode="overlap", host_lengths=True),
}

KNOWING = {"runs", "rejections"}
"""Events of an arm that knows most of the answers: drafts that are right to the last, and others."""


@dataclass(frozen=True)
class Row:
    """requests: of `SETS`. router: a policy, or `oracle`, which pins the arm that knows.

    happens: what must have happened for the row to show anything: `KNOWING`, `retractions`, `pushed` (out of the
    batch), `shared steps`, `aborted while it waits`, `aborted while it runs`, and arms that drafted.
    predicted: some requests bring predictions, right, partly right and useless ones. retracted: every so many steps.
    """

    setting: str
    router: str
    requests: str
    happens: frozenset[str] = frozenset()
    predicted: bool = False
    retracted: int = 0
    evidence: bool = False
    """Whether only `make evidence` runs it: one policy if `random`, which takes each arm, has a row with the same."""

    def __str__(self) -> str:
        more = [name for name in ("predicted", "retracted") if getattr(self, name)]
        return "-".join([self.setting, self.router, self.requests, *more])


def row(setting: str, router: str, requests: str, *happens: str, **more: Any) -> Row:
    return Row(setting, router, requests, frozenset(happens), **more)


ALL = ("ar", "diffusion", "lookup", "none")
ROWS = [
    *(row("batch", router, "traffic", router) for router in ("ar", "diffusion", "lookup", "none")),
    row("batch", "entropy", "traffic", "ar", "diffusion"),
    row("batch", "auto", "traffic", "ar", "lookup"),
    row("batch", "random", "traffic", *ALL, *KNOWING),
    row("batch", "random", "traffic", predicted=True),
    row("batch", "random", "counted", "retractions", retracted=3),
    *(row("batch", router, "constrained", router, evidence=True) for router in ("ar", "diffusion")),
    row("batch", "random", "constrained", "structure", *KNOWING),
    row("batch", "none", "structured", "shared steps"),
    row("batch", "oracle", "stops", "runs"),
    row("batch", "random", "calls", "structure"),
    *(row("batch", router, "penalised", router, evidence=True) for router in ("ar", "diffusion")),
    row("batch", "random", "penalised", *KNOWING),
    *(row("batch", router, "rated", evidence=True) for router in ("ar", "diffusion", "none")),
    row("batch", "auto", "rated"),
    row("batch", "random", "rated", "runs"),
    row("batch", "random", "rated beside samples", "runs"),
    *(row("batch", router, "states", evidence=True) for router in ("ar", "none")),
    row("batch", "random", "states", *KNOWING),
    *(
        row("whole prompts", router, "processed", evidence=True)
        for router in ("ar", "diffusion", "lookup", "none")
    ),
    row("whole prompts", "auto", "processed"),
    row("whole prompts", "random", "processed", "oracle"),
    row("whole prompts", "none", "unprocessed"),
    row("one request", "random", "traffic", *KNOWING),
    row("two requests", "random", "structured", "shared steps"),
    row("pages", "random", "traffic", *KNOWING, evidence=True),
    row("small chunks", "random", "traffic", *KNOWING),
    row("small chunks", "random", "traffic", predicted=True),
    row("chunks in pages", "random", "traffic", *KNOWING),
    row("full pool", "random", "traffic", *KNOWING, "retractions"),
    row("full pool", "random", "traffic", "retractions", predicted=True),
    row("no tree", "random", "traffic", *KNOWING),
    row("small rings", "random", "traffic", *KNOWING),
    row("as for agents", "random", "long prompts"),
    row("fp8", "random", "long prompts"),
    *(row("priorities", router, "priorities", "pushed") for router in ("random", "auto")),
    *(
        row(
            "everything at once",
            "random",
            f"coming and going {seed}",
            *("aborted while it waits", "aborted while it runs"),
            evidence=seed > 0,
        )
        for seed in range(12)
    ),
    row("thinking", "random", "thinking", *KNOWING),
    *(row("seeded", router, "seeds", router, evidence=True) for router in ("ar", "diffusion")),
    row("seeded", "random", "seeds", *KNOWING),
    *(
        row("seeded", "random", requests, "runs")
        for requests in ("rated seeds", "rated seeds, original", "filtered seeds")
    ),
    row("two layers", "ar", "traffic", "ar", evidence=True),
    row("two layers", "auto", "traffic", "ar"),
    row("two layers", "random", "traffic", *KNOWING),
    row("two layers, full pool", "random", "traffic", "retractions"),
    *(row("resident", router, "traffic", router, evidence=True) for router in ("ar", "diffusion", "lookup")),
    row("resident", "auto", "traffic"),
    row("resident", "random", "traffic", *ALL, *KNOWING),
    row("resident", "random", "traffic", predicted=True),
    row("resident", "none", "structured"),
    row("resident", "random", "constrained"),
    row("overlap", "random", "traffic", *ALL, *KNOWING, "retractions", retracted=5),
    row("overlap", "random", "constrained", "retractions", retracted=5),
    # `test_overlap.py` asks for these grammars beside free texts, and counts waits.
    row("overlap", "random", "structured", "structure", "lookup", evidence=True),
    row("overlap", "auto", "calls"),
    row("overlap, llguidance", "random", "structured"),
    # `oracle` where something must happen: a grammar joins when it is compiled, so `random` takes other arms each time.
    row("thinking, overlap", "oracle", "thinking", "oracle", *KNOWING),
    row("thinking, overlap", "random", "thinking", evidence=True),
    *(row("overlap", router, "traffic", retracted=5, evidence=True) for router in ("diffusion", "auto")),
    row("overlap, lengths", "lookup", "traffic", "retractions", retracted=5),
    row("overlap, lengths", "ar", "traffic", retracted=5, evidence=True),
    row("overlap", "random", "states", "oracle", "rejections"),
    row("overlap", "random", "processed together", "oracle"),
]


def plain_arguments(row: Row) -> dict[str, Any]:
    """Arguments of the engine that gives a row's texts; of `SETTINGS` only those that change these."""
    together = {"start": overlapped, "host_lengths": False} if row.requests == "processed together" else {}
    return {**EVERYTHING, **SETTINGS[row.setting].plain, **together}


@contextmanager
def surroundings(requests: str) -> Iterator[None]:
    """Prepare the process for a set of requests."""
    with pytest.MonkeyPatch.context() as patch:
        if requests.startswith("thinking"):
            patch.setenv("SGLANG_MAX_THINK_TOKENS", "9")
        patch.setattr(sampler, "SGLANG_RETURN_ORIGINAL_LOGPROB", requests.endswith("original"))
        yield


@pytest.fixture(scope="module")
def expected(request: pytest.FixtureRequest, models: Models) -> dict[str, Answers]:
    """Plain decoding's answers of all rows that are to run: an engine for each set of arguments that change texts."""
    items = [
        item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")
    ]
    run = [item.callspec.params["row"] for item in items if not list(item.iter_markers("skip"))]
    groups: dict[str, list[Row]] = {}
    for each in run:
        groups.setdefault(repr(plain_arguments(each)), []).append(each)
    answers: dict[str, Answers] = {}
    for rows in groups.values():
        for apart in (lambda each: each.requests == "rated seeds, original", lambda each: True):
            chosen = [each for each in rows if apart(each) and str(each) not in answers]
            if chosen:
                sets = {each.requests: SETS[each.requests]() for each in chosen}
                with surroundings(chosen[0].requests):
                    known = plain_sets(models.target, sets, **plain_arguments(chosen[0]))
                answers |= {str(each): known[each.requests] for each in chosen}
    return answers


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return build_models(tmp_path_factory.mktemp("layers"), eagle3_layers=2)


Learned = dict[str, list[tuple[int, list[int]]]]
"""Per request, what each of its rounds is learned to have committed: n when it began, and the tokens."""


@dataclass
class Serving:
    """An engine, the arm that knows, and what has happened since it was asked last."""

    engine: Engine
    oracle: OracleArm
    models: Models
    mode: str
    happened: set[str]
    learned: Learned


@pytest.fixture(scope="module")
def serving(
    request: pytest.FixtureRequest, models: Models, layered: Models, expected: dict[str, Answers]
) -> Iterator[Serving]:
    setting, oracle, happened = SETTINGS[request.param], OracleArm(0.92, seed=3), set[str]()
    learned: Learned = defaultdict(list)
    start, ticks, joined, committed = engine, itertools.count(), worker.step_result, Controller.committed
    options = {"arms": [oracle], **EVERYTHING, **setting.plain, **setting.arguments}
    if setting.layers > 1:
        models = layered
    if setting.mode == "overlap":
        start, options["host_lengths"] = overlapped, setting.host_lengths

    def counted(rounds: Any) -> Any:
        if len(rounds) > 1:
            happened.add("shared steps")
        return joined(rounds)

    def noted(
        self: Controller, state: Any, decision: Any, arm: str, tokens: Any, width: int, start: int, *more: Any
    ) -> bool:
        learned[state.rid].append((start, list(tokens)))
        return committed(self, state, decision, arm, tokens, width, start, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Controller, "committed", noted)
        if setting.mode != "host":
            patch.setenv("WHIFLASH_DEVICE_RESIDENT", "1")
        if setting.mode == "overlap":
            patch.setattr(MeasuredCosts, "worth", lambda self, arm: FULL_LENGTH)
            patch.setattr(Target, "verify", publishing(Target.verify))
        # `auto` goes by prices: a clock that advances by a millisecond with every reading makes them the same anywhere.
        patch.setattr(time, "perf_counter", lambda: next(ticks) / 1000)
        patch.setattr(worker, "step_result", counted)
        patch.setattr(backlog, "TOKENS", setting.ring)
        flags = models.whiflash("none", ENTROPY, **setting.flags)
        with surroundings(request.param), start(models.target, whiflash=flags, **options) as e:
            yield Serving(e, oracle, models, setting.mode, happened, learned)


@pytest.mark.parametrize(
    ("serving", "row"),
    [
        pytest.param(each.setting, each, id=str(each), marks=[pytest.mark.evidence] if each.evidence else [])
        for each in ROWS
    ],
    indirect=["serving"],
)
def test_text_is_plain_decodings(
    serving: Serving, row: Row, expected: dict[str, Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    e, oracle, wanted, arrivals = serving.engine, serving.oracle, expected[str(row)], SETS[row.requests]()
    e.requests.clear()
    e.start_over("none" if row.router == "oracle" else row.router)
    if row.router == "oracle":
        e.worker.controller.policy = Pinned(ARM)
    oracle.unlearn()
    if row.router in ("random", "oracle") and not row.predicted:
        for a in arrivals:
            oracle.learn(a.prompt, wanted[a.rid].tokens)
            if beyond := wanted[a.rid].beyond:
                oracle.learn(a.prompt, beyond)
    monkeypatch.setattr(scheduler, "TEST_RETRACT", row.retracted > 0)
    monkeypatch.setattr(scheduler, "TEST_RETRACT_INTERVAL", row.retracted or 3)
    serving.happened.clear()
    serving.learned.clear()
    with surroundings(row.requests):
        played = [replace(a, params=deepcopy(a.params)) for a in arrivals]
        play(e, predicting(played, wanted) if row.predicted else played, lambda: watch(serving))
        answers = read(e, arrivals)
    drawn_alike = row.setting == "seeded"  # elsewhere a sampled text is another one each time
    compared = [a for a in arrivals if drawn_alike or not a.params.get("temperature")]
    check(serving.models.reference.target, compared, wanted, answers)
    check_kept(serving, row)
    check_learned(serving, arrivals)
    assert judged(serving, arrivals) >= row.happens


def test_the_sets_can_show_a_fault(models: Models, expected: dict[str, Answers]) -> None:
    """Parameters of requests change their text, or end it."""
    tokenizer = AutoTokenizer.from_pretrained(models.target)
    sets = {each.requests: expected[str(each)] for each in ROWS if str(each) in expected}
    for rid, answer in sets.get("processed", {}).items():
        same = answer.tokens == sets["unprocessed"][rid].tokens
        assert same == rid.startswith("neighbour"), rid
    if "seeds" in sets:
        assert len({tuple(answer.tokens) for answer in sets["seeds"].values()}) == len(sets["seeds"])
    for answer in sets.get("thinking", {}).values():
        assert "</think>" in tokenizer.decode(answer.tokens)
    if "constrained" in sets:
        text = tokenizer.decode(sets["constrained"]["schema/0"].tokens, skip_special_tokens=True)
        assert set(json.loads(text)) == {"name", "kind", "count"}
        ends = [sets["constrained"][f"stop-string/{i}"].reason["type"] for i in range(2)]
        assert "stop" in ends
    for rid, answer in sets.get("states", {}).items():
        assert bool(answer.states) != rid.startswith("none")


def predicting(arrivals: list[Arrival], wanted: Answers) -> list[Arrival]:
    """With predictions: right, wrong in places, useless, right behind their beginning, none."""
    for i, a in enumerate(arrivals):
        truth = wanted[a.rid].tokens
        broken = [token if at % 5 else (token + 97) % 256 for at, token in enumerate(truth)]
        useless = [(7 * at + i) % 256 for at in range(50)]
        if (predicted := (truth, broken, useless, truth[3:] + useless, None)[i % 5]) is not None:
            a.params["custom_params"] = {"whiflash_prediction": predicted}
    return arrivals


def watch(serving: Serving) -> None:
    """Behind every step: who drafts, who waits again, and that the worker knows the tokens of those it penalises."""
    e, happened = serving.engine, serving.happened
    happened.update(*(filter(None, state.counts) for state in e.states.values()))
    if any(req.output_ids for req in e.scheduler.waiting_queue):
        happened.add("pushed")
    for req in e.scheduler.running_batch.reqs if serving.mode == "host" else ():
        if req.kv.req_pool_idx is not None and req.output_ids and req.sampling_params.frequency_penalty:
            prompt, output = len(req.origin_input_ids), list(req.output_ids)
            assert e.worker.tokens.data[req.kv.req_pool_idx, prompt : prompt + len(output)].tolist() == output


def check_kept(serving: Serving, row: Row) -> None:
    """Nothing of requests that have ended, but KV in the tree, which is right."""
    e = serving.engine
    assert not e.states
    assert not any(e.worker.sync.watermarks.known(at) for at in range(16))
    assert not any(e.worker.quarantine.left_out.values())
    if serving.mode == "overlap":
        assert not e.streams.races  # type: ignore[attr-defined]
    if hasattr(e.scheduler.tree_cache, "tree_core") and row.setting not in ("fp8", "no tree"):
        assert assert_tree_is_true(e, serving.models) > 50


def check_learned(serving: Serving, arrivals: list[Arrival]) -> None:
    """Every token of a round was learned once, of the request that has it, where it has it, however late. If the text
    stops, the scheduler cuts a run that was learned.
    """
    e, learned = serving.engine, serving.learned
    for a in arrivals:
        rid, req = a.rid, e.requests[a.rid]
        prompt, output = len(req.origin_input_ids), e.output(rid)
        end = 1  # the first token is the prefill's, as is one behind every retraction
        for start, tokens in learned[rid]:
            begin = start + 1 - prompt
            assert end <= begin <= end + req.retraction_count
            run = output[begin : begin + len(tokens)]
            assert tokens == run or (a.params.keys() & {"stop", "stop_regex"} and tokens[: len(run)] == run)
            end = begin + len(run)
        assert end <= len(output) <= end + req.retraction_count or not learned[rid]
        assert sum(len(tokens) for _, tokens in learned[rid]) >= len(output) - 1 - req.retraction_count


def judged(serving: Serving, arrivals: list[Arrival]) -> set[str]:
    """Events that have happened. Requests with a processor take no drafts: a block of theirs could not be judged."""
    e, oracle, happened = serving.engine, serving.oracle, serving.happened
    for a in arrivals:
        if "custom_logit_processor" in a.params:
            assert e.rounds(a.rid)[1] == 0, a.rid
    if oracle.accepted and max(oracle.accepted) == oracle.max_drafts:
        happened.add("runs")
    if oracle.rejected:
        happened.add("rejections")
    if any(req.retraction_count for req in e.requests.values()):
        happened.add("retractions")
    for a in arrivals:
        req = e.requests[a.rid]
        if a.abort_after is not None and not req.output_ids:
            happened.add("aborted while it waits")
        elif a.abort_after is not None and req.finished_reason.to_json()["type"] == "abort":
            happened.add("aborted while it runs")
    return happened
