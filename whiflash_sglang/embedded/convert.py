"""Convert the GGUF of the embedded target to a Hugging Face directory: weights, configuration and fast tokenizer.

llama.cpp stores the query and key projections with the two halves of every rotary pair interleaved; Hugging
Face's Llama keeps them apart, so both are permuted back. Every tensor is dequantised exactly as `gguf`
defines the block formats and rounded once, to bfloat16.

The tokenizer is a byte-level BPE. GGUF only names its pre-tokeniser ("smollm"): SmolLM splits off every digit, then
applies GPT-2's pattern over bytes. The vocabulary, the merges, the special tokens and the chat template come from the
GGUF.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def write_tokenizer(fields: dict[str, Any], out: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and the chat template from GGUF metadata into `out`.

    Raises `ValueError` for a vocabulary or a pre-tokeniser other than SmolLM's.
    """
    if (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise ValueError(
            f"expected a 'gpt2' vocabulary with the 'smollm' pre-tokeniser, found "
            f"{fields['tokenizer.ggml.model']!r} with {fields['tokenizer.ggml.pre']!r}"
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    controls = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in controls])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        model_max_length=int(fields["llama.context_length"]),
        clean_up_tokenization_spaces=False,
        chat_template=fields["tokenizer.chat_template"],
    )
    tokenizer.save_pretrained(out)


_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_TENSORS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def convert_gguf(gguf_path: Path, out: Path, on_progress: Callable[[int, int], None]) -> None:
    """Write `config.json`, `generation_config.json`, the tokenizer and `model.safetensors` (bf16) into `out`.

    `on_progress` receives the number of converted tensors and the number of all tensors.

    Raises `ValueError` where the file holds another architecture or a tensor that Llama does not have.
    """
    reader = gguf.GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise ValueError(f"{gguf_path} holds a {fields['general.architecture']!r} model; expected 'llama'")
    config = _llama_config(fields)
    weights: dict[str, torch.Tensor] = {}
    for done, (name, tensor) in enumerate(_tensors(reader, config), start=1):
        weights[name] = tensor
        on_progress(done, len(reader.tensors))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    _write_json(out / "config.json", config)
    _write_json(
        out / "generation_config.json", {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    )
    write_tokenizer(fields, out)


def _tensors(reader: gguf.GGUFReader, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name in _TOP_TENSORS:
            name = _TOP_TENSORS[tensor.name]
        else:
            try:
                block, layer, module, suffix = tensor.name.split(".")
                name = f"model.layers.{int(layer)}.{_LAYER_TENSORS[module]}.{suffix}"
            except (ValueError, KeyError):
                raise ValueError(f"tensor {tensor.name!r} has no place in a Llama checkpoint") from None
            if block != "blk":
                raise ValueError(f"tensor {tensor.name!r} has no place in a Llama checkpoint")
            if module in heads:
                values = _separate_rotary_halves(values, heads[module])
        yield name, torch.from_numpy(np.array(values)).to(torch.bfloat16).contiguous()


def _separate_rotary_halves(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _llama_config(fields: dict[str, Any]) -> dict[str, Any]:
    heads = int(fields["llama.attention.head_count"])
    hidden = int(fields["llama.embedding_length"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(fields["tokenizer.ggml.padding_token_id"]),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "max_position_embeddings": int(fields["llama.context_length"]),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_key_value_heads": int(fields["llama.attention.head_count_kv"]),
        # The GGUF holds the single-precision neighbour of 1e-5.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_scaling": None,
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": int(fields["llama.vocab_size"]),
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
