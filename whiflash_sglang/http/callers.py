"""Read the headers that name a sender: `X-WhiFlash-Agent`, a session's id and, if an operator trusts it,
`X-WhiFlash-Tenant`.

A gateway sets them for clients in any language. The tenant goes into SGLang's internal request (`reader.take_up`),
which every route makes, so it does not depend on the form or encoding of a body, or on the HTTP method.
"""

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from whiflash_sdk.hints import MAX_NAME_CHARS

from whiflash_sglang.spans.hints import HintError

AGENT, TENANT = "X-WhiFlash-Agent", "X-WhiFlash-Tenant"
SESSIONS = ("X-WhiFlash-Session", "x-dynamo-session-id", "x-claude-code-session-id", "X-Session-ID", "session-id")
"""Headers that name a session, for requests whose body names none; the first that is there counts."""
SESSION_CHARS = 256
"""Most characters of a session's id in a header; longer ones are not read."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The agent, the tenant and the session that a request's headers name; None without the header. is_probe: the
    request came over a route of health checks, which needs no tenant."""

    agent: str | None = None
    tenant: str | None = None
    is_probe: bool = False
    session: str | None = None

    def check_tenant(self, *, trusted: bool) -> None:
        """Check that the header names the tenant if this server trusts it, and that it is absent otherwise.

        Raises:
            HintError: a trusted header is missing, or an untrusted one is there.
        """
        if self.is_probe:
            return
        if trusted and self.tenant is None:
            why = "is missing, and this server (--whiflash-trust-tenant-header on) answers no request without it"
            raise HintError(TENANT, f"{why}; let the gateway set it")
        if not trusted and self.tenant is not None:
            why = "is not trusted by this server; start it with --whiflash-trust-tenant-header on behind a gateway"
            raise HintError(TENANT, f"{why}, or leave the header out and send cache_salt")


NOBODY = Caller()
CALLER: ContextVar[Caller] = ContextVar("whiflash_caller", default=NOBODY)
"""The caller of the current request; NOBODY over gRPC and in an `Engine`, which have no headers."""


def caller_of(headers: Iterable[tuple[bytes, bytes]], *, is_probe: bool = False) -> Caller:
    """Return the caller that an ASGI scope's headers name.

    Raises:
        HintError: a name is empty, no UTF-8, too long, or there twice with two values.
    """
    lines = [(name.lower(), value) for name, value in headers]
    agent = _name(lines, AGENT)
    if agent is not None and len(agent) > MAX_NAME_CHARS:
        raise HintError(AGENT, f"has {len(agent)} characters; give at most {MAX_NAME_CHARS}")
    return Caller(agent, _name(lines, TENANT), is_probe, _session(lines))


def _session(lines: list[tuple[bytes, bytes]]) -> str | None:
    """Return the session that the headers name. An unusable value counts as none: SGLang serves such a request, too."""
    values = dict(reversed(lines))
    found = (values.get(name.lower().encode(), b"").decode(errors="replace") for name in SESSIONS)
    return next((name for name in found if 0 < len(name) <= SESSION_CHARS), None)


def _name(lines: list[tuple[bytes, bytes]], header: str) -> str | None:
    values = {value for name, value in lines if name == header.lower().encode()}
    if len(values) > 1:
        raise HintError(header, "is there twice with different values; send it once")
    for value in values:
        try:
            name = value.decode()
        except UnicodeDecodeError:
            raise HintError(header, f"is {value!r:.60}, which is not UTF-8; encode the name as UTF-8") from None
        if not name:
            raise HintError(header, "is empty; give a name, or leave the header out")
        return name
    return None


def drop_trailers() -> None:
    """Let uvicorn with httptools drop trailers, as it does with h11. Idempotent.

    Otherwise uvicorn appends them to the request's headers, so a client could name a tenant after its body.
    """
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return
    append = HttpToolsProtocol.on_header
    if append.__module__ == __name__:
        return

    def on_header(self: Any, name: bytes, value: bytes) -> None:
        if "method" not in self.scope:  # the scope has a method once the head is complete
            append(self, name, value)

    setattr(HttpToolsProtocol, "on_header", on_header)  # noqa: B010
