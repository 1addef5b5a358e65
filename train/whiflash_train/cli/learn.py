"""`whiflash learn`: the drafters go on training on what a server kept of its requests."""

from pathlib import Path
from typing import Annotated, Any

import typer

from whiflash_sglang.checkpoints.manifest import MANIFEST, embedded_bundle
from whiflash_sglang.cli import TRAIN
from whiflash_sglang.cli.options import AdminKeyOption, JsonFlag, report
from whiflash_sglang.cli.running import steer
from whiflash_sglang.errors import ConfigError, ServerRefusedError, UsageError
from whiflash_sglang.files.jsonl import NOT_AS_WRITTEN


def register(app: typer.Typer, lab: typer.Typer) -> None:
    app.command(rich_help_panel=TRAIN)(learn)


def learn(
    directory: Annotated[Path, typer.Argument(help="Directory of the server's --whiflash-learn.")],
    config: Annotated[
        Path | None,
        typer.Option(help="How the drafters are trained, as for whiflash train: a file, or a shipped name."),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle that the server was started with. Default: the embedded one.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Most answer tokens of samples to learn from.")
    ] = 100_000,
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
    url: Annotated[
        str | None, typer.Option(help="Server that is switched to the version, if there is one.")
    ] = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help="Go on: learn whenever 16 new samples are there, and roll back what is worse."
        ),
    ] = False,
    share: Annotated[
        float | None,
        typer.Option(
            min=0.01, help="Share of a core's time to use. Default: as much as there is.", show_default=False
        ),
    ] = None,
    status: Annotated[
        bool, typer.Option("--status", help="Only report the last pass, and what waits for the next one.")
    ] = False,
    as_json: JsonFlag = False,
    api_key: AdminKeyOption = None,
) -> None:
    """Train the drafters that serve on a server's samples, and publish a version if it is better.

    A version is published if a drafter accepts more of the newest requests, beyond its 95 % interval. Draft KV that
    the server has cached stays valid.

    \b
    Example:
    whiflash learn /var/lib/whiflash --config smollm2-135m-instruct --url http://127.0.0.1:30000
    """
    if not directory.is_dir():
        raise ConfigError(
            f"{directory}: no such directory; start a server with --whiflash-learn {directory} first"
        )
    if bundle is not None and not (bundle / MANIFEST).is_file():
        raise ConfigError(f"--bundle {bundle} holds no {MANIFEST}")
    if status:
        from whiflash_train.learner.watch import progress_of

        report(_lines(progress_of(directory), as_json), as_json)
        return
    if config is None:
        raise UsageError("--config is missing: name the configuration that the drafters were trained with")
    from whiflash_train.cli.train import readable_errors, resolve_config

    with readable_errors() as told:
        settings = resolve_config(config)
        from whiflash_sglang.updates.versions import versions_of
        from whiflash_train.learner.once import Learning, Pace, learn_once

        server = None if url is None else LiveServer(url.rstrip("/"), api_key, versions_of(directory))
        learning = Learning(directory, bundle or embedded_bundle(), settings, tokens, judged, rate, replay)
        if watch:
            from whiflash_train.learner.guard import Guard
            from whiflash_train.learner.watch import Watch

            guard = None if server is None else Guard(server, directory)
            Watch(learning, guard, lambda fact: told(_lines(fact, as_json), as_json), share).run()
        outcome = learn_once(learning, Pace(share)).model_dump()
    if server is not None and outcome["version"] is not None:
        outcome["served"] = server.use(outcome["version"])["drafters"]["version"]
    report(_lines(outcome, as_json), as_json)


class LiveServer:
    """The one that is offered versions, those of a directory that it must have, too."""

    def __init__(self, url: str, api_key: str | None, versions: Path) -> None:
        self._url, self._api_key, self._versions = url, api_key, versions

    def state(self) -> dict[str, Any]:
        return self._checked(steer(self._url, "/whiflash/state", None, self._api_key))

    def use(self, version: int) -> dict[str, Any]:
        from whiflash_sglang.updates.versions import claims_of

        body = {"version": version, **claims_of(self._versions, version)}
        return self._checked(steer(self._url, "/whiflash/drafters", body, self._api_key))

    def _checked(self, state: dict[str, Any]) -> dict[str, Any]:
        if "drafters" not in state:
            raise ServerRefusedError(
                f"{self._url} was started without --whiflash-versions or --whiflash-learn"
            )
        return state


def _lines(facts: dict[str, Any], as_json: bool) -> dict[str, Any]:
    """A line for each drafter, for a person; facts of another release, which may have other keys, as they are."""
    lines = {key: value for key, value in facts.items() if key != "drafters"}
    try:
        lines["seconds"] = f"{facts['seconds']:.0f}"
        for name, gain in facts["drafters"].items():
            interval = f"{gain['ratio']:.3f} [{gain['low']:.3f}, {gain['high']:.3f}]"
            lines[name] = f"{gain['before']:.2f} → {gain['after']:.2f} tokens a round, {interval}"
    except NOT_AS_WRITTEN:
        return facts
    return facts if as_json else lines
