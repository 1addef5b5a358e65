"""Replace SGLang's names by one table, which a decorator fills, and check that all names are as expected.

Upstream's plugin loading swallows exceptions, so nothing here relies on it. The version is checked when the plugin is
loaded, every name that is used (`engine/names.txt`) when a launch asks for WHIFLASH, and replaced names before the
first is replaced. A wrong name stops the start. `docs/dev/patches.md` shows the table.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import Any

from whiflash_sglang.engine.names import HEAVY, PRIVATE_NAMES
from whiflash_sglang.engine.supported import SUPPORTED, UNTESTED, installed
from whiflash_sglang.errors import IncompatibleEngineError

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: which name or part, whether it is as expected, and details."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Patch:
    """An entry of the table: one name of SGLang's and its replacement.

    path: `module:owner.name`. params: those that the replacement relies on. why, until: the reason, and when it may go.
    module: the one of ours that `install` is called for. replaced: makes the replacement from SGLang's own value.
    everywhere: modules that imported the name by `from` get it, too. optional: skipped if its module does not import.
    """

    path: str
    params: tuple[str, ...]
    does: str
    why: str
    until: str
    module: str
    replaced: Callable[[Any], Any]
    everywhere: bool = False
    optional: bool = False


PATCHES: dict[str, Patch] = {}
"""All patches that modules have entered, by the paths of the names that they replace."""

_replaced: dict[str, Any] = {}
"""SGLang's own values, by path, of the names that we or the CPU platform have replaced in this process."""


def around(
    *paths: str,
    params: tuple[str, ...] = (),
    why: str,
    until: str,
    makes: bool = False,
    everywhere: bool = False,
    optional: bool = False,
) -> Callable[[Function], Function]:
    """Enter `function(original, ...)` into the table: it gets the function that it replaces, and the call's arguments.

    Args:
        paths: `module:owner.name`. params: that each must take. makes: the function is called once, with the original,
            and returns what takes its place. Its docstring's first sentence says what the replacement does.
    """

    def enter(function: Function) -> Function:
        does = first_sentence(function.__doc__)
        if not does:
            raise ValueError(f"{function.__qualname__}: has no docstring, which the table of patches shows")
        made = function if makes else _wrapping(function)
        for path in paths:
            if path in PATCHES and PATCHES[path].module != function.__module__:
                raise ValueError(f"{path}: is replaced by {PATCHES[path].module} already")
            PATCHES[path] = Patch(path, params, does, why, until, function.__module__, made, everywhere, optional)
        return function

    return enter


def become(made: Any, kind: type) -> None:
    """Make an object of SGLang's an instance of our subclass `kind`, where SGLang chooses the class itself. `kind` adds
    methods only, so frozen objects and those with slots may change, too.
    """
    object.__setattr__(made, "__class__", kind)


def first_sentence(docstring: str | None) -> str:
    """Return a docstring's first sentence on one line, without its full stop; empty without a docstring."""
    return " ".join((docstring or "").split()).partition(". ")[0].rstrip(".")


def _wrapping(function: Function) -> Callable[[Any], Any]:
    def replaced(original: Any) -> Any:
        bound = isinstance(original, classmethod | staticmethod)
        inner = original.__func__ if bound else original

        @wraps(inner)
        def call(*args: Any, **named: Any) -> Any:
            return function(inner, *args, **named)

        return type(original)(call) if bound else call

    return replaced


def install(*modules: ModuleType) -> None:
    """Apply to SGLang what these modules have in `PATCHES`. Idempotent: a process may start one server after another.

    Raises:
        IncompatibleEngineError: a name is missing or has changed; nothing is replaced then.
    """
    names = {module.__name__ for module in modules}
    patches = [patch for path, patch in PATCHES.items() if patch.module in names and path not in _replaced]
    patches = [patch for patch in patches if not (patch.optional and _is_absent(patch))]
    for patch in patches:
        require(_check_name(patch.path, patch.params))
    for patch in patches:
        replace(patch.path, patch.replaced, everywhere=patch.everywhere)


