"""The figures of a worker are those of its rounds: every token, draft and request is in one series, once."""

import random
from collections import Counter
from typing import Any

import pytest
from engine import Engine, engine
from model_set import Models
from streams import Streams
from watching import Functions

from whiflash_sglang.arms.base import KVDrafter
from whiflash_sglang.prices.costs import FULL_LENGTH, Costs
from whiflash_sglang.round.draft import DraftStage
from whiflash_sglang.serve.metrics import Labels, Series

PROMPTS = [random.Random(i).choices(range(256), k=12 + 5 * i) * 2 for i in range(4)]


class Recorded:
    """Adds up what is written, as Prometheus would have it."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, Labels], float] = {}
        self.observed: dict[tuple[str, Labels], list[float]] = {}

    def write(self, series: Series, labels: Labels, number: float) -> None:
        key = series.name, labels
        if series.kind == "histogram":
            self.observed.setdefault(key, []).append(number)
        elif series.kind == "counter":
            assert number >= 0
            self.values[key] = self.values.get(key, 0) + number
        else:
            self.values[key] = number

    def total(self, name: str) -> float:
        return sum(value for (series, _), value in self.values.items() if series == name)


@pytest.fixture
def full_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of full length, whatever rounds take on this machine."""
    monkeypatch.setattr(Costs, "worth", lambda *_: FULL_LENGTH)


def serve(e: Engine, monkeypatch: pytest.MonkeyPatch) -> tuple[Recorded, Counter[str], Streams]:
    """Records written while requests ran, counts of their rounds, and the device reads of writing."""
    found, own, reads = Recorded(), Counter[str](), Streams()
    e.worker.publisher.start(found.write)
    run = e.worker._round

    def counted(*args: Any) -> Any:
        done = run(*args)
        widths = done.cap_lens.tolist()
        own.update(rounds=len(widths), rows=sum(widths), batches=1, accepted=int(done.accept_lens.sum()))
        with Functions(reads):
            e.worker.publisher.flush()
        return done

    monkeypatch.setattr(e.worker, "_round", counted)
    draft = DraftStage.draft

    def noted(self: DraftStage, turn: Any) -> None:
        draft(self, turn)
        chosen = turn.chosen
        joined = chosen.widths - 1 - chosen.first_drafts
        own.update(joined=int(joined[chosen.source == 0].sum()))

    monkeypatch.setattr(DraftStage, "draft", noted)
    e.generate(PROMPTS, max_new_tokens=90)
    own.update(tokens=sum(len(req.output_ids) - 1 for req in e.requests.values()))
    return found, own, reads


@pytest.mark.parametrize("router", ["random", "none"])
def test_figures_are_those_of_the_rounds(
    models: Models, router: str, monkeypatch: pytest.MonkeyPatch, full_drafts: None
) -> None:
    flags = models.whiflash(router)
    with engine(models.target, whiflash=flags, log_level="info", decode_log_interval=10_000) as e:
        found, own, reads = serve(e, monkeypatch)
        clock = e.worker.clock
        check_upstreams(e, own)
        check_prices(e, {labels: value for (name, labels), value in found.values.items() if name == "cost_seconds"})
        bytes_of = {labels[0]: value for (name, labels), value in found.values.items() if name == "memory_bytes"}
        check_memory(e, bytes_of)
    assert not reads.stalls + reads.pageable + reads.uploads
    assert found.total("rounds_total") == found.total("routes_total") == own["rounds"]
    assert found.total("tokens_total") == own["tokens"]
    assert clock.rows == own["rows"], "without graphs no row is padding"
    assert found.total("draft_tokens_total") == own["rows"] - own["rounds"]
    assert found.total("accepted_draft_tokens_total") == own["tokens"] - own["rounds"]
    assert found.total("joined_draft_tokens_total") == own["joined"] <= found.total("draft_tokens_total")
    assert found.total("accepted_joined_draft_tokens_total") <= found.total("joined_draft_tokens_total")
    assert (found.total("draft_tokens_total") > 0) == (router != "none")
    assert found.total("catch_up_tokens_total") > 0, "rings do not overflow"
    if router == "random":
        assert found.total("switches_total") == clock.switches > 0
    assert found.values["policy", (router,)] == found.total("policy") == 1
    assert found.values["requests_total", ("none",)] == found.total("requests_total") == len(PROMPTS)

    # Every request is observed once by each arm that drafted for it, and its rounds are the arm's.
    for (name, arm), lengths in found.observed.items():
        if name == "request_acceptance_length":
            assert len(lengths) <= len(PROMPTS)
            mean = found.values["tokens_total", arm] / found.values["rounds_total", arm]
            assert min(lengths) <= mean <= max(lengths)
    assert len(found.observed["round_seconds", ()]) == own["batches"]
    assert sum(found.observed["round_seconds", ()]) == pytest.approx(clock.round_seconds)
    assert found.total("stage_seconds_total") == pytest.approx(sum(clock.seconds.values()))
    assert found.total("backlog_tokens") == 0, "nobody runs any more"
    priced = found.total("priced_decode_seconds_total")
    assert found.total("decode_seconds_total") >= priced
    assert (priced > 0) == (found.total("plain_decode_seconds_total") > 0)
    assert priced > 0 or router != "none", "plain rounds were timed"


