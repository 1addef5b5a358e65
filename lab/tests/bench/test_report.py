"""Cells become figures and tables."""

import json
import re
from pathlib import Path

import pytest

from whiflash_lab.bench.cells import Answer, Cell, Load
from whiflash_lab.bench.command import judge, publish
from whiflash_lab.bench.pages import _overview, render
from whiflash_lab.bench.prompts import Prompt
from whiflash_lab.bench.reference import Difference, Reference, differences
from whiflash_lab.bench.report import BenchReport, build_report
from whiflash_sglang.errors import WhiflashError
from whiflash_sglang.files.equality import Verdict

ALONE, FOUR = Load(value=1), Load(value=4)
GROUPS = {"c1": "chat", "c2": "chat", "t1": "tool_call", "l1": "loops"}
TOKENS = {"c1": 13, "c2": 21, "t1": 41, "l1": 101}
SPEED = {"none": 10.0, "EAGLE3": 15.0, "DFLASH": 12.0, "auto": 24.0}
ACCEPTED = {"none": 1, "EAGLE3": 2, "DFLASH": 2, "auto": 4}
ROUNDS = {f"{s}_seconds": 0.001 for s in ("route", "catch_up", "draft", "verify", "commit", "park")}
ROUNDS |= {"round_seconds": 0.0061, "extra_catch_up_seconds": 0.0005}
PROVENANCE = {
    "hardware": {"cpu": "a CPU", "cores": 2},
    "packages": {"sglang": "0.5.23", "torch": "2"},
    "command": ["whiflash", "bench", "--server-args", "--a b"],
    "threads": 2,
    "dtype": "bfloat16",
    "repetitions": 3,
    "interleaved": True,
    "compared": True,
    "sampling": [],
    "max_tokens": 160,
    "busy_before": {"load_1min": 0.1},
    "busy_after": {"load_1min": 1.9},
    "servers": {"none": {"arguments": ["--dtype", "bfloat16"], "attention_backend": "a", "environment": {}}},
}


def speed(arm: str, prompt: str) -> float:
    """DFLASH is the faster static drafter on tool calls."""
    return 20.0 if (arm, prompt) == ("DFLASH", "t1") else SPEED[arm]


def answer(arm: str, prompt: str) -> Answer:
    count = TOKENS[prompt]
    seconds = count / speed(arm, prompt)
    forwards = (count - 1) // ACCEPTED[arm]
    return Answer(prompt=prompt, seconds=seconds, ttft=0.1, tokens=tuple(range(count)), forwards=forwards)


def clock(arm: str, rounds: int) -> dict[str, float] | None:
    if arm != "auto":
        return None
    return {name: rounds * value for name, value in ROUNDS.items()} | {"rounds": rounds, "switches": 2}


@pytest.fixture
def report() -> BenchReport:
    together = {arm: tuple(answer(arm, prompt) for prompt in ("c1", "c2", "t1")) for arm in SPEED}
    cells = [
        Cell(load=load, arm=arm, repetition=r, seconds=seconds, answers=own, counters=clock(arm, rounds))
        for r in range(3)
        for arm in SPEED
        for load, seconds, own, rounds in (
            *((ALONE, a.seconds + 1, (a,), a.forwards) for a in (answer(arm, p) for p in TOKENS)),
            (FOUR, 2.0, together[arm], 9),
        )
    ]
    found = [
        Difference("auto", "closed-1", "c1", Verdict.TIE, 3, 0.01),
        Difference("DFLASH", "closed-1", "t1", Verdict.DIFFERENT, 5, 3.0),
        Difference("auto", "closed-4", "t1", Verdict.DIFFERENT, 5, None),
    ]
    return build_report(cells, GROUPS, found, PROVENANCE, {"NGRAM": "the server did not start: no kernel"})


