"""The structure arm: what a grammar forces next needs no model (SGLang's jump-forward decoding, arXiv 2312.07104; here
it is verified like any other draft, so how the target cuts the text is the target's choice).

It goes by the text alone. Forced stretches are short, so they matter most behind other arms' drafts and before them:
`prolong` goes on where a neural draft or a copy ends, and drops what the grammar forbids in it.
"""

import codecs
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import accumulate
from operator import mul

import torch

from whiflash_sglang import arms
from whiflash_sglang.checkpoints.manifest import Structure
from whiflash_sglang.core import DraftBatch, Drafts, Grown, History, Voice
from whiflash_sglang.device.transfers import EXACT, HostView
from whiflash_sglang.drafters.base import Drafter, padded
from whiflash_sglang.lookup.calibration import PerTenant
from whiflash_sglang.lookup.memory import Tenant
from whiflash_sglang.routing.costs import Worth
from whiflash_sglang.routing.signals import NOTHING_AHEAD, Forecast
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

WORTH = 0.1
"""Chance of being accepted below which one more token is not worth verifying, where costs are not priced."""

GRAMMAR, TOOLS = "grammar", "tools"
"""What drafts are taken from: what constrains the request, or only what it says of its tools."""

_Decoder = partial(codecs.getincrementaldecoder("utf-8"), errors="replace")
"""A token may end inside a character."""


@dataclass(slots=True)
class _Request:
    """What is kept of one.

    grammar: what constrains it, if anything does. calls: of its tools, if any are known. guesses: of its schemas'
    words, made when it is looked at first. layout: of its output, whose text is followed up to position `followed`.
    length: n when it was looked at last; -1: not yet. tail, unseen: the last tokens then, and those that its grammar
    had not been told. tokens: what was proposed; alive: chances that each and all before it are right.
    """

    chances: StructureChances
    grammar: Grammar | None
    calls: Calls | None
    tools: str
    guesses: Guesses | None = None
    layout: Layout = field(default_factory=Layout)
    decoder: codecs.IncrementalDecoder = field(default_factory=_Decoder)
    followed: int = 0
    length: int = -1
    tail: Sequence[int] = ()
    unseen: Sequence[int] = ()
    tokens: list[Token] = field(default_factory=list)
    alive: list[float] = field(default_factory=list)


