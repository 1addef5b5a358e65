"""The training-free arms that are walked through recorded conversations, each as one server would keep it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from whiflash_sdk.presets import likely_spans

from whiflash_sglang.checkpoints.manifest import Lookup, Structure
from whiflash_sglang.core import Voice
from whiflash_sglang.drafters.lookup import WORTH
from whiflash_sglang.drafters.structure import StructureArm
from whiflash_sglang.lab.recorded.conversation import Turn
from whiflash_sglang.lab.recorded.peers import CACHED_REQUESTS, Bound, PromptLookup, SuffixDecoding
from whiflash_sglang.lookup.calibration import EVEN_ODDS, MatchCalibration, TenantCalibration
from whiflash_sglang.lookup.copier import OWN_TEXT_ONLY, Copier, Shared
from whiflash_sglang.lookup.emission import Emission
from whiflash_sglang.lookup.index import SuffixIndex
from whiflash_sglang.lookup.memory import Tenant, TenantMemory, tenant_of
from whiflash_sglang.lookup.scopes import WHOLE, Blocks, Scope
from whiflash_sglang.routing.costs import FULL_LENGTH
from whiflash_sglang.spans.hints import RequestHints, hashable
from whiflash_sglang.spans.vocabulary import Vocabulary
from whiflash_sglang.structure.tools import carried_tools

MEMORY_BYTES = 64 << 20
"""What memory across requests takes where an arm is walked with it."""


Copy = tuple[Sequence[int], Sequence[float]]
"""Tokens, and for each the chance that it and all before it are right."""


class Arm(Protocol):
    """Drafts one request after the other."""

    def begin(self, turn: Turn) -> None:
        """A request with the turn's prompt."""
        ...

    def extend(self, tokens: Sequence[int]) -> None:
        """What was written, whoever drafted it."""
        ...

    def propose(self, limit: int) -> Sequence[int]:
        """At most `limit` tokens to verify next."""
        ...


def continued(held: Sequence[int], prompt: list[int]) -> list[int] | None:
    """What of the prompt follows the text that is held already; None where it is another text.

    A conversation's turns share their beginning: keeping it is cheaper than reading it again.
    """
    return prompt[len(held) :] if held and prompt[: len(held)] == list(held) else None


class PromptLookupArm:
    """Prompt lookup decoding as published."""

    def __init__(self) -> None:
        self._state = PromptLookup()

    def begin(self, turn: Turn) -> None:
        rest = continued(self._state.text, turn.prompt)
        if rest is None:
            self._state, rest = PromptLookup(), turn.prompt
        self._state.extend(rest)

    def extend(self, tokens: Sequence[int]) -> None:
        self._state.extend(tokens)

    def propose(self, limit: int) -> Sequence[int]:
        return self._state.propose()[:limit]


class SuffixArm:
    """SuffixDecoding with its published defaults. cached_requests: 0 searches the request's own text alone."""

    def __init__(self, cached_requests: int = CACHED_REQUESTS) -> None:
        self._state = SuffixDecoding(cached_requests=cached_requests)

    def begin(self, turn: Turn) -> None:
        rest = continued(self._state.text, turn.prompt)
        if rest is None:
            self._state.begin(turn.prompt)
        else:
            self._state.go_on(rest)

    def extend(self, tokens: Sequence[int]) -> None:
        self._state.extend(tokens)

    def propose(self, limit: int) -> Sequence[int]:
        return self._state.propose()[:limit]


class LookupArm:
    """The copying arm as a server without prices has it.

    Args:
        settings: the bundle's. memory: whether it copies from earlier answers of the same category too, as from those
            of one tenant.
    """

    def __init__(self, settings: Lookup, memory: bool = False) -> None:
        self._settings = settings
        self._calibration = MatchCalibration(settings.seed or EVEN_ODDS)
        self._memory = TenantMemory(MEMORY_BYTES, max_age=1.0, clock=lambda: 0.0) if memory else None
        self._tenant: Tenant | None = None
        self._text, self._held = SuffixIndex(), list[int]()
        self._written: list[int] = []
        self._copier = Copier(self._calibration)

    def begin(self, turn: Turn) -> None:
        if self._memory is not None and self._tenant is not None and self._written:
            for scope, text in self._parts().items():
                self._memory.remember(self._tenant, text, scope)
        self._tenant, self._written = tenant_of(turn.conversation.category, None), []
        rest = continued(self._held, turn.prompt)
        self._copier = Copier(
            self._calibration, self._settings.min_match, self._remembered, self._forms(turn)
        )
        if rest is None:
            self._text, self._held, rest = SuffixIndex(), [], turn.prompt
        self._copier.text = self._text
        self._copier.extend(rest)
        self._held += rest

    def _forms(self, turn: Turn) -> Shared:
        """The prompt's texts in the form in which they would be written now."""
        return OWN_TEXT_ONLY

    def _parts(self) -> Mapping[Scope, Sequence[int]]:
        """The last answer, by where it is kept."""
        return {WHOLE: self._written}

    def _scope(self) -> Scope:
        """Where the next token belongs."""
        return WHOLE

    def _remembered(self) -> Sequence[SuffixIndex]:
        if self._memory is None or self._tenant is None:
            return ()
        return self._memory.texts(self._tenant, self._scope())

    def extend(self, tokens: Sequence[int]) -> None:
        self._copier.extend(tokens)
        self._held += tokens
        self._written += tokens

    def propose(self, limit: int) -> Sequence[int]:
        return self.look(limit)[0]

    def look(self, limit: int) -> Copy:
        """What is copied next, and the chances of it."""
        limit = min(limit, self._settings.max_width)
        proposal = self._copier.look(limit, WORTH)
        return proposal.tokens, proposal.alive

    def look_beyond(self, drafts: Sequence[int], chance: float, limit: int) -> Copy:
        """What is copied behind drafts that are right with a chance of `chance`."""
        limit = min(limit, self._settings.max_width)
        proposal = self._copier.look_beyond(drafts, chance, limit, WORTH)
        return proposal.tokens, proposal.alive


