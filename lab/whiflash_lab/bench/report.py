"""Computes the report from measured cells; its schema. Needs no server.

`BenchReport.arms` and `.ratios` are those of the first load; every load is under `BenchReport.loads`.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from statistics import fmean
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from whiflash_lab.bench.arms import NONE, PINNED, STATIC
from whiflash_lab.bench.cells import Cell, Load, RoundMs, Turn, round_ms_of, switch_share_of
from whiflash_lab.bench.reference import Difference
from whiflash_sglang.files.equality import Verdict
from whiflash_sglang.telemetry.statistics import Floats, Interval, Percentiles, paired_ratio, percentiles_ms, rate

OVERALL, LOOPS = "overall", "loops"


def name_of(base: str) -> str:
    """Return the name that users know of the arm that others are compared with."""
    return "plain decoding" if base == NONE else base


def names_of(cells: Sequence[Cell], groups: Mapping[str, str]) -> list[str]:
    """Return the names of figures: the categories that occur, sorted, then `overall`, then `loops` if any."""
    occurring = {groups[answer.prompt] for cell in cells for answer in cell.answers}
    names = sorted(occurring - {LOOPS})
    return [*names, *([OVERALL] if names else []), *occurring.intersection([LOOPS])]


def belongs(group: str, name: str) -> bool:
    """Whether a prompt of this group counts under a name; `overall` leaves out those with looping answers."""
    return group == name or (name == OVERALL and group != LOOPS)


def whole(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells of each arm's whole repetitions under a load, or all of its first one."""
    counted = Counter((cell.load.label, cell.arm, cell.prompts) for cell in cells)
    least = {key[:2]: min(n for other, n in counted.items() if other[:2] == key[:2]) for key in counted}
    return [cell for cell in cells if cell.repetition < least[cell.load.label, cell.arm]]


def common(cells: Sequence[Cell], others: Sequence[Cell]) -> tuple[list[Cell], list[Cell]]:
    """Return the cells of both whose prompts and repetition the other has, too: an arm may fail in the middle."""
    mine, theirs = ({(cell.prompts, cell.repetition) for cell in one} for one in (cells, others))
    kept = ([cell for cell in one if (cell.prompts, cell.repetition) in mine & theirs] for one in (cells, others))
    return next(kept), next(kept)


def samples(cells: Sequence[Cell]) -> tuple[Floats, Floats]:
    """Return tokens and seconds, [units, repetitions]. A unit is the prompts of a cell, asked in each repetition."""
    units: dict[tuple[str, ...], dict[int, Cell]] = defaultdict(dict)
    for cell in cells:
        units[cell.prompts][cell.repetition] = cell
    rows = [list(by_repetition.values()) for _, by_repetition in sorted(units.items())]
    tokens = [[sum(answer.length for answer in cell.answers) for cell in row] for row in rows]
    seconds = [[c.answers[0].seconds if len(c.answers) == 1 else c.seconds for c in row] for row in rows]
    return np.array(tokens, dtype=np.float64), np.array(seconds, dtype=np.float64)


def within(cells: Sequence[Cell], groups: Mapping[str, str], name: str) -> list[Cell]:
    """Return the cells whose prompts all count under `name` (`belongs`)."""
    return [cell for cell in cells if all(belongs(groups[a.prompt], name) for a in cell.answers)]


def paired(cells: Sequence[Cell], others: Sequence[Cell], groups: Mapping[str, str]) -> Interval | None:
    """Return the rate of `cells` over that of `others` with the same prompts; the bootstrap draws within groups. None
    if there are no such prompts."""
    cells, others = common(cells, others)
    if not cells:
        return None
    strata = [groups[prompts[0]] for prompts in sorted({cell.prompts for cell in cells})]
    return paired_ratio(*samples(cells), *samples(others), strata)


class Figures(BaseModel, frozen=True, extra="forbid"):
    """Measured figures of one arm on one category of prompts.

    answers: timed ones, over all repetitions. output_tokens_per_s: of the whole exchange, prefill included; None
    where requests of several categories ran at the same time. acceptance_length: tokens per target forward.
    target_forwards: of one repetition; both None if the server does not say. answer_ms: of whole answers.
    switches_per_100_tokens, round_ms, switch_share: WHIFLASH only, if its clock distinguishes categories.
    switch_share: route, park and the catch-up beyond one round's tokens, of the round. mismatches: distinct answers
    that are not plain decoding's, or answers whose text is not the first server's; ties: those where rounding decided;
    both None where sampled answers were not compared.
    """

    answers: int
    output_tokens: int
    target_forwards: int | None
    output_tokens_per_s: float | None
    acceptance_length: float | None
    answer_ms: Percentiles | None = None
    ttft_ms: Percentiles | None
    tpot_ms: Percentiles | None
    switches_per_100_tokens: float | None
    mismatches: int | None
    ties: int | None
    round_ms: RoundMs | None
    switch_share: float | None


