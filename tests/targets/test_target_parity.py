"""Each arm accepts in every round what upstream's algorithm accepts, for other targets than dense ones, too."""

from pathlib import Path

import pytest
from families import FAMILIES, tiny_family
from parity import compare
from tiny_models import tiny_dflash, tiny_eagle3


@pytest.mark.parametrize(
    ("name", "arm"),
    [
        ("Gemma4ForCausalLM", "ar"),  # from rows of the embedding as they are
        ("Gemma4ForCausalLM", "diffusion"),  # from the scaled embedding
        pytest.param("GptOssForCausalLM", "diffusion", marks=pytest.mark.evidence),
        pytest.param("Qwen3MoeForCausalLM", "ar", marks=pytest.mark.evidence),
        pytest.param("DeepseekV3ForCausalLM", "diffusion", marks=pytest.mark.evidence),
    ],
)
def test_accepted_tokens_per_round_of_a_family(name: str, arm: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    tiny_family(target, FAMILIES[name])
    make = tiny_eagle3 if arm == "ar" else tiny_dflash
    compare(target, arm, make(tmp_path / "drafter", target))
