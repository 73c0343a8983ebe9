"""What goes to a provider and what comes back, with no HTTP client in it.

`Outgoing` is one HTTP request. A `Transport` sends it and gives a `Reply`: its status and headers at once,
its body when it is asked for. Transports come in a sync and an async kind with the same coroutines; the sync
one's never suspend.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

__all__ = ["Outgoing", "Pieces", "Reply", "Timeouts", "Transport"]


@runtime_checkable
class Pieces(Protocol):
    """Bytes that are not all held in memory. They are read as often as somebody wants them, by several at
    once too."""

    def __len__(self) -> int:
        """How many bytes there are."""
        ...

    def pieces(self) -> Iterator[bytes]:
        """From the first byte to the last, none of them empty. May block; `OSError` where that fails."""
        ...


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds; None: no limit. ``connect``: until there is a connection, a wait for a free one included.
    ``read``: between two pieces of the answer, and until its first. ``total``: for all of it, from `send` to
    the last byte that is read."""

    connect: float | None = 5.0
    read: float | None = 600.0
    total: float | None = None


@dataclass(slots=True)
class Outgoing:
    """One request. ``headers``: names in lower case. ``body``: as it goes over the wire; `Pieces` are sent
    one by one."""

    url: str
    headers: dict[str, str] = field(repr=False)  # they hold keys
    body: bytes | Pieces = field(repr=False)
    method: str = "POST"


class Reply(Protocol):
    """An answer whose head is there. Whoever has it reads it to its end or closes it."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""

    async def read(self) -> bytes:
        """The whole body, any content encoding undone. Closes the reply."""
        ...

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives, any content encoding undone. Closes the reply at its end."""
        ...

    async def aclose(self) -> None:
        """Give the connection back, or drop it where the body was not read to its end."""
        ...


class Transport(Protocol):
    """Sends requests over pooled connections. `UpstreamConnectionError` where the provider cannot be reached
    or breaks off, `DeadlineError` where a timeout of `Timeouts` passes, in `send` and while reading alike."""

    async def send(self, request: Outgoing, timeouts: Timeouts) -> Reply: ...

    async def aclose(self) -> None: ...
