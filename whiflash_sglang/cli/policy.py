"""`whiflash policy`: the policy of running servers, `none` among them, which stops drafting."""

from typing import Annotated

import typer

from whiflash_sglang.cli.options import (
    DEFAULT_URL,
    AdminKeyOption,
    JsonFlag,
    UrlOption,
    authorization,
    report,
)
from whiflash_sglang.config import RouterName
from whiflash_sglang.errors import WhiflashError

PATIENCE = 60.0
"""Seconds that a server may take to answer: it does between two steps of its scheduler."""


class ServerRefusedError(WhiflashError):
    """A server did not take a change, or cannot be asked; the message names it and says why."""


def change(url: str, router: str | None, api_key: str | None) -> str:
    """The policy in force on the server at `url`, after it was changed to `router` if there is one.

    Raises: ServerRefusedError.
    """
    import httpx

    headers = authorization(api_key)
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=PATIENCE) as client:
            if router is None:
                answer = client.get("/whiflash/state")
            else:
                answer = client.post("/whiflash/policy", json={"router": router})
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerRefusedError(f"{url} does not answer: {error}") from None
    if answer.status_code in (401, 403):
        raise ServerRefusedError(
            f"{url} wants its admin key: --api-key, or WHIFLASH_API_KEY in the environment"
        )
    if answer.status_code == 404:
        raise ServerRefusedError(f"{url} is no SGLang server with --speculative-algorithm WHIFLASH")
    try:
        found = answer.json()
        said = found["error"]["message"] if answer.status_code == 400 else found["policy"]
    except (ValueError, KeyError, TypeError):
        raise ServerRefusedError(f"{url} answers {answer.status_code}, not what it should") from None
    if answer.status_code == 400:
        raise ServerRefusedError(f"{url}: {said}")
    return str(said)


def register(app: typer.Typer) -> None:
    @app.command()
    def policy(
        router: Annotated[
            RouterName | None,
            typer.Argument(
                help="Policy from now on; none stops drafting. Without it, print the policy in force."
            ),
        ] = None,
        url: UrlOption = None,
        as_json: JsonFlag = False,
        api_key: AdminKeyOption = None,
    ) -> None:
        """Change the policy of running servers without a restart. Running requests continue under the new one.

        Every server is asked, even if another one failed. The exit code is then 1.

        \b
        Example:
        whiflash policy none --url http://127.0.0.1:30000
        """
        found, failed = {}, []
        for one in dict.fromkeys(url or [DEFAULT_URL]):
            try:
                found[one] = change(one.rstrip("/"), router, api_key)
            except ServerRefusedError as error:
                failed.append(str(error))
        if found:
            report(found, as_json)
        if failed:
            raise WhiflashError("; ".join(failed))
