"""A sync stream, read one chunk at a time by whichever reader needs the next.

Every step runs in the context (`contextvars`) of the call that began the stream, whatever thread it runs in:
generators of the host's may have left things there. `Flight` lets one reader step at a time.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable

from .._drive import run_sync
from .._ports.protocol import Port
from .flight import ABANDONED, DONE, FAILED, OPEN, Flight, FlightTable
from .landing import Landing

__all__ = ["SyncPump"]


class SyncPump:
    """``pull()``: the next chunk, or None at the end. ``close()``: the stream's own close; it is called
    exactly once."""

    def __init__(
        self,
        flights: FlightTable,
        flight: Flight,
        landing: Landing,
        *,
        port: Port,
        pull: Callable[[], bytes | None],
        close: Callable[[], object] | None,
        context: contextvars.Context,
    ) -> None:
        self._flights = flights
        self._flight = flight
        self._landing = landing
        self._port = port
        self._pull = pull
        self._close = close
        self._context = context

    def begin(self, *, finish: bool) -> None:
        """Hand the stream to the flight's readers. ``finish``: it is read to its end when all have left."""
        self._flight.feed(self._step)
        self._flight.cancel_with(self._drain if finish else self._abandon, finishes=finish)

    def _step(self) -> None:
        try:
            chunk = self._context.run(self._pull)
            if chunk is not None:
                run_sync(self._landing.before(self._port, chunk))
                self._flight.push(chunk)
                return
            outcome = run_sync(self._landing.end(self._port))
            self._close_once()
            self._flight.end(DONE, outcome=outcome)
        except Exception as exc:
            self._flight.end(FAILED, error=exc)
            self._close_once(quiet=True)
        except BaseException:
            self._flight.end(ABANDONED)
            self._flights.land(self._flight)
            raise
        self._flights.land(self._flight)

    def _close_once(self, *, quiet: bool = False) -> None:
        close, self._close = self._close, None
        if close is None:
            return
        try:
            self._context.run(close)
        except Exception:
            if not quiet:
                raise

    def _abandon(self) -> None:
        self._flights.land(self._flight)
        try:
            self._close_once()
        finally:
            run_sync(self._landing.left(self._port))
            self._flight.end(ABANDONED)

    def _drain(self) -> None:
        while self._flight.state == OPEN:
            self._step()
