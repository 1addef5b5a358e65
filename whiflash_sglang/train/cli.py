"""`whiflash train …`: data, eagle3, dflash. Every step is resumable and writes its provenance."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from whiflash_sglang.errors import WhiflashError
from whiflash_sglang.train.config import TrainConfig, load_config

train_app = typer.Typer(
    help="Train a pair of drafters for a target: data (or export and features), eagle3, dflash.",
    no_args_is_help=True,
)

ConfigOption = Annotated[
    Path,
    typer.Option("--config", help="YAML or TOML file, or the name of a shipped one (smollm2-135m-instruct)."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_SHIPPED = Path(__file__).parent / "configs"


def resolve_config(path: Path) -> TrainConfig:
    """A file, or the name of a configuration shipped with the package."""
    shipped = _SHIPPED / f"{path}.yaml"
    return load_config(shipped if not path.exists() and shipped.exists() else path)


@train_app.command("data")
def data_command(
    config: ConfigOption,
    shard: Annotated[str | None, typer.Option(help="This process's share, e.g. 0/2.")] = None,
    json_output: JsonFlag = False,
) -> None:
    """Answer the prompts with the target and keep tokens and features.

    Example: whiflash train data --config smollm2-135m-instruct --shard 0/2
    """
    from whiflash_sglang.train.data import generate_data

    with readable_errors():
        settings = resolve_config(config)
        if shard is not None:
            settings = settings.model_copy(
                update={"data": settings.data.model_copy(update={"shard": _parse_shard(shard)})}
            )
        summary = asdict(generate_data(settings))
    _report(summary, json_output)


@train_app.command("features")
def features_command(
    config: ConfigOption,
    tokens: Annotated[
        Path, typer.Argument(help="A .npz of token ids, as `whiflash train export` writes it.")
    ],
    json_output: JsonFlag = False,
) -> None:
    """Recompute the features of answers that were generated before, instead of generating anew.

    Example: whiflash train features training_data/smollm2-135m-instruct/tokens.npz --config smollm2-135m-instruct
    """
    from whiflash_sglang.train.data import load_target
    from whiflash_sglang.train.store import FeatureStore
    from whiflash_sglang.train.tokens import rebuild_features

    with readable_errors():
        settings = resolve_config(config)
        target = load_target(
            settings.target, settings.chat_template, settings.capture, settings.hardware
        ).model
        store = FeatureStore(
            settings.work / "data" / f"shard-{tokens.stem}",
            vectors=len(settings.capture) + 1,
            hidden=target.hidden_size,
            layers=settings.capture,
        )
        store.truncate_to_index()
        done = rebuild_features(tokens, target, store, settings.capture)
    _report({"recomputed": done, "sequences": len(store.records)}, json_output)


@train_app.command("export")
def export_command(
    config: ConfigOption,
    out: Annotated[Path, typer.Argument(help="The .npz to write.")],
    json_output: JsonFlag = False,
) -> None:
    """Write the token ids of all generated answers to one small file.

    Example: whiflash train export tokens.npz --config smollm2-135m-instruct
    """
    from whiflash_sglang.train.runner import open_stores
    from whiflash_sglang.train.tokens import export_tokens

    with readable_errors():
        stores = open_stores(resolve_config(config))
        if not stores:
            raise ValueError("there is no data yet: run `whiflash train data` first")
        count = export_tokens(stores, out)
    _report({"tokens": count, "file": str(out)}, json_output)


@train_app.command("eagle3")
def eagle3_command(
    config: ConfigOption,
    start_from: Annotated[Path | None, typer.Option(help="A checkpoint to go on from.")] = None,
    json_output: JsonFlag = False,
) -> None:
    """Train the autoregressive drafter; killed runs go on where they stopped.

    Example: whiflash train eagle3 --config smollm2-135m-instruct
    """
    from whiflash_sglang.train.data import target_path
    from whiflash_sglang.train.runner import train_eagle3

    with readable_errors():
        settings = resolve_config(config)
        out = train_eagle3(settings, target_path(settings.target), start_from)
    _report({"checkpoint": str(out)}, json_output)


@train_app.command("dflash")
def dflash_command(
    config: ConfigOption,
    start_from: Annotated[Path | None, typer.Option(help="A checkpoint to go on from.")] = None,
    json_output: JsonFlag = False,
) -> None:
    """Train the block drafter; killed runs go on where they stopped.

    Example: whiflash train dflash --config smollm2-135m-instruct
    """
    from whiflash_sglang.train.data import target_path
    from whiflash_sglang.train.runner import train_dflash

    with readable_errors():
        settings = resolve_config(config)
        out = train_dflash(settings, target_path(settings.target), start_from)
    _report({"checkpoint": str(out)}, json_output)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn errors that a person can act on into one line and exit code 1."""
    try:
        yield
    except (WhiflashError, OSError, ValueError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, markup=False)
        raise typer.Exit(1) from error


def evaluate_command(
    bundle: Annotated[Path, typer.Option(help="Bundle directory (with whiflash.json).")],
    prompts: Annotated[
        Path, typer.Option(help="JSONL of {id, category, messages, tools?, response_format?}.")
    ],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Write a bar chart (.png) to this file.")] = None,
    limit: Annotated[int | None, typer.Option(help="Prompts to use, balanced over the categories.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Answer tokens per prompt.")] = 160,
    work: Annotated[
        Path | None, typer.Option(help="Keep the target's answers here for the next time.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves it to torch.")] = 0,
) -> None:
    """Acceptance lengths of a bundle's drafters and routers on held-out prompts, without a server.

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
    Console().print(figures_table(result))


def _parse_shard(text: str) -> tuple[int, int]:
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise ValueError(f"--shard {text!r} is not of the form index/count, e.g. 0/2") from None
    if not 0 <= index < count:
        raise ValueError(f"--shard {text}: the index must be from 0 to {count - 1}")
    return index, count


def _report(result: dict[str, object], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result))
        return
    for key, value in result.items():
        typer.echo(f"{key}: {value}")
