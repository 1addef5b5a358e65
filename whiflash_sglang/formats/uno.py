"""UNO's adapter: a LoRA in PEFT's layout, under which a target drafts for itself (SGLang's `speculative/uno_lora.py`).

This module checks its `adapter_config.json`; SGLang reads the weights (`engine/forward/adapted.py`). Imports no SGLang.
"""

from pathlib import Path
from typing import Any

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.formats.config_json import read_json_config

CONFIG = "adapter_config.json"
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Layers of a target that an adapter may change, as in UNO's own engine (ifm-ai/uno)."""
MOST_RANK, MOST_ALPHA = 1024, 65536
"""Upper bounds: the rank is the width of SGLang's pool of adapters, so a damaged file could take all memory."""
_INITS = (True, "gaussian", "orthogonal", "eva")
_PLAIN = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": _INITS}
"""Key of PEFT → its accepted values, with which the adapter is a plain product of its two factors."""
_ELSEWHERE = {"lora_alpha", "target_modules", "lora_dropout", "inference_mode", "task_type", "auto_mapping", "revision"}
_ELSEWHERE |= {"base_model_name_or_path", "r", "peft_version", "megatron_core", "qalora_group_size", "eva_config"}
"""Keys that change no product, and keys that are read here. Any other key that is set may change the product or its
layers (PEFT adds keys in each release), and SGLang would ignore it or refuse it later.
"""


def adapter_in(path: Path) -> Path | None:
    """Return the directory of an adapter, or None: `path`, or `path/adapter`, where published targets have it."""
    return next((place for place in (path, path / "adapter") if (place / CONFIG).is_file()), None)


def read_adapter(path: Path) -> dict[str, Any]:
    """Read and check `adapter_config.json` in an adapter's directory (`adapter_in`). Raises CheckpointError naming the
    key that is missing, unknown or does not fit.
    """
    config = read_json_config(path, CONFIG)
    others = {key: value for key, value in config.items() if value and key not in _ELSEWHERE}
    wrong = [key for key, value in others.items() if value not in _PLAIN.get(key, ())]
    rank, alpha = config.get("r", 0), config.get("lora_alpha", 0)
    if type(rank) is not int or not 1 <= rank <= MOST_RANK:
        wrong.append("r")
    if type(alpha) not in (int, float) or not 0 < alpha <= MOST_ALPHA:
        wrong.append("lora_alpha")
    named = config.get("target_modules")
    if not isinstance(named, list) or not named or not {*map(str, named)} <= {*MODULES}:
        wrong.append("target_modules")
    if wrong:
        raise CheckpointError(
            f"{path / CONFIG}: {wrong[0]} is {config.get(wrong[0])!r:.200}; UNO drafts under a plain LoRA with r up to "
            f"{MOST_RANK} and lora_alpha up to {MOST_ALPHA}, of some of {', '.join(MODULES)}: use such an adapter"
        )
    return config
