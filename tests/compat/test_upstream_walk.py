"""`scripts/upstream.py` finds what a release of SGLang moves: shown on doctored modules of the installed one."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from loaded_scripts import load_script

STATE = "sglang.srt.managers.scheduler_components.internal_state"
CONTROLLER = f"{STATE}:SchedulerInternalStateController.get_internal_state"
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
    """A tree with other texts for some of its modules; None is a module that is gone."""

    def __init__(self, tree: Any, texts: Mapping[str, str | None]) -> None:
        self.tree, self.texts = tree, texts

    def modules(self) -> list[str]:
        kept = [module for module in self.tree.modules() if self.texts.get(module, "") is not None]
        return [
            *kept,
            *(module for module in self.texts if module not in kept and self.texts[module] is not None),
        ]

    def source(self, module: str) -> str | None:
        return self.texts[module] if module in self.texts else self.tree.source(module)

    def is_package(self, module: str) -> bool:
        return bool(self.tree.is_package(module))


def doctored(tree: Any, module: str, before: str, after: str) -> Doctored:
    text = tree.source(module)
    assert text.count(before) >= 1, before
    return Doctored(tree, {module: text.replace(before, after)})


def test_every_name_of_ours_is_found_and_takes_what_python_sees(known: Any) -> None:
    """What is read off the sources is what `whiflash check` asks of the imported names."""
    from whiflash_sglang.compat.names import PRIVATE_NAMES
    from whiflash_sglang.compat.sources import replaced

    assert [path for path, said in known.names.items() if said is None] == []
    unclear = [path for path, said in known.names.items() if said["kind"] == "unclear"]
    assert len(unclear) <= 0.1 * len(known.names), unclear
    used = [*PRIVATE_NAMES.items(), *((one.path, one.params) for one in replaced())]
    for path, parameters in used:
        said = known.names[path.removesuffix(".__new__")]
        assert said["kind"] == "unclear" or set(parameters) <= set(said.get("parameters", ())), path


def test_nothing_is_found_in_the_release_that_was_recorded(
    upstream: ModuleType, tree: Any, known: Any
) -> None:
    assert upstream.compare(tree, known) == []


def test_comments_and_docstrings_are_no_changes(upstream: ModuleType, tree: Any, known: Any) -> None:
    commented = doctored(tree, ALLOCATION, "\n\n", "\n\n# another comment\n\n")
    assert upstream.compare(commented, known) == []


def test_a_renamed_function_is_missing_and_one_elsewhere_is_named(
    upstream: ModuleType, tree: Any, known: Any
) -> None:
    renamed = doctored(tree, ALLOCATION, "def release_kv_cache(", "def free_kv_cache(")
    assert upstream.compare(renamed, known) == [upstream.Finding("missing", RELEASE, "defined nowhere")]
    elsewhere = {**renamed.texts, "sglang.srt.mem_cache.elsewhere": tree.source(ALLOCATION)}
    (finding,) = upstream.compare(Doctored(tree, elsewhere), known)
    assert finding.detail == "moved? defined in sglang.srt.mem_cache.elsewhere"


def test_a_module_that_is_gone_takes_its_names_along(upstream: ModuleType, tree: Any, known: Any) -> None:
    found = upstream.compare(Doctored(tree, {STATE: None}), known)
    names = {finding.name for finding in found if finding.kind == "missing"}
    assert {path for path in known.names if path.startswith(f"{STATE}:")} <= names


def test_what_is_imported_from_elsewhere_now_is_found_there(
    upstream: ModuleType, tree: Any, known: Any
) -> None:
    texts = {
        ALLOCATION: "from .moved import *\nfrom sglang.srt.mem_cache.moved import release_kv_cache as it\n",
        "sglang.srt.mem_cache.moved": tree.source(ALLOCATION),
    }
    assert upstream.compare(Doctored(tree, texts), known) == []


def test_lost_and_new_parameters_are_told(upstream: ModuleType, tree: Any, known: Any) -> None:
    changed = doctored(
        tree, STATE, "get_internal_state(self, recv_req", "get_internal_state(self, deep, request"
    )
    found = [finding for finding in upstream.compare(changed, known) if finding.name == CONTROLLER]
    assert found == [upstream.Finding("parameters", CONTROLLER, "lost recv_req; takes deep, request too")]


def test_a_function_that_is_written_differently_is_told_and_shown(
    upstream: ModuleType, tree: Any, known: Any
) -> None:
    walker = upstream.Walker(tree)
    found = walker.find(RELEASE)
    last = walker.text(found).rstrip().split("\n")[-1]
    lines = tree.source(ALLOCATION).split("\n")
    lines.insert(found.node.end_lineno, " " * (len(last) - len(last.lstrip())) + "planted = True")
    changed = Doctored(tree, {ALLOCATION: "\n".join(lines)})
    assert upstream.compare(changed, known) == [upstream.Finding("changed", RELEASE, "written differently")]
    assert "+" + " " * 4 in upstream.difference(RELEASE, tree, changed)
    assert "planted = True" in upstream.difference(RELEASE, tree, changed)


def test_new_and_lost_arguments_of_a_server_are_told(upstream: ModuleType, tree: Any, known: Any) -> None:
    module = "sglang.srt.arg_groups.fields.device"
    changed = doctored(tree, module, "    gc_threshold: A[", "    gc_limit: A[")
    assert upstream.compare(changed, known) == [
        upstream.Finding("flags", "gc_limit", "new"),
        upstream.Finding("flags", "gc_threshold", "gone"),
    ]


def test_a_wheel_is_read_as_a_directory_is(upstream: ModuleType, tmp_path: Path) -> None:
    text = "class Base:\n    def go(self, fast): ...\n\n\nclass Here(Base):\n    pass\n"
    with zipfile.ZipFile(tmp_path / "sglang-9-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sglang/__init__.py", "")
        wheel.writestr("sglang/there.py", text)
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "there.py").write_text(text)
    for place in (tmp_path / "sglang-9-py3-none-any.whl", tmp_path):
        said = upstream.Walker(upstream.Tree(place)).describe("sglang.there:Here.go")
        assert said["parameters"] == ["self", "fast"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="holds no sglang"):
        upstream.Tree(empty)
