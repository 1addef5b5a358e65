"""Sample every verified position from its logits, under its request's own parameters.

`whiflash_kernels.sample_rows` draws from the logits, in which bias and penalties are. If SGLang's sampler must draw
(`is_seeded`), it runs on the packed rows with the requests' parameters repeated row by row: what plain decoding would
have sampled at a position is what is sampled here. Drafts are deterministic, so accepting while the draft agrees
leaves the output distribution exactly the target's.
"""

import dataclasses
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.layers import sampler
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.runtime_context import get_exec
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.utils.async_probe import sanitize_nan_logits
from whiflash_kernels import MixedBlock

from whiflash_sglang.cache.penalties import Penalties
from whiflash_sglang.device.transfers import Upload, sent
from whiflash_sglang.engine.forward.processors import own_grammar
from whiflash_sglang.records.core import RatesAsked

SAMPLED_ROWS = 128
"""Most rows that SGLang's sampler gets at once. They fill a GPU with vocabularies of any usual size."""


def is_seeded(batch: Any) -> bool:
    """Whether SGLang's own sampler must draw, since its seeds are keyed by ranks of sorted probabilities."""
    info = batch.sampling_info
    return info.sampling_seed is not None and not info.is_all_greedy


def checks_numbers() -> bool:
    """Whether SGLang's environment asks that NaN among logits be found or replaced (`check_numbers`)."""
    asked = (envs.SGLANG_SANITIZE_NAN_LOGITS, envs.SGLANG_ENABLE_NAN_LOGITS_CHECK, envs.SGLANG_ENABLE_ASYNC_ASSERT)
    return any(switch.get() for switch in asked)


def check_numbers(logits: torch.Tensor) -> None:
    """Apply SGLang's settings for NaN to logits in place: raise an error, replace it, or both."""
    sanitize_nan_logits(logits, "verify: target model logits")


def parameters(req: Any) -> tuple[float, float, float, float]:
    """Return temperature, top_k, top_p and min_p of a request in the form of `SamplingTable`.

    If any request of a batch has min_p, SGLang's FlashInfer sampler takes top_p of what top_k keeps, for all of them.
    Here only the request's own min_p decides that, so that its text does not depend on its neighbours.
    """
    p, sequential = req.sampling_params, get_exec().kernel.sampling_backend == "flashinfer"
    return p.temperature, p.top_k, p.top_p, -p.min_p if sequential else p.min_p


def penalties_of(req: Any) -> Penalties | None:
    """Return penalties and bias of a request; None if its logits stay as they are."""
    p, answer = req.sampling_params, len(req.origin_input_ids)
    if not (is_penalised(req) or p.logit_bias):
        return None
    bias = {int(token): value for token, value in (p.logit_bias or {}).items()}
    factors = p.frequency_penalty, p.presence_penalty, p.repetition_penalty
    return Penalties(*factors, bias, answer, answer + p.min_new_tokens, stop_ids(req))


def is_penalised(req: Any) -> bool:
    """Whether a request's next token depends on how often it generated each token, or how many in all."""
    p = req.sampling_params
    return bool(p.frequency_penalty or p.presence_penalty or p.repetition_penalty != 1.0 or p.min_new_tokens > 0)


def takes_single_tokens(req: Any) -> bool:
    """Whether a token can be judged only after the scheduler has processed the one before it.

    A client's own processor reads its request, and may keep state from one call to the next: it must be called once a
    token, as the text is then. "last" hidden states are of the token that ends the text, which the scheduler finds.
    """
    p = req.sampling_params
    ends_in_text = bool(p.stop_strs or p.stop_regex_strs)
    return bool(req.custom_logit_processor or (req.return_hidden_states == "last" and ends_in_text))


def asked_rates(batch: Any) -> RatesAsked:
    """Return the requests of a batch that want log-probabilities; a negative number of likeliest tokens counts as 0."""
    if not batch.return_logprob:
        return {}
    wanted = zip(batch.reqs, batch.top_logprobs_nums, batch.token_ids_logprobs, strict=True)
    return {i: (max(n, 0), ids or ()) for i, (req, n, ids) in enumerate(wanted) if req.return_logprob}


def scales_rates() -> bool:
    """Whether log-probabilities are of logits divided by temperature, as SGLang's environment says."""
    return not sampler.SGLANG_RETURN_ORIGINAL_LOGPROB


