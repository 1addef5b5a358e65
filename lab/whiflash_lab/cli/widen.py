"""`whiflash lab widen`: widens a small trained target and its drafters to a large model's cost."""

from pathlib import Path
from typing import Annotated

import typer

from whiflash_sglang.errors import UsageError


def widen(
    out: Annotated[Path, typer.Option(help="New directory: the target in `target`, the drafters in `bundle`.")],
    target: Annotated[
        Path | None, typer.Option(help="Llama target with few parameters. Default: the embedded one.")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="Its bundle. Default: the embedded one.")] = None,
    copies: Annotated[int, typer.Option(min=1, help="Copies of the residual stream.")] = 8,
    heads: Annotated[int, typer.Option(min=1, help="Query heads of a layer.")] = 64,
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads of a layer.")] = 16,
    intermediate: Annotated[int, typer.Option(min=1, help="Neurons of a layer's MLP.")] = 12288,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the target, at least its own.")] = 34,
    block_layers: Annotated[int, typer.Option(min=1, help="Layers of the block drafter.")] = 5,
) -> None:
    """Write a wide pair that computes exactly what a small one does: same text, same accepted drafts, a large cost.

    For a machine that no large weights reach. The default is 15 GB and costs about what an 8B model does.

    \b
    Example:
    whiflash lab widen --out /dev/shm/wide
    """
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"--out {out} is not empty: name a new directory, or remove it")
    from whiflash_lab.widen import Shape, widen_pair
    from whiflash_sglang.checkpoints.manifest import embedded_bundle
    from whiflash_sglang.embedded import ensure_target

    shape = Shape(copies, heads, kv_heads, intermediate, layers, block_layers)
    widen_pair(target or ensure_target(), bundle or embedded_bundle(), out, shape)
    size = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    typer.echo(f"{out}: {size / 1e9:.1f} GB")
