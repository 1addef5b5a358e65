"""One drafter, or none: text is plain decoding's, and routing does with what is there."""

import random
from pathlib import Path
from typing import Any

import pytest
from engine import engine
from model_set import Models
from plain import compare, plain_texts
from traffic import mixed, play

from whiflash_sglang.checkpoints.fit import BundleParts, create
from whiflash_sglang.errors import ConfigError


@pytest.mark.parametrize("arm", ["ar", "diffusion", None])
def test_the_drafter_that_is_there_drafts(models: Models, tmp_path: Path, arm: str | None) -> None:
    flags: dict[str, Any] = {"whiflash_router": "random"}
    if arm is not None:
        eagle3, dflash = (str(models.eagle3), None) if arm == "ar" else (None, str(models.dflash))
        create(BundleParts(str(models.target), eagle3, dflash), tmp_path / "bundle")
        flags["draft"] = tmp_path / "bundle"
    arms = {arm, "lookup"} - {None}
    arrivals = mixed(seed=3, count=8, shared=40, aborts=0.1, stops=0.3)
    expected = plain_texts(models.target, arrivals)
    used: set[str | None] = set()
    with engine(models.target, whiflash=flags, chunked_prefill_size=32, max_running_requests=4) as e:
        found = play(e, arrivals, lambda: used.update(*(state.counts for state in e.states.values())))
        assert e.worker.snapshot()["arms"] == sorted(arms)
        assert e.scheduler.tree_cache.tree_core.is_eagle == (arm == "ar"), "only EAGLE-3 needs bigrams"
        for router in ("auto", *arms, "none"):
            e.worker.reconfigure({"router": router})
            prompt = random.Random(1).choices(range(256), k=20)
            assert e.generate([prompt], max_new_tokens=12) == e.generate([prompt], max_new_tokens=12)
        with pytest.raises(ConfigError, match=r"'entropy' needs EAGLE-3 and DFlash; the drafters here are: "):
            e.worker.reconfigure({"router": "entropy"})
    assert used - {None} == arms | {"none"}
    compare(models.reference.target, arrivals, expected, found)
