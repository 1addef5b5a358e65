"""`whiflash proxy`: hints for agents that cannot use the SDK."""

from typing import Annotated

import typer

from whiflash_sglang.cli.options import DEFAULT_URL


def register(app: typer.Typer) -> None:
    @app.command()
    def proxy(
        upstream: Annotated[str, typer.Option(help="Root URL of the server, without /v1.")] = DEFAULT_URL,
        host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
        port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 30080,
        tenant: Annotated[
            str | None, typer.Option(help="Tenant of requests that name none.", show_default=False)
        ] = None,
        agent: Annotated[
            str | None, typer.Option(help="Agent of requests that name none.", show_default=False)
        ] = None,
        mib: Annotated[int, typer.Option("--longest-mib", min=1, help="Longest request, in MiB.")] = 64,
    ) -> None:
        """Pass requests on to a server with hints, for agents in other languages.

        OpenAI's and Anthropic's routes below /v1 get spans, agent, tenant, turn and predictions of files, if the server
        reads them. Answers pass byte for byte. Headers X-WhiFlash-Tenant, -Agent and -Session say who asks, or parts of
        the path: http://127.0.0.1:30080/agent=coder/v1. Keys pass through; nothing of a request is logged.

        \b
        Example:
        whiflash proxy --upstream http://127.0.0.1:30000 --agent coder
        """
        import uvicorn
        from whiflash_sdk.proxy import Proxy

        typer.echo(f"http://{host}:{port} passes requests on to {upstream}", err=True)
        application = Proxy(upstream, longest_body=mib * 2**20, tenant=tenant, agent=agent)
        uvicorn.run(
            application,
            host=host,
            port=port,
            access_log=False,
            log_level="warning",
            lifespan="on",
            server_header=False,  # the server's own pass
            date_header=False,
        )
