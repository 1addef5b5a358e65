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
            str | None, typer.Option(help="Tenant of requests without one.", show_default=False)
        ] = None,
        agent: Annotated[
            str | None, typer.Option(help="Agent of requests without one.", show_default=False)
        ] = None,
        mib: Annotated[int, typer.Option("--longest-mib", min=1, help="Longest request, in MiB.")] = 64,
    ) -> None:
        """Add hints to requests on their way to a server, for agents in other languages.

        Requests below /v1 get spans, agent, tenant, turn and predictions of files. Answers pass byte for byte. Name the
        caller with the headers X-WhiFlash-Tenant, -Agent and -Session, or in the path:
        http://127.0.0.1:30080/agent=coder/v1. Keys pass through; requests are not logged.

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
