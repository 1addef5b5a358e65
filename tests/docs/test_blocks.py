"""Blocks of the documentation can be typed: Python runs, commands and their flags exist."""

import contextlib
import fnmatch
import io
import re
import shlex
import tomllib
from argparse import ArgumentParser
from collections.abc import Iterator
from itertools import dropwhile
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from blocks import ROOT, blocks, pages, python_blocks
from loaded_scripts import load_script

import whiflash_sglang
from whiflash_sglang.checkpoints.manifest import Manifest
from whiflash_sglang.settings.config import Flags, RouterName, flag_of

PAGES = [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in pages()]


def test_no_block_without_a_language_and_no_unknown_mark() -> None:
    for page in pages():
        for block in blocks(page):
            assert block.language, f"{page}: {block.body[:60]!r}"
            assert block.mark in {"", "server"}, f"{page}: {block.mark}"


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_as_they_stand(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Blocks that need a server are compiled here and run in `tests/agents/test_http.py`."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in python_blocks(page):
        code = compile(block.body, page.name, "exec")
        if block.mark == "server" or page == ROOT / "README.md":
            continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(code, names)
        if block.prints is not None:
            assert said.getvalue().rstrip() == block.prints.rstrip()


def test_training_configurations_are_what_they_are_for(tmp_path: Path) -> None:
    from whiflash_train.config import load_config

    whole, keys = (found for found in blocks(ROOT / "docs/how-to/training.md") if found.language == "yaml")
    (tmp_path / "my.yaml").write_text(whole.body, encoding="utf-8")
    dense = load_config(tmp_path / "my.yaml")
    # The other block has the keys that differ for a target of experts.
    merged = {**yaml.safe_load(whole.body), **yaml.safe_load(keys.body)}
    merged["data"] = {**yaml.safe_load(whole.body)["data"], **merged["data"]}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(merged), encoding="utf-8")
    experts = load_config(tmp_path / "my.yaml")
    assert (dense.target, experts.target) == ("Qwen/Qwen3-8B", "Qwen/Qwen3-30B-A3B")
    assert experts.data.engine == {"tp_size": 2}


def test_the_least_manifest_is_one() -> None:
    (block,) = (found for found in blocks(ROOT / "docs/how-to/serve-your-model.md") if found.language == "json")
    assert Manifest.model_validate_json(block.body).name == "my-bundle"


RUN = re.compile(r"(?:nice -n \d+ )?((?:whiflash|make|pip|sglang|python) .*)")


