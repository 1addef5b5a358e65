"""`whiflash serve`: `sglang serve` with the embedded bundle as default."""

import os
import sys
from typing import Annotated

import typer

COMPACT_JSON = "--constrained-json-disable-any-whitespace"
STRICT_TOOLS = {"SGLANG_TOOL_STRICT_LEVEL": "2"}


def server_arguments(arguments: list[str]) -> list[str]:
    """Fill in what the command line leaves open: the embedded target, WHIFLASH, and the CPU where there is no GPU."""
    from whiflash_sglang.platform import activate

    given = _names(arguments)
    added: list[str] = []
    if is_embedded(arguments):
        from whiflash_sglang.embedded import ensure_target

        added += ["--model-path", str(ensure_target())]
        if "--served-model-name" not in given:
            added += ["--served-model-name", "smollm2-135m-instruct"]
        if not any(name.startswith("--constrained-json") for name in given):
            added.append(
                COMPACT_JSON
            )  # So small a model goes on with whitespace wherever a grammar allows it.
    if "--speculative-algorithm" not in given:
        added += ["--speculative-algorithm", "WHIFLASH"]
    if "--device" not in given and activate() is not None:
        added += ["--device", "cpu"]
    return [*added, *arguments]


def server_environment(arguments: list[str]) -> dict[str, str]:
    """Variables to set where the user did not: the embedded target writes valid arguments only under a grammar."""
    return STRICT_TOOLS if is_embedded(arguments) else {}


def is_embedded(arguments: list[str]) -> bool:
    """Whether the command line leaves the target open."""
    return not _names(arguments) & {"--model-path", "--model"}


def _names(arguments: list[str]) -> set[str]:
    return {argument.split("=", 1)[0] for argument in arguments}


def register(app: typer.Typer) -> None:
    @app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def serve(
        ctx: typer.Context,
        print_only: Annotated[
            bool, typer.Option("--print-command", help="Print the sglang command and exit.")
        ] = False,
    ) -> None:
        """Serve with WHIFLASH. Every other option goes to `sglang serve` as it is.

        Without --model-path the embedded SmolLM2-135M-Instruct is served with the drafters shipped for it, with JSON
        kept compact and every tool's arguments held to their schema.

        Examples: whiflash serve --port 30000 |
        whiflash serve --model-path Qwen/Qwen3-8B --speculative-draft-model-path OWNER/BUNDLE --whiflash-router ar
        """
        command = [sys.executable, "-m", "sglang.launch_server", *server_arguments(ctx.args)]
        environment = {
            name: os.environ.get(name, value) for name, value in server_environment(ctx.args).items()
        }
        if print_only:
            typer.echo(" ".join([*(f"{name}={value}" for name, value in environment.items()), *command]))
            return
        # Replacing this process leaves signals, exit code and children to SGLang itself.
        os.execve(sys.executable, command, {**os.environ, **environment})