class FormsArm(LookupArm):
    """The copying arm with the prompt's emission forms, by the span that is open, as a server has it.

    Args:
        vocabulary: of the target.
    """

    def __init__(self, settings: Lookup, vocabulary: Vocabulary, memory: bool = False) -> None:
        super().__init__(settings, memory)
        self._vocabulary = vocabulary
        self._emission: Emission | None = None

    def extend(self, tokens: Sequence[int]) -> None:
        super().extend(tokens)
        if self._emission is not None:
            self._emission.follow(self._copier.text)

    def _forms(self, turn: Turn) -> Shared:
        self._emission = Emission(self._vocabulary, SPANS, len(turn.prompt), self._settings.form_tokens)
        return self._emission.texts


class ScopesArm(FormsArm):
    """With forms and earlier answers, every span of these in its own scope, as for requests that name an agent."""

    def __init__(self, settings: Lookup, vocabulary: Vocabulary) -> None:
        super().__init__(settings, vocabulary, memory=True)
        self._learns = TenantCalibration(settings.seed or EVEN_ODDS)
        self._blocks = Blocks(RequestHints(), ())

    def begin(self, turn: Turn) -> None:
        super().begin(turn)
        hints = RequestHints(spans=SPANS, agent=turn.conversation.category)
        self._blocks = Blocks(hints, self._vocabulary.token_bytes)
        self._enter()

    def extend(self, tokens: Sequence[int]) -> None:
        super().extend(tokens)
        self._blocks.follow(tokens)
        self._enter()

    def _enter(self) -> None:
        self._copier.calibration = self._learns.of(self._scope().agent, self._scope().block)

    def _parts(self) -> Mapping[Scope, Sequence[int]]:
        return self._blocks.texts(self._written)

    def _scope(self) -> Scope:
        return self._blocks.scope


class ToolsArm:
    """A copying arm joined with what calls of the conversation's tools look like, as one round joins them: who expects
    more drafts first, and the other behind it.

    Args:
        copies: the copying arm. settings: of the structure arm. vocabulary: of the target.
    """

    def __init__(self, copies: LookupArm, settings: Structure, vocabulary: Vocabulary) -> None:
        self._copies, self._calls = copies, StructureArm(settings, vocabulary)
        self._text: list[int] = []

    def begin(self, turn: Turn) -> None:
        self._copies.begin(turn)
        functions = [
            (tool["function"]["name"], tool["function"].get("parameters")) for tool in turn.conversation.tools
        ]
        tools = carried_tools(functions, PARSER) if functions else None
        tenant = tenant_of(turn.conversation.category, None)
        self._calls.begin(0, RequestHints(spans=SPANS, tools=tools or ""), tenant)
        self._text = list(turn.prompt)

    def extend(self, tokens: Sequence[int]) -> None:
        self._copies.extend(tokens)
        self._text += tokens

    def propose(self, limit: int) -> Sequence[int]:
        drafts, alive = self._copies.look(limit)
        if not self._calls.serves(0):
            return drafts
        said = self._calls.speak(0, len(self._text) - 1, lambda start: self._text[start:], FULL_LENGTH)
        if said is None or sum(alive) >= said.outlook().length - 1:
            return self._calls.extend(0, Voice(drafts, alive), limit, FULL_LENGTH).tokens[:limit]
        drafts = said.tokens[:limit]
        return [*drafts, *self._copies.look_beyond(drafts, said.alive[-1], limit - len(drafts))[0]]


PLAIN = "lookup"
"""The arm that others are measured against."""


PARSER = "hermes"
"""Of the server that is walked as."""

SPANS = hashable(
    likely_spans(
        tool_parser=PARSER, reasoning_parser=None, has_tools=True, response_format=None, forced=False
    )
)
"""As it infers them."""


def arms_of(
    settings: Lookup, vocabulary: Vocabulary, structure: Structure | None = None
) -> dict[str, Callable[[], Arm]]:
    """Every arm's name, and how one server's is made. structure: as of the bundle, None: its defaults."""
    structure = structure or Structure()
    return {
        "prompt-lookup": PromptLookupArm,
        "suffix-own": lambda: SuffixArm(cached_requests=0),
        "suffix": SuffixArm,
        PLAIN: lambda: LookupArm(settings),
        "lookup+forms": lambda: FormsArm(settings, vocabulary),
        "lookup+memory": lambda: LookupArm(settings, memory=True),
        "lookup+forms+memory": lambda: FormsArm(settings, vocabulary, memory=True),
        "lookup+forms+scopes": lambda: ScopesArm(settings, vocabulary),
        "lookup+tools": lambda: ToolsArm(LookupArm(settings), structure, vocabulary),
        "together": lambda: ToolsArm(FormsArm(settings, vocabulary, memory=True), structure, vocabulary),
    }


def bounds_of(settings: Lookup, vocabulary: Vocabulary) -> dict[str, Callable[[], Arm]]:
    """What rules for copying are bounded by, each from the texts of the arm that it bounds."""
    width = settings.max_width
    return {
        "bound": lambda: Bound(width),
        "bound+memory": lambda: Bound(width, memory=True),
        "bound+memory, 3": lambda: Bound(width, memory=True, match=3),
        "bound+forms+memory": lambda: Bound(width, memory=True, forms=vocabulary),
    }
