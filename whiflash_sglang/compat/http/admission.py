"""Requests that are refused before they are scheduled: images that the server does not take, sound, and what would end
the scheduler.

A server of this algorithm is one for text unless it was asked for images (`launch.arguments.choose`). SGLang refuses
images and sound in chat messages there, but drops them without a word where `/generate` or `Engine.generate` brings
them.

Values that it does not check, above all token ids that are not the target's, raise in its scheduler, and the server
ends with the answers of everybody. Every route and `Engine` come through here, a batch request by request.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.multimodal.mm_utils import has_valid_data

from whiflash_sglang.compat.carried import asks_for_ours
from whiflash_sglang.compat.patching import around

INT32_MAX = 2**31 - 1
SESSION_FIELDS: dict[str, type] = {"id": str, "rid": str, "offset": int}


@around(
    "sglang.srt.managers.tokenizer_manager:TokenizerManager._validate_one_request",
    params=("obj", "input_ids"),
    why="SGLang's scheduler ends on numbers that no check of its own looks at",
    until="SGLang checks token ids and ranges before it schedules",
)
def _refusing(original: Any, self: Any, obj: Any, input_ids: Any) -> None:
    """Refuse what would end the scheduler, and media that are not served. Raises ValueError, which SGLang answers with
    400."""
    ours = asks_for_ours(self.server_args)
    if ours and obj.contains_mm_input():
        check_media(obj, takes_images=self.model_config.is_multimodal)
    original(self, obj, input_ids)
    if ours and isinstance(obj, GenerateReqInput):
        check_bounds(obj, input_ids, self.model_config.vocab_size)
        check_scores(obj, input_ids, self.server_args)


def check_media(obj: Any, *, takes_images: bool) -> None:
    """Check a request with media.

    Raises:
        ValueError: the server does not take them; the message names the fields.
    """
    if not takes_images:
        raise ValueError(
            "image_data, video_data and audio_data: this server serves text only; leave them out, or start it with "
            "--enable-multimodal for images"
        )
    if has_valid_data(obj.video_data) or has_valid_data(obj.audio_data):
        raise ValueError(
            "video_data and audio_data: are untested with WHIFLASH; leave them out, or ask a server without it"
        )


def check_bounds(obj: GenerateReqInput, input_ids: Sequence[int] | None, vocabulary: int) -> None:
    """Check one request for text that SGLang has found valid. SGLang compares some values with the vocabulary by itself
    (`token_ids_logprob`, `logit_bias`).

    Raises:
        ValueError: it would end the scheduler; the message names the field.
    """
    session: Mapping[str, Any] = obj.session_params or {}
    # A session's own text may be all that a request goes on from; SGLang ends it there if there is none.
    empty = obj.input_embeds is None and (input_ids is None or not len(input_ids))
    if empty and session.get("id") is None:
        raise ValueError("text (prompt, input_ids): is empty; give at least one token")
    _check_ids("input_ids (prompt)", input_ids, vocabulary)
    # Also where no log-probabilities are asked for: the likeliest of a batch are taken for all of its requests.
    _check_range("top_logprobs_num (logprobs, top_logprobs)", obj.top_logprobs_num, most=vocabulary)
    _check_range("logprob_start_len", obj.logprob_start_len, least=-1)
    params: Mapping[str, Any] = obj.sampling_params
    if params.get("beam_width") not in (None, 1):
        raise ValueError(
            f"beam_width: is {params['beam_width']}; WHIFLASH drafts for one text a request; leave it out, or ask a "
            "server without WHIFLASH"
        )
    _check_range("top_k", params.get("top_k"), most=INT32_MAX)
    if params.get("min_new_tokens"):
        # Elsewhere stop tokens are only compared with what was sampled.
        stops = [int(token) for token in params.get("stop_token_ids") or () if token is not None]
        _check_ids("stop_token_ids", stops, vocabulary)
    for name, kind in SESSION_FIELDS.items():
        value = session.get(name)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"session_params.{name}: is {value!r}; must be of the type {kind.__name__}")
    if obj.positional_embed_overrides is not None and not isinstance(
        obj.positional_embed_overrides, PositionalEmbeds
    ):
        raise ValueError("positional_embed_overrides: only Engine.generate takes them, as PositionalEmbeds")


def check_scores(obj: GenerateReqInput, input_ids: Sequence[int] | None, server_args: Any) -> None:
    """Check a request for scores at positions of its prompt, which `/v1/score` makes for a `score_extraction_token`:
    the prompt goes through one forward that reads all of it, and the request ends.

    Raises:
        ValueError: it would end the scheduler or give other positions' scores; the message names the field.
    """
    positions = obj.token_indices_to_pool
    if positions is None:
        return
    field = "token_indices_to_pool (score_extraction_token)"
    length = len(input_ids or ())
    if not positions or not all(isinstance(at, int) and 0 <= at < length for at in positions):
        raise ValueError(f"{field}: is {positions!r}; give positions of the prompt, from 0 to {length - 1}")
    whole = server_args.disable_radix_cache and server_args.chunked_prefill_size == -1
    if not whole or server_args.allow_auto_truncate:
        raise ValueError(
            f"{field}: needs a server that prefills a prompt whole; start it with --disable-radix-cache "
            "--chunked-prefill-size -1 and without --allow-auto-truncate"
        )
    asked = {
        "sampling_params.max_new_tokens": obj.sampling_params.get("max_new_tokens"),
        "logprob_start_len": obj.logprob_start_len if obj.return_logprob else 0,
    }
    for name, value in asked.items():
        if value != 0:
            raise ValueError(f"{name}: is {value}; must be 0 beside {field}")


def _check_ids(field: str, ids: Sequence[int] | None, vocabulary: int) -> None:
    if ids is None or not len(ids):
        return
    for token in (min(ids), max(ids)):
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"{field}: token {token} is not in the vocabulary, whose ids are 0 to {vocabulary - 1}"
            )


def _check_range(field: str, value: int | None, *, least: int | None = None, most: int | None = None) -> None:
    if value is None:
        return
    if least is not None and value < least:
        raise ValueError(f"{field}: is {value}; at least {least}")
    if most is not None and value > most:
        raise ValueError(f"{field}: is {value}; at most {most}")
