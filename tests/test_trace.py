"""The trace of a response."""

import json
import pickle

import pytest
from whiflash_sdk import routing
from whiflash_sdk.hints import TraceLevel

from whiflash_sglang.drafts.candidates import Part
from whiflash_sglang.telemetry.trace import Recording, build_trace, place

PROMPT = 7
SOURCES = ("ar", "diffusion", "context", "prediction", "group", "grammar", "tools")


def recorded(*rounds: tuple[str, int], level: TraceLevel = "full", reason: str = "score") -> Recording:
    """Rounds that follow each other, each of which proposed four tokens."""
    recording, length = Recording(level, PROMPT), PROMPT
    for arm, tokens in rounds:
        recording.add(length, arm, tokens, proposed=4, reason=reason, span=None)
        length += tokens
    return recording


def test_stretches_totals_and_switches() -> None:
    trace = build_trace(recorded(("ar", 3), ("ar", 2), ("diffusion", 4), ("ar", 1)), "entropy", 11)
    assert [(s["arm"], s["start"], s["end"], s["rounds"], s["accepted"]) for s in trace["stretches"]] == [
        ("ar", 1, 6, 2, 3),
        ("diffusion", 6, 10, 1, 3),
        ("ar", 10, 11, 1, 0),
    ]
    assert (trace["switches"], trace["tokens"], trace["rounds"], trace["reasons"]) == (2, 10, 4, {"score": 4})
    assert trace["arms"]["ar"] == {"rounds": 3, "tokens": 6, "proposed": 12, "accepted": 3}
    assert [s["round_proposed"] for s in trace["stretches"]] == [[4, 4], [4], [4]]


def test_a_summary_has_the_sums_of_the_full_trace_and_nothing_else() -> None:
    rounds = (("ar", 3), ("ar", 2), ("diffusion", 4), ("ar", 1))
    full = build_trace(recorded(*rounds), "entropy", 11)
    del full["stretches"]
    assert build_trace(recorded(*rounds, level="summary"), "entropy", 11) == full


def test_what_it_took_is_told_where_it_is_known() -> None:
    recording = recorded(("ar", 4), ("ar", 2))
    assert {"seconds", "gain"}.isdisjoint(build_trace(recording, "auto", 7))
    for tokens in (4, 2):
        recording.price("ar", tokens, round_seconds=0.03, plain_seconds=0.02)
    recording.began, recording.ended = 100.0, 100.25
    trace = build_trace(recording, "auto", 7)
    assert (trace["seconds"], trace["gain"], trace["arms"]["ar"]["saved"]) == (0.25, 2.0, 0.06)


def brought(*rounds: tuple[list[tuple[str, int]], int, int, float]) -> dict[str, tuple[int, int, float]]:
    """Sources of rounds with these drafts, of which so many were verified and so many right, and that saved so much."""
    recording = recorded(("ar", 2))
    for parts, proposed, accepted, saved in rounds:
        recording.spent += 1.0
        recording.credit([Part(*part) for part in parts], proposed=proposed, accepted=accepted, saved=saved)
    told = build_trace(recording, "auto", 3)["sources"]
    return {name: (own["proposed"], own["accepted"], own["saved"]) for name, own in told.items()}


def test_drafts_are_credited_to_what_they_were_taken_from() -> None:
    joined = [("ar", 3), ("grammar", 2), ("context", 4)]
    assert brought((joined, 9, 4, 0.8)) == {"ar": (3, 3, 0.6), "grammar": (2, 1, 0.2), "context": (4, 0, 0.0)}
    assert brought((joined, 4, 4, 0.8)) == {"ar": (3, 3, 0.6), "grammar": (1, 1, 0.2)}, "the rest verified"
    assert brought((joined, 6, 0, -0.6)) == {"ar": (3, 0, -0.3), "grammar": (2, 0, -0.2), "context": (1, 0, -0.1)}
    assert brought(([("context", 2)], 2, 2, 0.5), ([("context", 3), ("context", 1)], 4, 3, -0.25)) == {
        "context": (6, 5, 0.25)
    }


def test_without_prices_sources_are_counted_and_no_time_is_told() -> None:
    recording = recorded(("lookup", 3))
    recording.credit([Part("prediction", 4)], proposed=4, accepted=2, saved=0.0)
    trace = build_trace(recording, "auto", 4)
    assert trace["sources"] == {"prediction": {"proposed": 4, "accepted": 2}}
    assert "saved" not in trace["arms"]["lookup"]
    recording.credit([], proposed=0, accepted=0, saved=-0.1)
    assert "sources" not in build_trace(recorded(("none", 1)), "auto", 2)


