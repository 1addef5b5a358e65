"""Groups: requests of one tenant that copy from each other's answers, as `n` answers to one prompt or by
the name of a task.

A group holds committed answers only: prompts and tools' results of others add nothing to a request's own.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from whiflash_sglang.copying.calibration import MatchCalibration, RequestCalibration, Seed
from whiflash_sglang.copying.tenants import Tenant
from whiflash_sglang.copying.texts import GAP, Source, Text
from whiflash_sglang.drafts.rates import Mean

if TYPE_CHECKING:
    from whiflash_kernels.cpu.copies import CompiledCopies

GROUP = "group"
"""The source of copies from other answers of the request's group."""

SIBLINGS = "whiflash-n:"
"""Beginning of the names of groups of `n` answers to one prompt. They end with the last answer."""

TOKENS = 64_000
"""Most tokens of a group's ended answers. Beyond, the newer half stays."""

GROUPS = 64
"""Most groups; the one that was joined longest ago goes first."""

LIVE = 4
"""Most running requests of a group that a request copies from, the newest."""

FEWEST_TAKEN = 0.1
"""Mean number of right tokens that a look finds in a group. Below that it is not searched."""
_MEMORY, _ENOUGH, _AGAIN = (
    256.0,
    64.0,
    16,
)  # looks of that mean, its weight before it decides, requests until a new one

Key = tuple[Tenant | None, str]
"""A group: whose it is, and its name."""


class Group:
    """The answers of one group. judge: chances of copies from groups, shared by all."""

    def __init__(self, compiled: "CompiledCopies", judge: MatchCalibration) -> None:
        self._compiled, self._judge, self._habit = compiled, judge, RequestCalibration()
        self.ended = self._source()
        self.live: dict[str, Source] = {}
        self.taken, self._begun = Mean(), 0

    def _source(self, tokens: Sequence[int] = ()) -> Source:
        return Source(GROUP, Text(self._compiled, tokens), self._judge, self._habit)

    def join(self, rid: str) -> None:
        """Begin the answer of a request."""
        self.live[rid] = self._source()
        self._begun += 1
        if self._begun % _AGAIN == 0:
            self.taken = Mean()

    def keep(self, answer: Sequence[int]) -> None:
        """Take the whole answer of a request that ended."""
        if len(answer) > 1:
            self.ended.text.extend([*answer[-TOKENS:], GAP])
        if len(self.ended.text) > TOKENS:
            self.ended = self._source(self.ended.text.tokens[-TOKENS // 2 :])

    def clear(self) -> None:
        """Drop all texts. Running requests go on without the group."""
        self.ended, self.live = self._source(), {}

    @property
    def is_taken(self) -> bool:
        """Whether copies from it have been right often enough, or that is not known yet."""
        return self.taken.weight < _ENOUGH or self.taken.value >= FEWEST_TAKEN

    @property
    def nbytes(self) -> int:
        """Return the bytes of its texts."""
        return sum(source.text.nbytes for source in (self.ended, *self.live.values()))


class Member:
    """A request in its group.

    Args:
        rid: its id. prompt: tokens that `extend` is given before the answer's.
    """

    def __init__(self, group: Group, key: Key, rid: str, prompt: int) -> None:
        self.group, self.key, self.rid, self._prompt = group, key, rid, prompt

    def others(self) -> Iterator[Source]:
        """Yield the texts of the group's other answers that are searched."""
        if not self.group.is_taken or self.rid not in self.group.live:
            return
        if len(self.group.ended.text):
            yield self.group.ended
        yield from [each for rid, each in self.group.live.items() if rid != self.rid][-LIVE:]

    @property
    def has_others(self) -> bool:
        """Whether there is an answer of another request to copy from, or one that will be."""
        return next(self.others(), None) is not None

    def extend(self, tokens: Sequence[int]) -> None:
        """Append committed tokens of the request's text to its answer, from which others copy."""
        answer = tokens[self._prompt :]
        self._prompt = max(self._prompt - len(tokens), 0)
        if own := self.group.live.get(self.rid):
            own.text.extend(answer)

    def looked(self, right: int) -> None:
        """Note the number of right tokens that a look found in the group."""
        self.group.taken.add(right, _MEMORY)


class Groups:
    """All groups of a server, by use. seed: initial chances of copies from them."""

    def __init__(self, compiled: "CompiledCopies", seed: Seed) -> None:
        self._compiled, self._seed, self._judge = compiled, seed, MatchCalibration(seed)
        self._groups: OrderedDict[Key, Group] = OrderedDict()

    def join(self, tenant: Tenant | None, name: str, rid: str, prompt: int) -> Member:
        """Return a request that begins as a member of the group of this name. prompt: tokens of its prompt."""
        key = tenant, name
        if key not in self._groups:
            self._groups[key] = Group(self._compiled, self._judge)
        group = self._groups[key]
        self._groups.move_to_end(key)
        if len(self._groups) > GROUPS:
            self._groups.popitem(last=False)
        group.join(rid)
        return Member(group, key, rid, prompt)

    def leave(self, member: Member) -> None:
        """End a request's part in its group, and a group of siblings with its last one."""
        group, key = member.group, member.key
        group.live.pop(member.rid, None)
        if key[1].startswith(SIBLINGS) and not group.live and self._groups.get(key) is group:
            del self._groups[key]

    def forget(self) -> None:
        """Drop all groups with their texts, and what copies from them have taught."""
        self._judge = MatchCalibration(self._seed)
        while self._groups:
            self._groups.popitem()[1].clear()

    @property
    def nbytes(self) -> int:
        """Return the bytes of all texts."""
        return sum(group.nbytes for group in self._groups.values())
