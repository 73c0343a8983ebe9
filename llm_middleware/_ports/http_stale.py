"""Whether the other side has closed a connection, or spoken out of turn, while it was idle."""

from __future__ import annotations

import select
from typing import Any

__all__ = ["is_stale"]


def is_stale(sock: Any) -> bool:
    """Something can be read from a socket from which nothing is due."""
    descriptor = sock.fileno()
    if descriptor < 0:
        return True
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([descriptor], [], [], 0)[0])
