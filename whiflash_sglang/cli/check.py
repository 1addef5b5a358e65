"""`whiflash check`: one line per thing that must be right."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer
from rich.console import Console

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
    found = [Finding("python", True, platform.python_version())]
    for package in PACKAGES:
        try:
            found.append(Finding(package, True, version(package)))
        except PackageNotFoundError:
            found.append(Finding(package, False, "not installed"))
    from whiflash_sglang.compat.patching import check_registration, replaced_names, verify_names

    found += verify_names()
    found.append(check_registration())
    found += [Finding(name, True, "replaced by this package") for name in replaced_names()]
    found += _platform()
    return found


def _platform() -> list[Finding]:
    from whiflash_sglang.platform import activate

    if activate() is None:
        return [Finding("platform", True, "an accelerator is there: SGLang's own platform serves it")]
    from whiflash_sglang.platform.seams import verify_seams

    seams = [Finding(check.name, check.ok, check.detail) for check in verify_seams()]
    return [Finding("platform", True, "no accelerator: this package's CPU platform"), *seams]


def register(app: typer.Typer) -> None:
    @app.command()
    def check(
        as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of lines.")] = False,
    ) -> None:
        """Check versions, the plugin, the platform and every private SGLang name. Exit code 1 on any failure.

        Example: whiflash check
        """
        found = findings()
        if as_json:
            typer.echo(
                json.dumps([{"name": f.name, "ok": f.ok, "detail": f.detail} for f in found], indent=2)
            )
        else:
            console = Console(highlight=False, soft_wrap=True)
            for f in found:
                mark = "[green]ok  [/]" if f.ok else "[red]FAIL[/]"
                console.print(f"{mark} {f.name}: {f.detail}", markup=True)
        if not all(f.ok for f in found):
            raise typer.Exit(1)
