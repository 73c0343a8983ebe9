"""`Landing`: from a stream's chunks to a settled entry, once, whoever delivers them.

A stream is settled when its terminal event is seen, before that event is given to anybody: clients hang up
on it, and their next request must find the entry. What has no terminal event is settled at its end.
"""

from __future__ import annotations

from collections.abc import Sequence

from .._ports.protocol import Port
from . import admission
from .answer import CacheInfo
from .endpoints import ENDPOINTS
from .fastlane import no_header
from .flight import Flight, FlightTable
from .headers import content_type
from .keeper import Keeper, Recorded
from .lookup import Header, Opened
from .plan import Plan
from .sse import event_ends

__all__ = ["Landing"]


class Landing:
    """One flight's way into the store. ``items``: where the chunks come from; they are not kept where its
    ``no_store`` is true."""

    def __init__(
        self,
        keeper: Keeper,
        flights: FlightTable,
        plan: Plan,
        flight: Flight,
        *,
        opened: Opened,
        header: Header = no_header,
        items: object = None,
    ) -> None:
        self._keeper = keeper
        self._flights = flights
        self._plan = plan
        self._flight = flight
        self._opened = opened
        self._header = header
        self._items = items
        terminal = ENDPOINTS[plan.kind].terminal
        self._terminal = None if terminal is None else terminal.encode()
        self._info: CacheInfo | None = None
        self._size = 0

    def may_end(self, chunk: bytes) -> bool:
        """Whether ``chunk`` looks as if it ended the stream."""
        return self._terminal is not None and self._terminal in chunk and chunk.rstrip()[-1:] in b"]}"

    async def before(self, port: Port, chunk: bytes) -> None:
        """``chunk`` is about to be delivered."""
        if self.may_end(chunk):
            await self._early(port, chunk)

    async def _early(self, port: Port, chunk: bytes) -> None:
        head = self._flight.head
        if head is None or head.status != 200 or content_type(head.headers) != b"text/event-stream":
            return
        body = b"".join([*self._flight.chunks, chunk])
        reasons = admission.stream_reasons(self._plan.kind, body)
        if "unterminated" not in reasons:
            await self._settle(port, body, event_ends(body), reasons)
            if self._info is not None and self._info.stored:
                self._flights.land(self._flight)

    async def end(self, port: Port) -> CacheInfo:
        """The stream came to its end."""
        if self._info is None or self._size != self._flight.size:
            await self._settle(port, *self._record())
        assert self._info is not None
        return self._info

    async def left(self, port: Port) -> None:
        """The stream was left before its end: kept only if its terminal event was there."""
        if self._info is None and self._terminal is not None and self._flight.head is not None:
            body, ends = self._record()
            if content_type(self._flight.head.headers) == b"text/event-stream":
                await self._settle(port, body, ends)

    def _record(self) -> tuple[bytes, Sequence[int]]:
        assert self._flight.head is not None
        body = b"".join(self._flight.chunks)
        if content_type(self._flight.head.headers) == b"text/event-stream":
            return body, event_ends(body)
        total, ends = 0, []
        for chunk in self._flight.chunks:
            total += len(chunk)
            ends.append(total)
        return body, ends

    async def _settle(
        self, port: Port, body: bytes, ends: Sequence[int], reasons: set[str] | None = None
    ) -> None:
        head = self._flight.head
        assert head is not None
        record = Recorded(head.status, head.headers, body, ends)
        self._size = len(body)
        if getattr(self._items, "no_store", False):
            self._info = self._opened.miss(self._plan, "no-store")
            self._keeper.tell_stored(self._plan, self._info)
            return
        self._info = await self._keeper.settle(
            port, self._plan, record, self._opened, header=self._header, reasons=reasons
        )
