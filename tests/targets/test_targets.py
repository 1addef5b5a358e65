"""Every family of targets that a CPU runs: text is plain decoding's whatever drafts, features are layers' outputs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Engine, engine
from families import FAMILIES, Family, HuggingFace, tiny_family
from matrix import chosen, sampled
from oracle_arm import ARM, OracleArm
from overlap import overlapped
from policy_checks import check_policies
from reference import Comparison
from tiny_models import tiny_dflash, tiny_eagle3
from traffic import Arrival, mixed, play

from whiflash_sglang.arms.base import with_kv

SAMPLE = (
    "DeepseekV3ForCausalLM",  # latent attention, experts
    "Gemma3ForCausalLM",  # windows
    "GptOssForCausalLM",  # windows with sinks
    "Qwen2_5_VLForConditionalGeneration",  # positions in three dimensions
    "Qwen3NextForCausalLM",  # recurrent layers
)
POLICIES = ("ar", "diffusion", "lookup", "entropy", "auto", "none")


@dataclass(frozen=True)
class Served:
    """An engine that routes at random, with an arm that is mostly right, so that blocks are accepted whole and in part.

    Prompts are chunked, and some share a prefix. expected: plain decoding's tokens of each.
    """

    family: Family
    model: HuggingFace
    engine: Engine
    oracle: OracleArm
    arrivals: Sequence[Arrival]
    expected: Mapping[str, list[int]]


@pytest.fixture(autouse=True)
def whole_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions' inputs are kept in fp32 between forwards, like KV: rounded they would depend on how prompts were
    chunked."""
    monkeypatch.setenv("SGLANG_MAMBA_CONV_DTYPE", "float32")


@contextmanager
def serving(name: str, root: Path, *, drafters: bool = True) -> Iterator[Served]:
    family, target = FAMILIES[name], root / "target"
    model = tiny_family(target, family)
    flags: dict[str, Any] = {"whiflash_router": "random"}
    if drafters:
        flags["draft"] = tiny_dflash(root / "dflash", target)
        flags["whiflash_eagle_draft"] = str(tiny_eagle3(root / "eagle3", target))
    arrivals = mixed(seed=5, count=8, shared=24, longest=50, stops=0.1, tokens=36)
    with engine(target) as e:
        expected = play(e, arrivals)
    oracle = OracleArm(0.95, seed=3)
    for a in arrivals:
        oracle.learn(a.prompt, expected[a.rid])
    options = {"max_running_requests": 4, "chunked_prefill_size": 32}
    with engine(target, whiflash=flags, arms=[oracle], **options) as e:
        assert type(e.worker.target.model).__name__ == name
        yield Served(family, model, e, oracle, arrivals, expected)


@pytest.mark.parametrize("name", sampled(FAMILIES, *SAMPLE))
def test_text_is_plain_decodings(name: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Under random routing, then under every policy."""
    policies = chosen(pytestconfig, POLICIES, "auto")
    with serving(name, tmp_path) as s:
        if s.family.captured:
            check_features(s.engine, s.model, s.family.tolerance)
        comparison = Comparison(s.model)
        used = check_policies(s.engine, comparison, s.arrivals, s.expected, policies)
    print(comparison.summary())
    assert used - {None} == {"ar", "diffusion", "lookup", "none", ARM}
    assert max(s.oracle.accepted) == s.oracle.max_drafts, "no full block was accepted"
    assert s.oracle.rejected > 0, "nothing was rejected"


@pytest.mark.parametrize("name", sampled(FAMILIES, "Qwen3NextForCausalLM"))
def test_without_a_drafter(name: str, tmp_path: Path) -> None:
    with serving(name, tmp_path, drafters=False) as s:
        comparison = Comparison(s.model)
        used = check_policies(s.engine, comparison, s.arrivals, s.expected, ("lookup", "auto", "none"))
        s.engine.check_leaks()
    print(comparison.summary())
    assert used - {None} == {"lookup", "none", ARM}
    assert s.oracle.rejected > 0, "nothing was rejected"


def check_features(e: Engine, model: HuggingFace, tolerance: float) -> None:
    """Features of a prompt that drafters read are the outputs of Hugging Face's layers."""
    prompt = list(range(60, 90))
    prefill, seen = e.worker.target.prefill, []

    def recorded(batch: object) -> object:
        found = prefill(batch)
        seen.append(found[1].clone())
        return found

    e.worker.target.prefill = recorded
    e.generate([prompt], max_new_tokens=1)
    del e.worker.target.prefill
    layers = sorted({layer for d in with_kv(e.worker.drafters).values() for layer in d.captured_layers})
    torch.testing.assert_close(
        torch.cat(seen), model.features(prompt, layers), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("loop", sampled(["chains", "overlap"], "overlap"))
def test_routed_experts_are_plain_decodings(loop: str, tmp_path: Path) -> None:
    """In small chunks, so that a verification has more rows than any prefill."""
    target, start = tmp_path / "target", overlapped if loop == "overlap" else engine
    tiny_family(target, FAMILIES["Qwen3MoeForCausalLM"])
    eagle3, dflash = tiny_eagle3(tmp_path / "eagle3", target), tiny_dflash(tmp_path / "dflash", target)
    options = {"max_running_requests": 4, "chunked_prefill_size": 16, "enable_return_routed_experts": True}
    arrivals = [
        replace(a, params={**a.params, "return_routed_experts": True})
        for a in mixed(seed=5, count=8, shared=24, longest=50, stops=0.1, tokens=36)
    ]
    with engine(target, **options) as e:
        expected = play(e, arrivals)
        wanted = {rid: e.requests[rid].routed_experts for rid in expected}
    flags = {"draft": dflash, "whiflash_eagle_draft": str(eagle3), "whiflash_router": "random"}
    oracle = OracleArm(0.9, seed=3)
    for a in arrivals:
        oracle.learn(a.prompt, expected[a.rid])
    with start(target, whiflash=flags, arms=[oracle], **options) as e:
        assert play(e, arrivals) == expected
        for rid, experts in wanted.items():
            found = e.requests[rid].routed_experts
            assert found.shape == experts.shape, rid
            assert torch.equal(found.sort(-1).values, experts.sort(-1).values), rid
