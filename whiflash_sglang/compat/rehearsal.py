"""The largest sampled verification, once at the start.

Greedy verifications need little beside the graph that they replay. A sampled one copies the logits of all its rows and
sorts probabilities: at the largest batch that is more memory than anything else that serving asks for, and it may come
first when the KV pool has taken the rest. So the pool leaves it room (`sampling_bytes`), and the scheduler lets the
worker run it before the first request: what does not fit ends the start, not a request.
"""

from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from whiflash_sglang.errors import ConfigError

LOGIT_BYTES = 26
"""Bytes that sampling may take at its peak for one logit, the copy that it works in included. The way that sorts,
torch's own top-k and top-p, is held to it by `tests/worker/test_rehearsal.py`; FlashInfer's sorts nothing.
"""


def sampling_bytes(rows: int, vocabulary: int) -> int:
    """What sampling `rows` rows takes at its peak."""
    return rows * vocabulary * LOGIT_BYTES


def rehearse_sampling(runner: Any, rows: int) -> None:
    """Sample `rows` rows with everything on that takes memory, on the runner's device.

    Raises:
        ConfigError: there is no room for it.
    """
    vocabulary, device = runner.model_config.vocab_size, runner.device
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
