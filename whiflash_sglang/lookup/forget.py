"""The body of `POST /whiflash/forget`: whose remembered outputs to drop."""

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.lookup.memory import Tenant, tenant_of

_KEYS = ("cache_salt", "extra_key")


def parse_forget(body: dict[str, object]) -> Tenant | None:
    """The tenant whose requests carried these keys; None for everybody, which takes `{"all": true}` alone.

    Raises:
        ConfigError: naming the field that is wrong.
    """
    for name, value in body.items():
        if name not in (*_KEYS, "all"):
            raise ConfigError(f"{name!r} is unknown; known: all, {', '.join(_KEYS)}")
        if not isinstance(value, bool if name == "all" else str | None):
            raise ConfigError(f"{name!r} must be {'true or false' if name == 'all' else 'a string'}")
    extra_key, cache_salt = (body.get(name) for name in ("extra_key", "cache_salt"))
    tenant = tenant_of(str(extra_key or ""), str(cache_salt or ""))
    if bool(body.get("all")) == (tenant is not None):
        raise ConfigError("give cache_salt, extra_key or both, as the requests did; or all: true alone")
    return tenant
