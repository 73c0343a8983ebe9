"""`Lookup`: from an API key to its record: this process's memory, the store, the host's own function.

The key itself is hashed before anything else and goes no further, but to the host's function.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable
from hashlib import sha256
from typing import Final

from .._ports.protocol import Port
from ..errors import (
    InvalidKeyError,
    KeyStoreUnavailable,
    LLMMiddlewareError,
    StoreError,
)
from ..types import Clock
from .asking import Asker
from .recent import BLIND, Recent
from .record import KeyRecord, record_of

__all__ = ["MASTER", "Lookup", "Resolve"]

MASTER: Final = "master"  # the id of the master key: that of a short one, hashed, could be guessed
_LONGEST: Final = 4096  # characters
_SHORTEST: Final = 12  # no key of ours is shorter

Resolve = Callable[[str], object]


class Lookup:
    """``ttl``, ``negative_ttl``: seconds; see `Recent`. ``resolve``: the host's function, asked where the
    store has no such key."""

    def __init__(
        self,
        asker: Asker,
        *,
        master_key: str | None,
        ttl: float,
        negative_ttl: float,
        resolve: Resolve | None,
        clock: Clock,
    ) -> None:
        self._asker, self._resolve, self._clock = asker, resolve, clock
        self._ttl = ttl
        self.recent = Recent(ttl, negative_ttl)
        self._master_digest = None if master_key is None else sha256(_bytes(master_key)).digest()
        self._master = KeyRecord(id=MASTER, name="master key", alias=MASTER, admin=True)
        store = asker.store
        self._pushed = hasattr(store, "attend")
        self._numbered = not self._pushed and hasattr(store, "generation")
        self._generation: object = None
        self._look_at = float("-inf")  # when to look at the generation again
        if self._pushed:
            store.attend(self._told)  # type: ignore[attr-defined]
        self._pid = os.getpid()

    def known(self, key: str) -> KeyRecord | None:
        """The record of a key that may be used, from memory alone."""
        if not isinstance(key, str) or len(key) > _LONGEST:
            return None
        digest = sha256(_bytes(key))
        if self._is_master(digest.digest()):
            return self._master
        return self.believed(digest.hexdigest())

    def believed(self, key_id: str) -> KeyRecord | None:
        """`known` by the key's hash in hex; never the master key's."""
        now = self._clock()
        if self._numbered and not self._is_current(now):
            return None
        record = self.recent.find(key_id, now, self._pushed and self._asker.store.live)
        return record if record is not None and record.usable(now) else None

    async def find(self, port: Port, key: str) -> KeyRecord:
        """The record of a key that may be used. `InvalidKeyError`, `ExpiredKeyError`, `BlockedKeyError`;
        `KeyStoreUnavailable` where nobody can tell."""
        if not isinstance(key, str) or not key:
            raise InvalidKeyError("no API key was given")
        if len(key) > _LONGEST:
            raise _wrong()
        digest = sha256(_bytes(key))
        if self._is_master(digest.digest()):
            return self._master
        if self._resolve is None and (not key.startswith("sk-") or len(key) < _SHORTEST):
            raise _wrong()
        await self._look(port)
        key_id, now = digest.hexdigest(), self._clock()
        record = self.recent.find(key_id, now, self._pushed and self._asker.store.live)
        if record is None:
            if self.recent.is_wrong(key_id, now):
                raise _wrong()
            record = await self._read(port, key, key_id)
        return self._usable(record)

    def is_master(self, key: str) -> bool:
        return self._is_master(sha256(_bytes(key)).digest())

    def forget(self, key_id: str) -> None:
        """This process has changed the key."""
        self.recent.forget(key_id)

    def _is_master(self, digest: bytes) -> bool:
        return self._master_digest is not None and hmac.compare_digest(digest, self._master_digest)

    def _usable(self, record: KeyRecord) -> KeyRecord:
        record.check_usable(self._clock())
        return record

    async def _read(self, port: Port, key: str, key_id: str) -> KeyRecord:
        since, live = self.recent.changes, self._pushed and self._asker.store.live
        try:
            record = await self._asked(port, key, key_id)
        except KeyStoreUnavailable:
            kept = self.recent.kept(key_id, self._clock())
            if kept is None:
                raise
            return kept
        now = self._clock()
        if record is None:
            self.recent.keep_wrong(key_id, now, since)
            raise _wrong()
        # What the host's function knows, nobody tells of.
        blind = self._pushed and record.stored and not live
        ttl = min(self._ttl, BLIND) if blind else self._ttl
        self.recent.keep(key_id, record, now, since, ttl, told=live and record.stored)
        return record

    async def _asked(self, port: Port, key: str, key_id: str) -> KeyRecord | None:
        try:
            row = await self._asker.ask(port, "get", key_id)
            if row is not None:
                return record_of(row, self._clock())
            if self._resolve is None:
                return None
            record = await port.call(self._resolve, key)
        except StoreError as exc:
            raise KeyStoreUnavailable("API keys cannot be looked up now") from exc
        except LLMMiddlewareError:
            raise
        except Exception as exc:
            raise KeyStoreUnavailable("API keys cannot be looked up now") from exc
        if record is not None and not isinstance(record, KeyRecord):
            raise TypeError(f"resolve returned {type(record).__name__}, not a KeyRecord or None")
        return record

    def _is_current(self, now: float) -> bool:
        """Whether what is kept was current a moment ago; in this process that costs nothing to know."""
        if self._asker.inline:
            self._seen(self._asker.store.generation())  # type: ignore[attr-defined]
            return True
        return self._look_at - BLIND <= now < self._look_at and self._pid == os.getpid()

    async def _look(self, port: Port) -> None:
        """Learn of what other processes changed."""
        if self._pushed:
            self._asker.store.listen()  # type: ignore[attr-defined]
            return
        now = self._clock()
        if not self._numbered or self._is_current(now):
            return
        self._look_at, self._pid = now + BLIND, os.getpid()  # one caller looks, the others go on
        try:
            self._seen(await self._asker.ask(port, "generation"))
        except StoreError:
            pass  # what is kept is believed for its time

    def _seen(self, generation: object) -> None:
        if generation != self._generation:
            self._generation = generation
            self.recent.forget(None)

    def _told(self, key_id: str | None) -> None:
        if key_id is None:
            self.recent.doubt()
        else:
            self.recent.forget(key_id)


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogatepass")


def _wrong() -> InvalidKeyError:
    return InvalidKeyError("the API key is not valid")
