"""The trace of a response."""

from whiflash_sdk import routing

from whiflash_sglang.trace import TraceLog, TraceRound, build_trace, pieces_of


def rounds(*parts: tuple[str, int]) -> list[TraceRound]:
    return [TraceRound(arm, tokens, "entropy", None) for arm, tokens in parts]


def test_stretches_totals_and_switches() -> None:
    trace = build_trace(rounds(("ar", 3), ("ar", 2), ("diffusion", 4), ("ar", 1)), "entropy", 11)
    assert [(s["arm"], s["start"], s["end"], s["rounds"], s["accepted"]) for s in trace["stretches"]] == [
        ("ar", 1, 6, 2, 3),
        ("diffusion", 6, 10, 1, 3),
        ("ar", 10, 11, 1, 0),
    ]
    assert trace["switches"] == 2
    assert trace["tokens"] == 10
    assert trace["arms"]["ar"] == {"rounds": 3, "tokens": 6}


def test_what_was_committed_beyond_a_stop_does_not_count() -> None:
    trace = build_trace(rounds(("ar", 6), ("diffusion", 6)), "entropy", 9)
    assert (trace["tokens"], trace["stretches"][-1]["end"]) == (8, 9)


def test_an_answer_of_one_token_has_no_rounds() -> None:
    assert build_trace([], "entropy", 1)["stretches"] == []


def test_the_sdk_reads_it() -> None:
    trace = build_trace(rounds(("ar", 3), ("diffusion", 4)), "entropy", 8, text_of=lambda a, b: f"{a}-{b}")
    read = routing({"sglext": {"whiflash": trace}})
    assert read is not None
    assert read.acceptance_length == 3.5
    assert [s.text for s in read.stretches] == ["1-4", "4-8"]
    assert read.prefill_text == "0-1"


def test_log_is_bounded_and_empties() -> None:
    log = TraceLog(requests=2)
    for rid in ("a", "b", "c"):
        log.open(rid)
        log.record(rid, TraceRound("ar", 1, "", None))
    assert log.take("a", last=True) == []
    assert len(log.take("b", last=False)) == 1
    assert log.take("b", last=True) == []
    assert len(log) == 1


def test_a_character_cut_by_a_stretch_belongs_to_the_one_that_completes_it() -> None:
    euro = "€".encode()
    text_of = pieces_of([0, 1, 2, 3], [b"a", euro[:1], euro[1:], b"b"])
    assert [text_of(0, 2), text_of(2, 4)] == ["a", "€b"]
