"""EAGLE-3 of several layers, and a target's own head with experts: passes and catch-ups read nothing on the host and
replay as they run, padded too; whole rounds of the former leave the KV of one pass.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from histories import History, rounds
from host_reads import HostReads
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from matrix import sampled
from model_set import Models, build_models
from plain import compare, plain_texts
from replay import SLOTS, Arms, load_arms
from test_draft_graphs import LONGEST, MOST, Captured, captured
from test_lag_and_graphs import ARRIVALS, SMALL, serving
from test_passes import prepared, requests
from tiny_models import tiny_dflash, tiny_target
from traffic import play
from trees import assert_tree_is_true

from whiflash_sglang.arms.block import DFlashArm
from whiflash_sglang.arms.chain import MTPArm
from whiflash_sglang.arms.paged import PagedArm
from whiflash_sglang.cache.backlog import FeatureRows
from whiflash_sglang.checkpoints.fit import target_layers
from whiflash_sglang.formats.mtp import MTPConfig, MTPDrafter, parse_glm
from whiflash_sglang.formats.table import read_draft
from whiflash_train.target import TargetModel

__all__ = ["captured", "prepared"]

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


@pytest.fixture(scope="module", params=["layers", "own head"])
def arms(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Arms:
    root = tmp_path_factory.mktemp("arms")
    return load_arms(root, eagle3_layers=3) if request.param == "layers" else own_head(root)


def own_head(root: Path) -> Arms:
    """A random head beside a block drafter, which reads three layers of the same capture."""
    target = TargetModel(tiny_target(root / "target"), device=torch.device("cpu"), dtype=torch.float32)
    config = parse_glm(root / "target", target.config | ROUTED)
    head = random_head(config, target)
    block = read_draft(tiny_dflash(root / "dflash", root / "target"))
    own, layers = config.layers_of(target.num_layers), target_layers(block, target.num_layers)
    union = (*sorted(layers), *own)
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    options |= {"target_embedding": target.embedding, "target_lm_head": target.head}
    by_name: dict[str, PagedArm] = {
        "ar": MTPArm(head.requires_grad_(False), union, own, 5, 1024),
        "diffusion": DFlashArm(block.load(**options).requires_grad_(False), union, layers, 8, 1024),
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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return build_models(tmp_path_factory.mktemp("models"), eagle3_layers=2)


@pytest.mark.parametrize("lengths", [[20], [20, 7, 90]], ids=["gathered", "all experts"])
def test_nothing_is_read_and_nothing_uploaded(arms: Arms, lengths: list[int]) -> None:
    arm = arms.by_name["ar"]
    given, count = requests(arm, lengths), 12
    positions, owners = torch.arange(count), torch.arange(count) % len(lengths) + 1
    features = torch.randn(count, arms.width)
    slots = given.slot_table[owners, positions].long()
    slots[-2:] = -1
    following = torch.zeros(count, dtype=torch.int64)
    rows = FeatureRows(features, positions, slots, following, owners, given.slot_table)
    with HostReads() as seen:
        arm.whole(given, arm.max_drafts)
        arm.catch_up(rows.of(arm.features))
    assert (seen.reads, seen.uploads) == ({}, {})


@settings(
    deadline=None,
    max_examples=8,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.integers(1, LONGEST), min_size=1, max_size=MOST), st.integers(1, 5))
def test_any_group(captured: Captured, lengths: list[int], most: int) -> None:
    with torch.no_grad():
        captured.compare("ar", lengths, most)


@settings(
    deadline=None,
    max_examples=8,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(0, 2**16), st.lists(rounds, min_size=1, max_size=6), st.sampled_from([0, 5]))
def test_any_history_equals_one_pass(captured: Captured, seed: int, history: History, late: int) -> None:
    """Catch-ups replayed, padded too: a padding row sees nothing and writes to slot 0."""
    captured.check_history(seed, history, late)


@pytest.mark.parametrize("lag", sampled([0, 1], 0))
def test_replayed_rounds_leave_the_kv_of_one_pass(
    models: Models, monkeypatch: pytest.MonkeyPatch, lag: int
) -> None:
    """All arms at random, results at once or a round late, where catch-ups are padded."""
    plain = plain_texts(models.target, ARRIVALS, **SMALL)
    with serving(models, lag, True, monkeypatch) as (e, oracle, _):
        for arrival in ARRIVALS:
            oracle.learn(arrival.prompt, plain[arrival.rid])
        compare(models.reference.target, ARRIVALS, plain, play(e, ARRIVALS))
        e.generate([list(ARRIVALS[0].prompt)], max_new_tokens=12, temperature=1.0)
        assert assert_tree_is_true(e, models) > 50
        assert not lag or not e.streams.races
