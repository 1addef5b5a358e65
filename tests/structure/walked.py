"""The reference of `automaton.cpp` in Python."""

import ctypes
import re
from array import array
from collections.abc import Collection, Sequence
from typing import Any

from whiflash_kernels.cpu import automaton
from whiflash_kernels.cpu.automaton import LOST, NONE, REFUSED

from whiflash_sglang.structure.chances import DECAY, SEED

NOT, KNOWN, CHOICE = range(3)
SURE, CUTS = 0.995, 512
MARKS = re.compile(rb"[^\w\x80-\xff]*")


def counts_of(table: automaton.Table) -> list[int]:
    """Nodes, edges and choices of a compiled table; edges and steps that were asked for."""
    found = array("q", [0] * 5)
    table.library.whiflash_counts(table.at, found.buffer_info()[0])
    return found.tolist()


def cuts_of(walks: automaton.Walks) -> list[tuple[int, int, int]]:
    """Each place that the target cuts otherwise: the token before it, the tokenizer's and the target's."""
    found = array("i", [0]) * (3 * CUTS)
    count = walks.lessons.cuts(found.buffer_info()[0])
    return [(found[i], found[i + 1], found[i + 2]) for i in range(0, 3 * count, 3)]


def whole(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return ""


def plain(text: str) -> bool:
    return not any(c in '"\\' or c < " " or "\x7f" <= c < "\xa0" for c in text)


class Walks:
    def __init__(self, library: Any, token_bytes: Sequence[bytes], special: Collection[int]) -> None:
        self.bytes, self.special, self.lessons, self.cuts = token_bytes, special, self, dict[tuple[int, int], int]()

    def learn(self, right: int, seen: int) -> None:
        kinds = ctypes.c_double * len(SEED)
        self.right, self.seen, self.cuts = kinds.from_address(right), kinds.from_address(seen), {}

    def text(self, token: int) -> bytes:
        return self.bytes[token] if 0 <= token < len(self.bytes) else b""

    def rate(self, kinds: int) -> tuple[float, int]:
        return min((self.right[kind] / self.seen[kind], kind) for kind in range(len(SEED)) if kinds >> kind & 1)

    def go_on(
        self, walk: "Walk", drafts: Sequence[int], before: Sequence[float], room: int, worth: float, paid: int
    ) -> tuple[int, list[int], list[float]]:
        on, node = walk.table, LOST if walk.ended or walk.unfollowed else walk.node
        on.asking, kept = walk, 0
        while kept < len(drafts) and node >= 0:
            if (after := on.follow(node, drafts[kept:])) == REFUSED:
                break
            node, kept = after, kept + 1
        kept = len(drafts) if node < 0 else kept
        chance = before[kept - 1] if kept else 1.0
        least, last = worth * (before[paid - 1] if 0 < paid <= kept else 1.0), drafts[kept - 1] if kept else walk.last
        tokens, alive = list[int](), list[float]()
        while kept + len(tokens) < room and node >= 0:
            usual, _ = on.known(node)
            token, kinds = on.cut(node, last)
            if token < 0 or (token != usual and on.follow(node, [token]) < 0):
                break
            chance *= min(self.rate(kinds)[0], SURE)
            place = kept + len(tokens) + 1
            if place > paid and not chance >= least:
                break
            least *= chance if place == paid else 1.0
            tokens.append(last := token)
            alive.append(chance)
            node = on.follow(node, [token]) if place < room else node
        return kept, tokens, alive


class Table:
    def __init__(self, walks: Walks, answers: Any) -> None:
        self.walks, self.answers, self.asking = walks, answers, None
        self.words = list[Sequence[str]]()
        self.clear()

    def clear(self) -> None:
        self.nodes = list[dict[str, Any]]()
        self.edges, self.choices = dict[tuple[int, int], int](), dict[tuple[int, Any], tuple[int, int]]()

    def words_of(self, words: Sequence[str]) -> int:
        self.words.append(words)
        return len(self.words) - 1

    def node(self) -> int:
        self.nodes.append({"asked": NOT, "stay": None})
        return len(self.nodes) - 1

    def stay(self, node: int, leaving: bytes, ending: bytes, only_plain: bool, words: int, to: int) -> None:
        self.nodes[node]["stay"] = leaving, ending, only_plain, words, to

    def edge(self, node: int, token: int, after: int) -> None:
        self.edges[node, token] = after

    def after(self, node: int, token: int) -> int:
        return self.follow(node, [token], ask=False)

    def asked(self, node: int) -> int:
        return int(self.nodes[node]["asked"])

    def step(self, node: int, token: int, kinds: int) -> None:
        self.nodes[node] |= {"asked": KNOWN, "step": (token, kinds)}

    def choose(self, node: int, words: Sequence[int], token: int, kinds: int) -> None:
        if self.asked(node) != CHOICE:
            self.nodes[node] |= {"asked": CHOICE, "among": words}
        self.choices[node, self.best(node)] = token, kinds

    def best(self, node: int) -> tuple[int, bool]:
        used = [self.answers.uses(word) for word in self.nodes[node]["among"]]
        best = used.index(max(used))
        return best, used[best] > max((each for at, each in enumerate(used) if at != best), default=0)

    def follow(self, node: int, run: Sequence[int], ask: bool = True, written: bool = False) -> int:
        token = run[0]
        if self.stays(node, token):
            return int(self.nodes[node]["stay"][-1])
        if ask and self.edges.get((node, token), LOST) in ((LOST, REFUSED) if written else (LOST,)):
            self.answers.edges(node, run[:64], written)
        return self.edges.get((node, token), LOST)

    def stays(self, node: int, token: int) -> bool:
        text = whole(self.walks.text(token))
        if self.nodes[node]["stay"] is None or not text or token in self.walks.special:
            return False
        leaving, ending, only_plain, words, _ = self.nodes[node]["stay"]
        data = text.encode()
        if set(data) & set(leaving) or data[-1] in ending or (only_plain and not plain(text)):
            return False
        return words == NONE or not any(word.startswith(text) for word in self.words[words])

    def known(self, node: int, ask: bool = True) -> tuple[int, int]:
        for _ in range(2):
            if self.asked(node) == KNOWN:
                return self.nodes[node]["step"]
            if self.asked(node) == CHOICE and (step := self.choices.get((node, self.best(node)))):
                return step
            if not ask:
                break
            self.answers.step(node)
            ask = False
        return NONE, 0

    def begins_with(self, node: int, token: int) -> bool:
        left = self.walks.text(token)
        found = bool(left)
        while left and node >= 0:
            following, _ = self.known(node, ask=False)
            text = self.walks.text(following)
            if not text or not (text.startswith(left) or left.startswith(text)):
                return False
            left = left[len(text) :]
            node = self.follow(node, [following], ask=False) if left else node
        return found and not left

    def cut(self, node: int, before: int) -> tuple[int, int]:
        token, kinds = self.known(node, ask=False)
        written = self.walks.cuts.get((before, token), NONE)
        return (written if written != NONE and self.begins_with(node, written) else token), kinds


class Walk:
    def __init__(self, table: Table, node: int, last: int) -> None:
        self.table, self.node, self.last, self.ended, self.unfollowed = table, node, last, False, list[int]()

    def node_of(self) -> int:
        return self.node

    def move(self, table: Table, node: int) -> None:
        self.table, self.node = table, node

    def take(self, count: int) -> list[int]:
        taken, self.unfollowed = self.unfollowed, []
        assert len(taken) == count
        self.last = taken[-1] if taken else self.last
        return taken

    def advance(self, tokens: Sequence[int], *, ask: bool) -> int:
        self.table.asking, learns = self, not self.unfollowed
        self.unfollowed += tokens
        while self.unfollowed and not self.ended:
            token = self.unfollowed[0]
            learns = learns and self.learn(token)
            after = self.table.follow(self.node, self.unfollowed, ask, written=True)
            if after == LOST or (after == REFUSED and not ask):
                break
            self.last = self.unfollowed.pop(0)
            self.ended = after < 0
            self.node = self.node if self.ended else after
        if self.ended:
            self.unfollowed = []
        return -1 if self.ended else len(self.unfollowed)

    def learn(self, token: int) -> bool:
        on, walks = self.table, self.table.walks
        usual, _ = on.known(self.node, ask=False)
        said, kinds = on.cut(self.node, self.last)
        if said == NONE:
            return False
        _, kind = walks.rate(kinds)
        walks.right[kind] = walks.right[kind] * DECAY + (said == token)
        walks.seen[kind] = walks.seen[kind] * DECAY + 1.0
        marks = all(MARKS.fullmatch(walks.text(each)) for each in (self.last, usual, token))
        if said != token and marks and on.begins_with(self.node, token):
            walks.cuts.pop((self.last, usual), None)
            if token != usual:
                walks.cuts[self.last, usual] = token
            if len(walks.cuts) > CUTS:
                del walks.cuts[next(iter(walks.cuts))]
        return said == token
