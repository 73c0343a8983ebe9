"""`apart`: a host's function in a thread of its own, as the threads of an event loop are few."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .._ports.faces import SYNC
from .._ports.protocol import Port

__all__ = ["apart"]

T = TypeVar("T")


async def apart(port: Port, function: Callable[[T], object], value: T) -> object:
    """What the function returns, or raises."""
    if port is SYNC:
        return function(value)
    waiter = port.waiter()
    said: list[object] = []
    failed: list[BaseException] = []

    async def work() -> None:
        try:
            said.append(function(value))
        except BaseException as exc:
            failed.append(exc)
        finally:
            waiter.wake()

    SYNC.spawn(work)
    await waiter.wait()
    if failed:
        raise failed[0]
    return said[0]
