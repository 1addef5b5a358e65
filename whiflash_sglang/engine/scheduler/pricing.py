"""Prices of work, measured at the start on requests that are none: the tables that routes are looked up in.

Everything is issued as it will be while serving, by the same functions, from graphs where they were captured: a
verification for every number of rows at two contexts, a draft of every arm for every size of a group, a catch-up for
every number of tokens. A clock times it (:mod:`whiflash_sglang.device.clock`): events on a GPU, or the host's.

Measured prices are kept for later starts (:mod:`whiflash_sglang.prices.kept`), under all that they depend on.

Nothing is cached yet, so the slot table and the KV slots are free to be used: verified rows read distinct slots, as
contexts do while serving, and drafts write to the padding slot.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import torch
import whiflash_kernels
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_context
from whiflash_kernels import prepare_mixed_block

from whiflash_sglang import __version__
from whiflash_sglang.arms.base import Drafter, KVDrafter, widest_of, with_kv
from whiflash_sglang.arms.profile import idle_batch, profile_drafts
from whiflash_sglang.cache.backlog import FeatureRings
from whiflash_sglang.device.capture import graded
from whiflash_sglang.device.clock import Clock, measure
from whiflash_sglang.device.ranks import Ranks
from whiflash_sglang.device.transfers import HostView
from whiflash_sglang.embedded import cache_root
from whiflash_sglang.engine import supported
from whiflash_sglang.engine.forward.graphs import VerifyGraphs, most_rows
from whiflash_sglang.engine.forward.target import Target
from whiflash_sglang.prices.costs import MeasuredCosts, WorkerCosts
from whiflash_sglang.prices.kept import KeptPrices
from whiflash_sglang.prices.tables import CostTables, LookedUpCosts, Sizes, Verifications

LONGEST = 16384
"""Tokens of context that verifications are timed with at most."""

SHORTER = 16
"""The shorter context is this part of the longer one."""

PRICED = re.compile(
    "attention|backend|compile|context|deepep|determin|dtype|eager|expert|fp32|fp8|fus|graph|layers|lm_head|lora|moe|nvls|"
    "offload|overlap|page|quant|reduce|size|symm|tf32"
)
"""Arguments of a server that may change what work takes, by their names. A price of another server would be wrong for
good; one more measurement takes seconds.
"""

Body = Callable[[], object]


class CatchUps(Protocol):
    """Members of catch-ups that are timed (`round/catch_up.py`)."""

    rings: FeatureRings
    arms: tuple[str, ...]

    def sizes(self, rows: int) -> list[int]: ...

    def idle(self, arm: str, tokens: int) -> Body: ...


def looks_up(device: torch.device) -> bool:
    """Whether prices are measured at the start and looked up: where the host's clock would time launches."""
    return device.type == "cuda"


def costs_of(device: torch.device, width: Callable[[str], int]) -> WorkerCosts:
    """Prices of routes on a device. width: as of `WorkerCosts`."""
    return LookedUpCosts(width) if looks_up(device) else MeasuredCosts(width)


def price(
    costs: WorkerCosts,
    target: Target,
    drafters: Mapping[str, Drafter],
    sync: CatchUps,
    host: HostView,
    clock: Clock,
    requests: int,
    ranks: Ranks,
) -> None:
    """Learn what `costs` must know before the first request: what an earlier start kept, or what is measured now.

    The first process looks for it and keeps it; all measure, or none does.
    """
    if isinstance(costs, LookedUpCosts):
        kept = KeptPrices(cache_root() / "prices", key_of(target, drafters, sync, requests, ranks.size))
        tables = ranks.broadcast(kept.read)
        if tables is None:
            tables = measured(target, drafters, sync, host, clock, requests)
            if ranks.leads:
                kept.write(tables)
        costs.tables = tables
    elif isinstance(costs, MeasuredCosts):
        profile_drafts(with_kv(drafters).values(), sync.rings, target.slot_table, costs, host)


