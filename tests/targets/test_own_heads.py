"""Targets that bring their own next-token head draft with it: text, KV, and rounds as upstream's EAGLE has them."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from engine import Engine, engine
from families import LAYERS, HuggingFace
from matrix import sampled
from oracle_arm import OracleArm
from own_heads import HEADS, tiny_with_head
from parity import compare
from policy_checks import check_policies
from reference import Comparison
from tiny_models import tiny_dflash
from traffic import mixed, play

from whiflash_sglang.arms.chain import MTPArm
from whiflash_sglang.checkpoints.fit import BundleParts, create


@pytest.mark.parametrize(
    ("name", "block"),
    sampled([("mimo", False), ("glm", True)], ("glm", True)),
)
def test_text_is_plain_decodings(name: str, block: bool, tmp_path: Path) -> None:
    """Under random routing with an arm that is mostly right; then under every policy. SGLang captures no layers of
    MiMo, so there is no block drafter for it; a bundle with a block drafter alone gets GLM's head beside it."""
    target, draft = tmp_path / "target", tmp_path / "bundle"
    model = tiny_with_head(target, name)
    policies = ["ar", "lookup", "auto", "none"]
    if block:
        create(BundleParts(str(target), None, str(tiny_dflash(tmp_path / "dflash", target))), draft)
        policies += ["diffusion", "entropy"]
    arrivals = mixed(seed=5, count=8, shared=24, longest=50, stops=0.1, tokens=36)
    with engine(target) as e:
        expected = play(e, arrivals)
    oracle = OracleArm(0.95, seed=3)
    for a in arrivals:
        oracle.learn(a.prompt, expected[a.rid])
    flags = {"draft": draft if block else target, "whiflash_router": "random"}
    options = {"max_running_requests": 4, "chunked_prefill_size": 32}
    comparison = Comparison(model)
    with engine(target, whiflash=flags, arms=[oracle], **options) as e:
        assert isinstance(e.worker.drafters["ar"], MTPArm)
        assert ("diffusion" in e.worker.drafters) == block
        check_keys_values(e, model, range(60, 90))
        used = check_policies(e, comparison, arrivals, expected, policies)
    print(comparison.summary())
    assert used >= {"ar", "lookup", "none"}
    assert oracle.rejected > 0


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


@pytest.mark.parametrize("name", sampled(HEADS, "mimo"))
def test_rounds_accept_what_upstreams_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # SGLang's GLM-4.5 asks for it on a CPU, too
    tiny_with_head(tmp_path / "target", name)
    compare(tmp_path / "target", "ar", tmp_path / "target", speculative_algorithm="EAGLE")
