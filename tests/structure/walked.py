"""The reference of `automaton.h` in Python."""

import ctypes
import re
from array import array
from collections.abc import Collection, Sequence
from typing import Any

from whiflash_kernels.cpu import texts
from whiflash_kernels.cpu.texts import LOST, NONE, REFUSED

from whiflash_sglang.drafts.candidates import SOURCES, Candidate, Part
from whiflash_sglang.structure.chances import DECAY, SEED

NOT, KNOWN, CHOICE = range(3)
SURE, CUTS = 0.995, 512
MARKS = re.compile(rb"[^\w\x80-\xff]*")


def counts_of(table: texts.Table) -> list[int]:
    """Nodes, edges and choices of a compiled table; edges and steps that were asked for."""
    found = array("q", [0] * 5)
    table.library.whiflash_counts(table.at, found.buffer_info()[0])
    return found.tolist()


def cuts_of(walks: texts.Walks) -> list[tuple[int, int, int]]:
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


class Table:
    def __init__(self, walks: Walks, answers: Any, most: int) -> None:
        self.walks, self.answers, self.most, self.asking = walks, answers, most, 0
        self.words = list[Sequence[str]]()
        self.clear()

    def clear(self) -> None:
        self.nodes = list[dict[str, Any]]()
        self.edges, self.choices = dict[tuple[int, int], int](), dict[tuple[int, Any], tuple[int, int]]()

    def full(self) -> bool:
        return len(self.nodes) + len(self.edges) >= self.most

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
        used = [self.answers.uses(self.asking, word) for word in self.nodes[node]["among"]]
        best = used.index(max(used))
        return best, used[best] > max((each for at, each in enumerate(used) if at != best), default=0)

    def follow(self, node: int, run: Sequence[int], ask: bool = True, written: bool = False) -> int:
        token = run[0]
        if self.stays(node, token):
            return int(self.nodes[node]["stay"][-1])
        if ask and self.edges.get((node, token), LOST) in ((LOST, REFUSED) if written else (LOST,)):
            self.answers.edges(self.asking, node, run[:64], written)
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
            self.answers.step(self.asking, node)
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
    def __init__(
        self, table: Table, node: int, last: int, known: int, name: int, shared: bool, stops: Sequence[int]
    ) -> None:
        self.table, self.node, self.last, self.ended, self.left = table, node, last, False, list[int]()
        self.at, self.text, self.source, self.shared = id(self), known, SOURCES[name], shared

    def known(self) -> int:
        return self.text

    def node_of(self) -> int:
        return self.node

    def move(self, table: Table, node: int) -> None:
        self.table, self.node = table, node

    def unfollowed(self) -> list[int]:
        taken, self.left = self.left, []
        self.last = taken[-1] if taken else self.last
        return taken

    def read(self, tokens: Sequence[int]) -> None:
        self.text += len(tokens)
        self.commit(tokens, ask=self.shared, learns=True)
        lost = self.left or not self.table.asked(self.node) or self.table.full()
        if not self.shared and not self.ended and lost:
            self.table.answers.restart(self.at)

    def follow(self, tokens: Sequence[int]) -> None:
        self.commit(tokens, ask=False, learns=False)

    def commit(self, tokens: Sequence[int], *, ask: bool, learns: bool) -> None:
        self.table.asking, learns = self.at, learns and not self.left
        self.left += tokens
        while self.left and not self.ended:
            token = self.left[0]
            learns = learns and self.learn(token)
            after = self.table.follow(self.node, self.left, ask, written=True)
            if after == LOST or (after == REFUSED and not ask):
                break
            self.last = self.left.pop(0)
            self.ended = after < 0
            self.node = self.node if self.ended else after
        if self.ended:
            self.left = []

    def go_on(self, drafts: Candidate, room: int, price: float, paid: int) -> Candidate:
        on, node = self.table, LOST if self.ended or self.left else self.node
        on.asking, kept = self.at, 0
        while kept < len(drafts.tokens) and node >= 0:
            if (after := on.follow(node, drafts.tokens[kept:])) == REFUSED:
                break
            node, kept = after, kept + 1
        drafts = drafts if node < 0 else drafts.first(kept)
        kept, tokens, alive = len(drafts.tokens), list[int](), list[float]()
        chance, last = (drafts.alive[-1], drafts.tokens[-1]) if kept else (1.0, self.last)
        least = drafts.least_chance(price, paid)
        while kept + len(tokens) < room and node >= 0:
            usual, _ = on.known(node)
            token, kinds = on.cut(node, last)
            if token < 0 or (token != usual and on.follow(node, [token]) < 0):
                break
            chance *= min(on.walks.rate(kinds)[0], SURE)
            place = kept + len(tokens) + 1
            if place > paid and not chance >= least:
                break
            least *= chance if place == paid else 1.0
            tokens.append(last := token)
            alive.append(chance)
            node = on.follow(node, [token]) if place < room else node
        if not tokens:
            return drafts
        parts = [*drafts.parts, Part(self.source, len(tokens))]
        return drafts._replace(tokens=[*drafts.tokens, *tokens], alive=[*drafts.alive, *alive], parts=parts)

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
