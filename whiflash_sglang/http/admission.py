"""Refuse requests before they are scheduled: those with images that the server does not take, with sound, or with
values that would end the scheduler.

A WHIFLASH server takes text only, unless it was started with images (`launch.arguments.choose`). SGLang refuses images
and sound in chat messages there, but drops them silently if `/generate` or `Engine.generate` brings them.

Values that SGLang does not check, above all token ids outside the vocabulary, raise in its scheduler, which ends the
server and all its requests. So does a message whose types the scheduler's decoder refuses, so each field is encoded and
decoded here first, as it will be there. Requests of every route and of `Engine` pass here, those of a batch one by one.
"""

from array import array
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, Optional, get_type_hints

import msgspec
import torch
from sglang.api.v1 import api_types
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput, SessionParams, TokenizedGenerateReqInput
from sglang.srt.multimodal.mm_utils import has_valid_data
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.msgpack_utils import dec_hook, enc_hook, ext_hook

from whiflash_sglang.engine.carried import asks_for_ours
from whiflash_sglang.engine.forward.processors import processor_grammar
from whiflash_sglang.engine.patching import around

INT32_MAX = 2**31 - 1
MOST_BIAS = 1e9
MOST_SAMPLES = 4096
"""Largest number of answers to one request, over all its prompts: SGLang makes objects for all before it checks one."""
INTERNAL = (
    *("background", "conversation_id", "encoder_urls", "external_trace_header", "http_worker_ipc", "lora_id"),
    *("multi_item_delimiter_indices", "need_wait_for_mm_inputs", "num_items_assigned"),
    *("positional_embed_overrides", "received_time", "return_bytes", "token_indices_to_pool"),
)
"""Fields of SGLang's native requests that its own code fills in; SGLang does not check values that a client gives."""

_SENT = get_type_hints(TokenizedGenerateReqInput)
_APART = {"input_ids", "kv_hints", "sampling_params", "session_params"}
_SAMPLED = {*api_types.SamplingParams.__struct_fields__, "ebnf_full_assistant"}
_KINDS: dict[str, dict[str, Any]] = {
    "": {name: kind for name, kind in _SENT.items() if hasattr(GenerateReqInput, name) and name not in _APART}
    | dict.fromkeys(("lora_path", "sampling_logprobs_mode"), str | None),
    # SGLang reads null as the default, except where it counts samples (n). Text in stop_token_ids becomes a number.
    "sampling_params.": {n: Optional[k] for n, k in get_type_hints(SamplingParams).items() if n in _SAMPLED}  # noqa: UP045
    | {"n": int, "stop_token_ids": list[int | str | None] | None, "watermark": Any},
    "session_params.": get_type_hints(SessionParams),
}
_READERS = {
    prefix: {n: msgspec.msgpack.Decoder(kind, dec_hook=dec_hook, ext_hook=ext_hook) for n, kind in kinds.items()}
    for prefix, kinds in _KINDS.items()
}
"""Decoders of the fields by their types, with the hooks of the scheduler's own decoder."""


@around(
    "sglang.srt.managers.tokenizer_manager:TokenizerManager._init_req_state",
    params=("obj", "request"),
    why="SGLang sends lists where it has one prompt, and its scheduler ends on types that it does not read",
    until="SGLang checks what it sends by the types that its scheduler reads",
)
def _init_request(original: Any, self: Any, obj: Any, request: Any = None) -> Any:
    """Refuse fields whose types the scheduler cannot decode, before SGLang holds adapters. Raises ValueError (400)."""
    if asks_for_ours(self.server_args) and isinstance(obj, GenerateReqInput):
        check_types(obj)
        allowed = self.server_args.tokenizer_metrics_allowed_custom_labels or ()
        if self.enable_metrics and (wrong := sorted({*(obj.custom_labels or ())}.difference(allowed))):
            raise ValueError(f"custom_labels: {wrong[0]!r:.60} is no label of this server; leave it out")
        if self.server_args.disaggregation_mode != "null" and getattr(obj, "parallel_sample_num", 1) > 1:
            raise ValueError("n: all samples would meet in one bootstrap_room; send a request for each of them")
    return original(self, obj, request)


