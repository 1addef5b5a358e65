"""Who asks a server: which of a client's settings authenticate it, so that one key's answer is not another's."""

from __future__ import annotations

import hashlib
import os
import re
from typing import Any, Final

from openai import AsyncOpenAI, OpenAI

_SALT: Final = os.urandom(16)
_SECRET_WORDS: Final = frozenset(
    [
        "apikey",
        "auth",
        "authorization",
        "cookie",
        "credential",
        "jwt",
        "key",
        "organization",
        "password",
        "project",
        "secret",
        "token",
    ]
)
"""Words of the names of headers that authenticate: `Authorization`, `X-Api-Key`, `OpenAI-Organization`."""


def fingerprint(client: OpenAI | AsyncOpenAI, url: str) -> bytes:
    """Address and authentication as a digest, so that no secret is kept.

    The cookie jar is left out: balancers set new cookies as they please. So is a key that is made for every request:
    its maker stands for it. Two clients that differ only in their TLS certificates share an answer.
    """
    http: Any = client._client
    maker = getattr(client, "_api_key_provider", None)
    sent = {**http.headers, **client.default_headers, **client.default_query}
    secrets = {
        name.lower(): value for name, value in sent.items() if isinstance(value, str) and _authenticates(name)
    }
    if maker is not None:
        secrets.pop("authorization", None)
    key = client.api_key if maker is None else id(maker)
    identity = (url, key, sorted(secrets.items()), id(http.auth))
    return hashlib.blake2b(repr(identity).encode(), key=_SALT, digest_size=16).digest()


def _authenticates(name: str) -> bool:
    """Whether a header or query field may decide who asks. Others change from request to request, as request ids do."""
    return not _SECRET_WORDS.isdisjoint(re.split("[-_]", name.lower())) and name.lower() != "idempotency-key"
