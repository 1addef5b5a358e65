"""Pinned to one arm, WHIFLASH accepts in every round what upstream's own algorithm accepts with that checkpoint."""

import pytest
from model_set import Models
from parity import UPSTREAM, compare


@pytest.mark.parametrize("arm", UPSTREAM)
def test_accepted_tokens_per_round(models: Models, arm: str) -> None:
    compare(models.target, arm, models.eagle3 if arm == "ar" else models.dflash)
