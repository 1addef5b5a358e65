"""`whiflash evaluate --recorded`: recorded files in, figures and their table out."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from whiflash_sglang.checkpoints.manifest import embedded_bundle, load_manifest, lookup_of
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.lab.recorded.conversation import (
    ARGUMENTS,
    CALL,
    KINDS,
    QUOTED,
    Conversation,
    Renderer,
    Turn,
)
from whiflash_sglang.lab.recorded.drafting import PLAIN, Arm, arms_of, bounds_of
from whiflash_sglang.lab.recorded.files import read_recorded, read_tools
from whiflash_sglang.lab.statistics import paired_ratio
from whiflash_sglang.progress import progress
from whiflash_sglang.train.rounds import Tally, agreed, rounds

BEST = "best"
"""At every round the arm that accepts most, in hindsight."""

WIDEST = 64
"""Most drafts of a round, whatever an arm proposes."""

STRETCHES = (1, 2, 3, 5, 9, 17, 33)
"""First turn of each group of turns."""


class Cell(NamedTuple):
    """What rounds are counted by. turns: the first turn of the group."""

    conversation: str
    category: str
    kind: str
    turns: int


@dataclass
class Walked:
    """Tallies of every arm by cell; answer tokens that were walked through."""

    tallies: dict[str, dict[Cell, Tally]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(Tally))
    )
    turns: int = 0
    tokens: int = 0


def walk(turns: Iterable[Turn], arms: Mapping[str, Arm], together: Mapping[str, Arm]) -> Walked:
    """Walk every arm by itself, and `together` along the path of the best of them.

    A round begins behind a known token, drafts, and commits what agrees with the recorded text and one token more.
    It is shared out to the kinds of text that its tokens belong to, so that every arm has the same tokens of a kind.

    Args:
        turns: in the order in which a server would have got them. arms, together: two sets of the same arms, each
            with a state of its own.
    """
    done = Walked()
    for turn in turns:
        done.turns += 1
        done.tokens += len(turn.answer)
        for name, arm in arms.items():
            _follow(turn, [arm], done.tallies[name])
        if together:
            _follow(turn, list(together.values()), done.tallies[BEST])
    return done


def _follow(turn: Turn, arms: Sequence[Arm], tallies: dict[Cell, Tally]) -> None:
    for arm in arms:
        arm.begin(turn)
        arm.extend(turn.answer[:1])
    group = max(first for first in STRETCHES if first <= turn.number)
    drafts = 0

    def accepted(position: int) -> int:
        nonlocal drafts
        text = turn.answer[position:]
        proposed = [arm.propose(min(WIDEST, len(text))) for arm in arms]
        # Of arms that accept as much the narrower is the better.
        most, narrowest = max((agreed(one, text), -len(one)) for one in proposed)
        drafts = -narrowest
        return most

    for position, emitted in rounds(1, len(turn.answer), accepted):
        for kind, tokens in Counter(turn.kinds[position : position + emitted]).items():
            share = tokens / emitted
            cell = Cell(turn.conversation.id, turn.conversation.category, kind, group)
            tallies[cell].add(Tally(share, tokens, drafts * share))
        for arm in arms:
            arm.extend(turn.answer[position : position + emitted])


Keep = Callable[[Cell], bool]

GROUPS: dict[str, Callable[[Cell], Any]] = {
    "categories": lambda cell: cell.category,
    "kinds": lambda cell: cell.kind,
    "calls": lambda cell: "inside calls" if cell.kind in (CALL, ARGUMENTS, QUOTED) else "outside of calls",
    "turns": lambda cell: cell.turns,
}
"""What figures are given by, besides all together."""


@dataclass(frozen=True)
class RecordedSettings:
    """bundle: whose target's tokenizer and template, and whose copying arm. limit: conversations at most.

    about: keep only conversations about what these prompts are about (JSON lines), as `whiflash train split` sees it.
    arms: names of those to walk; None for all. tools: a JSON list of what was offered to conversations whose file does
    not say.
    """

    bundle: Path | None = None
    limit: int | None = None
    about: Path | None = None
    arms: Sequence[str] | None = None
    tools: Path | None = None


def evaluate_recorded(paths: Sequence[Path], settings: RecordedSettings) -> dict[str, Any]:
    """Acceptance lengths of the training-free arms over recorded conversations.

    Raises:
        ConfigError: naming the file and the place that cannot be read, or an arm that there is not.
    """
    from whiflash_sglang.train.answers.data import target_path

    bundle = settings.bundle or embedded_bundle()
    manifest = load_manifest(bundle)
    renderer = renderer_of(target_path(manifest.target), bundle)
    arms = arms_of(lookup_of(manifest), renderer.vocabulary, manifest.structure)
    known = {**arms, **bounds_of(lookup_of(manifest), renderer.vocabulary)}
    for name in settings.arms or ():
        if name not in known:
            raise ConfigError(f"arm {name!r} is not one of {', '.join(known)}")
    wanted = {name: make for name, make in known.items() if settings.arms is None or name in settings.arms}
    conversations = _chosen([one for path in paths for one in read_recorded(path)], settings)
    made = {name: make() for name, make in wanted.items()}
    together = {name: make() for name, make in wanted.items() if name in arms}
    done = walk(_tracked(conversations, renderer), made, together if len(together) > 1 else {})
    return {
        "bundle": manifest.name,
        "files": [path.name for path in paths],
        "conversations": len(conversations),
        "answers": done.turns,
        "answer_tokens": done.tokens,
        **tabulate(done),
    }


def _chosen(found: list[Conversation], settings: RecordedSettings) -> list[Conversation]:
    if settings.about is not None:
        import re

        from whiflash_sglang.train.answers.prompts import USERS, read_rows, topics_of

        users = re.compile(USERS)
        topics = set().union(*(topics_of(row, users) for row in read_rows(settings.about)))
        found = [one for one in found if topics & topics_of({"messages": one.messages}, users)]
        if not found:
            raise ConfigError(
                f"--prompts {settings.about}: no recorded conversation shares a user, a tool or a schema with one of "
                "them; give other prompts, or leave --prompts out"
            )
    if settings.tools is not None:
        tools = read_tools(settings.tools)
        found = [one if one.tools else replace(one, tools=tools) for one in found]
    return found[: settings.limit]


def renderer_of(target: Path, bundle: Path) -> Renderer:
    """Renders with a target's tokenizer, and the bundle's template where it has one."""
    from transformers import AutoTokenizer

    manifest = load_manifest(bundle)
    template = None if manifest.chat_template is None else bundle / manifest.chat_template
    text = None if template is None else template.read_text(encoding="utf-8")
    return Renderer(AutoTokenizer.from_pretrained(target), text)


def _tracked(conversations: Sequence[Conversation], renderer: Renderer) -> Iterator[Turn]:
    with progress() as bar:
        task = bar.add_task("walking recorded answers", total=sum(one.answers for one in conversations))
        for one in conversations:
            for turn in renderer.turns(one):
                yield turn
                bar.advance(task)


def tabulate(done: Walked) -> dict[str, Any]:
    """Figures of every group of cells: tokens, acceptance length and drafts per round of each arm.

    `overall`: all of them; `ratios`: every arm's acceptance length over plain lookup's, with the 95 %
    interval of a bootstrap over conversations.
    """
    result: dict[str, Any] = {}
    cells = {cell for tallies in done.tallies.values() for cell in tallies}
    for group, of in GROUPS.items():
        keys = sorted({of(cell) for cell in cells}, key=_order)
        result[group] = {str(key): _figures(done, _where(of, key)) for key in keys}
    result["overall"] = _figures(done, lambda _: True)
    if PLAIN in done.tallies:
        parts = {
            key: _ratios(done, _where(GROUPS[group], key))
            for group in ("kinds", "calls")
            for key in result[group]
        }
        result["ratios"] = {"overall": _ratios(done, lambda _: True), **parts}
    return result


def _where(of: Callable[[Cell], object], key: object) -> Keep:
    return lambda cell: of(cell) == key


def _order(key: Any) -> tuple[int, Any]:
    return (0, KINDS.index(key)) if key in KINDS else (1, key)


def _figures(done: Walked, keep: Keep) -> dict[str, Any]:
    sums = {name: _sum(tallies, keep) for name, tallies in done.tallies.items()}
    return {
        "tokens": next(iter(sums.values())).tokens,
        "acceptance_length": {name: round(tally.acceptance_length, 4) for name, tally in sums.items()},
        "drafts_per_round": {
            name: round(tally.drafts / tally.rounds, 2) if tally.rounds else None
            for name, tally in sums.items()
        },
    }


def _sum(tallies: Mapping[Cell, Tally], keep: Keep) -> Tally:
    total = Tally()
    for cell, tally in tallies.items():
        if keep(cell):
            total.add(tally)
    return total


def _ratios(done: Walked, keep: Keep) -> dict[str, dict[str, float]]:
    sums: dict[str, dict[str, Tally]] = {name: {} for name in done.tallies}
    for name, tallies in done.tallies.items():
        for cell, tally in tallies.items():
            if keep(cell):
                sums[name].setdefault(cell.conversation, Tally()).add(tally)
    tokens, rounds = (
        {
            name: np.array([[getattr(tally, part)] for _, tally in sorted(mine.items())], dtype=np.float64)
            for name, mine in sums.items()
        }
        for part in ("tokens", "rounds")
    )
    plain = (tokens[PLAIN], rounds[PLAIN], ["all"] * len(sums[PLAIN]))
    found = {name: paired_ratio(tokens[name], rounds[name], *plain) for name in sums if name != PLAIN}
    return {name: {k: round(v, 4) for k, v in one.model_dump().items()} for name, one in found.items()}


def recorded_table(result: Mapping[str, Any]) -> Table:
    """The result for a terminal."""
    names = list(result["overall"]["acceptance_length"])
    table = Table(
        title=f"acceptance length, {result['conversations']} recorded conversations, "
        f"{result['answer_tokens']} tokens of {result['bundle']}"
    )
    table.add_column("")
    table.add_column("tokens", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for group in GROUPS:
        for key, figures in result[group].items():
            _row(table, f"turn {key} on" if group == "turns" else key, figures, names)
        table.add_section()
    _row(table, "all", result["overall"], names)
    overall = result.get("ratios", {}).get("overall", {})
    if overall:
        ratios = (overall.get(name) for name in names)
        shown = (f"{r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" if r else "" for r in ratios)
        table.add_row(f"over {PLAIN}", "", *shown)
    drafts = result["overall"]["drafts_per_round"]
    table.add_row("drafts a round", "", *(f"{drafts[name]:.1f}" for name in names))
    return table


def _row(table: Table, label: str, figures: Mapping[str, Any], names: Sequence[str]) -> None:
    lengths = figures["acceptance_length"]
    table.add_row(label, str(figures["tokens"]), *(f"{lengths[name]:.2f}" for name in names))
