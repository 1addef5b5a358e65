"""Groups: requests of one tenant that copy from each other's answers, as `n` answers to one prompt or by
the name of a task.

A group holds committed answers only: prompts and tools' results of others add nothing to a request's own.
"""

import ctypes
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from whiflash_sglang.copying.calibration import MatchCalibration, RequestCalibration, Seed
from whiflash_sglang.copying.tenants import Tenant
from whiflash_sglang.copying.texts import GAP, Source, Text

SIBLINGS = "whiflash-n:"
"""Beginning of the names of groups of `n` answers to one prompt. A group ends when none of its answers is written."""

TOKENS = 64_000
"""Most tokens of a group's ended answers. Beyond, the newer half stays."""

GROUPS, MOST = 1_000, 1_000_000
"""Most groups, and most tokens of all their ended answers. The group that was joined longest ago goes first."""

LIVE = 4
"""Most running requests of a group that a request copies from, the newest."""

FEWEST_TAKEN, PROBES = 0.05, 16
"""Least mean of right tokens per search of a group. Below it a request searches its group in its first `PROBES` rounds
only."""

Key = tuple[Tenant | None, str]
"""A group: whose it is, and its name."""


class Group:
    """Answers of requests that copy from each other. judge: chances of copies from groups, shared by all groups."""

    def __init__(self, library: ctypes.CDLL, judge: MatchCalibration) -> None:
        self._library, self._judge, self._habit = library, judge, RequestCalibration()
        self.ended = self._source()
        self.live: dict[str, Source] = {}
        self.taken = array("d", [0.0, 0.0])
        """Decayed sum of right tokens of searches, and their weight; compiled code counts them."""

    def _source(self, tokens: Sequence[int] = ()) -> Source:
        return Source(Text(self._library, tokens), self._judge, self._habit)

    def join(self, rid: str) -> None:
        """Add a request whose answer begins."""
        self.live[rid] = self._source()

    def keep(self, answer: Sequence[int]) -> None:
        """Add the whole answer of a request that ended, for others to copy from."""
        if len(answer) > 1:
            self.ended.text.extend([*answer[-TOKENS:], GAP])
        if len(self.ended.text) > TOKENS:
            self.ended = self._source(self.ended.text.tokens[-TOKENS // 2 :])

    def clear(self) -> None:
        """Drop all texts. Running requests go on without the group."""
        self.ended, self.live = self._source(), {}

    @property
    def nbytes(self) -> int:
        """Return the bytes of the group's texts."""
        return sum(source.text.nbytes for source in (self.ended, *self.live.values()))


class Member:
    """A request in its group.

    Args:
        rid: its id. prompt: number of tokens of its text before the answer's.
    """

    def __init__(self, group: Group, key: Key, rid: str, prompt: int) -> None:
        self.group, self.key, self.rid, self.prompt = group, key, rid, prompt
        self.looks = array("q", [0])
        """Rounds in which the group was searched; compiled code counts them."""

    @property
    def has_others(self) -> bool:
        """Whether the group has another answer or expects one, and its copies are taken often enough to be searched."""
        group = self.group
        taken, weight = group.taken
        is_searched = self.looks[0] < PROBES or taken >= FEWEST_TAKEN * weight
        return is_searched and self.rid in group.live and (len(group.live) > 1 or len(group.ended.text) > 0)

    def others(self) -> list[Source]:
        """Return the texts of the group's other answers that are searched."""
        if not self.has_others:
            return []
        running = [each for rid, each in self.group.live.items() if rid != self.rid][-LIVE:]
        return [each for each in (self.group.ended, *running) if len(each.text)]


class Groups:
    """All groups of a server, the one joined longest ago first. seed: initial chances of copies from groups."""

    def __init__(self, library: ctypes.CDLL, seed: Seed) -> None:
        self._library, self._seed, self._judge = library, seed, MatchCalibration(seed)
        self._groups: OrderedDict[Key, Group] = OrderedDict()
        self._tokens = 0

    def join(self, tenant: Tenant | None, name: str, rid: str, prompt: int) -> Member:
        """Add a new request to the group of this name, and return its membership. prompt: tokens of its prompt."""
        key = tenant, name
        if key not in self._groups:
            self._groups[key] = Group(self._library, self._judge)
        group = self._groups[key]
        self._groups.move_to_end(key)
        self._evict()
        group.join(rid)
        return Member(group, key, rid, prompt)

    def keep(self, member: Member, answer: Sequence[int]) -> None:
        """Add the whole answer of a member that ended to its group's texts."""
        group = member.group
        if self._groups.get(member.key) is group:
            self._tokens -= len(group.ended.text)
            group.keep(answer)
            self._tokens += len(group.ended.text)
            self._evict()

    def _evict(self) -> None:
        """Drop the groups that were joined longest ago, until at most `GROUPS` groups and `MOST` tokens are left."""
        while len(self._groups) > GROUPS or self._tokens > MOST:
            self._drop(next(iter(self._groups)))

    def _drop(self, key: Key) -> None:
        """Drop a group with its texts."""
        group = self._groups.pop(key)
        self._tokens -= len(group.ended.text)
        group.clear()

    def leave(self, member: Member) -> None:
        """Remove a request's running answer from its group; drop a group of `n` answers with the last of them."""
        group, key = member.group, member.key
        group.live.pop(member.rid, None)
        if key[1].startswith(SIBLINGS) and not group.live and self._groups.get(key) is group:
            self._drop(key)

    def forget(self) -> None:
        """Drop all groups with their texts, and reset the learned chances of copies from groups."""
        self._judge = MatchCalibration(self._seed)
        for key in list(self._groups):
            self._drop(key)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all texts."""
        return sum(group.nbytes for group in self._groups.values())
