"""The structure arm: what a grammar forces next needs no model (SGLang's jump-forward decoding, arXiv 2312.07104; here
it is verified like any other draft, so how the target cuts the text is the target's choice).

It drafts from the text only. Forced stretches are short, so they matter most after other arms' drafts and before them:
`extend_drafts` goes on where a neural draft or a copy ends, and drops what the grammar forbids in it.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import accumulate, islice, takewhile
from operator import mul
from typing import NamedTuple

from whiflash_sglang.arms.base import TextDrafter
from whiflash_sglang.checkpoints.manifest import Structure
from whiflash_sglang.copying.calibration import PerTenant
from whiflash_sglang.copying.memory import Tenant
from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.candidates import NOTHING, Candidate
from whiflash_sglang.prices.costs import Worth
from whiflash_sglang.records.core import History
from whiflash_sglang.spans.hints import RequestHints
from whiflash_sglang.spans.vocabulary import Vocabulary, bytes_of, is_text
from whiflash_sglang.structure.calls import Calls
from whiflash_sglang.structure.chances import StructureChances
from whiflash_sglang.structure.guesses import Guesses
from whiflash_sglang.structure.layout import NO_FRAMES, Layout
from whiflash_sglang.structure.matchers import Grammar, Matcher
from whiflash_sglang.structure.schemas import frames_of, words_of
from whiflash_sglang.structure.sketch import TAIL, Token, sketch, text_of
from whiflash_sglang.structure.tools import all_forced, words_of_tools

GRAMMAR, TOOLS = "grammar", "tools"
"""Sources of drafts: the constraint of the request, or only its tools."""

_Decoder = partial(codecs.getincrementaldecoder("utf-8"), errors="replace")
"""A token may end inside a character."""


LOOKS = 4
"""Looks that are kept of a request: behind its text, a copy, and what the two lead into."""


class _Look(NamedTuple):
    """Tokens that may follow a text. ids: drafts in question, the first `allowed` that may follow, then those of
    `tokens`. refused: the draft after them that may not. whole: whether nothing is known after the tokens.
    """

    ids: Sequence[int]
    allowed: int
    tokens: Sequence[Token]
    refused: int | None
    whole: bool

    def behind(self, written: Sequence[int]) -> "_Look | None":
        """The same behind what was written since; None if that is something else, or all of it."""
        count = len(written)
        if count >= len(self.ids) or self.ids[:count] != written:
            return None
        rest = self.tokens[max(count - self.allowed, 0) :]
        refused = self.refused if count <= self.allowed else None
        allowed = max(self.allowed - count, 0)
        return _Look(self.ids[count:], allowed, rest, refused, self.whole)

    def after(self, drafts: Sequence[int]) -> tuple[Sequence[Token], int] | None:
        """Tokens that follow `drafts`, and how many of these may follow the text; None: that is not known."""
        count, allowed = len(drafts), self.allowed
        if allowed <= count < len(self.ids) and self.ids[:count] == drafts:
            return self.tokens[count - allowed :], count
        if count > allowed and drafts[allowed] == self.refused and self.ids[:allowed] == drafts[:allowed]:
            return self.tokens, allowed
        return None


@dataclass(slots=True)
class _Request:
    """A request's state.

    grammar: what constrains it, if anything does. calls: those of its tools, if any are known. guesses: those of its
    schemas' words, made when it is looked at first. layout: that of its output, without its newest tokens,
    `unfollowed`. known: tokens of its text when it was looked at last. tail, unseen: the last of them, and those that
    its grammar had not accepted yet. tokens: what followed then, whether or not it was worth its rows. looks: the
    newest ones, as far as the text went on as they said.
    """

    chances: StructureChances
    grammar: Grammar | None
    calls: Calls | None
    tools: str
    guesses: Guesses | None = None
    layout: Layout = field(default_factory=Layout)
    decoder: codecs.IncrementalDecoder = field(default_factory=_Decoder)
    unfollowed: list[int] = field(default_factory=list)
    known: int = 0
    tail: Sequence[int] = ()
    unseen: Sequence[int] = ()
    tokens: Sequence[Token] = ()
    looks: list[_Look] = field(default_factory=list)


class StructureArm(TextDrafter):
    """Proposes what the request's grammar forces.

    Args:
        settings: widths. vocabulary: the target's. exhausted: whether to stop looking (`Spending`).
    """

    arm = arms.STRUCTURE
    forbids = True
    sources = (GRAMMAR, TOOLS)

    def __init__(self, settings: Structure, vocabulary: Vocabulary, exhausted: Callable[[], bool]) -> None:
        self.max_drafts = settings.max_width
        self._vocabulary, self._exhausted = vocabulary, exhausted
        self._chances = PerTenant(StructureChances)
        self._requests: dict[int, _Request] = {}

    def begin(
        self,
        row: int,
        hints: RequestHints,
        tenant: Tenant | None,
        predicted: Sequence[int] | None = None,
        grammar: Grammar | None = None,
        prompt: int = 0,
    ) -> None:
        """A request begins in `row`, or begins again."""
        self.release(row)
        known = grammar is not None and all_forced(grammar.schema, hints.tools)
        calls = Calls(hints.tools, hints.spans) if hints.tools and not known else None
        if grammar is not None or calls is not None:
            # A request that asks for nothing to be kept of its text teaches nobody.
            shared = hints.lookup == "memory"
            chances = self._chances.of(tenant) if shared else self._chances.fresh()
            self._requests[row] = _Request(chances, grammar, calls, hints.tools)

    def serves(self, row: int) -> bool:
        return row in self._requests

    def propose(
        self, row: int, length: int, history: History, worth: Worth, under_way: int = 0
    ) -> Candidate | None:
        request = self._requests.get(row)
        if request is None:
            return None
        written = [*history(request.known)]
        self._learn(request, written)
        if request.guesses is None:
            self._look_first(request, history, min(length, len(written)))
        else:
            request.unfollowed += written
        request.known += len(written)
        request.tail = [*request.tail, *written][-TAIL:]
        request.unseen = history(request.grammar.known) if request.grammar else ()
        request.looks = [look for each in request.looks if (look := each.behind(written)) is not None]
        request.tokens, _ = self._looked(request, NOTHING, self.max_drafts + under_way, worth)
        forced = self._behind(request, NOTHING._replace(at=request.known), request.tokens, worth)
        return forced if forced.tokens else None

    def extends(self, row: int) -> bool:
        request = self._requests.get(row)
        return request is not None and request.known > 0

    def extend_drafts(self, row: int, drafts: Candidate, room: int, worth: Worth) -> Candidate:
        """Tokens of `drafts` that the grammar allows, and tokens that are forced after them."""
        request = self._requests[row]
        tokens, allowed = self._looked(request, drafts, room, worth)
        return self._behind(request, drafts.first(allowed), tokens, worth)

    def _behind(
        self, request: _Request, drafts: Candidate, tokens: Sequence[Token], worth: Worth
    ) -> Candidate:
        """`drafts`, and those of `tokens` behind them that are worth their rows."""
        least = worth.least_chance
        alive = list(takewhile(lambda chance: chance >= least, self._chances_of(request, drafts, tokens)))
        source = TOOLS if request.grammar is None else GRAMMAR
        return drafts.followed_by([token.token for token in tokens[: len(alive)]], alive, source)

    def _chances_of(self, request: _Request, drafts: Candidate, tokens: Sequence[Token]) -> Iterator[float]:
        """That each of `tokens` behind `drafts` is accepted, and all before it."""
        before = drafts.alive[-1] if drafts.tokens else 1.0
        chances = accumulate((request.chances.of(token.kind) for token in tokens), mul, initial=before)
        return islice(chances, 1, None)

    def forget(self, handle: int | None) -> None:
        """Drop what was learned of one tenant or of all; requests that run now teach nobody any more."""
        self._chances.forget(handle)

    def release(self, row: int) -> None:
        request = self._requests.pop(row, None)
        if request is None or request.grammar is None:
            return
        self._follow(request)
        if "{" in request.layout.seen:
            framed = request.layout.frames is not NO_FRAMES
            request.chances.habits[framed] = request.layout.as_habit()

    def _learn(self, request: _Request, committed: Sequence[int]) -> None:
        """Compare what was proposed with what was committed since, whoever drafted that."""
        if not request.tokens:
            return
        before = request.tail[-1]
        for number, (token, written) in enumerate(zip(request.tokens, committed, strict=False)):
            request.chances.observe(token.kind, token.token == written)
            if token.token != written:
                self._learn_cut(request, number, before, written)
                break
            before = written

    def _learn_cut(self, request: _Request, number: int, before: int, written: int) -> None:
        """Another token was written behind `before` than was proposed: it may begin the same text."""
        proposed = [token.token for token in request.tokens[number:]]
        begin = bytes_of(self._vocabulary, [written])
        if begin and bytes_of(self._vocabulary, proposed).startswith(begin):
            token = request.tokens[number]
            request.chances.cuts.learn(before, token.token if token.usual is None else token.usual, written)

    def _look_first(self, request: _Request, history: History, length: int) -> None:
        """Keep what later looks need of the text so far. length: of the prompt, if no grammar says it."""
        begin = request.grammar.prompt if request.grammar else length
        schema = words_of(request.grammar.schema) if request.grammar else ()
        if request.grammar:
            request.layout.frames = frames = frames_of(request.grammar.schema)
            request.layout.habit = request.chances.habits.get(frames is not NO_FRAMES)
        words = tuple(dict.fromkeys((*schema, *words_of_tools(request.tools))))
        prompt = history(0)[:begin]  # kept until there is a choice of words, or the request ends
        request.guesses = Guesses(words, partial(self._used, prompt))
        if request.calls is not None:
            request.calls.prompt = cache(partial(text_of, self._vocabulary, prompt))
        request.unfollowed = [*history(begin)]

    def _follow(self, request: _Request) -> None:
        """The layout of what was written since, and the call in it."""
        if not request.unfollowed:
            return
        text = request.decoder.decode(bytes_of(self._vocabulary, request.unfollowed))
        request.unfollowed = []
        request.layout.follow(text)
        if request.calls is not None:
            request.calls.follow(text)

    def _used(self, prompt: Sequence[int], words: Sequence[str]) -> dict[str, int]:
        """How often a prompt holds each word as a whole string."""
        text = text_of(self._vocabulary, prompt)
        return {word: text.count(f'"{word}"') for word in words}

    def _looked(
        self, request: _Request, drafts: Candidate, limit: int, worth: Worth
    ) -> tuple[Sequence[Token], int]:
        """Tokens that follow `drafts` as far as the grammar allows, and how many of these it does; `limit` tokens
        together.

        A new look is taken only if no earlier one saw so far, or as far as rows are worth it.
        """
        ids = [*drafts.tokens]
        if (known := self._known(request, ids, drafts, limit, worth)) is not None:
            return known
        if request.grammar is None and limit <= len(ids):
            return (), len(ids)  # nothing is forbidden, and there is no room
        self._follow(request)
        look = self._look(request, ids, limit + self.max_drafts)  # it answers for longer
        request.looks = [look, *request.looks][:LOOKS]
        return look.tokens[: max(limit - look.allowed, 0)], look.allowed

    def _known(
        self, request: _Request, ids: list[int], drafts: Candidate, limit: int, worth: Worth
    ) -> tuple[Sequence[Token], int] | None:
        """Answer of an earlier look, as of `_looked`; None: none saw far enough."""
        for look in request.looks:
            if (known := look.after(ids)) is not None:
                tokens, allowed = known
                chances = self._chances_of(request, drafts, tokens)
                far = len(tokens) >= limit - allowed or min(chances, default=1.0) < worth.least_chance
                if look.whole or far:
                    return tokens[: max(limit - allowed, 0)], allowed
        return None

    def _look(self, request: _Request, drafts: Sequence[int], limit: int) -> _Look:
        """Look at what follows `drafts` now; `limit` tokens together."""
        matcher = request.grammar.matcher(self._vocabulary) if request.grammar else None
        calls, after, refused = request.calls, len(drafts), None
        nothing = _Look(drafts, after, (), None, False)
        if matcher is None and calls is None:
            return nothing
        if matcher is not None:
            matcher.exhausted = self._exhausted
        with ExitStack() as stack:
            for state in (matcher, calls):
                if state is not None:
                    stack.enter_context(state.trying())
            if matcher is not None:
                if not all(map(matcher.accept_token, request.unseen)):
                    return nothing
                after = self._allowed(matcher, drafts)
                refused = drafts[after] if after < len(drafts) and not self._exhausted() else None
                for look in request.looks:
                    if (
                        refused is not None
                        and look.whole
                        and (known := look.after(drafts[:after])) is not None
                    ):
                        return _Look(look.ids, after, known[0], refused, True)
            layout, text = request.layout, text_of(self._vocabulary, drafts[:after])
            if text:
                layout = layout.copy()
                layout.follow(text)
                calls = calls.behind(text) if calls is not None else None
            elif after:
                calls = None  # the drafts end inside a character
            tokens, whole = sketch(
                matcher,
                self._vocabulary,
                [*request.tail, *drafts[:after]],
                limit - after,
                end=request.grammar.end if request.grammar else None,
                likelihood=request.chances.of,
                guesses=request.guesses,
                layout=layout,
                calls=calls,
                cuts=request.chances.cuts,
            )
        return _Look(
            [*drafts[:after], *(token.token for token in tokens)],
            after,
            tokens,
            refused,
            whole and not self._exhausted(),
        )

    def _allowed(self, matcher: Matcher, drafts: Sequence[int]) -> int:
        """How many of the drafts the grammar allows, one after the other; the matcher goes on with them."""
        for number, draft in enumerate(drafts):
            if not (is_text(self._vocabulary, draft) and matcher.accept_token(draft)):
                return number
        return len(drafts)
