"""`whiflash lab evaluate` and `whiflash lab calibrate`: a bundle is judged without a server, its thresholds are chosen.

Bundle and configuration are read before torch is imported: what is wrong with them is said at once.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from whiflash_sglang.cli.options import Dtype, JsonFlag, OutOption, for_tables
from whiflash_sglang.cli.train import ConfigOption, readable_errors, resolve_config
from whiflash_sglang.jsonl import write_whole

BundleOption = Annotated[Path, typer.Option(help="Bundle directory.")]


def keep(result: Mapping[str, Any], out: Path | None) -> None:
    """Write a result to the file of `--out` if there is one."""
    if out is not None:
        write_whole(out, json.dumps(result, indent=1) + "\n")


def evaluate_command(
    bundle: BundleOption,
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

        from whiflash_sglang.lab.evaluation import (
            EvaluationSettings,
            evaluate_bundle,
            figures_table,
        )
        from whiflash_sglang.train.config import Hardware

        # The device that SGLang computes on here.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        hardware = Hardware.model_validate({"dtype": dtype, "threads": threads, "device": device})
        settings = EvaluationSettings(
            limit=limit, max_new_tokens=max_new_tokens, work=work, hardware=hardware
        )
        result = evaluate_bundle(bundle, prompts, settings)
        keep(result, out)
    if as_json:
        typer.echo(json.dumps(result))
        return
    for_tables().print(figures_table(result))


def calibrate_command(
    bundle: BundleOption,
    config: ConfigOption,
    per_category: Annotated[int, typer.Option(min=1, help="Most answers of each category.")] = 48,
    round_ms: Annotated[
        str | None,
        typer.Option(help="Round times in ms instead of a server's: eagle3=31.0,dflash=28.5"),
    ] = None,
    as_json: JsonFlag = False,
    out: OutOption = None,
) -> None:
    """Choose the routers' thresholds for the most tokens a second and write them to the bundle.

    It takes the training's stored answers that the router has not seen.

    \b
    Example:
    whiflash lab calibrate --bundle my-bundle --config smollm2-135m-instruct
    """
    from whiflash_sglang.checkpoints.manifest import load_manifest

    with readable_errors():
        load_manifest(bundle)
        training = resolve_config(config)
        from whiflash_sglang.lab.calibration import CalibrationSettings, calibrate

        result = calibrate(bundle, CalibrationSettings(training, per_category, round_ms))
        keep(result, out)
    if as_json:
        typer.echo(json.dumps(result))
        return
    for name, part in result["routers"].items():
        typer.echo(f"threshold of {name}: {part['threshold']:.4g}")
    for name, value in result["tokens_per_second"].items():
        typer.echo(f"tokens per second of {name}: {value:.4g}")


def register(app: typer.Typer, lab: typer.Typer) -> None:
    lab.command("calibrate")(calibrate_command)
    lab.command("evaluate")(evaluate_command)
