"""`PerProcess`: what every process has to make for itself, such as a thread or a table of its own work."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["PerProcess"]

T = TypeVar("T")


class PerProcess(Generic[T]):
    """One ``make()`` for each process, on first use. A forked child drops what its parent left here, unseen.

    Takes no lock, so it may be asked from a finalizer: threads that come at once all get the same one.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: dict[int, T] = {}

    def mine(self) -> T:
        """The running process's; made if there is none yet."""
        pid = os.getpid()
        made = self._made.get(pid)
        if made is None:
            made = self._made.setdefault(pid, self._make())
            for other in list(self._made):
                if other != pid:
                    self._made.pop(other, None)
        return made

    def made(self) -> T | None:
        """The running process's, if there is one."""
        return self._made.get(os.getpid())