def test_figures_by_category_without_loops(report: BenchReport) -> None:
    auto = report.arms["auto"]
    assert set(auto) == {"chat", "tool_call", "overall", "loops"}
    assert auto["chat"].output_tokens_per_s == pytest.approx(24)
    assert auto["overall"].output_tokens == 75
    assert auto["overall"].answers == 9
    assert auto["loops"].output_tokens == 101
    assert report.arms["DFLASH"]["overall"].output_tokens_per_s == pytest.approx(75 / (34 / 12 + 41 / 20))
    plain = report.arms["none"]["overall"]
    assert (plain.acceptance_length, plain.target_forwards, auto["tool_call"].acceptance_length) == (1.0, 72, 4.0)
    chat = report.arms["none"]["chat"]
    assert chat.ttft_ms is not None
    assert chat.ttft_ms.p50 == pytest.approx(100)
    assert chat.tpot_ms is not None
    assert chat.tpot_ms.p99 == pytest.approx(100, rel=0.05)


def test_rounds_add_up_and_switching_has_its_share(report: BenchReport) -> None:
    overall = report.arms["auto"]["overall"]
    assert overall.round_ms is not None
    assert overall.round_ms.verify == pytest.approx(1.0)
    assert overall.round_ms.other == pytest.approx(0.1)
    assert overall.switch_share == pytest.approx(2.5 / 6.1)
    assert overall.switches_per_100_tokens == pytest.approx(100 * 2 * 9 / (3 * 75))
    assert report.arms["EAGLE3"]["overall"].round_ms is None


def test_mismatches_and_ties_belong_to_their_arm_and_load(report: BenchReport) -> None:
    """The page counts the answers that end in a loop, too."""
    assert (report.arms["auto"]["chat"].ties, report.arms["auto"]["overall"].mismatches) == (1, 0)
    assert report.arms["DFLASH"]["tool_call"].mismatches == 1
    assert report.loads[1].arms["auto"]["overall"].mismatches == 1
    different = [Difference("auto", "closed-1", "l1", Verdict.DIFFERENT, 5, 3.0)]
    page = render(build_report(cells_of({"none": 10.0, "auto": 24.0}), GROUPS, different, PROVENANCE, {}))
    assert next(line for line in page.splitlines() if line.startswith("| auto |")).endswith("| 1 |")


def test_ratios_to_plain_decoding_and_to_the_faster_static_drafter(report: BenchReport) -> None:
    auto = report.ratios["auto"]
    assert auto.none["overall"].ratio == pytest.approx(2.4)
    assert auto.static_arm == {"chat": "EAGLE3", "tool_call": "DFLASH", "overall": "DFLASH", "loops": "EAGLE3"}
    assert auto.static["chat"].ratio == pytest.approx(24 / 15)
    assert report.ratios["EAGLE3"].static == {}


def cells_of(arms: dict[str, float]) -> list[Cell]:
    """Three repetitions of every prompt for arms of such speeds, in tokens a second."""
    return [
        Cell(
            load=ALONE,
            arm=arm,
            repetition=repetition,
            seconds=1.0,
            answers=(answer("none", prompt).model_copy(update={"seconds": TOKENS[prompt] / speed}),),
        )
        for arm, speed in arms.items()
        for repetition in range(3)
        for prompt in TOKENS
    ]


def test_every_arm_is_compared_with_the_one_that_was_asked_for_and_with_the_faster_static_drafter() -> None:
    """As with plain decoding, by category. WHIFLASH pinned to a drafter is a static drafter."""
    cells = cells_of({"none": 10.0, "EAGLE3": 12.0, "diffusion": 15.0, "auto": 16.0, "auto-no-hints": 24.0})
    compared = build_report(cells, GROUPS, [], PROVENANCE, {}, over="auto")
    varied = compared.ratios["auto-no-hints"]
    assert {name: i.ratio for name, i in varied.over.items()} == pytest.approx(dict.fromkeys(varied.none, 1.5))
    assert (varied.static_arm["overall"], compared.ratios["auto"].over) == ("diffusion", {})
    assert varied.static["overall"].ratio == pytest.approx(24 / 15)
    lost = [cell for cell in cells_of({"EAGLE3": 90.0}) if cell.prompts == cells[0].prompts]
    others = [cell for cell in cells if cell.arm != "EAGLE3"]
    assert (
        build_report([*others, *lost], GROUPS, [], PROVENANCE, {}).ratios["auto"].static_arm["overall"] == "diffusion"
    )


