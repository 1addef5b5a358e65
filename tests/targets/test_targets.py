"""Every family of targets that a CPU runs: text is plain decoding's whatever drafts, features are layers' outputs."""

from pathlib import Path

import pytest
import torch
from engine import Engine, engine
from families import FAMILIES, HuggingFace, tiny_family
from oracle_arm import ARM, OracleArm
from policy_checks import check_policies
from reference import Comparison
from tiny_models import tiny_dflash, tiny_eagle3
from traffic import mixed, play

POLICIES = ("ar", "diffusion", "lookup", "entropy", "auto", "none")


@pytest.mark.parametrize("name", FAMILIES)
def test_text_is_plain_decodings(name: str, tmp_path: Path) -> None:
    """Under random routing with an arm that is mostly right, so that blocks are accepted whole and in part; then
    under every policy. Prompts are chunked, and some share a prefix."""
    family, target = FAMILIES[name], tmp_path / "target"
    model = tiny_family(target, family)
    eagle3, dflash = tiny_eagle3(tmp_path / "eagle3", target), tiny_dflash(tmp_path / "dflash", target)
    arrivals = mixed(seed=5, count=8, shared=24, longest=50, stops=0.1, tokens=36)
    with engine(target) as e:
        expected = play(e, arrivals)
    oracle = OracleArm(0.95, seed=3)
    for a in arrivals:
        oracle.learn(a.prompt, expected[a.rid])
    flags = {"draft": dflash, "whiflash_eagle_draft": str(eagle3), "whiflash_router": "random"}
    options = {"max_running_requests": 4, "chunked_prefill_size": 32}
    comparison = Comparison(model)
    with engine(target, whiflash=flags, arms=[oracle], **options) as e:
        assert type(e.worker.target.model).__name__ == name
        if family.captured:
            check_features(e, model, family.tolerance)
        used = check_policies(e, comparison, arrivals, expected, POLICIES)
    print(comparison.summary())
    assert used - {None} == {"ar", "diffusion", "lookup", "none", ARM}
    assert max(oracle.accepted) == oracle.max_drafts, "no full block was accepted"
    assert oracle.rejected > 0, "nothing was rejected"


def check_features(e: Engine, model: HuggingFace, tolerance: float) -> None:
    """What drafters read of a prompt is what Hugging Face's layers put out."""
    prompt = list(range(60, 90))
    prefill, seen = e.worker.target.prefill, []

    def recorded(batch: object) -> object:
        found = prefill(batch)
        seen.append(found[1].clone())
        return found

    e.worker.target.prefill = recorded
    e.generate([prompt], max_new_tokens=1)
    del e.worker.target.prefill
    layers = sorted({layer for d in e.worker.drafters.values() for layer in d.captured_layers})
    torch.testing.assert_close(
        torch.cat(seen), model.features(prompt, layers), atol=tolerance, rtol=tolerance
    )