class StructureArm(Drafter):
    """Proposes what the request's grammar forces.

    Args:
        settings: widths. vocabulary: the target's. host: what it may read while a round runs.
    """

    arm = arms.STRUCTURE
    judges = prolongs = forbids = True

    def __init__(self, settings: Structure, vocabulary: Vocabulary, host: HostView = EXACT) -> None:
        self._host = host
        self.max_drafts = settings.max_width
        self._vocabulary = vocabulary
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
        # Without a grammar a round reads nothing of the device before its end, so nobody knows what was drafted.
        known = grammar is not None and all_forced(grammar.schema, hints.tools)
        told = hints.tools and self._host.exact and not known
        calls = Calls(hints.tools, hints.spans) if told else None
        if grammar is not None or calls is not None:
            # What asks for nothing to be kept of its text teaches nobody.
            shared = hints.lookup == "memory"
            chances = self._chances.of(tenant) if shared else self._chances.fresh()
            self._requests[row] = _Request(chances, grammar, calls, hints.tools)

    def serves(self, row: int) -> bool:
        return row in self._requests

    def forecast(self, row: int, length: int, history: History, worth: Worth) -> Forecast:
        request = self._requests.get(row)
        if request is None:
            return NOTHING_AHEAD
        self._learn(request, history)
        request.tail = history(max(length + 1 - TAIL, 0))
        if max(length + 1 - TAIL, 0) + len(request.tail) != length + 1:
            request.length, request.tokens, request.alive = -1, [], []
            return NOTHING_AHEAD  # earlier rounds are still under way: nobody knows where the text stands
        request.length = length
        request.unseen = history(request.grammar.known) if request.grammar else ()
        self._follow(request, history)
        found = self._sketch(request, (), self.max_drafts)
        request.tokens, request.alive = found.tokens, found.alive
        width = _width(request.alive, self.max_drafts, worth)
        return Forecast(1 + sum(request.alive[:width]), 1 + width)

    def draft(self, batch: DraftBatch) -> Drafts:
        pairs = zip(batch.row_ids, batch.limits, strict=True)
        found = [self.proposed(row, limit, batch.worth) for row, limit in pairs]
        return _drafts(found, batch.bonus.device)

    def proposed(self, row: int, limit: int, worth: Worth) -> "Found":
        """What its newest look found for the request in `row`: up to `limit` tokens, each of which is worth it."""
        request = self._requests[row]
        width = _width(request.alive, limit, worth)
        return Found(request.tokens[:width], request.alive[:width])

    def prolong(self, grown: Grown) -> Drafts | None:
        """What is forced behind another arm's drafts; of these only what the grammar allows stays."""
        batch = grown.batch
        rooms = [
            room if self._looked_at(row, n) else 0
            for row, n, room in zip(batch.row_ids, batch.lengths, grown.rooms, strict=True)
        ]
        if not any(rooms):
            return None
        assert grown.drafts.alive is not None
        own, alive = grown.drafts.tokens.tolist(), grown.drafts.alive.tolist()
        counts = grown.drafts.counts.tolist()
        found = [
            self.behind(row, tokens[:count], chances, room, batch.worth) if room else Found(after=count)
            for row, tokens, chances, count, room in zip(
                batch.row_ids, own, alive, counts, rooms, strict=True
            )
        ]
        after = [one.after for one in found]
        if after == counts and not any(one.tokens for one in found):
            return None
        drafts = _drafts(found, batch.bonus.device)
        return replace(drafts, after=torch.tensor(after, device=batch.bonus.device))

    def source(self, row: int) -> str:
        request = self._requests.get(row)
        return GRAMMAR if request is not None and request.grammar is not None else TOOLS

    def forget(self, handle: int | None) -> None:
        """Drop what was learned of one tenant or of all; requests that run now teach nobody any more."""
        self._chances.forget(handle)

    def release(self, row: int) -> None:
        request = self._requests.pop(row, None)
        if request is not None and request.grammar is not None and "{" in request.layout.seen:
            framed = request.layout.frames is not NO_FRAMES
            request.chances.habits[framed] = request.layout.as_habit()

    def _looked_at(self, row: int, length: int) -> bool:
        """Whether the request in `row` was looked at in this round."""
        request = self._requests.get(row)
        return request is not None and request.length == length

    def _learn(self, request: _Request, history: History) -> None:
        """Compare what was proposed with what was committed since, whoever drafted that."""
        if not request.tokens:
            return
        before = request.tail[-1]
        for number, (token, written) in enumerate(
            zip(request.tokens, history(request.length + 1), strict=False)
        ):
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

    def _follow(self, request: _Request, history: History) -> None:
        """The layout of what was written since, and the call in it."""
        if request.guesses is None:
            request.followed = begin = request.grammar.prompt if request.grammar else request.length
            schema = words_of(request.grammar.schema) if request.grammar else ()
            if request.grammar:
                request.layout.frames = frames = frames_of(request.grammar.schema)
                request.layout.habit = request.chances.habits.get(frames is not NO_FRAMES)
            words = tuple(dict.fromkeys((*schema, *words_of_tools(request.tools))))
            prompt = history(0)[:begin]  # kept until there is a choice of words, or the request ends
            request.guesses = Guesses(words, partial(self._used, prompt))
            if request.calls is not None:
                request.calls.prompt = cache(partial(text_of, self._vocabulary, prompt))
        written = history(request.followed)
        request.followed += len(written)
        text = request.decoder.decode(bytes_of(self._vocabulary, written))
        request.layout.follow(text)
        if request.calls is not None:
            request.calls.follow(text)

    def _used(self, prompt: Sequence[int], words: Sequence[str]) -> dict[str, int]:
        """How often each word stands in a prompt as a whole string."""
        text = text_of(self._vocabulary, prompt)
        return {word: text.count(f'"{word}"') for word in words}

    def _sketch(self, request: _Request, drafts: Sequence[int], limit: int) -> "Found":
        """What follows `drafts`, of which only what the grammar allows counts."""
        matcher = request.grammar.matcher(self._vocabulary) if request.grammar else None
        calls = request.calls
        if matcher is None and calls is None:
            return Found(after=len(drafts))
        with ExitStack() as stack:
            for own in (matcher, calls):
                if own is not None:
                    stack.enter_context(own.trying())
            after = len(drafts)
            if matcher is not None:
                if not all(map(matcher.accept_token, request.unseen)):
                    return Found(after=after)
                after = self._allowed(matcher, drafts)
            layout, text = request.layout, text_of(self._vocabulary, drafts[:after])
            if text:
                layout = layout.copy()
                layout.follow(text)
                calls = calls.behind(text) if calls is not None else None
            elif after:
                calls = None  # the drafts end inside a character
            tokens = sketch(
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
        alive = list(accumulate((request.chances.of(token.kind) for token in tokens), mul))
        return Found(tokens, alive, after)

    def _allowed(self, matcher: Matcher, drafts: Sequence[int]) -> int:
        """How many of the drafts the grammar allows, one after the other; the matcher goes on with them."""
        for number, draft in enumerate(drafts):
            if not (is_text(self._vocabulary, draft) and matcher.accept_token(draft)):
                return number
        return len(drafts)

    def voice(self, row: int, length: int, limit: int, worth: Worth) -> Voice | None:
        if not self._looked_at(row, length):
            return None
        found = self.proposed(row, limit, worth)
        tokens = [token.token for token in found.tokens]
        return Voice(tokens, found.alive, self.source(row)) if tokens else None

    def behind(
        self, row: int, drafts: Sequence[int], chances: Sequence[float], room: int, worth: Worth
    ) -> "Found":
        """What goes behind drafts with these chances of being right: `room` tokens at most, drafts included."""
        found = self._sketch(self._requests[row], drafts, room)
        before = chances[found.after - 1] if found.after else 1.0
        alive = [before * chance for chance in found.alive]
        width = _width(alive, self.max_drafts, worth)
        return Found(found.tokens[:width], alive[:width], found.after)


@dataclass(slots=True)
class Found:
    """What is proposed for one request, behind the first `after` of another arm's drafts.

    alive: for each token the chance that it and all before it are accepted.
    """

    tokens: list[Token] = field(default_factory=list)
    alive: list[float] = field(default_factory=list)
    after: int = 0


def _width(alive: Sequence[float], limit: int, worth: Worth) -> int:
    """Tokens to verify: at most `limit`, each accepted with a chance that is worth it."""
    return sum(chance >= (worth.row or WORTH) for chance in alive[:limit])


def _drafts(found: Sequence[Found], device: torch.device) -> Drafts:
    return padded(
        [[token.token for token in one.tokens] for one in found], [one.alive for one in found], device
    )
