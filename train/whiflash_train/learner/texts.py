"""Choose the samples that a pass learns from, and the newest ones, unknown to the bundle in use, that judge it."""

import json
import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from whiflash_sglang.drafts.rounds import loop_start
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.telemetry.samples import files_of, read_samples, written

logger = logging.getLogger(__name__)

LEAST = 8
"""Least number of requests that judge; fewer give no useful interval."""
SHORTEST = 4
"""Shortest answer to learn from, in tokens."""
LONGEST = 4096
"""Longest text in tokens, since the target reads a text in one forward."""
TENANTS = 4
"""One tenant supplies at most 1/TENANTS of the judging requests and of the learned tokens. With fewer tenants, the
limit is one part in as many as there are tenants."""


class TooFewError(ConfigError):
    """There are too few new samples to judge drafters or to learn from."""


class Text(NamedTuple):
    """A finished request. name: digest of its tokens, the same in every file. written: seconds since the epoch.
    tenant: a handle of the tenant that it came from; None if it named none.
    """

    name: str
    written: float
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    tenant: int | None = None

    def first(self, tokens: int) -> "Text":
        """Return the text with at most `tokens` tokens of its answer."""
        return self._replace(answer=self.answer[:tokens])


class ChosenTexts(NamedTuple):
    """Texts to learn from and to judge by; they share no prompt. until: when the newest was written, Unix seconds."""

    learned: list[Text]
    judged: list[Text]
    until: float


def texts_of(directory: Path, target: str, vocabulary: int, longest: int = LONGEST) -> Iterator[Text]:
    """Yield the usable samples of a directory, oldest first; a looping answer is cut (`loop_start`).

    Files that cannot be read are skipped and logged: a server writes only complete files, and the learner cannot
    repair others.

    Args:
        vocabulary: number of the target's token ids. longest: most tokens of a text that the target can read.
    """
    for file in files_of(directory):
        try:
            samples = read_samples(file, target)
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
                yield Text(name, written(file), tuple(sample.prompt), tuple(answer), tenant)


def choose(texts: Iterable[Text], since: float, tokens: int, judged: int) -> ChosenTexts:
    """Split samples, given oldest first, into texts to learn from and texts to judge by.

    Only the newest answer to a prompt is used. No tenant supplies more than its part, however many requests it sent
    (`_room`).

    Args:
        since: when the newest sample was written that the bundle in use has learned from; only later ones judge, at
            most half of them. tokens: most answer tokens to learn from; the newest come first. judged: most requests
            that judge.

    Raises:
        TooFewError: there are too few new samples to judge, or none to learn from.
    """
    newest = list({text.prompt: text for text in texts}.values())
    newest.sort(key=lambda text: text.written)
    unseen = [text for text in newest if text.written > since]
    counts, fresh = (Counter(text.tenant for text in each) for each in (newest, unseen))
    shares = min(TENANTS, len(counts) or 1)
    # At most half of a tenant's samples judge, rounded up; the others are left to learn from.
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
    """Return each tenant's newest texts, oldest first, up to its limit of answer tokens; the oldest may be cut."""
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
    """Return the largest amount (of samples or tokens) that one tenant may supply.

    With it, no tenant supplies more than 1/`shares` of what all supply together, and all supply at most `limit`. A
    fixed share of the limit would not suffice: a tenant that sends much would dominate if the others send little.

    Args:
        able: the largest amount that each tenant can supply.
    """

    def is_too_much(room: int) -> bool:
        together = sum(min(most, room) for most in able)
        return shares * room > together or together > limit

    return bisect_right(range(max(able, default=0) + 1), False, key=is_too_much) - 1


def answer_tokens(texts: Sequence[Text]) -> int:
    """Return the number of answer tokens of all texts."""
    return sum(len(text.answer) for text in texts)
