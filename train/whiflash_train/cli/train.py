"""`whiflash train`: answers, drafters and bundle. Every step is resumable and writes its provenance.

`whiflash lab split`, `features` and `export`: make and use a shared set of answers. A configuration is read before
torch is imported, so that its errors come at once.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from whiflash_sglang.cli import TRAIN
from whiflash_sglang.cli.options import JsonFlag, report
from whiflash_sglang.errors import ConfigError, UsageError, WhiflashError
from whiflash_sglang.files.jsonl import write_output
from whiflash_train.answers.prompts import USERS

if TYPE_CHECKING:
    from whiflash_train.config import TrainConfig

ConfigOption = Annotated[
    Path,
    typer.Option("--config", help="YAML or TOML file, or the name of a shipped one (smollm2-135m-instruct, tiny)."),
]
Step = Literal["data", "eagle3", "dflash", "dspark", "bundle"]


def register(app: typer.Typer, lab: typer.Typer) -> None:
    app.command(rich_help_panel=TRAIN)(train)
    lab.command()(split)
    lab.command()(features)
    lab.command()(export)


def resolve_config(path: Path) -> "TrainConfig":
    """Load the configuration at `path`, a file or the name of a configuration shipped with the package."""
    import whiflash_train as train
    from whiflash_train.config import load_config

    shipped = Path(train.__path__[0]) / "configs" / f"{path}.yaml"
    return load_config(shipped if not path.is_file() and shipped.exists() else path)


def train(
    config: ConfigOption,
    out: Annotated[
        Path | None, typer.Option(help="Bundle directory; an existing one keeps its router and thresholds.")
    ] = None,
    step: Annotated[Step | None, typer.Option(help="Take only this step. Default: all, in their order.")] = None,
    start_from: Annotated[
        Path | None, typer.Option(help="With --step of a drafter: checkpoint to continue from.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Train a pair of drafters for a target, and make a bundle of them; rerun to resume.

    The steps: answer the prompts with the target and store tokens and features (data), train the autoregressive
    drafter (eagle3) and the block drafter (dflash or dspark), put all together (bundle). The target runs in SGLang's
    offline engine, for which data.engine of the configuration has arguments.

    \b
    Examples:
    whiflash train --config smollm2-135m-instruct --out my-bundle
    whiflash train --config smollm2-135m-instruct --step data
    """
    if start_from is not None and step not in ("eagle3", "dflash", "dspark"):
        raise UsageError(f"--start-from {start_from} is for one drafter: name it with --step")
    if out is None and step in (None, "bundle"):
        raise UsageError("--out is missing: name the directory of the bundle")
    if start_from is not None and not start_from.is_dir():
        raise ConfigError(f"--start-from {start_from}: no such directory")
    done: dict[str, Any] = {}
    with readable_errors() as told:
        settings = resolve_config(config)
        steps = ("data", "eagle3", settings.block_drafter, "bundle") if step is None else (step,)
        for name in steps:
            done[name] = _take(name, settings, out, start_from)
            if not as_json:
                told({"step": name, **done[name]}, False)
    if as_json:
        report(done if step is None else done[step], True)


def _take(step: str, settings: "TrainConfig", out: Path | None, start_from: Path | None) -> dict[str, Any]:
    """Run one step of `whiflash train`: make data, train a drafter, or assemble the bundle. Returns facts to report."""
    if step == "bundle" and out is not None:
        from whiflash_train.bundle import assemble

        assemble(settings, out, out.resolve().name)
        return {"bundle": str(out)}
    from whiflash_train.answers.data import generate_data, target_path

    if step == "data":
        return asdict(generate_data(settings))
    from whiflash_train.drafters.runner import train_drafter

    return {"checkpoint": str(train_drafter(step, settings, target_path(settings.target), start_from))}


def split(
    train: Annotated[Path, typer.Argument(help="Training prompts (JSON lines).")],
    held_out: Annotated[Path, typer.Argument(help="Evaluation prompts (JSON lines).")],
    out: Annotated[Path, typer.Argument(help="File for the remaining training prompts.")],
    users: Annotated[str, typer.Option(help="Regular expression of simulated users.")] = USERS,
    as_json: JsonFlag = False,
) -> None:
    """Drop training prompts that share a user, conversation, tool or schema with an evaluation prompt.

    \b
    Example:
    whiflash lab split train_prompts.jsonl eval_prompts.jsonl kept.jsonl
    """
    from whiflash_train.answers.prompts import read_rows
    from whiflash_train.answers.prompts import split as parted

    rows, evaluated = read_rows(train), read_rows(held_out)
    try:
        done = parted(rows, evaluated, users)
    except re.error as error:
        raise UsageError(f"--users {users} is no regular expression: {error}") from None
    write_output(out, "".join(json.dumps(row) + "\n" for row in done.kept))
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


def features(
    config: ConfigOption,
    tokens: Annotated[Path, typer.Argument(help="Token ids (.npz), as `whiflash lab export` writes them.")],
    only: Annotated[
        Path | None, typer.Option("--prompts", help="Take only the answers to these prompts (JSON lines), by id.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Recompute the features of stored answers instead of generating answers.

    \b
    Example:
    whiflash lab features training_data/smollm2-135m-instruct/tokens.npz --config smollm2-135m-instruct
    """
    with readable_errors():
        settings = resolve_config(config)
        if not tokens.is_file():
            raise ConfigError(f"{tokens} cannot be read: no such file; `whiflash lab export` writes one")
        from whiflash_train.answers.prompts import read_rows

        chosen_ids = None if only is None else {row["id"] for row in read_rows(only)}
        from whiflash_train.answers.data import shard_of
        from whiflash_train.answers.tokens import rebuild_features

        with shard_of(settings, f"shard-{tokens.stem}") as (target, store):
            done = rebuild_features(tokens, target, store, chosen_ids)
    report({"recomputed": done, "sequences": len(store.records)}, as_json)


def export(
    config: ConfigOption, out: Annotated[Path, typer.Argument(help="File to write (.npz).")], as_json: JsonFlag = False
) -> None:
    """Write the token ids of all generated answers to one small file.

    \b
    Example:
    whiflash lab export tokens.npz --config smollm2-135m-instruct
    """
    with readable_errors():
        settings = resolve_config(config)
        from whiflash_train.answers.store import open_stores
        from whiflash_train.answers.tokens import export_tokens

        stores = open_stores(settings)
        if not any(store.records for store in stores):
            raise ConfigError(
                f"{settings.work} holds no answers yet: run `whiflash train --step data` with this configuration first"
            )
        count = export_tokens(stores, out)
    report({"tokens": count, "file": str(out)}, as_json)


@contextmanager
def readable_errors() -> Iterator[Callable[[Mapping[str, Any], bool], None]]:
    """Turn ValueErrors into WhiflashErrors, which a person can act on. Code inside prints to stderr, so that stdout
    contains only results; the yielded function reports them there.
    """
    stdout = sys.stdout

    def told(result: Mapping[str, Any], as_json: bool) -> None:
        with redirect_stdout(stdout):
            report(result, as_json)

    try:
        with redirect_stdout(sys.stderr):
            yield told
    except WhiflashError:
        raise
    except ValueError as error:  # unusable prompts, data or checkpoint
        raise WhiflashError(str(error)) from error
