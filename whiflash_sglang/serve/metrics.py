"""The metrics of a WHIFLASH server and how each is read. `docs/reference/metrics.md` is generated from this table.

Names and units follow Prometheus's conventions: base units, `_total` for counters. No label has a value per request or
tenant. SGLang's own labels (`model_name`, `tp_rank`, `dp_rank` of replicas and others) come before ours.

`state_of` gives a worker's figures as one object, for `GET /whiflash/state`. `Publisher` writes series at intervals,
since writing them takes longer than counting. Imports no SGLang.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, get_args

from whiflash_sglang import __version__
from whiflash_sglang.prices.costs import Costs
from whiflash_sglang.settings.config import RouterName, Settings

if TYPE_CHECKING:
    from whiflash_sglang.arms.base import Drafter, KVDrafter, TextDrafter
    from whiflash_sglang.cache.tokens import TokenTable
    from whiflash_sglang.engine.forward.target import Target
    from whiflash_sglang.prices.round_clock import RoundClock
    from whiflash_sglang.round.catch_up import DraftSync
    from whiflash_sglang.round.quarantine import Quarantine
    from whiflash_sglang.routing.controller import Controller
    from whiflash_sglang.telemetry.samples import Spool
    from whiflash_sglang.telemetry.tally import ArmCounts, Tally


class Observed(Protocol):
    """A worker, as far as its figures are read from it."""

    settings: Settings
    clock: "RoundClock"
    tally: "Tally"
    controller: "Controller"
    sync: "DraftSync"
    quarantine: "Quarantine"
    drafters: Mapping[str, "Drafter"]
    kv_arms: Mapping[str, "KVDrafter"]
    text_arms: Mapping[str, "TextDrafter"]
    target: "Target"
    tokens: "TokenTable"
    spool: "Spool | None"


def state_of(worker: Observed) -> dict[str, Any]:
    """Return the object of `GET /whiflash/state`: policy, running requests, seconds by stage, prices, memory."""
    return {
        "policy": worker.controller.policy.name,
        "arms": sorted(worker.drafters),
        "requests": len(worker.controller.states),
        "quarantined": dict(worker.quarantine.reasons),
        "left_out": dict(worker.quarantine.left_out),
        "faulty_drafts": dict(worker.quarantine.faults),
        **worker.clock.snapshot(),
        **worker.tally.snapshot(),
        "plain_price": worker.controller.costs.plain_price(),
        "costs": worker.controller.costs.snapshot(worker.drafters),
        "memory": memory_of(worker),
        **({} if worker.spool is None else {"samples": worker.spool.snapshot()}),
    }


def memory_of(worker: Observed) -> dict[str, int]:
    """Return allocated bytes by purpose, such as `draft_kv`, without weights, the target and the target's KV."""
    draft_kv = sum(drafter.kv_bytes_per_token() for drafter in worker.kv_arms.values())
    kept = {
        f"{arm}_{name}": size
        for arm, drafter in worker.text_arms.items()
        for name, size in drafter.host_bytes(worker.controller.states.values()).items()
    }
    return {
        "draft_kv": draft_kv * worker.target.kv_slots,
        "backlog": worker.sync.bytes_for(len(worker.target.slot_table)),
        "text": worker.tokens.data.nbytes,
        **kept,
    }


PREFIX = "sglang:whiflash_"

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
TOKENS = (1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0)

