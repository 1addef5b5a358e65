"""`whiflash evaluate` and `whiflash calibrate`: a bundle is judged without a server, its thresholds are chosen."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from whiflash_sglang.train.cli import readable_errors, report, resolve_config

BundleOption = Annotated[Path, typer.Option(help="Bundle directory (with whiflash.json).")]
PictureOption = Annotated[Path | None, typer.Option(help="Write a picture (.png) to this file.")]
TokensOption = Annotated[int, typer.Option(min=3, help="Answer tokens per prompt.")]
WorkOption = Annotated[Path | None, typer.Option(help="Keep answers and replays here for the next time.")]
DtypeOption = Annotated[str, typer.Option(help="bfloat16 or float32.")]
ThreadsOption = Annotated[int, typer.Option(help="CPU threads; 0 leaves it to torch.")]


def evaluate_command(
    bundle: BundleOption,
    prompts: Annotated[
        Path, typer.Option(help="JSONL of {id, category, messages, tools?, response_format?}.")
    ],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    picture: PictureOption = None,
    limit: Annotated[int | None, typer.Option(help="Prompts to use, balanced over the categories.")] = None,
    max_new_tokens: TokensOption = 160,
    work: WorkOption = None,
    dtype: DtypeOption = "bfloat16",
    threads: ThreadsOption = 0,
) -> None:
    """Acceptance lengths of a bundle's arms and routers on held-out prompts, without a server.

    Example: whiflash evaluate --bundle my-bundle --prompts eval.jsonl --limit 70 --json figures.json
    """
    from whiflash_sglang.train.config import Hardware
    from whiflash_sglang.train.evaluation import (
        EvaluationSettings,
        evaluate_bundle,
        figures_table,
        write_json,
        write_picture,
    )

    with readable_errors():
        hardware = Hardware.model_validate({"dtype": dtype, "threads": threads})
        settings = EvaluationSettings(
            limit=limit, max_new_tokens=max_new_tokens, work=work, hardware=hardware
        )
        result = evaluate_bundle(bundle, prompts, settings)
        if json_file is not None:
            write_json(result, json_file)
        if picture is not None:
            write_picture(result, picture)
    terminal = Console()
    # A file or a pipe has no width of its own; a table cut to 80 columns would show no figures.
    (terminal if terminal.is_terminal else Console(width=200)).print(figures_table(result))


def calibrate_command(
    bundle: BundleOption,
    config: Annotated[
        Path | None,
        typer.Option(help="Use stored training answers that the router was not trained on (as for `train`)."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Or answer these prompts (JSONL).")] = None,
    per_category: Annotated[int, typer.Option(min=1, help="Answers of each category, at most.")] = 48,
    server: Annotated[
        str | None, typer.Option(help="URL of a running server of this bundle; else one is started.")
    ] = None,
    round_ms: Annotated[
        str | None, typer.Option(help="Milliseconds of a round instead: eagle3=31.0,dflash=28.5")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the curves to this file.")] = None,
    picture: PictureOption = None,
    max_new_tokens: TokensOption = 160,
    work: WorkOption = None,
    dtype: DtypeOption = "bfloat16",
    threads: ThreadsOption = 0,
) -> None:
    """Choose the routers' thresholds for the most tokens per second and write them into the bundle.

    Example: whiflash calibrate --bundle my-bundle --config smollm2-135m-instruct --picture thresholds.png
    """
    from whiflash_sglang.train.calibration import CalibrationSettings, calibrate
    from whiflash_sglang.train.config import Hardware
    from whiflash_sglang.train.evaluation import EvaluationSettings, write_json

    with readable_errors():
        hardware = Hardware.model_validate({"dtype": dtype, "threads": threads})
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
        if json_file is not None:
            write_json(result, json_file)
    shown = {name: f"{part['threshold']:.4g}" for name, part in result["routers"].items()}
    report({"thresholds": shown, "tokens_per_second": result["tokens_per_second"]}, as_json=False)
