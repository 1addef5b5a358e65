"""`whiflash learn`: the drafters go on training on what a server kept of its requests."""

from pathlib import Path
from typing import Annotated, Any

import typer

from whiflash_sglang.cli.options import AdminKeyOption, JsonFlag, report
from whiflash_sglang.errors import UsageError


def register(app: typer.Typer) -> None:
    app.command()(learn)


def learn(
    directory: Annotated[Path, typer.Argument(help="Directory of the server's --whiflash-learn.")],
    config: Annotated[
        Path | None,
        typer.Option(help="How the drafters are trained, as for whiflash train: a file, or a shipped name."),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Bundle that the server was started with. Default: the embedded one."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Most answer tokens of samples to learn from.")
    ] = 100_000,
    judged: Annotated[int, typer.Option(min=8, help="Most of the newest requests that judge.")] = 64,
    rate: Annotated[float, typer.Option(min=0, help="Learning rate at its peak.")] = 3e-4,
    replay: Annotated[
        Path | None,
        typer.Option(help="Answers of the original training (.npz, whiflash train export), learned as well."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Server that is switched to the version, if there is one.")
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="Only report the last pass.")] = False,
    as_json: JsonFlag = False,
    api_key: AdminKeyOption = None,
) -> None:
    """Train the drafters that serve on a server's samples, once, and publish a version if it is better.

    A version is published if a drafter accepts more of the newest requests, beyond its 95 % interval. Draft KV that
    the server has cached stays valid.

    \b
    Example:
    whiflash learn /var/lib/whiflash --config smollm2-135m-instruct --url http://127.0.0.1:30000
    """
    from whiflash_sglang.learner.once import Learning, learn_once, status_of

    if status:
        report(_lines(status_of(directory), as_json), as_json)
        return
    if config is None:
        raise UsageError("--config is missing: name the configuration that the drafters were trained with")
    from whiflash_sglang.checkpoints.manifest import embedded_bundle
    from whiflash_sglang.cli.running import steer
    from whiflash_sglang.cli.train import readable_errors, resolve_config

    with readable_errors():
        settings = resolve_config(config)
        given = Learning(directory, bundle or embedded_bundle(), settings, tokens, judged, rate, replay)
        found = learn_once(given).facts()
    if url is not None and found["version"] is not None:
        state = steer(url.rstrip("/"), "/whiflash/drafters", {"version": found["version"]}, api_key)
        found["served"] = state["drafters"]["version"]
    report(_lines(found, as_json), as_json)


def _lines(found: dict[str, Any], as_json: bool) -> dict[str, Any]:
    """For a person: a line for each drafter."""
    if as_json or not found:
        return found
    lines = {key: value for key, value in found.items() if key != "drafters"}
    lines["seconds"] = f"{found['seconds']:.0f}"
    for name, gain in found["drafters"].items():
        interval = f"{gain['ratio']:.3f} [{gain['low']:.3f}, {gain['high']:.3f}]"
        lines[name] = f"{gain['before']:.2f} → {gain['after']:.2f} tokens a round, {interval}"
    return lines
