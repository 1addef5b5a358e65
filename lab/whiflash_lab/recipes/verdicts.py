"""Judges all launches of a file."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from whiflash_lab.recipes.files import Recipe, read


def verdicts_in(path: Path, model_path: str | None) -> list[tuple[str, Any]]:
    """Return (name, verdict) of each launch in the file. model_path: the target, if a launch names none."""
    recipes, target = [_with_config(recipe, path.parent) for recipe in read(path)], None
    if model_path is not None:
        from whiflash_sglang.checkpoints.hub import look_up

        target = look_up(model_path).config.parent
    from whiflash_lab.recipes.rewrite import judged

    return [(recipe.name, judged(recipe, target)) for recipe in recipes]


def _with_config(recipe: Recipe, folder: Path) -> Recipe:
    """Return the launch with the flags of its `--config` file in place of that, if it is here or in `folder`."""
    flags = dict(recipe.flags)
    named = str(flags.pop("config", ""))
    for file in (Path(named), folder / named):
        if file.suffix in (".yaml", ".yml") and os.path.isfile(file):
            return replace(recipe, name=f"{recipe.name} with {file}", flags={**read(file)[0].flags, **flags})
    return recipe
