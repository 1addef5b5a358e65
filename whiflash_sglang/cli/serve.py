"""`whiflash serve`: `sglang serve` with the embedded bundle as default."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from whiflash_sglang.checkpoints.manifest import embedded_bundle
from whiflash_sglang.cli import SERVE, elsewhere
from whiflash_sglang.cli.serve_line import ALGORITHM, DRAFT, HOST, MODEL, PORT, ServeLine
from whiflash_sglang.embedded import STRICT_TOOLS, embedded_arguments, ensure_target, target_path
from whiflash_sglang.engine.supported import installed
from whiflash_sglang.errors import ConfigError

LANGUAGE_MODEL = ("--model-type", "llm")
"""Argument that keeps `sglang serve` from asking the hub whether the model is a diffusion model."""


def server_arguments(arguments: list[str]) -> list[str]:
    """Return the arguments for `sglang serve`. The embedded target and WHIFLASH are added if neither the command line
    nor the file of its `--config` names others. A model as first argument is read as `sglang serve` reads it.

    Raises:
        ConfigError: the file of `--config` cannot be read.
    """
    line = ServeLine.read(arguments)
    names = {*line.values}
    added = embedded_arguments(names) if line.is_embedded else []
    if ALGORITHM not in names:
        added += [ALGORITHM, "WHIFLASH"]
    if line.is_embedded and DRAFT not in names and line.is_ours:
        added += [DRAFT, str(embedded_bundle())]
    if line.line.keys().isdisjoint(MODEL):
        # `sglang serve` looks for the model on the command line only.
        added += [word for key in MODEL if key in line.file for word in (MODEL[0], str(line.file[key]))]
    return [*added, *line.flags]


def _url(line: ServeLine) -> str:
    """Return the address at which the server will answer."""
    values = line.values
    host = str(values.get("--host") or HOST)
    host = HOST if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http{'s' if values.get('--ssl-certfile') else ''}://{host}:{values.get('--port') or PORT}"


KEEPING = {
    "--enable-session-radix-cache": "Evict prompts of open sessions last: the SDK's Session, or a header such as "
    "X-WhiFlash-Session, names one.",
    "--radix-eviction-policy POLICY": "Order of eviction: lru, or tlru, which keeps enough of each prompt for a quick "
    "first token.",
    "--enable-hierarchical-cache": "Copy evicted prompts to host memory, with drafters' KV; --hicache-ratio 2 holds "
    "twice the device's.",
}
"""Flags of SGLang's that keep agents' prompts cached between their turns."""


class ServeCommand(TyperCommand):
    """Command whose help also shows the flags that WHIFLASH adds to `sglang serve`."""

    def format_help(self, *arguments: Any) -> None:
        super().format_help(*arguments)
        from rich.console import Console
        from rich.padding import Padding

        from whiflash_sglang.settings.flags import flags

        console = Console(highlight=False)
        console.print("Flags of WHIFLASH, beside those of `sglang serve`:\n", markup=False)
        ours = {f"{name} {takes}": meaning for name, takes, meaning in flags()}
        for title, told in (("", ours), ("\nFlags of `sglang serve` that keep agents' prompts cached:\n", KEEPING)):
            console.print(title, markup=False, end="\n" if title else "")
            for name, meaning in told.items():
                console.print(f"  {name}", markup=False, style="bold", soft_wrap=True)
                console.print(Padding(meaning, (0, 0, 0, 6)), markup=False)


def serve(
    ctx: typer.Context,
    print_only: Annotated[
        bool, typer.Option("--print-command", help="Print the command, quoted for a shell, and exit.")
    ] = False,
) -> None:
    """Serve with WHIFLASH. All other options go to `sglang serve` unchanged.

    Without a model, here or in the file of --config, it serves the embedded SmolLM2-135M-Instruct with its
    drafters, compact JSON, and tools held to their schemas.

    \b
    Examples:
    whiflash serve --port 30000
    whiflash serve Qwen/Qwen3-8B --speculative-draft-model-path OWNER/BUNDLE --whiflash-router ar
    """
    line = ServeLine.read(ctx.args)
    line.check()
    if installed() is None:
        raise ConfigError(f"SGLang is not installed here: {elsewhere.WHOLE}")
    url = _url(line)
    # `sglang` is installed in the same environment as this command.
    command = [str(Path(sys.executable).with_name("sglang")), "serve", *LANGUAGE_MODEL, *server_arguments(ctx.args)]
    # The embedded target needs a grammar for valid tool arguments.
    added = STRICT_TOOLS if line.is_embedded else {}
    environment = {name: os.environ.get(name, value) for name, value in added.items()}
    if print_only:
        variables = [f"{name}={value}" for name, value in environment.items()]
        typer.echo(shlex.join([*(["env", *variables] if variables else []), *command]))
        if line.is_embedded and not target_path().exists():
            typer.echo("whiflash: the model is not there yet: `whiflash serve` downloads and converts it", err=True)
        return
    if line.is_embedded:
        ensure_target()
    typer.echo(
        f"whiflash: will serve at {url}, after about a minute and any download. Then, in another shell: "
        f"`whiflash top --url {url}` watches it, `whiflash policy none --url {url}` stops drafting",
        err=True,
    )
    # Replacing this process leaves signals, exit code and children to SGLang itself.
    os.execve(command[0], command, {**os.environ, **environment})


def register(app: typer.Typer, lab: typer.Typer) -> None:
    app.command(
        cls=ServeCommand,
        rich_help_panel=SERVE,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        options_metavar="[MODEL] [OPTIONS OF SGLANG SERVE]",
    )(serve)
