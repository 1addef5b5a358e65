"""What playing recorded conversations came to: figures by arm, as tables and as markdown. Needs no server."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from whiflash_sglang.lab.bench.cells import PlayedCell
from whiflash_sglang.lab.bench.recorded import Talk
from whiflash_sglang.lab.statistics import Interval, paired_ratio, rate


def figures(talks: Sequence[Talk], cells: Sequence[PlayedCell]) -> dict[str, dict[str, Any]]:
    """By conversations at a time and by arm: tokens a second, acceptance length, ratios over every other arm with
    95 % intervals.

    Args:
        talks: all that were played. cells: of whole repetitions, every arm's of each.
    """
    by_id = {talk.id: talk for talk in talks}
    found = {}
    for at_once in dict.fromkeys(cell.at_once for cell in cells):
        own = [cell for cell in cells if cell.at_once == at_once]
        found[str(at_once)] = _figures(by_id, own)
    return found


def _figures(talks: Mapping[str, Talk], cells: Sequence[PlayedCell]) -> dict[str, Any]:
    groups = list(dict.fromkeys(cell.talks for cell in cells))
    repetitions = len({cell.repetition for cell in cells})
    answers = [[task.answer for key in group for task in talks[key].tasks] for group in groups]
    lengths = np.array([[float(sum(map(len, own)))] * repetitions for own in answers])
    drafted = sum(len(answer) - 1 for own in answers for answer in own) * repetitions
    strata = [talks[group[0]].category for group in groups]
    times, rounds = dict[str, np.ndarray](), Counter[str]()
    for cell in cells:
        own = times.setdefault(cell.arm, np.zeros((len(groups), repetitions)))
        own[groups.index(cell.talks), cell.repetition] = cell.seconds
        rounds[cell.arm] += cell.rounds
    found: dict[str, Any] = {}
    for name, own in times.items():
        over: dict[str, Interval] = {
            other: paired_ratio(lengths, own, lengths, theirs, strata)
            for other, theirs in times.items()
            if other != name
        }
        found[name] = {
            "output_tokens_per_s": rate(lengths, own),
            "acceptance_length": drafted / rounds[name] if rounds[name] else 1.0,
            "over": {other: ratio.model_dump() for other, ratio in over.items()},
        }
    return found


def recorded_rows(arms: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of one number of conversations at a time."""
    header = ["arm", "tokens/s", "acceptance length", *(f"over {name}" for name in arms)]
    rows = []
    for name, own in arms.items():
        ratios = (own["over"].get(other) for other in arms)
        shown = (f"{r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" if r else "" for r in ratios)
        rows.append([name, f"{own['output_tokens_per_s']:.1f}", f"{own['acceptance_length']:.2f}", *shown])
    return header, rows


def recorded_tables(result: Mapping[str, Any]) -> list[Table]:
    """One table for every number of conversations at a time."""
    tables = []
    for at_once, arms in result["concurrency"].items():
        table = Table(
            title=f"{at_once} at a time, {result['talks']} conversations, {result['tokens']} forced tokens"
        )
        header, rows = recorded_rows(arms)
        for column in header:
            table.add_column(column, justify="left" if column == "arm" else "right")
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def recorded_page(result: Mapping[str, Any], command: str) -> str:
    """The same as a Markdown page. command: what printed it."""
    made, count = result["provenance"], result["repetitions"]
    repetitions = "1 repetition" if count == 1 else f"{count} repetitions"
    parts = [
        f"# Recorded conversations, forced: {', '.join(result['files'])}",
        f"{made['hardware']['cpu']}, {made['hardware']['cores']} cores, {made['threads']} threads a server, "
        f"{made['dtype']}, SGLang {made['packages']['sglang']}, torch {made['packages']['torch']}. "
        f"{repetitions}, interleaved; {result['talks']} conversations, {result['answers']} "
        f"answers, {result['tokens']} forced tokens. Load of the machine before "
        f"{made['busy_before']['load_1min']:.1f}, after {made['busy_after']['load_1min']:.1f}.",
        "Rates count the whole exchange, prefill included. In brackets: 95 % paired bootstrap intervals over "
        "conversations and repetitions. Acceptance length: tokens per target forward.",
    ]
    for at_once, arms in result["concurrency"].items():
        header, rows = recorded_rows(arms)
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        parts += [f"## {at_once} at a time", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    parts.append(f"`{command}`")
    return "\n\n".join(parts) + "\n"
