"""Walk texts by their structure, an automaton over tokens, in `automaton.cpp`: it is compiled at its first use."""

import ctypes
from array import array
from collections.abc import Callable, Collection, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from whiflash_kernels.cpu import compiler
from whiflash_kernels.cpu.compiler import Native

_SOURCE = Path(__file__).with_name("automaton.cpp")

NONE, REFUSED, LOST = -1, -2, -3
"""In place of a token or a node: none; one that the grammar forbids; one that is not known now."""

_EDGES = ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int64, ctypes.c_int32)
_STEP = ctypes.CFUNCTYPE(None, ctypes.c_int32)
_USES = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32)
_FUNCTIONS = """
    vocabulary:ppppl vocabulary_end:vp lessons:pp lessons_end:vp learn:vppp cuts:lpp
    automaton:pppppp automaton_end:vp clear:vp words:lppl node:ip stay:vpippiii edge:vpiii after:ipii asked:ipi
    step:vpiii choice:vpiplii counts:vpp
    request:ppii request_end:vp place:vppi commit:lppli unfollowed:lpp node_of:ip go_on:lppplldlppp
"""
"""As of `compiler.load`."""


class Table(Native):
    """The nodes and edges of an automaton, as far as they are known.

    Args:
        answers: called for unknown parts: `edges` sets those of successive tokens, drafted or written, from a node on,
            `step` the likely tokens after a node; `uses` returns how often a request's conversation has a word.
    """

    def __init__(self, walks: "Walks", answers: Any) -> None:
        self._walks, self._raised = walks, (raised := list[BaseException]())

        def safely(ask: Callable[..., Any], *arguments: Any) -> Any:  # nothing can be raised through compiled code
            try:
                return None if raised else ask(*arguments)
            except BaseException as error:
                raised.append(error)
            return None

        self._callbacks = (  # they do not hold the table, which would then wait for the garbage collector
            _EDGES(lambda node, run, count, written: safely(answers.edges, node, run[: min(count, 64)], written)),
            _STEP(lambda node: safely(answers.step, node)),
            _USES(lambda word: safely(answers.uses, word) or 0),
        )
        super().__init__(walks.library, "automaton", walks.at, walks.lessons.at, *self._callbacks)

    def check(self) -> None:
        """Raise the error that one of the answers raised."""
        if self._raised:
            raise self._raised.pop()

    def words_of(self, words: Sequence[str]) -> int:
        """Enter words that tokens may begin; return their number."""
        texts = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
        return int(self.words(texts, len(words)))

    def choose(self, node: int, words: Sequence[int], token: int, kinds: int) -> None:
        """Set a node's next token for requests whose most used one of `words` is that of the present request."""
        ids = array("i", words)
        self.choice(node, *ids.buffer_info(), token, kinds)


class Walk(Native):
    """A request's place in a table, at the end of its text. last: the text's last token."""

    def __init__(self, table: Table, node: int, last: int) -> None:
        self.table = table
        super().__init__(table.library, "request", table.at, node, last)

    def move(self, table: Table, node: int) -> None:
        """Put it at another node, of whichever table."""
        self.table = table
        self.place(table.at, node)

    def advance(self, tokens: Sequence[int], *, ask: bool) -> int:
        """Advance by committed tokens. ask: whether unknown edges may be asked for.

        Returns how many last tokens have no known edge and were not followed; -1: no structure is known from now on.
        """
        ids = array("i", tokens)
        left = self.commit(*ids.buffer_info(), ask)
        self.table.check()
        return int(left)

    def take(self, count: int) -> list[int]:
        """Return the last `count` tokens, which were not followed, and count them as followed."""
        ids = array("i", [0]) * count
        self.unfollowed(ids.buffer_info()[0])
        return ids.tolist()


class Walks(Native):
    """A server's vocabulary, and what was learned of how its target writes.

    Args:
        token_bytes: of every id. special: ids that are special.
    """

    def __init__(self, library: ctypes.CDLL, token_bytes: Sequence[bytes], special: Collection[int]) -> None:
        begins = array("q", accumulate(map(len, token_bytes), initial=0))
        flags = bytes(token in special for token in range(len(token_bytes)))
        address = begins.buffer_info()[0]
        super().__init__(library, "vocabulary", address, b"".join(token_bytes), flags, len(flags))
        self.lessons = Native(library, "lessons", self.at)
        self._room(64)

    def _room(self, most: int) -> None:
        self._most, self._allowed = most, array("q", [0])
        self._tokens, self._alive = array("i", [0]) * most, array("d", [0.0]) * most
        self._results = [each.buffer_info()[0] for each in (self._allowed, self._tokens, self._alive)]

    def go_on(
        self, walk: Walk, drafts: Sequence[int], before: Sequence[float], room: int, worth: float, paid: int
    ) -> tuple[int, list[int], list[float]]:
        """Return how many of `drafts` may follow the text, and the tokens that follow these, each with the chance that
        it and all before it are accepted. Its arguments are those of `whiflash_go_on`.
        """
        if room > self._most:
            self._room(room)
        ids, chances = array("i", drafts), array("d", before)
        addresses = ids.buffer_info()[0], chances.buffer_info()[0]
        count = walk.go_on(*addresses, len(ids), room, worth, paid, *self._results)
        walk.table.check()
        return self._allowed[0], self._tokens[:count].tolist(), self._alive[:count].tolist()


@cache
def compiled_automaton(directory: Path) -> ctypes.CDLL:
    """Compile the functions into `directory`, or load them from there.

    Raises:
        OSError: they cannot be compiled or loaded.
    """
    return compiler.load(_SOURCE, directory, ["-ffp-contract=off"], _FUNCTIONS)
