"""Every family of targets that a CPU runs: text is plain decoding's whatever drafts, features are layers' outputs. Some
bring a next-token head of their own, whose KV is that of one pass.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Engine, engine
from families import FAMILIES, LAYERS, HuggingFace, tiny_family
from matrix import chosen, sampled
from oracle_arm import ARM, OracleArm
from overlap import overlapped
from own_heads import tiny_with_head
from reference import Comparison
from tiny_models import tiny_dflash, tiny_pair
from traffic import Arrival, mixed, play

from whiflash_sglang.arms.base import with_kv
from whiflash_sglang.arms.chain import MTPArm
from whiflash_train.bundle import BundleParts, create

SAMPLE = (
    "DeepseekV3ForCausalLM",  # latent attention, experts
    "GptOssForCausalLM",  # windows with sinks
)
"""Positions in three dimensions are in `test_images.py`, recurrent layers in `test_recurrent_trees.py`."""
POLICIES = ("ar", "diffusion", "lookup", "entropy", "auto", "none")


@dataclass(frozen=True)
class Served:
    """An engine that routes at random, with an arm that is mostly right, so that blocks are accepted whole and in part.

    Prompts are chunked, and some share a prefix. expected: plain decoding's tokens of each.
    """

    model: HuggingFace
    engine: Engine
    oracle: OracleArm
    arrivals: Sequence[Arrival]
    expected: Mapping[str, list[int]]


@contextmanager
def serving(root: Path, model: HuggingFace, flags: dict[str, Any]) -> Iterator[Served]:
    """The target in `root / "target"`. flags: its drafters."""
    target, arrivals = root / "target", mixed(seed=5, count=8, shared=24, longest=50, stops=0.1, tokens=36)
    with engine(target) as e:
        expected = play(e, arrivals)
    oracle = OracleArm(0.95, seed=3).knowing(arrivals, expected)
    options = {"max_running_requests": 4, "chunked_prefill_size": 32}
    with engine(target, whiflash={**flags, "whiflash_router": "random"}, arms=[oracle], **options) as e:
        yield Served(model, e, oracle, arrivals, expected)


def check_policies(s: Served, *policies: str) -> set[str | None]:
    """Text is plain decoding's under random routing for all requests, then under each policy for the first two.

    Returns the arms that drafted.
    """
    used, comparison = set[str | None](), Comparison(s.model)
    for policy in ("random", *policies):
        s.engine.worker.reconfigure({"router": policy})
        chosen = s.arrivals if policy == "random" else s.arrivals[:2]
        found = play(
            s.engine,
            [replace(a, rid=f"{policy} {a.rid}") for a in chosen],
            lambda: used.update(*(state.counts for state in s.engine.states.values())),
        )
        comparison.check_all(chosen, s.expected, found, f"{policy} ")
    assert s.oracle.rejected > 0, "nothing was rejected"
    return used - {None}


@pytest.mark.parametrize("name", sampled(FAMILIES, *SAMPLE))
def test_text_is_plain_decodings(name: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Under random routing, then under every policy."""
    family = FAMILIES[name]
    model = tiny_family(tmp_path / "target", family)
    with serving(tmp_path, model, tiny_pair(tmp_path, tmp_path / "target")) as s:
        assert type(s.engine.worker.target.model).__name__ == name
        if family.captured:
            check_features(s.engine, model, family.tolerance)
        used = check_policies(s, *chosen(pytestconfig, POLICIES, "auto"))
    assert used == {"ar", "diffusion", "lookup", "none", ARM}
    assert max(s.oracle.accepted) == s.oracle.max_drafts, "no full block was accepted"


@pytest.mark.parametrize("name", sampled(FAMILIES))
def test_without_a_drafter(name: str, tmp_path: Path) -> None:
    with serving(tmp_path, tiny_family(tmp_path / "target", FAMILIES[name]), {}) as s:
        assert check_policies(s, "lookup", "auto", "none") == {"lookup", "none", ARM}
        s.engine.check_leaks()


