"""A Router's way to the network: its transports, made on first use, and their streams for sync callers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

from .._drive import run_sync
from ..caching.results import close_items
from ..errors import ConfigError, did_you_mean
from ..providers.messages import Transport

if TYPE_CHECKING:
    from .._ports.http_settings import HTTPSettings

__all__ = ["Blocking", "http_settings", "new_transport"]


def http_settings(given: Mapping[str, object], http_client: object) -> HTTPSettings:
    """`ConfigError` names a setting that is unknown or wrong."""
    from .._ports.http_settings import HTTPSettings

    if not isinstance(given, Mapping):
        raise ConfigError(f"http: expected a mapping, not {type(given).__name__}", param="http")
    names = [each.name for each in fields(HTTPSettings)]
    for name in given:
        if name not in names:
            raise ConfigError(
                f"http: unknown setting {name!r}{did_you_mean(name, names)}", param=f"http.{name}"
            )
    settings = {"http_client": http_client, **given}
    try:
        return HTTPSettings(**settings)  # type: ignore[arg-type]
    except ConfigError as exc:
        raise ConfigError(f"http.{exc.message}", param=f"http.{exc.param}") from None


def new_transport(face: str, settings: HTTPSettings) -> Transport:
    """That of the ``sync`` or the ``async`` face."""
    if face == "sync":
        from .._ports.http_sync import SyncTransport

        return SyncTransport(settings)
    from .._ports.http_async import AsyncTransport

    return AsyncTransport(settings)


class Blocking:
    """A stream of the sync transport as an iterator; closing it closes that, begun or not."""

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        self.events = events

    @property
    def no_store(self) -> bool:
        return bool(getattr(self.events, "no_store", False))

    def __iter__(self) -> Blocking:
        return self

    def __next__(self) -> bytes:
        try:
            return run_sync(self._next())
        except StopAsyncIteration:
            raise StopIteration from None

    async def _next(self) -> bytes:
        return await anext(self.events)

    def close(self) -> None:
        run_sync(close_items(self.events))
