"""Writes a target again with more attention heads, which do nothing, so that its heads split over several ranks.

    python scripts/pad_heads.py .tools/target-of-two-ranks --ranks 2

The embedded target has 9 query heads in 3 groups, one key and value head each; with a fourth group it has 12 and 4. A
group that is added has weights of zero where it projects and where it is read, so logits and layer outputs are the
original's but for the order of sums, and drafters of the original fit. Attention and its KV grow by the added share.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

ROWS = ("q_proj", "k_proj", "v_proj")
"""Projections whose rows, and biases, are those of heads."""
COLUMNS = "o_proj"
WEIGHTS = "model.safetensors"


def padded(config: dict[str, Any], ranks: int) -> dict[str, Any]:
    """`config` of a Hugging Face target with so many groups of heads that each of `ranks` has as many.

    Raises:
        ValueError: it has them already.
    """
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    if groups % ranks == 0:
        raise ValueError(f"{groups} groups of heads split over {ranks} ranks as they are")
    more = -(-groups // ranks) * ranks
    return config | {
        # The share of the hidden size that a head has by default would be another now.
        "head_dim": int(config.get("head_dim") or config["hidden_size"] // heads),
        "num_attention_heads": heads // groups * more,
        "num_key_value_heads": more,
    }


def widened(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """A weight as a target of `config` has it: zeros behind what there is."""
    module = name.split(".")[-2]
    heads = config["num_attention_heads" if module in ("q_proj", COLUMNS) else "num_key_value_heads"]
    size = heads * config["head_dim"]
    if module in ROWS:
        return F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, size - len(tensor)))
    if module == COLUMNS and tensor.ndim == 2:
        return F.pad(tensor, (0, size - tensor.shape[1]))
    return tensor


def write(source: Path, out: Path, ranks: int) -> Path:
    """The target `source` (Llama, Qwen2, Qwen3; its weights in one file) for `ranks`, in the new directory `out`.

    Raises:
        ValueError: its heads split over so many ranks as they are.
    """
    config = padded(json.loads((source / "config.json").read_text("utf-8")), ranks)
    tensors = {
        name: widened(name, tensor, config).contiguous()
        for name, tensor in load_file(source / WEIGHTS).items()
    }
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors", "checksums.json"))
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a new directory")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--target", type=Path, help="default: the embedded one")
    given = parser.parse_args()
    if given.target is None:
        from whiflash_sglang.embedded import ensure_target

        given.target = ensure_target()
    try:
        write(given.target, given.out, given.ranks)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
