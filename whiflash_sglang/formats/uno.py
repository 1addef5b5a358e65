"""UNO's adapter: a LoRA in PEFT's layout, under which a target drafts for itself (SGLang's `speculative/uno_lora.py`).

Its `adapter_config.json` is judged here; SGLang reads the weights (`engine/forward/adapted.py`). Imports no SGLang.
"""

from pathlib import Path
from typing import Any

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.formats.config_json import read_json_config

CONFIG = "adapter_config.json"
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Layers of a target that an adapter may change, as in UNO's own engine (ifm-ai/uno)."""
_PLAIN = {"peft_type": "LORA", "bias": "none"} | dict.fromkeys(
    (
        "use_dora",
        "use_rslora",
        "lora_bias",
        "fan_in_fan_out",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
    )
)
"""Keys that change the product of the two factors, which SGLang ignores or refuses later; None: whatever is set."""


def adapter_in(path: Path) -> Path | None:
    """The directory of an adapter: `path`, or its `adapter/`, where published targets have it beside their weights."""
    return next((place for place in (path, path / "adapter") if (place / CONFIG).is_file()), None)


def read_adapter(path: Path) -> dict[str, Any]:
    """`adapter_config.json` of a directory that `adapter_in` found.

    Raises:
        CheckpointError: naming the file and the key that is missing, unknown or does not fit.
    """
    config = read_json_config(path, CONFIG)
    wrong = [key for key, plain in _PLAIN.items() if config.get(key) and config[key] != plain]
    numbers = {key: config.get(key) for key in ("r", "lora_alpha")}
    wrong += [key for key, number in numbers.items() if not isinstance(number, int | float) or number <= 0]
    named = config.get("target_modules")
    if not isinstance(named, list) or not named or not {*map(str, named)} <= {*MODULES}:
        wrong.append("target_modules")
    if wrong:
        raise CheckpointError(
            f"{path / CONFIG}: {wrong[0]} is {config.get(wrong[0])!r}; UNO drafts under a plain LoRA with r and "
            f"lora_alpha, of some of {', '.join(MODULES)}: use such an adapter"
        )
    return config
