"""Proposals of the arms: no longer than pays, as long as they may, from the vocabulary that was asked for."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine import Engine, engine
from model_set import Models
from oracle_arm import ARM, OracleArm
from tiny_models import tiny_eagle3

from whiflash_sglang.prices.costs import Worth
from whiflash_sglang.routing.policies import Pinned

PROMPTS = [random.Random(seed).choices(range(256), k=30) for seed in range(4)]


def spy(e: Engine, arm: str, seen: list[Any]) -> None:
    """Record every `Drafts` of an arm with the batch that asked for it."""
    drafter = e.worker.drafters[arm]
    draft = drafter.draft

    def recorded(batch: Any) -> Any:
        drafts = draft(batch)
        seen.append((batch, drafts))
        return drafts

    drafter.draft = recorded


@pytest.mark.parametrize("arm", ["ar", "diffusion"])
def test_dear_tokens_make_short_drafts(models: Models, arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same texts, whatever a token must bring; and the drafts get shorter."""
    texts, widths = [], []
    with engine(models.target, whiflash=models.whiflash(arm)) as e:
        seen: list[Any] = []
        spy(e, arm, seen)
        for worth in map(Worth, (0.0, 1e-3, 3.0)):
            monkeypatch.setattr(e.worker.controller, "worth", lambda worth=worth: worth)
            seen.clear()
            texts.append(e.generate(PROMPTS, max_new_tokens=40))
            counts = [count for _, drafts in seen for count in drafts.counts.tolist()]
            widths.append(sum(counts) / len(counts))
        full = e.worker.drafters[arm].max_drafts
    assert texts[0] == texts[1] == texts[2]
    assert full >= widths[0] > widths[1] > widths[2] == 1.0


def test_an_arm_that_is_always_right_has_the_longest_rounds(models: Models) -> None:
    """Pinned to an arm that the worker has never heard of."""
    prompt, oracle = PROMPTS[0], OracleArm(1.0, ragged=False)
    with engine(models.target, whiflash=models.whiflash("none"), arms=[oracle]) as e:
        [text] = e.generate([prompt], max_new_tokens=41)
        oracle.learn(prompt, text)
        e.start_over("none")
        e.worker.controller.policy = Pinned(ARM)
        assert e.ask("only", prompt, max_new_tokens=41) == text
        # The first token comes from the prefill; each of the other 40 is one of 7 drafts or the token behind them.
        assert e.rounds("only") == (5, 35)
    assert oracle.accepted == [7] * 5


def test_a_block_from_the_reduced_vocabulary(models: Models, tmp_path: Path) -> None:
    """With the EAGLE-3 checkpoint's vocabulary DFlash proposes its best token among those ids only."""
    small = tiny_eagle3(tmp_path / "eagle3", models.target, draft_vocab_size=6)
    models = replace(models, eagle3=small)
    texts, seen = [], []
    for vocabulary in ("full", "eagle3"):
        with engine(models.target, whiflash=models.whiflash("diffusion", {"dflash_vocabulary": vocabulary})) as e:
            seen = []
            spy(e, "diffusion", seen)
            texts.append(e.generate(PROMPTS, max_new_tokens=40))
            allowed = set(e.worker.drafters["ar"].model.target_ids(e.worker.tokens.data.new_tensor(range(6))).tolist())
        drafted = {int(t) for _, d in seen for row, n in zip(d.tokens, d.counts, strict=True) for t in row[:n]}
        assert (drafted <= allowed) == (vocabulary == "eagle3")
    assert texts[0] == texts[1]
