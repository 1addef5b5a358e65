"""The arm `structure`: drafts text that a grammar forces, without a model (SGLang's jump-forward decoding, arXiv
2312.07104). Here forced text is verified like any other draft, so the target decides how it is cut into tokens.

It drafts from the text only. Forced stretches are short, so they matter most after other candidates of the host, such
as predictions, and before them: compiled code continues a candidate, and cuts it before the first token that the
grammar forbids. Neural drafts are neither continued nor cut, since the host plans before it knows them.
"""

import logging
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from whiflash_kernels.cpu.texts import NONE, Walk, Walks, compiled_texts

from whiflash_sglang.arms.base import TextDrafter
from whiflash_sglang.checkpoints.manifest import Structure
from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.candidates import GRAMMAR, SOURCES, TOOLS
from whiflash_sglang.drafts.rates import Rates
from whiflash_sglang.embedded import cache_root
from whiflash_sglang.records.core import History
from whiflash_sglang.records.request import Request
from whiflash_sglang.spans.vocabulary import Vocabulary, bytes_of, text_of
from whiflash_sglang.structure.automaton import Automaton, LostError, State
from whiflash_sglang.structure.calls import PROMPT_CHARS, Calls, common_matcher, compiled
from whiflash_sglang.structure.chances import DECAY, SEED, SEED_WEIGHT
from whiflash_sglang.structure.layout import NO_FRAMES, Layout
from whiflash_sglang.structure.matchers import Grammar, Matcher
from whiflash_sglang.structure.schemas import frames_of, has_alternatives, words_of, words_of_places
from whiflash_sglang.structure.sketch import TAIL, open_word
from whiflash_sglang.structure.spending import Spending
from whiflash_sglang.structure.tools import all_forced, words_of_tools

logger = logging.getLogger(__name__)

_STRINGS = re.compile(r'"(?=([^"]*)")')
"""Texts between two quotes. The closing quote may open the next text, since JSON is not parsed here."""

KEPT_NODES, LEAST_NODES = 1 << 18, 1 << 10
"""Nodes of all automata that are kept, up to 1 GB, and those that each counts at least. The one begun least recently
goes first. Tenants share none: what an automaton knows shows which names and values were written."""


class _Uses(dict[str, int]):
    """Text → its count in a prompt. Words of the schemas, in quotes, are counted in all of it at once. Another text is
    counted in its last `PROMPT_CHARS` characters when it is first asked for.
    """

    def __init__(self, prompt: str, words: Sequence[str]) -> None:
        super().__init__((f'"{word}"', 0) for word in words)
        self.update(Counter(text for string in _STRINGS.findall(prompt) if (text := f'"{string}"') in self))
        self.prompt = prompt[-PROMPT_CHARS:]

    def __missing__(self, text: str) -> int:
        self[text] = count = self.prompt.count(text)
        return count


@dataclass(slots=True)
class _Kept:
    """The arm's state of a request.

    grammar: its constraint, None without one. tools: those that it may call, as text; empty: none. words, uses: words
    of schemas and tools, and their counts in the prompt. tail: the prompt's last tokens. source: TOOLS or GRAMMAR, from
    which it drafts now. walk: its place in `automaton`, None without one. shared: whether requests with its `key`, all
    of one tenant, use the same automaton.
    """

    grammar: Grammar | None
    tools: str
    words: tuple[str, ...]
    uses: _Uses
    tail: Sequence[int]
    source: str = TOOLS
    automaton: Automaton | None = None
    walk: Walk | None = None
    shared: bool = True
    key: Hashable = None


