"""The validator: what it accepts, what it refuses by name, and that nothing else ever comes out."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from whiflash_sdk.hints import MAX_BYTES, MAX_MARKER_CHARS, MAX_NAME_CHARS, MAX_SPANS, Hints, Span
from work import lines_run

from whiflash_sglang.spans import hints
from whiflash_sglang.spans.carrier import add_hints, validate_custom_params
from whiflash_sglang.spans.forced import forced_tokens
from whiflash_sglang.spans.hints import HintError, RequestHints, parse_hints
from whiflash_sglang.spans.prediction import prediction_reader


def carried(**fields: object) -> dict[str, object]:
    return {"whiflash": json.dumps(fields)}


def test_names_that_no_draft_depends_on_are_checked() -> None:
    assert parse_hints(carried(agent="é" * MAX_NAME_CHARS)).source == "none"


def test_hints_are_added_to_what_is_said_already() -> None:
    said = {"other": 1, **carried(version=1, trace="full", agent="a")}
    params = add_hints(said, {"spans": [OPEN]})
    assert params is not None
    assert params["other"] == 1
    added = parse_hints(params)
    assert (added.spans, added.trace) == ((Span(kind="json", open=True),), "full")
    assert json.loads(params["whiflash"])["agent"] == "a"
    assert add_hints(None, {"agent": "b"}) == {"whiflash": '{"agent":"b"}'}
    assert add_hints(said, {"agent": "é" * (MAX_BYTES // 2)}) is None


@pytest.mark.parametrize("params", [None, {}, {"whiflash": None}, {"other": 1}, {"whiflash": '{"agent": null}'}])
def test_absent_hints_are_the_default(params: object) -> None:
    assert parse_hints(params) == RequestHints()


def span(**fields: object) -> dict[str, object]:
    """A hint of one span, whose kind and begin marker are right but where `fields` say otherwise."""
    return carried(spans=[{"kind": "json", "begin": "x"} | fields])


OPEN = {"kind": "json", "open": True}
MALFORMED: list[tuple[object, str, str]] = [
    ([], "", ""),
    *(
        ({"whiflash": text}, ".whiflash", "")
        for text in (
            *({}, "{", "[]", "[" * MAX_BYTES, " " * (MAX_BYTES + 1), '"' + "é" * MAX_BYTES + '"', "\ud800"),
            *('{"off": NaN}', '{"off": true, "off": false}', '{"version": ' + "9" * 5000 + "}"),
            "[" + "{}," * 100 + "{}]",
        )
    ),
    *((carried(version=value), ".whiflash.version", "understands version 1") for value in (2, True)),
    *((carried(lookup=it), ".whiflash.lookup", "must be one of on, context, off") for it in ("all", False)),
    (carried(agent=7), ".whiflash.agent", ""),
    (carried(agent=""), ".whiflash.agent", "is empty; leave it out instead"),
    (carried(agent="x" * 65), ".whiflash.agent", "is 65 characters long; at most 64 are allowed"),
    (carried(agent="\ud800"), ".whiflash.agent", "holds a lone surrogate, which is not text"),
    (carried(off=1), ".whiflash.off", "must be true or false"),
    (carried(trace="yes"), ".whiflash.trace", ""),
    (
        carried(sapns=[]),
        ".whiflash.sapns",
        "is unknown; known are agent, infer, learn, lookup, off, preview, spans, task, trace, version",
    ),
    (carried(spans={}), ".whiflash.spans", "must be a list"),
    (carried(spans=[OPEN] * (MAX_SPANS + 1)), ".whiflash.spans", "holds 17 entries; at most 16 are allowed"),
    (carried(spans=[3]), ".whiflash.spans[0]", "must be an object"),
    (carried(spans=[{"begin": "x"}]), ".whiflash.spans[0].kind", "is missing"),
    (
        carried(spans=[{"kind": "json"}]),
        ".whiflash.spans[0].begin",
        "is missing; give a marker, or set open to start inside the span",
    ),
    (span(off=True), ".whiflash.spans[0].off", ""),
    (span(kind="poem"), ".whiflash.spans[0].kind", ""),
    *((span(begin=value), ".whiflash.spans[0].begin", "") for value in ("", 7, "x" * 65, "\udfff")),
    (span(end=[]), ".whiflash.spans[0].end", ""),
    (span(prefer="eagle"), ".whiflash.spans[0].prefer", ""),
    (span(pin=True), ".whiflash.spans[0].prefer", ""),
    (span(bias=1), ".whiflash.spans[0].bias", ""),
    (span(bias={"tree": 1}), ".whiflash.spans[0].bias.tree", ""),
    (span(bias={"ar": "1"}), ".whiflash.spans[0].bias.ar", "must be a number"),
    *((span(bias={"ar": it}), ".whiflash.spans[0].bias.ar", "between -16 and 16") for it in (17, -16.5)),
    (span(bias={"ar": True}), ".whiflash.spans[0].bias.ar", ""),
    ({"whiflash": '{"spans":[{"kind":"json","begin":"x","bias":{"ar":1e999}}]}'}, ".whiflash.spans[0].bias.ar", ""),
]
"""Parameters, the field that is refused, and the end of what is to change."""


@pytest.mark.parametrize("token", [-1, 9, True, "1"])
def test_what_is_no_token_id_is_refused_by_its_place(token: object) -> None:
    with pytest.raises(HintError, match=r"whiflash_forced\[1\]"):
        forced_tokens({"whiflash_forced": [8, token]}, 9)
    with pytest.raises(HintError, match=r"whiflash_prediction\[1\]"):
        prediction_reader(None, 2, 9)({"whiflash_prediction": [8, token]})


def test_of_a_long_prediction_the_beginning_is_read_as_what_it_may_be() -> None:
    read = prediction_reader(None, 2, 9)
    assert read({"whiflash_prediction": [8, 7, 99]}) == ([8, 7], True)
    assert read({"whiflash_prediction": [8]}) == ([8], False)
    for said, why in (({"1": 2}, "must be a string or a list"), ("text", "this server has no tokenizer")):
        with pytest.raises(HintError, match=why):
            read({"whiflash_prediction": said})


@pytest.mark.parametrize(("params", "field", "reason"), MALFORMED)
def test_malformed_hint_is_refused_by_field(params: object, field: str, reason: str) -> None:
    with pytest.raises(HintError) as caught:
        parse_hints(params)
    assert caught.value.field == f"custom_params{field}"
    assert caught.value.reason.endswith(reason)
    assert str(caught.value) == f"custom_params{field}: {caught.value.reason}"
    assert len(str(caught.value)) < 300


def test_a_text_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The HTTP process asks when it checks a request, completes it, and writes its answer."""
    read: list[object] = []
    validated = hints.validated
    monkeypatch.setattr(hints, "validated", lambda *given: read.append(given) or validated(*given))
    params = carried(agent="only here", spans=[{"kind": "json", "open": True}])
    assert validate_custom_params(params) == parse_hints(dict(params)) == parse_hints(params)
    assert len(read) == 1


