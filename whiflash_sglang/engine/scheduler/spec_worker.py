"""Convert between SGLang's scheduler and our rounds: its contract with a speculative worker (spec v2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.runtime_context import get_schedule
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker as BaseSpecWorker  # for `serve.worker`
from sglang.srt.speculative.spec_info import SpecInput, SpecInputType

from whiflash_sglang.cache.backlog import FeatureRows
from whiflash_sglang.device.transfers import Download, Upload
from whiflash_sglang.engine.forward import sampling
from whiflash_sglang.engine.patching import become
from whiflash_sglang.records.core import PLACEHOLDERS, Rated, Results, Round, Verified, readable


@dataclass
class DraftInput(SpecInput):  # type: ignore[misc]
    """Input of a round from the last one: the bonus token and the new length of every request, on the device.

    bonus_tokens: [B] int64. new_seq_lens: [B] int64. The relay of overlap scheduling asks for the EAGLE-shaped
    fields too; they are None.
    """

    bonus_tokens: torch.Tensor
    new_seq_lens: torch.Tensor
    topk_p: torch.Tensor | None = None
    topk_index: torch.Tensor | None = None
    hidden_states: torch.Tensor | None = None
    future_indices: torch.Tensor | None = None

    def __post_init__(self) -> None:
        super().__init__(spec_input_type=SpecInputType.DFLASH_DRAFT)
        self.num_tokens_per_req = 1
        self.num_tokens_for_logprob_per_req = 1

    def filter_batch(self, new_indices: torch.Tensor, new_indices_cpu: list[int] | None = None) -> None:
        if self.future_indices is not None:
            self.future_indices = self.future_indices[new_indices]
            return
        self.bonus_tokens = self.bonus_tokens[new_indices]
        self.new_seq_lens = self.new_seq_lens[new_indices]

    def merge_batch(self, other: "DraftInput") -> None:
        if self.future_indices is not None and other.future_indices is not None:
            self.future_indices = torch.cat([self.future_indices, other.future_indices])
            return
        self.bonus_tokens = torch.cat([self.bonus_tokens, other.bonus_tokens])
        self.new_seq_lens = torch.cat([self.new_seq_lens, other.new_seq_lens])


def round_batch(batch: Any, context_len: int, under_way: Callable[[int], int]) -> Round:
    """Make a round of SGLang's decode batch. under_way: by row id, the most tokens that unfinished rounds add."""
    row_ids = row_ids_of(batch)
    least, most = _lengths(batch, row_ids, under_way)
    budgets = [
        1
        if sampling.takes_single_tokens(r)
        else min(r.sampling_params.max_new_tokens - len(r.output_ids), context_len - 1 - n)
        for r, n in zip(batch.reqs, most, strict=True)
    ]
    return Round(
        batch.req_pool_indices.to(torch.int64),
        row_ids,
        batch.seq_lens.to(torch.int64),
        least,
        most,
        batch.spec_info.bonus_tokens.to(torch.int64),
        list(batch.reqs),
        [max(budget, 1) for budget in budgets],
    )


def _lengths(batch: Any, row_ids: Sequence[int], under_way: Callable[[int], int]) -> tuple[list[int], list[int]]:
    """Return lower and upper bounds of each request's n; both exact if the attention backend needs host lengths."""
    if batch.seq_lens_cpu is not None:
        exact = batch.seq_lens_cpu.tolist()
        return exact, exact
    known = [req.kv.kv_committed_len for req in batch.reqs]
    rows = [under_way(row) for row in row_ids]
    least = [n + min(more, 1) for n, more in zip(known, rows, strict=True)]
    return least, [n + more for n, more in zip(known, rows, strict=True)]


def row_ids_of(batch: Any) -> list[int]:
    """Return the requests' rows of the request table."""
    indices = batch.req_pool_indices if batch.req_pool_indices_cpu is None else batch.req_pool_indices_cpu
    rows: list[int] = indices.tolist()
    return rows


def prefill_rows(
    batch: Any,
    input_ids: torch.Tensor,
    features: torch.Tensor,
    next_token_ids: torch.Tensor,
    upload: Upload,
    read: torch.Tensor | None = None,
) -> tuple[FeatureRows, list[int], torch.Tensor, torch.Tensor]:
    """Describe an extend batch to the drafters. Facts that the device does not know go there with `upload`.

    Each row has the token that follows it. The last row of a chunk takes it from the text if that goes on (prompt, or
    output before a retraction), else the sampled one. Before a position of an image it is 0, and the position's
    embedding comes from `read` [tokens, H], the target's input, unless it is in the next chunk.

    Returns the packed rows, each request's number of tokens with KV after this batch, its last packed row [B] and the
    token after that row [B], below 0 for a position of an image (`core.readable`).
    """
    lens, prefixes = list(batch.extend_lens), list(batch.prefix_lens)
    lengths = [prefix + length for prefix, length in zip(prefixes, lens, strict=True)]
    texts = [req.full_untruncated_fill_ids for req in batch.reqs]
    following = [readable(text[: n + 1], n)[0] if n < len(text) else -1 for text, n in zip(texts, lengths, strict=True)]
    places = np.concatenate([np.arange(n - length, n) for n, length in zip(lengths, lens, strict=True)])
    at = [upload.ints(values) for values in (np.cumsum(lens) - 1, following, places)]
    if any(media is not None for media in batch.multimodal_inputs or ()):
        chunks = zip(texts, prefixes, lengths, strict=True)
        ahead = [np.asarray(text[begin + 1 : end]) >= PLACEHOLDERS for text, begin, end in chunks]
        at.append(upload.ints(np.concatenate([np.append(image, False) for image in ahead])))
    ints = upload.send(input_ids.device)
    last_rows, known, positions, *images = (ints[i] for i in at)
    next_tokens = torch.empty_like(input_ids, dtype=torch.int64)
    next_tokens[:-1] = input_ids[1:]
    after = torch.where(known == -1, next_token_ids.to(torch.int64), known)
    next_tokens[last_rows] = after.clamp(min=0)
    rows = FeatureRows(features, positions, batch.out_cache_loc.to(torch.int64), next_tokens, runs=lens)
    if images:
        where = images[0] > 0
        next_tokens.masked_fill_(where, 0)
        rows = replace(rows, images=None if read is None else (where, read[: len(where)].roll(-1, 0)))
    return rows, lengths, last_rows, after


