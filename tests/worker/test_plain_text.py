"""Text is plain decoding's: one table of server arguments, requests, policies and modes.

Rows with the same arguments share an engine, all rows plain decoding's answers. Behind every row both drafters' KV in
the radix tree is that of one pass over each text, no draft was verified that a grammar forbids, and nothing is kept of
requests that have ended. `make evidence` runs all rows, and keeps records of the matrix of policies and arguments.
"""

import itertools
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from adapters import Adapter
from adapters import serving as with_adapters
from emulated import emulated_graphs
from engine import Engine, engine
from evidence import Result, cell
from model_set import Models, build_models
from oracle_arm import ARM, OracleArm
from overlap import overlapped, publishing
from plain import Answers, check, plain_sets, read
from request_sets import CASES, CONTEXT, NEWLINE, OPTIONS, SETS, THOUGHT
from sglang.srt.layers import sampler
from sglang.srt.managers import scheduler
from test_sampling import PARAMETERS, judge, sample
from traffic import Arrival, play
from transformers import AutoTokenizer
from trees import assert_tree_is_true

from whiflash_sglang.cache import backlog
from whiflash_sglang.cache.tokens import FEW
from whiflash_sglang.engine.forward.target import Target
from whiflash_sglang.prices.costs import FULL_LENGTH, Costs
from whiflash_sglang.routing.controller import Controller
from whiflash_sglang.routing.policies import Pinned
from whiflash_train.bundle import BundleParts, create

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
    """Settings of an engine. plain: arguments that change plain decoding's text, too. overlap: whether it runs in
    SGLang's overlap loop. graphs: whether all that runs is replayed, as on a card. host_lengths: as of `overlapped`.
    drafters: `pair`, one of it, or `none`. layers: of EAGLE-3. ring: tokens of one. adapters: of the target, `one` and
    `two`. uno: whether the target drafts under `one`.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    plain: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    overlap: bool = False
    graphs: bool = False
    host_lengths: bool = False
    drafters: str = "pair"
    layers: int = 1
    ring: int = 64
    adapters: bool = False
    uno: bool = False


SEEDS = {"enable_deterministic_inference": True, "max_running_requests": 16, "chunked_prefill_size": None}
THINKING = {"reasoning_parser": "deepseek-r1", "enable_strict_thinking": True}
SMALL: dict[str, Any] = {
    "plain": {"context_length": 96, "enable_return_hidden_states": False},
    "arguments": {"max_running_requests": 5, "max_total_tokens": 2048},
    "graphs": True,
}
"""A small engine, whose graphs are tapes of operators."""
ADAPTED: dict[str, dict[str, Any]] = {
    "batch": {},
    "chunks": {"arguments": CASES["chunks in pages"]},
    "full pool": {"arguments": {"max_total_tokens": 240, "max_running_requests": 4}},
    "overlap": {"arguments": {"max_running_requests": 4}, "overlap": True},
}
SETTINGS = {
    **{name: Setting(arguments) for name, arguments in CASES.items()},
    "chunks of 8 in pages": Setting({"chunked_prefill_size": 8, "page_size": 4}),
    "two requests": Setting({"max_running_requests": 2}),
    "small rings": Setting(ring=32),
    **{f"{drafters} alone": Setting(drafters=drafters) for drafters in ("ar", "diffusion", "none")},
    "no structure arm": Setting(flags={"whiflash_structure": "off"}),
    "graphs, two layers": Setting(layers=2, **SMALL),
    **{f"adapters, {name}": Setting(adapters=True, **more) for name, more in ADAPTED.items()},
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
    "drafters in fp8": Setting({"speculative_draft_kv_cache_dtype": "fp8_e4m3"}),
    "priorities": Setting(
        {"max_running_requests": 2, "enable_priority_scheduling": True, "priority_scheduling_preemption_threshold": 1}
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
    "thinking, overlap": Setting(plain=THINKING, overlap=True),
    "seeded": Setting(plain=SEEDS),
    "two layers": Setting(CASES["pages"], layers=2),
    "two layers, full pool": Setting(CASES["full pool"], layers=2),
    "overlap": Setting({"max_running_requests": 4}, overlap=True),
    "overlap, llguidance": Setting({"max_running_requests": 4}, plain={"grammar_backend": "llguidance"}, overlap=True),
    "overlap, lengths": Setting({"max_running_requests": 4}, overlap=True, host_lengths=True),
    "uno": Setting(uno=True),
    "uno, full pool": Setting(CASES["full pool"], uno=True),
    "uno, overlap": Setting({"max_running_requests": 4}, overlap=True, uno=True),
    "uno, graphs": Setting(overlap=True, uno=True, **SMALL),
}

BUDGETED = {"budget ends in drafts", "budget ends behind drafts"}
"""Places of the tokens that a budget forces: drafts of both are accepted, or one is the last that a round commits."""
KNOWING = {"runs", "rejections"}
"""Events of an arm that knows most of the answers: drafts that are right to the last, and others."""


@dataclass(frozen=True)
class Row:
    """requests: of `SETS`. router: a policy, or `oracle`, which pins the arm that knows.

    happens: what must have happened for the row to show anything: `KNOWING`, `retractions`, `penalised retractions`,
    `chunks in outputs` (of requests that were retracted), `pushed` (out of the batch), `aborted while it waits`,
    `aborted while it runs`, and arms that drafted. predicted: some requests bring predictions, right, partly
    right and useless ones. retracted: every so many steps. sees: the fault that no other row of `make test` sees, if
    one is known.
    """

    setting: str
    router: str
    requests: str
    happens: frozenset[str] = frozenset()
    predicted: bool = False
    retracted: int = 0
    sees: str = ""
    evidence: bool = False
    """Whether only `make evidence` runs it: one policy if `random`, which takes each arm, has a row with the same."""

    def __str__(self) -> str:
        more = [name for name in ("predicted", "retracted") if getattr(self, name)]
        return "-".join([self.setting, self.router, self.requests, *more])


def row(setting: str, router: str, requests: str, *happens: str, **more: Any) -> Row:
    return Row(setting, router, requests, frozenset(happens), **more)


ALL = ("ar", "diffusion", "lookup", "none")
POLICIES = (*ALL, "entropy", "auto", "random")
ADAPTED_DAILY = {"chunks": "random", "full pool": "random", "overlap": "random"}
MATRIX = [row(case, policy, "three loads", evidence=True) for case in CASES for policy in POLICIES]
"""Records of these are kept (`evidence.py`)."""
ROWS = [
    *MATRIX,
    row("batch", "entropy", "traffic", "ar", "diffusion"),
    row("batch", "auto", "traffic", "ar", "lookup"),
    row("batch", "random", "traffic", *ALL, *KNOWING),
    row("batch", "random", "traffic", predicted=True),
    row("batch", "random", "counted", "retractions", retracted=3),
    row("batch", "random", "constrained", "structure", *KNOWING),
    row("batch", "none", "structured"),
    row("batch", "random", "structured", *ALL, "structure", *KNOWING),
    row("no structure arm", "random", "structured", sees="its switch leaves the arm in"),
    *(
        row(f"{arm} alone", "random", "traffic", arm, "lookup", *KNOWING, sees=f"all need more than {arm!r}")
        for arm in ("ar", "diffusion", "none")
    ),
    row("batch", "oracle", "stops", "runs"),
    row("batch", "random", "calls", "structure"),
    row("batch", "random", "penalised", *KNOWING),
    row("batch", "random", "penalised", "penalised retractions", retracted=3),
    row("batch", "random", "rated", "runs"),
    row("batch", "random", "rated beside samples", "runs"),
    row("batch", "random", "states", *KNOWING),
    row("whole prompts", "random", "processed", "oracle"),
    row("whole prompts", "none", "unprocessed"),
    row("one request", "random", "traffic", *KNOWING),
    row("two requests", "random", "structured", "structure"),
    row("small chunks", "random", "traffic", *KNOWING),
    row("chunks of 8 in pages", "random", "sampled", "chunks in outputs", retracted=13),
    row("chunks in pages", "random", "traffic", *KNOWING),
    row("full pool", "random", "traffic", *KNOWING, "retractions"),
    row("full pool", "random", "traffic", "retractions", predicted=True),
    row("no tree", "random", "traffic", *KNOWING),
    row("small rings", "random", "traffic", *KNOWING),
    row("as for agents", "random", "long prompts"),
    row("fp8", "random", "long prompts"),
    row("drafters in fp8", "random", "traffic", *KNOWING),
    row("priorities", "random", "priorities", "pushed"),
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
    row("seeded", "random", "seeds", *KNOWING),
    *(
        row("seeded", "random", requests, "runs")
        for requests in ("rated seeds", "rated seeds, original", "filtered seeds")
    ),
    row("two layers", "random", "traffic", *KNOWING),
    row("two layers, full pool", "random", "traffic", "retractions"),
    row("overlap", "random", "traffic", *ALL, *KNOWING, "retractions", retracted=5),
    row("overlap", "random", "constrained", "retractions", retracted=5),
    row("overlap", "random", "structured", "structure", "lookup", evidence=True),
    row("overlap, llguidance", "random", "structured"),
    # `oracle` where something must happen: a grammar joins when it is compiled, so `random` takes other arms each time.
    row("thinking, overlap", "oracle", "thinking", "oracle", *KNOWING),
    row("overlap, lengths", "lookup", "traffic", "retractions", retracted=5),
    row("overlap", "random", "states", "oracle", "rejections"),
    *(
        row(
            f"adapters, {name}",
            router,
            "adapted, few" if name == "overlap" else "adapted",
            "retractions",
            retracted=6,
            evidence=router != ADAPTED_DAILY.get(name),
        )
        for name in ADAPTED
        for router in POLICIES
    ),
    row("graphs, two layers", "random", "short", "oracle", sees="a graph keeps a value of its capture"),
    row("overlap", "random", "budgets", "retractions", *BUDGETED, retracted=5),
    row("seeded", "random", "seeded budgets", *BUDGETED),
    row("uno", "random", "traffic", "uno", *KNOWING),
    row("uno, full pool", "uno", "traffic", "uno", "retractions"),
    row("uno, overlap", "random", "traffic", "uno", "retractions", retracted=5),
    row("uno, graphs", "random", "short", "oracle", "uno", sees="a pass that is not captured is replayed"),
]


Adapters = dict[str, Adapter]


def asked_of(row: Row, adapters: Adapters) -> list[Arrival]:
    """Requests of a row, which name adapters as SGLang does."""
    ids = {name: adapter.id for name, adapter in adapters.items()}
    return [
        replace(a, params={**a.params, "lora_id": ids.get(a.params["lora_id"])}) if "lora_id" in a.params else a
        for a in SETS[row.requests]()
    ]


def plain_arguments(row: Row, adapters: Adapters) -> dict[str, Any]:
    """Arguments of the engine that gives a row's texts; of `SETTINGS` only those that change these."""
    adapted = with_adapters(adapters["one"], adapters["two"]) if SETTINGS[row.setting].adapters else {}
    return {**EVERYTHING, **SETTINGS[row.setting].plain, **adapted}


