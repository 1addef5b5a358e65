"""`whiflash evaluate` and `whiflash calibrate`: a bundle is judged without a server, its thresholds are chosen.

Bundle and configuration are read before torch is imported: what is wrong with them is said at once.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from whiflash_sglang.cli.options import Dtype, JsonFlag, OutOption, for_tables
from whiflash_sglang.cli.train import readable_errors, resolve_config
from whiflash_sglang.jsonl import write_whole

BundleOption = Annotated[Path, typer.Option(help="Bundle directory.")]
PictureOption = Annotated[Path | None, typer.Option(help="Write a picture to this file (.png).")]
TokensOption = Annotated[int, typer.Option(min=3, help="Answer tokens per prompt.")]
WorkOption = Annotated[Path | None, typer.Option(help="Keep answers and replays in this directory.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Number format of target and drafters.")]
ThreadsOption = Annotated[int, typer.Option(help="CPU threads; 0 is torch's choice.")]


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
    picture: PictureOption = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most prompts, balanced over the categories.")
    ] = None,
    max_new_tokens: TokensOption = 160,
    work: WorkOption = None,
    dtype: DtypeOption = "bfloat16",
    threads: ThreadsOption = 0,
) -> None:
    """Measure acceptance lengths of a bundle's arms and routers on held-out prompts, without a server.

    \b
    Example:
    whiflash evaluate --bundle my-bundle --prompts eval.jsonl --limit 70 --out figures.json
    """
    from whiflash_sglang.checkpoints.manifest import load_manifest

    with readable_errors():
        load_manifest(bundle)
        from whiflash_sglang.lab.judging.evaluation import (
            EvaluationSettings,
            evaluate_bundle,
            figures_table,
            write_picture,
        )
        from whiflash_sglang.train.config import Hardware

        hardware = Hardware.model_validate({"dtype": dtype, "threads": threads, "device": _device()})
        settings = EvaluationSettings(
            limit=limit, max_new_tokens=max_new_tokens, work=work, hardware=hardware
        )
        result = evaluate_bundle(bundle, prompts, settings)
        keep(result, out)
        if picture is not None:
            write_picture(result, picture)
    if as_json:
        typer.echo(json.dumps(result))
        return
    for_tables().print(figures_table(result))


def calibrate_command(
    bundle: BundleOption,
    config: Annotated[
        Path | None,
        typer.Option(help="Training configuration whose answers, unseen by the router, are used."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts to answer instead (JSONL).")] = None,
    per_category: Annotated[int, typer.Option(min=1, help="Most answers of each category.")] = 48,
    server: Annotated[
        str | None, typer.Option(help="URL of a running server of this bundle; by default one is started.")
    ] = None,
    round_ms: Annotated[
        str | None, typer.Option(help="Round times in ms instead of measuring: eagle3=31.0,dflash=28.5")
    ] = None,
    as_json: JsonFlag = False,
    out: OutOption = None,
    picture: PictureOption = None,
    max_new_tokens: TokensOption = 160,
    work: WorkOption = None,
    dtype: DtypeOption = "bfloat16",
    threads: ThreadsOption = 0,
) -> None:
    """Choose the routers' thresholds for the most tokens a second and write them to the bundle.

    \b
    Example:
    whiflash calibrate --bundle my-bundle --config smollm2-135m-instruct --picture thresholds.png
    """
    from whiflash_sglang.checkpoints.manifest import load_manifest

    with readable_errors():
        load_manifest(bundle)
        from whiflash_sglang.lab.judging.calibration import CalibrationSettings, calibrate
        from whiflash_sglang.lab.judging.evaluation import EvaluationSettings
        from whiflash_sglang.train.config import Hardware

        hardware = Hardware.model_validate({"dtype": dtype, "threads": threads, "device": _device()})
        settings = CalibrationSettings(
            config=None if config is None else resolve_config(config),
            prompts=prompts,
            per_category=per_category,
            server=server,
            round_ms=round_ms,
            picture=picture,
            evaluation=EvaluationSettings(max_new_tokens=max_new_tokens, work=work, hardware=hardware),
        )
        result = calibrate(bundle, settings)
        keep(result, out)
    if as_json:
        typer.echo(json.dumps(result))
        return
    for name, part in result["routers"].items():
        typer.echo(f"threshold of {name}: {part['threshold']:.4g}")
    for name, value in result["tokens_per_second"].items():
        typer.echo(f"tokens per second of {name}: {value:.4g}")


def register(app: typer.Typer) -> None:
    app.command("calibrate")(calibrate_command)
    app.command("evaluate")(evaluate_command)


def _device() -> str:
    """The device that SGLang computes on here."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
