"""Captured passes of drafters give what the same passes give eagerly, whatever they were captured with: of the pair, of
EAGLE-3 of several layers, and of a target's own head with experts. To capture is to read nothing on the host.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from histories import History, live, rounds
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from op_tape import TapeRecorder
from replay import CONTEXT, SLOTS, VOCAB, Arms, Replay, load_arms
from tiny_models import tiny_dflash, tiny_target
from whiflash_kernels.structs import PADDING

from whiflash_sglang.arms.block import DFlashArm
from whiflash_sglang.arms.chain import MTPArm
from whiflash_sglang.arms.length import CALIBRATION
from whiflash_sglang.arms.paged import PagedArm
from whiflash_sglang.checkpoints.fit import target_layers
from whiflash_sglang.device.capture import doubling, graded
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.formats import choice as choices
from whiflash_sglang.formats.mtp import MTPConfig, MTPDrafter, parse_glm
from whiflash_sglang.formats.table import read_draft
from whiflash_sglang.prices.costs import FULL_LENGTH
from whiflash_sglang.records.core import DraftBatch
from whiflash_train.origin import for_training
from whiflash_train.target import TargetModel

ARMS = ["ar", "diffusion"]
ROWS = 4
MOST = 4
"""Requests of the largest group; there are passes for one, two and four."""

LONGEST = CONTEXT - 20
groups = st.tuples(
    st.sampled_from(ARMS), st.lists(st.integers(1, LONGEST), min_size=1, max_size=MOST), st.integers(1, 5)
)
"""An arm, the lengths of its requests, and the most drafts that one of them may have."""


ROUTED = {
    "num_nextn_predict_layers": 1,
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
}
"""So few requests as two have the weights of their experts gathered; more read all of them."""


@pytest.fixture(autouse=True)
def prepared(arms: Arms) -> Iterator[None]:
    """Entries of every slot; without gradients, as the worker's rounds are."""
    generator = torch.Generator().manual_seed(3)
    for arm in arms.by_name.values():
        for pool in (arm.kv.k, arm.kv.v):
            pool.copy_(torch.randn(pool.shape, generator=generator))
    with torch.no_grad():
        yield


def requests(arm: PagedArm, lengths: Sequence[int], seed: int = 0) -> DraftBatch:
    """Requests of the first rows of a random slot table; row 0 and slot 0 are the padding's."""
    generator, count = torch.Generator().manual_seed(seed), len(lengths)
    slots = torch.randperm(SLOTS - 1, generator=generator)[: ROWS * CONTEXT] + 1
    rows = torch.arange(1, count + 1)
    return DraftBatch(
        rows,
        torch.tensor(lengths),
        torch.randint(VOCAB, (count,), generator=generator),
        torch.randn(count, arm.tail_width, generator=generator),
        torch.cat([torch.zeros(CONTEXT), slots]).view(ROWS + 1, CONTEXT).int(),
        max(lengths),
        caps=torch.full_like(rows, arm.max_drafts),
    )


class Captured:
    """Both arms with captured passes, over one slot table."""

    def __init__(self, arms: Arms) -> None:
        self.arms, self.table, self.recorder = (arms, requests(arms.by_name["ar"], [1]).slot_table, TapeRecorder())
        self.capture()

    def capture(self, most: int = MOST) -> None:
        inputs = DraftBatch.of_padding(most, torch.zeros(self.arms.width), self.table, CALIBRATION)
        for arm in self.arms.by_name.values():
            arm.capture(self.recorder, inputs)

    def group(self, name: str, lengths: Sequence[int], seed: int = 0) -> DraftBatch:
        return replace(requests(self.arms.by_name[name], lengths, seed), slot_table=self.table)

    def drafted(self, name: str, group: DraftBatch, most: int, *, eager: bool) -> list[torch.Tensor]:
        """Tokens and confidences, and the entries of every slot but the first, as they are afterwards."""
        arm = self.arms.by_name[name]
        passes, before = arm._captured, [pool.clone() for pool in (arm.kv.k, arm.kv.v)]
        for pool in (arm.kv.k, arm.kv.v):
            pool[:, 0] = torch.nan  # nobody's: padding writes there, and nobody may read it
        arm._captured = None if eager else passes
        replays = self.recorder.replays
        drafts = arm.draft(placed(arm, batch_of(arm, group, most)))
        assert drafts.alive is not None
        assert drafts.confidences is not None
        assert self.recorder.replays == replays + (not eager)
        parts = drafts.tokens, drafts.confidences, drafts.counts, drafts.alive
        found = [*(t.clone() for t in parts), arm.kv.k[:, 1:].clone(), arm.kv.v[:, 1:].clone()]
        arm._captured = passes
        for pool, old in zip((arm.kv.k, arm.kv.v), before, strict=True):
            pool.copy_(old)
        return found

    def check_history(self, seed: int, history: History, late: int) -> None:
        """Catch-ups of new requests, replayed, leave what one pass over their texts does."""
        with torch.no_grad():
            replay, recorder = Replay(self.arms, seed, late=late), TapeRecorder()
            replay.capture(recorder)
            live(replay, history)
            assert recorder.replays

    def compare(self, name: str, lengths: Sequence[int], most: int | None = None, seed: int = 0) -> None:
        """A replayed pass with an eager one."""
        group, captured = self.group(name, lengths, seed), self.arms.by_name[name].lengths
        most = min(most or captured[-1], captured[-1])
        replayed = self.drafted(name, group, most, eager=False)
        # A captured chain runs to its end, whatever is wanted of it: the shortest that is long enough.
        eager = self.drafted(name, group, min(n for n in captured if n >= most), eager=True)
        assert replayed[0].shape == (len(lengths), most)
        assert torch.equal(replayed[0], eager[0][:, :most])
        torch.testing.assert_close(replayed[1], eager[1][:, :most])
        assert torch.equal(replayed[2], eager[2].clamp(max=most))
        torch.testing.assert_close(replayed[3], eager[3][:, :most])
        torch.testing.assert_close(replayed[4:], eager[4:])


