"""Tenants: who shares what was learned of a text, and how one is forgotten.

A tenant is whoever shares SGLang's cache salt and extra key: what the prefix cache already treats as one.
"""

import hashlib

from whiflash_sglang.errors import ConfigError

Tenant = bytes
"""SHA-256 of the keys: they are secrets, and of any length."""

HANDLES = 2**63
"""How many handles there are."""


def tenant_of(extra_key: str | None, cache_salt: str | None) -> Tenant | None:
    """The tenant that shares text with a request, from SGLang's two keys; None: nobody."""
    if not extra_key and not cache_salt:
        return None
    parts = [(key or "").encode("utf-8", "surrogatepass") for key in (extra_key, cache_salt)]
    return hashlib.sha256(b"%d:" % len(parts[0]) + b"".join(parts)).digest()


def handle_of(tenant: Tenant) -> int:
    """A tenant as a number of 63 bits, for messages that carry numbers only; good enough to forget by."""
    return int.from_bytes(tenant[:8], "big") >> 1


_KEYS = ("cache_salt", "extra_key")
_PARTS = ("agent", "block")


def parse_forget(body: dict[str, object]) -> int | None:
    """The handle of the tenant whose requests carried these keys; None for everybody, which takes only
    `{"all": true}`.

    Raises:
        ConfigError: naming the field that is wrong.
    """
    for name, value in body.items():
        if name in _PARTS:
            raise ConfigError(f"{name!r}: a tenant is forgotten as a whole; leave it out")
        if name not in (*_KEYS, "all"):
            raise ConfigError(f"{name!r} is unknown; known: all, {', '.join(_KEYS)}")
        if not isinstance(value, bool if name == "all" else str | None):
            raise ConfigError(f"{name!r} must be {'true or false' if name == 'all' else 'a string'}")
    extra_key, cache_salt = (body.get(name) for name in ("extra_key", "cache_salt"))
    tenant = tenant_of(str(extra_key or ""), str(cache_salt or ""))
    if bool(body.get("all")) == (tenant is not None):
        raise ConfigError("give cache_salt, extra_key or both, as the requests did; or only all: true")
    return None if tenant is None else handle_of(tenant)
