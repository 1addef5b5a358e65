"""Images and sound in requests: refused, for drafters read text.

A server of this algorithm is one for text whatever its target takes (:func:`whiflash_sglang.compat.launch.choose`).
SGLang refuses them in chat messages there, but drops them without a word where `/generate` or `Engine.generate` brings
them.
"""

from functools import wraps
from typing import Any

from sglang.srt.managers.tokenizer_manager import TokenizerManager

from whiflash_sglang.compat.carried import asks_for_ours
from whiflash_sglang.compat.patching import replace


def install() -> None:
    """Idempotent. In the process that takes requests."""
    replace(TokenizerManager, "_validate_one_request", _refusing)


def _refusing(original: Any) -> Any:
    """Raises ValueError, which SGLang answers with 400."""

    @wraps(original)
    def validate(self: Any, obj: Any, input_ids: Any) -> None:
        if asks_for_ours(self.server_args) and obj.contains_mm_input():
            raise ValueError(
                "image_data, video_data and audio_data: WHIFLASH serves text alone, its drafters cannot read them; "
                "leave them out, or ask a server without WHIFLASH"
            )
        original(self, obj, input_ids)

    return validate
