"""What arms that speak say of requests, and how they go on behind each other's. Imports no SGLang."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from whiflash_sglang.core import Voice, agreement
from whiflash_sglang.drafters.base import Drafter, widest_of
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.routing.costs import Worth


@dataclass(frozen=True, slots=True)
class Voices:
    """The arms of a worker that need no pass of a model. vocabulary: ids that the target has."""

    drafters: Mapping[str, Drafter]
    quarantine: Quarantine
    vocabulary: int

    @property
    def speaking(self) -> list[Drafter]:
        """All of them, in their order."""
        return [drafter for drafter in self.drafters.values() if drafter.speaks]

    @property
    def width(self) -> int:
        """Tokens of a voice at most where texts are known late: a round's drafts behind those of a round before."""
        return 2 * widest_of(self.drafters) + 1

    def heard(self, arm: str, rid: str, say: Callable[[], Voice | None]) -> Voice | None:
        """What `arm` says for the request `rid`, as far as it can be drafts. None: nothing, or it raised an error."""
        sound = None
        with self.quarantine.guard(arm, rid):
            said = say()
            sound = said and said.sound(self.vocabulary)
            if said and sound and len(sound.tokens) < len(said.tokens):
                self.quarantine.judge(arm, rid, faulty=True)
        return sound

    def extended(
        self, name: tuple[int, str], first: str, drafts: Voice, room: int, worth: Mapping[str, Worth]
    ) -> tuple[Voice, int]:
        """Drafts of a request with what other arms know to follow, such as the copy that a chain leads into; and how
        many of the first are left.

        Each arm is asked twice, since each may lead into what another one knows, and not behind what it said itself.
        Who forbids drafts is asked once more, of what came last.

        Args:
            name: row and id of the request. first: the arm whose `drafts` they are. room: tokens at most.
        """
        (row, rid), left, last = name, len(drafts.tokens), first
        forbidding = [drafter for drafter in self.speaking if drafter.forbids]
        for drafter in (*self.speaking, *self.speaking, *forbidding):
            arm = drafter.arm
            if arm == last or not self.quarantine.serves(arm, rid) or not drafter.extends(row):
                continue

            def extend(drafter: Drafter = drafter, drafts: Voice = drafts) -> Voice:
                return drafter.extend(row, drafts, room, worth[drafter.arm])

            found = self.heard(arm, rid, extend)
            if found is None:
                continue
            kept = agreement(drafts.tokens, found.tokens)
            left = min(left, kept)
            last = arm if len(found.tokens) > kept else last
            drafts = found
        return drafts, left
