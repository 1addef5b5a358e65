"""Each arm accepts in every round what upstream's algorithm accepts: of other targets than dense ones, and of targets
with a head of their own. Formats of drafts: `tests/models`.
"""

from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_family
from matrix import sampled
from own_heads import HEADS, tiny_with_head
from parity import compare
from tiny_models import tiny_dflash, tiny_eagle3


@pytest.mark.parametrize(
    ("name", "arm"),
    sampled(
        [
            ("Gemma4ForCausalLM", "ar"),  # from rows of the embedding as they are
            ("Gemma4ForCausalLM", "diffusion"),  # from the scaled embedding
            ("GptOssForCausalLM", "diffusion"),
            ("Qwen3MoeForCausalLM", "ar"),
            ("DeepseekV3ForCausalLM", "diffusion"),
        ],
        ("Gemma4ForCausalLM", "ar"),
        ("Gemma4ForCausalLM", "diffusion"),
    ),
)
def test_a_family(name: str, arm: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    tiny_family(target, FAMILIES[name])
    make = tiny_eagle3 if arm == "ar" else tiny_dflash
    compare(target, arm, make(tmp_path / "drafter", target))


@pytest.mark.parametrize("name", sampled(HEADS, "mimo"))
def test_a_head_of_the_targets_own(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # SGLang's GLM-4.5 asks for it on a CPU, too
    tiny_with_head(tmp_path / "target", name)
    compare(tmp_path / "target", "ar", tmp_path / "target", speculative_algorithm="EAGLE")
