"""Which of SGLang's model classes let their layers' outputs be captured.

Read from their sources: it is asked when the arguments are read, and importing a model's class takes seconds.
"""

import re
from functools import cache
from importlib.resources import files
from pathlib import Path

SETTERS = ("set_dflash_layers_to_capture", "set_eagle3_layers_to_capture", "set_dspark_layers_to_capture")
"""Methods that say which layers, in the order in which a loaded model is asked for them."""
_DSPARK_ALONE = ("KimiLinearForCausalLM",)
"""Classes that have the last one alone, and capture layers' outputs by it: DeepSeek-V4's are no layer's output."""


def may_capture(architecture: str) -> bool:
    """Whether a class has a setter, its own or an inherited one. Of what is not SGLang's only the loaded model can
    tell: it may."""
    return _has_setter(architecture) is not False


def _has_setter(name: str) -> bool | None:
    """None where the class is not among SGLang's models."""
    if name not in _classes():
        return None
    bases, body = _classes()[name]
    # MiniCPM-V's classes hand them on to another one, which they choose by version.
    setters = SETTERS if name in _DSPARK_ALONE else (*SETTERS[:2], "__getattr__")
    own = any(f"def {setter}(" in body for setter in setters)
    return own or any(_has_setter(base) for base in re.findall(r"\w+", bases) if base != name)


@cache
def _classes() -> dict[str, tuple[str, str]]:
    """Bases and body of every class in the modules of SGLang's models."""
    found: dict[str, tuple[str, str]] = {}
    for file in (Path(str(files("sglang"))) / "srt" / "models").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for one in re.finditer(r"^class (\w+)(?:\(([^)]*)\))?:\n((?:[ \t].*\n|\n)*)", text, re.MULTILINE):
            found[one[1]] = one[2] or "", one[3]
    return found
