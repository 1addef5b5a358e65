"""A drafter in fifty lines: it expects what followed the text's last token before.

`docs/dev/add-a-drafter.md` walks through it; `test_example_arm.py` serves requests with it.
"""

from collections.abc import Sequence

from whiflash_sglang.arms.base import TextDrafter
from whiflash_sglang.drafts.candidates import Candidate, Part
from whiflash_sglang.drafts.rates import Rates
from whiflash_sglang.prices.costs import Worth
from whiflash_sglang.records.core import History

ARM = "again"


class AgainArm(TextDrafter):
    """Drafts the tokens behind the last token's newest earlier place. It keeps the text of each request.

    Attributes:
        judged: of each round, how many tokens were proposed, and how many of them were right.
    """

    arm, sources, max_drafts = ARM, (ARM,), 4

    def __init__(self) -> None:
        self.judged: list[tuple[int, int]] = []
        self._right = Rates([0.5], weight=4.0, decay=0.98)
        self._texts: dict[int, list[int]] = {}

    def propose(
        self, row: int, length: int, history: History, worth: Worth, under_way: int = 0
    ) -> Candidate | None:
        text = self._texts.setdefault(row, [])
        text.extend(history(len(text)))  # costs what it returns: ask for what was not seen
        begin = next((place + 1 for place in range(len(text) - 2, -1, -1) if text[place] == text[-1]), 0)
        if not begin:
            return None
        chance, alive = self._right.of(0), []
        while len(alive) < self.max_drafts and chance ** (len(alive) + 1) >= worth.least_chance:
            alive.append(chance ** (len(alive) + 1))
        tokens = text[begin:][: len(alive)]
        return Candidate(tokens, alive[: len(tokens)], [Part(ARM, len(tokens))], at=len(text))

    def observe(self, row: int, proposed: int, accepted: int, confidences: Sequence[float]) -> None:
        self.judged.append((proposed, accepted))
        for place in range(min(proposed, accepted + 1)):  # behind the first that is wrong nothing is known
            self._right.observe(0, place < accepted)

    def release(self, row: int) -> None:
        self._texts.pop(row, None)
