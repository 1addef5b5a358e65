"""The search for copies in Python: what `copies.cpp` finds, place by place."""

from collections.abc import Sequence
from typing import NamedTuple

from whiflash_sglang.copying.calibration import BUCKETS, SURE, Agreement
from whiflash_sglang.copying.texts import GAP, MAX_MATCH

PLACES, STEPS, HEADS = 8, 32, 256


class Source(NamedTuple):
    """tokens: a text. own: whether its end is searched for. at: where the last copy from it goes on, -1: nowhere.
    place: the only one that is looked at, with its match's length. chances: by bucket and agreement. factor: on a
    copy's first chance.
    """

    tokens: Sequence[int]
    chances: Sequence[float]
    own: bool = False
    at: int = -1
    place: tuple[int, int] | None = None
    factor: float = 1.0


def matched(text: Sequence[int], place: int, end: Sequence[int]) -> int:
    """How many tokens before the place equal the last ones of `end`."""
    if place > len(text):
        return 0
    length = 0
    while length < min(place, len(end)) and text[place - 1 - length] == end[-1 - length]:
        length += 1
    return length


def newest(text: Sequence[int], end: Sequence[int], itself: bool) -> list[tuple[int, int]]:
    """(length, place) of the places that are kept: of two tokens or more, else of one."""
    if not end:
        return []
    size = HEADS
    while size < len(text):
        size *= 2
    last, before = end[-1], end[-2] if len(end) > 1 else GAP

    def two(at: int) -> int:
        return ((text[at - 1] if at else GAP) * 0x9E3779B1 >> 12 ^ text[at]) & (size - 1)

    hashes = {1: last & (size - 1), 2: (before * 0x9E3779B1 >> 12 ^ last) & (size - 1)}
    for width in (2, 1) if len(end) > 1 else (1,):
        ends = range(len(text) - 1 - itself, -1, -1)
        chain = [at for at in ends if (two(at) if width == 2 else text[at] & (size - 1)) == hashes[width]]
        same = [
            at + 1 for at in chain[:STEPS] if text[at] == last and (width == 1 or (at >= 1 and text[at - 1] == before))
        ][:PLACES]
        if same:
            return [(matched(text, at, end) if width == 2 else 1, at) for at in same]
    return []


def searched(
    sources: Sequence[Source],
    drafts: Sequence[int],
    stops: Sequence[int],
    least: int,
    most: int,
    worth: float,
    alive: float,
    paid: int,
) -> tuple[list[int], list[float], list[int], int, int, int] | None:
    """Tokens, chances, agreements, and the place's match, place and source; None: nothing is found."""
    if set(drafts) & set(stops):
        return None
    (own,) = (source.tokens for source in sources if source.own)
    end = [*own[max(0, len(own) - max(0, MAX_MATCH - len(drafts))) :], *drafts][-MAX_MATCH:]
    places = list[tuple[int, int, int, list[int]]]()
    for number, source in enumerate(sources):
        found = newest(source.tokens, end, source.own and not drafts)
        if source.place is not None:
            found = [source.place]
        elif source.at >= 0:
            at = source.at + len(drafts)
            found = [(matched(source.tokens, at, end), at), *(each for each in found if each[1] != at)]
        for length, at in found:
            said = list(source.tokens[at:])
            if source.own and at <= len(source.tokens):
                said = (said + list(drafts)) * (most if said or drafts else 0)
            said = said[: next((i for i, token in enumerate(said) if token < 0), len(said))]
            if length >= least and said:
                places.append((length, at, number, said))
    if not places:
        return None
    length, at, number, copy = best = max(places, key=lambda place: place[0])
    tokens, lives, agreements = list[int](), list[float](), list[int]()
    for depth, token in enumerate(copy[:most]):
        speaking = [place for place in places if depth < len(place[3])]
        places = [place for place in speaking if place[3][depth] == token]
        against = max((place[0] for place in speaking if place[3][depth] != token), default=0)
        longest = max(place[0] for place in places)
        agreement = Agreement.ALONE if len(places) == 1 else Agreement.UNANIMOUS
        if against:
            agreement = Agreement.LEADING if against < longest else Agreement.CONTESTED
        bucket = max(i for i, bound in enumerate(BUCKETS) if bound <= length + depth)
        chance = sources[number].chances[bucket * len(Agreement) + agreement]
        alive *= min(chance if depth else chance * sources[number].factor, SURE)
        if depth and depth >= paid and alive < worth:
            break
        worth *= alive if depth == paid - 1 else 1.0
        tokens.append(token)
        lives.append(alive)
        agreements.append(int(agreement))
        if token in stops:
            break
    return tokens, lives, agreements, *best[:3]
