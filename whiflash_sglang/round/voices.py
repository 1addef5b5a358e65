"""What arms that speak say of requests, and how they go on behind each other's. Imports no SGLang."""

from collections.abc import Callable, Mapping
from functools import partial

from whiflash_sglang.core import Voice, agreement
from whiflash_sglang.drafters.base import Drafter, of_text, widest_of
from whiflash_sglang.lookup.copier import CONTEXT
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.routing.costs import Worth
from whiflash_sglang.structure.spending import LOOKING, Spending


class Voices:
    """The arms of a worker that go by texts.

    Args:
        vocabulary: ids that the target has. spending: on grammars, by those that forbid drafts.

    Attributes:
        of_text: all of them. on_device: those for which the device drafts too. speaking: those that draft by what they
            say, the former first (`choose_drafts`). width: most tokens of a voice if texts are known late: two
            rounds of drafts.
    """

    def __init__(
        self,
        drafters: Mapping[str, Drafter],
        quarantine: Quarantine,
        vocabulary: int,
        spending: Spending | None = None,
    ) -> None:
        self._quarantine, self.vocabulary = quarantine, vocabulary
        self.spending = spending or Spending()
        self.of_text = of_text(drafters)
        self.on_device = {arm: drafter for arm, drafter in self.of_text.items() if drafter.on_device}
        speaking = {arm: drafter for arm, drafter in self.of_text.items() if drafter.speaks}
        self.speaking = dict(sorted(speaking.items(), key=lambda one: one[0] not in self.on_device))
        self.width = 2 * widest_of(drafters) + 1
        # Each twice, since each may lead into what another one knows; who forbids drafts once more, of what came last.
        forbidding = [(arm, drafter) for arm, drafter in speaking.items() if drafter.forbids]
        self._turns = [*speaking.items(), *speaking.items(), *forbidding]

    def heard(self, arm: str, rid: str, say: Callable[[], Voice | None]) -> Voice | None:
        """What `arm` says for the request `rid`, as far as it can be drafts. None: nothing, or it raised an error."""
        sound = None
        with self._quarantine.guard(arm, rid):
            priced = self.of_text[arm].forbids
            said = self.spending.on(rid, say, LOOKING) if priced else say()
            sound = said and said.sound(self.vocabulary)
            if said and sound and len(sound.tokens) < len(said.tokens):
                self._quarantine.judge(arm, rid, faulty=True)
        return sound

    def found_on_device(self, arm: str, voice: Voice) -> bool:
        """Whether the device finds all of it by itself, in the text as it is by then."""
        return arm in self.on_device and all(part.source == CONTEXT for part in voice.parts)

    def extended(
        self, name: tuple[int, str], first: str, drafts: Voice, room: int, worth: Mapping[str, Worth]
    ) -> tuple[Voice, int]:
        """Drafts of a request with what other arms know to follow, such as the copy that a chain leads into; and how
        many of the first are left.

        An arm is not asked behind what it said itself.

        Args:
            name: row and id of the request. first: the arm whose `drafts` they are. room: tokens at most.
        """
        (row, rid), left, last = name, len(drafts.tokens), first
        for arm, drafter in self._turns:
            if arm == last or not self._quarantine.serves(arm, rid) or not drafter.extends(row):
                continue
            found = self.heard(arm, rid, partial(drafter.extend, row, drafts, room, worth[arm]))
            if found is None:
                continue
            kept = agreement(drafts.tokens, found.tokens)
            left = min(left, kept)
            last = arm if len(found.tokens) > kept else last
            drafts = found
        return drafts, left