def test_the_clock_runs_from_the_first_round_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10, 20))
    monkeypatch.setattr("whiflash_sglang.telemetry.trace.time.perf_counter", lambda: float(next(now)))
    recording = Recording("full", PROMPT)
    for length in (PROMPT, PROMPT + 3):
        recording.begin()
        recording.add(length, "ar", 3, proposed=4, reason="score", span=None)
    assert (recording.began, recording.ended) == (10.0, 12.0)


def test_what_was_committed_beyond_a_stop_does_not_count() -> None:
    trace = build_trace(recorded(("ar", 6), ("diffusion", 6), ("ar", 2)), "entropy", 9)
    assert (trace["tokens"], trace["stretches"][-1]["end"], trace["rounds"]) == (8, 9, 2)
    trace = build_trace(recorded(("ar", 3), ("ar", 2)), "auto", 4)
    assert (trace["tokens"], trace["rounds"]) == (3, 1), "a round right behind the stop is none of it"


def test_a_retraction_leaves_a_gap_for_the_token_of_the_second_prefill() -> None:
    recording = recorded(("ar", 3), ("ar", 2))
    recording.add(PROMPT + 6, "ar", 2, proposed=4, reason="score", span=None)
    trace = build_trace(recording, "auto", 9)
    assert [(s["start"], s["end"]) for s in trace["stretches"]] == [(1, 6), (7, 9)]
    assert (trace["tokens"], trace["switches"]) == (7, 0)


def test_an_answer_of_one_token_has_no_rounds() -> None:
    trace = build_trace(Recording("full", PROMPT), "entropy", 1)
    place(trace, ["a"], "a")
    assert (trace["stretches"], trace["rounds"], trace["arms"]) == ([], 0, {})


def test_stretches_point_into_the_text_that_the_client_has() -> None:
    trace = build_trace(recorded(("ar", 3), ("diffusion", 4)), "entropy", 8)
    pieces = ["I", " am", " h", "er", "e", " no", "w", "."]
    place(trace, pieces, "I am here now")  # the last token is trimmed: a stop
    assert [s["chars"] for s in trace["stretches"]] == [[1, 8], [8, 13]]
    assert [s["round_chars"] for s in trace["stretches"]] == [[[5, 2]], [[5, 0]]]
    assert "text" not in trace
    read = routing({"sglext": {"whiflash": json.loads(json.dumps(trace))}})
    assert read is not None
    assert read.acceptance_length == 3.5
    assert [s.chars for s in read.stretches] == [(1, 8), (8, 13)]
    assert read.stretches[1].round_chars == ((5, 0),)


@pytest.mark.parametrize("text", ["what a parser left", None])
def test_where_the_client_has_another_text_the_trace_carries_its_own(text: str | None) -> None:
    trace = build_trace(recorded(("ar", 2)), "entropy", 3)
    place(trace, ["a", "b", "c"], text)
    assert trace["text"] == "abc"
    assert trace["stretches"][0]["chars"] == [1, 3]


def test_a_summary_stays_small_whatever_the_length() -> None:
    """Sizes in bytes of JSON, against an answer of four characters a token."""
    sizes = {}
    for tokens in (1_000, 100_000):
        arms = [("ar", 2), ("diffusion", 4), ("lookup", 8), ("none", 1)] * (tokens // 15)
        for level in ("summary", "full"):
            recording = recorded(*arms, level=level)  # type: ignore[arg-type]
            for arm, count in arms:
                recording.price(arm, count, round_seconds=1 / 3, plain_seconds=1 / 7)
                recording.credit([Part(name, 99) for name in SOURCES], proposed=700, accepted=700, saved=9.87654)
            sizes[tokens, level] = len(json.dumps(build_trace(recording, "auto", tokens)))
    assert sizes[1_000, "summary"] < sizes[100_000, "summary"] < 1300
    assert sizes[1_000, "full"] < sizes[100_000, "full"]


def test_a_recording_of_a_long_answer_is_cheap_to_send() -> None:
    recording = recorded(*[("none", 1)] * 100_000)
    assert len(recording.stretches) == 1
    assert len(pickle.dumps(recording)) < 450_000  # four bytes a round
