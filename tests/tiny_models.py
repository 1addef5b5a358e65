"""Tiny random checkpoints in the formats that SGLang reads: a Llama target, an EAGLE-3 and a DFlash drafter.

Real files in real formats (safetensors, config.json, tokenizer.json), so a stock server loads them; small enough
(hidden size 64) that it starts in seconds. Weights are random but seeded. The target's head favours a few
tokens, so that random drafters, which share that preference, are right now and then.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HIDDEN = 64
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
INTERMEDIATE = 128
MAX_POSITIONS = 2048
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")
MASK_TOKEN = 256 + SPECIAL_TOKENS.index("<|mask|>")
FAVOURED_TOKENS = tuple(range(68, 84))
"""Printable byte tokens whose head rows are scaled up; greedy output is mostly made of them."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_target(
    directory: Path | str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    vocab_size: int = 320,
    num_layers: int = 6,
    peaked: bool = False,
) -> Path:
    """Write a Llama target with a byte-level tokenizer and a ChatML template.

    Args:
        directory: created if missing.
        seed: of the weights.
        dtype: ``float32`` or ``bfloat16``.
        vocab_size: at least 260 (256 bytes and four special tokens).
        num_layers: decoder layers; at least 4, so that the drafters' layers differ.
        peaked: favour three tokens strongly. Greedy output then has long runs, in which random drafters are
            right for several tokens; without, it is lively and they are right one time in fifty.

    Returns:
        ``directory``.
    """
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size {vocab_size}: the byte tokenizer needs at least 260")
    path = Path(directory)
    make = _Weights(seed)
    tensors = {
        "model.embed_tokens.weight": make(vocab_size, HIDDEN, scale=1.0),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": make(vocab_size, HIDDEN),
    }
    favoured, factor = (FAVOURED_TOKENS[:3], 4) if peaked else (FAVOURED_TOKENS, 2)
    tensors["lm_head.weight"][list(favoured)] *= factor
    # A block drafter starts from this embedding: let it point at the favoured tokens.
    tensors["model.embed_tokens.weight"][MASK_TOKEN] = tensors["lm_head.weight"][list(favoured)].sum(0)
    for layer in range(num_layers):
        tensors |= make.decoder_layer(f"model.layers.{layer}.")
    config = _llama_config(vocab_size, num_layers, dtype) | {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 256,
        "eos_token_id": 256,
        "pad_token_id": 256,
    }
    _save(path, config, tensors, dtype)
    save_tokenizer(path)
    return path