def test_under_load_only_the_whole_mix_has_a_rate(report: BenchReport) -> None:
    four = report.loads[1].arms["auto"]
    assert four["overall"].output_tokens_per_s == pytest.approx(75 / 2.0)
    assert four["chat"].output_tokens_per_s is None
    assert set(report.loads[1].ratios["auto"].none) == {"overall"}


def test_the_page_names_arms_that_are_missing_and_each_server_s_environment(report: BenchReport) -> None:
    """No kept page has any. Arguments that all servers share are printed once, and no flag is parted from its value."""
    shared = ["--dtype", "bfloat16", "--tp-size"]
    both, ranks = {"OMP_NUM_THREADS": "2"}, {"OMP_NUM_THREADS": "1", "SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    servers = {
        "none": {"arguments": [*shared, "1"], "attention_backend": "a", "environment": both},
        "none@tp2": {"arguments": [*shared, "2", "{}"], "attention_backend": "a", "environment": ranks},
    }
    page = render(report.model_copy(update={"provenance": {**report.provenance, "servers": servers}}))
    assert "NGRAM: the server did not start: no kernel" in page
    assert "`OMP_NUM_THREADS=2 python -m sglang.launch_server --dtype bfloat16`" in page
    assert "- none: `--tp-size 1`" in page
    assert "- none@tp2: `OMP_NUM_THREADS=1 SGLANG_CPU_OMP_THREADS_BIND='0|1' --tp-size 2 '{}'`" in page
    assert "`whiflash bench --server-args '--a b'`" in page


@pytest.mark.parametrize(
    ("compared", "said"),
    [([], "not compared. Every greedy answer of every arm equals"), (None, "Sampled answers were not compared.\n")],
)
def test_sampled_answers_are_called_so(compared: list[Difference] | None, said: str) -> None:
    told = PROVENANCE | {"compared": False, "sampling": [{"temperature": 0.6}]}
    page = render(build_report(cells_of({"none": 10.0, "auto": 24.0}), GROUPS, compared, told, {}))
    assert said in page
    assert "Sampled with temperature 0.6, a seed a prompt." in page
    assert ("Every greedy" in page) is (compared is not None)


def test_kept_pages_are_those_of_their_reports() -> None:
    kept = Path(__file__).parents[3] / "results" / "benchmark"
    pages = {path: path.with_suffix(".md") for path in kept.glob("*.json")}
    reports = {path: page for path, page in pages.items() if "loads" in json.loads(path.read_text())}
    assert len(reports) > 5
    for path, page in reports.items():
        assert page.read_text() == render(BenchReport.model_validate_json(path.read_text())), page