def process(info: SamplingBatchInfo, logits: torch.Tensor, block: MixedBlock) -> None:
    """Have clients' own processors change the logits of their requests' rows, [T, V], in place."""
    for entry in (info.custom_logit_processor or {}).values():
        rows = block.qo_indptr[entry.indices].long()  # such a request has one (`takes_single_tokens`)
        params = [info.custom_params[i] for i in entry.rows]
        logits.index_copy_(0, rows, entry.processor(logits[rows], params).to(logits.dtype))


def sample_as_sglang(runner: Any, info: SamplingBatchInfo, logits: torch.Tensor, block: MixedBlock) -> torch.Tensor:
    """Return the token that SGLang's sampler draws at each packed row of `logits` [T, V]: [T] int64.

    A few rows at a time, since it takes much memory for each logit.

    Args:
        runner: the target's model runner. info: of the requests.
    """
    owner, sampled = block.request_of_row, []
    for begin in range(0, len(owner), SAMPLED_ROWS):
        few = slice(begin, begin + SAMPLED_ROWS)
        part = LogitsProcessorOutput(next_token_logits=logits[few].clone())
        sampled.append(runner.sampler(part, _expand(info, owner[few]), False, [], [], block.positions[few]))
    return torch.cat(sampled).to(torch.int64)


def count_earlier_output(batch: Any) -> None:
    """Penalise retracted requests, before a prefill, for the tokens that they had generated, too.

    Upstream's penalisers know a request since its last prefill, so its plain decoding forgets there what was generated
    before, and a text depends on who else was served. Here the text is that of uninterrupted plain decoding.
    `batch.sampling_info` is upstream's copy for one forward, whose penalties are replaced.
    """
    reqs, info = batch.reqs, batch.sampling_info
    if not any(req.output_ids and is_penalised(req) for req in reqs):
        return
    upload, device = Upload(), info.temperatures.device
    for name in ("frequency_penalty", "presence_penalty", "repetition_penalty"):
        upload.floats([getattr(req.sampling_params, name) for req in reqs])
    for req in reqs:
        upload.ints(req.output_ids)
    on_device = upload.send(device)
    frequency, presence, repetition = (each[:, None] for each in on_device[:3])
    counts = torch.zeros((len(reqs), info.vocab_size), device=device)
    for row, output in zip(counts, on_device[3:], strict=True):
        row.scatter_add_(0, output, torch.ones_like(output, dtype=counts.dtype))
    met = counts > 0
    info.acc_scaling_penalties = torch.where(met, repetition, 1.0)
    info.acc_additive_penalties = counts.mul_(-frequency).sub_(met * presence)
    for row, req in zip(counts, reqs, strict=True):
        if len(req.output_ids) < req.sampling_params.min_new_tokens:
            row.index_fill_(0, sent(stop_ids(req), device), -torch.inf)


def _expand(info: SamplingBatchInfo, owner: torch.Tensor) -> SamplingBatchInfo:
    """Return the requests' parameters with one entry per packed row, without those that change logits."""
    return dataclasses.replace(
        info,
        grammars=None,
        has_custom_logit_processor=False,
        temperatures=info.temperatures[owner],
        top_ps=info.top_ps[owner],
        top_ks=info.top_ks[owner],
        min_ps=info.min_ps[owner],
        sampling_seed=None if info.sampling_seed is None else info.sampling_seed[owner],
    )


def stop_ids(req: Any) -> tuple[int, ...]:
    """Return the tokens that end a request, in order: those that upstream's min_new_tokens penaliser forbids."""
    ids = set(req.sampling_params.stop_token_ids or ()) | set(req.eos_token_ids or ())
    if req.tokenizer is not None:
        ids |= set(req.tokenizer.additional_stop_token_ids or ())
        if req.tokenizer.eos_token_id is not None:
            ids.add(req.tokenizer.eos_token_id)
    return tuple(sorted(i for i in ids if i is not None))


def ending_ids(req: Any) -> tuple[int, ...]:
    """Return the vocabulary's tokens that end this request: empty with ignore_eos, unless it has a grammar."""
    if req.sampling_params.ignore_eos and own_grammar(req) is None:
        return ()
    return tuple(i for i in stop_ids(req) if 0 <= i < req.vocab_size)
