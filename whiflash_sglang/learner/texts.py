"""Samples that a pass learns from, and the newest ones that judge it, which no version has learned from."""

import json
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.learn.samples import files_of, read_samples
from whiflash_sglang.train.rounds import loop_start

LEAST = 8
"""Requests that judge, at least: fewer give no interval."""
SHORTEST = 4
"""Tokens of an answer that is learned from, at least."""
LONGEST = 4096
"""Tokens of a text at most: the target reads it whole."""


class TooFewError(ConfigError):
    """There are too few samples to judge by."""


class Text(NamedTuple):
    """A finished request. name: of its tokens, whatever file holds them. written: when, in seconds since the epoch."""

    name: str
    written: float
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class Chosen(NamedTuple):
    """learned, judged: no prompt is in both. until: when the newest of all was written."""

    learned: list[Text]
    judged: list[Text]
    until: float


def texts_of(directory: Path, target: str) -> Iterator[Text]:
    """The samples of a directory that can be learned from, oldest first; of an answer that loops, what is before.

    Files that cannot be read are passed over: a server writes whole ones only, and a learner has no say in them.
    """
    for file in files_of(directory):
        try:
            samples = read_samples(file.path, target)
        except (ConfigError, OSError):
            continue
        for sample in samples:
            answer = sample.answer[: loop_start(sample.answer)]
            if len(answer) >= SHORTEST and len(sample.prompt) + len(answer) <= LONGEST:
                name = sha256(json.dumps([sample.prompt, answer]).encode()).hexdigest()[:24]
                yield Text(name, file.written, tuple(sample.prompt), tuple(answer))


def choose(texts: Iterable[Text], since: float, tokens: int, judged: int) -> Chosen:
    """Split samples, oldest first, each prompt's newest answer alone.

    Args:
        since: when the newest sample of the newest version was written; only later ones judge, half of them at most.
        tokens: answer tokens to learn from, at most, the newest first. judged: requests that judge, at most.

    Raises:
        TooFewError: came since.
    """
    found = list({text.prompt: text for text in texts}.values())
    found.sort(key=lambda text: text.written)
    unseen = [text for text in found if text.written > since]
    count = min(judged, len(unseen) // 2)
    if count < LEAST:
        raise TooFewError(
            f"{len(unseen)} samples are newer than the newest version; {2 * LEAST} are needed, half of them "
            "to judge: wait for more requests"
        )
    learned: list[Text] = []
    left = tokens
    for text in reversed(found[:-count]):
        left -= len(text.answer)
        if left < 0 and learned:
            break
        learned.append(text)
    return Chosen(learned[::-1], found[-count:], found[-1].written)


def answer_tokens(texts: Sequence[Text]) -> int:
    """Of all together."""
    return sum(len(text.answer) for text in texts)
