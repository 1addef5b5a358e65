"""Tenants, and the handles by which their samples are forgotten.

A tenant is all requests with the same cache salt and extra key, which SGLang's prefix cache treats as one already.
"""

import hashlib

from whiflash_sglang.errors import ConfigError

Tenant = bytes
"""SHA-256 of a tenant's keys, which are secrets and of any length."""

HANDLES = 2**63
"""Number of possible handles."""


def tenant_of(extra_key: str | None, cache_salt: str | None) -> Tenant | None:
    """Return the tenant of a request, from SGLang's two keys; None without a key."""
    if not extra_key and not cache_salt:
        return None
    parts = [(key or "").encode("utf-8", "surrogatepass") for key in (extra_key, cache_salt)]
    return hashlib.sha256(b"%d:" % len(parts[0]) + b"".join(parts)).digest()


def handle_of(tenant: Tenant) -> int:
    """Return 63 bits of a tenant's hash, for messages that carry only numbers. They suffice to forget it by."""
    return int.from_bytes(tenant[:8], "big") >> 1


_KEYS = ("cache_salt", "extra_key")


def parse_forget(body: dict[str, object]) -> int | None:
    """Return the handle of the tenant whose requests carried the keys in `body`; None for `{"all": true}`, which asks
    for all tenants.

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
        raise ConfigError("give cache_salt, extra_key or both, as the requests did; or only all: true")
    return None if tenant is None else handle_of(tenant)
