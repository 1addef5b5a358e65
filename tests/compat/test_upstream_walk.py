"""`scripts/upstream.py` finds what a release of SGLang moves: shown on doctored modules of the installed one."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
from loaded_scripts import load_script

ALLOCATION = "sglang.srt.mem_cache.common"
RELEASE = f"{ALLOCATION}:release_kv_cache"


@pytest.fixture(scope="module")
def upstream() -> ModuleType:
    return load_script("upstream")


@pytest.fixture(scope="module")
def tree(upstream: ModuleType) -> Any:
    return upstream.Tree(upstream.installed())


@pytest.fixture(scope="module")
def known(upstream: ModuleType, tree: Any) -> Any:
    return upstream.read(tree, upstream.our_names())


class Doctored:
    """A tree with other texts for some of its modules."""

    def __init__(self, tree: Any, texts: Mapping[str, str]) -> None:
        self.tree, self.texts = tree, texts

    def modules(self) -> list[str]:
        return list(dict.fromkeys([*self.tree.modules(), *self.texts]))

    def source(self, module: str) -> str | None:
        return self.texts.get(module) or self.tree.source(module)

    def is_package(self, module: str) -> bool:
        return bool(self.tree.is_package(module))


def doctored(tree: Any, module: str, before: str, after: str) -> Doctored:
    text = tree.source(module)
    assert text.count(before) >= 1, before
    return Doctored(tree, {module: text.replace(before, after)})


@pytest.mark.newest
def test_every_name_of_ours_is_found_and_takes_what_python_sees(known: Any) -> None:
    """Names read off the sources are those that `whiflash check` asks of the imported ones."""
    from whiflash_sglang.engine.names import PRIVATE_NAMES
    from whiflash_sglang.engine.patches import replaced

    assert [path for path, said in known.names.items() if said is None] == []
    unclear = [path for path, said in known.names.items() if said["kind"] == "unclear"]
    assert len(unclear) <= 0.1 * len(known.names), unclear
    for path, parameters in [*PRIVATE_NAMES.items(), *((path, params) for path, params, _ in replaced())]:
        said = known.names[path.removesuffix(".__new__")]
        assert said["kind"] == "unclear" or set(parameters) <= set(said.get("parameters", ())), path


@pytest.mark.newest
def test_nothing_is_found_in_the_release_that_was_recorded(upstream: ModuleType, tree: Any, known: Any) -> None:
    """If names of ours changed: `python scripts/upstream.py --record`."""
    assert upstream.recorded() == known
    assert upstream.compare(tree, known) == []


def test_a_renamed_function_is_missing_and_one_elsewhere_is_named(upstream: ModuleType, tree: Any, known: Any) -> None:
    renamed = doctored(tree, ALLOCATION, "def release_kv_cache(", "def free_kv_cache(")
    assert upstream.compare(renamed, known) == [upstream.Finding("missing", RELEASE, "defined nowhere")]
    elsewhere = {**renamed.texts, "sglang.srt.mem_cache.elsewhere": tree.source(ALLOCATION)}
    (finding,) = upstream.compare(Doctored(tree, elsewhere), known)
    assert finding.detail == "moved? defined in sglang.srt.mem_cache.elsewhere"