class Chances(list[torch.Tensor]):
    """Log-probabilities of committed tokens, by request. They may still be on their way to the host."""

    def tolist(self) -> list[list[float]]:
        """Return the log-probabilities as lists. SGLang calls this, since it takes the object for a tensor."""
        return [chances.tolist() for chances in self]


def put_rates(output: Any, rates: torch.Tensor, rated: Rated, requests: int) -> None:
    """Write a round's log-probabilities into `output` in SGLang's form: per request one entry per column of `rates`.

    Args:
        output: SGLang's record of the logits. rates: as in `SignalReader.read`, or a copy that is on its way.
    """
    width, names = rates.shape[1], rated.ids.shape[1] - 1
    _, named, values, ids = rates.split([1, names, *[(rates.shape[2] - 1 - names) // 2] * 2], dim=2)
    ids, nothing = ids.view(torch.int32), rates.new_empty(0)
    chosen = Chances([nothing] * requests)
    beside: list[list[Any]] = [[nothing] * (requests * width) for _ in range(4)]
    for own, (index, (likeliest, asked)) in enumerate(rated.requests.items()):
        chosen[index], columns = rates[own, :, 0], slice(index * width, (index + 1) * width)
        beside[0][columns], beside[1][columns] = (each[own, :, :likeliest].unbind() for each in (values, ids))
        beside[2][columns], beside[3][columns] = named[own, :, : len(asked)].unbind(), [list(asked)] * width
    output.next_token_logprobs = chosen
    output.next_token_top_logprobs_val, output.next_token_top_logprobs_idx = beside[:2]
    output.next_token_token_ids_logprobs_val, output.next_token_token_ids_logprobs_idx = beside[2:]


class RoundResult(GenerationBatchResult):  # type: ignore[misc]
    """The result of a round, whose tensors come to the host in one buffer."""

    results: Download[Results]
    rated: Rated | None

    def copy_to_cpu(self, *args: Any, **named: Any) -> None:
        """Copy the result to the host. Upstream alone would copy the buffer's tensors again, field by field."""
        self.next_token_ids, self.accept_lens, self.cap_lens = torch.empty(0), None, None
        super().copy_to_cpu(*args, **named)
        results, at = self.results, self.results.at

        def here(place: Any) -> torch.Tensor:
            """Return a tensor of the buffer on the host: on its way there if SGLang carries it, else copied now."""
            field = results[place]
            return field if field.device.type == "cpu" else field.cpu()

        self.next_token_ids = here(at.tokens).reshape(-1)
        self.accept_lens, self.cap_lens = here(at.accept_lens), here(at.widths)
        if self.rated is not None:
            put_rates(self.logits_output, here(at.rates), self.rated, len(self.accept_lens))
            results.at = at._replace(rates=None)  # only SGLang reads them


def round_result(verified: Verified, results: Download[Results]) -> GenerationBatchResult:
    """Return the record that the scheduler reads: `stride` columns of tokens per request, of which accept_lens count.
    Its other fields are the forward's.

    The number of drafts differs from request to request: `cap_lens`, upstream's field for it, has the verified rows.
    """
    at, tokens, seq_lens = results.at, results[results.at.tokens], results[results.at.seq_lens]
    made = replace(
        verified.forward,
        next_token_ids=tokens.reshape(-1),
        accept_lens=results[at.accept_lens],
        cap_lens=results[at.widths],
        num_non_draft_tokens_per_req=1,
        next_draft_input=DraftInput(results[at.bonus], seq_lens),
        speculative_num_draft_tokens=tokens.shape[1],
        speculative_output_stride=tokens.shape[1],
        new_seq_lens=seq_lens,
    )
    # The results are needed later if SGLang carries them or takes log-probabilities from them.
    if results.learn is not None or verified.rated is not None:
        become(made, RoundResult)
        made.results, made.rated = results, verified.rated
    return made


def idle_result(device: torch.device) -> GenerationBatchResult:
    """Return the result of a round without requests."""
    empty = torch.empty((0,), dtype=torch.int64, device=device)
    return GenerationBatchResult(
        next_token_ids=empty,
        accept_lens=empty.to(torch.int32),
        next_draft_input=DraftInput(empty, empty),
        speculative_num_draft_tokens=1,
        new_seq_lens=empty,
    )


def max_running_requests() -> int:
    """Return the largest number of requests that run at once, as the scheduler resolved it."""
    return int(get_schedule().max_running_requests)