def replace(path: str, made: Callable[[Any], Any], *, everywhere: bool = False) -> None:
    """Replace the value of a name by `made(value)`, once in a process. The value is None if the name does not exist.
    Arguments: as in `Patch`."""
    if path in _replaced:
        return
    owner, attribute = owner_of(path)
    original = inspect.getattr_static(owner, attribute, None)
    replacement = made(original)
    _replaced[path] = original
    setattr(owner, attribute, replacement)
    if everywhere:
        for name, module in list(sys.modules.items()):
            if name.startswith("sglang.") and vars(module).get(attribute) is original:
                setattr(module, attribute, replacement)


def owner_of(path: str) -> tuple[Any, str]:
    """Return the object that owns a name, and the last part of the name."""
    module, _, names = path.partition(":")
    *owners, attribute = names.split(".")
    found: Any = importlib.import_module(module)
    for owner in owners:
        found = getattr(found, owner)
    return found, attribute


def upstreams(path: str) -> Any:
    """Return SGLang's own value of a name, whether this process has replaced it or not."""
    value = _replaced[path] if path in _replaced else getattr(*owner_of(path))
    return value.__func__ if isinstance(value, classmethod | staticmethod) else value


def _is_absent(patch: Patch) -> bool:
    try:
        importlib.import_module(patch.path.partition(":")[0])
    except ImportError:
        return True
    return False


def replaced_names() -> tuple[str, ...]:
    """Return SGLang's names that this process has replaced."""
    return tuple(sorted(_replaced))


def verify_names(*, heavy: bool = True) -> list[Finding]:
    """Check SGLang's version and every name that is used. If `heavy`, also those of the HTTP process and of the patches
    that have been entered so far (`patches.missing` enters all). Never raises."""
    names = dict(PRIVATE_NAMES)
    if heavy:
        names |= {patch.path: patch.params for patch in PATCHES.values()}
    return [_check_version(), *(_check_name(*name) for name in names.items() if heavy or not name[0].startswith(HEAVY))]


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
    """Raise IncompatibleEngineError if SGLang has an unsupported version; imports nothing of it."""
    require(_check_version())


def require_names() -> None:
    """Raise IncompatibleEngineError for the first name that is not as expected, before anything is replaced."""
    for finding in verify_names(heavy=False):
        require(finding)


def require(finding: Finding) -> None:
    """Raise IncompatibleEngineError if this finding is not as expected."""
    if not finding.ok:
        raise IncompatibleEngineError(
            f"WHIFLASH needs sglang {' or '.join(SUPPORTED)}; {finding.name}: {finding.detail}"
        )


def _check_version() -> Finding:
    found = installed()
    if found is None:
        return Finding("sglang", False, "not installed")
    fits = found in SUPPORTED or os.environ.get(UNTESTED) == "1"
    how = "--whiflash-untested-sglang on serves with another that has all names"
    return Finding("sglang", fits, f"{found} installed, {' or '.join(SUPPORTED)} expected ({how})")


def _check_name(path: str, params: tuple[str, ...]) -> Finding:
    module, _, attribute = path.partition(":")
    try:
        value: Any = importlib.import_module(module)
        name = f"{module}:"
        for part in attribute.split("."):
            name += part
            # If it is replaced, by us or by the CPU platform, SGLang's own is looked up.
            value = _replaced[name] if name in _replaced else getattr(value, part)
            name += "."
        value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    except Exception as error:  # an import may fail in any way; all of them mean "does not fit"
        return Finding(path, False, f"missing ({error})")
    if params:
        try:
            known = inspect.signature(inspect.unwrap(value)).parameters
        except (TypeError, ValueError) as error:
            return Finding(path, False, f"has no signature ({error})")
        lost = [parameter for parameter in params if parameter not in known]
        if lost:
            return Finding(path, False, f"lost its parameters {lost}")
    return Finding(path, True, "as expected")