@contextmanager
def surroundings(requests: str) -> Iterator[None]:
    """Prepare the process for a set of requests."""
    with pytest.MonkeyPatch.context() as patch:
        if requests.startswith("thinking"):
            patch.setenv("SGLANG_MAX_THINK_TOKENS", "9")
        patch.setattr(sampler, "SGLANG_RETURN_ORIGINAL_LOGPROB", requests.endswith("original"))
        yield


@pytest.fixture(scope="module")
def expected(request: pytest.FixtureRequest, models: Models, adapters: Adapters) -> dict[str, Answers]:
    """Plain decoding's answers of all rows that are to run: an engine for each set of arguments that change texts."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    run = [item.callspec.params["row"] for item in items if not list(item.iter_markers("skip"))]
    groups: dict[str, list[Row]] = {}
    for each in run:
        groups.setdefault(repr(plain_arguments(each, adapters)), []).append(each)
    answers: dict[str, Answers] = {}
    for rows in groups.values():
        for apart in (lambda each: each.requests == "rated seeds, original", lambda each: True):
            chosen = [each for each in rows if apart(each) and str(each) not in answers]
            if chosen:
                sets = {each.requests: asked_of(each, adapters) for each in chosen}
                with surroundings(chosen[0].requests):
                    known = plain_sets(models.target, sets, **plain_arguments(chosen[0], adapters))
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
    adapters: Adapters
    setting: Setting
    happened: set[str]
    learned: Learned
    graphs: Any


def flags_of(setting: Setting, models: Models, bundle: Path) -> dict[str, Any]:
    """Arguments of `engine(whiflash=...)`. bundle: of one drafter, which is written there."""
    if setting.drafters == "pair":
        return models.whiflash("none", ENTROPY, **setting.flags)
    flags: dict[str, Any] = {"whiflash_router": "none"}
    if setting.drafters != "none":
        pair = {"ar": (str(models.eagle3), None), "diffusion": (None, str(models.dflash))}
        create(BundleParts(str(models.target), *pair[setting.drafters]), bundle)
        flags["draft"] = bundle
    return flags


@pytest.fixture(scope="module")
def serving(
    request: pytest.FixtureRequest,
    models: Models,
    layered: Models,
    adapters: Adapters,
    expected: dict[str, Answers],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Serving]:
    setting, oracle, happened = SETTINGS[request.param], OracleArm(0.92, seed=3), set[str]()
    learned: Learned = defaultdict(list)
    start, ticks, committed = engine, itertools.count(), Controller.committed
    options = {"arms": [oracle], **EVERYTHING, **setting.plain, **setting.arguments}
    if setting.adapters:
        options |= with_adapters(adapters["one"], adapters["two"])
    if setting.layers > 1:
        models = layered
    if setting.overlap:
        start, options["host_lengths"] = overlapped, setting.host_lengths

    def noted(
        self: Controller, state: Any, decision: Any, arm: str, tokens: Any, width: int, start: int, *more: Any
    ) -> bool:
        learned[state.rid].append((start, list(tokens)))
        return committed(self, state, decision, arm, tokens, width, start, *more)

    with pytest.MonkeyPatch.context() as patch, ExitStack() as running:
        patch.setattr(Controller, "committed", noted)
        if setting.overlap:
            patch.setattr(Costs, "worth", lambda _: FULL_LENGTH)
            if not setting.graphs:
                patch.setattr(Target, "verify", publishing(Target.verify))
        # `auto` goes by prices: a clock that advances by a millisecond with every reading makes them the same anywhere.
        patch.setattr(time, "perf_counter", lambda: next(ticks) / 1000)
        patch.setattr(backlog, "TOKENS", setting.ring)
        flags = flags_of(setting, models, tmp_path_factory.mktemp("bundle") / "one")
        if setting.uno:
            flags["whiflash_uno"] = str(adapters["one"].path)
        running.enter_context(surroundings(request.param))
        e = running.enter_context(start(models.target, whiflash=flags, **options))
        graphs = running.enter_context(emulated_graphs(e)) if setting.graphs else None
        yield Serving(e, oracle, models, adapters, setting, happened, learned, graphs)


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
    played = partial(play_row, serving, row, expected, monkeypatch)
    if row in MATRIX:
        cell("greedy-tiny", f"{row.router}-{row.setting}", played)
    else:
        played()


def play_row(serving: Serving, row: Row, expected: dict[str, Answers], monkeypatch: pytest.MonkeyPatch) -> Result:
    e, oracle, wanted = serving.engine, serving.oracle, expected[str(row)]
    arrivals = asked_of(row, serving.adapters)
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
    for noted in (serving.happened, serving.learned):
        noted.clear()
    if serving.setting.overlap:
        for waits in (e.streams.stalls, e.streams.pageable):  # type: ignore[attr-defined]
            waits.clear()
    before = replays(serving)
    with surroundings(row.requests):
        played = [replace(a, params=deepcopy(a.params)) for a in arrivals]
        play(e, predicting(played, wanted) if row.predicted else played, lambda: watch(serving))
        answers = read(e, arrivals)
    drawn_alike = row.setting == "seeded"  # elsewhere a sampled text is another one each time
    compared = [a for a in arrivals if drawn_alike or not a.params.get("temperature")]
    comparisons = [
        check(of.reference.target, [a for a in compared if a.params.get("lora_id") == adapter], wanted, answers)
        for adapter, of in models_of(serving).items()
    ]
    check_kept(serving, row)
    check_learned(serving, arrivals)
    assert judged(serving, arrivals) >= row.happens
    retractions = sum(req.retraction_count for req in e.requests.values())
    if serving.graphs is not None:
        check_replayed(serving, before)
    return {
        "requests": sum(each.compared for each in comparisons),
        "tokens": sum(len(answer.tokens) for answer in answers.values()),
        "ties": sum(len(each.ties) for each in comparisons),
        "retractions": retractions,
    }


def models_of(serving: Serving) -> dict[str | None, Models]:
    """By the ids of adapters, and the target itself."""
    adapters = serving.adapters.values() if serving.setting.adapters else ()
    return {None: serving.models, **{adapter.id: adapter.models for adapter in adapters}}


def replays(serving: Serving) -> tuple[int, int, int]:
    """Rounds, and how many of them graphs verified and committed."""
    graphs, rounds = serving.graphs, serving.engine.worker.clock.rounds
    return (rounds, len(graphs.backend.replayed), len(graphs.committed)) if graphs else (rounds, 0, 0)


def check_replayed(serving: Serving, before: tuple[int, int, int]) -> None:
    """Every round was a replay that committed, under grammars and penalties, too; samples are as the target draws."""
    e, graphs = serving.engine, serving.graphs
    rounds, verified, committed = (now - then for now, then in zip(replays(serving), before, strict=True))
    assert rounds == verified == committed
    assert len(set(graphs.backend.replayed)) > 5
    assert graphs.passes.replays > rounds / 2
    assert set(graphs.committed[before[2] :]) == {True}
    played = len(graphs.committed)
    e.requests.clear()
    fits = judge(serving.models, sample(e, serving.oracle, {"top-k": PARAMETERS["top-k"]}, each=56, tokens=5))
    assert set(graphs.committed[played:]) == {True}
    assert fits["top-k"].p_value > 1e-4
    assert fits["top-k"].freedom >= 5


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
    """Behind every step: who drafts, who waits again, and that the worker knows the tokens of those it penalises. KV
    that a running request has put into the tree at its prefill is as good as KV that it leaves at its end.
    """
    e, happened = serving.engine, serving.happened
    happened.update(*(filter(None, state.counts) for state in e.states.values()))
    if any(req.output_ids for req in e.scheduler.waiting_queue):
        happened.add("pushed")
    chunked = e.scheduler.chunked_req
    if chunked is not None and chunked.extend_end > len(chunked.origin_input_ids):
        happened.add("chunks in outputs")
    if serving.setting == SETTINGS["small chunks"] and e.scheduler.forward_ct % 20 == 0:
        assert_tree_is_true(e, serving.models)
    for req in () if serving.setting.overlap else e.scheduler.running_batch.reqs:
        if req.kv.req_pool_idx is not None and req.output_ids and req.sampling_params.frequency_penalty:
            prompt, output = len(req.origin_input_ids), list(req.output_ids)
            assert e.worker.tokens.data[req.kv.req_pool_idx, prompt : prompt + len(output)].tolist() == output


def check_kept(serving: Serving, row: Row) -> None:
    """Nothing of requests that have ended, but KV in the tree, which is right."""
    e = serving.engine
    assert not e.states
    assert not e.worker.sync.watermarks.rows
    assert not any(e.worker.quarantine.left_out.values())
    if serving.setting.overlap:
        assert not e.streams.races  # type: ignore[attr-defined]
        waits = {*e.streams.stalls, *e.streams.pageable} if row.requests == "structured" else set()  # type: ignore[attr-defined]
        # Without graphs the host reads how many rows there are (`Target.agreed_rows`).
        own = [site for site in waits if site.startswith("whiflash") and "forward/target.py" not in site]
        assert not own, "a grammar's host waits"
    narrow = "fp8" in row.setting
    assert {drafter.kv.k.dtype.itemsize for drafter in e.worker.kv_arms.values()} <= {1 if narrow else 4}
    if hasattr(e.scheduler.tree_cache, "tree_core") and not narrow and row.setting != "no tree":
        assert assert_tree_is_true(e, serving.models, models_of(serving)) > 50
        chained = serving.setting.drafters in ("pair", "ar")
        assert e.scheduler.tree_cache.tree_core.is_eagle == chained, "only EAGLE-3 needs bigrams"


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
            cut_later = a.params.keys() & {"stop", "stop_regex"} or len(a.params.get("stop_token_ids") or ()) > FEW
            assert tokens == run or (cut_later and tokens[: len(run)] == run)
            end = begin + len(run)
        assert end <= len(output) <= end + req.retraction_count or not learned[rid]
        assert sum(len(tokens) for _, tokens in learned[rid]) >= len(output) - 1 - req.retraction_count


def read_reason(req: Any) -> str | None:
    """SGLang says none of a request that is aborted while it waits again."""
    return req.finished_reason and req.finished_reason.to_json()["type"]


def judged(serving: Serving, arrivals: list[Arrival]) -> set[str]:
    """Events that have happened. Requests with a processor of their own take no drafts: a block of theirs could not be
    judged. Those with one of SGLang's do.
    """
    e, oracle, happened = serving.engine, serving.oracle, serving.happened
    for a in arrivals:
        if a.rid.split("/")[0] in ("own", "counting"):
            assert e.rounds(a.rid)[1] == 0, a.rid
        for _, run in serving.learned[a.rid] if a.rid.startswith("budget") else ():
            happened.update({"budget ends in drafts"} if THOUGHT in run[:-1] else ())
            happened.update({"budget ends behind drafts"} if {NEWLINE, THOUGHT} & {*run[1:][-1:]} else ())
    if oracle.accepted and max(oracle.accepted) == oracle.max_drafts:
        happened.add("runs")
    if oracle.rejected:
        happened.add("rejections")
    if any(req.retraction_count for req in e.requests.values()):
        happened.add("retractions")
    again = {rid.split("/")[0] for rid, req in e.requests.items() if req.retraction_count}
    if again & {"frequency", "presence", "repetition"}:
        happened.add("penalised retractions")
    for a in arrivals:
        req = e.requests[a.rid]
        if a.abort_after is not None and not req.output_ids:
            happened.add("aborted while it waits")
        elif a.abort_after is not None and read_reason(req) == "abort":
            happened.add("aborted while it runs")
    return happened
