"""Samples that a pass learns from, and the newest ones that judge it, which the bundle in use has not learned from."""

import json
import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.telemetry.samples import files_of, read_samples
from whiflash_train.rounds import loop_start

logger = logging.getLogger(__name__)

LEAST = 8
"""Requests that judge, at least: fewer give no interval."""
SHORTEST = 4
"""Tokens of an answer that is learned from, at least."""
LONGEST = 4096
"""Tokens of a text at most: the target reads it whole."""
TENANTS = 4
"""A tenant supplies at most one of so many parts of what judges and of what is learned; of as many as there are
tenants, if these are fewer."""


class TooFewError(ConfigError):
    """There are too few samples to judge by."""


class Text(NamedTuple):
    """A finished request. name: of its tokens, whatever file holds them. written: when, in seconds since the epoch.
    tenant: a handle of the one that it came from; None: it named none.
    """

    name: str
    written: float
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    tenant: int | None = None

    def first(self, tokens: int) -> "Text":
        """Return the text with so many tokens of its answer, or all."""
        return self._replace(answer=self.answer[:tokens])


class ChosenTexts(NamedTuple):
    """learned, judged: no prompt is in both. until: when the newest of all was written."""

    learned: list[Text]
    judged: list[Text]
    until: float


def texts_of(directory: Path, target: str, vocabulary: int, longest: int = LONGEST) -> Iterator[Text]:
    """The samples of a directory that can be learned from, oldest first; of an answer that loops, what is before.

    Files that cannot be read are passed over and logged: a server writes whole ones only, and a learner has no say in
    them.

    Args:
        vocabulary: ids of the target's tokens are below it. longest: tokens of a text that the target reads at most.
    """
    for file in files_of(directory):
        try:
            samples = read_samples(file.path, target)
        except (ConfigError, OSError) as error:
            logger.warning("samples are passed over: %s", error)
            continue
        for sample in samples:
            answer = sample.answer[: loop_start(sample.answer)]
            is_known = max(sample.prompt + answer, default=0) < vocabulary
            fits = len(answer) >= SHORTEST and len(sample.prompt) + len(answer) <= longest
            if is_known and fits and sample.prompt:
                name = sha256(json.dumps([sample.prompt, answer]).encode()).hexdigest()[:24]
                tenant = next(iter(sample.handles), None)
                yield Text(name, file.written, tuple(sample.prompt), tuple(answer), tenant)


def choose(texts: Iterable[Text], since: float, tokens: int, judged: int) -> ChosenTexts:
    """Split samples, oldest first, into those that judge and those that are learned from.

    Only the newest answer to a prompt is taken. No tenant supplies more than its part of what is chosen, whatever it
    sent (`_room`).

    Args:
        since: when the newest sample was written that the bundle in use has learned from; only later ones judge, half
            of them at most. tokens: answer tokens to learn from, at most, the newest first. judged: requests that
            judge, at most.

    Raises:
        TooFewError: came since.
    """
    newest = list({text.prompt: text for text in texts}.values())
    newest.sort(key=lambda text: text.written)
    unseen = [text for text in newest if text.written > since]
    counts, fresh = (Counter(text.tenant for text in each) for each in (newest, unseen))
    shares = min(TENANTS, len(counts) or 1)
    # Half of a tenant's are left to learn from.
    able = {tenant: min(fresh[tenant], (count + 1) // 2) for tenant, count in counts.items()}
    rooms = dict.fromkeys(able, _room(able.values(), shares, min(judged, len(unseen) // 2)))
    rooms = {tenant: min(room, able[tenant]) for tenant, room in rooms.items()}
    judges = []
    for text in reversed(unseen):
        if rooms[text.tenant]:
            rooms[text.tenant] -= 1
            judges.append(text)
    names = {text.name for text in judges}
    learned = _within([text for text in newest if text.name not in names], shares, tokens)
    if len(judges) < LEAST or not learned:
        raise TooFewError(
            f"{len(unseen)} samples are newer than those that the bundle has learned from; {len(judges)} of them can "
            f"judge and {len(learned)} teach if no tenant supplies more than one of {shares} parts, and {LEAST} must "
            "judge: wait for more requests"
        )
    return ChosenTexts(learned, judges[::-1], newest[-1].written)


def _within(texts: Sequence[Text], shares: int, tokens: int) -> list[Text]:
    """Return each tenant's newest texts, as many answer tokens as it has room for; the last one of them is cut."""
    supplied: Counter[int | None] = Counter()
    for text in texts:
        supplied[text.tenant] += len(text.answer)
    left = dict.fromkeys(supplied, _room(supplied.values(), shares, tokens))
    chosen = []
    for text in reversed(texts):
        part = text.first(left[text.tenant])
        left[text.tenant] -= len(part.answer)
        if len(part.answer) >= SHORTEST:
            chosen.append(part)
    return chosen[::-1]


def _room(able: Collection[int], shares: int, limit: int) -> int:
    """Return the most that any tenant may supply, filled by turns.

    Then none supplies more than one of `shares` parts of what all supply, and all together supply at most `limit`. A
    share of the limit would not do: a tenant that sends much would supply most where the others send little.

    Args:
        able: the most that each tenant can supply.
    """

    def is_too_much(room: int) -> bool:
        together = sum(min(most, room) for most in able)
        return shares * room > together or together > limit

    return bisect_right(range(max(able, default=0) + 1), False, key=is_too_much) - 1


def answer_tokens(texts: Sequence[Text]) -> int:
    """Answer tokens of all together."""
    return sum(len(text.answer) for text in texts)
