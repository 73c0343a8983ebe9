"""`detached`: what a host's function left to be awaited, awaited where nobody waits for it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable

__all__ = ["detached"]

logger = logging.getLogger("llm_middleware")

# Tasks that nobody awaits are held here: a loop keeps only weak references.
_running: set[asyncio.Task[None]] = set()


def detached(awaitable: Awaitable[object]) -> None:
    """Await it on the running event loop, or in a thread with a loop of its own. What it raises is logged."""
    work = _logged(awaitable)
    try:
        task = asyncio.get_running_loop().create_task(work)
    except RuntimeError:
        threading.Thread(target=asyncio.run, args=(work,), name="llm-middleware-hook", daemon=True).start()
    else:
        _running.add(task)
        task.add_done_callback(_running.discard)


async def _logged(awaitable: Awaitable[object]) -> None:
    try:
        await awaitable
    except Exception:
        logger.exception("a hook failed")
