"""Recent outputs of a tenant, to copy from in its next request. Off unless the server is given memory for it.

A tenant is whoever shares SGLang's cache salt and extra key: what the prefix cache already treats as one. Only
outputs of the same tenant are ever searched, so neither a proposal nor the time that it saves reveals anything of
another tenant's text. A request with neither key reads and leaves nothing.

Inside a tenant every scope's texts (`lookup.scopes`) are kept apart, in two generations. When the younger is full or
half as old as texts may get, it becomes the older one, and what was the older one is dropped: forgetting is constant
work.
"""

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import nlargest
from operator import itemgetter
from typing import Any

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.lookup.index import GAP, SuffixIndex
from whiflash_sglang.lookup.scopes import WHOLE, Scope

Tenant = bytes
"""SHA-256 of the keys: they are secrets, and of any length."""

TENANT_SHARE = 4
"""One generation of a scope takes this fraction of the memory at most, so that one tenant never holds all of it."""

SCOPES = 32
"""Scopes of one tenant that texts are kept of; the one used least recently makes room."""

SEARCHED = 3
"""Scopes that one search looks into, the nearest ones."""

SHOWN = 64
"""Scopes that `held` lists one by one: those that take most."""

TOKEN_BYTES = 32
"""An index of n tokens takes less than this for each, and `ENTRY_BYTES`: 12 of arrays, up to 16 of tables, slack."""

ENTRY_BYTES = 4096
"""Bytes that a scope takes besides: two generations' smallest tables, objects, its place in the dictionary."""

SWEEPS = 16
"""Times that all tenants are looked through for old texts while one text ages."""


HANDLES = 2**63
"""How many handles there are."""


def tenant_of(extra_key: str | None, cache_salt: str | None) -> Tenant | None:
    """The tenant that shares text with a request, from SGLang's two keys; None: nobody."""
    if not extra_key and not cache_salt:
        return None
    parts = [(part or "").encode("utf-8", "surrogatepass") for part in (extra_key, cache_salt)]
    return hashlib.sha256(b"%d:" % len(parts[0]) + b"".join(parts)).digest()


def handle_of(tenant: Tenant, agent: str | None = None, block: str | None = None) -> int:
    """A tenant, or an agent's or a block's texts in it, as a number of 63 bits, for messages that carry numbers only;
    good enough to forget by.
    """
    if agent is not None or block is not None:
        tenant = hashlib.sha256(tenant + json.dumps([agent, block]).encode()).digest()
    return int.from_bytes(tenant[:8], "big") >> 1


def handles_of(tenant: Tenant, agent: str | None, blocks: Iterable[str | None]) -> set[int]:
    """The names of texts of this tenant, this agent and one of these blocks."""
    return {handle_of(tenant, who, block) for who in (None, agent) for block in (None, *blocks)}


