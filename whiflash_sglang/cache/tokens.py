"""Tables of running requests on the device: their text, which penalties and copies read, stops, sampling and draft KV.

The host's lists lag behind rounds that are still running; these tables do not.
"""

from collections.abc import Sequence
from random import Random

import numpy as np
import torch
from whiflash_kernels import KVPools, SamplingTable
from whiflash_kernels.float8 import rounded
from whiflash_kernels.layers import write_rows

from whiflash_sglang.device.transfers import Upload


class TokenTable:
    """The text of running requests: `[request rows, context + margin]` int64; (r, p) is the token at position p <= n.

    Args:
        margin: the widest block that `put_block` may write past the context's end.
    """

    def __init__(self, rows: int, context: int, margin: int, device: torch.device | str) -> None:
        self.data = torch.zeros((rows, context + margin), dtype=torch.int64, device=device)

    def begin(self, upload: Upload, row: int, *texts: Sequence[int]) -> None:
        """Write the texts of a request, one after the other: its prompt, its output before a retraction.

        They are in the table when `upload` has been sent.
        """
        tokens = np.concatenate([np.asarray(text, dtype=np.int64) for text in texts])
        place = self.data[row, : len(tokens)]
        upload.then(upload.ints(tokens), lambda text: place.copy_(text))

    def put_block(self, rows: torch.Tensor, starts: torch.Tensor, tokens: torch.Tensor) -> None:
        """Write tokens [B, W] at positions from starts [B]; those beyond a new length are overwritten later."""
        if not tokens.shape[1]:
            return
        offsets = torch.arange(tokens.shape[1], device=tokens.device)
        self.data[rows[:, None], starts[:, None] + offsets] = tokens


FEW = 8
"""Number of stop tokens of a request that rounds know."""

NO_TOKEN = -1


class StopTable:
    """The first tokens that end the request of each row; `NO_TOKEN` fills the other columns.

    Plain decoding never reaches tokens after such a token: neither the engine nor this package may learn of them, so
    `accept_and_commit` cuts there. If a request has more, the scheduler cuts its runs (`engine/scheduler/stops.py`).

    few: `[request rows, FEW]` int64, always at the same address.
    """

    def __init__(self, rows: int, device: torch.device | str) -> None:
        self.few = torch.full((rows, FEW), NO_TOKEN, dtype=torch.int64, device=device)

    def begin(self, upload: Upload, row: int, stops: Sequence[int]) -> None:
        """Set the tokens that end the request that begins in `row`, from when `upload` is sent. Empty: none does."""
        upload.then(upload.ints([*stops[:FEW], *[NO_TOKEN] * (FEW - len(stops))]), self.few[row].copy_)


class SamplingRows:
    """The sampling parameters of each row's request, and the seed of its noise, drawn whenever a request begins.

    data: `SamplingTable` of all rows, always at the same address.

    Args:
        seed: of the generator of seeds: equal in all ranks, in which the same requests begin in the same order.
    """

    def __init__(self, rows: int, seed: int, device: torch.device | str) -> None:
        self.data = SamplingTable(
            torch.ones((rows, 4), dtype=torch.float32, device=device),
            torch.zeros(rows, dtype=torch.int64, device=device),
        )
        self._seeds = Random(seed)

    def begin(self, upload: Upload, row: int, parameters: Sequence[float]) -> None:
        """Set the sampling of a request that begins in `row`, from when `upload` is sent.

        parameters: temperature, top_k, top_p, min_p.
        """
        upload.then(upload.ints([self._seeds.getrandbits(63)]), self.data.seeds[row : row + 1].copy_)
        upload.then(upload.floats(parameters), self.data.parameters[row].copy_)


class DraftKV:
    """K and V of every draft layer, `[layers, slots, Hkv, D]` each.

    The slots are the target's: the owner of a target slot owns the drafter's entry at it. `pools` are the same tensors
    layer by layer, as the catch-up kernels take them.
    """

    def __init__(
        self, layers: int, slots: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (layers, slots, kv_heads, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.pools = KVPools(self.k.unbind(0), self.v.unbind(0))

    @staticmethod
    def bytes_per_token(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return 2 * layers * kv_heads * head_dim * dtype.itemsize

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store k, v `[N, Hkv, D]` of one layer at `slots` [N] int64."""
        # Not every device copies rows of 8-bit floats; all copy bytes.
        stored = torch.uint8 if self.k.dtype.itemsize == 1 else self.k.dtype
        k, v = (rounded(each, self.k.dtype).view(stored) for each in (k, v))
        write_rows(k, v, self.pools.k[layer].view(stored), self.pools.v[layer].view(stored), slots)
