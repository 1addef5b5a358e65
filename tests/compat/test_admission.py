"""Requests that would end SGLang's scheduler are refused before they are scheduled, and no others."""

import asyncio
import re
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

from whiflash_sglang.http.admission import check_bounds, check_given, check_media, check_scores, check_types
from whiflash_sglang.http.reader import Call, Fields, take_up
from whiflash_sglang.spans.hints import TOOLS_KEY, RequestHints

TOKENS = 320


def check(ids: list[int] | None = None, sampling: dict[str, Any] | None = None, **fields: Any) -> None:
    obj = GenerateReqInput(input_ids=ids or [1], sampling_params=sampling or {}, **fields)
    check_given(obj, native=True)
    obj.normalize_batch_and_arguments()
    check_types(obj)
    check_bounds(obj, obj.input_ids, TOKENS)


@pytest.mark.parametrize(
    "given",
    [
        {"ids": [0, TOKENS - 1]},
        {"top_logprobs_num": TOKENS, "return_logprob": True},
        {"top_logprobs_num": -1},
        {"logprob_start_len": -1},
        {"sampling": {"top_k": 2**31 - 1}},
        {"sampling": {"top_k": None, "min_new_tokens": None, "stop_token_ids": None}},
        {"sampling": {"stop_token_ids": [TOKENS, -1]}},
        {"sampling": {"stop_token_ids": [TOKENS], "min_new_tokens": 0}},
        {"sampling": {"stop_token_ids": ["7", None], "min_new_tokens": 2}},
        {"session_params": {"id": "a", "rid": None, "offset": 3, "replace": True}},
        {"sampling": {"beam_width": 1}},
    ],
    ids=str,
)
def test_what_the_scheduler_can_serve_is_admitted(given: dict[str, Any]) -> None:
    check(**given)


def test_of_a_batch_each_prompt_has_its_values() -> None:
    """SGLang leaves lists empty that it does not read, as a chat's `modalities`."""
    check_types(batch(modalities=[], sampling_params={"n": 2}))
    with pytest.raises(ValueError, match="sampling_params: has fewer entries than 2 prompts"):
        check_types(batch(sampling_params=[{}]))
    with pytest.raises(ValueError, match="priority: is 'x'"):
        check_types(batch(priority="x"))
    with pytest.raises(ValueError, match="n: is 65; at most 64"):
        check_given(GenerateReqInput(text=["a"] * 64, sampling_params={"n": 65}), native=False)


def batch(**fields: Any) -> GenerateReqInput:
    obj = GenerateReqInput(text=["a", "b"], **fields)
    obj.normalize_batch_and_arguments()
    return obj


def test_media_that_are_not_served_are_named() -> None:
    image, video = GenerateReqInput(image_data="a"), GenerateReqInput(image_data="a", video_data="b")
    check_media(image, takes_images=True)
    with pytest.raises(ValueError, match="video_data and audio_data: are untested"):
        check_media(video, takes_images=True)
    with pytest.raises(ValueError, match=r"this server serves text only; .* --enable-multimodal for images"):
        check_media(image, takes_images=False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ids": [-1, 1]}, "input_ids (prompt): token -1"),
        ({"ids": [1, TOKENS, 2]}, "input_ids (prompt): token 320 is not in the vocabulary, whose ids are 0 to 319"),
        ({"sampling": {"stop_token_ids": [TOKENS, 5], "min_new_tokens": 1}}, "stop_token_ids: token 320"),
        ({"top_logprobs_num": TOKENS + 1}, "top_logprobs_num (logprobs, top_logprobs): is 321; at most 320"),
        ({"logprob_start_len": -2}, "logprob_start_len: is -2; at least -1"),
        ({"sampling": {"top_k": 2**31}}, "top_k: is 2147483648; at most 2147483647"),
        ({"sampling": {"logit_bias": {"5": 1e39}}}, "logit_bias: is 1e+39 for '5'; give -1e+09 to 1e+09"),
        ({"sampling": {"stop_token_ids": [5, TOKENS], "min_new_tokens": 1}}, "stop_token_ids: token 320"),
        ({"sampling": {"stop_token_ids": [-1], "min_new_tokens": 1}}, "stop_token_ids: token -1"),
        ({"session_params": {"id": ["a"]}}, "session_params.id: is ['a']; Expected `str | null`, got `array`"),
        ({"session_params": {"id": "a", "rid": 3}}, "session_params.rid"),
        ({"positional_embed_overrides": {"a": 1}}, "positional_embed_overrides: is filled in by the server"),
        ({"lora_path": ["one"]}, "lora_path: is ['one']; Expected `str | null`, got `array`"),
        ({"lora_id": "deadbeef"}, "lora_id: is filled in by the server only"),
        ({"top_logprobs_num": [1]}, "top_logprobs_num: is [1]; Expected `int"),
        ({"logprob_start_len": [0]}, "logprob_start_len: is [0]; Expected `int"),
        ({"priority": 2**70}, f"priority: is {2**70}; can't serialize ints"),
        ({"custom_logit_processor": "x"}, "custom_logit_processor: JSONDecodeError"),
        (
            {
                "custom_logit_processor": DisallowedTokensLogitsProcessor.to_str(),
                "sampling": {"custom_params": {"x": 1}},
            },
            "custom_logit_processor: KeyError('token_ids')",
        ),
        ({"sampling": {"ignore_eos": 1}}, "sampling_params.ignore_eos: is 1; Expected `bool"),
        ({"sampling": {"is_normalized": True}}, "sampling_params.is_normalized: is unknown"),
        ({"sampling": {"n": None}}, "sampling_params.n: is None; Expected `int"),
        ({"sampling": {"n": 2**31}}, f"n: is {2**31}; at most 4096"),
        ({"sampling": {"beam_width": 2}}, "beam_width: is 2; WHIFLASH drafts for one text a request"),
    ],
    ids=str,
)
def test_what_would_end_it_is_refused_by_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 -- the text is compared below
        check(**given)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "value",
    [[[1]], {"y": {"z": 1}}, {"y": [1]}, 2**64, -(2**63) - 1, "\ud800", {"\ud800": 1}, b"bytes", {1: 2}],
    ids=ascii,
)
def test_what_others_bring_is_of_the_scheduler_s_types(value: Any) -> None:
    check(sampling={"custom_params": {"x": [2**64 - 1, -(2**63), None, True, 2.5, "x"], "y": {"a": 1}}})
    with pytest.raises(ValueError, match=r"sampling_params\.custom_params: is "):
        check(sampling={"custom_params": {"x": value}})


