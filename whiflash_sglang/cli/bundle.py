"""`whiflash bundle`: drafters, router and manifest in one directory, from published checkpoints."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from whiflash_sglang.cli.options import JsonFlag, report

_ID = "hub id (owner/name or owner/name@revision) or directory"


def register(app: typer.Typer) -> None:
    bundle = typer.Typer(help="Put drafters together for one target.", no_args_is_help=True)
    app.add_typer(bundle, name="bundle")

    @bundle.callback()
    def _bundle() -> None:
        """Put drafters together for one target."""

    @bundle.command()
    def create(
        target: Annotated[str, typer.Option("--target", help=f"The model that is served: {_ID}.")],
        out: Annotated[Path, typer.Option("--out", help="Directory of the bundle; must not exist.")],
        eagle3: Annotated[
            str | None, typer.Option("--eagle3", help=f"The autoregressive drafter: {_ID}.")
        ] = None,
        diffusion: Annotated[
            str | None, typer.Option("--diffusion", help=f"The block drafter: {_ID}.")
        ] = None,
        router: Annotated[
            str | None, typer.Option("--router", help=f"A neural router: {_ID}, or a .safetensors file.")
        ] = None,
        router_sign: Annotated[
            Literal["ar-minus-diffusion", "diffusion-minus-ar"] | None,
            typer.Option("--router-sign", help="What the router predicts, where its file does not say."),
        ] = None,
        name: Annotated[
            str | None, typer.Option("--name", help="The bundle's name; by default the directory's.")
        ] = None,
        as_json: JsonFlag = False,
    ) -> None:
        """Check that drafters fit a target, from their config.json alone, and write a bundle that names them.

        Hub ids are pinned to the commit they are at and fetched when the bundle is served; directories are copied. One
        drafter alone will do; routers that choose between two are then refused by name.

        \b
        Example:
        whiflash bundle create --target OWNER/TARGET --eagle3 OWNER/E3 --diffusion OWNER/DF --out my-bundle
        """
        from whiflash_sglang.checkpoints.create import Parts, create

        manifest = create(Parts(target, eagle3, diffusion, router, router_sign), out, name)
        if as_json:
            report(manifest, True)
            return
        parts = [part for part in ("target", "eagle3", "dflash") if part in manifest]
        report({part: _place(manifest, part) for part in parts}, False)
        typer.echo(f"serve it: whiflash serve --model-path {target.partition('@')[0]} --bundle {out}")


def _place(manifest: dict[str, object], part: str) -> str:
    sources = manifest["sources"]
    revision = sources[part]["revision"] if isinstance(sources, dict) else None
    return f"{manifest[part]}{' at ' + revision if revision else ''}"
