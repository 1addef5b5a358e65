"""Reserve memory before SGLang sizes its pools: for draft KV and rings, for slots beyond a request's text, and for
sampling the largest verification, which is tried once at the start.

SGLang sizes its KV pool from bytes per token and a fixed overhead. Drafters keep KV beside every target slot, and the
rings are allocated up front, so both numbers grow by what the worker reserves.

A decoding request holds slots for two blocks beyond its text, but with pages of one token a row of the request table
has room for little more than one beyond the context, so that near its end the write would leave the row.

Greedy verifications need little memory beside the graph that they replay. A sampled one copies logits, a few rows at a
time, and sorts probabilities, and the first may come when the KV pool has taken the rest. So the pool leaves room for
it (`sampling_bytes`), and the worker runs it before the first request: if it does not fit, the start fails and not a
request.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.mem_cache import kv_cache_configurator
from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode
from sglang.srt.model_executor import pool_configurator
from sglang.srt.runtime_context import get_disagg, get_spec
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from whiflash_sglang.cache.tokens import SamplingRows, StopTable, TokenTable
from whiflash_sglang.engine.carried import serves_ours
from whiflash_sglang.engine.forward import graphs, sampling
from whiflash_sglang.engine.launch import refusals
from whiflash_sglang.engine.patching import around
from whiflash_sglang.engine.scheduler.releases import our_worker
from whiflash_sglang.errors import ConfigError

LOGIT_BYTES = 26
"""Bytes that sampling may take at its peak for one logit, its working copy included. `tests/worker/test_rehearsal.py`
checks this for torch's own top-k and top-p, which sort; FlashInfer's do not.
"""


NARROW = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
"""Dtypes of draft KV in 8 bits, by `--speculative-draft-kv-cache-dtype`."""


def draft_kv_dtype(target: Any) -> torch.dtype:
    """Return the dtype of drafters' KV: 8 bits if the argument says so, or by default if the target's KV has 8 and the
    kernels can read it.

    Raises ConfigError if the argument names what the GPU's kernels cannot read.
    """
    name = get_spec().speculative_draft_kv_cache_dtype
    by_default = target.runner.kv_cache_dtype if name in (None, "auto") else target.dtype
    dtype = NARROW.get(name, by_default if by_default in NARROW.values() else target.dtype)
    device = torch.device(target.device)
    if dtype != NARROW["fp8_e4m3"] or device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9):
        return dtype
    if name not in NARROW:
        return target.dtype
    raise ConfigError(  # Triton converts this type from Ada on
        "--speculative-draft-kv-cache-dtype fp8_e4m3 needs a GPU of compute capability 8.9 or later; give fp8_e5m2 "
        "or bf16"
    )


def sampling_bytes(rows: int, vocabulary: int) -> int:
    """Return the bytes that sampling `rows` rows takes at its peak."""
    return min(rows, sampling.SAMPLED_ROWS) * vocabulary * LOGIT_BYTES


def rehearse_sampling(runner: Any, rows: int) -> None:
    """Sample `rows` rows, or as many as are sampled at once, with all options that take memory, on the runner's
    device.

    Raises:
        ConfigError: the device has no memory left for it.
    """
    vocabulary, device, rows = runner.model_config.vocab_size, runner.device, min(rows, sampling.SAMPLED_ROWS)
    info = SamplingBatchInfo(
        temperatures=torch.ones((rows, 1), device=device),
        top_ps=torch.full((rows,), 0.95, device=device),
        top_ks=torch.full((rows,), vocabulary // 2, dtype=torch.int32, device=device),
        min_ps=torch.full((rows,), 0.01, device=device),
        is_all_greedy=False,
        is_any_greedy=False,
        need_top_p_sampling=True,
        need_top_k_sampling=True,
        need_min_p_sampling=True,
        vocab_size=vocabulary,
    )
    positions = torch.zeros(rows, dtype=torch.int64, device=device)
    try:
        logits = torch.zeros((rows, vocabulary), device=device)
        runner.sampler(LogitsProcessorOutput(next_token_logits=logits), info, False, [], [], positions)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"no memory is left to sample {rows} rows of {vocabulary} logits, as the largest batch does; lower "
            "--mem-fraction-static or --max-running-requests"
        ) from error


logger = logging.getLogger("whiflash_sglang")


@dataclass(slots=True)
class Reservation:
    """Memory that a worker asks for: bytes per KV slot, and bytes independent of the slots.

    rows: of the largest verification. whole: bytes of a KV slot of target and drafters, once the pools are sized.
    """

    per_token: int
    fixed: int
    rows: int
    whole: int = 0


def reserve(
    parts: Mapping[str, int], *, per_token: int, requests: int, widest: int, device: torch.device
) -> Reservation:
    """Return the worker's reservation, which it makes before the pools are sized.

    Args:
        parts: bytes that the worker allocates for `requests` requests, by name. per_token: bytes of the drafters' KV.
            widest: most rows of a request.
    """
    reservation = Reservation(per_token, sum(parts.values()), requests * widest)
    if device.type == "cuda":
        logger.info(
            "WHIFLASH keeps %.2f GB beside KV, for %d requests of %d rows: %s",
            reservation.fixed / 1e9,
            requests,
            widest,
            ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items()),
        )
    return reservation


def request_rows(requests: int) -> int:
    """Return the rows of the request table for `requests` running ones. A decode server has more, for arriving ones."""
    disaggregation = get_disagg()
    decodes = disaggregation.disaggregation_mode == "decode"
    return requests + 1 + (disaggregation.disaggregation_decode_extra_slots or 0 if decodes else 0)


def for_requests(target: Any, requests: int, widest: int, end_bytes: int) -> dict[str, int]:
    """Return the bytes, by part, that `requests` requests take beside their rings: tables, graphs and sampling.

    Upstream sizes its reserve for graphs and activations by requests and by the prefill's chunk. It does not include
    verified rows: their logits in 32 bits, each graph's features, and the sampling of all rows. On a CPU no pool is
    sized by the memory that is left, so that part is left out there.

    Args:
        target: the wrapped target, whose capture has been set. widest: most rows of a request. end_bytes: what the end
            of a graph keeps of one request.
    """
    columns = target.context_len + int(kv_cache_configurator.get_req_to_token_extra_context_len())
    rows = request_rows(requests)
    tables = (TokenTable(rows, columns, widest, "meta").data, StopTable(rows, "meta").few)  # without memory
    table = sum(part.nbytes for part in (*tables, *SamplingRows(rows, 0, "meta").data))
    if target.device.type != "cuda":
        return {"tables": table}
    vocabulary, kept = target.shape.vocab_size, 0
    if graphs.enabled(target.device):
        # SGLang's own reserve for graphs covers attention's tables.
        kept = graphs.bytes_for(requests, widest, vocabulary=vocabulary, row_bytes=target.row_bytes + end_bytes)
    return {"tables": table, "graphs": kept, "sampling": sampling_bytes(graphs.most_rows(requests, widest), vocabulary)}


@around(
    "sglang.srt.state_capturer.base:BaseTopkCapturer.__init__",
    params=("max_batch_size",),
    why="SGLang sizes records of a forward by prefills and requests",
    until="it sizes them by verified rows",
)
def _holding_verified_rows(original: Any, self: Any, *args: Any, max_batch_size: int, **named: Any) -> None:
    """Make records of a forward (routed experts, an indexer's choices) large enough for all verified rows."""
    worker = our_worker()
    rows = 0 if worker is None else worker.reservation.rows
    original(self, *args, max_batch_size=max(max_batch_size, rows), **named)


@around(
    "sglang.srt.mem_cache.kv_cache_configurator:get_req_to_token_extra_context_len",
    why="near the context's end two blocks are reserved and one has room",
    until="SGLang makes rows as long as it reserves",
)
def _holding_the_reserve(original: Any) -> int:
    """Make the request table's rows long enough for the KV slots that a decode step reserves. Returns the columns
    beyond the context.
    """
    return max(int(original()), get_alloc_reserve_per_decode() if serves_ours() else 0)


@around(
    "sglang.srt.model_executor.pool_configurator:create_memory_pool_configurator",
    params=("kvc",),
    why="SGLang sizes pools for its own drafters only",
    until="a worker may reserve bytes",
)
def _accounting(original: Any, kvc: Any, *args: Any, **kwargs: Any) -> Any:
    """Leave room for draft KV and rings when SGLang sizes its pools."""
    configurator = original(kvc, *args, **kwargs)
    worker = our_worker()
    if worker is None or kvc.is_draft_worker:
        return configurator
    reservation: Reservation = worker.reservation
    if isinstance(configurator, pool_configurator.HybridSWAPoolConfigurator):
        # Draft KV is at the slots of layers that see the whole context. Upstream has no fixed bytes here.
        configurator._draft_cell_size += reservation.per_token
        configurator._recompute_cell_size()
        calculate = configurator.calculate_pool_sizes
        configurator.calculate_pool_sizes = lambda available_bytes, page_size: calculate(
            max(available_bytes - reservation.fixed, 0), page_size
        )
    elif type(configurator) is pool_configurator.DefaultPoolConfigurator:
        configurator._cell_size += reservation.per_token
        configurator._fixed_overhead_bytes += reservation.fixed
    else:
        raise ConfigError(
            f"WHIFLASH cannot size drafters' KV beside this target's cache ({type(configurator).__name__}): "
            "serve this target without WHIFLASH"
        )
    reservation.whole = int(configurator._cell_size)
    if refusals.has_windows(kvc.model_config) and not kvc.is_hybrid_swa:
        logger.info(
            "WHIFLASH keeps the KV of windowed layers for the whole context: %d bytes a token with the drafters'; "
            "--swa-full-tokens-ratio gives them a pool of their own",
            reservation.whole,
        )
    return configurator
