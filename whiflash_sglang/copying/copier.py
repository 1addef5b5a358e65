"""Finds one request's copies: in its own text, in answers of its group, and in the answer that its caller expects.

The longest match wins, the newest of equals. Counting which continuation is the most frequent did no better on
training answers; how much the places agree shows instead how far to trust the copy (see `calibration`).
"""

import ctypes
from array import array
from collections.abc import Sequence
from itertools import chain

from whiflash_kernels.cpu.compiler import Native

from whiflash_sglang.copying.calibration import MatchCalibration, RequestCalibration
from whiflash_sglang.copying.groups import Member
from whiflash_sglang.copying.texts import Prediction
from whiflash_sglang.drafts.candidates import Candidate


def teach(copy: Candidate, committed: Sequence[int], judge: MatchCalibration, request: RequestCalibration) -> None:
    """Teach `judge`, and the `request`'s own factor, which tokens of a `copy` of the device were right: `committed` are
    those of the text. `copies.h` learns the same of the host's.
    """
    for length, (copied, agreement, token) in enumerate(
        zip(copy.tokens, copy.agreements, committed, strict=False), copy.matched
    ):
        right = copied == token
        if length == copy.matched:
            request.observe(judge.chance(length, agreement), right)
        judge.observe(length, agreement, right)
        if not right:
            return


class Copier(Native):
    """A request's copies. They are looked for in the batch (`whiflash_kernels.cpu.texts`), and learn from the tokens
    committed next, whichever arm drafted them.

    Args:
        library: the search. judge: shared by all requests. min_match: shortest match worth copying from, in tokens.
            prediction: the expected answer, preferred to the text if both match as long. habit: how well the request
            has copied so far. stops: tokens that end the request, after which no copy goes on. member: the request in
            its group; None: it has none.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        judge: MatchCalibration,
        min_match: int,
        prediction: Prediction | None,
        habit: RequestCalibration,
        stops: Sequence[int],
        member: Member | None,
    ) -> None:
        self.habit, self.member, ids = habit, member, array("i", stops)
        super().__init__(library, "copies", *judge.addresses, self.habit.address, min_match, *ids.buffer_info())
        if prediction is not None:
            self.predict(prediction.at, *prediction.judge.addresses)
        self._held = judge, prediction
        self._joined: list[object] = []
        """The group's texts that compiled code reads: of the last look, from which it learns, and of the next."""
        self.join_group()

    def __len__(self) -> int:
        return int(self.library.whiflash_size(self.own()))

    @property
    def nbytes(self) -> int:
        """Return the bytes of its index of the text."""
        return int(self.library.whiflash_bytes(self.own()))

    def read(self, tokens: Sequence[int]) -> None:
        """Append committed tokens, and learn from them."""
        ids = array("i", tokens)
        self.commit(*ids.buffer_info())

    def join_group(self) -> None:
        """Set the texts of its group that are searched now."""
        if (member := self.member) is None:
            return
        own, others, group = member.group.live.get(member.rid), member.others(), member.group
        fields = ((each.text.at, *each.judge.addresses, each.habit.address) for each in others)
        ids = array("q", chain.from_iterable(fields))
        counts = (each.buffer_info()[0] for each in (group.taken, member.looks))
        self.join(own and own.text.at, member.prompt, *counts, ids.buffer_info()[0], len(others))
        self._joined = [*self._joined[-1:], (own, others, group)]