class Ratios(BaseModel, frozen=True, extra="forbid"):
    """An arm's rates over other arms' rates, by category.

    none: over `BenchReport.base`. over: over `BenchReport.over`. static: over the fastest arm of one drafter in that
    category (`static_arm`): upstream's EAGLE3 and DFLASH, or WHIFLASH pinned to one.
    """

    none: dict[str, Interval]
    static: dict[str, Interval]
    static_arm: dict[str, str]
    over: dict[str, Interval] = {}


class Jobs(BaseModel, frozen=True, extra="forbid"):
    """Recorded agents' jobs of one arm, subagents and tool times included.

    ms: of a job. ttft_ms: of a turn. faster: plain decoding's seconds a job over this arm's. prompt, cached: tokens of
    all prompts, and those found in the prefix cache; again: those that the agent's turn before had computed, and that
    were computed again. evicted: tokens; retracted: requests; None if not counted. Counts are of one
    repetition.
    """

    ms: Percentiles
    ttft_ms: Percentiles
    faster: Interval | None
    prompt: int
    cached: int
    again: int
    evicted: int | None
    retracted: int | None


class LoadReport(BaseModel, frozen=True, extra="forbid"):
    """Results of one load. turns: by arm, the mean of each turn over the conversations that have it. jobs: by arm."""

    load: Load
    arms: dict[str, dict[str, Figures]]
    ratios: dict[str, Ratios]
    turns: dict[str, list[Turn]] = {}
    jobs: dict[str, Jobs] = {}


class BenchReport(BaseModel, frozen=True, extra="forbid"):
    """Report that `--json` prints and `--out` writes.

    unavailable: arms that could not be asked to the end, and why. differences: every mismatch and tie. base: arm that
    all others are compared with, plain decoding or the first of running servers. over: another one, or None.
    """

    schema_version: Literal[1] = 1
    provenance: dict[str, Any]
    arms: dict[str, dict[str, Figures]]
    ratios: dict[str, Ratios]
    loads: list[LoadReport]
    unavailable: dict[str, str]
    differences: list[dict[str, Any]]
    categories: dict[str, int]
    over: str | None = None
    base: str = NONE


def build_report(
    cells: Sequence[Cell],
    groups: Mapping[str, str],
    compared: Sequence[Difference] | None,
    provenance: dict[str, Any],
    unavailable: Mapping[str, str],
    over: str | None = None,
    base: str = NONE,
) -> BenchReport:
    """Compute the report of all cells.

    Args:
        groups: prompt id → category, or `loops` for prompts whose plain answer ends in a loop.
        compared: differences of answers; None: answers were not compared.
        over, base: as in `BenchReport`.
    """

    def of_load(cells: Sequence[Cell]) -> LoadReport:
        load = cells[0].load
        arms: dict[str, dict[str, Figures]] = {}
        own: dict[str, list[Cell]] = defaultdict(list)
        for cell in cells:
            own[cell.arm].append(cell)
        for arm, mine in own.items():
            differs = compared and [d for d in compared if (d.load, d.arm) == (load.label, arm)]
            arms[arm] = {name: _figures(mine, groups, differs, name) for name in names_of(mine, groups)}
        ratios = {arm: _ratios(arm, own, groups, over, base) for arm in own if base in own and arm != base}
        played = {arm: mine for arm, mine in own.items() if any(a.turns for c in mine for a in c.answers)}
        turns = {arm: _turns(mine) for arm, mine in played.items()}
        jobs = {arm: _jobs(mine, played.get(NONE), groups) for arm, mine in played.items()}
        return LoadReport(load=load, arms=arms, ratios=ratios, turns=turns, jobs=jobs)

    by_load: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        by_load[cell.load.label].append(cell)
    loads = [of_load(own) for own in by_load.values()]
    return BenchReport(
        provenance=provenance,
        arms=loads[0].arms,
        ratios=loads[0].ratios,
        loads=loads,
        unavailable=dict(unavailable),
        differences=[asdict(difference) for difference in compared or ()],
        categories=dict(Counter(groups.values())),
        over=over,
        base=base,
    )


def _turns(cells: Sequence[Cell]) -> list[Turn]:
    """Return the mean of each turn over all conversations that have it."""
    conversations = [answer.turns for cell in cells for answer in cell.answers]
    return [
        Turn(**{name: fmean(getattr(turn, name) for turn in turns if turn) for name in Turn.model_fields})
        for turns in zip_longest(*conversations)
    ]


