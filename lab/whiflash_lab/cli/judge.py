"""`whiflash lab evaluate`: a bundle is judged without a server.

The bundle is read before torch is imported: errors in it come at once.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from whiflash_sglang.cli.options import Dtype, JsonFlag, OutOption, show_table
from whiflash_sglang.files.jsonl import write_whole
from whiflash_train.cli.train import readable_errors


def evaluate_command(
    bundle: Annotated[Path, typer.Option(help="Bundle directory.")],
    prompts: Annotated[
        Path, typer.Option(help="JSONL of {id, category, messages, tools?, response_format?}.")
    ],
    as_json: JsonFlag = False,
    out: OutOption = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most prompts, balanced over the categories.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=3, help="Answer tokens per prompt.")] = 160,
    work: Annotated[Path | None, typer.Option(help="Keep answers and replays in this directory.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Number format of target and drafters.")] = "bfloat16",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 is torch's choice.")] = 0,
) -> None:
    """Measure acceptance lengths of a bundle's arms and routers on held-out prompts, without a server.

    \b
    Example:
    whiflash lab evaluate --bundle my-bundle --prompts eval.jsonl --limit 70 --out figures.json
    """
    from whiflash_sglang.checkpoints.hub import check_place
    from whiflash_sglang.checkpoints.manifest import load_manifest

    with readable_errors():
        load_manifest(bundle)
        check_place(str(prompts.absolute()))
        import torch

        from whiflash_lab.evaluation import EvaluationSettings, evaluate_bundle, figures_table
        from whiflash_train.config import Hardware

        # The device that SGLang computes on here.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        hardware = Hardware.model_validate({"dtype": dtype, "threads": threads, "device": device})
        settings = EvaluationSettings(
            limit=limit, max_new_tokens=max_new_tokens, work=work, hardware=hardware
        )
        result = evaluate_bundle(bundle, prompts, settings)
        if out is not None:
            write_whole(out, json.dumps(result, indent=1) + "\n")
    if as_json:
        typer.echo(json.dumps(result))
        return
    title = f"acceptance length, {result['bundle']}, {result['prompts']} prompts"
    show_table(*figures_table(result), title)


def register(app: typer.Typer, lab: typer.Typer) -> None:
    lab.command("evaluate")(evaluate_command)
