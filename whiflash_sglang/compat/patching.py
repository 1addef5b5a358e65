"""Whether SGLang's private names are those that are used (`compat/names.py`), and the one way to replace one.

Upstream's plugin loading swallows exceptions, so nothing here relies on it: the version is checked when the plugin is
loaded, every name when WHIFLASH is asked for, and findings stop the start.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from whiflash_sglang.compat.names import HEAVY, PRIVATE_NAMES, PrivateName
from whiflash_sglang.errors import IncompatibleEngineError

SGLANG_VERSION = "0.5.23"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a self-check."""

    name: str
    ok: bool
    detail: str


_replaced: dict[str, Any] = {}


def replace(owner: Any, attribute: str, build: Callable[[Any], Any]) -> None:
    """Set `owner.attribute` to `build(original)`, once; a second call with the same target changes nothing.

    A process may start one server after another.
    """
    key = f"{getattr(owner, '__module__', '')}.{getattr(owner, '__qualname__', owner.__name__)}.{attribute}"
    if key in _replaced:
        return
    original = inspect.getattr_static(owner, attribute)
    _replaced[key] = original
    setattr(owner, attribute, build(original))


def allow_extra(*models: Any, within: tuple[Any, ...] = ()) -> None:
    """Let SGLang's models of answers carry fields of ours. within: models that embed their schema. Idempotent."""
    if models[0].model_config.get("extra") == "allow":
        return
    for model in models:
        model.model_config["extra"] = "allow"
    for model in (*models, *within):
        model.model_rebuild(force=True)


def around(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """For `replace`: `function(original, ...)` is called with what it replaces, and with the call's arguments."""

    def build(original: Any) -> Any:
        @wraps(original)
        def replaced(*args: Any, **named: Any) -> Any:
            return function(original, *args, **named)

        return replaced

    return build


def replaced_names() -> tuple[str, ...]:
    """The upstream names that this process runs with a replacement of ours."""
    return tuple(sorted(_replaced))


def verify_names(*, heavy: bool = True) -> list[Finding]:
    """Check SGLang's version and every private name, those of the HTTP process if `heavy`; never raises."""
    names = [name for name in PRIVATE_NAMES if heavy or not name.path.startswith(HEAVY)]
    return [_check_version(), *(_check_name(name) for name in names)]


def check_registration() -> Finding:
    """Load the plugins as SGLang does and ask its registry for WHIFLASH; never raises."""
    try:
        from sglang.srt.plugins import load_plugins
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        load_plugins()
        algorithm = SpeculativeAlgorithm.from_string("WHIFLASH")
    except (Exception, SystemExit) as error:
        return Finding("WHIFLASH registered", False, str(error))
    return Finding("WHIFLASH registered", True, type(algorithm).__name__)


def require_version() -> None:
    """Raise IncompatibleEngineError where SGLang has another version; imports nothing of it."""
    _require(_check_version())


def require_names() -> None:
    """Raise IncompatibleEngineError naming the first thing that does not fit, before anything is replaced."""
    for finding in verify_names(heavy=False):
        _require(finding)


def _require(finding: Finding) -> None:
    if not finding.ok:
        raise IncompatibleEngineError(
            f"WHIFLASH needs sglang=={SGLANG_VERSION}; {finding.name}: {finding.detail}"
        )


def _check_version() -> Finding:
    try:
        found = version("sglang")
    except PackageNotFoundError:
        return Finding("sglang", False, "not installed")
    return Finding("sglang", found == SGLANG_VERSION, f"{found} installed, {SGLANG_VERSION} expected")


def _check_name(name: PrivateName) -> Finding:
    module_name, _, attribute = name.path.partition(":")
    # If the CPU platform replaces a name, SGLang's own is looked up.
    seams = sys.modules.get("whiflash_sglang.platform.seams")
    originals: Mapping[str, Any] = {} if seams is None else seams.originals()
    try:
        value: Any = importlib.import_module(module_name)
        full_name = module_name
        for part in attribute.split("."):
            full_name = f"{full_name}.{part}"
            value = originals[full_name] if full_name in originals else getattr(value, part)
    except Exception as error:  # an import may fail in any way; all of them mean "does not fit"
        return Finding(name.path, False, f"missing ({error})")
    if name.parameters:
        try:
            known = inspect.signature(inspect.unwrap(value)).parameters
        except (TypeError, ValueError) as error:
            return Finding(name.path, False, f"has no signature ({error})")
        lost = [parameter for parameter in name.parameters if parameter not in known]
        if lost:
            return Finding(name.path, False, f"lost its parameters {lost}")
    return Finding(name.path, True, "as expected")