def _jobs(cells: Sequence[Cell], plain: Sequence[Cell] | None, groups: Mapping[str, str]) -> Jobs:
    names = sorted({answer.prompt for cell in cells for answer in cell.answers})

    def seconds(cells: Sequence[Cell]) -> Floats:
        """Return the seconds of each job, [jobs, repetitions]."""
        return np.array([[a.seconds for cell in cells for a in cell.answers if a.prompt == name] for name in names])

    turns = [turn for cell in cells for answer in cell.answers for turn in answer.turns]
    mine, repetitions = seconds(cells), len({cell.repetition for cell in cells})
    ms, ttft = percentiles_ms(mine.flatten().tolist()), percentiles_ms([turn.ttft for turn in turns])
    assert ms is not None
    assert ttft is not None  # a conversation has an answer
    faster = None
    if plain is not None and plain is not cells and all(both := common(cells, plain)):
        names = sorted({answer.prompt for cell in both[0] for answer in cell.answers})
        own, theirs = map(seconds, both)
        once = np.ones_like(own)
        faster = paired_ratio(once, own, once, theirs, [groups[name] for name in names])
    counted = {name: round(count / repetitions) for name, count in _counters(cells).items()}
    return Jobs(
        ms=ms,
        ttft_ms=ttft,
        faster=faster,
        prompt=round(sum(turn.prompt for turn in turns) / repetitions),
        cached=round(sum(turn.cached for turn in turns) / repetitions),
        again=round(sum(max(turn.known - turn.cached, 0) for turn in turns) / repetitions),
        evicted=counted.get("evicted"),
        retracted=counted.get("retracted"),
    )


def _figures(
    cells: Sequence[Cell], groups: Mapping[str, str], differing: Sequence[Difference] | None, name: str
) -> Figures:
    answers = [a for cell in cells for a in cell.answers if belongs(groups[a.prompt], name)]
    repetitions = len({cell.repetition for cell in cells})
    counts = [answer.forwards for answer in answers if answer.forwards is not None]
    forwards = sum(counts) if len(counts) == len(answers) else None
    drafted = sum(answer.length - answer.prefills for answer in answers)
    own = within(cells, groups, name)
    counted = _counters(own)
    rounds = counted if counted.get("rounds") else {}
    tokens = sum(answer.length for cell in own for answer in cell.answers)
    here = [d for d in differing or () if belongs(groups[d.prompt], name)]
    verdicts = [d.verdict for d in here if not d.of_plain]
    return Figures(
        answers=len(answers),
        output_tokens=sum(answer.length for answer in answers) // repetitions,
        target_forwards=None if forwards is None else forwards // repetitions,
        output_tokens_per_s=rate(*samples(own)) if cells[0].load.is_alone or name == OVERALL else None,
        acceptance_length=None if forwards is None else drafted / forwards if forwards else 1.0,
        answer_ms=percentiles_ms([a.seconds for a in answers if not a.turns]),
        ttft_ms=percentiles_ms([a.ttft for a in answers if a.ttft is not None]),
        tpot_ms=percentiles_ms([a.tpot for a in answers if a.tpot is not None]),
        switches_per_100_tokens=100 * rounds["switches"] / tokens if rounds else None,
        mismatches=None if differing is None else verdicts.count(Verdict.DIFFERENT),
        ties=None if differing is None else verdicts.count(Verdict.TIE),
        round_ms=round_ms_of(rounds) if rounds else None,
        switch_share=switch_share_of(rounds) if rounds else None,
    )


def _counters(cells: Sequence[Cell]) -> dict[str, float]:
    """Return each server counter's sum over `cells`, which are runs of the benchmark."""
    total: dict[str, float] = defaultdict(float)
    for cell in cells:
        for key, value in (cell.counters or {}).items():
            total[key] += value
    return dict(total)


def _ratios(
    arm: str, cells: Mapping[str, Sequence[Cell]], groups: Mapping[str, str], over: str | None, base: str
) -> Ratios:
    ratios = Ratios(none={}, static={}, static_arm={})
    statics = [key for key in cells if key.split(":")[0] in (*STATIC, *PINNED)]
    for name in names_of(cells[arm], groups):
        if not cells[arm][0].load.is_alone and name != OVERALL:
            continue
        chosen = {key: own for key in cells if (own := within(cells[key], groups, name))}
        rates = {key: rate(*samples(chosen[key])) for key in statics if key in chosen and arm not in statics}
        asked = {key: {cell.prompts for cell in own} for key, own in chosen.items()}  # fewer of an arm that was lost
        best = max(rates, key=lambda key: (len(asked[key] & asked[arm]), rates[key]), default=None)
        for found, other in ((ratios.none, base), (ratios.over, over if over != arm else None), (ratios.static, best)):
            if other in chosen and (ratio := paired(chosen[arm], chosen[other], groups)):
                found[name] = ratio
        if best is not None:
            ratios.static_arm[name] = best
    return ratios
