"""`whiflash train …`. Every step is resumable and writes its provenance.

A configuration is read before torch is imported: what is wrong with it is said at once.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from whiflash_sglang import arms
from whiflash_sglang.cli.options import JsonFlag, report
from whiflash_sglang.errors import ConfigError, UsageError, WhiflashError
from whiflash_sglang.jsonl import write_whole
from whiflash_sglang.train.answers.prompts import USERS

if TYPE_CHECKING:
    from whiflash_sglang.train.config import TrainConfig

train_app = typer.Typer(
    help="Train a pair of drafters and a router for a target: data (or export and features), eagle3, dflash or "
    "dspark, router, bundle.",
    no_args_is_help=True,
)

ConfigOption = Annotated[
    Path,
    typer.Option(
        "--config", help="YAML or TOML file, or the name of a shipped one (smollm2-135m-instruct, tiny)."
    ),
]


def register(app: typer.Typer) -> None:
    app.add_typer(train_app, name="train")


def resolve_config(path: Path) -> "TrainConfig":
    """A file, or the name of a configuration shipped with the package."""
    from whiflash_sglang import train
    from whiflash_sglang.train.config import load_config

    shipped = Path(train.__path__[0]) / "configs" / f"{path}.yaml"
    return load_config(shipped if not path.exists() and shipped.exists() else path)


@train_app.command("split")
def split_command(
    train: Annotated[Path, typer.Argument(help="Training prompts (JSON lines).")],
    held_out: Annotated[Path, typer.Argument(help="Evaluation prompts (JSON lines).")],
    out: Annotated[Path, typer.Argument(help="File for the remaining training prompts.")],
    users: Annotated[str, typer.Option(help="Regular expression of simulated users.")] = USERS,
    as_json: JsonFlag = False,
) -> None:
    """Drop training prompts that share a user, conversation, tool or schema with an evaluation prompt.

    \b
    Example:
    whiflash train split train_prompts.jsonl eval_prompts.jsonl kept.jsonl
    """
    from whiflash_sglang.train.answers.prompts import read_rows, split

    rows, evaluated = read_rows(train), read_rows(held_out)
    done = split(rows, evaluated, users)
    write_whole(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done.kept))
    reasons = {f"dropped, {source}, {kind}": count for (source, kind), count in sorted(done.dropped.items())}
    report(
        {
            "training prompts": len(rows),
            "held-out prompts": len(evaluated),
            "kept": len(done.kept),
            "dropped": len(rows) - len(done.kept),
            **reasons,
        },
        as_json,
    )


@train_app.command("data")
def data_command(
    config: ConfigOption,
    shard: Annotated[str | None, typer.Option(help="Share of this process, such as 0/2.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Answer the prompts with the target and store tokens and features.

    The target runs in SGLang's offline engine, for which `data.engine` of the configuration has further arguments.

    \b
    Example:
    whiflash train data --config smollm2-135m-instruct --shard 0/2
    """
    from dataclasses import asdict

    with readable_errors():
        settings = resolve_config(config)
        if shard is not None:
            settings = settings.model_copy(
                update={"data": settings.data.model_copy(update={"shard": _parse_shard(shard)})}
            )
        from whiflash_sglang.train.answers.data import generate_data

        summary = asdict(generate_data(settings))
    report(summary, as_json)


