"""The table of targets names what SGLang can capture, and what the tests beside it show."""

import ast
from pathlib import Path

import sglang
from families import FAMILIES

from whiflash_sglang.checkpoints import targets
from whiflash_sglang.checkpoints.targets import Shown

SETTERS = {"set_dflash_layers_to_capture", "set_eagle3_layers_to_capture"}


NO_TARGETS = {
    "EmbeddingGemmaModel",
    "GlmMoeDsaForCausalLMNextN",
    "InklingForConditionalGenerationMTP",
    "Lfm2BidirectionalModel",
    "MindSporeForCausalLM",
    "NanbeigeForSequenceClassification",
}
"""Entry classes beside them that no server decodes with, and another framework's."""


def capturing() -> set[str]:
    """Entry classes of the modules of SGLang that define a capture setter, from their sources."""
    found: set[str] = set()
    for file in (Path(sglang.__file__).parent / "srt" / "models").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        if not any(f"def {setter}" in text for setter in SETTERS):
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "EntryClass":
                found |= {name.id for name in ast.walk(node.value) if isinstance(name, ast.Name)}
    return found


def test_every_class_that_can_be_captured_is_in_the_table_once() -> None:
    listed = [name for family in targets.FAMILIES for name in family.architectures]
    assert len(set(listed)) == len(listed)
    assert set(listed) == capturing() - NO_TARGETS


def test_what_is_said_to_be_shown_is_tested() -> None:
    shown = {
        name for family in targets.FAMILIES if family.shown == Shown.CPU for name in family.architectures
    }
    assert shown == {*FAMILIES, "LlamaForCausalLM"}