@around(
    "sglang.srt.managers.tokenizer_manager:TokenizerManager._validate_one_request",
    params=("obj", "input_ids"),
    why="SGLang's scheduler ends on numbers that no check of its own looks at",
    until="SGLang checks token ids and ranges before it schedules",
)
def _validate_request(original: Any, self: Any, obj: Any, input_ids: Any) -> None:
    """Refuse values that would end the scheduler, and media that the server does not take. Raises ValueError, which
    SGLang answers with 400."""
    ours = asks_for_ours(self.server_args)
    if ours and obj.contains_mm_input():
        check_media(obj, takes_images=self.model_config.is_multimodal)
    original(self, obj, input_ids)
    if ours and isinstance(obj, GenerateReqInput):
        check_bounds(obj, input_ids, self.model_config.vocab_size)
        check_scores(obj, input_ids, self.server_args)


def check_given(obj: Any, *, native: bool) -> None:
    """Check a request before SGLang splits it by prompt; raises ValueError. native: its fields are the client's own."""
    if isinstance(obj, EmbeddingReqInput):
        raise ValueError("this server only generates text; ask one with --is-embedding for embeddings and classes")
    for name in INTERNAL if native else ():
        if getattr(obj, name) != getattr(GenerateReqInput, name):
            raise ValueError(f"{name}: is filled in by the server only; leave it out")
    given = obj.sampling_params
    entries = given if isinstance(given, list) else [{} if given is None else given]
    if not entries:
        raise ValueError("sampling_params: is empty; give an object, or one for each prompt")
    prompts = obj.text if isinstance(obj.text, list) else obj.input_ids
    several = len(prompts) if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int) else 1
    for entry in entries:
        _check_kinds("sampling_params.", entry)
        _check_range("n", entry.get("n", 1), least=1, most=max(1, MOST_SAMPLES // several))


def check_types(obj: GenerateReqInput) -> None:
    """Check the types of a request after SGLang has split it by prompt; raises ValueError, which names the field."""
    try:
        prompts = [obj] if getattr(obj, "is_single", True) else [obj[i] for i in range(len(obj.rid))]
    except IndexError:
        lists = {name: value for name, value in vars(obj).items() if isinstance(value, list)}
        short = ", ".join(name for name, value in lists.items() if len(value) < len(obj.rid))
        raise ValueError(f"{short}: has fewer entries than {len(obj.rid)} prompts; give one for each") from None
    for prompt in prompts:
        _check_kinds("", {name: getattr(prompt, name) for name in _READERS[""]})
        _check_kinds("session_params.", prompt.session_params or {})


def _check_kinds(prefix: str, values: Any) -> None:
    """Encode each value and decode it as the scheduler will; raises ValueError, which names the field."""
    if not isinstance(values, dict):
        raise ValueError(f"{prefix[:-1]}: is {values!r:.60}; must be an object")
    for name, value in values.items():
        reader = _READERS[prefix].get(name)
        if reader is None:
            raise ValueError(f"{prefix}{name}: is unknown; leave it out")
        try:
            reader.decode(msgspec.msgpack.encode(value, enc_hook=enc_hook))
        except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{prefix}{name}: is {value!r:.60}; {error}") from None


def check_media(obj: Any, *, takes_images: bool) -> None:
    """Check that this server takes the media of a request.

    Raises:
        ValueError: it does not take them; the message names the fields.
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
    """Check the values of one text request that SGLang's own checks have accepted. SGLang itself compares
    `token_ids_logprob` and `logit_bias` with the vocabulary.

    Raises:
        ValueError: a value would end the scheduler; the message names the field.
    """
    if obj.input_embeds is not None:
        raise ValueError("input_embeds: WHIFLASH drafts from token ids; leave them out, or ask a server without it")
    session: Mapping[str, Any] = obj.session_params or {}
    # A request may continue its session without new text; SGLang ends the request if the session has no text either.
    if (input_ids is None or not len(input_ids)) and session.get("id") is None:
        raise ValueError("text (prompt, input_ids): is empty; give at least one token")
    _check_ids("input_ids (prompt)", input_ids, vocabulary)
    # Checked without return_logprob too, since SGLang takes the top log-probabilities of a batch for all its requests.
    _check_range("top_logprobs_num (logprobs, top_logprobs)", obj.top_logprobs_num, most=vocabulary)
    _check_range("logprob_start_len", obj.logprob_start_len, least=-1)
    params: Mapping[str, Any] = obj.sampling_params
    if obj.custom_logit_processor:  # the scheduler runs it, so this process may read it
        try:
            named = params.get("custom_params")
            grammar = processor_grammar(obj.custom_logit_processor, named, array("q"), None, vocabulary)
            if grammar is not None:
                # Not `allocate_vocab_mask`: pinned memory would open a CUDA context in this process.
                grammar.fill_vocab_mask(torch.full((1, -(-vocabulary // 32)), -1, dtype=torch.int32), 0)
        except Exception as error:  # the client's code may raise anything
            raise ValueError(
                f"custom_logit_processor: {error!r:.200}; give what its to_str returns, and its custom_params"
            ) from None
    for token, value in (params.get("logit_bias") or {}).items():
        # A larger bias may overflow float32, which makes all probabilities NaN; minus infinity only bans a token.
        if value != -inf and not abs(value) <= MOST_BIAS:
            raise ValueError(f"logit_bias: is {value} for {token!r:.20}; give -{MOST_BIAS:g} to {MOST_BIAS:g}")
    if params.get("beam_width") not in (None, 1):
        raise ValueError(
            f"beam_width: is {params['beam_width']}; WHIFLASH drafts for one text a request; leave it out, or ask a "
            "server without WHIFLASH"
        )
    _check_range("top_k", params.get("top_k"), most=INT32_MAX)
    if params.get("min_new_tokens"):
        # min_new_tokens masks logits at the stop tokens' ids; without it they are only compared with sampled tokens.
        stops = [int(token) for token in params.get("stop_token_ids") or () if token is not None]
        _check_ids("stop_token_ids", stops, vocabulary)


def check_scores(obj: GenerateReqInput, input_ids: Sequence[int] | None, server_args: Any) -> None:
    """Check a request that reads scores at positions of its prompt, which `/v1/score` makes for a
    `score_extraction_token`: one forward reads the whole prompt, and the request ends.

    Raises:
        ValueError: the request would end the scheduler or get other positions' scores; the message names the field.
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
    values = {
        "sampling_params.max_new_tokens": obj.sampling_params.get("max_new_tokens"),
        "logprob_start_len": obj.logprob_start_len if obj.return_logprob else 0,
    }
    for name, value in values.items():
        if value != 0:
            raise ValueError(f"{name}: is {value}; must be 0 beside {field}")


def _check_ids(field: str, ids: Sequence[int] | None, vocabulary: int) -> None:
    if ids is None or not len(ids):
        return
    try:
        array("q", ids)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{field}: must be a list of token ids; {error}") from None
    for token in (min(ids), max(ids)):
        if not 0 <= token < vocabulary:
            raise ValueError(f"{field}: token {token} is not in the vocabulary, whose ids are 0 to {vocabulary - 1}")


def _check_range(field: str, value: int | None, *, least: int | None = None, most: int | None = None) -> None:
    if value is None:
        return
    if least is not None and value < least:
        raise ValueError(f"{field}: is {value}; at least {least}")
    if most is not None and value > most:
        raise ValueError(f"{field}: is {value}; at most {most}")
