"""Prices of work, measured at the start on requests that are none: tables, or a profile of drafters on a CPU.

Everything is issued as it will be while serving, by the same functions, from graphs where they were captured: a
verification for every number of rows at two contexts, a draft of every arm for every size of a group, a catch-up for
every number of tokens. A clock times it (:mod:`whiflash_sglang.device.clock`): events on a GPU, or the host's.

Tables are kept for later starts (:mod:`whiflash_sglang.prices.kept`), under all that they depend on.

Nothing is cached yet, so the slot table and the KV slots are free to be used: verified rows read distinct slots, as
contexts do while serving, and drafts write to the padding slot.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import torch
import whiflash_kernels
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.runtime_context import get_context, get_parallel
from whiflash_kernels import prepare_mixed_block
from whiflash_kernels.tile import NARROW

from whiflash_sglang import __version__
from whiflash_sglang.arms.base import Drafter, widest_of, with_kv
from whiflash_sglang.cache.backlog import FeatureRings
from whiflash_sglang.device.capture import graded
from whiflash_sglang.device.clock import Clock, measure
from whiflash_sglang.device.ranks import Ranks
from whiflash_sglang.device.transfers import HostView
from whiflash_sglang.embedded import cache_root
from whiflash_sglang.engine import supported
from whiflash_sglang.engine.forward.graphs import VerifyGraphs, most_rows
from whiflash_sglang.engine.forward.target import Target
from whiflash_sglang.prices.costs import FULL_LENGTH, Costs, MeasuredCosts
from whiflash_sglang.prices.kept import KeptPrices
from whiflash_sglang.prices.tables import CostTables, LookedUpCosts, Sizes, Verifications
from whiflash_sglang.records.core import DraftBatch

LONGEST = 131072
"""Tokens of context, of all requests together, that verifications are timed with at most.

FA3, and `verify_attention` behind Triton attention, cut long prefixes over the chip: a verification takes as long as
the sum of contexts, however it is divided, and larger sums are on the line (`results/gpu/verification.json`: 2.7 to
3.4 ns a token and layer from 32,768 to 819,200 tokens). So servers of any context are timed in seconds.
"""

WALKED = 16384
"""The same for latent attention: Triton's walks a prefix in one program, which takes up to fifty times as long."""

FLAT = 8192
"""The shorter context, if the longer one is twice as long. Up to there a cut prefix takes as long as none: each program
of an H200 has a share of the least size until eight KV heads have 8,448 tokens.
"""

SHORTER = 16
"""Else the shorter context is this part of the longer one."""

BATCHES = (1, 2, 4, 8)
"""Requests that drafters are profiled with."""

CONTEXT = 32
"""Tokens that every request of a draft pass pretends to have, if a request may have as many."""

TIMINGS = 3
"""A profile takes the fastest of so many: an arm that looks dear because something else ran at the start is timed again
only by probes, one that looks cheap by its next round.
"""

PRICED = re.compile(
    "attention|backend|compile|context|deepep|determin|dtype|eager|expert|fp32|fp8|fus|graph|layers|lm_head|lora|moe|nvls|"
    "offload|overlap|page|quant|reduce|size|symm|tf32"
)
"""Arguments of a server that may change what work takes, by their names. A price of another server would be wrong for
good; one more measurement takes seconds.
"""


class CatchUps(Protocol):
    """Members of catch-ups that are timed (`round/catch_up.py`)."""

    rings: FeatureRings
    arms: tuple[str, ...]

    def sizes(self, rows: int) -> list[int]: ...

    def idle(self, arm: str, tokens: int) -> Callable[[], object]: ...


def costs_of(device: torch.device, width: Callable[[str], int], overlaps: bool) -> Costs:
    """Prices of routes on a device: looked up where the host's clock would time launches. width: as of `Costs`.
    overlaps: as of `LookedUpCosts`.
    """
    return LookedUpCosts(width, overlaps) if device.type == "cuda" else MeasuredCosts(width)


def price(costs: Costs, start: "Start", ranks: Ranks) -> None:
    """Learn what `costs` must know before the first request: what an earlier start kept, or what is measured now.

    The first process looks for it and keeps it; all measure, or none does.
    """
    if isinstance(costs, LookedUpCosts):
        kept = KeptPrices(cache_root() / "prices", start.key(ranks.size))
        tables = ranks.broadcast(kept.read)
        if tables is None:
            tables = start.tables()
            if ranks.leads:
                kept.write(tables)
        costs.tables = tables
    elif isinstance(costs, MeasuredCosts):
        start.profile(costs)


