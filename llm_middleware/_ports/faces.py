"""The two ports that there are: one for sync callers, and one for async callers, made on first use."""

from __future__ import annotations

import functools

from .protocol import Port
from .sync import SyncPort

__all__ = ["SYNC", "async_port"]

SYNC = SyncPort()


@functools.cache
def async_port() -> Port:
    from .async_ import AsyncPort  # on first use: it brings asyncio

    return AsyncPort()
