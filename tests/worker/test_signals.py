"""Signals and figures of a round to the controller and the trace."""

import math
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from engine import engine
from model_set import Models

from whiflash_sglang.records.core import Results
from whiflash_sglang.round import learning, signals

ROUNDS = 40


@pytest.mark.parametrize("arm", ["none", "ar"])
def test_entropy_is_read_seldom_where_nothing_is_drafted(
    models: Models, arm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A heavy read of all logits; `auto` must still notice, within a few tokens, that the text has changed."""
    read: list[int] = []

    def counted(logits: Any, rows: Any, stats: Any = signals.routing_stats) -> Any:
        read.append(len(rows))
        return stats(logits, rows)

    monkeypatch.setattr(signals, "routing_stats", counted)
    with engine(models.target, whiflash=models.whiflash("auto")) as e:
        # The last token is never drafted for.
        route = lambda rows, forecasts: [arm if forecast else "none" for forecast in forecasts]  # noqa: E731
        monkeypatch.setattr(e.worker.controller, "route", route)
        e.submit("a", [1, 2, 3], max_new_tokens=1 + ROUNDS)
        while not e.requests["a"].finished():
            e.step()
            known = [state.entropy for state in e.worker.controller.states.values()]
            assert len(read) < learning.PLAIN_ENTROPY_ROUNDS or not any(math.isnan(x) for x in known)
    rounds = e.worker.clock.rounds
    if arm == "ar":
        assert len(read) >= rounds - 1
    else:
        assert len(read) == math.ceil(rounds / learning.PLAIN_ENTROPY_ROUNDS)


def test_a_pass_counts_by_its_own_drafts_behind_which_a_copy_was_verified() -> None:
    controller, other = MagicMock(), MagicMock()
    learner = learning.Learner({}, controller, other, other, other, ["", "lookup"])
    round_ = MagicMock(requests=[MagicMock(recording=None)])
    round_.plan.routes = ["ar"]
    told: dict[str, Any] = dict.fromkeys(("starts", "widths", "faults", "first_drafts", "source"), 1)
    told |= {"tokens": [7, 8, 9, 1], "accept_lens": 4, "drafts": [7, 8, 3], "drafted": 3}
    learner.learn(round_, Results(*[None] * 12)._replace(**{name: [value] for name, value in told.items()}))
    *_, lengths, right = controller.committed.call_args.args
    assert (lengths, right) == ({"lookup": 4, "ar": 3}, 0)
    told |= {"source": 0, "widths": 4, "first_drafts": 3, "tokens": [7, 8], "accept_lens": 2, "drafts": [7, 8, 3]}
    learner.learn(round_, Results(*[None] * 12)._replace(**{name: [value] for name, value in told.items()}))
    *_, lengths, right = controller.committed.call_args.args
    assert (lengths, right) == ({"ar": 2}, 2), "the second one ends the text, so no bonus token follows it"


def test_a_round_is_compared_with_one_that_verifies_a_row_of_each_request() -> None:
    costs: Any = SimpleNamespace(draft=lambda _, n: n, verify=lambda rows, _: 10 * rows, lasts=lambda s: -s)
    costs.plain = lambda requests: -10 * requests
    assert learning.round_prices(costs, ["ar", "ar", "none"], 9) == (-92, -30)
