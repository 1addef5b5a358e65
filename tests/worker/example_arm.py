"""A drafter in fifty lines: it expects what followed the text's last token before.

`docs/dev/add-a-drafter.md` walks through it; `test_example_arm.py` serves requests with it.
"""

from collections.abc import Sequence

from whiflash_sglang.arms.base import TextDrafter
from whiflash_sglang.drafts.candidates import Candidate, Part, common_prefix
from whiflash_sglang.drafts.rates import Rates
from whiflash_sglang.prices.costs import Worth
from whiflash_sglang.records.core import History
from whiflash_sglang.records.request import Request

ARM = "again"


class AgainArm(TextDrafter):
    """Drafts the tokens behind the last token's newest earlier place. It keeps nothing itself: a request has its text.

    Attributes:
        judged: of each proposal, how many tokens are known to be right or wrong, and how many were right.
    """

    arm, sources, max_drafts = ARM, (ARM,), 4

    def __init__(self) -> None:
        self.judged: list[tuple[int, int]] = []
        self._right = Rates([0.5], weight=4.0, decay=0.98)

    def propose(
        self, request: Request, length: int, history: History, worth: Worth, under_way: int = 0
    ) -> Candidate | None:
        text, proposed = request.kept.pop(ARM, ([], []))
        new = history(len(text))  # costs what it returns: ask for what was not seen
        self._judge(proposed, new)
        text.extend(new)
        begin = next((place + 1 for place in range(len(text) - 2, -1, -1) if text[place] == text[-1]), 0)
        expected = text[begin:][: self.max_drafts] if begin else []
        request.kept[ARM] = text, expected
        if not expected:
            return None
        alive = [self._right.of(0) ** (place + 1) for place in range(len(expected))]
        count = sum(chance >= worth.least_chance for chance in alive)
        return Candidate(expected[:count], alive[:count], [Part(ARM, count)], at=len(text))

    def _judge(self, proposed: Sequence[int], committed: Sequence[int]) -> None:
        """The text shows how right a proposal was, whoever drafted; behind the first wrong token nothing is known."""
        known, right = min(len(proposed), len(committed)), common_prefix(proposed, committed)
        self.judged.append((known, right))
        for place in range(min(known, right + 1)):
            self._right.observe(0, place < right)
