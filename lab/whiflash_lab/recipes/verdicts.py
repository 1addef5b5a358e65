"""Judges all launches of a file."""

from pathlib import Path
from typing import Any

from whiflash_lab.recipes.files import read


def verdicts_in(path: Path, model_path: str | None) -> list[tuple[str, Any]]:
    """Return (name, verdict) of each launch in the file. model_path: the target, if a launch names none."""
    from whiflash_sglang.checkpoints.hub import look_up

    recipes, target = read(path), None if model_path is None else look_up(model_path).config.parent
    from whiflash_lab.recipes.judge import judge

    return [(recipe.name, judge(recipe.flags, recipe.environment, target)) for recipe in recipes]
