"""Keep the sessions of one tenant apart from another's (`--enable-session-radix-cache`).

SGLang's scheduler knows a session by its id alone, so whoever guesses an id could close the session, or hold KV for it.
The scheduler gets an id that begins with a hash of the tenant, since SGLang logs it. No client can give one like it.
"""

from collections.abc import Mapping
from typing import Any
from zlib import crc32

from sglang.srt.runtime_context import num_dp_ranks_of

from whiflash_sglang.copying.tenants import tenant_of
from whiflash_sglang.engine.scheduler.session_tree import MARK
from whiflash_sglang.http.callers import Caller
from whiflash_sglang.spans.hints import HintError

OPEN, CLOSE = "/open_session", "/close_session"
"""SGLang's routes that take a session's id."""


def serves_sessions(server_args: Any) -> bool:
    """Whether a server keeps the prompts of open sessions longest. It needs the prefix cache for that."""
    return bool(server_args.enable_session_radix_cache and not server_args.disable_radix_cache)


def scope(obj: Any, header: str | None, server_args: Any) -> None:
    """Give SGLang's internal request the scheduler's id of its session, and the replica that holds the session's KV,
    unless it names one. header: the id in the headers, which a body's id overrules.

    Raises:
        HintError: the id has the character that separates tenants.
    """
    given = getattr(obj, "session_id", None)
    if given is None and getattr(obj, "session_params", None) is None:
        given = header
    if isinstance(given, str) and given:  # SGLang refuses other types
        obj.session_id = _scoped(given, vars(obj))
        replicas = num_dp_ranks_of(server_args)  # servers with disaggregation must agree on one, and choose themselves
        if replicas > 1 and obj.routed_dp_rank is None and server_args.disaggregation_mode == "null":
            obj.routed_dp_rank = crc32(obj.session_id.encode(errors="surrogatepass")) % replicas


def scoped_body(path: str, body: Mapping[str, Any], caller: Caller, *, trusted: bool) -> Mapping[str, Any]:
    """Return the body of a request to close a session with the scheduler's id; of one to open a session, as it is.

    trusted: whether the header names the tenant, and no field of the body. Raises: HintError as `scope` does.
    """
    if not isinstance(body.get("session_id"), str):  # SGLang refuses it, or names the session itself
        return body
    if path == CLOSE:
        caller.check_tenant(trusted=trusted)
    scoped = _scoped(body["session_id"], {"cache_salt": caller.tenant} if trusted else body)
    return {"session_id": scoped} if path == CLOSE else body


def _scoped(session: str, keys: Mapping[str, Any]) -> str:
    """Return the scheduler's id of a session. keys: fields of a request, which may name its tenant."""
    if MARK in session:
        raise HintError("session_id", f"has the control character {MARK!r}; leave it out")
    tenant = tenant_of(*(str(keys.get(name) or "") for name in ("extra_key", "cache_salt"))) or b""
    return f"{tenant.hex()}{MARK}{session}"
