"""The models: bounds, encoding, levels; and the presets that say what formats look like."""

from typing import Any

import pytest
from pydantic import ValidationError

import whiflash_sdk
from whiflash_sdk import HintError, Hints, Span, agent, hinted, presets, spans
from whiflash_sdk.hints import decode


def test_what_the_server_would_refuse_is_refused() -> None:
    """The server reads hints by these models, and its tests have every field."""
    named: Any = {"kind": "poem", "begin": "", "bias": {"ar": 17}, "colour": "red"}
    for name, value in named.items():
        with pytest.raises(HintError, match=rf"^Span\.{name}.*: "):
            Span(**{"kind": "json", "begin": "x", name: value})
    for opened in (lambda: agent("x" * 65), lambda: hinted(Hints(agent="")), lambda: Hints(**named)):
        with pytest.raises(HintError, match=r"^Hints\.\w+: "):
            opened()
    with pytest.raises(HintError, match=r"Span\.prefer"), spans.code(prefer="xx"):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValidationError):  # others' text keeps the error that names every field
        Hints.model_validate_json('{"agent": ""}')


def test_encoding_is_short_and_comes_back() -> None:
    hints = Hints(spans=[Span(kind="json", open=True, prefer="lookup", pin=True, bias={"ar": -2})], trace=True)  # type: ignore[arg-type]
    text = hints.encode()
    assert (
        text == '{"spans":[{"kind":"json","open":true,"prefer":"lookup","pin":true,"bias":{"ar":-2.0}}],"trace":true}'
    )
    assert decode(text) == hints
    assert hints.extra_body() == {"custom_params": {"whiflash": text}}


def test_hints_too_long_for_a_request_are_refused() -> None:
    several = tuple(Span(kind="code", begin="é" * 64, end="\x01" * 64) for _ in range(16))
    with pytest.raises(HintError, match="8192"):
        Hints(spans=several).encode()
    with pytest.raises(HintError, match="at most 16"):
        Hints(spans=several * 2)


def test_over_takes_only_what_was_set() -> None:
    outer = Hints(off=True, trace=True)
    assert Hints(off=False).over(outer) == Hints(off=False, trace=True)
    assert Hints().over(outer) == outer


@pytest.mark.parametrize("text", ["{", "[]", '{"off": 1}', '{"spans": [{"kind": 3}]}', 7, None])
def test_decode_raises_its_own_error(text: object) -> None:
    with pytest.raises(HintError, match="whiflash"):
        decode(text)


NOTHING: Any = {"tool_parser": None, "reasoning_parser": None, "has_tools": False, "forced": False}
NOTHING |= {"response_format": None}
FENCES = [("json", "```json", False), ("code", "```", False)]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, FENCES),
        ({"tool_parser": "hermes"}, FENCES),
        ({"tool_parser": "hermes", "has_tools": True}, [("tool_call", "<tool_call>", False), *FENCES]),
        ({"tool_parser": "qwen25", "has_tools": True, "forced": True}, [("tool_call", "<tool_call>", True)]),
        ({"tool_parser": "unheard-of", "has_tools": True, "forced": True}, [("tool_call", None, True)]),
        ({"tool_parser": "unheard-of", "has_tools": True}, FENCES),
        ({"response_format": "json_schema"}, [("json", None, True)]),
        ({"response_format": "text"}, FENCES),
        ({"reasoning_parser": "qwen3"}, [("reasoning", "<think>", False), *FENCES]),
        ({"reasoning_parser": "deepseek-r1"}, [("reasoning", "<think>", True), *FENCES]),
        (
            {"reasoning_parser": "qwen3", "reasoning_open": True, "response_format": "json_object"},
            [("reasoning", "<think>", True), ("json", None, True)],
        ),
        (
            {"tool_parser": "gpt-oss", "reasoning_parser": "gpt-oss", "has_tools": True},
            [("reasoning", "<|channel|>analysis<|message|>", False), ("tool_call", "to=functions.", False), *FENCES],
        ),
    ],
)
def test_likely_spans(asked: dict[str, Any], expected: list[tuple[str, str | None, bool]]) -> None:
    assert [(span.kind, span.begin, span.open) for span in presets.likely_spans(**{**NOTHING, **asked})] == expected


def test_every_preset_fits_the_bounds() -> None:
    for table in (presets.TOOL_CALL_PARSERS, presets.REASONING_PARSERS):
        for name, found in table.items():
            assert found, name
            Hints(spans=found).encode()


PUBLIC = """
Arm ArmTotals Capabilities Collected CollectedTrace Finding HintError Hints Kind Report Session Share SourceTotals Span
Stretch Trace TraceError TraceLevel UnsupportedServerError UnsupportedServerWarning WhiFlashError agent
async_capabilities async_doctor async_http_client capabilities collect doctor explain hinted http_client predict presets
routing spans wrap
"""


def test_public_names_are_pinned() -> None:
    assert whiflash_sdk.__all__ == PUBLIC.split() == sorted(whiflash_sdk.__all__)
    assert all(hasattr(whiflash_sdk, name) for name in whiflash_sdk.__all__)
    assert issubclass(whiflash_sdk.UnsupportedServerError, whiflash_sdk.WhiFlashError)
