"""`whiflash serve`: `sglang serve` with the embedded bundle as default."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from whiflash_sglang.embedded.serving import STRICT_TOOLS, embedded_arguments
from whiflash_sglang.errors import ConfigError

MODEL = ("--model-path", "--model")


def server_arguments(arguments: list[str]) -> list[str]:
    """Fill in what the command line, or the file of its `--config`, leaves open: the embedded target and WHIFLASH.

    A model as first argument is taken as `sglang serve` takes it.

    Raises:
        ConfigError: the file of `--config` cannot be read.
    """
    given = _names(arguments)
    added = embedded_arguments(given) if is_embedded(arguments) else []
    if "--speculative-algorithm" not in given:
        added += ["--speculative-algorithm", "WHIFLASH"]
    return [*added, *_with_flags_only(arguments)]


def server_environment(arguments: list[str]) -> dict[str, str]:
    """Variables to set where the user did not: the embedded target writes valid arguments only under a grammar."""
    return STRICT_TOOLS if is_embedded(arguments) else {}


def is_embedded(arguments: list[str]) -> bool:
    """Whether command line and configuration file leave the target open."""
    # SGLang's parser takes unambiguous beginnings: `--model-p` is `--model-path`.
    return not any(
        name in MODEL or (name.startswith("--model-p") and MODEL[0].startswith(name))
        for name in _names(arguments)
    )


def _names(arguments: list[str]) -> set[str]:
    """Flags that are given, on the command line or in the file of `--config`."""
    flags = _with_flags_only(arguments)
    names = {argument.split("=", 1)[0] for argument in flags if argument.startswith("--")}
    if "--config" in flags:
        place = flags.index("--config") + 1
        if place == len(flags):
            raise ConfigError("--config needs a YAML file")
        names |= {f"--{key.replace('_', '-')}" for key in _configured(Path(flags[place]))}
    return names


def _with_flags_only(arguments: list[str]) -> list[str]:
    """`arguments` as SGLang's launcher takes them: the model behind a flag, `--config FILE` in two words."""
    if arguments and not arguments[0].startswith("-"):
        arguments = [MODEL[0], *arguments]
    flags = []
    for argument in arguments:
        flags += argument.split("=", 1) if argument.startswith("--config=") else [argument]
    return flags


def _configured(path: Path) -> list[str]:
    """Keys of SGLang's configuration file."""
    import yaml  # type: ignore[import-untyped]

    try:
        settings: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings or {}, dict):
        raise ConfigError(f"--config {path}: keys and values expected, such as `model-path: OWNER/NAME`")
    return [str(key) for key in settings or {}]


class ServeCommand(TyperCommand):
    """Its help also shows the flags that WHIFLASH adds to `sglang serve`."""

    def format_help(self, *arguments: Any) -> None:
        super().format_help(*arguments)
        from rich.console import Console
        from rich.padding import Padding

        from whiflash_sglang.flags import flags

        console = Console(highlight=False)
        console.print("Flags of WHIFLASH, beside those of `sglang serve`:\n", markup=False)
        for flag in flags():
            console.print(f"  {flag.name} {flag.takes}", markup=False, style="bold", soft_wrap=True)
            console.print(Padding(flag.meaning, (0, 0, 0, 6)), markup=False)


def register(app: typer.Typer) -> None:
    @app.command(
        cls=ServeCommand,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        options_metavar="[MODEL] [OPTIONS OF SGLANG SERVE]",
    )
    def serve(
        ctx: typer.Context,
        print_only: Annotated[
            bool, typer.Option("--print-command", help="Print the command, quoted for a shell, and exit.")
        ] = False,
    ) -> None:
        """Serve with WHIFLASH. Every option but these goes to `sglang serve` as it is.

        Without a model, here or in the file of --config, the embedded SmolLM2-135M-Instruct is served with the drafters
        shipped for it, with JSON kept compact and every tool's arguments held to their schema.

        Examples: whiflash serve --port 30000 |
        whiflash serve Qwen/Qwen3-8B --speculative-draft-model-path OWNER/BUNDLE --whiflash-router ar
        """
        command = [sys.executable, "-m", "sglang.launch_server", *server_arguments(ctx.args)]
        environment = {
            name: os.environ.get(name, value) for name, value in server_environment(ctx.args).items()
        }
        if print_only:
            variables = [f"{name}={value}" for name, value in environment.items()]
            typer.echo(shlex.join([*(["env", *variables] if variables else []), *command]))
            return
        # Replacing this process leaves signals, exit code and children to SGLang itself.
        os.execve(sys.executable, command, {**os.environ, **environment})
