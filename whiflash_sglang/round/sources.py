"""Draft sources: what arms that go by texts propose for requests, and how they extend each other's drafts. Imports no
SGLang.
"""

from collections.abc import Callable, Mapping
from functools import partial

from whiflash_sglang.arms.base import Drafter, of_text, widest_of
from whiflash_sglang.copying.copier import CONTEXT
from whiflash_sglang.drafts.candidates import Candidate, common_prefix
from whiflash_sglang.records.core import Round
from whiflash_sglang.records.request import Request
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.structure.spending import LOOKING, Spending


class DraftSources:
    """The arms of a worker that go by texts.

    Args:
        vocabulary: ids that the target has. spending: on grammars, by those that forbid drafts.

    Attributes:
        of_text: all of them. on_device: those for which the device drafts too. proposing: those that draft by what they
            propose, the former first (`choose_drafts`). proposers: the arm of each `Chosen.source`, 0 excepted; the
            last, at -1, is the device's. widest: most drafts of a round. width: most tokens of a candidate if texts are
            known late: two rounds of drafts.
    """

    def __init__(
        self, drafters: Mapping[str, Drafter], quarantine: Quarantine, vocabulary: int, spending: Spending
    ) -> None:
        self._quarantine, self.vocabulary, self.spending = quarantine, vocabulary, spending
        self.of_text = of_text(drafters)
        self.on_device = {arm: drafter for arm, drafter in self.of_text.items() if drafter.on_device}
        proposing = {arm: drafter for arm, drafter in self.of_text.items() if drafter.proposes}
        self.proposing = dict(sorted(proposing.items(), key=lambda one: one[0] not in self.on_device))
        self.proposers = ("", *self.proposing, *self.on_device)
        self.widest = widest_of(drafters)
        self.width = 2 * self.widest + 1
        # Each twice, since each may lead into what another one knows; who forbids drafts once more, of what came last.
        forbidding = [(arm, drafter) for arm, drafter in proposing.items() if drafter.forbids]
        self._turns = [*proposing.items(), *proposing.items(), *forbidding]

    def checked(
        self, arm: str, request: Request, propose: Callable[[], Candidate | None]
    ) -> Candidate | None:
        """Candidate of `arm` for a request, as far as it can be drafts. None: nothing, or it raised."""
        valid = None
        try:  # without `guard`, which takes a microsecond
            priced = self.of_text[arm].forbids
            candidate = self.spending.on(request.rid, propose, LOOKING) if priced else propose()
            valid = candidate and candidate.valid(self.vocabulary)
            if candidate and valid and len(valid.tokens) < len(candidate.tokens):
                self._quarantine.judge(arm, request, faulty=True)
        except Exception as error:
            self._quarantine.raised(arm, error, request)
        return valid

    def copies_itself(self, arm: str, candidate: Candidate) -> bool:
        """Whether the device copies all of it by itself, from the text as it is by then."""
        return arm in self.on_device and all(part.source == CONTEXT for part in candidate.parts)

    def extended(
        self, turn: Round, index: int, first: str, drafts: Candidate, room: int
    ) -> tuple[Candidate, int]:
        """Drafts of a request with what other arms know to follow, such as the copy that a chain leads into; and how
        many of the first are left.

        An arm is not asked behind what it proposed itself, nor again about drafts that nobody has changed since.

        Args:
            index: of the request. first: the arm whose `drafts` they are. room: tokens at most.
        """
        request, left, last = turn.requests[index], len(drafts.tokens), first
        answered: dict[str, Candidate] = {}
        for arm, drafter in self._turns:
            if (
                arm == last
                or answered.get(arm) is drafts
                or not self._quarantine.serves(arm, request)
                or not drafter.extends(request)
            ):
                continue
            extend = partial(drafter.extend_drafts, request, drafts, room, turn.plan.worth[arm])
            longer = self.checked(arm, request, extend)
            if longer is None:
                continue
            kept = common_prefix(drafts.tokens, longer.tokens)
            left = min(left, kept)
            last = arm if len(longer.tokens) > kept else last
            drafts = answered[arm] = longer
        return drafts, left
