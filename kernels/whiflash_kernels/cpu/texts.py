"""Draft from a batch's texts on the host, by copies and by structure. `texts.cpp` is compiled at its first use."""

import ctypes
from array import array
from collections.abc import Collection, Sequence
from functools import cache
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from whiflash_kernels.cpu import compiler
from whiflash_kernels.cpu.compiler import Native

_SOURCE = Path(__file__).with_name("texts.cpp")

NONE, REFUSED, LOST = -1, -2, -3
"""In place of a token or a node: none; one that the grammar forbids; one that is not known now."""

CONTEXT, GROUP, PREDICTION, GRAMMAR, TOOLS = range(5)
"""The sources of drafts: the request's text, an answer of its group, its prediction, its grammar, its tools."""

_EDGES = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int64, ctypes.c_int32
)
_STEP = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32)
_USES = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32)
_RESTART = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_FUNCTIONS = """
    propose:vppppp extend:vppp
    text:p text_end:vp append:vppl size:lp tokens:vpp bytes:lp
    prediction:ppll prediction_end:vp follow:vppl accepted:lp
    copies:pppplpl copies_end:vp predict:vpppp join:vpplpppl commit:vppl last:lppp own:pp
    vocabulary:ppppl vocabulary_end:vp lessons:pp lessons_end:vp learn:vppp cuts:lpp
    automaton:pppppppl automaton_end:vp clear:vp full:ip words:lppl node:ip stay:vpippiii edge:vpiii after:ipii
    asked:ipi step:vpiii choice:vpiplii counts:vpp
    walk:ppiiliipl walk_end:vp place:vppi known:lp node_of:ip take:lpp follow_known:vppl
"""
"""As of `compiler.load`."""


class Candidates(NamedTuple):
    """The host's candidates of a round, K for each of B requests, padded to W tokens.

    tokens: [B, K, W] int32. alive: [B, K, W] float64, for each token the chance that it and all before it are accepted.
    names: [B, K, W] uint8, what each token was taken from. sizes: [B, K] int64, tokens of each. at: [B, K] int64,
    position of its first token in the request's text.
    """

    tokens: np.ndarray[Any, Any]
    alive: np.ndarray[Any, Any]
    names: np.ndarray[Any, Any]
    sizes: np.ndarray[Any, Any]
    at: np.ndarray[Any, Any]

    @classmethod
    def of(cls, requests: int, columns: int, width: int) -> "Candidates":
        """Return empty candidates."""
        shape = requests, columns, width
        sizes, at = np.zeros(shape[:2], np.int64), np.zeros(shape[:2], np.int64)
        return cls(np.zeros(shape, np.int32), np.zeros(shape), np.zeros(shape, np.uint8), sizes, at)

    def enter(self, request: int, column: int, name: int, drafts: Any) -> None:
        """Enter drafts with `tokens`, `alive` and `at`, as far as there is room. name: what they were taken from."""
        place = request, column
        self.sizes[place] = size = min(len(drafts.tokens), self.tokens.shape[-1])
        self.tokens[place][:size], self.alive[place][:size] = drafts.tokens[:size], drafts.alive[:size]
        self.names[place][:size], self.at[place] = name, drafts.at


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("count", "columns", "width", "copies_column", "walks_column")),
        *((name, ctypes.c_int64) for name in ("copies_widest", "walks_widest", "first")),
        ("price", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("copies", "walks", "ahead", *Candidates._fields)),
    )


def _address(numbers: "array[Any]") -> int:
    return numbers.buffer_info()[0]


