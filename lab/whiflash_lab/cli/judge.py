"""`whiflash lab evaluate`: measures a bundle's acceptance without a server, or compares it with a server's.

The bundle is read before torch is imported, so that errors in it are reported at once.
"""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from whiflash_sglang.cli import options
from whiflash_sglang.files.jsonl import write_output
from whiflash_train.cli.train import readable_errors


def evaluate_command(
    bundle: Annotated[Path, typer.Option(help="Bundle directory.")],
    prompts: Annotated[Path, typer.Option(help="JSONL of {id, category, messages, tools?, response_format?}.")],
    served: Annotated[str | None, typer.Option(help="Server of this bundle: compare acceptance.")] = None,
    arm: Annotated[Literal["ar", "diffusion"], typer.Option(help="Drafter compared under --served.")] = "ar",
    as_json: options.JsonFlag = False,
    out: options.OutOption = None,
    limit: Annotated[
        int | None, typer.Option(min=1, max=options.MOST, help="Most prompts, balanced over the categories.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=3, max=options.MOST, help="Answer tokens per prompt.")] = 160,
    work: Annotated[Path | None, typer.Option(help="Keep answers in this directory.")] = None,
    dtype: Annotated[options.Dtype, typer.Option(help="Number format of target and drafters.")] = "bfloat16",
    threads: Annotated[int, typer.Option(min=0, max=1024, help="CPU threads; 0 is torch's choice.")] = 0,
    api_key: options.AdminKeyOption = None,
) -> None:
    """Measure acceptance lengths of a bundle's drafters on held-out prompts, without a server.

    With --served, compare a drafter's acceptance on a server's own answers, draft by draft, with the server's, and name
    the first cause of a difference. The exit code is then 1.

    \b
    Examples:
    whiflash lab evaluate --bundle my-bundle --prompts eval.jsonl --limit 70 --out figures.json
    whiflash lab evaluate --bundle my-bundle --prompts eval.jsonl --served http://127.0.0.1:30000
    """
    from whiflash_sglang.checkpoints.hub import check_place
    from whiflash_sglang.checkpoints.manifest import load_manifest

    options.make_place("--out", out)
    with readable_errors():
        load_manifest(bundle)
        check_place(str(prompts.absolute()))
        import httpx
        import torch

        from whiflash_lab import evaluation
        from whiflash_sglang.files.hosts import ask
        from whiflash_train.config import Hardware

        # The device that SGLang computes on here.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        hardware = Hardware.model_validate({"dtype": dtype, "threads": threads, "device": device})
        if work is not None:
            work.mkdir(parents=True, exist_ok=True)
        settings = evaluation.EvaluationSettings(limit, max_new_tokens, work=work, hardware=hardware)
        if served is None:
            result, table = evaluation.evaluate_bundle(bundle, prompts, settings), evaluation.figures_table
        else:
            with httpx.Client(headers=options.authorization(api_key), timeout=3600.0) as client:
                result = evaluation.compare_served(bundle, prompts, partial(ask, client, served), arm, settings)
            table = evaluation.positions_table
    if as_json:
        typer.echo(json.dumps(result))
    else:
        options.show_table(*table(result))
        if sentence := result.get("sentence"):
            typer.echo(sentence)
    if out is not None:  # last, so that a full disk takes no result away
        write_output(out, json.dumps(result, indent=1) + "\n")
    if result.get("cause"):
        raise typer.Exit(1)


def register(app: typer.Typer, lab: typer.Typer) -> None:
    lab.command("evaluate")(evaluate_command)
