"""A plan's numbers for copies, if the device copies too."""

import planning_time
import pytest
from planning_time import Batch

from whiflash_sglang.copying.calibration import BUCKETS, Agreement
from whiflash_sglang.drafts import arms
from whiflash_sglang.prices.costs import FULL_LENGTH
from whiflash_sglang.records.core import Round
from whiflash_sglang.round.planning import Planner


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Round]:
    """Rounds that are planned from now on."""
    made, plan = list[Round](), Planner.plan

    def noting(self: Planner, round_: Round) -> None:
        plan(self, round_)
        made.append(round_)

    monkeypatch.setattr(Planner, "plan", noting)
    return made


def test_what_the_device_copies_itself_is_not_sent(plans: list[Round]) -> None:
    batch = Batch(3)
    for _ in range(3):
        batch.round()
    for round_ in plans:
        assert all(round_.plan.limits.copied)
        assert round_.plan.candidates is None
        assert round_.host_drafts is None
    assert batch.drafters[arms.LOOKUP].host_bytes(batch.running.values())["index"] == 0, (
        "no text is indexed on the host"
    )


def test_what_the_device_copied_promises_and_teaches(plans: list[Round]) -> None:
    batch = Batch(2)
    copies = batch.drafters[arms.LOOKUP]
    before = copies.calibration([*batch.running.values()], FULL_LENGTH)
    for _ in range(2):
        batch.round()
    first, second = ([own.expected for own in plan.decisions] for plan in plans)
    assert first == [{}, {}], "nothing was copied yet"
    alive = [0.9**depth for depth in range(1, 25)]
    assert [own[arms.LOOKUP] for own in second] == [(pytest.approx(1 + sum(alive)), 25)] * 2
    after = copies.calibration([*batch.running.values()], FULL_LENGTH)
    changed = [place for place, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    unanimous, tables = 4 * (len(BUCKETS) - 1) + Agreement.UNANIMOUS, (2, 2 + 4 * len(BUCKETS))
    assert changed == [0, 1, *(table + unanimous for table in tables)], "the factors, and one cell of each table"
    assert all(after[place] > before[place] for place in changed)


def test_where_the_whole_text_is_known_the_host_looks(plans: list[Round], monkeypatch: pytest.MonkeyPatch) -> None:
    arm = planning_time.LookupArm
    monkeypatch.setattr(planning_time, "LookupArm", lambda settings, late: arm(settings, late=False))
    batch = Batch(1)
    batch.round()
    assert batch.drafters[arms.LOOKUP].host_bytes(batch.running.values())["index"] > 0
    length, rows = plans[0].decisions[0].expected[arms.LOOKUP]
    assert 1 < length < rows


def test_what_the_device_cannot_find_is_sent(plans: list[Round]) -> None:
    batch = Batch(3)
    row, text = 2, batch.requests[1]
    predicted = list(range(500, 520))
    batch.running[row].prediction = predicted
    batch.drafters[arms.LOOKUP].begin(batch.running[row])
    assert batch.drafters[arms.LOOKUP].host_bytes([batch.running[row]])["index"] > 0, "no round waits for its prompt"
    text.output_ids = predicted[:1]
    batch.round()
    (round_,) = plans
    assert [list(batch.candidates(round_, index)) for index in range(3)] == [[], [arms.LOOKUP], []]
    candidate = batch.candidates(round_, 1)[arms.LOOKUP]
    assert {part.source for part in candidate.parts} == {"prediction"}
    assert round_.host_drafts is not None
    sent, _ = round_.host_drafts
    count = len(candidate.tokens)
    assert sent.counts.flatten().tolist() == [0, count, 0]
    assert sent.tokens[1, 0, :count].tolist() == list(candidate.tokens) == predicted[1 : 1 + count]
    assert sent.alive[1, 0, :count].tolist() == pytest.approx(candidate.alive)