class Batch:
    """The texts of a round's requests.

    Args:
        handles: by request, the addresses of its `Copies`, and those of its `Walk`; 0: it has none. ahead: by request,
            rows of earlier rounds that are not known yet. of: the columns of their candidates; NONE: there is none.
            widest: their most drafts. price: tokens that a row must bring. first: request that is asked about first.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        candidates: Candidates,
        handles: Sequence[Sequence[int]],
        ahead: Sequence[int],
        of: Sequence[int],
        widest: Sequence[int],
        price: float,
        first: int = 0,
    ) -> None:
        self.candidates, self._library = candidates, library
        self._arrays = [array("q", each) for each in (*handles, ahead)]
        addresses = [*map(_address, self._arrays), *(each.__array_interface__["data"][0] for each in candidates)]
        self._batch = _Batch(*candidates.tokens.shape, *of, *widest, first, price, *addresses)

    def propose(self, tokens: Sequence[int], ends: Sequence[int], starts: Sequence[int]) -> Sequence[float]:
        """Show each request its next tokens and fill the candidates. Return the length and rows that are expected of
        each request's copy, and of its structure, one after the other; 0 without a handle. The arguments are as of
        `whiflash_propose`.
        """
        forecasts: array[Any] = array("d", bytes(32 * len(starts)))
        given = [array("i", tokens), array("q", ends), array("q", starts), forecasts]
        self._library.whiflash_propose(ctypes.addressof(self._batch), *map(_address, given))
        return forecasts

    def drop(self, request: int, column: int) -> None:
        """Drop a candidate, and ask the request's walk no more."""
        self.candidates.sizes[request, column] = self._arrays[1][request] = 0

    def extend(self, modes: Sequence[Sequence[int]], rooms: Sequence[int]) -> None:
        """Continue candidates by others' drafts. The arguments are those of `whiflash_extend`."""
        flags, most = array("B", chain.from_iterable(modes)), array("q", rooms)
        self._library.whiflash_extend(ctypes.addressof(self._batch), _address(flags), _address(most))


class Table(Native):
    """The nodes and edges of an automaton, as far as they are known.

    Args:
        answers: called where nothing is known, with the address of the walk: `edges` sets the edges of successive
            tokens, drafted or written, from a node on; `step` sets the likely tokens after a node; `uses` returns how
            often a request's conversation has a word; `restart` begins the automaton again. They may not raise.
        most: number of nodes and edges from which on it is full.
    """

    def __init__(self, walks: "Walks", answers: Any, most: int) -> None:
        self._walks = walks
        self._callbacks = (  # they do not hold the table, which would then wait for the garbage collector
            _EDGES(lambda walk, node, run, count, written: answers.edges(walk, node, run[: min(count, 64)], written)),
            _STEP(lambda walk, node: answers.step(walk, node)),
            _USES(lambda walk, word: answers.uses(walk, word)),
            _RESTART(lambda walk: answers.restart(walk)),
        )
        super().__init__(walks.library, "automaton", walks.at, walks.lessons.at, *self._callbacks, most)

    def words_of(self, words: Sequence[str]) -> int:
        """Enter words that tokens may begin; return their number."""
        texts = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
        return int(self.words(texts, len(words)))

    def choose(self, node: int, words: Sequence[int], token: int, kinds: int) -> None:
        """Set a node's next token for requests that use the same one of `words` most as the present request."""
        ids = array("i", words)
        self.choice(node, *ids.buffer_info(), token, kinds)


class Walk(Native):
    """A request's place in a table, at the end of its text.

    Args:
        last: the text's last token. known: number of its tokens. name: what its drafts are taken from. shared: whether
            other requests walk there, too. stops: tokens that end the request.
    """

    def __init__(
        self, table: Table, node: int, last: int, known: int, name: int, shared: bool, stops: Sequence[int]
    ) -> None:
        self.table, ids = table, array("i", stops)
        super().__init__(table.library, "walk", table.at, node, last, known, name, shared, *ids.buffer_info())

    def move(self, table: Table, node: int) -> None:
        """Place the request at a node of this or another table, after a restart or a change of automaton."""
        self.table = table
        self.place(table.at, node)

    def unfollowed(self) -> list[int]:
        """Return and remove the last tokens, which were not followed since their edges were unknown."""
        ids = array("i", [0]) * self.take(None)
        self.take(ids.buffer_info()[0])
        return ids.tolist()

    def follow(self, tokens: Sequence[int]) -> None:
        """Advance by committed tokens, as far as their edges are known."""
        ids = array("i", tokens)
        self.follow_known(*ids.buffer_info())


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


@cache
def compiled_texts(directory: Path) -> ctypes.CDLL:
    """Compile the functions into `directory`, or load them from there.

    Raises:
        OSError: they cannot be compiled or loaded.
    """
    # Products and sums are not fused, so that results are the same on every machine.
    return compiler.load(_SOURCE, directory, ["-ffp-contract=off"], _FUNCTIONS)
