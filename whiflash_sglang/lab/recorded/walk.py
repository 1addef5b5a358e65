"""Arms walked through recorded answers, round by round, and what they would have accepted."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple

from whiflash_sglang.lab.recorded.drafting import Arm
from whiflash_sglang.lab.recorded.turns import Turn

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
class Tally:
    """Rounds, the tokens that they committed (the bonus token included), and drafts that were proposed."""

    rounds: float = 0.0
    tokens: int = 0
    drafts: float = 0.0

    def add(self, other: "Tally") -> None:
        """Count another's rounds here too."""
        self.rounds += other.rounds
        self.tokens += other.tokens
        self.drafts += other.drafts

    @property
    def acceptance_length(self) -> float:
        """Tokens per round."""
        return self.tokens / self.rounds if self.rounds else float("nan")


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
    position, last = 1, len(turn.answer)
    group = max(first for first in STRETCHES if first <= turn.number)
    while position < last:
        # Of arms that accept as much the narrower is the better.
        accepted, drafts = max(
            (_tried(turn, position, arm) for arm in arms), key=lambda tried: (tried[0], -tried[1])
        )
        emitted = min(accepted + 1, last - position)
        for kind, tokens in Counter(turn.kinds[position : position + emitted]).items():
            share = tokens / emitted
            cell = Cell(turn.conversation.id, turn.conversation.category, kind, group)
            tallies[cell].add(Tally(share, tokens, drafts * share))
        for arm in arms:
            arm.extend(turn.answer[position : position + emitted])
        position += emitted


def _tried(turn: Turn, position: int, arm: Arm) -> tuple[int, int]:
    """Accepted drafts, and drafts."""
    drafts = arm.propose(min(WIDEST, len(turn.answer) - position))
    pairs = zip(drafts, turn.answer[position:], strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)), len(drafts)