def check_upstreams(e: Engine, own: Counter[str]) -> None:
    """SGLang's own figures, of several requests whose rounds share steps, are the worker's."""
    reporter, requests = e.scheduler.metrics_reporter, e.requests.values()
    counts = (reporter.spec_num_forward_ct, reporter.spec_num_cap_tokens, reporter.spec_num_accept_tokens)
    assert counts == (own["rounds"], own["rows"], own["accepted"])
    assert sum(r.spec_verify_ct for r in requests) == own["rounds"]
    assert sum(r.spec_num_cap_tokens for r in requests) == own["rows"]
    for req in requests:
        by_width = enumerate(req.spec_cap_lens_histogram)
        assert sum(rows * n for rows, n in by_width) == req.spec_num_cap_tokens
        assert sum(req.spec_cap_lens_histogram) == req.spec_verify_ct


def test_the_backlog_is_what_idle_drafters_have_missed(models: Models) -> None:
    """While EAGLE-3 alone drafts, DFlash lags by all that was committed; its ring bounds it."""
    most: Counter[Labels] = Counter()
    with engine(models.target, whiflash=models.whiflash("ar")) as e:
        found = Recorded()
        e.worker.publisher.start(found.write)

        def step() -> None:
            e.worker.publisher.flush()
            for (name, labels), value in found.values.items():
                if name == "backlog_tokens":
                    most[labels] = max(most[labels], int(value))

        e.submit("alone", PROMPTS[0], max_new_tokens=30)
        e.run(step)
        capacity = e.worker.sync.watermarks.capacity
    assert 20 < most["diffusion",] <= capacity
    assert most["ar",] < 10


def check_prices(e: Engine, published: dict[Labels, float]) -> None:
    """They are those in use."""
    costs = e.worker.controller.costs
    for arm, drafter in e.worker.drafters.items():
        assert published["draft", arm] == costs.draft(arm, 1)
        assert (published["draft", arm] > 0) == isinstance(drafter, KVDrafter), "what only looks has no price"
    costs.set_contexts([])
    assert published["verify", ""] == pytest.approx(costs.verify(1, 1), rel=0.2), "of other contexts"
    assert published["verify_row", ""] > 0
    assert published["between", ""] >= 0


def check_memory(e: Engine, published: dict[str, float]) -> None:
    """It is what was allocated."""
    drafters = e.worker.drafters.values()
    kv = sum(d.kv.k.nbytes + d.kv.v.nbytes for d in drafters if isinstance(d, KVDrafter))
    assert published["draft_kv"] == kv > 0
    rings = e.worker.sync.rings.rings
    watermarks = e.worker.sync.watermarks.device.nbytes
    assert published["backlog"] == rings.features.nbytes + rings.next_tokens.nbytes + watermarks
    assert published["text"] == e.worker.tokens.data.nbytes
    assert published["lookup_index"] == published["lookup_groups"] == 0
