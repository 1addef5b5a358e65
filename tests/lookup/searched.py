"""The reference of `copies.h` in Python: what it finds, place by place, and what it learns."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from whiflash_sglang.copying.calibration import BUCKETS, Agreement, MatchCalibration, RequestCalibration
from whiflash_sglang.copying.copier import teach
from whiflash_sglang.copying.texts import GAP
from whiflash_sglang.drafts.candidates import NOTHING, Candidate, Part

PLACES, STEPS, HEADS, MAX_MATCH, NEAR, SURE = 8, 32, 256, 32, 64, 0.995


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


class Predicted:
    """An answer that is predicted, and where it goes on."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens, self.end, self.appeared = tokens, list[int](), set[int]()
        self.length, self.place, self.left = 6, 0, 0

    def follow(self, answer: Sequence[int]) -> None:
        for token in answer:
            self.end = [*self.end, token][-MAX_MATCH:]
            if self.length and self.tokens[self.place : self.place + 1] == [token]:
                self.appeared.add(self.place)
                self.left = self.place + 1 if self.length >= 3 else self.left
                self.length, self.place = min(self.length + 1, MAX_MATCH), self.place + 1
            else:
                self.length, self.place = self.nearest(self.end)

    def behind(self, drafts: Sequence[int]) -> tuple[int, int]:
        """The place at which the answer goes on behind drafts, with its match's length."""
        if not drafts:
            return self.length, self.place
        if self.length and self.tokens[self.place : self.place + len(drafts)] == list(drafts):
            return min(self.length + len(drafts), MAX_MATCH), self.place + len(drafts)
        return self.nearest([*self.end, *drafts][-MAX_MATCH:])

    def nearest(self, end: Sequence[int]) -> tuple[int, int]:
        """The longest match, of equals one ahead of where the answer left, then the nearest."""
        last = min(self.left + NEAR, len(self.tokens))
        window = [i + 1 for i in range(self.left, last) if self.tokens[i] == end[-1]]
        places = [(matched(self.tokens, at, end), at) for at in window] + newest(self.tokens, end, False)
        best = max(places, key=lambda one: (one[0], one[1] > self.left, -abs(one[1] - self.left)), default=None)
        return best or (0, self.left)


class Copies:
    """A request's copies from its own text, from `others`, and from its prediction; by each one's chances."""

    def __init__(
        self,
        judge: MatchCalibration,
        others: Sequence[tuple[Sequence[int], MatchCalibration, RequestCalibration]] = (),
        prediction: tuple[Predicted, MatchCalibration] | None = None,
        stops: Sequence[int] = (),
        least: int = 1,
    ) -> None:
        self.text, self.judge, self.habit = list[int](), judge, RequestCalibration()
        self.others, self.prediction, self.stops, self.least = others, prediction, stops, least
        self.copy, self.source, self.at = NOTHING, 0, -1
        self.answer = 0

    def read(self, tokens: Sequence[int]) -> None:
        judges = [(self.judge, self.habit), *((judge, habit) for _, judge, habit in self.others)]
        if self.prediction is not None:
            judges.append((self.prediction[1], RequestCalibration()))
            self.prediction[0].follow(tokens)
            self.answer += len(tokens)
        teach(self.copy, tokens, *judges[self.source])
        self.copy, self.at = NOTHING, self.at + len(tokens) if self.at >= 0 else -1
        self.text += tokens

    def look(self, most: int, worth: float, paid: int) -> Candidate:
        self.copy = NOTHING
        if found := self._searched((), most, worth, 1.0, paid):
            tokens, alive, agreements, length, self.at, self.source = found
            name = ("context", *["group"] * len(self.others), "prediction")[self.source]
            self.copy = Candidate(tokens, alive, [Part(name, len(tokens))], 0, length, agreements)
        return self.copy

    def look_beyond(self, drafts: Sequence[int], alive: float, most: int, worth: float, paid: int) -> Candidate:
        if (
            not drafts
            or (paid <= 0 and alive < worth)
            or not (found := self._searched(drafts, most, worth, alive, paid))
        ):
            return NOTHING
        return Candidate(*found[:2]) if paid > 0 or found[1][0] >= worth else NOTHING

    def _searched(self, drafts: Sequence[int], most: int, worth: float, alive: float, paid: int) -> Any:
        """As `searched`; sources are numbered: own, others, prediction."""
        sources = [Source(self.text, self.judge.chances, True, factor=self.habit.factor)]
        sources += [Source(text, judge.chances, factor=habit.factor) for text, judge, habit in self.others]
        order = list(range(len(sources)))
        if self.prediction is not None:
            predicted, judge = self.prediction
            sources.append(Source(predicted.tokens, judge.chances, place=predicted.behind(drafts)))
            followed = 2 * (len(predicted.appeared) + 6) >= self.answer
            order.insert(0 if followed else len(order), len(order))
        if self.prediction is None or self.source < len(sources) - 1:
            sources[self.source] = sources[self.source]._replace(at=self.at)
        if not self.text:
            return None
        known = [sources[number] for number in order]
        found = searched(known, drafts, self.stops, self.least, most, worth, alive, paid)
        return found and (*found[:-1], order[found[-1]])