def test_the_bounds_themselves_are_allowed() -> None:
    span = {"kind": "code", "begin": "x" * MAX_MARKER_CHARS, "end": "y" * MAX_MARKER_CHARS}
    spans = [{**span, "bias": {"ar": 16, "none": -16.0}}] * MAX_SPANS
    payload = json.dumps({"spans": spans})
    padded = payload + " " * (MAX_BYTES - len(payload))
    assert len(parse_hints({"whiflash": padded}).spans) == MAX_SPANS


def test_bytes_are_counted_not_characters() -> None:
    head, tail = '{"spans": [{"kind": "code", "begin": "', '"}]}'
    marker = "é" * MAX_MARKER_CHARS
    spaces = " " * (MAX_BYTES - len(head) - 2 * len(marker) - len(tail))
    assert parse_hints({"whiflash": head + marker + tail + spaces}).spans[0].begin == marker
    with pytest.raises(HintError, match="longer than"):
        parse_hints({"whiflash": head + marker + tail + spaces + " "})


def test_other_users_of_custom_params_are_left_alone() -> None:
    params = {"thinking_budget": 64, "ids": [1, 2.5, None, "x", True], "map": {"a": math.nan, "b": -(2**63)}}
    assert validate_custom_params(params) == RequestHints()
    assert parse_hints({"__req__": object(), "whiflash": '{"off": true}'}).off


