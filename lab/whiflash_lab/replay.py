"""`whiflash lab replay`: walks recorded answers with the arms that need no model, and counts tokens a round by source.

The recorded text counts as the target's greedy text, and each answer's first token as its prefill's. Requests run one
after the other, as one tenant's. The arms, what they learn and how they extend each other are a server's; rows have no
price here, so every draft is verified whose chance is at least `WORTH`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from statistics import fmean, median
from typing import Any, NamedTuple

from whiflash_kernels.cpu.texts import Batch, Candidates, compiled_texts
from whiflash_sdk.presets import likely_spans

from whiflash_lab.conversations import Conversation, RecordedTurn, Renderer
from whiflash_sglang.arms.base import TextDrafter
from whiflash_sglang.arms.lookup import LookupArm
from whiflash_sglang.arms.structure import StructureArm
from whiflash_sglang.checkpoints.manifest import Lookup, Structure
from whiflash_sglang.drafts.candidates import CONTEXT, GRAMMAR, TOOLS, Candidate, common_prefix, first_of, parts_of
from whiflash_sglang.embedded import cache_root
from whiflash_sglang.prices.costs import Worth
from whiflash_sglang.records.core import History
from whiflash_sglang.records.request import Request
from whiflash_sglang.spans.hints import RequestHints
from whiflash_sglang.spans.tracker import SpanTracker
from whiflash_sglang.spans.vocabulary import Vocabulary, bytes_of
from whiflash_sglang.structure.spending import Spending
from whiflash_sglang.structure.tools import carried_tools

WORTH = Worth(0.01)
WHOLE = 512
"""Most tokens of a call that is guessed whole."""
NAMES = {CONTEXT: "own text", GRAMMAR: "forced", TOOLS: "forced"}
"""Name of a source in figures; other sources keep theirs."""
BINS = (0.01, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99)
"""Least chances of the rows in the table of guessed calls."""


@dataclass(slots=True)
class Sums:
    """Totals over answers with simulated rounds. tokens: without those of prefills. rows: verified ones. accepted:
    drafts by source.
    """

    answers: int = 0
    tokens: int = 0
    rounds: int = 0
    rows: int = 0
    accepted: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Sums") -> None:
        self.answers += other.answers
        self.tokens += other.tokens
        self.rounds += other.rounds
        self.rows += other.rows
        self.accepted += other.accepted

    def as_json(self) -> dict[str, Any]:
        rounds = max(self.rounds, 1)
        return {
            "answers": self.answers,
            "tokens": self.tokens,
            "rounds": self.rounds,
            "tokens_per_round": self.tokens / rounds,
            "rows_per_round": self.rows / rounds,
            "drafts_per_round": {source: count / rounds for source, count in self.accepted.items()},
        }


class Guess(NamedTuple):
    """A guess at a call's rest, made in a round inside it. chance: that all of it is right, 0 if its end was not
    reached. right: whether it was. left: recorded tokens to the call's end. call: number of the call.
    """

    chance: float
    right: bool
    left: int
    call: int


class Walk:
    """A server's arms without a model, over the answers of one tenant.

    Args:
        parser: name of the server's `--tool-call-parser`; None: calls are not known, so none of their text is drafted.

    Raises:
        OSError: the search for copies cannot be compiled.
    """

    def __init__(self, vocabulary: Vocabulary, lookup: Lookup, structure: Structure, parser: str | None) -> None:
        self._vocabulary, self._parser, self._width = vocabulary, parser, lookup.max_width
        # Without it the arms would draft nothing, and say so in a log only.
        self._library = compiled_texts(cache_root() / "compiled")
        forced = StructureArm(structure, vocabulary, Spending(float, float))
        self._arms: list[TextDrafter] = [LookupArm(lookup, late=False), forced]
        self._requests = 0
        self.guesses: list[Guess] = []
        self.calls = 0

    def answer(
        self,
        turn: RecordedTurn,
        tools: Sequence[Mapping[str, Any]],
        prediction: Sequence[int] | None = None,
        task: str = "",
    ) -> Sums:
        """Simulate the rounds of one recorded answer without a model, and return their counts.

        tools: those offered. prediction: tokens that its caller expected. task: whose other answers it may copy from.
        """
        self._requests += 1
        text, begin = [*turn.prompt, *turn.answer], len(turn.prompt)
        functions = [(tool["function"]["name"], tool["function"].get("parameters")) for tool in tools]
        spans = likely_spans(
            tool_parser=self._parser, reasoning_parser=None, has_tools=bool(tools), response_format=None, forced=False
        )
        carried = carried_tools(functions, self._parser) if tools else None
        group = sha256(task.encode()).hexdigest()[:16] if task else None
        request = Request(
            str(self._requests),
            RequestHints(spans=spans, tools=carried or "", task=group),
            tenant=b"",
            prediction=prediction,
            prompt=begin,
            read=lambda: turn.prompt,
            stops=turn.answer[-1:],
        )
        for arm in self._arms:
            arm.begin(request)
        tracker, sums, done = SpanTracker(spans, self._vocabulary.token_bytes), Sums(1), begin + 1
        request.follow(tracker, text[begin:done])
        inside = False

        def history(start: int) -> Sequence[int]:
            return text[start:done]

        while done < len(text):
            batch, drafts = self._drafted(request, history)
            was, inside = inside, request.span is not None and request.span.kind == "tool_call"
            self.calls += inside and not was
            if inside:
                self._guess(request, batch, drafts, text[begin:done], text[done:])
            verified = drafts.first(min(self._width, len(drafts.tokens)))
            right = common_prefix(verified.tokens, text[done : done + len(verified.tokens)])
            for source, count in first_of(verified.parts, right):
                sums.accepted[NAMES.get(source, source)] += count
            sums.rounds += 1
            sums.rows += 1 + len(verified.tokens)
            request.follow(tracker, text[done : done + right + 1])
            done = min(done + right + 1, len(text))
        sums.tokens = len(text) - begin - 1
        for arm in self._arms:
            arm.answered(request, turn.answer)
            arm.end(request)
        return sums

    def _drafted(self, request: Request, history: History) -> tuple[Batch, Candidate]:
        """Return the request's texts for `_extended`, and its draft: copied or forced text, whichever expects more
        accepted tokens, continued by the other.
        """
        handles = [[arm.handle(request, history) if arm.serves(request) else 0] for arm in self._arms]
        begin = request.known or request.prompt
        written = history(begin)
        request.known = begin + len(written)
        candidates = Candidates.of(1, 2, WHOLE)
        widest = [arm.max_drafts for arm in self._arms]
        batch = Batch(self._library, candidates, handles, [0], [0, 1], widest, WORTH.least_chance)
        batch.propose(written, [len(written)], [begin])
        alive = [sum(candidates.alive[0, column, :size]) for column, size in enumerate(candidates.sizes[0])]
        candidates.sizes[0, alive.index(min(alive))] = 0
        return batch, self._extended(batch, self._width)

    def _extended(self, batch: Batch, room: int) -> Candidate:
        """Return the only candidate that is left in the batch, extended to at most `room` tokens."""
        column = int(batch.candidates.sizes[0].argmax())
        batch.extend([[3, 3]], [room])
        tokens, alive, names, size, at = (each[0, column] for each in batch.candidates)
        return Candidate(tokens[:size].tolist(), alive[:size].tolist(), parts_of(names[:size].tolist(), ()), int(at))

    def _guess(
        self, request: Request, batch: Batch, drafts: Candidate, written: Sequence[int], rest: Sequence[int]
    ) -> None:
        """Store a guess at the rest of the open call, compared with the recorded tokens `rest`."""
        assert request.span is not None
        if not request.span.end:
            return
        end, tail = request.span.end.encode(), bytes_of(self._vocabulary, written[-WHOLE:])
        whole, before = drafts, -1
        while before < len(whole.tokens) and not self._until(end, tail, whole.tokens):
            before, whole = len(whole.tokens), self._extended(batch, WHOLE)
        reached, left = self._until(end, tail, whole.tokens), self._until(end, tail, rest)
        chance = whole.alive[reached - 1] if reached else 0.0
        right = bool(reached) and list(whole.tokens[:reached]) == list(rest[:reached])
        self.guesses.append(Guess(chance, right, left, self.calls))

    def _until(self, end: bytes, tail: bytes, tokens: Sequence[int]) -> int:
        """Return the number of `tokens` up to the one that completes the marker `end`; 0 if none does."""
        tail = tail[-len(end) + 1 :] if len(end) > 1 else b""
        for number, token in enumerate(tokens, start=1):
            tail += bytes_of(self._vocabulary, [token])
            if end in tail:
                return number
        return 0


def replayed(walk: Walk, recorded: Iterable[Conversation], renderer: Renderer) -> dict[str, Sums]:
    """Simulate the rounds of all recorded answers without a model. Return the counts by category, and of `all`."""
    by_category, total = dict[str, Sums](), Sums()
    for conversation in recorded:
        turns = list(renderer.turns(conversation))
        for turn in (turn for turn in turns if turn.answer):  # some traces have only lengths
            expected = conversation.prediction if turn is turns[-1] else None
            tokens = None if expected is None else renderer.encode(expected)
            sums = walk.answer(turn, conversation.tools, tokens, conversation.task)
            by_category.setdefault(conversation.category, Sums()).add(sums)
            total.add(sums)
    by_category.pop("all", None)
    return {**by_category, "all": total}


def curve(guesses: Sequence[Guess]) -> list[dict[str, float]]:
    """Return how often guesses of a tool call's rest were right, in a row for each interval of their estimated chance.

    A row has the least chance, the rounds inside calls, their mean chance, the share of right guesses, and the median
    of tokens left. The first row has the rounds without a whole guess.
    """
    rows = []
    for least, below in zip((0.0, *BINS), (*BINS, 2.0), strict=True):
        found = [guess for guess in guesses if least <= guess.chance < below]
        if found:
            chance, right = (fmean(getattr(guess, name) for guess in found) for name in ("chance", "right"))
            left = median(guess.left for guess in found)
            rows.append({"least": least, "rounds": len(found), "chance": chance, "right": right, "left": left})
    return rows


def known_ahead(guesses: Sequence[Guess], calls: int, least: float) -> dict[str, float]:
    """Return how early tool calls are guessed to their end, from each call's first guess with a chance of at least
    `least`: the share of calls that have one, the share of these that are right, and the median of tokens left.
    """
    first: dict[int, Guess] = {}
    for guess in guesses:
        if guess.chance >= least:
            first.setdefault(guess.call, guess)
    found = list(first.values())
    right, left = (fmean(g.right for g in found), median(g.left for g in found)) if found else (0.0, 0.0)
    return {"least": least, "calls": len(found) / max(calls, 1), "right": right, "left": left}
