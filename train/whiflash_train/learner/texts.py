"""Samples that a pass learns from, and the newest ones that judge it, which no version has learned from."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.updates.samples import files_of, read_samples
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
    """Split samples, oldest first, each prompt's newest answer alone, and of a tenant its share alone.

    Args:
        since: when the newest sample of the newest version was written; only later ones judge, half of them at most.
        tokens: answer tokens to learn from, at most, the newest first. judged: requests that judge, at most.

    Raises:
        TooFewError: came since.
    """
    newest = list({text.prompt: text for text in texts}.values())
    newest.sort(key=lambda text: text.written)
    unseen = [text for text in newest if text.written > since]
    counts = Counter(text.tenant for text in newest)
    shares, limit = min(TENANTS, len(counts) or 1), min(judged, len(unseen) // 2)
    # Half of a tenant's are left to learn from.
    rooms = {tenant: min(-(-limit // shares), (count + 1) // 2) for tenant, count in counts.items()}
    judges = _newest(unseen, limit, rooms, lambda text: 1)
    if len(judges) < LEAST:
        raise TooFewError(
            f"{len(unseen)} samples are newer than the newest version, {len(judges)} of them can judge as {shares} "
            f"tenants share that; {2 * LEAST} are needed, half of them to judge: wait for more requests"
        )
    chosen = {text.name for text in judges}
    others = [text for text in newest if text.name not in chosen]
    budget = min(tokens, answer_tokens(others))
    rooms = dict.fromkeys(counts, -(-budget // shares))
    return ChosenTexts(
        _newest(others, budget, rooms, lambda text: len(text.answer)), judges, newest[-1].written
    )


def _newest(
    texts: Sequence[Text], limit: int, rooms: Mapping[int | None, int], weight: Callable[[Text], int]
) -> list[Text]:
    """The newest texts of so much weight at most, and of a tenant as it has room; one at least, if there are any."""
    chosen: list[Text] = []
    used: Counter[int | None] = Counter()
    for text in reversed(texts):
        more = weight(text)
        if chosen and used.total() + more > limit:
            break
        if not chosen or used[text.tenant] + more <= rooms[text.tenant]:
            chosen.append(text)
            used[text.tenant] += more
    return chosen[::-1]


def answer_tokens(texts: Sequence[Text]) -> int:
    """Answer tokens of all together."""
    return sum(len(text.answer) for text in texts)
