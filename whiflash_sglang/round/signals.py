"""Read a policy's signals, and log-probabilities, off verified rows. Imports no SGLang."""

from collections.abc import Callable, Collection

import torch
from whiflash_kernels import Committed, SamplingTable, router_mlp, routing_stats

from whiflash_sglang.formats.router import Layers
from whiflash_sglang.records.core import Verified

RATED_ROWS, RATED_BYTES = 128, 10
"""Largest number of rows that are rated at once; bytes that each of their logits takes at the peak."""


class SignalReader:
    """Computes the signals and log-probabilities of a round for the host, in a verification's graph or after it.

    Args:
        router: the bundle's router, None if no policy may need one. sampling: `SamplingRows.data`. scales: whether
            logits are divided by the temperature before log-probabilities.
    """

    def __init__(self, router: Layers | None, sampling: SamplingTable, scales: Callable[[], bool]) -> None:
        self._router, self._sampling, self._scales = router, sampling, scales

    def read(self, rows: Verified, committed: Committed, needs: Collection[str]) -> dict[str, torch.Tensor]:
        """Return the signals that a policy `needs`, at the last committed row of each request, and log-probabilities.

        `entropy` [B] of the target's distribution; `outputs` [B, K] of the router. `rates` as in `_rates`, if requests
        asked. Signals that a graph has computed are taken from `rows.signals`.
        """
        readers = {"entropy": self._entropy, "outputs": self._outputs, "rates": self._rates}
        wanted = "entropy" in needs, "delta" in needs, rows.rated is not None
        return {
            name: rows.signals[name] if name in rows.signals else reader(rows, committed)
            for (name, reader), reads in zip(readers.items(), wanted, strict=True)
            if reads
        }

    def _entropy(self, rows: Verified, committed: Committed) -> torch.Tensor:
        if rows.entropy is not None:
            return rows.entropy[committed.last_rows]
        return routing_stats(rows.logits, committed.last_rows)[0]

    def _outputs(self, rows: Verified, committed: Committed) -> torch.Tensor:
        if self._router is None or rows.final_hidden is None:
            raise AssertionError("no policy needs a router that was not loaded")
        return router_mlp(rows.final_hidden[committed.last_rows], *self._router)

    def _rates(self, rows: Verified, committed: Committed) -> torch.Tensor:
        """Return [A, W, 1 + I + 2K] float32: for A requests and W committed tokens, log-probabilities of the token, of
        I ids that the request names, of the K likeliest tokens; then the ids of these K, as int32 bits.
        """
        assert rows.rated is not None
        parts = torch.split(rows.rated.ids, max(RATED_ROWS // committed.tokens.shape[1], 1))
        return torch.cat([self._rates_of(part, rows.rated.likeliest, rows, committed) for part in parts])

    def _rates_of(self, asked: torch.Tensor, likeliest: int, rows: Verified, committed: Committed) -> torch.Tensor:
        """Return `_rates` of the requests in `asked` [A, 1 + I], computed as SGLang's speculative workers do."""
        request, tokens = asked[:, 0].clamp(max=len(committed.tokens) - 1), committed.tokens
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        packed = (rows.indptr[request][:, None] + columns).clamp_(max=len(rows.logits) - 1)
        x = rows.logits[packed].float()
        if rows.masks is not None:
            words = rows.masks[0][rows.masks[1][packed]]
            shifts = torch.arange(32, dtype=torch.int32, device=words.device)
            bits = (words[..., None] >> shifts).bitwise_and_(1)
            x.masked_fill_((bits == 0).flatten(2)[..., : x.shape[2]], -torch.inf)
        if self._scales():
            temperature, top_k = self._sampling.parameters[rows.request_rows[request], :2].unbind(1)
            x /= torch.where(top_k > 1, temperature, 1.0)[:, None, None]
        x = x.log_softmax(-1).clamp_(min=torch.finfo(x.dtype).min)
        top = x.topk(likeliest)
        named = torch.cat([tokens[request][..., None], asked[:, None, 1:].expand(-1, len(columns), -1)], 2)
        return torch.cat([x.gather(2, named), top.values, top.indices.int().view(x.dtype)], 2)
