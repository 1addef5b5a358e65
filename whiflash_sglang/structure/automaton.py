"""Answers what the compiled walk over structure asks once: where tokens lead from a node, and what follows it.

A node is all that the continuation of a text depends on: its place in the JSON of a grammar or of a call, the call in
markup that is open, the blanks seen so far, and the word that its last tokens leave open. Requests with equal tools and
schemas share an automaton, and free text is one node. If nothing says which texts continue alike, as in a grammar with
counts, a request has an automaton of its own, which begins again where its text has left what is known: else each text
would be kept for others.
"""

import codecs
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from whiflash_kernels.cpu.texts import LOST, NONE, REFUSED, Table, Walks

from whiflash_sglang.spans.vocabulary import Vocabulary, bytes_of, is_text
from whiflash_sglang.structure.calls import Calls
from whiflash_sglang.structure.guesses import Guesses, Uses
from whiflash_sglang.structure.layout import FREE, Free, Layout
from whiflash_sglang.structure.matchers import Matcher
from whiflash_sglang.structure.sketch import TAIL, open_word, sketch

AHEAD = 24
"""Largest number of tokens of an answer. Further ones are asked for where a walk comes so far."""

MOST_NODES = 1 << 14
"""Number of nodes and edges from which on an automaton is replaced by a new one."""


class LostError(Exception):
    """A grammar has no time left, or refuses a node's text when it is written at once."""


@dataclass(slots=True)
class State:
    """The end of a text, as far as its continuation depends on it.

    matcher, layout: of its grammar; None without one. Nodes share the matcher, whose place is their origin. calls: of
    its tools; None without any. text: since its origin, up to the last token that ends a character; parts: the tokens
    after it, begun: their text, open: its last bytes, which begin a character. split: whether its origin is inside a
    character, so that all its tokens are parts. tail: tokens of the word that may be open.
    """

    vocabulary: Vocabulary
    matcher: Matcher | None
    layout: Layout | None
    calls: Calls | None
    tail: tuple[int, ...] = ()
    text: str = ""
    parts: tuple[int, ...] = ()
    begun: str = ""
    open: bytes = b""
    split: bool = False

    def copy(self) -> "State":
        """Return a copy; it advances the same matcher."""
        layout, calls = self.layout and self.layout.copy(), self.calls and self.calls.copy()
        ends = self.tail, self.text, self.parts, self.begun, self.open, self.split
        return State(self.vocabulary, self.matcher, layout, calls, *ends)

    @contextmanager
    def ahead(self) -> Iterator["State"]:
        """Yield a copy to advance; at the end of the block the matcher is back where it was."""
        with self.matcher.trying() if self.matcher else nullcontext():
            yield self.copy()

    def resume(self) -> None:
        """Advance the matcher from the origin to the end of this text. Raises LostError if no time is left."""
        if (matcher := self.matcher) is not None:
            whole = not self.text or matcher.accept_text(self.text)
            if not whole or not all(map(matcher.accept_token, self.parts)):
                raise LostError

    @property
    def place(self) -> Hashable:
        """Return a key: two texts of an automaton with equal keys have the same continuations. None if unknown."""
        parts = [part.place for part in (self.layout, self.calls) if part is not None]
        return None if None in parts else (self.open, self.tail, *parts)

    @property
    def free(self) -> Free | None:
        """Return the tokens that continue the text if it ends in free text; None if it does not, or if that is unknown.

        Raises LostError if the grammar has no time left.
        """
        found = [self.calls.free] if self.calls is not None else []
        if self.layout is not None and self.matcher is not None:
            found.append(self.layout.free(self.matcher))
            if self.layout.inside and self.layout.words is not None and self.matcher.exhausted():
                raise LostError  # whether a string is free was not found out
        known = [each for each in found if each is not None and not self.open]
        if not known or len(known) < len(found):
            return None
        leaving, ending = "".join(each.leaving for each in known), "".join(each.ending for each in known)
        return Free(leaving, ending, any(each.plain for each in known), sum((each.words for each in known), ()))

    def write(self, text: str) -> None:
        """Advance by a text, however it is cut. Raises LostError if it may not follow, or if no time is left."""
        if text and self.matcher is not None and not self.matcher.accept_text(text):
            raise LostError
        self._follow(text)
        self.text += text

    def move(self, token: int, *, written: bool = False) -> bool:
        """Advance by a token. Returns False if the grammar forbids it or no time is left; then nothing has changed.

        written: whether it is committed; drafts have no special tokens.
        """
        data = self.open + (own := bytes_of(self.vocabulary, [token]))
        is_able = bool(own) if written else is_text(self.vocabulary, token)
        if self.matcher is not None and not (is_able and self.matcher.accept_token(token)):
            return False
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._follow(text)
        self.open, self.begun = data[used:], self.begun + text
        if self.open or self.split:
            self.parts += (token,)
        else:
            self.text, self.parts, self.begun = self.text + self.begun, (), ""
        self.tail = tuple(open_word(self.vocabulary, [*self.tail, token][-TAIL:]))
        return True

    def _follow(self, text: str) -> None:
        for part in (self.layout, self.calls):
            if part is not None:
                part.follow(text)


