"""`auto` walked through replays: the server's own policy, states and assignment, without a server."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from whiflash_sglang import arms
from whiflash_sglang.routing.assign import Costs
from whiflash_sglang.routing.controller import route
from whiflash_sglang.routing.neural import note
from whiflash_sglang.routing.policies import PROBE_ROUNDS, AutoPolicy
from whiflash_sglang.routing.request_state import RequestState
from whiflash_sglang.routing.signals import Forecast, Signals
from whiflash_sglang.spans.hints import RequestHints
from whiflash_sglang.train.replay import ARMS, JOINED, LOOKUP, Replay
from whiflash_sglang.train.rounds import rounds
from whiflash_sglang.train.walk import Choices

REPLAYED = {
    arms.AR: JOINED[ARMS[0]],
    arms.DIFFUSION: JOINED[ARMS[1]],
    arms.LOOKUP: LOOKUP,
    arms.NONE: arms.NONE,
}
"""The controller's names of the arms → the replays'."""


@dataclass(frozen=True, slots=True)
class Prices:
    """What a round costs, in verifications of one row; `Costs` for one request alone.

    drafts: arm → its draft stage. rows: arm → rows that it verifies, where it does not say itself. row: one more row
    of a verification.
    """

    drafts: Mapping[str, float]
    rows: Mapping[str, float]
    row: float

    @classmethod
    def of_two_cores(cls, eagle_steps: int, block_size: int) -> "Prices":
        """The embedded target's on two cores, rounded: verification 34 ms, five EAGLE-3 passes 7 ms, a DFlash block
        6 ms, a further row 0.7 ms. Measured in bfloat16 on an AMD EPYC, SGLang 0.5.23, torch 2.14.1.
        """
        rows = {arms.AR: eagle_steps + 1, arms.DIFFUSION: block_size}
        return cls({arms.AR: 0.04 * eagle_steps, arms.DIFFUSION: 0.17}, rows, 0.02)

    def draft(self, arm: str, requests: int) -> float:
        return self.drafts.get(arm, 0.0)

    def verify(self, rows: float, requests: int) -> float:
        return 1.0 + self.row * (rows - 1)

    def width(self, arm: str) -> float:
        return self.rows.get(arm, 1)

    def timings(self, arm: str) -> int:
        return PROBE_ROUNDS


class Known(NamedTuple):
    """What the controller may know at every position of an answer: the target's entropy in nats [P], and the router's
    outputs [P][3] (ΔAL, accepted drafts of EAGLE-3, of DFlash), empty without heads."""

    entropy: Sequence[float]
    predicted: Sequence[Sequence[float]]


class Lag(NamedTuple):
    """Rounds whose results a decision does not know yet, as where the host plans a round while earlier ones run.

    rounds: results that are missing: 0 in step with the device, 1 or 2 behind it. signals: whether the entropy and the
    router's outputs are missing as well; a device that chooses itself knows them. copies: whether what the copying arm
    expects is that of the text as it was then; proposed is always what follows the text as it is.
    """

    rounds: int = 0
    signals: bool = True
    copies: bool = True


IN_STEP = Lag()


def auto_choices(
    answers: Sequence[Replay], known: Sequence[Known], costs: Costs | None, lag: Lag = IN_STEP
) -> list[Choices]:
    """The arm of every round that `auto` comes to, answer by answer; it learns as it goes, as one server does.

    Drafts have their full length. costs: None: nothing costs, so that `auto` seeks acceptance length alone.
    """
    policy = AutoPolicy(heads=any(one.predicted for one in known))
    chosen: list[Choices] = []
    for answer, one in zip(answers, known, strict=True):
        choices: dict[int, str] = {}
        for begin, end in ((0, answer.loop_from), (answer.loop_from, answer.positions)):
            _walk(policy, answer, one, (begin, end), costs, choices, lag)
        chosen.append(choices)
    return chosen


def _walk(
    policy: AutoPolicy,
    answer: Replay,
    known: Known,
    span: tuple[int, int],
    costs: Costs | None,
    choices: dict[int, str],
    lag: Lag,
) -> None:
    """Rounds from the first position of `span` on; where they begin is what `evaluate.walk` comes to as well."""
    state = RequestState(answer.id, RequestHints())
    begin, end = span
    # Arm, what it was decided on, tokens, where it ended.
    missing: deque[tuple[str, Signals, int, int]] = deque()

    def accepted(position: int) -> int:
        looked = position - sum(one[2] for one in missing) if lag.copies else position
        forecast: dict[str, Forecast | None] = {
            arm: None
            for arm, replayed in REPLAYED.items()
            if replayed in JOINED.values() and replayed in answer.accepted
        }
        if answer.copies[looked] > 0:
            forecast[arms.LOOKUP] = Forecast(
                1 + float(answer.copies[looked]), 1 + int(answer.proposed[looked])
            )
        (arm,) = route(policy, [state], [forecast], costs)
        choices[position] = REPLAYED[arm]
        return answer.drafts_accepted(REPLAYED[arm], position)

    for position, emitted in rounds(begin, end, accepted):
        arm, ended = state.previous or arms.NONE, position + emitted
        missing.append((arm, state.decision.signals, emitted, ended))
        if not lag.signals and ended < end:
            _signal(state, policy, known, ended)
        if len(missing) > lag.rounds:
            arm, decided_on, tokens, ended = missing.popleft()
            policy.observe(arm, decided_on, tokens)
            state.committed(arm, [0] * tokens)
            if lag.signals and ended < end:
                _signal(state, policy, known, ended)


def _signal(state: RequestState, policy: AutoPolicy, known: Known, position: int) -> None:
    """What the device read where a round ended."""
    if "entropy" in policy.needs:
        state.entropy = known.entropy[position]
    if known.predicted:
        note(state, known.predicted[position])