def scripted_target(directory: Path | str, script: str) -> list[int]:
    """Write a target that answers every chat with `script`, whoever serves it: a token's successor is its own.

    Args:
        directory: created if missing.
        script: at least two bytes; cut into tokens of two bytes and more, none of which occurs twice.

    Returns:
        Token ids of the answer, without the end of text.
    """
    pieces = unique_pieces(script.encode())
    ids = [256 + len(SPECIAL_TOKENS) + i for i in range(len(pieces))]
    path = tiny_target(directory, vocab_size=256 + len(SPECIAL_TOKENS) + len(pieces))
    save_tokenizer(path, pieces)
    tensors = load_file(path / "model.safetensors")
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = torch.zeros_like(tensors[name])  # what remains of a layer is its residual
    embedding = torch.nn.functional.normalize(tensors["model.embed_tokens.weight"], dim=-1)
    head = torch.zeros_like(embedding)
    symbols = _byte_symbols()
    line_end = sorted(symbols).index(symbols[ord("\n")])  # which the template's prompts end with
    head[[*ids, 256]] = embedding[[line_end, *ids]]
    tensors |= {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return ids


def unique_pieces(text: bytes) -> list[bytes]:
    """`text` in pieces of two bytes and more, none twice, each as short as it may be; the last one takes the rest."""
    pieces: list[bytes] = []
    begin = 0
    for end in range(1, len(text) + 1):
        if end - begin > 1 and text[begin:end] not in pieces:
            pieces.append(text[begin:end])
            begin = end
    return [*pieces[:-1], pieces[-1] + text[begin:]]


def tiny_eagle3(
    directory: Path | str,
    target_dir: Path | str,
    *,
    seed: int = 0,
    draft_vocab_size: int | None = None,
    num_layers: int = 1,
) -> Path:
    """Write an EAGLE-3 drafter (``LlamaForCausalLMEagle3``) for a :func:`tiny_target`.

    Args:
        directory: created if missing.
        target_dir: the target it drafts for; its head's rows become the drafter's head.
        seed: of the other weights.
        draft_vocab_size: rows of the drafter's own head, mapped by ``d2t``; None: the target's vocabulary.
            The favoured tokens are always among them.
        num_layers: draft layers.

    Returns:
        ``directory``.
    """
    path = Path(directory)
    target = _text_config(Path(target_dir))
    head = _head_of(Path(target_dir))
    vocab_size, dtype = target["vocab_size"], target["dtype"]
    draft_vocab = draft_vocab_size or vocab_size
    first = min(FAVOURED_TOKENS[0], vocab_size - draft_vocab)
    target_ids = torch.arange(first, first + draft_vocab)
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[target_ids] = True
    make = _Weights(seed + 1000)
    layers = target["num_hidden_layers"]
    tensors = {
        "fc.weight": make(HIDDEN, 3 * HIDDEN),
        "norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": head[target_ids].clone(),
        "d2t": target_ids - torch.arange(draft_vocab),
        "t2d": t2d,
        "midlayer.hidden_norm.weight": torch.ones(HIDDEN),
        **make.decoder_layer("midlayer.", attention_input=2 * HIDDEN),
    }
    for layer in range(1, num_layers):
        tensors |= make.decoder_layer(f"layers.{layer}.")
        tensors[f"layers.{layer}.hidden_norm.weight"] = torch.ones(HIDDEN)
    config = _llama_config(vocab_size, num_layers, dtype) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": draft_vocab,
        # Names layer outputs; Llama cannot give its last one.
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, layers // 2 - 1, layers - 2]},
    }
    _save(path, config, tensors, dtype)
    return path


