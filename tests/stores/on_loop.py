"""The async face of a store as a sync one, so that one test body asks both."""

from __future__ import annotations

import asyncio
from typing import Any

__all__ = ["OnLoop"]


class OnLoop:
    """Each call of ``store`` is run on the event loop of ``runner``."""

    def __init__(self, store: Any, runner: asyncio.Runner) -> None:
        self.tier = store.tier
        self._store = store
        self._run = runner.run

    def get(self, key: str) -> bytes | None:
        return self._run(self._store.aget(key))

    def set(self, key: str, value: bytes, ttl: float | None) -> None:
        self._run(self._store.aset(key, value, ttl))

    def delete(self, keys: list[str]) -> int:
        return self._run(self._store.adelete(keys))

    def flush(self, namespace: str) -> int:
        return self._run(self._store.aflush(namespace))

    def heads(self, namespace: str, cursor: str | None, size: int) -> object:
        return self._run(self._store.aheads(namespace, cursor, size))

    def purge_expired(self) -> int:
        return self._run(self._store.apurge_expired())

    def ping(self) -> dict[str, object]:
        return self._run(self._store.aping())

    def close(self) -> None:
        self._run(self._store.aclose())
