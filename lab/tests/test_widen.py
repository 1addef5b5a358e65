"""A widened pair answers as the small one does, in as many rounds, and with as many accepted drafts."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from engine import Engine, engine
from safetensors.torch import load_file
from tiny_models import tiny_bundle, tiny_target

from whiflash_lab.widen import Shape, widen_pair

SHAPE = Shape(copies=6, heads=12, kv_heads=4, intermediate=161, layers=7, block_layers=3)
"""A copy without a partner, query heads without one, further KV heads, an odd neuron, a further layer of each model."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the small pair and of the wide one, each with `target` and `bundle`."""
    small, wide = tmp_path_factory.mktemp("small"), tmp_path_factory.mktemp("wide")
    tiny_bundle(small / "bundle", tiny_target(small / "target"))
    widen_pair(small / "target", small / "bundle", wide, SHAPE)
    return small, wide


def answers(e: Engine, router: str) -> list[tuple[list[int], tuple[int, int]]]:
    """Tokens, rounds and accepted drafts of each prompt under a policy."""
    e.start_over(router)
    found = []
    for number, prompt in enumerate(([70, 71, 72, 73] * 5, list(range(30, 60)), [68] * 12)):
        name = f"{router}{number}"
        found.append((e.ask(name, prompt, max_new_tokens=100), e.rounds(name)))
    return found


def test_tokens_rounds_and_accepted_drafts_are_the_small_pairs(pairs: Sequence[Path]) -> None:
    found: list[Mapping[str, list[tuple[list[int], tuple[int, int]]]]] = []
    for pair in pairs:
        flags = {"draft": pair / "bundle", "whiflash_lookup": "off", "whiflash_structure": "off"}
        with engine(pair / "target", whiflash=flags) as e:
            assert e.worker.target.shape.hidden_size == 64 * (1 if pair == pairs[0] else SHAPE.copies)
            found.append({router: answers(e, router) for router in ("none", "ar", "diffusion")})
    small, wide = found
    assert small == wide
    accepted = {router: sum(drafts for _, (_, drafts) in small[router]) for router in ("ar", "diffusion")}
    assert min(accepted.values()) > 3, accepted


def test_products_are_computed_on_numbers(pairs: Sequence[Path]) -> None:
    """Zeros would be multiplied faster: only what has no partner has them."""
    tensors = {k: t for f in (pairs[1] / "target").glob("*.safetensors") for k, t in load_file(f).items()}
    last = max(name for name in tensors if "q_proj" in name)
    assert last == f"model.layers.{SHAPE.layers - 1}.self_attn.q_proj.weight"
    for name in (name for name in tensors if re.search(r"(proj|head)\.weight", name)):
        assert float((tensors[name] == 0).float().mean()) < 0.4, name
