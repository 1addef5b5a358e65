"""`whiflash learn`: train a bundle's drafters on a server's stored requests, and write a new bundle."""

from pathlib import Path
from typing import Annotated, Any

import typer

from whiflash_sglang.checkpoints.manifest import MANIFEST, embedded_bundle
from whiflash_sglang.cli import TRAIN
from whiflash_sglang.cli.options import JsonFlag, report
from whiflash_sglang.errors import ConfigError
from whiflash_train.cli.train import ConfigOption, readable_errors, resolve_config


def register(app: typer.Typer, lab: typer.Typer) -> None:
    app.command(rich_help_panel=TRAIN)(learn)


def learn(
    directory: Annotated[Path, typer.Argument(help="Directory of the server's --whiflash-learn.")],
    config: ConfigOption,
    out: Annotated[Path, typer.Option(help="Directory of the new bundle, if drafters became better.")],
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle that the server was started with. Default: the embedded one.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Most answer tokens of samples to learn from.")] = 100_000,
    judged: Annotated[int, typer.Option(min=8, help="Most of the newest requests that judge.")] = 64,
    rate: Annotated[float, typer.Option(min=0, help="Learning rate at its peak.")] = 3e-4,
    replay: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Answers of the original training (.npz, whiflash lab export), learned as well.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Train a bundle's drafters on a server's samples, and write a new bundle if one of them is better.

    A drafter is better if it accepts more of the newest requests, beyond its 95 % interval. Start the server with the
    new bundle to serve it.

    \b
    Example:
    whiflash learn /var/lib/whiflash --config smollm2-135m-instruct --out monday
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory; start a server with --whiflash-learn {directory} first")
    if bundle is not None and not (bundle / MANIFEST).is_file():
        raise ConfigError(f"--bundle {bundle} holds no {MANIFEST}")
    with readable_errors():
        settings = resolve_config(config)
        from whiflash_train.learner.once import Learning, learn_once

        learning = Learning(directory, bundle or embedded_bundle(), out, settings, tokens, judged, rate, replay)
        outcome = learn_once(learning).model_dump(mode="json")
    report(outcome if as_json else _lines(outcome), as_json)


def _lines(outcome: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of an outcome for a person, with a line for each drafter."""
    lines = {key: value for key, value in outcome.items() if key not in ("drafters", "until")}
    lines["bundle"] = outcome["bundle"] or "none, since no drafter accepts more beyond its interval"
    lines["seconds"] = f"{outcome['seconds']:.0f}"
    for name, gain in outcome["drafters"].items():
        interval = f"{gain['ratio']:.3f} [{gain['low']:.3f}, {gain['high']:.3f}]"
        lines[name] = f"{gain['before']:.2f} → {gain['after']:.2f} tokens a round, {interval}"
    return lines