def placed(arm: PagedArm, batch: DraftBatch) -> DraftBatch:
    """The batch where a captured pass reads it, if one does."""
    place, size = arm.place(len(batch)), len(batch)
    if place is None:
        return batch
    parts = batch.rows, batch.starts, batch.bonus, batch.caps, batch.tail
    for target, values, padding in zip(place[:-1], parts, (0, PADDING, 0, 0, 0), strict=True):
        target[:size], target[size:] = values, padding
    place.calibration.copy_(batch.calibration)
    return replace(batch, rows=place.request_slots[:size])


def batch_of(arm: PagedArm, group: DraftBatch, most: int) -> DraftBatch:
    rows = group.rows.tolist()
    limits = [most, *[1] * (len(rows) - 1)]
    calibration = torch.tensor(arm.calibration(rows, FULL_LENGTH))
    return replace(group, caps=torch.tensor(limits), limits=limits, row_ids=rows, calibration=calibration)


@pytest.fixture(scope="module", params=["pair", "layers", "own head"])
def arms(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Arms:
    root = tmp_path_factory.mktemp("arms")
    if request.param == "own head":
        return own_head(root)
    return load_arms(root, eagle3_layers=3 if request.param == "layers" else 1)


def own_head(root: Path) -> Arms:
    """A random head beside a block drafter, which reads three layers of the same capture."""
    target = TargetModel(tiny_target(root / "target"), device=torch.device("cpu"), dtype=torch.float32)
    config = parse_glm(root / "target", target.config | ROUTED)
    head = random_head(config, target)
    block = read_draft(tiny_dflash(root / "dflash", root / "target"))
    own, layers = config.layers_of(target.num_layers), target_layers(block, target.num_layers)
    union = (*sorted(layers), *own)
    by_name: dict[str, PagedArm] = {
        "ar": MTPArm(head.requires_grad_(False), union, own, 5, 1024),
        "diffusion": DFlashArm(block.load(**for_training(target)).requires_grad_(False), union, layers, 8, 1024),
    }
    for arm in by_name.values():
        arm.allocate(SLOTS)
    return Arms(by_name, len(union) * target.hidden_size)


def random_head(config: MTPConfig, target: TargetModel) -> MTPDrafter:
    """Norms are left as they are."""
    head: Any = MTPDrafter(config, target.embedding, target.head)
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * config.hidden_size**-0.5)
    head.mlp.gate = torch.randn(ROUTED["n_routed_experts"], config.hidden_size, generator=generator)
    head.mlp.bias = torch.randn(ROUTED["n_routed_experts"], generator=generator) * 0.1
    found: MTPDrafter = head
    return found


@pytest.fixture
def captured(arms: Arms, prepared: None) -> Iterator[Captured]:
    yield Captured(arms)
    for arm in arms.by_name.values():
        arm._captured = None


@settings(deadline=None, max_examples=12, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(groups, min_size=1, max_size=6))
def test_any_groups_one_after_the_other(captured: Captured, played: Any) -> None:
    """Groups have any sizes, padded and not, and both arms take turns over the same inputs."""
    with torch.no_grad():
        for seed, (name, lengths, most) in enumerate(played):
            captured.compare(name, lengths, most, seed)


def test_a_group_that_nothing_was_captured_for_runs_as_it_is_written(captured: Captured) -> None:
    captured.capture(most=2)
    arm, batch = (
        captured.arms.by_name["ar"],
        batch_of(captured.arms.by_name["ar"], captured.group("ar", [9, 8, 7]), 3),
    )
    assert not arm.captured_for(batch)
    assert arm.draft(batch).tokens.shape == (3, 3)
    assert captured.recorder.replays == 0


def test_sizes() -> None:
    assert doubling(1, 1) == [1]
    assert doubling(1, 48) == [1, 2, 4, 8, 16, 32, 48]
    assert graded(1) == [1]
    assert graded(48) == [1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48]
    assert doubling(4, 3) == [3]


@settings(
    deadline=None,
    max_examples=8,
    derandomize=True,
    phases=[Phase.generate],  # a smaller failure is not worth minutes of replays
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(0, 2**16), st.lists(rounds, min_size=1, max_size=8), st.sampled_from([0, 5]))
def test_any_history_of_replayed_passes_equals_one_pass(
    captured: Captured, seed: int, history: History, late: int
) -> None:
    """As in `tests/cache/test_backlog.py`: whatever requests do, catch-ups leave the KV of one full pass."""
    captured.check_history(seed, history, late)


def test_a_pass_that_reads_the_device_is_no_pass_to_capture(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start ends with a sentence that says what cannot be captured, and what to turn off."""
    choose = choices.choose

    def reading(*args: Any) -> Any:
        choice = choose(*args)
        assert float(choice.confidence[0]) > -1
        return choice

    monkeypatch.setattr(choices, "choose", reading)
    with pytest.raises(ConfigError, match=r"pass of 'ar'.* size of 4.*--disable-cuda-graph.* Python's"):
        captured.capture()