Labels = tuple[str, ...]
Points = Iterable[tuple[Labels, float]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Series:
    """A metric of the server.

    name: without `PREFIX`; a counter's ends with `_total`. meaning: one sentence. labels: names of our own. read:
    returns pairs of label values and a number: a counter's total since the start, a gauge's present value, or one
    observation of a histogram, which reading removes. buckets: a histogram's upper bounds.
    """

    name: str
    meaning: str
    read: Callable[[Observed], Points]
    labels: Labels = ()
    buckets: tuple[float, ...] = ()

    @property
    def kind(self) -> Literal["counter", "gauge", "histogram"]:
        if self.buckets:
            return "histogram"
        return "counter" if self.name.endswith("_total") else "gauge"

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


def _one(name: str, meaning: str, value: Callable[[Observed], float]) -> Series:
    return Series(name, meaning, lambda w: [((), value(w))])


def _each(named: str, meaning: str, values: Callable[[Observed], Mapping[Any, float]]) -> Series:
    """Make a series with one label and a number for each of its values. named: `name{label}`."""
    name, label = named.removesuffix("}").split("{")
    return Series(name, meaning, lambda w: [((str(key),), n) for key, n in values(w).items()], (label,))


def _by_arm(name: str, meaning: str, counts: Callable[["ArmCounts"], float]) -> Series:
    return _each(f"{name}{{arm}}", meaning, lambda w: {arm: counts(c) for arm, c in w.tally.by_arm.items()})


def _taken(pending: deque[T]) -> Iterator[T]:
    while pending:
        yield pending.popleft()


SERIES = (
    _by_arm("rounds_total", "rounds of requests", lambda c: c.rounds),
    _by_arm(
        "tokens_total",
        "tokens committed by rounds, including bonus tokens, excluding the first token of a prefill",
        lambda c: c.tokens,
    ),
    _by_arm("draft_tokens_total", "drafts verified", lambda c: c.proposed),
    _by_arm("accepted_draft_tokens_total", "drafts accepted", lambda c: c.accepted),
    _by_arm(
        "joined_draft_tokens_total",
        "drafts with which another arm continued those of `arm`; also in `draft_tokens`",
        lambda c: c.joined,
    ),
    _by_arm(
        "accepted_joined_draft_tokens_total",
        "the accepted ones of these; also in `accepted_draft_tokens`",
        lambda c: c.joined_accepted,
    ),
    _each(
        "faulty_drafts_total{arm}",
        "rounds of requests in which the arm returned invalid drafts (unknown ids or NaN)",
        lambda w: w.quarantine.faults,
    ),
    _each(
        "left_out_requests_total{arm}",
        "requests that continued without the arm after its error or invalid drafts",
        lambda w: w.quarantine.left_out,
    ),
    _each(
        "quarantined{arm}",
        "1 for an arm that is left out for everybody; the server's log has the reason",
        lambda w: {arm: float(arm in w.quarantine) for arm in w.drafters},
    ),
    Series(
        "request_acceptance_length",
        "tokens a round, including the bonus token, of each ended request",
        lambda w: (((arm,), length) for arm, length in _taken(w.tally.acceptance)),
        ("arm",),
        TOKENS,
    ),
    _each(
        "cached_prompt_tokens_total{place}",
        "prompt tokens of ended requests whose KV was kept: on the `device`, in `host` memory or in `storage`",
        lambda w: w.tally.cached,
    ),
    _each(
        "loaded_rounds_total{arm}",
        "rounds of ended requests whose prompt's KV came in part from the host or from storage",
        lambda w: {arm: counts.rounds for arm, counts in w.tally.loaded.items()},
    ),
    _each(
        "loaded_tokens_total{arm}",
        "tokens committed by these rounds; over `loaded_rounds_total`, their acceptance length",
        lambda w: {arm: counts.tokens for arm, counts in w.tally.loaded.items()},
    ),
    _each(
        "routes_total{reason}",
        "rounds of requests by routing reason: `score`, `policy`, `span`, `pin` or `off`",
        lambda w: w.tally.reasons,
    ),
    _one(
        "switches_total", "rounds of requests drafted by another arm than the round before", lambda w: w.clock.switches
    ),
    _each(
        "requests_total{hints}",
        "started requests by the origin of their hints: the `request`, spans `inferred` by the server, `none`, or "
        "`malformed` ones that were ignored",
        lambda w: w.tally.requests,
    ),
    _each(
        "previews_total{outcome}",
        "previews of sessions' next prompts: `prefilled`, at least in part, or `dropped` before",
        lambda w: w.tally.previews,
    ),
    _one("preview_tokens_total", "prompt tokens that previews prefilled", lambda w: w.tally.preview_tokens),
    Series(
        "round_seconds",
        "time of a round of the whole batch, on the host's clock",
        lambda w: (((), seconds) for seconds in _taken(w.tally.round_seconds)),
        buckets=SECONDS,
    ),
    _each(
        "stage_seconds_total{stage}",
        "seconds by stage of the round (`GET /whiflash/state` explains them)",
        lambda w: w.clock.seconds,
    ),
    _one(
        "decode_seconds_total",
        "seconds of consecutive rounds and of the time between them",
        lambda w: w.tally.timed_seconds,
    ),
    _one(
        "priced_decode_seconds_total",
        "of `decode_seconds_total`, those of rounds for which plain decoding's price was known",
        lambda w: w.tally.priced_seconds,
    ),
    _one(
        "plain_decode_seconds_total",
        "estimate of plain decoding's seconds for the tokens of these rounds; over `priced_decode_seconds_total`, the "
        "speed-up",
        lambda w: w.tally.plain_seconds,
    ),
    _each(
        "catch_up_tokens_total{arm}",
        "upper bound of the tokens that a drafter ingested after others had drafted",
        lambda w: w.sync.caught_up,
    ),
    _each(
        "backlog_tokens{arm}",
        "upper bound of the tokens of running requests that a drafter has yet to ingest",
        lambda w: w.sync.backlog(),
    ),
    Series(
        "cost_seconds",
        "prices of routes: `draft` of one request with its catch-up and `draft_request` of each further one, by arm; "
        "`verify` of one request without drafts, `verify_row` of each further row; the engine's time `between` rounds",
        lambda w: w.controller.costs.fitted(w.drafters).items(),
        ("work", "arm"),
    ),
    _each(
        "memory_bytes{scope}",
        "bytes by scope: `draft_kv` beside the target's slots, `backlog` (parked features), `text` of running "
        "requests, `lookup_index` of their copying arm, `lookup_groups` of answers of tasks",
        memory_of,
    ),
    _each(
        "learn_samples_total{outcome}",
        "finished requests by outcome for `--whiflash-learn`: `written`, `declined` (no consent, or not only text), "
        "`dropped` (more than could be written) or `failed` (by the disk)",
        lambda w: {} if w.spool is None else w.spool.counts,
    ),
    Series("learn_spool_bytes", "bytes of samples on disk", lambda w: [] if w.spool is None else [((), w.spool.size)]),
    _each(
        "policy{policy}",
        "1 for the policy in force, 0 for others",
        lambda w: {name: float(name == w.settings.router) for name in get_args(RouterName)},
    ),
    Series(
        "info",
        "always 1; labels name the package's version and the bundle",
        lambda w: [((__version__, w.settings.bundle or ""), 1.0)],
        ("version", "bundle"),
    ),
)


logger = logging.getLogger("whiflash_sglang")

NO_DRAFTER = (
    "no drafter: copies of the context, forced structure and predictions are drafted; an EAGLE-3 or DFlash "
    "checkpoint (--speculative-draft-model-path) would draft free text too"
)
"""Logged at the start of a server without draft KV."""

INTERVAL = 1.0
"""Seconds between two writings while rounds run. When the last request has ended, the rest is written at once."""

Sink = Callable[[Series, Labels, float], object]
"""A receiver of series. It adds to a counter, sets a gauge, or adds an observation to a histogram."""


class Publisher:
    """Writes the series of a worker that have changed to a sink; does nothing before it has one."""

    def __init__(self, worker: Observed) -> None:
        self._worker = worker
        self._sink: Sink | None = None
        self._written: dict[tuple[str, Labels], float] = {}
        self._due = 0.0

    def start(self, sink: Sink) -> None:
        """Write to `sink` from now on. Every series that has a value is written at once."""
        self._sink = sink
        self.flush()

    def tick(self) -> None:
        """Write if `INTERVAL` has passed. Called at the end of every step."""
        if self._sink is not None and time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        """Write the series that have changed since the last writing."""
        if self._sink is None:
            return
        for series in SERIES:
            for labels, number in series.read(self._worker):
                if series.kind == "histogram":
                    self._sink(series, labels, number)
                elif (before := self._written.get((series.name, labels))) != number:
                    self._written[series.name, labels] = number
                    self._sink(series, labels, number - (before or 0.0) if series.kind == "counter" else number)
        self._due = time.monotonic() + INTERVAL


def log_start(
    policy: str, drafters: "Mapping[str, Drafter]", costs: Costs, *, draft_bytes: int, token_bytes: int
) -> None:
    """Log the arms that may draft, with their widths and prices.

    Args:
        draft_bytes: bytes of a token's KV in the drafters. token_bytes: in drafters and target.
    """
    arms = []
    for arm, drafter in drafters.items():
        seconds = costs.draft(arm, 1)
        price = f", {1000 * seconds:.2f} ms a draft" if seconds else ""
        arms.append(f"{arm} (up to {drafter.max_drafts} drafts{price})")
    kv = NO_DRAFTER
    if draft_bytes:
        share = 100 * draft_bytes / token_bytes if token_bytes else 0.0
        kv = f"drafters' KV {draft_bytes} of {token_bytes} bytes a token ({share:.1f}%)"
    logger.info("WHIFLASH: policy %s; arms %s; %s", policy, ", ".join(arms) or "none", kv)