SCALARS = [None, True, 0, -1, 2**70, 1e308, math.nan, -math.inf, "", "ar", "json", "\x00", "\ud800", "é" * 70]
NAMES = st.sampled_from([*Hints.model_fields, *Span.model_fields, "ar", "?"])
VALUES = st.recursive(
    st.sampled_from(SCALARS),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(NAMES, inner, max_size=6),
    max_leaves=20,
)
NOISE = ["", "", "\x01", "\ud9ff", "NaN", "[" * 3000, '"', "{}," * 900, "1" * 4400, " " * 1_000_000]


@st.composite
def payloads(draw: st.DrawFn) -> object:
    """Anything, hints that are right but for one field, and JSON with something in its middle."""
    wrong = draw(st.dictionaries(NAMES, VALUES, max_size=1))
    spans = [{"kind": "code", "begin": "<a>", "bias": {"ar": 1}, **wrong}] * draw(st.sampled_from((1, 2, 16, 17)))
    body = draw(st.just({"spans": spans, **wrong}) | VALUES)
    text, at = json.dumps(body, ensure_ascii=draw(st.booleans())), draw(st.integers(0, 200))
    others = {f"é{number}": "é" for number in range(draw(st.sampled_from((0, 1023, 2000))))}
    hints = text[:at] + draw(st.sampled_from(NOISE)) + text[at:]
    return draw(st.just({"whiflash": hints, **others}) | VALUES)


MOST_LINES = 30_000
"""Lines of Python that a payload may cost: some 25 for each of the 1,024 values that a request may carry."""


@pytest.mark.parametrize("cases", [1_000, pytest.param(50_000, marks=pytest.mark.evidence)])
def test_fuzzed_payloads_never_escape(cases: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but HintError, and bounded work: lines of Python, and the length of what is decoded in C."""
    decoded, accepted = [0], [0]
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text, **kind: decoded.append(len(text)) or loads(text, **kind))

    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @seed(20260607)
    @given(payloads())
    def check(payload: object) -> None:
        def validate() -> None:
            try:
                accepted.append(len(validate_custom_params(payload).spans))
            except HintError as error:
                str(error).encode()

        assert lines_run(validate) <= MOST_LINES

    check()
    assert max(decoded) <= MAX_BYTES
    assert max(accepted) == MAX_SPANS
    assert 0.05 < len(accepted) / cases < 0.9, f"{len(accepted)} of {cases} accepted: the fuzz is one-sided"


@pytest.mark.parametrize(
    ("payload", "inferred", "source"),
    [
        (None, False, "none"),
        ({"trace": True}, False, "none"),
        ({"off": True}, False, "request"),
        ({"lookup": "context"}, False, "request"),
        ({"spans": [OPEN]}, False, "request"),
        ({"spans": [OPEN]}, True, "inferred"),
        ({"spans": [OPEN], "off": True}, True, "request"),
        (None, True, "none"),
    ],
)
def test_who_said_how_a_request_is_drafted(payload: dict[str, object] | None, inferred: bool, source: str) -> None:
    params = {} if payload is None else {"whiflash": json.dumps(payload)}
    assert validate_custom_params(params | ({"whiflash_inferred": True} if inferred else {})).source == source
