"""What the cache tells its observers: one record per thing that happened, and the `Hook` protocol.

A hook is any callable that takes an `Event`. It is called in line, so it must be quick; one that raises is
counted and logged, and the request goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["Event", "Hook"]


@dataclass(frozen=True, slots=True)
class Event:
    """``name``: ``hit``, ``miss``, ``partial``, ``collapsed`` or ``bypass`` for an answer given; ``stored``
    or ``not-stored``; ``store-error``; ``key-error``, where the host's own key function failed;
    ``refresh-error``, where the call behind a stale answer failed.

    ``cache_hit``: True where the answer came from the cache, False where it did not; None for events that
    are not about an answer. ``detail``: the reason code. ``tier``: the store concerned.
    """

    name: str
    kind: str
    key: str | None = None
    cache_hit: bool | None = None
    stream: bool = False
    model: str | None = None
    detail: str | None = None
    tier: str | None = None
    age: float | None = None
    error: BaseException | None = None


class Hook(Protocol):
    def __call__(self, event: Event, /) -> object: ...
