"""Measure tables of prices at the start, with made-up requests.

Work is issued as it will be while serving, by the same functions, from graphs where they were captured: verifications
by rows at two contexts, drafts of every arm by requests, catch-ups by tokens. With graphs each of their sizes is timed,
without graphs a few sizes (`SPARSE`). A clock times the work (:mod:`whiflash_sglang.device.clock`): events on a GPU, or
the host's.

With graphs and without DP attention tables are kept for later starts (:mod:`whiflash_sglang.prices.kept`), under a key
of all that they depend on.

Nothing is cached yet, so the slot table and the KV slots are free to be used: verified rows read distinct slots, as
contexts do while serving, and drafts write to the padding slot.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from pathlib import Path
from statistics import median
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
from whiflash_sglang.device.clock import REPEATS, Clock, measure
from whiflash_sglang.device.ranks import Ranks
from whiflash_sglang.embedded import cache_root
from whiflash_sglang.engine import supported
from whiflash_sglang.engine.forward.graphs import VerifyGraphs, most_rows
from whiflash_sglang.engine.forward.target import Target
from whiflash_sglang.engine.scheduler.disaggregation import prefills_only
from whiflash_sglang.prices import kept
from whiflash_sglang.prices.costs import FULL_LENGTH, Costs
from whiflash_sglang.prices.tables import CostTables, Sizes, Verifications
from whiflash_sglang.records.core import DraftBatch

LONGEST = 131072
"""Largest sum of contexts over all requests, in tokens, with which verifications are timed.

FA3, and `verify_attention` for Triton attention, split long prefixes over the chip: a verification's time depends on
the sum of contexts, however it is divided, and larger sums are on the line (`results/gpu/verification.json`: 2.7 to
3.4 ns a token and layer from 32,768 to 819,200 tokens). So servers of any context are timed in seconds.
"""

WALKED = 16384
"""Largest sum for latent attention: Triton's kernel does not split a prefix, which takes up to 50 times as long."""

FLAT = 8192
"""The shorter sum of contexts that is timed, if the longer one is at least twice as long. Up to it a split prefix takes
no time: each program of an H200 has a share of the smallest size until eight KV heads have 8,448 tokens.
"""

SHORTER = 16
"""Ratio of the longer to the shorter sum of contexts where `FLAT` does not apply."""

EAGER = 4096
"""Largest sum of contexts, in tokens, that is timed without graphs: a CPU takes seconds for a longer one."""

SPARSE = (1, 2, 4, 8, 16, 32, 64)
"""Sizes that are timed without graphs. Others are on the lines between these; above 64 a price grows with the size."""

CONTEXT = 32
"""Context in tokens of each made-up request of a draft pass, if the target takes as many."""

TIMINGS = 3
"""Measurements without graphs, of which the fastest counts: other processes on the same cores slow single ones down."""

PRICED = re.compile(
    "attention|backend|compile|context|deepep|determin|disaggregation_mode|dtype|eager|expert|fp32|fp8|fus|graph|layers|"
    "lm_head|lora|moe|nvls|offload|overlap|page|quant|reduce|size|symm|tf32"
)
"""Names of server arguments that may change how long work takes. A price of another server would stay wrong; measuring
once more takes seconds.
"""


class CatchUps(Protocol):
    """The members of `round/catch_up.py` by which catch-ups are timed."""

    rings: FeatureRings
    arms: tuple[str, ...]

    def sizes(self, rows: int) -> list[int]: ...

    def idle(self, arm: str, tokens: int) -> Callable[[], object]: ...


def price(costs: Costs, start: "Start", ranks: Ranks) -> None:
    """Give `costs` the prices that it needs before the first request: kept by an earlier start, or measured now.

    Only the first process reads and writes kept prices; either all processes measure or none does. All of them take
    the first one's prices, by which they count rounds (`previews.py`), since their clocks differ. Nothing is kept
    without graphs, since such prices show how busy the host was, nor with DP attention, whose ranks measure together
    and might find different files.
    """
    key = start.key(ranks.size) if start.keeps else {}
    file = kept.file_of(cache_root() / "prices", key)
    tables = ranks.broadcast(lambda: kept.read(file, key) if key else None)
    if tables is None:
        measured = start.tables()
        tables = ranks.broadcast(lambda: measured)
        if key and ranks.leads:
            kept.write(file, key, tables)
    costs.tables = tables


