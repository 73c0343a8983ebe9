"""Whether the other side has closed a connection, or spoken out of turn, while it was idle."""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any

__all__ = ["is_stale", "staleness"]


def is_stale(sock: Any) -> bool:
    """Something can be read from a socket from which nothing is due."""
    return bool(staleness(sock)())


def staleness(sock: Any) -> Callable[[], object]:
    """`is_stale` of ``sock``, to be asked often, and not once it is closed."""
    descriptor = sock.fileno()
    if descriptor < 0:
        return lambda: True
    if not hasattr(select, "poll"):
        return lambda: select.select([descriptor], [], [], 0)[0]
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return lambda: poll.poll(0)
