"""A sync stream, read one chunk at a time by whichever reader needs the next.

Every step runs in the context (`contextvars`) of the call that began the stream, whatever thread it runs in:
generators of the host's may have left things there. `Flight` lets one reader step at a time.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable

from .flight import ABANDONED, FAILED, OPEN, Flight, FlightTable

__all__ = ["SyncPump"]


class SyncPump:
    """``pull()``: the next chunk, or None at the end. ``done()``: settle and end the flight. ``left()``: the
    same where its readers left first. ``close()``: the stream's own close; it is called exactly once."""

    def __init__(
        self,
        flights: FlightTable,
        flight: Flight,
        *,
        pull: Callable[[], bytes | None],
        done: Callable[[], object],
        left: Callable[[], object],
        close: Callable[[], object] | None,
        context: contextvars.Context,
    ) -> None:
        self._flights = flights
        self._flight = flight
        self._pull = pull
        self._done = done
        self._left = left
        self._close = close
        self._context = context

    def begin(self, *, finish: bool) -> None:
        """Hand the stream to the flight's readers. ``finish``: it is read to its end when all have left."""
        self._flight.feed(self._step)
        self._flight.cancel_with(self._drain if finish else self._abandon)

    def _step(self) -> None:
        try:
            chunk = self._context.run(self._pull)
            if chunk is not None:
                self._flight.push(chunk)
                return
            self._done()
            self._close_once()
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
        try:
            self._close_once()
        finally:
            self._left()
            self._flights.land(self._flight)

    def _drain(self) -> None:
        while self._flight.state == OPEN:
            self._step()