def test_the_report_is_printed_and_written(
    report: BenchReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(report, tmp_path / "r.json")
    text = (tmp_path / "r.json").read_text()
    assert BenchReport.model_validate_json(text) == report
    with pytest.raises(ValueError, match="schema_version"):
        BenchReport.model_validate_json(text.replace('"schema_version": 1', '"schema_version": 2'))
    assert (tmp_path / "r.md").read_text() + "\n" == capsys.readouterr().out == render(report) + "\n"


def test_a_recorded_runs_table_names_the_arm_that_others_are_compared_with(report: BenchReport) -> None:
    load = report.loads[1]
    arms = {"auto": load.arms["auto"], "pinned-none": load.arms["none"]}
    turned = load.model_copy(update={"arms": arms, "ratios": {"auto": load.ratios["auto"]}})
    assert "over pinned-none" in _overview(turned, None)


def test_a_failing_arm_of_ours_fails_the_command(report: BenchReport) -> None:
    report = report.model_copy(update={"unavailable": {}})
    judge(report)  # what upstream's arms answer is told and no more
    for lost in ("auto", "EAGLE3"):  # its server is in no record: it never started
        with pytest.raises(WhiflashError, match=f"{lost}: the server did not start"):
            judge(report.model_copy(update={"unavailable": {lost: "the server did not start: why"}}))
    ours = {"auto": {"arguments": ["--speculative-algorithm", "WHIFLASH"]}}
    of_ours = report.model_copy(update={"provenance": {**report.provenance, "servers": ours}})
    (known,) = [d for d in report.differences if d["arm"] == "auto" and d["verdict"] == Verdict.DIFFERENT]
    near = {**known, "gap": 0.25}
    said = "auto: answers differ from plain decoding's, prompt t1 under closed-4 from token 5 on, .* are 0.25 apart"
    with pytest.raises(WhiflashError, match=said):
        judge(of_ours.model_copy(update={"differences": [near]}))
    plains = {"differences": [{**near, "of_plain": True}]}
    judge(of_ours.model_copy(update=plains))
    assert "Left out: 1 that plain decoding" in render(report.model_copy(update=plains))
    told = {**of_ours.provenance, "unjudged": "its weights are quantised"}
    with pytest.raises(WhiflashError, match="no tie could be judged: its weights are quantised"):
        judge(report.model_copy(update={"provenance": told}))


def test_differences_follow_the_tie_rule() -> None:
    """Gap 0.1 at a logit of 20 is within two units in the last place of bfloat16 (0.125 each); 0.5 is not."""
    prompt = Prompt("p", "chat", ())
    references = {
        "near": Reference(prompt, (1,), (5, 6, 7), (9.0, 0.1, 9.0), ""),
        "far": Reference(prompt, (1,), (5, 6, 7), (9.0, 0.5, 9.0), ""),
    }

    def cell(arm: str, name: str, tokens: tuple[int, ...], repetition: int) -> Cell:
        one = Answer(prompt=name, seconds=1, ttft=0.1, tokens=tokens, forwards=1)
        return Cell(load=ALONE, arm=arm, repetition=repetition, seconds=1, answers=(one,))

    cells = [cell("auto", name, (5, 9, 9), r) for name in references for r in range(3)]
    cells += [cell("auto", "near", (5, 6, 7), 3), cell("ar", "near", (5, 6), 0)]
    found = differences(cells, references, lambda reference, position: 20.0, "bfloat16")
    assert [(d.arm, d.prompt, d.verdict, d.position, d.gap) for d in found] == [
        ("auto", "near", Verdict.TIE, 1, 0.1),
        ("auto", "far", Verdict.DIFFERENT, 1, 0.5),
        ("ar", "near", Verdict.DIFFERENT, 2, None),
    ]
    # A difference that plain decoding has in the same place at the same load is no arm's.
    cells += [cell("none", "far", (5, 8, 8), 0), cell("ar", "far", (5, 6, 8), 0)]
    found = differences(cells, references, lambda reference, position: 20.0, "bfloat16")
    owners = {(d.arm, d.prompt): d.of_plain for d in found if d.verdict == Verdict.DIFFERENT}
    assert owners == {("none", "far"): False, ("auto", "far"): True, ("ar", "near"): False, ("ar", "far"): False}


def test_a_narrow_terminal_shows_every_figure_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Also if it can be written nowhere."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    kept = Path(__file__).parents[3] / "results" / "benchmark" / "report.json"
    found = BenchReport.model_validate_json(kept.read_text("utf-8"))
    with pytest.raises(FileNotFoundError):
        publish(found, tmp_path / "removed" / "out.json")
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    shown_of = [of.none.items() for of in found.loads[0].ratios.values()]
    ratios = [one for of in shown_of for name, one in of if name != "loops"]
    assert all(f"{one.ratio:.2f} [{one.low:.2f}, {one.high:.2f}]" in shown for one in ratios)