@train_app.command("features")
def features_command(
    config: ConfigOption,
    tokens: Annotated[Path, typer.Argument(help="Token ids (.npz), as `whiflash train export` writes them.")],
    only: Annotated[
        Path | None,
        typer.Option("--prompts", help="Take only the answers to these prompts (JSON lines), by id."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Recompute the features of stored answers instead of generating answers.

    \b
    Example:
    whiflash train features training_data/smollm2-135m-instruct/tokens.npz --config smollm2-135m-instruct
    """
    with readable_errors():
        settings = resolve_config(config)
        from whiflash_sglang.train.answers.data import teacher_of
        from whiflash_sglang.train.answers.prompts import read_rows
        from whiflash_sglang.train.answers.store import FeatureStore
        from whiflash_sglang.train.answers.tokens import rebuild_features

        shard = f"shard-{tokens.stem}"
        with teacher_of(settings, shard) as target:
            store = FeatureStore(
                settings.work / "data" / shard,
                vectors=len(settings.capture) + 1,
                hidden=target.hidden_size,
                layers=settings.capture,
            )
            store.truncate_to_index()
            wanted = None if only is None else {row["id"] for row in read_rows(only)}
            done = rebuild_features(tokens, target, store, wanted)
    report({"recomputed": done, "sequences": len(store.records)}, as_json)


@train_app.command("export")
def export_command(
    config: ConfigOption,
    out: Annotated[Path, typer.Argument(help="File to write (.npz).")],
    as_json: JsonFlag = False,
) -> None:
    """Write the token ids of all generated answers to one small file.

    \b
    Example:
    whiflash train export tokens.npz --config smollm2-135m-instruct
    """
    with readable_errors():
        settings = resolve_config(config)
        from whiflash_sglang.train.answers.store import open_stores
        from whiflash_sglang.train.answers.tokens import export_tokens

        stores = open_stores(settings)
        if not stores:
            raise ConfigError(
                f"{settings.work} holds no answers yet: run `whiflash train data` with this configuration first"
            )
        count = export_tokens(stores, out)
    report({"tokens": count, "file": str(out)}, as_json)


StartFrom = Annotated[Path | None, typer.Option(help="Checkpoint to continue from.")]


def _drafter_command(name: str) -> Callable[[Path, Path | None, bool], None]:
    def command(config: ConfigOption, start_from: StartFrom = None, as_json: JsonFlag = False) -> None:
        with readable_errors():
            settings = resolve_config(config)
            from whiflash_sglang.train.answers.data import target_path
            from whiflash_sglang.train.drafters.runner import train_drafter

            out = train_drafter(name, settings, target_path(settings.target), start_from)
        report({"checkpoint": str(out)}, as_json)

    return command


_DRAFTERS = {
    "eagle3": "autoregressive drafter",
    "dflash": "block drafter",
    "dspark": "block drafter with a Markov and a confidence head (section `dspark`)",
}
for _name, _what in _DRAFTERS.items():
    train_app.command(
        _name,
        help=f"Train the {_what}; rerun to resume.\n\n"
        f"\b\nExample:\nwhiflash train {_name} --config smollm2-135m-instruct",
    )(_drafter_command(_name))


@train_app.command("router")
def router_command(
    config: ConfigOption,
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="Use this bundle's drafters and put the router into it. Default: the drafters just trained."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Answers to replay. Default: router.answers.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Replay both drafters over the stored answers and train the router; rerun to resume.

    \b
    Example:
    whiflash train router --config smollm2-135m-instruct --bundle my-bundle
    """
    with readable_errors():
        settings = resolve_config(config)
        from whiflash_sglang.train.answers.data import target_path
        from whiflash_sglang.train.bundle import install_router
        from whiflash_sglang.train.replay import Parts
        from whiflash_sglang.train.router import train_router

        if limit is not None:
            router = settings.router.model_copy(update={"answers": limit})
            settings = settings.model_copy(update={"router": router})
        if bundle is None:
            parts = zip(arms.PAIR, ("eagle3", settings.block_drafter), strict=True)
            trained = {arm: settings.work / part / "checkpoint" for arm, part in parts}
            drafters = Parts(trained, settings.router.eagle_steps, settings.block.vocabulary)
        else:
            drafters = Parts.of_bundle(bundle, settings.router.eagle_steps)
        done = train_router(settings, target_path(settings.target), drafters)
        if bundle is not None:
            install_router(bundle, done.directory)
    report({"router": str(done.directory), **done.report}, as_json)


@train_app.command("bundle")
def bundle_command(
    config: ConfigOption,
    out: Annotated[Path, typer.Argument(help="Bundle directory; an existing one keeps its thresholds.")],
    name: Annotated[str | None, typer.Option(help="Name of the bundle. Default: the directory's.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a bundle of the trained drafters and the router, if there is one.

    \b
    Example:
    whiflash train bundle my-bundle --config smollm2-135m-instruct
    """
    with readable_errors():
        settings = resolve_config(config)
        from whiflash_sglang.train.bundle import assemble

        assemble(settings, out, name or out.resolve().name)
    report({"bundle": str(out)}, as_json)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Make errors that a person can act on those of this package; what runs meanwhile shows its progress on stderr, so
    that stdout holds the result alone.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except WhiflashError:
        raise
    except ValueError as error:  # prompts, data or a checkpoint that cannot be used
        raise WhiflashError(str(error)) from error


def _parse_shard(text: str) -> tuple[int, int]:
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise UsageError(f"--shard {text!r} is not of the form INDEX/COUNT, such as 0/2") from None
    if not 0 <= index < count:
        raise UsageError(f"--shard {text}: the index must be from 0 to {count - 1}")
    return index, count
