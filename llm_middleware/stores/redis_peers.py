"""`RedisPeers`: how the processes that share a namespace in one Redis speak to each other.

One pub/sub channel for each namespace. A message is a JSON list ``[origin, verb, name, ...]``; who sent it
ignores it. Verbs: ``changed`` (cache keys whose entries were replaced or removed), ``flushed`` (everything
was), ``ended`` (leases whose answer is not stored: do not wait for it) and ``freed`` (leases that were given
up: somebody else may call).
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Sequence

from .redis_channel import RedisChannel
from .redis_connect import RedisConnection
from .redis_leases import RedisLeases, lease_name

__all__ = ["RedisPeers"]

Told = Callable[[str, Sequence[str]], None]


class RedisPeers:
    """``lease``: seconds that a lease lives without its holder's heartbeats."""

    def __init__(self, connection: RedisConnection, namespace: str, *, lease: float = 2.0) -> None:
        self.channel = f"{namespace}:~changes"
        self._origin = secrets.token_hex(8)
        self._told: Told = _ignore
        self._gap: Callable[[], None] = _nothing
        self._ear = RedisChannel(connection, self.channel, told=self._hear, gap=self._missed)
        self.leases = RedisLeases(connection, seconds=lease, channel=self.channel)

    def attend(self, told: Told, gap: Callable[[], None]) -> None:
        """From now on `listen` hears for these: ``told(verb, names)``, and ``gap()`` where messages may have
        been lost. Both are called in the listening thread."""
        self._told, self._gap = told, gap

    @property
    def live(self) -> bool:
        """Whether messages arrive at this moment."""
        return self._ear.live

    def listen(self) -> None:
        """Listen from now on, if this process does not yet. Returns at once."""
        self._ear.listen()

    def lease(self, key: str, form: str) -> str:
        return lease_name(key, form)

    def message(self, verb: str, names: Sequence[str]) -> bytes:
        return json.dumps([self._own_name(), verb, *names], separators=(",", ":")).encode()

    def release(self, lease: str, token: str, verb: str | None) -> None:
        """Give a lease up, and tell it with ``verb`` (``ended``, ``freed``). Returns at once."""
        self.leases.release(lease, token, None if verb is None else self.message(verb, [lease]))

    def close(self) -> None:
        self.leases.close()
        self._ear.close()

    def _hear(self, data: bytes) -> None:
        origin, verb, *names = json.loads(data)
        if origin != self._own_name():
            self._told(verb, names)

    def _own_name(self) -> str:
        return f"{self._origin}.{os.getpid()}"  # a forked child is not its parent

    def _missed(self) -> None:
        self._gap()


def _ignore(verb: str, names: Sequence[str]) -> None:
    """Nobody attends yet."""


def _nothing() -> None:
    """Nobody attends yet."""
