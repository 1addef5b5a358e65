"""`whiflash serve`: `sglang serve` with the embedded bundle as default."""

import os
import sys
from typing import Annotated

import typer


def server_arguments(arguments: list[str]) -> list[str]:
    """Fill in what the command line leaves open: the embedded target, WHIFLASH, and the CPU where there is no GPU."""
    from whiflash_sglang.platform import activate

    given = {argument.split("=", 1)[0] for argument in arguments}
    added: list[str] = []
    if not given & {"--model-path", "--model"}:
        from whiflash_sglang.embedded import ensure_target

        added += ["--model-path", str(ensure_target())]
        if "--served-model-name" not in given:
            added += ["--served-model-name", "smollm2-135m-instruct"]
    if "--speculative-algorithm" not in given:
        added += ["--speculative-algorithm", "WHIFLASH"]
    if "--device" not in given and activate() is not None:
        added += ["--device", "cpu"]
    return [*added, *arguments]


def register(app: typer.Typer) -> None:
    @app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def serve(
        ctx: typer.Context,
        print_only: Annotated[
            bool, typer.Option("--print-command", help="Print the sglang command and exit.")
        ] = False,
    ) -> None:
        """Serve with WHIFLASH. Every other option goes to `sglang serve` as it is.

        Without --model-path the embedded SmolLM2-135M-Instruct is served with the drafters shipped for it.

        Examples: whiflash serve --port 30000 |
        whiflash serve --model-path Qwen/Qwen3-8B --speculative-draft-model-path OWNER/BUNDLE --whiflash-router ar
        """
        command = [sys.executable, "-m", "sglang.launch_server", *server_arguments(ctx.args)]
        if print_only:
            typer.echo(" ".join(command))
            return
        # Replacing this process leaves signals, exit code and children to SGLang itself.
        os.execv(sys.executable, command)
