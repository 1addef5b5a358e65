"""Passes of a target's own head read nothing on the host, replay as they run, and keep its KV: with experts, padded."""

from typing import Any

import pytest
import torch
from histories import History, rounds
from host_reads import HostReads
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from replay import SLOTS, Arms
from test_draft_graphs import LONGEST, MOST, Captured, captured
from test_passes import prepared, requests
from tiny_models import tiny_dflash, tiny_target

from whiflash_sglang.checkpoints.fit import target_layers
from whiflash_sglang.drafters.chain import MTPArm
from whiflash_sglang.drafters.dflash import DFlashArm
from whiflash_sglang.drafters.paged import PagedArm
from whiflash_sglang.models.formats import read_draft
from whiflash_sglang.models.mtp import MTPConfig, MTPDrafter, parse_glm
from whiflash_sglang.models.target import TargetModel

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


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Arms:
    """A random head beside a block drafter, which reads three layers of the same capture."""
    root = tmp_path_factory.mktemp("own")
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


@pytest.mark.parametrize("lengths", [[20], [20, 7, 90]], ids=["gathered", "all experts"])
def test_nothing_is_read_and_nothing_uploaded(arms: Arms, lengths: list[int]) -> None:
    arm = arms.by_name["ar"]
    given = requests(arm, lengths)
    with HostReads() as seen:
        arm.whole(given, arm.max_drafts)
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
    max_examples=6,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(0, 2**16), st.lists(rounds, min_size=1, max_size=6), st.sampled_from([0, 5]))
def test_any_history_equals_one_pass(captured: Captured, seed: int, history: History, late: int) -> None:
    """Catch-ups replayed, padded too: slot 0 takes what is padding."""
    captured.check_history(seed, history, late)
