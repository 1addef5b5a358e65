"""Forced answers on the wire: for benchmarks only, and only on a server that was started to accept them.

A request brings the tokens of its answer. Logits, sampling and verification are computed as always, then the sampled
tokens are replaced by the forced ones. So rounds cost the same, and drafts are judged by a recorded text.
"""

from typing import Final

from whiflash_sglang.spans.hints import CARRIED_FORCED, HintError
from whiflash_sglang.spans.prediction import check_ids

FIELD: Final = f"custom_params.{CARRIED_FORCED}"
FLAG: Final = "--whiflash-force-recorded on"


def forced_tokens(custom_params: object, vocabulary: int) -> list[int]:
    """Token ids of the answer that `custom_params` force; empty without one. vocabulary: ids of the target.

    Raises: HintError, and nothing else, naming the field that is wrong.
    """
    carried = custom_params.get(CARRIED_FORCED) if isinstance(custom_params, dict) else None
    if carried is None:
        return []
    if not isinstance(carried, list):
        raise HintError(FIELD, "must be a list of token ids")
    return check_ids(FIELD, carried, vocabulary)


def check_forced(custom_params: object, vocabulary: int, *, allowed: bool) -> None:
    """Refuse a malformed forced answer (`forced_tokens`), and any if the server was not started to accept them.

    Raises: HintError, and nothing else.
    """
    if not allowed and isinstance(custom_params, dict) and CARRIED_FORCED in custom_params:
        raise HintError(FIELD, f"is for benchmarks; this server was started without {FLAG}")
    forced_tokens(custom_params, vocabulary)