class Start:
    """Times verifications, drafter passes and KV catch-ups before a server's first request, for its prices.

    requests: the most of a batch.
    """

    def __init__(
        self, target: Target, drafters: Mapping[str, Drafter], sync: CatchUps, clock: Clock, requests: int
    ) -> None:
        self.target, self.drafters, self.sync = target, drafters, sync
        self.passing = {arm: drafter for arm, drafter in drafters.items() if drafter.passes}
        self.requests = min(requests, len(target.slot_table) - 1)  # a rank of several may hold fewer requests
        graphs = target.runner.decode_cuda_graph_runner
        self._graphs = graphs if isinstance(graphs, VerifyGraphs) else None
        repeats, of = (REPEATS, median) if self._graphs else (TIMINGS, min)
        self._time = partial(measure, clock=clock, repeats=repeats, of=of)

    @property
    def keeps(self) -> bool:
        """Whether prices are kept for later starts of the same server."""
        return self._graphs is not None and self.target.peers.size == 1

    def key(self, size: int) -> dict[str, str]:
        """Return all that prices depend on, as text by name. size: number of processes that serve the model."""
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
            # The memory of a pass shows how many rows its head has, which no configuration holds.
            "drafters": {
                arm: f"{d.lengths} {d.captured_bytes(self.requests)} {_digest(d.model.config)}"
                for arm, d in self.passing.items()
            },
            "fp8": [arm for arm, d in with_kv(self.drafters).items() if d.model.quantised],
            "sizes": [*self._rows(), *self._contexts(), *self._tokens()],
            "versions": f"{supported.installed()} {__version__} {torch.__version__} {_kernels()}",
            "measured": "plain rounds apart, without the host's issuing",
        }
        return {name: str(value) for name, value in values.items()}

    def tables(self) -> CostTables:
        """Measure the prices of all work. Waits for the device."""
        (sizes, most), (short, long), steps = self._rows(), self._contexts(), self._graphs is not None
        verification = partial(self._verification, most)
        verifications = Verifications.measured(short, long, sizes, verification, steps=steps)
        wider, plain = dict[int, Verifications](), None
        if self._graphs is not None:
            wider = {above: self._wider(verifications, above, sizes, most) for above in self._widths()}
            alone = [rows for rows in sizes if rows <= (self.target.rows_for(most, most) or most)]
            plain = Verifications.measured(short, long, alone, partial(verification, plain=True))
        groups, drafts, shorter = self._grid(self.requests), dict[str, Sizes](), dict[str, dict[int, Sizes]]()
        for arm, drafter in self.passing.items():
            lengths = {n: Sizes.measured(groups, partial(self._pass, drafter, n), steps=steps) for n in drafter.lengths}
            drafts[arm], shorter[arm] = lengths.pop(drafter.max_drafts), lengths
        # Otherwise the scheduler would wait for the last of these forwards in place of the first prefill.
        self.target.runner.shared_read_done_event = None
        tokens = self._tokens()
        catch_up = {arm: Sizes.measured(tokens, partial(self._catch_up, arm), steps=steps) for arm in self.sync.arms}
        return CostTables(verifications, drafts, catch_up, shorter, wider, plain)

    @property
    def _widest(self) -> int:
        """Return the largest number of rows that a request verifies."""
        return widest_of(self.drafters) + 1

    def _rows(self) -> tuple[list[int], int]:
        """Return the row counts to time verifications with, and the most requests of a verification. With graphs, both
        are the graphs' own."""
        if self._graphs is not None:
            return self._graphs.capture_num_tokens, self._graphs.requests
        return self._grid(most_rows(self.requests, self._widest)), self.requests

    def _grid(self, most: int) -> list[int]:
        """Return sizes of work to time, ascending to `most`: a few of them without graphs."""
        if self._graphs is not None:
            return graded(most)
        return sorted({*(size for size in SPARSE if size < most), min(most, SPARSE[-1])})

    def _contexts(self) -> tuple[int, int]:
        """Return the shorter and the longer sum of contexts, in tokens, to time verifications with."""
        latent = self.target.runner.model_config.attention_arch == AttentionArch.MLA
        most = min(self.target.context_len - self._widest, self.target.kv_slots)
        long = min(most, EAGER if self._graphs is None else WALKED if latent else LONGEST)
        return (long // SHORTER if latent or long < 2 * FLAT else FLAT), long

    def _widths(self) -> list[int]:
        """Return, in a list, the most rows of a request for attention's smaller tile; empty if no request has more."""
        config, parallel = self.target.runner.model_config, get_parallel()
        heads = config.get_max_num_attention_heads() // parallel.attn_tp_size
        rows = NARROW // (heads // config.get_num_kv_heads(parallel.attn_tp_size))
        return [rows] if 0 < rows < self._widest and config.attention_arch != AttentionArch.MLA else []

    def _wider(self, narrow: Verifications, above: int, sizes: Sequence[int], most: int) -> Verifications:
        """Return prices of verifications with more than `above` rows a request. narrow: of the others. most: requests.

        They are timed at the longer context only: the extra time of the larger tile is proportional to the context.
        """
        near, far = narrow.at_short, narrow.at_long

        def added(rows: int) -> float:
            count = max(rows // (above + 1), -(-rows // self._widest))  # graphs have no wider requests
            if count >= most or rows <= count * above:
                return 0.0
            return self._verification(count, rows, narrow.long) - far.at(rows)

        more = {rows: max(added(rows), 0.0) for rows in sizes if rows > above}
        return Verifications(
            narrow.short,
            narrow.long,
            Sizes.measured(more, lambda rows: near.at(rows) + more[rows] * narrow.short / narrow.long),
            Sizes.measured(more, lambda rows: far.at(rows) + more[rows]),
        )

    def _tokens(self) -> list[int]:
        """Return the numbers of tokens to time catch-ups with."""
        most = self.requests * self._widest
        return self.sync.sizes(most) if self._graphs else self._grid(most)

    def _pass(self, drafter: Drafter, length: int, requests: int) -> float:
        return self._time(partial(drafter.draft, self._batch(drafter, length, requests)))

    def _batch(self, drafter: Drafter, length: int, requests: int) -> DraftBatch:
        """Return a batch of `requests` made-up requests, with at most `length` drafts each."""
        table, context = self.target.slot_table, min(CONTEXT, self.target.context_len)
        rows = torch.arange(requests, device=table.device)
        starts, caps, bonus = (torch.full_like(rows, n) for n in (context, drafter.max_drafts, 0))
        calibration = torch.tensor(drafter.calibration((), FULL_LENGTH), dtype=torch.float32, device=rows.device)
        reads_tail, place = drafter.tail_width > 0, drafter.place(requests)
        rows, starts, bonus, caps, tail, calibration = self.sync.rings.inputs(
            None, rows, starts, bonus, caps, calibration, wanted=drafter.features, tail=reads_tail, into=place
        )
        limits, ids = [length] * requests, range(requests)
        return DraftBatch(rows, starts, bonus, tail, table, context, caps, limits, ids, calibration)

    def _catch_up(self, arm: str, tokens: int) -> float:
        return self._time(self.sync.idle(arm, tokens))

    def _verification(self, requests: int, rows: int, context: int, *, plain: bool = False) -> float:
        """Return the seconds of a verification: `rows` rows of up to `requests` requests with `context` tokens in all.

        plain: in the graph of rounds without drafts, with one row for each request; else in a verification's graph.
        """
        if prefills_only():  # SGLang gives recurrent layers no room for a verification there
            return 0.0
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
            return target.verify(target.batch_of(ids, starts, on_host), block, verify_lens, most)

        with _spread_slots(target, count, each + max(widths)):
            block = prepare_mixed_block(bonus, drafts, verify_lens, starts, ids, target.slot_table, rows=rows)
            return self._time(verify)


@contextmanager
def _spread_slots(target: Target, requests: int, columns: int) -> Iterator[None]:
    """Give made-up requests in rows 1, 2, … slots of their own for `columns` tokens, as far as there are slots, also in
    a pool of windowed layers.
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
    """Return a digest of the kernels' sources, since the version number of a checkout does not change with them."""
    return _digest([source.read_bytes() for source in sorted(Path(whiflash_kernels.__file__).parent.rglob("*.py"))])


def _digest(thing: object) -> str:
    return blake2b(str(thing).encode(), digest_size=8).hexdigest()
