"""`whiflash bundle`: drafters, router and manifest in one directory, from published checkpoints."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from whiflash_sglang.cli import SERVE
from whiflash_sglang.cli.options import JsonFlag, report

_ID = "hub id or directory"


def register(app: typer.Typer, lab: typer.Typer) -> None:
    bundle = typer.Typer(no_args_is_help=True)
    app.add_typer(bundle, name="bundle", rich_help_panel=SERVE)

    @bundle.callback()
    def _bundle() -> None:
        """Put drafters together for one target."""

    @bundle.command()
    def create(
        target: Annotated[str, typer.Option("--target", help=f"Served model: {_ID}.")],
        out: Annotated[Path, typer.Option("--out", help="Directory to make; must not exist.")],
        eagle3: Annotated[str | None, typer.Option("--eagle3", help=f"Autoregressive drafter: {_ID}.")] = None,
        dflash: Annotated[str | None, typer.Option("--dflash", help=f"Block drafter: {_ID}.")] = None,
        router: Annotated[
            str | None, typer.Option("--router", help=f"Neural router: {_ID}, or a .safetensors file.")
        ] = None,
        router_sign: Annotated[
            Literal["ar-minus-diffusion", "diffusion-minus-ar"] | None,
            typer.Option("--router-sign", help="Sign of the router's prediction, if its file does not name it."),
        ] = None,
        name: Annotated[
            str | None, typer.Option("--name", help="Name of the bundle. Default: the directory's.")
        ] = None,
        as_json: JsonFlag = False,
    ) -> None:
        """Check that drafters fit a target by their config.json, and write a bundle that names them.

        Hub ids (owner/name or owner/name@revision) are pinned to their current commit and fetched when the bundle is
        served; directories are copied. One drafter is enough, but routers that choose between two are then refused.

        \b
        Example:
        whiflash bundle create --target OWNER/TARGET --eagle3 OWNER/E3 --dflash OWNER/DF --out my-bundle
        """
        from whiflash_sglang.checkpoints.hub import check_place

        for place in filter(None, (target, eagle3, dflash, router)):
            check_place(place)  # checked first, because the import below takes seconds
        from whiflash_train.bundle import BundleParts, create

        manifest = create(BundleParts(target, eagle3, dflash, router, router_sign), out, name)
        if as_json:
            report(manifest, True)
            return
        parts = [part for part in ("target", "eagle3", "dflash") if part in manifest]
        report({part: _place(manifest, part) for part in parts}, False)
        revision = _revision(manifest, "target") if "@" in target else None
        flags = ["--model-path", str(manifest["target"]), *(("--revision", revision) if revision else ())]
        flags += ["--speculative-draft-model-path", str(out)]
        typer.echo(f"serve it: {shlex.join(['whiflash', 'serve', *flags])}")


def _place(manifest: dict[str, object], part: str) -> str:
    revision = _revision(manifest, part)
    return f"{manifest[part]}{' at ' + revision if revision else ''}"


def _revision(manifest: dict[str, object], part: str) -> str | None:
    sources = manifest["sources"]
    return sources[part].get("revision") if isinstance(sources, dict) else None
