"""`whiflash check`: what must be right, and what is not."""

import json
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from whiflash_sglang.cli.options import JsonFlag
from whiflash_sglang.compat.patching import Finding

PACKAGES = (
    "whiflash-sglang",
    "whiflash-kernels",
    "whiflash-sdk",
    "sglang",
    "torch",
    "triton",
    "transformers",
    "openai",
)


def findings() -> list[Finding]:
    """Versions, the plugin's registration, the platform, every private name and every seam."""
    import platform

    from whiflash_sglang.compat.patching import check_registration, replaced_names, verify_names

    found = [Finding("python", True, platform.python_version())]
    for package in PACKAGES:
        try:
            found.append(Finding(package, True, version(package)))
        except PackageNotFoundError:
            found.append(Finding(package, False, "not installed"))
    found += verify_names()
    found.append(check_registration())
    found += [Finding(name, True, "replaced by this package") for name in replaced_names()]
    found += _platform()
    return found


def _drafts(drafts: list[str], model_path: str | None) -> list[Finding]:
    from whiflash_sglang.checkpoints.fit import judge, read_target

    target = None if model_path is None else read_target(model_path)
    return [Finding(*judged) for said in drafts for judged in judge(said, target)]


def _platform() -> list[Finding]:
    from whiflash_sglang.device.cpu import serves_here

    if not serves_here():
        return [Finding("platform", True, "an accelerator is there: SGLang's own platform serves it")]
    from whiflash_sglang.platform.seams import verify_seams

    seams = [Finding(check.name, check.ok, check.detail) for check in verify_seams()]
    return [Finding("platform", True, "no accelerator: this package's CPU platform"), *seams]


def check(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also show passed checks.")] = False,
    model_path: Annotated[
        str | None, typer.Option("--model-path", help="Target of --draft: hub id or directory.")
    ] = None,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            "--draft",
            help="Check this bundle or drafter (hub id or directory) by its config.json: format, KV size, "
            "obstacles. May be repeated.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check versions, the plugin, the platform and every private SGLang name. Exit code 1 on any failure.

    \b
    Examples:
    whiflash check -v
    whiflash check --model-path Qwen/Qwen3-8B --draft z-lab/Qwen3-8B-DFlash-b16
    """
    from rich.console import Console

    if model_path is not None and not draft:
        raise typer.BadParameter(
            "--model-path has no effect without --draft: name the drafters with --draft, or leave it out"
        )
    found = _drafts(draft, model_path) if draft else findings()
    verbose = verbose or bool(draft)
    failed = [f for f in found if not f.ok]
    if as_json:
        listed = [{"name": f.name, "ok": f.ok, "detail": f.detail} for f in found]
        typer.echo(json.dumps(listed, indent=2))
    else:
        console = Console(highlight=False, soft_wrap=True)
        for f in found if verbose else failed:
            mark = "[green]ok  [/]" if f.ok else "[red]FAIL[/]"
            console.print(mark, end=" ")
            console.print(f"{f.name}: {f.detail}", markup=False)
        console.print(
            f"{len(failed)} of {len(found)} failed" if failed else f"{len(found)} of {len(found)} right"
        )
    if failed:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    app.command()(check)
