"""Recent outputs of a tenant, to copy from in its next request. Off unless the server is given memory for it.

A tenant is whoever shares SGLang's cache salt and extra key: what the prefix cache already treats as one. Only
outputs of the same tenant are ever searched, so neither a proposal nor the time that it saves reveals anything of
another tenant's text. A request with neither key reads and leaves nothing.

A tenant's texts are kept in two generations. When the younger is full or half as old as texts may get, it becomes the
older one, and what was the older one is dropped: forgetting is constant work.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.lookup.index import GAP, SuffixIndex

Tenant = bytes
"""SHA-256 of the keys: they are secrets, and of any length."""

TENANT_SHARE = 4
"""One generation takes this fraction of the memory at most, so that one tenant never holds all of it."""

TOKEN_BYTES = 32
"""An index of n tokens takes less than this for each, and `ENTRY_BYTES`: 12 of arrays, up to 16 of tables, slack."""

ENTRY_BYTES = 4096
"""Bytes that a tenant takes besides: two generations' smallest tables, objects, its place in the dictionary."""

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


def handle_of(tenant: Tenant) -> int:
    """A tenant as a number of 63 bits, for messages that carry numbers only; good enough to forget by."""
    return int.from_bytes(tenant[:8], "big") >> 1


class _Texts:
    """One tenant's two generations. began: when the first text of each came."""

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

    If space is short, the tenant whose texts were used least recently loses them.

    Args:
        limit: bytes, with what the arrays hold in reserve; at least 64 KiB. max_age: seconds.
        clock: seconds that never run backwards.
    """

    def __init__(self, limit: int, max_age: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._max_age, self._clock = limit, max_age, clock
        self._longest = (limit // TENANT_SHARE) // TOKEN_BYTES - 1
        self._tenants: OrderedDict[Tenant, _Texts] = OrderedDict()
        self._next_sweep = clock()
        self.nbytes = 0

    def __len__(self) -> int:
        """Tenants that something is remembered of."""
        return len(self._tenants)

    def remember(self, tenant: Tenant, output: Sequence[int]) -> None:
        """Keep output tokens of a finished request; of a very long text, the end."""
        now = self._clock()
        self._sweep(now)
        kept = output[-self._longest :]
        texts = self._take(tenant) or _Texts(now)
        texts.age(now, self._max_age)
        if len(texts.young) + len(kept) + 1 > self._longest:
            texts.turn(now)
        if not len(texts.young):
            texts.began = now
        self._make_room(
            2 * ENTRY_BYTES + texts.older.nbytes + (len(texts.young) + len(kept) + 1) * TOKEN_BYTES
        )
        texts.young.extend((*kept, GAP))
        self._tenants[tenant] = texts
        self.nbytes += texts.nbytes

    def texts(self, tenant: Tenant) -> Sequence[SuffixIndex]:
        """Texts that the tenant's requests may copy from, the younger ones first."""
        texts, now = self._tenants.get(tenant), self._clock()
        if texts is None:
            return ()
        if texts.is_due(now, self._max_age):
            self._age(tenant, now)
        if texts.empty:
            return ()
        self._tenants.move_to_end(tenant)
        return texts.young, texts.older

    def forget(self, handle: int | None = None) -> None:
        """Drop a tenant's texts, or everybody's."""
        for tenant in list(self._tenants):
            if handle in (None, handle_of(tenant)):
                self._take(tenant)

    def _make_room(self, most: int) -> None:
        """Make room for `most` bytes more, at the cost of tenants that were not here for longest."""
        while self._tenants and self.nbytes + most > self._limit:
            self._take(next(iter(self._tenants)))

    def _sweep(self, now: float) -> None:
        """Free old texts of tenants that no longer come, now and then."""
        if now < self._next_sweep:
            return
        self._next_sweep = now + self._max_age / SWEEPS
        for tenant in list(self._tenants):
            self._age(tenant, now)

    def _age(self, tenant: Tenant, now: float) -> None:
        """Drop what is old of a tenant, and the tenant where nothing is left."""
        texts = self._tenants[tenant]
        before = texts.nbytes
        texts.age(now, self._max_age)
        self.nbytes += texts.nbytes - before
        if texts.empty:
            self._take(tenant)

    def _take(self, tenant: Tenant) -> _Texts | None:
        texts = self._tenants.pop(tenant, None)
        if texts is not None:
            self.nbytes -= texts.nbytes
        return texts


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
            raise ConfigError(
                f"{name!r}: a tenant's outputs are kept together and forgotten together; leave it out"
            )
        if name not in (*_KEYS, "all"):
            raise ConfigError(f"{name!r} is unknown; known: all, {', '.join(_KEYS)}")
        if not isinstance(value, bool if name == "all" else str | None):
            raise ConfigError(f"{name!r} must be {'true or false' if name == 'all' else 'a string'}")
    extra_key, cache_salt = (body.get(name) for name in ("extra_key", "cache_salt"))
    tenant = tenant_of(str(extra_key or ""), str(cache_salt or ""))
    if bool(body.get("all")) == (tenant is not None):
        raise ConfigError("give cache_salt, extra_key or both, as the requests did; or only all: true")
    return None if tenant is None else handle_of(tenant)
