"""Askers: who asks a server for its capabilities, an OpenAI or Anthropic client or the HTTP request of any library.

Each asks with its own credentials, and has a digest of these, so that the answer for one key is not used for another.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from whiflash_sdk.flow import Flow
from whiflash_sdk.reading import read_json

_SALT: Final = os.urandom(16)
_SECRET_WORDS: Final = frozenset(
    {
        *("apikey", "auth", "authorization", "cookie", "credential", "jwt", "key", "organization"),
        *("password", "project", "secret", "token"),
    }
)
"""Words by which a header counts as authentication: `Authorization`, `X-Api-Key`, `OpenAI-Organization`."""
_OF_ONE_REQUEST: Final = re.compile(
    rb"connection|content-.*|accept.*|if-.*|range|expect|te|trailer|transfer-encoding|(?:x-)?idempotency-key|x-stainless-.*",
    re.IGNORECASE,
)
"""Headers that a question for capabilities does not copy from the request that needs the answer."""
_READABLE: Final = [(b"accept", b"application/json"), (b"accept-encoding", b"identity")]
_CLOSES: Final = {"connection": "close"}
"""Header that closes a question's connection: it would belong to one event loop, but a client may serve several."""
_MAKERS: Final = (
    *("_api_key_provider", "_azure_ad_token_provider", "_azure_ad_token"),  # of OpenAI's clients
    *("workload_identity", "_provider", "credentials"),  # of its third version, and of Anthropic's
)
"""Attributes from which a client makes its keys, which no header has before a request is sent."""


def base_classes(name: str) -> tuple[type, ...]:
    """Return the classes of this name in HTTPX and HTTPX 2, as far as these are imported."""
    return tuple(getattr(sys.modules[of], name) for of in ("httpx", "httpx2") if of in sys.modules)


def api_clients(*, asynchronous: bool) -> tuple[type, ...]:
    """Return the client classes that `wrap` takes, of `openai` and `anthropic` as far as these are imported."""
    prefix = "Async" if asynchronous else ""
    libraries = ((sys.modules.get("openai"), "OpenAI"), (sys.modules.get("anthropic"), "Anthropic"))
    return tuple(getattr(library, prefix + name) for library, name in libraries if library is not None)


class OfClient:
    """Asker for an OpenAI or Anthropic client.

    headers: of the call that asks, beside the client's own; any other type than a mapping has none. base: the URL
    before `/chat/completions` or `/messages`. timeout: of its requests, as HTTPX takes it.
    """

    def __init__(self, client: Any, headers: object = None) -> None:
        given = headers.items() if isinstance(headers, Mapping) else ()
        self._headers = {name: value for name, value in given if not _OF_ONE_REQUEST.fullmatch(name.encode())}
        self._client = client
        openai = sys.modules.get("openai")
        is_openai = openai is not None and isinstance(client, openai.OpenAI | openai.AsyncOpenAI)
        self._library = sys.modules["openai" if is_openai else "anthropic"]
        self.base = str(client.base_url).rstrip("/") + ("" if is_openai else "/v1")
        self.timeout = client.timeout

    def ask(self, url: str, limits: Mapping[str, float], body: object = None) -> Flow[Any]:
        """GET `url`, or POST `body` to it, and return the parsed JSON of the answer. Redirects are not followed, since
        their targets would receive the keys.

        limits: seconds by phase. Raises: the client's errors.
        """
        options = {"headers": {**self._headers, **_CLOSES}, "max_retries": 0, "follow_redirects": False}
        options["timeout"] = self._library.Timeout(**limits)
        if body is None:
            return (yield self._client.get(url, cast_to=object, options=options))
        return (yield self._client.post(url, cast_to=object, body=body, options=options))

    def fingerprint(self, url: str) -> bytes:
        """Return a digest of address and authentication; a digest, so that no secret is stored.

        It leaves out the cookie jar, since balancers set new cookies at any time. For keys that are made for every
        request it has their maker. Clients that differ only in their TLS certificates have equal digests.
        """
        client = self._client
        http: Any = client._client
        makers = [getattr(client, name, None) for name in _MAKERS]
        key = client.api_key
        sent = {**http.headers, **client.default_headers, **client.default_query}
        if makers[0] is not None:
            key, sent = None, {name: value for name, value in sent.items() if name.lower() != "authorization"}
        made_from = [maker if isinstance(maker, str) else id(maker) for maker in makers]
        return _digest(url, {**sent, **self._headers}, key, made_from, id(http.auth))


class OfRequest:
    """Sends the SDK's own questions to the server of one HTTP request, with that request's client and headers. Does not
    keep its body. Has the members of `OfClient`."""

    def __init__(self, http: Any, request: Any, base: str) -> None:
        self._http, self._request, self.base = http, type(request), base
        self._url, self._headers = request.url, request.headers
        self.timeout = request.extensions.get("timeout")

    def ask(self, url: str, limits: Mapping[str, float], body: object = None) -> Flow[Any]:
        headers = [(name, value) for name, value in self._headers.raw if not _OF_ONE_REQUEST.fullmatch(name)]
        posted: dict[str, Any] = {} if body is None else {"json": body}
        asked = self._request(
            "POST" if posted else "GET",
            self._url.copy_with(path=urlsplit(url).path),
            headers=[*headers, *_READABLE, *_CLOSES.items()],
            extensions={"timeout": dict(limits)},
            **posted,
        )
        answer = yield self._http.send(asked, follow_redirects=False)
        answer.raise_for_status()  # not chained: None in older HTTPX
        return read_json(answer.content) if answer.content else None

    def fingerprint(self, url: str) -> bytes:
        """Return a digest of address and authentication, without cookies, which balancers replace at any time."""
        sent = {**self._headers, **self._url.params}
        sent.pop("cookie", None)
        return _digest(url, sent, None, id(self._http.auth))


Asker = OfClient | OfRequest


def _digest(url: str, sent: Mapping[str, Any], *more: object) -> bytes:
    secrets = sorted(
        (name.lower(), value) for name, value in sent.items() if isinstance(value, str) and _authenticates(name)
    )
    return hashlib.blake2b(repr((url, secrets, *more)).encode(), key=_SALT, digest_size=16).digest()


def _authenticates(name: str) -> bool:
    """Whether a header or query field may identify the caller. Others, such as request ids, change with requests."""
    return not _SECRET_WORDS.isdisjoint(re.split("[-_]", name.lower())) and "idempotency" not in name.lower()
