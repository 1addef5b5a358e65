"""The arm `structure`: drafts text that a grammar forces, without a model (SGLang's jump-forward decoding, arXiv
2312.07104). Here forced text is verified like any other draft, so the target decides how it is cut into tokens.

It drafts from the text only. Forced stretches are short, so they matter most after other candidates of the host, such
as predictions, and before them: `extend_drafts` continues a candidate, and cuts it before the first token that the
grammar forbids. Neural drafts are neither continued nor cut, since the host plans before it knows them.
"""

import codecs
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from whiflash_sglang.arms.base import TextDrafter
from whiflash_sglang.checkpoints.manifest import Structure
from whiflash_sglang.copying.tenants import Tenant
from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.candidates import Candidate
from whiflash_sglang.prices.costs import Worth
from whiflash_sglang.records.core import History
from whiflash_sglang.records.request import Request
from whiflash_sglang.spans.vocabulary import Vocabulary, bytes_of, text_of
from whiflash_sglang.structure.calls import PROMPT_CHARS, Calls
from whiflash_sglang.structure.chances import StructureChances
from whiflash_sglang.structure.guesses import Ahead, Guesses, Tables
from whiflash_sglang.structure.layout import NO_FRAMES, Layout
from whiflash_sglang.structure.matchers import Grammar
from whiflash_sglang.structure.schemas import frames_of, words_of, words_of_places
from whiflash_sglang.structure.sketch import TAIL, Token, sketch
from whiflash_sglang.structure.tools import all_forced, words_of_tools

GRAMMAR, TOOLS = "grammar", "tools"
"""Sources of drafts: the request's grammar, or only its tools."""

_Decoder = partial(codecs.getincrementaldecoder("utf-8"), errors="replace")
"""Decodes the bytes of tokens, which may end inside a character."""

_STRINGS = re.compile(r'"(?=([^"]*)")')
"""Texts between two quotes. The closing quote may open the next text, since JSON is not parsed here."""

_MARKS = re.compile(rb"[^\w\x80-\xff]*")
"""Bytes of marks and blanks only."""

LOOKS = 4
"""Number of looks kept per request: after its text, after a copy, and after what these two lead into."""


class _Look(NamedTuple):
    """Tokens that were found to follow a text. ids: the `allowed` drafts that may follow it, then those of `tokens`.
    refused: the draft after them that the grammar forbids. whole: whether nothing is known to follow `tokens`.
    """

    ids: Sequence[int]
    allowed: int
    tokens: Sequence[Token]
    refused: int | None
    whole: bool

    def behind(self, written: Sequence[int]) -> "_Look | None":
        """Return the look from the end of `written` on, committed since; None if that differs, or is all of it."""
        count = len(written)
        if count >= len(self.ids) or self.ids[:count] != written:
            return None
        rest = self.tokens[max(count - self.allowed, 0) :]
        refused = self.refused if count <= self.allowed else None
        return _Look(self.ids[count:], max(self.allowed - count, 0), rest, refused, self.whole)

    def after(self, drafts: Sequence[int]) -> tuple[Sequence[Token], int] | None:
        """Return the tokens that follow `drafts`, and how many of `drafts` may follow the text; None if unknown."""
        count, allowed = len(drafts), self.allowed
        if allowed <= count < len(self.ids) and self.ids[:count] == drafts:
            return self.tokens[count - allowed :], count
        if count > allowed and drafts[allowed] == self.refused and self.ids[:allowed] == drafts[:allowed]:
            return self.tokens, allowed
        return None


@dataclass(slots=True)
class _Kept:
    """The arm's state of a request.

    grammar: its constraint, None without one. calls: calls that are expected of its tools, if any are. tools: their
    definitions. tenant: whose request it is. guesses: words of its schemas. begin: number of prompt tokens. layout: of
    its output up to its newest tokens, `unfollowed`; `free`: how many of these need no look. known: tokens of its text
    at the last look, 0 before. tail, unseen: the text's last tokens, and those that its grammar had not accepted by
    then. tokens: what was found to follow, whether or not it was worth its rows. looks: newest first, those that the
    text has not left.
    """

    grammar: Grammar | None
    calls: Calls | None
    tools: str
    tenant: Tenant | None = None
    guesses: Guesses | None = None
    begin: int = 0
    layout: Layout = field(default_factory=Layout)
    decoder: codecs.IncrementalDecoder = field(default_factory=_Decoder)
    unfollowed: list[int] = field(default_factory=list)
    free: int = 0
    known: int = 0
    tail: Sequence[int] = ()
    unseen: Sequence[int] = ()
    tokens: Sequence[Token] = ()
    looks: list[_Look] = field(default_factory=list)