def commands(page: Path) -> Iterator[list[str]]:
    """Command lines, as words: of console blocks, of bash blocks if `RUN` knows them, and pip's in sentences.
    Comments, and variables that are set for a command, are left out."""
    yield from map(shlex.split, re.findall(r"`(pip install \S[^`]*)`", page.read_text(encoding="utf-8")))
    for block in blocks(page):
        if block.language in ("console", "bash"):
            for line in block.body.replace("\\\n", " ").splitlines():
                called = RUN.match(line)
                if block.language == "bash" and not called:
                    continue
                words = shlex.split(called[1] if called else line, comments=True)
                words = list(dropwhile(re.compile(r"[A-Z_]+=").match, words))
                if words:
                    yield words


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """Flags of every command of ours by the words that call it, of SGLang's launchers, and make's targets."""
    reference = load_script("reference")
    found = {
        words: {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
        for words, command in reference.commands().items()
    }
    engine = {flag_of(field) for field in Flags.model_fields} | upstream_flags()
    found["whiflash serve"] |= engine
    found["sglang serve"] = found["python -m sglang.launch_server"] = engine
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^([a-z-]+):", makefile, re.MULTILINE):
        found[f"make {target}"] = set()
    return found


def upstream_flags() -> set[str]:
    """Every flag of SGLang's launchers."""
    from sglang.srt.server_args import ServerArgs

    parser = ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return {name for action in parser._actions for name in action.option_strings}


PARTS = ("", "cpu", "kernels", "lab", "sdk", "train")
PROJECTS = {
    f"whiflash_{part or 'sglang'}": tomllib.loads((ROOT / part / "pyproject.toml").read_text()) for part in PARTS
}


def wrong_install(files: list[str]) -> str | None:
    """Return why `pip install` of these files of dist/ would fail or ask an index for a package of ours; else None."""
    wheels = {f"dist/{name}-{whiflash_sglang.__version__}-py3-none-any.whl": name for name in PROJECTS}
    named = {file: re.fullmatch(r"([^[]+)(?:\[(.+)\])?", file) for file in files}
    given = {wheels[one]: found[2] for found in named.values() if found for one in fnmatch.filter(wheels, found[1])}
    for name, extras in given.items():
        project = PROJECTS[name]["project"]
        asked = list(project["dependencies"])
        for extra in extras.split(",") if extras else ():
            if extra not in project.get("optional-dependencies", {}):
                return f"{name} has no extra {extra}"
            asked += project["optional-dependencies"][extra]
        for one in asked:
            needed = re.split(r"[~\[>=]", one)[0].replace("-", "_")
            if needed in PROJECTS and needed not in given:
                return f"{name} needs {needed}, which is not among the files"
    return None if given else f"{files} are no wheels of ours"


def test_an_install_that_cannot_work_is_found() -> None:
    assert "needs whiflash_sglang" in str(wrong_install(["dist/whiflash_lab-*.whl"]))
    assert "no extra" in str(wrong_install(["dist/whiflash_sdk-0.1.0-py3-none-any.whl[langgraph]"]))
    assert wrong_install(["dist/*.whl"]) is None


def wrong(words: list[str], known: dict[str, set[str]]) -> str | None:
    """Fault of a command line; None if it has none, or is not one of ours."""
    if words[:2] == ["pip", "install"]:
        braces = re.compile(r"(.*)\{(.*)\}(.*)")  # as a shell expands them
        spread = (braces.fullmatch(word) for word in words[2:])
        words += [found[1] + part + found[3] for found in spread if found for part in found[2].split(",")]
        files = [word for word in words[2:] if word.startswith("dist/") and not braces.match(word)]
        folders = [word for word in words[2:] if word.startswith(".") and not (ROOT / word / "pyproject.toml").exists()]
        named = [word for word in words[2:] if word.startswith("whiflash")]  # which no index has
        return wrong_install(files) if files else f"{folders + named} cannot be installed" if folders + named else None
    if words[0] == "python" and words[1:2] != ["-m"]:
        script = ROOT / words[1] if (ROOT / words[1]).exists() else ROOT / "examples" / "agents" / words[1]
        if not script.is_file():
            return f"{words[1]} does not exist"
        session = script.with_name("session.py")  # whose arguments the examples share
        source = "".join(file.read_text("utf-8") for file in (script, session) if file.is_file())
        missing = [word for word in words[2:] if word.startswith("--") and word not in source]
        return f"{script.name} takes no {missing}" if missing else None
    if words[0] not in ("whiflash", "make", "sglang") and words[:3] != ["python", "-m", "sglang.launch_server"]:
        return None
    calls = [" ".join(words[:count]) for count in (3, 2) if " ".join(words[:count]) in known]
    if not calls:
        return None if words == ["whiflash", "--version"] else f"{' '.join(words[:3])}: no such command"
    unknown = {word.split("=", 1)[0] for word in words if word.startswith("--")} - known[calls[0]]
    if unknown:
        return f"{calls[0]} takes no {sorted(unknown)}"
    router = words[words.index("--whiflash-router") + 1] if "--whiflash-router" in words else "auto"
    return None if router in get_args(RouterName) else f"no router {router}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_flags_exist(page: Path, known: dict[str, set[str]]) -> None:
    assert not [problem for words in commands(page) if (problem := wrong(words, known))]


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "results").rglob("*.md"))])
def test_commands_in_sentences_exist(page: Path) -> None:
    """Reports may have flags of earlier releases."""
    known = load_script("reference").commands()
    for command in re.findall(r"(?<!`)`(whiflash [^`]+)`", page.read_text(encoding="utf-8")):
        call = max((call for call in known if f"{command} ".startswith(f"{call} ")), key=len, default=None)
        if call is None:
            is_group = any(f"{each} ".startswith(f"{command} ") for each in known)
            assert is_group or command in ("whiflash --version", "whiflash --install-completion"), command
            continue
        rest = command.removeprefix(call).split()
        takes = any(one.param_type_name == "argument" for one in known[call].params)
        assert takes or not rest or rest[0].startswith("-"), command