def test_an_empty_prompt_is_refused_unless_a_session_has_text() -> None:
    for session in (None, {}, {"offset": 0}, {"id": None}, {"rid": None}):
        obj = GenerateReqInput(text="", sampling_params={}, session_params=session)
        with pytest.raises(ValueError, match=r"text \(prompt, input_ids\): is empty; give at least one token"):
            check_bounds(obj, [], TOKENS)
    check_bounds(GenerateReqInput(text="", sampling_params={}, session_params={"id": "a"}), [], TOKENS)


SCORED: dict[str, Any] = {"sampling_params": {"max_new_tokens": 0}, "return_logprob": True, "logprob_start_len": 0}
WHOLE = {"disable_radix_cache": True, "chunked_prefill_size": -1, "allow_auto_truncate": False}


@pytest.mark.parametrize(
    ("given", "server", "said"),
    [
        ({"token_indices_to_pool": [0, 2]}, {}, None),
        ({"token_indices_to_pool": [0], "return_logprob": False, "logprob_start_len": -1}, {}, None),
        ({"sampling_params": {}}, {"disable_radix_cache": False}, None),
        ({"token_indices_to_pool": []}, {}, "is []; give positions of the prompt, from 0 to 2"),
        ({"token_indices_to_pool": [3]}, {}, "is [3]"),
        ({"token_indices_to_pool": [-1]}, {}, "is [-1]"),
        ({"token_indices_to_pool": [0]}, {"disable_radix_cache": False}, "--disable-radix-cache"),
        ({"token_indices_to_pool": [0]}, {"chunked_prefill_size": 64}, "--chunked-prefill-size -1"),
        ({"token_indices_to_pool": [0]}, {"allow_auto_truncate": True}, "without --allow-auto-truncate"),
        ({"token_indices_to_pool": [0], "sampling_params": {}}, {}, "max_new_tokens: is None; must be 0"),
        ({"token_indices_to_pool": [0], "logprob_start_len": -1}, {}, "logprob_start_len: is -1; must be 0"),
    ],
    ids=str,
)
def test_positions_are_of_a_prompt_that_is_prefilled_whole(
    given: dict[str, Any], server: dict[str, Any], said: str | None
) -> None:
    obj, args = GenerateReqInput(input_ids=[1, 2, 3], **SCORED | given), SimpleNamespace(**WHOLE | server)
    if said is None:
        check_scores(obj, [1, 2, 3], args)
        return
    with pytest.raises(ValueError, match=re.escape(said)):
        check_scores(obj, [1, 2, 3], args)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"whiflash_prediction": "text"}, "must be token ids: this server has no tokenizer"),
        *(
            ({"whiflash_prediction": [1, one]}, "whiflash_prediction[1]: must be a token id below 320")
            for one in (TOKENS, -1, "a", [1])
        ),
        ({"whiflash_prediction": 5}, "custom_params.whiflash_prediction: must be a string or a list"),
        ({TOOLS_KEY: "[]"}, "whiflash_tools: is written by the server only"),
        ({"whiflash": "\ud800"}, "custom_params.whiflash"),
    ],
    ids=ascii,
)
def test_parameters_of_the_native_route_are_checked(given: dict[str, Any], said: str) -> None:
    """A stream of it has its status by then, and brings the error as an event."""
    obj = GenerateReqInput(input_ids=[1], sampling_params={"custom_params": given}, stream=True)
    with pytest.raises(ValueError, match=re.escape(said)):
        asyncio.run(take_up(without_tokenizer(), obj, None))


def without_tokenizer() -> Any:
    own = SimpleNamespace(force_recorded=False, lookup=SimpleNamespace(prediction_tokens=9))
    own.trust_tenant_header, own.samples = False, SimpleNamespace(directory=None)
    settings = SimpleNamespace(_whiflash=own, enable_session_radix_cache=False)
    model = SimpleNamespace(vocab_size=TOKENS)
    return SimpleNamespace(tokenizer=None, model_config=model, server_args=settings, server_status=None)


def test_parameters_may_be_served_twice() -> None:
    """Built-in tools of the Responses API send a conversation's parameters again with every turn."""
    shared = {"custom_params": {TOOLS_KEY: "[]"}}
    call = Call("responses", fields=Fields({"whiflash_prediction": [1]}, RequestHints(infer=False)))
    for _ in range(2):
        obj = GenerateReqInput(input_ids=[1], sampling_params=shared)
        asyncio.run(take_up(without_tokenizer(), obj, call))
        assert obj.sampling_params == {"custom_params": {TOOLS_KEY: "[]", "whiflash_prediction": [1]}}
    assert shared == {"custom_params": {TOOLS_KEY: "[]"}}
