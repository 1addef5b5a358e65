"""The table of targets names what SGLang can capture, and what the tests beside it show."""

import ast
import re
from pathlib import Path

import pytest
import sglang
import torch
from families import FAMILIES
from loaded_scripts import load_script

from whiflash_sglang.engine.forward.captured import Captured, may_capture
from whiflash_sglang.engine.launch.refusals import IMAGES
from whiflash_sglang.errors import CheckpointError

TABLE = load_script("target_families")

NO_TARGETS = {"EmbeddingGemmaModel", "Lfm2BidirectionalModel", "MindSporeForCausalLM"}
"""Classes that no server decodes with, and another framework's."""
DRAFTS = re.compile("Assistant|Eagle3?$|MTP$|NextN$")
"""Names of classes that draft."""


def capturing() -> set[str]:
    """Entry classes of SGLang's models that have a capture setter or inherit one, from their sources."""
    entries: set[str] = set()
    for file in (Path(sglang.__file__).parent / "srt" / "models").glob("*.py"):
        _, assignment, named = file.read_text(encoding="utf-8").partition("\nEntryClass = ")
        if assignment:
            value = ast.parse(named).body[0]
            entries |= {name.id for name in ast.walk(value) if isinstance(name, ast.Name)}
    return {name for name in entries if may_capture(name) and not DRAFTS.search(name)}


def test_every_class_that_can_be_captured_is_in_the_table_once() -> None:
    listed = [name for family in TABLE.FAMILIES for name in family.architectures]
    assert len(set(listed)) == len(listed)
    assert set(listed) == capturing() - NO_TARGETS


def test_what_is_served_with_images_is_tested_with_them() -> None:
    with_images = [family.architectures for family in TABLE.FAMILIES if family.note == "text and images"]
    assert {name for names in with_images for name in names} == set(IMAGES)


def test_what_is_said_to_be_shown_is_tested() -> None:
    shown = {name for family in TABLE.FAMILIES if family.shown == TABLE.Shown.CPU for name in family.architectures}
    assert shown == {*FAMILIES, "LlamaForCausalLM"}


def test_a_target_without_capture_is_named() -> None:
    with pytest.raises(CheckpointError, match="Linear has no hidden-state capture in SGLang"):
        Captured(torch.nn.Linear(1, 1), 2, [1], keeps_final=False)
