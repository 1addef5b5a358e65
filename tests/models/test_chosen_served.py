"""Further formats in an engine: text is plain decoding's, and rounds propose what upstream's propose."""

from dataclasses import replace
from pathlib import Path

import pytest
from chosen_formats import FORMATS as BLOCKS
from engine import engine
from matrix import sampled
from model_set import Models
from oracle_arm import ARM, OracleArm
from plain import plain_texts
from published import write
from reference import Comparison
from test_eagle3_formats import PARALLEL as P_EAGLE
from test_eagle3_formats import parallel_tensors
from tiny_models import MASK_TOKEN
from traffic import mixed, play

from whiflash_sglang.errors import ConfigError
from whiflash_train.replay import PairParts

ARRIVALS = mixed(seed=9, count=8, shared=24, longest=50, stops=0.1, tokens=36)
NAMED = {"mask_token_id": MASK_TOKEN, "target_layer_ids": [1, 3, 4]}
"""As of the tiny target's DFlash drafter."""

SPELLED = {"Domino": "DFlashDraftModel"}
"""As SGLang knows a format, by its `projector_type`, where SpecForge's files name another class."""

PARALLEL = "P-EAGLE"
FORMATS = BLOCKS | {PARALLEL: (P_EAGLE, parallel_tensors)}


def drafter(path: Path, name: str) -> Path:
    """A checkpoint of the format for the tiny target."""
    config, tensors = FORMATS[name]
    changes = {
        "architectures": [SPELLED.get(name, config["architectures"][0])],
        "num_target_layers": 6,
        "max_position_embeddings": 2048,
        "dflash_config": config.get("dflash_config", {}) | NAMED,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": NAMED["target_layer_ids"]},
    }
    return write(path, {**config, **changes}, tensors())


@pytest.mark.parametrize("name", sampled(FORMATS, "DFlash2", "FlashMap", PARALLEL))
def test_text_is_plain_decodings(models: Models, tmp_path: Path, name: str) -> None:
    """Under random routing beside EAGLE-3 and an arm that is mostly right; then under the policies that draft with it.
    Prompts are chunked, and some share a prefix."""
    plain = plain_texts(models.target, ARRIVALS)
    oracle = OracleArm(0.95, seed=3).knowing(ARRIVALS, plain)
    arm, flag = ("ar", "whiflash_eagle_draft") if name == PARALLEL else ("diffusion", "draft")
    flags = {**models.whiflash("random"), flag: str(drafter(tmp_path / "drafter", name))}
    used: set[str | None] = set()
    comparison = Comparison(models.reference.target)
    options = {"max_running_requests": 4, "chunked_prefill_size": 32}
    with engine(models.target, whiflash=flags, arms=[oracle], **options) as e:
        made = e.worker.drafters[arm] if name == PARALLEL else e.worker.drafters[arm].model
        assert type(made).__name__ == {PARALLEL: "ParallelArm"}.get(name, f"{name}Drafter")
        for policy, arrivals in (("random", ARRIVALS), (arm, ARRIVALS[:3]), ("auto", ARRIVALS[:3])):
            e.worker.reconfigure({"router": policy})
            named = [replace(a, rid=f"{policy} {a.rid}") for a in arrivals]
            found = play(e, named, lambda: used.update(state.previous for state in e.states.values()))
            comparison.check_all(arrivals, plain, found, f"{policy} ")
    assert used - {None} == {"ar", "diffusion", "none", ARM}
    assert oracle.rejected > 0


@pytest.mark.parametrize("name", ["FlashMap", PARALLEL])
def test_a_drafter_that_is_not_replayed_is_named(tmp_path: Path, name: str) -> None:
    parts = PairParts({"any": drafter(tmp_path / "drafter", name)}, num_layers=12)
    with pytest.raises(ConfigError, match="drafter: FlashMap and P-EAGLE cannot be replayed"):
        _ = parts.captured
