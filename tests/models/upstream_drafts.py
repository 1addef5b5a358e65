"""Draft models of SGLang 0.5.23 run on their own: its classes and its weight loaders, on one rank, in fp32 on the CPU.

Only its attention backend is replaced, by a loop over rows that reads what SGLang decided for each layer (whether it is
causal, which window) and sees the context's K and V as SGLang projects them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from published import MASK
from served_blocks import BONUS, LENGTHS, Served
from torch import Tensor, nn
from transformers import AutoConfig

from whiflash_sglang.formats.checkpoint import read_weights


@contextmanager
def one_rank(**spec: Any) -> Iterator[None]:
    """SGLang's process-wide context of a single rank. spec: what its speculative settings say."""
    from sglang.srt.runtime_context import get_parallel

    ranks = {f"{group}_{what}": value for group in ("tp", "attn_tp") for what, value in (("size", 1), ("rank", 0))}
    with get_parallel().override(**ranks, tp_group=None, attn_tp_group=None, pp_group=None, **spec):
        yield


class Attended(nn.Module):
    """Stands in for `RadixAttention` `attn`; `context` holds K and V [N, Hkv, D] of what came before."""

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.attn = attn
        self.context: tuple[Tensor, Tensor] | None = None
        self.seen: tuple[Tensor, Tensor] | None = None
        for name in ("layer_id", "k_scale", "v_scale"):
            setattr(self, name, getattr(attn, name, None))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: Any = None, **_: Any) -> Tensor:
        rows, dim = len(q), self.attn.qk_head_dim
        q, k, v = q.view(rows, -1, dim), k.view(rows, -1, dim), v.view(rows, -1, dim)
        before = 0
        if self.context is not None:
            before = len(self.context[0])
            k, v = torch.cat([self.context[0], k]), torch.cat([self.context[1], v])
        self.seen = k, v
        causal = self.attn.attn_type.value != "encoder_only"
        window = self.attn.sliding_window_size
        out = torch.empty_like(q)
        for row in range(rows):
            last = before + row
            first = max(0, last - window) if window is not None and window >= 0 else 0
            stop = last + 1 if causal else before + rows
            for head in range(q.shape[1]):
                shared = head // (q.shape[1] // k.shape[1])
                scores = k[first:stop, shared] @ q[row, head] * dim**-0.5
                out[row, head] = scores.softmax(0) @ v[first:stop, shared]
        return out.view(rows, -1)

    def keep(self) -> None:
        """Make the entries that were attended last the context of the next ones."""
        self.context = self.seen


def load(path: Path, model_class: type, **changed: Any) -> Any:
    """`model_class` with the checkpoint's weights, through SGLang's own loader. changed: of its configuration."""
    config = AutoConfig.from_pretrained(path)
    for key, value in changed.items():
        setattr(config, key, value)
    model = model_class(config).float()
    model.load_weights(read_weights(path).items())
    for layer in getattr(model, "model", model).layers:
        layer.self_attn.attn = Attended(layer.self_attn.attn)
    return model.eval()


class UpstreamBlocks:
    """A block drafter of SGLang's: context once, then blocks."""

    def __init__(self, model: Any, embedding: Tensor) -> None:
        self.model, self.embedding = model, embedding

    def keys_values(self, features: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """K and V that SGLang writes into its draft KV for `features` [T, F]: [layers, T, Hkv, D] each."""
        hidden = self.model.project_target_hidden(features)
        keys, values = [], []
        for layer in self.model.layers:
            attention = layer.self_attn
            k, v = attention.kv_proj_only(self.model.prepare_context_hidden_for_kv(layer, hidden))
            k = attention.apply_k_rope(positions, attention.apply_k_norm(k))
            keys.append(k.view(len(features), -1, attention.head_dim))
            values.append(v.view(len(features), -1, attention.head_dim))
        return torch.stack(keys), torch.stack(values)

    def states(self, tokens: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
        """One block `tokens` [W] behind `context` → final-normed states [W, H]."""
        first = context[0].shape[1]
        for layer, k, v in zip(self.model.layers, *context, strict=True):
            layer.self_attn.attn.context = (k, v)
        positions = torch.arange(first, first + len(tokens))
        return self.model(tokens, positions, None, input_embeds=self.embedding[tokens]).hidden_states


def upstream_states(served: Served, upstream: UpstreamBlocks) -> list[Tensor]:
    """SGLang's states [rows, H] of every request, which are ours."""
    found = []
    for row, tokens in enumerate(blocks(LENGTHS, BONUS, MASK, served.states.shape[1])):
        context = upstream.keys_values(served.features[row], torch.arange(LENGTHS[row]))
        found.append(upstream.states(tokens, context))
        torch.testing.assert_close(served.states[row], found[-1], rtol=1e-4, atol=1e-4)
    return found


def blocks(starts: Sequence[int], bonus: Sequence[int], mask: int, rows: int) -> list[Tensor]:
    """The block of every request: its bonus token, then masks."""
    return [torch.tensor([token] + [mask] * (rows - 1)) for token, _ in zip(bonus, starts, strict=True)]
