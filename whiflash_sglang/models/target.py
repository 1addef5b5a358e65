"""A dense decoder-only target in torch, which drafters begin as, learners read and ties are judged by.

One forward over a whole text, without a cache. Covers Llama, Qwen2 and Qwen3 checkpoints (optional QKV bias, optional
per-head query/key norm).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from whiflash_kernels.packed import linear

from whiflash_sglang.jsonl import read_json_file
from whiflash_sglang.models.layers import Angles, AttentionShape, Rotary, rope_parameters, rotate
from whiflash_sglang.models.packed import pack

_SUPPORTED = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def unknown(path: Path) -> str | None:
    """The reason why `TargetModel` cannot compute what the target in a directory computes; None: it can."""
    config = read_json_file(path / "config.json", finite=False)
    architecture = (config.get("architectures") or ["?"])[0]
    if architecture not in _SUPPORTED:
        return f"it is a {architecture}, and not one of {', '.join(_SUPPORTED)}"
    return "it is quantised" if config.get("quantization_config") else None


class TargetOutput(NamedTuple):
    """`features` [T, captured, H]: outputs of the captured layers; `final` [T, H]: after the final norm."""

    features: Tensor
    final: Tensor


class _Layer(NamedTuple):
    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


class TargetModel:
    """Inference-only target.

    Attributes: `embedding` [V, H], `head` [V, H] (the same tensor when tied), `final_norm` [H],
    `config` the checkpoint's `config.json`. Drafters begin from it (`Origin`).
    """

    embedding_scale = 1.0

    def __init__(self, path: Path, *, device: torch.device, dtype: torch.dtype) -> None:
        """Load a Hugging Face directory. Raises `ValueError` for an architecture outside the three above."""
        self.config: dict[str, Any] = read_json_file(path / "config.json", finite=False)
        architecture = (self.config.get("architectures") or ["?"])[0]
        if architecture not in _SUPPORTED:
            raise ValueError(f"{path} is a {architecture}, and not one of {', '.join(_SUPPORTED)}")
        self.hidden_size = int(self.config["hidden_size"])
        self.num_layers = int(self.config["num_hidden_layers"])
        self.num_heads = int(self.config["num_attention_heads"])
        self.num_kv_heads = int(self.config.get("num_key_value_heads") or self.num_heads)
        self.head_dim = int(self.config.get("head_dim") or self.hidden_size // self.num_heads)
        self.vocab_size = int(self.config["vocab_size"])
        self.intermediate_size = int(self.config["intermediate_size"])
        self.max_positions = int(self.config.get("max_position_embeddings", 32768))
        self.eps = float(self.config["rms_norm_eps"])
        self.device, self.dtype = device, dtype
        weights = _read_weights(path, device, dtype)
        self.embedding = weights["model.embed_tokens.weight"]
        self.head = weights.get("lm_head.weight", self.embedding)
        self.final_norm = weights["model.norm.weight"]
        self.layers = [self._layer(weights, f"model.layers.{index}.") for index in range(self.num_layers)]
        pack(
            [
                self.head,
                *(w for layer in self.layers for w in (layer.qkv, layer.out, layer.gate_up, layer.down)),
            ]
        )
        self.rope = rope_parameters(self.config)
        self.attention_shape = AttentionShape(self.num_heads, self.num_kv_heads, self.head_dim)
        self.rotary = Rotary(self.rope, self.head_dim, self.max_positions)

    @staticmethod
    def _layer(weights: dict[str, Tensor], prefix: str) -> _Layer:
        attention = prefix + "self_attn."
        projections = ("q_proj", "k_proj", "v_proj")
        biases = [weights.get(f"{attention}{name}.bias") for name in projections]
        return _Layer(
            input_norm=weights[prefix + "input_layernorm.weight"],
            qkv=torch.cat([weights[f"{attention}{name}.weight"] for name in projections]),
            qkv_bias=None if biases[0] is None else torch.cat([bias for bias in biases if bias is not None]),
            q_norm=weights.get(attention + "q_norm.weight"),
            k_norm=weights.get(attention + "k_norm.weight"),
            out=weights[attention + "o_proj.weight"],
            post_norm=weights[prefix + "post_attention_layernorm.weight"],
            gate_up=torch.cat(
                [weights[prefix + "mlp.gate_proj.weight"], weights[prefix + "mlp.up_proj.weight"]]
            ),
            down=weights[prefix + "mlp.down_proj.weight"],
        )

    @torch.inference_mode()
    def forward(self, text: Sequence[int] | Tensor, capture: Sequence[int] = ()) -> TargetOutput:
        """Outputs of the layers in `capture` and final states of a text [T], with causal attention."""
        tokens = torch.as_tensor(text, device=self.device)
        hidden = F.embedding(tokens, self.embedding)
        angles = self.rotary.angles(torch.arange(len(tokens), device=self.device))
        wanted = set(capture)
        captured: dict[int, Tensor] = {}
        for index, layer in enumerate(self.layers):
            hidden = hidden + self._attention(layer, hidden, angles)
            hidden = hidden + self._mlp(layer, hidden)
            if index in wanted:
                captured[index] = hidden
        final = F.rms_norm(hidden, (self.hidden_size,), self.final_norm, self.eps)
        features = [captured[index] for index in capture]
        empty = hidden.new_empty(len(tokens), 0, self.hidden_size)
        return TargetOutput(torch.stack(features, dim=1) if features else empty, final)

    def states(self, text: Sequence[int], capture: Sequence[int]) -> Tensor:
        """As training stores them: [T, captured + 1, H], the final states last."""
        output = self.forward(text, capture)
        return torch.cat([output.features, output.final[:, None]], dim=1)

    def logits(self, final: Tensor) -> Tensor:
        """`final` [..., H] → [..., V] in the model's dtype."""
        return linear(final, self.head)

    @torch.inference_mode()
    def next_logits(self, text: Sequence[int] | Tensor) -> Tensor:
        """[V] float32, of the token after a text."""
        return self.logits(self.forward(text).final[-1:])[0].float()

    def _attention(self, layer: _Layer, hidden: Tensor, angles: Angles) -> Tensor:
        normed = F.rms_norm(hidden, (self.hidden_size,), layer.input_norm, self.eps)
        qkv = linear(normed, layer.qkv, layer.qkv_bias).view(len(hidden), -1, self.head_dim)
        q, k, v = torch.split(qkv, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = F.rms_norm(q, (self.head_dim,), layer.q_norm, self.eps)
            k = F.rms_norm(k, (self.head_dim,), layer.k_norm, self.eps)
        rotated = rotate(torch.cat([q, k], dim=1), angles)
        heads = (rotated[:, : self.num_heads], rotated[:, self.num_heads :], v)
        query, key, value = (x.transpose(0, 1)[None] for x in heads)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return linear(mixed[0].transpose(0, 1).reshape(len(hidden), -1), layer.out)

    def _mlp(self, layer: _Layer, hidden: Tensor) -> Tensor:
        normed = F.rms_norm(hidden, (self.hidden_size,), layer.post_norm, self.eps)
        gate, up = linear(normed, layer.gate_up).chunk(2, dim=-1)
        return linear(F.silu(gate) * up, layer.down)


def _read_weights(path: Path, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path} has no .safetensors file")
    weights: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                weights[name] = handle.get_tensor(name).to(device=device, dtype=dtype)
    return weights
