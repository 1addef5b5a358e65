"""Gain of routing over several calls: by agent, by tool, by turn and by drafter.

`print(collected.report())`; `collected.report().model_dump()` for machines; `.html()` for a page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pydantic import BaseModel, ConfigDict, Field

from whiflash_sdk.trace import ArmTotals, CollectedTrace, Rounds, Trace, sum_known

NO_AGENT, NO_TOOL = "no agent", "text only"
"""Names of the rows for answers whose request named no agent, and for answers that call no tool."""


class Share(Rounds):
    """Sums over some of the answers.

    name: that of the agent, the tools, the turn or the drafter.
    answers: how many, each choice of a response being one.
    rounds: verification passes of the target.
    tokens: committed by them, the bonus token of each round counted.
    seconds: from each answer's first token to its last, added up; None if no server sends them.
    saved: estimate of the seconds that drafts saved against plain decoding, by what rounds cost the server; below 0
        if they cost more; None if no server sends it.
    arms: the same answers by drafter.
    """

    name: str
    answers: int
    rounds: int
    tokens: int
    seconds: float | None = None
    saved: float | None = None
    arms: dict[str, ArmTotals] = Field(default={})

    @property
    def by_drafter(self) -> str:
        """Return each drafter's acceptance length as text, most tokens first; empty in a drafter's own row."""
        arms = sorted(self.arms.items(), key=lambda item: -item[1].tokens)
        return " · ".join(f"{arm} {totals.acceptance_length:.2f}" for arm, totals in arms)

    @classmethod
    def of(cls, name: str, traces: Sequence[Trace]) -> Share:
        """Sum these traces up in a row with this name."""
        names = dict.fromkeys(arm for trace in traces for arm in trace.arms)
        arms = {arm: ArmTotals.sum(trace.arms[arm] for trace in traces if arm in trace.arms) for arm in names}
        return cls(
            name=name,
            answers=len(traces),
            rounds=sum(trace.rounds for trace in traces),
            tokens=sum(trace.tokens for trace in traces),
            seconds=sum_known(trace.seconds for trace in traces),
            saved=sum_known(totals.saved for totals in arms.values()),
            arms=arms,
        )


class Report(BaseModel):
    """Sums over the calls of a `collect` block.

    total: all of it. agents: by the name that went out. tools: by the tools that an answer calls. turns: one by one, in
    the order they started. Every answer is in one row of each.
    """

    model_config = ConfigDict(frozen=True)

    total: Share
    agents: tuple[Share, ...]
    tools: tuple[Share, ...]
    turns: tuple[Share, ...]

    @classmethod
    def of(cls, traces: Sequence[CollectedTrace]) -> Report:
        """Make the report of these traces; the turns are in their order."""
        turns = tuple(
            Share.of(f"{number}. {agent_of(trace)}: {tools_of(trace)}", [trace])
            for number, trace in enumerate(traces, 1)
        )
        return cls(
            total=Share.of("all", traces), agents=_by(agent_of, traces), tools=_by(tools_of, traces), turns=turns
        )

    @property
    def groups(self) -> Iterator[tuple[str, tuple[Share, ...]]]:
        """Yield the title and the rows of each table. A drafter's row counts the answers in which it drafted."""
        drafters = tuple(
            Share(name=arm, answers=sum(arm in turn.arms for turn in self.turns), **dict(totals))
            for arm, totals in sorted(self.total.arms.items(), key=lambda item: -item[1].tokens)
        )
        yield from (("Agent", self.agents), ("Tool", self.tools), ("Turn", self.turns), ("Drafter", drafters))

    def html(self) -> str:
        """Render the report as a self-contained HTML page, without scripts or external files."""
        from whiflash_sdk.render.page import report_html

        return report_html(self)

    def __str__(self) -> str:
        """Return the report as text tables, for `print`."""
        from whiflash_sdk.render.text import report

        return report(self)


def agent_of(trace: CollectedTrace) -> str:
    """Return the name of the answer's row in the table of agents."""
    return trace.agent or NO_AGENT


def tools_of(trace: CollectedTrace) -> str:
    """Return the name of the answer's row in the table of tools."""
    return ", ".join(trace.tools) or NO_TOOL


def _by(key: Callable[[CollectedTrace], str], traces: Sequence[CollectedTrace]) -> tuple[Share, ...]:
    """Sum the traces up in a row for every key, the row with the most tokens first."""
    names = dict.fromkeys(map(key, traces))
    rows = [Share.of(name, [trace for trace in traces if key(trace) == name]) for name in names]
    return tuple(sorted(rows, key=lambda row: -row.tokens))