def tiny_dflash(directory: Path | str, target_dir: Path | str, *, block_size: int = 8, num_layers: int = 2) -> Path:
    """Write a DFlash drafter (``DFlashDraftModel``) for a :func:`tiny_target`.

    Args:
        directory: created if missing.
        target_dir: the target whose embedding and head it borrows.
        block_size: tokens of a block, the bonus token's position included.
        num_layers: draft layers.

    Returns:
        ``directory``.
    """
    path = Path(directory)
    target = _text_config(Path(target_dir))
    layers, dtype = target["num_hidden_layers"], target["dtype"]
    features = [1, layers // 2, layers - 2]
    make = _Weights(2000)
    tensors = {
        "fc.weight": make(HIDDEN, len(features) * HIDDEN),
        "hidden_norm.weight": torch.ones(HIDDEN),
        "norm.weight": torch.ones(HIDDEN),
    }
    for layer in range(num_layers):
        prefix = f"layers.{layer}."
        tensors |= make.decoder_layer(prefix)
        tensors[f"{prefix}self_attn.q_norm.weight"] = torch.ones(HEAD_DIM)
        tensors[f"{prefix}self_attn.k_norm.weight"] = torch.ones(HEAD_DIM)
    config = _llama_config(target["vocab_size"], num_layers, dtype) | {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "block_size": block_size,
        "num_target_layers": layers,
        "dflash_config": {"mask_token_id": MASK_TOKEN, "target_layer_ids": features},
    }
    _save(path, config, tensors, dtype)
    return path


def _text_config(target: Path) -> dict[str, Any]:
    """Configuration of the model that decodes, of a target's `config.json`."""
    config: dict[str, Any] = json.loads((target / "config.json").read_text())
    return config | config.get("text_config", {})


def _head_of(target: Path) -> torch.Tensor:
    """The output projection in fp32; of a target whose head is tied, its embedding."""
    tensors = load_file(target / "model.safetensors")
    own = "lm_head.weight"
    head = own if own in tensors else next(name for name in tensors if name.endswith("embed_tokens.weight"))
    return tensors[head].float()


class _Weights:
    """A seeded source of random matrices."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, rows: int, columns: int, *, scale: float | None = None) -> torch.Tensor:
        """[rows, columns] float32, normal; by default scaled to keep the variance of its input."""
        factor = columns**-0.5 if scale is None else scale
        return torch.randn(rows, columns, generator=self._generator) * factor

    def decoder_layer(self, prefix: str, *, attention_input: int = 0) -> dict[str, torch.Tensor]:
        """A Llama decoder layer in Hugging Face's names. attention_input: width, `HIDDEN` if zero."""
        kv, attention_input = KV_HEADS * HEAD_DIM, attention_input or HIDDEN
        return {
            f"{prefix}input_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}post_attention_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}self_attn.q_proj.weight": self(HEADS * HEAD_DIM, attention_input),
            f"{prefix}self_attn.k_proj.weight": self(kv, attention_input),
            f"{prefix}self_attn.v_proj.weight": self(kv, attention_input),
            f"{prefix}self_attn.o_proj.weight": self(HIDDEN, HEADS * HEAD_DIM),
            f"{prefix}mlp.gate_proj.weight": self(INTERMEDIATE, HIDDEN),
            f"{prefix}mlp.up_proj.weight": self(INTERMEDIATE, HIDDEN),
            f"{prefix}mlp.down_proj.weight": self(HIDDEN, INTERMEDIATE),
        }


def _llama_config(vocab_size: int, num_layers: int, dtype: str) -> dict[str, object]:
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _save(path: Path, config: dict[str, object], tensors: dict[str, torch.Tensor], dtype: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    kind = getattr(torch, dtype)
    stored = {name: t.to(kind) if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=2))


def _byte_symbols() -> list[str]:
    """Symbols for each byte in the vocabulary of a byte-level tokenizer."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [bytes_to_unicode()[byte] for byte in range(256)]


def save_tokenizer(path: Path, pieces: Sequence[bytes] = ()) -> None:
    """A byte-level tokenizer: 256 bytes, the special tokens, and `pieces` that no text is encoded with."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = _byte_symbols()
    written = ["".join(symbols[byte] for byte in piece) for piece in pieces]
    vocabulary = {symbol: i for i, symbol in enumerate([*sorted(symbols), *SPECIAL_TOKENS, *written])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL_TOKENS[0])
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)


def edit(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the configuration of a checkpoint in place."""
    config = json.loads((checkpoint / "config.json").read_text())
    change(config)
    (checkpoint / "config.json").write_text(json.dumps(config))


def tiny_pair(root: Path, target: Path, *, eagle3_layers: int = 1) -> dict[str, Any]:
    """Write two random drafters of `target` under `root`. Returns them as `engine(whiflash=...)` takes them."""
    eagle3 = tiny_eagle3(root / "eagle3", target, num_layers=eagle3_layers)
    return {"draft": tiny_dflash(root / "dflash", target), "whiflash_eagle_draft": str(eagle3)}


def tiny_bundle(bundle: Path, target: Path, name: str = "tiny") -> Path:
    """Write a bundle of two random drafters of `target`, which its manifest calls `name`. Returns `bundle`."""
    tiny_eagle3(bundle / "eagle3", target)
    tiny_dflash(bundle / "dflash", target)
    manifest = {"schema_version": 1, "name": "tiny", "target": name, "eagle3": "eagle3", "dflash": "dflash"}
    (bundle / "whiflash.json").write_text(json.dumps(manifest))
    return bundle


def served_pair(root: Path) -> list[str]:
    """Checkpoints of a peaked target and its two drafters under `root`; arguments of a server with them."""
    target = tiny_target(root / "target", peaked=True)
    drafters = {
        "--speculative-draft-model-path": tiny_dflash(root / "d", target),
        "--whiflash-eagle-draft": tiny_eagle3(root / "e", target),
    }
    arguments = ["--model-path", str(target), "--served-model-name", "tiny", "--dtype", "float32"]
    arguments += ["--speculative-algorithm", "WHIFLASH"]
    return arguments + [word for flag, path in drafters.items() for word in (flag, str(path))]