def key_of(
    target: Target, drafters: Mapping[str, Drafter], sync: CatchUps, requests: int, size: int
) -> dict[str, str]:
    """All that prices depend on. requests: as of `measured`. size: processes that serve the model."""
    runner, widest = target.runner, widest_of(drafters) + 1
    values = {
        "device": _name(target.device),
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
            arm: f"{drafter.lengths} {drafter.captured_bytes(requests)} {_digest(vars(drafter)['model'].config)}"
            for arm, drafter in with_kv(drafters).items()
        },
        "sizes": [
            *_sizes(target, requests, widest),
            *_contexts(target, widest),
            *sync.sizes(requests * widest),
        ],
        "versions": f"{supported.installed()} {__version__} {torch.__version__} {_kernels()}",
    }
    return {name: str(value) for name, value in values.items()}


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _kernels() -> str:
    """Equal for kernels of the same sources: versions of a checkout have one number."""
    sources = sorted(Path(whiflash_kernels.__file__).parent.rglob("*.py"))
    return _digest([source.read_bytes() for source in sources])


def _digest(thing: object) -> str:
    return blake2b(str(thing).encode(), digest_size=8).hexdigest()


def measured(
    target: Target,
    drafters: Mapping[str, Drafter],
    sync: CatchUps,
    host: HostView,
    clock: Clock,
    requests: int,
) -> CostTables:
    """Tables for batches of up to so many requests. Waits for the device; before the first request only."""
    widest = widest_of(drafters) + 1
    sizes, most = _sizes(target, requests, widest)
    short, long = _contexts(target, widest)
    with _spread_slots(target, most, long + widest):
        verifications = Verifications.measured(
            short,
            long,
            sizes,
            lambda rows, context: measure(_verification(target, host, rows, context, most), clock),
        )
    # The scheduler would wait for the last of these verifications in place of the first prefill.
    target.runner.shared_read_done_event = None
    by_length = {
        arm: {
            length: Sizes.measured(
                graded(requests), partial(_draft, drafter, target, sync, host, clock, length)
            )
            for length in drafter.lengths
        }
        for arm, drafter in with_kv(drafters).items()
    }
    drafts = {arm: prices.pop(drafters[arm].max_drafts) for arm, prices in by_length.items()}
    tokens = sync.sizes(requests * widest)
    catch_up = {arm: Sizes.measured(tokens, partial(_catch_up, sync, arm, clock)) for arm in sync.arms}
    return CostTables(verifications, drafts, catch_up, shorter=by_length)


def _draft(
    drafter: KVDrafter,
    target: Target,
    sync: CatchUps,
    host: HostView,
    clock: Clock,
    length: int,
    requests: int,
) -> float:
    batch = idle_batch(requests, drafter, sync.rings, target.slot_table, host)
    batch = replace(batch, limits=[length] * requests)
    return measure(lambda: drafter.draft(batch), clock)


def _catch_up(sync: CatchUps, arm: str, clock: Clock, tokens: int) -> float:
    return measure(sync.idle(arm, tokens), clock)


def _sizes(target: Target, requests: int, widest: int) -> tuple[list[int], int]:
    """Rows of the verifications that are timed, and the most requests of one: the graphs' where there are any."""
    graphs = target.runner.decode_cuda_graph_runner
    if isinstance(graphs, VerifyGraphs):
        return graphs.capture_num_tokens, graphs.requests
    return graded(most_rows(requests, widest)), requests


def _contexts(target: Target, widest: int) -> tuple[int, int]:
    """Tokens of context that verifications are timed with."""
    long = min(target.context_len - widest, target.kv_slots, LONGEST)
    return long // SHORTER, long


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


def _verification(target: Target, host: HostView, rows: int, context: int, requests: int) -> Body:
    """A call that verifies `rows` rows of up to so many requests, which have `context` tokens together."""
    device = target.device
    count = min(rows, requests)
    widths = [rows // count + (i < rows % count) for i in range(count)]
    ids = torch.arange(1, count + 1, device=device)
    starts = torch.full_like(ids, max(context // count, 1))
    verify_lens = torch.tensor(widths, dtype=torch.int32, device=device)
    block = prepare_mixed_block(
        torch.zeros_like(ids),
        ids.new_zeros((count, max(widths) - 1)),
        verify_lens,
        starts,
        ids,
        target.slot_table,
        rows=rows,
    )
    on_host = starts.cpu()

    def verify() -> Any:
        target.agreed_rows(rows, count)
        batch = ScheduleBatch(
            reqs=[],
            device=str(device),
            forward_mode=ForwardMode.DECODE,
            req_pool_indices=ids,
            seq_lens=starts,
            seq_lens_cpu=on_host,
            seq_lens_sum=int(on_host.sum()),
            orig_seq_lens=starts.to(torch.int32),
            spec_algorithm=target.runner.spec_algorithm,
        )
        return target.verify(batch, block, verify_lens, widths if host.exact else None, max(widths))

    return verify