class StructureArm(TextDrafter):
    """Proposes tokens that the request's grammar forces.

    Args:
        settings: widths. vocabulary: the target's. exhausted: whether to stop looking (`Spending`).
    """

    arm = arms.STRUCTURE
    forbids = True

    def __init__(self, settings: Structure, vocabulary: Vocabulary, exhausted: Callable[[], bool]) -> None:
        self.max_drafts = settings.max_width
        self._vocabulary, self._exhausted = vocabulary, exhausted
        self._chances = StructureChances()
        self._tables = Tables(vocabulary)

    def begin(self, request: Request) -> None:
        hints, grammar = request.hints, request.grammar
        known = grammar is not None and all_forced(grammar.schema, hints.tools)
        calls = Calls(hints.tools, hints.spans) if hints.tools and not known else None
        if grammar is not None or calls is not None:
            kept = request.kept[self.arm] = _Kept(grammar, calls, hints.tools, request.tenant)
            self._read(kept, request.read())

    def serves(self, request: Request) -> bool:
        return self.arm in request.kept

    def propose(
        self, request: Request, length: int, history: History, worth: Worth, under_way: int = 0
    ) -> Candidate | None:
        kept: _Kept | None = request.kept.get(self.arm)
        if kept is None:
            return None
        known = kept.known or kept.begin
        written = [*history(known)]
        self._learn(kept, written)
        kept.unfollowed += written
        kept.known = known + len(written)
        kept.tail = [*kept.tail, *written][-TAIL:]
        kept.unseen = history(kept.grammar.known) if kept.grammar else ()
        kept.looks = [look for each in kept.looks if (look := each.behind(written)) is not None]
        empty = Candidate(at=kept.known, under_way=under_way)
        kept.tokens, _ = self._looked(kept, empty, self.max_drafts + under_way, worth)
        forced = self._behind(kept, empty, kept.tokens, worth)
        return forced if forced.tokens else None

    def extends(self, request: Request) -> bool:
        kept: _Kept | None = request.kept.get(self.arm)
        return kept is not None and kept.known > 0

    def extend_drafts(self, request: Request, drafts: Candidate, room: int, worth: Worth) -> Candidate:
        """Cut `drafts` to those that the grammar allows, and append tokens that are forced after them."""
        kept: _Kept = request.kept[self.arm]
        tokens, allowed = self._looked(kept, drafts, room, worth)
        return self._behind(kept, drafts.first(allowed), tokens, worth)

    def _behind(self, kept: _Kept, drafts: Candidate, tokens: Sequence[Token], worth: Worth) -> Candidate:
        """Append to `drafts` those of `tokens` that are worth their rows."""
        alive = self._worth(kept, drafts, tokens, worth)
        source = TOOLS if kept.grammar is None else GRAMMAR
        return drafts.followed_by([token.token for token in tokens[: len(alive)]], alive, source)

    def _worth(self, kept: _Kept, drafts: Candidate, tokens: Sequence[Token], worth: Worth) -> list[float]:
        """Return, for each of `tokens` worth its row, the chance that it and everything before it are accepted."""
        chance, paid = drafts.alive[-1] if drafts.tokens else 1.0, drafts.under_way
        least = drafts.least_chance(worth.least_chance, paid)
        alive = []
        for place, token in enumerate(tokens, len(drafts.tokens) + 1):
            chance *= self._chances.of(token.kind)
            if place > paid and not chance >= least:
                break
            alive.append(chance)
            if place == paid:
                least *= chance
        return alive

    def forget(self) -> None:
        self._chances = StructureChances()
        self._tables = Tables(self._vocabulary)  # they hold words of requests' schemas

    def end(self, request: Request) -> None:
        kept: _Kept | None = request.kept.get(self.arm)
        if kept is None or kept.grammar is None:
            return
        self._follow(kept)
        if "{" in kept.layout.seen:
            framed = kept.layout.frames is not NO_FRAMES
            self._chances.habits[framed] = kept.layout.as_habit()

    def _learn(self, kept: _Kept, committed: Sequence[int]) -> None:
        """Compare what was proposed with what was committed since, by whichever arm."""
        if not kept.tokens:
            return
        before = kept.tail[-1]
        for number, (token, written) in enumerate(zip(kept.tokens, committed, strict=False)):
            self._chances.observe(token.kind, token.token == written)
            if token.token != written:
                self._learn_cut(kept, number, before, written)
                break
            before = written

    def _learn_cut(self, kept: _Kept, number: int, before: int, written: int) -> None:
        """Learn a tokenisation: the target wrote another token than proposed after `before`, but of the same text.

        All requests share it, so it is learned of marks and blanks only, never of words.
        """
        proposed = [token.token for token in kept.tokens[number:]]
        begin, token = bytes_of(self._vocabulary, [written]), kept.tokens[number]
        usual = token.token if token.usual is None else token.usual
        same = begin and bytes_of(self._vocabulary, proposed).startswith(begin)
        if same and _MARKS.fullmatch(bytes_of(self._vocabulary, [before, usual, written])):
            self._chances.cuts.learn(before, usual, written)

    def _read(self, kept: _Kept, prompt: Sequence[int]) -> None:
        """Read the prompt once, for all that looks need of it, so that no round reads it."""
        schema = words_of(kept.grammar.schema) if kept.grammar else ()
        if kept.grammar:
            kept.layout.frames = frames = frames_of(kept.grammar.schema)
            kept.layout.habit = self._chances.habits.get(frames is not NO_FRAMES)
            kept.layout.words, kept.layout.source = words_of_places(kept.grammar.schema), kept.grammar.schema
        words, text = dict.fromkeys((*schema, *words_of_tools(kept.tools))), text_of(self._vocabulary, prompt)
        kept.begin, kept.tail = len(prompt), prompt[-TAIL:]
        used = Counter(string for string in _STRINGS.findall(text) if string in words)
        kept.guesses = Guesses(tuple(words), used, self._tables)
        if kept.calls is not None:
            kept.calls.prompt = text[-PROMPT_CHARS:]

    def _follow(self, kept: _Kept) -> bool:
        """Advance the layout and the calls of `kept` by its tokens not read so far; return whether there were any."""
        if not kept.unfollowed:
            return False
        text = kept.decoder.decode(bytes_of(self._vocabulary, kept.unfollowed))
        kept.unfollowed, kept.free = [], 0
        if kept.grammar is not None:
            kept.layout.follow(text)
        if kept.calls is not None:
            kept.calls.follow(text)
        return True

    def _looked(self, kept: _Kept, drafts: Candidate, limit: int, worth: Worth) -> tuple[Sequence[Token], int]:
        """Return the tokens that follow `drafts` cut to what the grammar allows, and the number of drafts that it
        allows; together at most `limit`.

        A new look is taken only if no earlier one reaches as far, or as far as rows pay.
        """
        ids = [*drafts.tokens]
        if (known := self._known(kept, ids, drafts, limit, worth)) is not None:
            return known
        free = self._are_free(kept, ids) or (self._follow(kept) and self._are_free(kept, ids))
        if free or (kept.grammar is None and limit <= len(ids)):
            return (), len(ids)  # nothing is forbidden; nothing is known to follow, or there is no room
        look = self._look(kept, ids, limit + self.max_drafts)  # longer, so that it answers later calls too
        kept.looks = [look, *kept.looks][:LOOKS]
        return look.tokens[: max(limit - look.allowed, 0)], look.allowed

    def _are_free(self, kept: _Kept, drafts: Sequence[int]) -> bool:
        """Whether tokens alone show that nothing forbids `drafts` or is known to follow; False: look."""
        tokens = [*kept.unfollowed[kept.free :], *drafts]
        free = kept.calls is None or kept.calls.are_free(tokens, self._tables)
        if free and kept.grammar is not None:
            whole = not kept.decoder.getstate()[0]  # no character is open
            free = whole and kept.layout.is_free and all(map(self._tables.plain, tokens))
        kept.free = len(kept.unfollowed) if free else kept.free
        return free

    def _known(
        self, kept: _Kept, ids: list[int], drafts: Candidate, limit: int, worth: Worth
    ) -> tuple[Sequence[Token], int] | None:
        """Return `_looked`'s answer from an earlier look; None if none reaches far enough."""
        for look in kept.looks:
            if (known := look.after(ids)) is not None:
                tokens, allowed = known
                far = look.whole or len(tokens) >= limit - allowed
                if far or len(self._worth(kept, drafts, tokens, worth)) < len(tokens):
                    return tokens[: max(limit - allowed, 0)], allowed
        return None

    def _look(self, kept: _Kept, drafts: Sequence[int], limit: int) -> _Look:
        """Look at what follows `drafts` now; drafts and tokens together are at most `limit`."""
        calls, ahead, after, refused = kept.calls, None, len(drafts), None
        nothing = _Look(drafts, after, (), None, False)
        matcher = kept.grammar.matcher(self._vocabulary) if kept.grammar else None
        if matcher is None and calls is None:
            return nothing
        with matcher.trying() if matcher else nullcontext(), calls.trying() if calls else nullcontext():
            if matcher is not None:
                matcher.exhausted = self._exhausted
                ahead = Ahead(matcher, kept.layout, kept.guesses, kept.unseen)
                ahead.by_place &= not kept.decoder.getstate()[0]  # no character is open
                after = ahead.accept(drafts, self._vocabulary)
                if ahead.lost:
                    return nothing
                refused = drafts[after] if after < len(drafts) and not self._exhausted() else None
                for look in kept.looks if refused is not None else ():
                    if look.whole and (known := look.after(drafts[:after])) is not None:
                        return _Look(look.ids, after, known[0], refused, True)
            if calls is not None and after:  # drafts whose text is empty end inside a character
                text = text_of(self._vocabulary, drafts[:after])
                calls = calls.behind(text, drafts[:after], kept.guesses) if text else None
            tokens, whole = sketch(
                ahead,
                self._vocabulary,
                [*kept.tail, *drafts[:after]],
                limit - after,
                end=kept.grammar.end if kept.grammar else None,
                likelihood=self._chances.of,
                guesses=kept.guesses,
                calls=calls,
                cuts=self._chances.cuts.of(kept.tenant),
            )
        ids = [*drafts[:after], *(token.token for token in tokens)]
        return _Look(ids, after, tokens, refused, whole and not self._exhausted())