class StructureArm(TextDrafter):
    """Proposes tokens that the request's grammar forces.

    Args:
        settings: widths. vocabulary: the target's. spending: bounds the time that requests' grammars take.
    """

    arm = arms.STRUCTURE

    def __init__(self, settings: Structure, vocabulary: Vocabulary, spending: Spending) -> None:
        self.max_drafts = settings.max_width
        self._vocabulary, self._spending = vocabulary, spending
        self._automata = OrderedDict[Hashable, Automaton]()
        self._walking = dict[int, Request]()
        """By address of a walk, its request."""
        self._uses = _Uses("", ())
        self.raised: list[tuple[Request, Exception]] = []
        self._walks: Walks | None = None
        try:
            self.library = compiled_texts(cache_root() / "compiled")
            self._walks = Walks(self.library, vocabulary.token_bytes, vocabulary.special)
        except OSError as error:
            logger.warning("WHIFLASH: nothing is drafted from grammars and tools: %s", error)
        self.forget()

    def forget(self) -> None:
        self._rates, self._habits = Rates(SEED, SEED_WEIGHT, DECAY), dict[bool, Layout]()
        """Learned chances of guesses by their kind; the newest answer's layout of JSON, by whether it had a tag."""
        self._automata.clear()  # they hold words of requests' schemas
        common_matcher.cache_clear()  # each holds the last call that was written
        if self._walks is not None:
            self._walks.lessons.learn(*self._rates.addresses)

    def begin(self, request: Request) -> None:
        hints, grammar = request.hints, request.grammar
        forced = grammar is not None and all_forced(grammar.schema, hints.tools)
        marked = any(span.kind == "tool_call" and span.begin for span in hints.spans)
        tools = hints.tools if marked and not forced else ""
        if self._walks is None or (grammar is None and not tools):
            return
        schema = words_of(grammar.schema) if grammar else ()
        words = tuple(dict.fromkeys((*schema, *words_of_tools(hints.tools))))
        prompt = request.read()
        # The prompt is read once, so that no round reads it.
        uses = _Uses(text_of(self._vocabulary, prompt), words)
        request.kept[self.arm] = kept = _Kept(grammar, tools, words, uses, prompt[-TAIL:])
        if tools and (grammar is None or grammar.begins is None):
            self._start(request, kept, ())
            compiled(tools)  # a tenth of a second for many tools, which no round should wait for

    def serves(self, request: Request) -> bool:
        return self.arm in request.kept

    def handle(self, request: Request, history: History) -> int:
        kept: _Kept | None = request.kept.get(self.arm)
        if kept is None:
            return 0
        if kept.grammar is not None and kept.source == TOOLS and (begins := kept.grammar.begins) is not None:
            kept.source, written = GRAMMAR, history(request.prompt)[: begins - request.prompt]
            try:
                self._spending.on(request.rid, lambda: self._start(request, kept, written))
            except LostError:
                kept.source = TOOLS  # no time is left in this round
                return 0
        if (walk := kept.walk) is None:
            return 0
        if kept.shared and walk.table.full():
            self._spending.on(request.rid, lambda: self._renew(kept, walk))
        request.known = min(request.known or request.prompt, walk.known())
        return int(walk.at)

    def end(self, request: Request) -> None:
        kept: _Kept | None = request.kept.get(self.arm)
        if kept is None or kept.walk is None or kept.automaton is None:
            return
        self._walking.pop(kept.walk.at, None)
        if kept.source != GRAMMAR:
            return
        layout = kept.automaton.layout(kept.walk.node_of())
        if layout is not None and "{" in layout.seen:
            self._habits[layout.frames is not NO_FRAMES] = layout.as_habit()

    def _start(self, request: Request, kept: _Kept, written: Sequence[int]) -> None:
        """Begin to walk after the first `written` tokens of the answer."""
        vocabulary, layout, own = self._vocabulary, None, None
        grammar = kept.grammar if kept.source == GRAMMAR else None
        schema, end = (grammar.schema, grammar.end) if grammar is not None else ("", None)
        if grammar is not None:
            frames = frames_of(schema)
            habit = self._habits.get(frames is not NO_FRAMES)
            layout = Layout(frames=frames, habit=habit, words=words_of_places(schema), decides=has_alternatives(schema))
            own = (frozenset(habit.seen.items()), habit.unit) if habit and habit.seen else None
        self._uses = kept.uses
        calls = Calls(kept.tools, request.hints.spans, kept.uses.prompt, self._count) if kept.tools else None
        kept.shared = (layout is None or layout.words is not None) and (calls is None or calls.has_places)
        spans = [(span.kind, span.begin, span.end, span.open) for span in request.hints.spans]
        kept.key = request.tenant, kept.tools, *(spans if kept.tools else ()), schema, kept.words, end, own
        automaton = self._automata.get(kept.key) if kept.shared else None
        if automaton is None:
            matcher = None if grammar is None else grammar.beginning(vocabulary)
            automaton = self._new(kept, end, matcher)
        if kept.shared:
            self._keep(kept.key, automaton)
        if calls is not None:
            calls.follow(bytes_of(vocabulary, written).decode(errors="replace"))
        tail = [*kept.tail, *written][-TAIL:]
        word = tuple(open_word(vocabulary, tail))
        plain = bytes_of(vocabulary, [token for token in word if token not in vocabulary.special])
        if kept.shared and any(map(str.isalnum, plain.decode(errors="ignore"))):
            word = ()  # an automaton that others walk keeps no words of a prompt
        state = State(vocabulary, automaton.matcher, layout, calls, word)
        if kept.walk is not None:
            self._walking.pop(kept.walk.at, None)
        kept.automaton, kept.walk = automaton, None
        if automaton.matcher is not None or calls is not None:
            node, last, known = automaton.begin(state), tail[-1] if tail else NONE, request.prompt + len(written)
            name = SOURCES.index(kept.source)
            kept.walk = Walk(automaton.table, node, last, known, name, kept.shared, request.stops)
            self._walking[kept.walk.at] = request

    def _new(self, kept: _Kept, end: int | None, matcher: Matcher | None) -> Automaton:
        assert self._walks is not None
        uses, exhausted = lambda text: self._uses[text], self._spending.exhausted
        return Automaton(self._walks, self._vocabulary, kept.words, end, uses, self, matcher, exhausted)

    def _keep(self, key: Hashable, automaton: Automaton) -> None:
        self._automata[key] = automaton
        self._automata.move_to_end(key)
        while sum(max(each.size, LEAST_NODES) for each in self._automata.values()) > KEPT_NODES:
            self._automata.popitem(last=False)

    def _count(self, text: str) -> int:
        """Return how often the conversation of the request that asks has a text."""
        return self._uses[text]

    def edges(self, walk: int, node: int, tokens: Sequence[int], written: int) -> None:
        """Answer where successive tokens of a walk lead, written or drafted (`Table`)."""
        self._ask(walk, lambda automaton: automaton.follow(node, tokens, written=bool(written)))

    def step(self, walk: int, node: int) -> None:
        """Answer what is likely to follow at a walk's node (`Table`)."""
        self._ask(walk, lambda automaton: automaton.go_on(node))

    def uses(self, walk: int, word: int) -> int:
        """Return how often the conversation of a walk's request has a word (`Table`)."""
        kept: _Kept = self._walking[walk].kept[self.arm]
        assert kept.automaton is not None
        return kept.uses[kept.automaton.texts[word]]

    def restart(self, walk: int) -> None:
        """Begin an automaton that only this walk uses after the text that it has (`Table`)."""
        own = self._walking[walk].kept[self.arm].walk

        def begin(automaton: Automaton) -> None:
            node, tokens = own.node_of(), own.unfollowed()
            with suppress(LostError):
                tokens = automaton.begin_at(node, tokens)
                own.move(automaton.table, 0)
            own.follow(tokens)

        self._ask(walk, begin)

    def _ask(self, walk: int, question: Callable[[Automaton], object]) -> None:
        """Ask the automaton of a walk, if there is time. Errors are kept for the quarantine."""
        request = self._walking[walk]
        kept: _Kept = request.kept[self.arm]
        self._uses = kept.uses
        try:
            self._spending.ask(request.rid, lambda: question(kept.automaton))  # type: ignore[arg-type]
        except Exception as error:
            self.raised.append((request, error))

    def _renew(self, kept: _Kept, walk: Walk) -> None:
        """Move a request to a new automaton, in which only nodes that are asked for from now on exist."""
        old, new = kept.automaton, self._automata.get(kept.key)
        assert old is not None
        if new is None or new.table.full():
            new = self._new(kept, old.end, old.matcher)
            self._keep(kept.key, new)
        with suppress(LostError):
            walk.move(new.table, new.adopt(old, walk.node_of()))
            kept.automaton = new
