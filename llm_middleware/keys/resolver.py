"""`KeyResolver`: which API key is calling, and what it may do. Faces only: every method has a sync and an
async name for the same flow."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from .._drive import run_sync
from .._ports.faces import SYNC, async_port
from .._ports.protocol import Port
from ..caching.environ import resolved
from ..errors import ConfigError
from ..types import Clock
from .allowance import Allowance, Counting, LimitSettings, limit_settings
from .asking import Asker
from .fields import whole
from .lookup import Lookup, Resolve
from .management import Management
from .record import KeyRecord
from .store import make_store

__all__ = ["KeyResolver"]


class KeyResolver(Management):
    """Knows API keys by their hash; makes and manages them, and counts what they use.

    ``store``: where keys are kept; see `make_store`; this process's memory unless given. ``master_key``:
    the administrator's, with no limits. ``resolve``: a function of the host's own, sync or async, from a
    key to a `KeyRecord` or None, asked for keys that the store has not. ``ttl``: seconds that what was read
    is believed, where nothing is heard of a change; ``negative_ttl``: that a key is believed to be
    nobody's. ``limits``: see `LimitSettings`. ``clock`` gives seconds since the epoch. `ConfigError` names
    what is wrong.

    Every method has an async twin (``aresolve`` ...), but for `known`. One resolver serves threads and event
    loops at once; making one opens nothing.
    """

    def __init__(
        self,
        store: object = None,
        *,
        master_key: str | None = None,
        ttl: float = 60.0,
        negative_ttl: float = 5.0,
        resolve: Resolve | None = None,
        clock: Clock = time.time,
        limits: Mapping[str, object] | LimitSettings | None = None,
    ) -> None:
        self._clock = clock
        if resolve is not None and not callable(resolve):
            raise ConfigError("resolve: expected a function", param="resolve")
        settings = limit_settings(limits)
        master_key = _master_key(master_key)
        self._asker = Asker(make_store(store, clock))
        self._lookup = Lookup(
            self._asker,
            master_key=master_key,
            ttl=_seconds("ttl", ttl),
            negative_ttl=_seconds("negative_ttl", negative_ttl),
            resolve=resolve,
            clock=clock,
        )
        self._counting = Counting(self._asker, settings, clock)

    def known(self, key: str) -> KeyRecord | None:
        """The record of a key that may be used now, if that is known without asking anybody. Microseconds;
        None says nothing: ask `resolve`."""
        return self._lookup.known(key)

    def _believed(self, key_id: str) -> KeyRecord | None:
        return self._lookup.believed(key_id)

    def resolve(self, key: str) -> KeyRecord:
        """The record of a key that may be used now.

        `InvalidKeyError`, `ExpiredKeyError`, `BlockedKeyError`; `KeyStoreUnavailable` where nobody can tell.
        While the store fails, keys that this process has seen within ten ``ttl`` are answered from memory.
        """
        return run_sync(self._lookup.find(SYNC, key))

    async def aresolve(self, key: str) -> KeyRecord:
        """`resolve` for async callers."""
        return await self._lookup.find(async_port(), key)

    async def _resolve(self, port: Port, key: str) -> KeyRecord:
        return await self._lookup.find(port, key)

    def admit(self, record: KeyRecord, *, count: int = 1) -> None:
        """Count requests against ``rpm_limit``. `KeyLimitError` with the seconds until the minute ends, where
        there is no room for all of them; then none is counted. Costs nothing without a limit."""
        if record.rpm_limit is not None:
            run_sync(self._counting.admit(SYNC, record, whole("count", count)))

    async def aadmit(self, record: KeyRecord, *, count: int = 1) -> None:
        """`admit` for async callers."""
        if record.rpm_limit is not None:
            await self._counting.admit(async_port(), record, whole("count", count))

    async def _admit(self, port: Port, record: KeyRecord) -> None:
        if record.rpm_limit is not None:
            await self._counting.admit(port, record, 1)

    def begin(self, record: KeyRecord, tokens: int = 0, *, cost: float | None = None) -> Allowance:
        """Room for a call that goes upstream, of about so many ``tokens`` and this ``cost`` (None: as the
        key's latest calls). `KeyLimitError` for ``tpm_limit`` and ``max_parallel_requests``,
        `BudgetExceededError`. Who gets the allowance ends it."""
        return run_sync(self._begin(SYNC, record, tokens, cost))

    async def abegin(self, record: KeyRecord, tokens: int = 0, *, cost: float | None = None) -> Allowance:
        """`begin` for async callers."""
        return await self._begin(async_port(), record, tokens, cost)

    async def _begin(
        self, port: Port, record: KeyRecord, tokens: int, cost: float | None = None
    ) -> Allowance:
        return await self._counting.begin(port, record, whole("tokens", tokens), cost)

    def close(self) -> None:
        """Tell the store what it has not heard yet, and close it. It opens again when it is used again."""
        run_sync(self._close(SYNC))

    async def aclose(self) -> None:
        """`close` for async callers."""
        await self._close(async_port())

    async def _close(self, port: Port) -> None:
        await self._counting.close(port)
        await port.store(self._asker.store, "close")


def _seconds(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigError(f"{name}: expected seconds >= 0, got {value!r}", param=name)
    return float(value)


def _master_key(value: object) -> str | None:
    if value is None:
        return None
    value = resolved(value, param="master_key")
    if not isinstance(value, str) or not value.strip():
        raise ConfigError("master_key: expected a string that is not empty", param="master_key")
    value = value.strip()  # as that of a request
    if not value.isascii() or not value.isprintable():
        raise ConfigError("master_key: expected visible ASCII characters", param="master_key")
    return value
