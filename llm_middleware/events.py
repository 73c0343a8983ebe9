"""What the cache tells its observers: one record per thing that happened, and the `Hook` protocol.

A hook is any callable that takes an `Event`, sync or async. A sync one is called in line, so it must be
quick; an async one is awaited beside the request. One that raises is counted and logged, and the request
goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["Event", "Hook"]


@dataclass(frozen=True, slots=True)
class Event:
    """``name``: ``hit``, ``miss``, ``partial``, ``collapsed`` or ``bypass`` for an answer given; ``stored``
    or ``not-stored``; ``store-error``; ``key-error``, where the host's own key function failed;
    ``refresh-error``, where the call behind a stale answer failed; from a sub-app ``success`` and
    ``failure``, one for each request for a model.

    ``cache_hit``: True where the answer came from the cache, False where it did not; None for events that
    are not about an answer. ``detail``: the reason code. ``tier``: the store concerned. ``deployment``,
    ``caller``: public ids, of who answered and of the API key that asked. ``tokens``: in all, and
    ``output_tokens`` of them in the answer; ``cost``: by the deployment's prices; ``latency``: seconds. None
    where it is not known. ``similarity``: of the nearest stored question, where one was looked for by
    meaning."""

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
    deployment: str | None = None
    caller: str | None = None
    tokens: int | None = None
    output_tokens: int | None = None
    cost: float | None = None
    latency: float | None = None
    similarity: float | None = None


class Hook(Protocol):
    def __call__(self, event: Event, /) -> object: ...