@pytest.mark.parametrize(("name", "block"), sampled([("mimo", False), ("glm", True)], ("glm", True)))
def test_a_head_of_the_targets_own(name: str, block: bool, tmp_path: Path) -> None:
    """SGLang captures no layers of MiMo, so there is no block drafter for it; a bundle with a block drafter alone gets
    GLM's head beside it."""
    target, draft = tmp_path / "target", tmp_path / "bundle"
    model, policies = tiny_with_head(target, name), ["ar", "lookup", "auto", "none"]
    if block:
        create(BundleParts(str(target), None, str(tiny_dflash(tmp_path / "dflash", target))), draft)
        policies += ["diffusion", "entropy"]
    with serving(tmp_path, model, {"draft": draft if block else target}) as s:
        assert isinstance(s.engine.worker.drafters["ar"], MTPArm)
        assert ("diffusion" in s.engine.worker.drafters) == block
        check_keys_values(s.engine, model, range(60, 90))
        assert check_policies(s, *policies) >= {"ar", "lookup", "none"}


def check_keys_values(e: Engine, model: HuggingFace, prompt: Sequence[int]) -> None:
    """After rounds of any arm the head's KV is that of one pass over what Hugging Face's target puts out behind its
    final norm, as far as it has caught up."""
    arm, worker = e.worker.drafters["ar"], e.worker
    e.submit("kv", list(prompt), max_new_tokens=60)
    req, caught_up = e.requests["kv"], 0
    while len(req.output_ids) < 50:
        e.step()
        known = [*prompt, *req.output_ids]
        row = req.kv.req_pool_idx
        synced = worker.sync.watermarks.synced(row, "ar")
        if synced <= max(caught_up, len(prompt)):
            continue
        caught_up = synced
        with torch.inference_mode():
            ids = torch.tensor([known[:synced]])
            states = model.model.model(ids, use_cache=False).last_hidden_state[0]
            following, positions = torch.tensor(known[1 : synced + 1]), torch.arange(synced)
            keys, values = arm.model.keys_values(following, states, positions)
        slots = worker.target.slot_table[row, :synced].long()
        torch.testing.assert_close(arm.kv.k[0][slots], keys, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(arm.kv.v[0][slots], values, atol=1e-3, rtol=1e-3)
    e.run()
    assert caught_up > len(prompt) + 10, "it was hardly ever used"
    assert worker.drafters["ar"].captured_layers == (LAYERS,)


def check_features(e: Engine, model: HuggingFace, tolerance: float) -> None:
    """Features of a prompt that drafters read are the outputs of Hugging Face's layers."""
    prompt = list(range(60, 90))
    layers = sorted({layer for d in with_kv(e.worker.drafters).values() for layer in d.captured_layers})
    torch.testing.assert_close(e.features(prompt), model.features(prompt, layers), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("loop", sampled(["chains", "overlap"], "overlap"))
def test_routed_experts_are_plain_decodings(loop: str, tmp_path: Path) -> None:
    """In small chunks, so that a verification has more rows than any prefill."""
    target, start = tmp_path / "target", overlapped if loop == "overlap" else engine
    tiny_family(target, FAMILIES["Qwen3MoeForCausalLM"])
    options = {"max_running_requests": 4, "chunked_prefill_size": 16, "enable_return_routed_experts": True}
    arrivals = [
        replace(a, params={**a.params, "return_routed_experts": True})
        for a in mixed(seed=5, count=8, shared=24, longest=50, stops=0.1, tokens=36)
    ]
    with engine(target, **options) as e:
        expected = play(e, arrivals)
        wanted = {rid: e.requests[rid].routed_experts for rid in expected}
    flags = {**tiny_pair(tmp_path, target), "whiflash_router": "random"}
    oracle = OracleArm(0.9, seed=3).knowing(arrivals, expected)
    with start(target, whiflash=flags, arms=[oracle], **options) as e:
        assert play(e, arrivals) == expected
        for rid, experts in wanted.items():
            found = e.requests[rid].routed_experts
            assert found.shape == experts.shape, rid
            assert torch.equal(found.sort(-1).values, experts.sort(-1).values), rid
