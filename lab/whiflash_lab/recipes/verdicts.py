"""Judges all launches of a file."""

from pathlib import Path
from typing import Any

from whiflash_lab.recipes.files import read


def verdicts_in(path: Path, model_path: str | None) -> list[tuple[str, Any]]:
    """Return (name, verdict) of each launch in the file. model_path: the target, if a launch names none."""
    recipes, target = read(path), None
    if model_path is not None:
        from whiflash_sglang.checkpoints.hub import look_up

        target = look_up(model_path).config.parent
    from whiflash_lab.recipes.rewrite import judged

    return [(recipe.name, judged(recipe, target)) for recipe in recipes]