class Automaton:
    """The continuations of all texts with the same tools and schema.

    Args:
        words: names and values of the schemas, in their order. end: token that ends a text under the grammar. uses: of
            a text in the conversation of the request that asks. answers: of the table; they call `follow` and
            `go_on`. matcher: of the grammar, at its beginning; None without one. exhausted: whether no time is left in
            this round; then nothing is answered.
    """

    def __init__(
        self,
        walks: Walks,
        vocabulary: Vocabulary,
        words: Sequence[str],
        end: int | None,
        uses: Uses,
        answers: Any,
        matcher: Matcher | None,
        exhausted: Callable[[], bool],
    ) -> None:
        self._vocabulary, self.end, self.matcher = vocabulary, end, matcher
        self._exhausted = exhausted
        if matcher is not None:
            matcher.exhausted = exhausted
        self._guesses = Guesses(words, uses)
        self._nodes, self._numbers = list[State](), dict[Hashable, int]()
        """The first text that led to each node; by its place, a node's number."""
        self._characters = 0
        self.texts, self._words, self._begins = list[str](), dict[str, int](), dict[tuple[str, ...], int]()
        self.table = Table(walks, weakref.proxy(answers), MOST_NODES)

    @property
    def size(self) -> int:
        """Number of nodes, each of which keeps a text's state in Python, some 4 kB; a long text counts as several."""
        return len(self._nodes) + self._characters // 4096

    def begin(self, state: State) -> int:
        """Return the node of a text that begins in `state`."""
        return self._node(state)

    def adopt(self, other: "Automaton", node: int) -> int:
        """Return this automaton's node for the texts at `node` of another one. Raises LostError as `State.write`."""
        with other.at(node) as state:
            return self._node(state)

    def begin_at(self, node: int, tokens: Sequence[int]) -> list[int]:
        """Drop all nodes; begin at a node's text and the first `tokens` that may follow. Returns the later tokens.

        The node that they begin at is 0. Raises LostError as `State.write`; then nothing has changed.
        """
        origin, left = self._nodes[node].copy(), list(tokens)
        with self.matcher.trying(keeps=True) if self.matcher else nullcontext():
            origin.resume()
            while left and origin.move(left[0], written=True):
                left = left[1:]
            free = origin.free  # before the nodes go, since it may raise
        origin.text, origin.parts, origin.begun, origin.split = "", (), "", bool(origin.open)
        self._nodes.clear()
        self._characters = 0
        self._numbers.clear()
        self.table.clear()
        with suppress(LostError):  # then there is a node, and no token is known to stay at it
            self._add(origin, free)
        return left

    def layout(self, node: int) -> Layout | None:
        """Return the layout of the JSON of the text at a node; None without a grammar."""
        return self._nodes[node].layout

    @contextmanager
    def at(self, node: int) -> Iterator[State]:
        """Yield a copy of the state at a node, to advance. Raises LostError as `State.resume`."""
        if self._exhausted():
            raise LostError  # also for calls, whose matchers do not look at the time
        with self._nodes[node].ahead() as state:
            state.resume()
            yield state

    def _node(self, state: State) -> int:
        """Return the number of a state's node, which is new if no text was there before.

        Raises LostError as `State.free`.
        """
        return self._add(state, state.free)

    def _add(self, state: State, free: Free | None) -> int:
        """Return the number of the node of a state that ends in the text `free`, as `_node` does."""
        if free is not None or bytes_of(self._vocabulary, state.tail[-1:]).isdigit():
            state.tail = ()  # nothing is known to follow, or a number, which is cut by itself
        key = state.place
        number = None if key is None else self._numbers.get(key)
        if number is not None:
            return number
        number = int(self.table.node())
        self._nodes.append(state.copy())
        self._characters += len(state.text)
        if key is not None:
            self._numbers[key] = number
        if free is not None:
            try:
                with state.ahead() as inside:
                    inside.write(FREE)
                    to = self._node(inside)
            except LostError:  # others must not find it without the tokens that stay there
                self._numbers.pop(key, None)
                raise
            if free.words and free.words not in self._begins:
                self._begins[free.words] = self.table.words_of(free.words)
            words = self._begins.get(free.words, NONE)
            self.table.stay(number, free.leaving.encode(), free.ending.encode(), free.plain, words, to)
        return number

    def follow(self, node: int, tokens: Sequence[int], *, written: bool) -> None:
        """Set the edges of successive `tokens` after a node, up to the first known node, and else the steps after them.

        written: whether they are committed.
        """
        with suppress(LostError), self.at(node) as state:
            for token in tokens:
                moved, known = state.move(token, written=written), len(self._nodes)
                if not moved and self._exhausted():
                    return
                after = self._node(state) if moved else REFUSED
                self.table.edge(node, token, after)
                if after < known:
                    return
                node = after
            self._tell(node, state)

    def go_on(self, node: int) -> None:
        """Set the likely tokens after a node: its next one, and those of the nodes that these lead to."""
        with suppress(LostError), self.at(node) as state:
            self._tell(node, state)

    def _tell(self, node: int, state: State) -> None:
        grammar: dict[str, Any] = {"matcher": state.matcher, "layout": state.layout, "calls": state.calls}
        grammar |= {"guesses": self._guesses, "end": self.end}
        tokens = [] if state.open else sketch(self._vocabulary, state.tail, AHEAD, **grammar)
        if state.matcher is not None and self._exhausted():
            return  # time may have cut it short
        if not tokens:
            self.table.step(node, NONE, 0)
        for number, (token, kinds, among) in enumerate(tokens):
            if number and self.table.asked(node) and not among:
                return
            bits = sum(1 << kind for kind in kinds)
            if among:
                self.table.choose(node, [*map(self._word, among)], token, bits)
            else:
                self.table.step(node, token, bits)
            after = self.table.after(node, token)
            if after == REFUSED or not state.move(token):
                return
            if after == LOST:
                after = self._node(state)
                self.table.edge(node, token, after)
            node = after

    def _word(self, text: str) -> int:
        """Return the number of a text whose uses decide between continuations."""
        number = self._words.setdefault(text, len(self.texts))
        if number == len(self.texts):
            self.texts.append(text)
        return number
