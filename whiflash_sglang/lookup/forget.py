"""The body of `POST /whiflash/forget`: whose remembered outputs to drop."""

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.lookup.memory import handle_of, tenant_of

_KEYS = ("cache_salt", "extra_key")
_SCOPES = ("agent", "block")


def parse_forget(body: dict[str, object]) -> int | None:
    """The handle of the tenant whose requests carried these keys, or of an agent's or a block's texts in it; None for
    everybody, which takes `{"all": true}` alone.

    Raises:
        ConfigError: naming the field that is wrong.
    """
    for name, value in body.items():
        if name not in (*_KEYS, *_SCOPES, "all"):
            raise ConfigError(f"{name!r} is unknown; known: all, {', '.join((*_KEYS, *_SCOPES))}")
        if not isinstance(value, bool if name == "all" else str | None):
            raise ConfigError(f"{name!r} must be {'true or false' if name == 'all' else 'a string'}")
    extra_key, cache_salt = (body.get(name) for name in ("extra_key", "cache_salt"))
    agent, block = (None if body.get(name) is None else str(body[name]) for name in _SCOPES)
    tenant = tenant_of(str(extra_key or ""), str(cache_salt or ""))
    whose = tenant is not None or agent is not None or block is not None
    if bool(body.get("all")) == whose or (tenant is None and whose):
        raise ConfigError(
            "give cache_salt, extra_key or both, as the requests did, with agent or block for a part of it; "
            "or all: true alone"
        )
    return None if tenant is None else handle_of(tenant, agent, block)
