"""Draft sources: asks text drafters (lookup, structure) for candidates and lets them extend each other's.

Imports no SGLang.
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
    """Asks a worker's text drafters for candidates, and has them extend the drafts of others.

    Args:
        vocabulary: number of ids that the target has. spending: counts the seconds that requests spend on grammars, in
            proposals of drafters that `forbids`.

    Attributes:
        of_text: all text drafters, by arm. on_device: those for which the device drafts too. proposing: those that
            draft by `propose`, `on_device` first, as `choose_drafts` expects. proposers: arm by `Chosen.source`, from 1
            on; -1 is the arm for which the device copies. widest: most drafts of a round. width: most tokens of a
            candidate: two rounds of drafts, since the host may know texts a round late.
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
        # Each is asked twice, since its tokens may lead into text that an earlier one knows. Arms that forbid drafts
        # are asked once more, to check the tokens that came last.
        forbidding = [(arm, drafter) for arm, drafter in proposing.items() if drafter.forbids]
        self._turns = [*proposing.items(), *proposing.items(), *forbidding]

    def checked(self, arm: str, request: Request, propose: Callable[[], Candidate | None]) -> Candidate | None:
        """Return what `propose` of `arm` proposes, cut before its first invalid token or chance; None: nothing, or it
        raised. Faults go to the quarantine.
        """
        valid = None
        try:  # not `guard`, which takes a microsecond for each request and arm
            priced = self.of_text[arm].forbids
            candidate = self.spending.on(request.rid, propose, LOOKING) if priced else propose()
            valid = candidate and candidate.valid(self.vocabulary)
            if candidate and valid and len(valid.tokens) < len(candidate.tokens):
                self._quarantine.judge(arm, request, faulty=True)
        except Exception as error:
            self._quarantine.raised(arm, error, request)
        return valid

    def copies_itself(self, arm: str, candidate: Candidate) -> bool:
        """Whether the device makes the whole candidate itself, as a copy from the request's newest text."""
        return arm in self.on_device and all(part.source == CONTEXT for part in candidate.parts)

    def extended(self, turn: Round, index: int, first: str, drafts: Candidate, room: int) -> Candidate:
        """Return a request's candidate extended by other text drafters, such as forced text by a copy. A drafter may
        also cut drafts that it forbids. The result ends with the first token that ends the request.

        An arm is not asked to extend its own tokens, nor asked again about drafts that have not changed since.

        Args:
            index: the request in the batch. first: the arm that made `drafts`. room: most tokens in all.
        """
        request, last = turn.requests[index], first
        answered: dict[str, Candidate] = {}
        for arm, drafter in self._turns:
            if (
                arm == last
                or answered.get(arm) is drafts
                or not self._quarantine.serves(arm, request)
                or not drafter.extends(request)
            ):
                continue
            extend = partial(drafter.extend_drafts, request, drafts, room, turn.plan.worth)
            longer = self.checked(arm, request, extend)
            if longer is None:
                continue
            kept = common_prefix(drafts.tokens, longer.tokens)
            last = arm if len(longer.tokens) > kept else last
            drafts = answered[arm] = longer
        return drafts.until(request.stops)