class Start:
    """A server before its first request. requests: that a batch has at most."""

    def __init__(
        self,
        target: Target,
        drafters: Mapping[str, Drafter],
        sync: CatchUps,
        host: HostView,
        clock: Clock,
        requests: int,
    ) -> None:
        self.target, self.drafters, self.sync = target, drafters, sync
        self.passing = {arm: drafter for arm, drafter in drafters.items() if drafter.passes}
        self.host, self.clock, self.requests = host, clock, requests

    def key(self, size: int) -> dict[str, str]:
        """All that prices depend on. size: processes that serve the model."""
        runner = self.target.runner
        values = {
            "device": _name(self.target.device),
            "processes": size,
            "target": _digest(runner.model_config.hf_config.to_json_string()),
            "attention": type(runner.attn_backend).__name__,
            "arguments": {
                name: value
                for name, value in sorted(get_context().resolved_server_args_dict().items())
                if PRICED.search(name)
            },
            # Memory of a pass says how many rows its head has, which no configuration says.
            "drafters": {
                arm: f"{d.lengths} {d.captured_bytes(self.requests)} {_digest(d.model.config)}"
                for arm, d in self.passing.items()
            },
            "fp8": [arm for arm, d in with_kv(self.drafters).items() if d.model.quantised],
            "sizes": [*self._rows(), *self._contexts(), *self._tokens()],
            "versions": f"{supported.installed()} {__version__} {torch.__version__} {_kernels()}",
        }
        return {name: str(value) for name, value in values.items()}

    def tables(self) -> CostTables:
        """Measure. Waits for the device."""
        (sizes, most), (short, long) = self._rows(), self._contexts()
        verifications = Verifications.measured(short, long, sizes, partial(self._verification, most))
        wider = {above: self._wider(verifications, above, sizes, most) for above in self._widths()}
        alone = [rows for rows in sizes if rows <= self.target.rows_for(most, most)]
        plain = Verifications.measured(short, long, alone, partial(self._verification, most, plain=True))
        groups, drafts, shorter = graded(self.requests), {}, {}
        for arm, drafter in self.passing.items():
            lengths = {n: Sizes.measured(groups, partial(self._pass, drafter, n)) for n in drafter.lengths}
            drafts[arm], shorter[arm] = lengths.pop(drafter.max_drafts), lengths
        # The scheduler would wait for the target's last forward of these in place of the first prefill.
        self.target.runner.shared_read_done_event = None
        tokens = self._tokens()
        catch_up = {arm: Sizes.measured(tokens, partial(self._catch_up, arm)) for arm in self.sync.arms}
        return CostTables(verifications, drafts, catch_up, shorter, wider, plain)

    def profile(self, costs: MeasuredCosts) -> None:
        """Time drafts that are passes, for a few batch sizes. Every write goes to the engine's padding slot."""
        for arm, drafter in self.passing.items():
            for size in (size for size in BATCHES if size <= len(self.target.slot_table)):
                draft = partial(drafter.draft, self._batch(drafter, drafter.max_drafts, size))
                passes = draft().passes
                costs.drafted(arm, size, passes, measure(draft, self.clock, repeats=TIMINGS, of=min))

    @property
    def _widest(self) -> int:
        """Rows that a request verifies at most."""
        return widest_of(self.drafters) + 1

    def _rows(self) -> tuple[list[int], int]:
        """Rows of the verifications that are timed, and the most requests of one: the graphs' where there are any."""
        graphs = self.target.runner.decode_cuda_graph_runner
        if isinstance(graphs, VerifyGraphs):
            return graphs.capture_num_tokens, graphs.requests
        return graded(most_rows(self.requests, self._widest)), self.requests

    def _contexts(self) -> tuple[int, int]:
        """Tokens of context that verifications are timed with."""
        latent = self.target.runner.model_config.attention_arch == AttentionArch.MLA
        most = min(self.target.context_len - self._widest, self.target.kv_slots)
        long = min(most, WALKED if latent else LONGEST)
        return (long // SHORTER if latent or long < 2 * FLAT else FLAT), long

    def _widths(self) -> list[int]:
        """Rows of a request up to which attention takes its smaller tile; none if no request has more."""
        config, parallel = self.target.runner.model_config, get_parallel()
        heads = config.get_max_num_attention_heads() // parallel.attn_tp_size
        rows = NARROW // (heads // config.get_num_kv_heads(parallel.attn_tp_size))
        return [rows] if 0 < rows < self._widest and config.attention_arch != AttentionArch.MLA else []

    def _wider(self, narrow: Verifications, above: int, sizes: Sequence[int], most: int) -> Verifications:
        """Price verifications of which each request has more than `above` rows.

        Measured at the longer context only: what the tile adds is in proportion to the context.
        """
        near, far = narrow.at_short, narrow.at_long

        def added(rows: int) -> float:
            count = rows // (above + 1)
            return 0.0 if count >= most else self._verification(count, rows, narrow.long) - far.at(rows)

        more = {rows: max(added(rows), 0.0) for rows in sizes if rows > above}
        return Verifications(
            narrow.short,
            narrow.long,
            Sizes.measured(more, lambda rows: near.at(rows) + more[rows] * narrow.short / narrow.long),
            Sizes.measured(more, lambda rows: far.at(rows) + more[rows]),
        )

    def _tokens(self) -> list[int]:
        """Tokens of the catch-ups that are timed."""
        return self.sync.sizes(self.requests * self._widest)

    def _pass(self, drafter: Drafter, length: int, requests: int) -> float:
        return measure(partial(drafter.draft, self._batch(drafter, length, requests)), self.clock)

    def _batch(self, drafter: Drafter, length: int, requests: int) -> DraftBatch:
        """A batch of so many requests that are none, with at most `length` drafts each."""
        table, context = self.target.slot_table, min(CONTEXT, self.target.context_len)
        rows = torch.arange(requests, device=table.device)
        starts, caps, bonus = (torch.full_like(rows, n) for n in (context, drafter.max_drafts, 0))
        values = drafter.calibration((), FULL_LENGTH)
        calibration = torch.tensor(values, dtype=torch.float32, device=rows.device)
        reads_tail, place = drafter.tail_width > 0, drafter.place(requests)
        rows, starts, bonus, caps, tail, calibration = self.sync.rings.inputs(
            None, rows, starts, bonus, caps, calibration, drafter.features, tail=reads_tail, into=place
        )
        limits, ids, host = [length] * requests, range(requests), self.host
        return DraftBatch(
            rows, starts, bonus, tail, table, context, caps, limits, ids, calibration, host=host
        )

    def _catch_up(self, arm: str, tokens: int) -> float:
        return measure(self.sync.idle(arm, tokens), self.clock)

    def _verification(self, requests: int, rows: int, context: int, *, plain: bool = False) -> float:
        """Seconds for `rows` rows of up to so many requests, which have `context` tokens together.

        plain: in the graph of rounds without drafts, which one row for each request takes; else in a verification's.
        """
        target, device = self.target, self.target.device
        count = min(rows, requests)
        widths = [1 if plain else rows // count + (i < rows % count) for i in range(count)]
        ids, each = torch.arange(1, count + 1, device=device), max(context // count, 1)
        starts = torch.full_like(ids, each)
        verify_lens = torch.tensor(widths, dtype=torch.int32, device=device)
        bonus, drafts = torch.zeros_like(ids), ids.new_zeros((count, max(widths) - 1))
        on_host, most = starts.cpu(), 1 if plain else max(*widths, 2)

        def verify() -> Any:
            target.agreed_rows(rows, count)
            batch = target.batch_of(ids, starts, on_host)
            return target.verify(batch, block, verify_lens, widths if self.host.exact else None, most)

        with _spread_slots(target, count, each + max(widths)):
            block = prepare_mixed_block(bonus, drafts, verify_lens, starts, ids, target.slot_table, rows=rows)
            return measure(verify, self.clock)


@contextmanager
def _spread_slots(target: Target, requests: int, columns: int) -> Iterator[None]:
    """Requests in rows 1, 2, … that have slots of their own for so many tokens, as far as there are slots, also in a
    pool of windowed layers.
    """
    pool = target.runner.token_to_kv_pool
    page = int(pool.page_size)
    slots = target.slot_table[1 : requests + 1, :columns]
    columns = int(slots.shape[1])
    position = torch.arange(columns, device=slots.device)
    first = torch.arange(requests, device=slots.device)[:, None] * -(-columns // page)
    pages = (first + position // page) % (target.kv_slots // page - 1) + 1  # page 0 is padding
    slots.copy_(pages * page + position % page)
    windowed = getattr(pool, "full_to_swa_index_mapping", None)
    if windowed is not None:
        windowed[slots.long()] = ((pages - 1) % (pool.size_swa // page) + 1) * page + position % page
    try:
        yield
    finally:
        if windowed is not None:
            windowed[slots.long()] = 0
        slots.zero_()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _kernels() -> str:
    """Equal for kernels of the same sources: versions of a checkout have one number."""
    sources = sorted(Path(whiflash_kernels.__file__).parent.rglob("*.py"))
    return _digest([source.read_bytes() for source in sources])


def _digest(thing: object) -> str:
    return blake2b(str(thing).encode(), digest_size=8).hexdigest()