def nameless(held: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes that scopes hold (`TenantMemory.held`), by a digest of their names."""
    return {hashlib.sha256(name.encode()).hexdigest()[:12]: sums for name, sums in held.items()}


class _Texts:
    """One scope's two generations. began: when the first text of each came."""

    __slots__ = ("began", "older", "older_began", "young")

    def __init__(self, now: float) -> None:
        self.young, self.began = SuffixIndex(growing=False), now
        self.older, self.older_began = SuffixIndex(growing=False), now

    @property
    def nbytes(self) -> int:
        return ENTRY_BYTES + self.young.nbytes + self.older.nbytes

    @property
    def empty(self) -> bool:
        return not len(self.young) and not len(self.older)

    @property
    def tokens(self) -> int:
        """Tokens of both, gaps between texts included."""
        return len(self.young) + len(self.older)

    def turn(self, now: float) -> None:
        """The younger generation becomes the older one."""
        self.older, self.older_began = self.young, self.began
        self.young, self.began = SuffixIndex(growing=False), now

    def is_due(self, now: float, limit: float) -> bool:
        """Whether `age` has something to do."""
        turns = len(self.young) and now - self.began >= limit / 2
        return bool(turns or (len(self.older) and now - self.older_began >= limit))

    def age(self, now: float, limit: float) -> None:
        """Drop what is `limit` seconds old."""
        if len(self.young) and now - self.began >= limit / 2:
            self.turn(now)
        if now - self.older_began >= limit:
            self.older = SuffixIndex(growing=False)


class TenantMemory:
    """Outputs of all tenants, within `limit` bytes; none is proposed once it is `max_age` seconds old.

    If space is short, the tenant whose texts were used least recently loses them, scope by scope.

    Args:
        limit: bytes, with what the arrays hold in reserve; at least 64 KiB. max_age: seconds.
        clock: seconds that never run backwards.
    """

    def __init__(self, limit: int, max_age: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._max_age, self._clock = limit, max_age, clock
        self._longest = (limit // TENANT_SHARE) // TOKEN_BYTES - 1
        self._tenants: OrderedDict[Tenant, OrderedDict[Scope, _Texts]] = OrderedDict()
        self._next_sweep = clock()
        self.nbytes = 0

    def __len__(self) -> int:
        """Tenants that something is remembered of."""
        return len(self._tenants)

    def remember(self, tenant: Tenant, output: Sequence[int], scope: Scope = WHOLE) -> None:
        """Keep output tokens of a finished request; of a very long text, the end."""
        now = self._clock()
        self._sweep(now)
        kept = output[-self._longest :]
        texts = self._take(tenant, scope) or _Texts(now)
        texts.age(now, self._max_age)
        if len(texts.young) + len(kept) + 1 > self._longest:
            texts.turn(now)
        if not len(texts.young):
            texts.began = now
        most = 2 * ENTRY_BYTES + texts.older.nbytes + (len(texts.young) + len(kept) + 1) * TOKEN_BYTES
        self._make_room(tenant, most)
        texts.young.extend((*kept, GAP))
        self._put(tenant, scope, texts)

    def texts(self, tenant: Tenant, scope: Scope = WHOLE) -> Sequence[SuffixIndex]:
        """Texts that the tenant's requests may copy from: the nearest scopes' first, of each the younger ones first."""
        scopes = self._tenants.get(tenant)
        if scopes is None:
            return ()
        nearest = list(reversed(scopes))  # of equally near ones those that were used last
        if len(nearest) > 1:
            nearest = sorted(nearest, key=scope.distance)[:SEARCHED]
        found: list[SuffixIndex] = []
        now = self._clock()
        for near in reversed(nearest):
            texts = scopes[near]
            if texts.is_due(now, self._max_age):
                self._age(tenant, near, now)
            if not texts.empty:
                scopes.move_to_end(near)
                found[:0] = texts.young, texts.older
        if found:
            self._tenants.move_to_end(tenant)
        return found

    def forget(self, handle: int | None = None) -> None:
        """Drop a tenant's texts, those of an agent or a block in it, or everybody's."""
        for tenant, scopes in list(self._tenants.items()):
            for scope in list(scopes):
                if handle is None or handle in handles_of(tenant, scope.agent, [scope.block]):
                    self._take(tenant, scope)

    def held(self) -> dict[str, dict[str, int]]:
        """Bytes and tokens of the scopes that take most, by name: tenant's digest, agent, query, block, as JSON."""
        found = (
            (texts.nbytes, tenant, scope, texts)
            for tenant, scopes in self._tenants.items()
            for scope, texts in scopes.items()
        )
        return {
            json.dumps([tenant.hex()[:12], *scope]): {"bytes": size, "tokens": texts.tokens}
            for size, tenant, scope, texts in nlargest(SHOWN, found, key=itemgetter(0))
        }

    def _make_room(self, tenant: Tenant, most: int) -> None:
        """For `most` bytes more of a tenant: of its other scopes, then of who was not here for longest."""
        scopes = self._tenants.get(tenant) or OrderedDict[Scope, _Texts]()
        while scopes and (
            len(scopes) >= SCOPES or most + sum(own.nbytes for own in scopes.values()) > self._limit // 2
        ):
            self._take(tenant, next(iter(scopes)))
        while self._tenants and self.nbytes + most > self._limit:
            first = next(iter(self._tenants))
            self._take(first, next(iter(self._tenants[first])))

    def _sweep(self, now: float) -> None:
        """Free old texts of tenants that no longer come, now and then."""
        if now < self._next_sweep:
            return
        self._next_sweep = now + self._max_age / SWEEPS
        for tenant, scopes in list(self._tenants.items()):
            for scope in list(scopes):
                self._age(tenant, scope, now)

    def _age(self, tenant: Tenant, scope: Scope, now: float) -> None:
        """Drop what is old of a scope, and the scope where nothing is left."""
        texts = self._tenants[tenant][scope]
        before = texts.nbytes
        texts.age(now, self._max_age)
        self.nbytes += texts.nbytes - before
        if texts.empty:
            self._take(tenant, scope)

    def _take(self, tenant: Tenant, scope: Scope) -> _Texts | None:
        scopes = self._tenants.get(tenant)
        texts = scopes.pop(scope, None) if scopes is not None else None
        if texts is not None:
            self.nbytes -= texts.nbytes
            if not scopes:
                del self._tenants[tenant]
        return texts

    def _put(self, tenant: Tenant, scope: Scope, texts: _Texts) -> None:
        """Enter a scope as the most recently used, of its tenant and with it of all."""
        scopes = self._tenants.setdefault(tenant, OrderedDict())
        self._tenants.move_to_end(tenant)
        scopes[scope] = texts
        self.nbytes += texts.nbytes


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
            "or only all: true"
        )
    return None if tenant is None else handle_of(tenant, agent, block)
