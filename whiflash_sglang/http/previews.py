"""Make a preview of a request with the hint `preview`: the part of its prompt before a marker is prefilled, and nothing
is answered. `engine/scheduler/previews.py` says when.

Text that nobody knows yet follows at the marker, and a tokenizer may join it with the text before. So the last word
before the marker is left out, and the tokens count that the words before it have with and without what follows. If a
tokenizer joins whole words, later text may still change them. Then they are not found cached, and no text changes.
"""

import asyncio
from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from typing import Any

from whiflash_sglang.engine.scheduler.session_tree import MARK
from whiflash_sglang.http.sessions import serves_sessions
from whiflash_sglang.spans.hints import HintError

FIELD = "custom_params.whiflash.preview"


def serves_previews(server_args: Any) -> bool:
    """Whether a server takes previews: it needs sessions, and schedulers that each prefill and decode by themselves."""
    peers = server_args.enable_dp_attention or server_args.attn_dp_size > 1  # two spellings, as they were given
    alone = server_args.pp_size == 1 and server_args.disaggregation_mode == "null" and not peers
    return bool(alone and serves_sessions(server_args))


async def prepare(manager: Any, obj: Any, marker: str) -> None:
    """Make SGLang's internal request a preview. A thread tokenises, so that the event loop goes on.

    Raises:
        HintError: the server takes no previews, or this request cannot be one.
    """
    if not serves_previews(manager.server_args) or manager.tokenizer is None:
        why = "needs --enable-session-radix-cache, a tokenizer, and no DP attention, pipeline stages or disaggregation"
        raise HintError(FIELD, f"{why}, nor --disable-radix-cache; leave it out")
    prompt = obj.text if obj.input_ids is None else obj.input_ids
    ids = isinstance(prompt, list) and all(type(one) is int and 0 <= one < 1 << 31 for one in prompt)
    if not (ids or isinstance(prompt, str)) or isinstance(obj.sampling_params, list) or obj.contains_mm_input():
        raise HintError(FIELD, "is for one prompt of text; send a request for each, and leave images out")
    if obj.return_logprob:
        raise HintError(FIELD, "has no answer to give log-probabilities of; leave them out")
    if MARK not in (obj.session_id or ""):
        raise HintError(FIELD, "needs the session whose next prompt this is; name it by session_id or a header")
    known = await asyncio.get_running_loop().run_in_executor(None, _known, manager, prompt, marker)
    # SGLang's metrics are of requests that are answered.
    obj.text, obj.input_ids, obj.priority, obj.log_metrics = None, known, None, False
    obj.sampling_params = {"max_new_tokens": 0, "custom_params": (obj.sampling_params or {}).get("custom_params")}


def _known(manager: Any, prompt: str | list[int], marker: str) -> list[int]:
    ids = manager.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if len(ids) > manager.context_len:
        raise HintError(FIELD, f"is in a prompt of {len(ids)} tokens; the context has {manager.context_len}")
    return known_tokens(manager.tokenizer, ids, marker)


def known_tokens(tokenizer: Any, ids: Sequence[int], marker: str) -> list[int]:
    """Return the first tokens of a prompt, those that stay the same whatever text replaces its last marker.

    Raises:
        HintError: the prompt has no marker, or no token before it.
    """
    # The tokenizer splits text at special tokens first, so the text behind one has tokens of its own.
    special, decode = tokenizer.added_tokens_decoder, partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    begins = [0, *(i + 1 for i in range(len(ids)) if ids[i] in special)]
    place = bisect_left(begins, True, key=lambda begin: marker not in decode(ids[begin:]))
    begin = begins[max(place - 1, 0)]
    before, _, _ = decode(ids[begin:]).rpartition(marker)
    words = tokenizer.encode("".join(before.rsplit(None, 1)[:-1]), add_special_tokens=False)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(ids[begin:], words, strict=False))
    if not (known := [*ids[:begin], *(token for token, _ in same)]):
        raise HintError(FIELD, f"{marker!r} does not follow other text in the prompt; put it where later text begins")
    return known
