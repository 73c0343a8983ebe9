"""`frames`: an AWS event stream taken apart.

A frame is its length and that of its headers, 4 bytes each, a CRC-32 of these, the headers, the payload, and
a CRC-32 of all before (https://docs.aws.amazon.com/AmazonS3/latest/API/RESTSelectObjectAppendix.html).
"""

from __future__ import annotations

import zlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Final

from ..errors import UpstreamConnectionError
from .anthropic_answer import unexpected

__all__ = ["Frame", "frames"]

_PRELUDE: Final = 12
_LARGEST: Final = 1 << 24  # bytes of a frame, and more than any has
_STRING: Final = 7
_SIZED: Final = (6, _STRING)  # types of values that begin with their length
_SIZES: Final = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}  # and of the others


@dataclass(frozen=True, slots=True)
class Frame:
    """``kind``: ``event``, ``exception`` or ``error``. ``name``: which event or exception."""

    kind: str
    name: str
    payload: bytes = field(repr=False)


async def frames(chunks: AsyncIterator[bytes]) -> AsyncGenerator[Frame, None]:
    """The frames of a stream. Closes ``chunks``. `UpstreamConnectionError` where the last one is not whole,
    `UpstreamServerError` for bytes that are no frames."""
    held = bytearray()
    try:
        async for chunk in chunks:
            held += chunk
            while len(held) >= _PRELUDE and len(held) >= (size := _size(held)):
                frame = _frame(bytes(held[:size]))
                del held[:size]
                yield frame
        if held:
            raise UpstreamConnectionError("the provider's stream ended within an event")
    finally:
        close = getattr(chunks, "aclose", None)
        if close is not None:
            await close()


def _size(held: bytearray) -> int:
    size = int.from_bytes(held[:4])
    if not _PRELUDE + 4 <= size <= _LARGEST or zlib.crc32(held[:8]) != int.from_bytes(held[8:12]):
        raise unexpected()
    return size


def _frame(data: bytes) -> Frame:
    end = _PRELUDE + int.from_bytes(data[4:8])
    if end > len(data) - 4 or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:]):
        raise unexpected()
    try:
        headers = _headers(data[_PRELUDE:end])
    except (IndexError, KeyError, UnicodeDecodeError):
        raise unexpected() from None
    kind = headers.get(":message-type", "event")
    name = headers.get({"event": ":event-type", "exception": ":exception-type"}.get(kind, ":error-code"), "")
    return Frame(kind, name, data[end:-4])


def _headers(data: bytes) -> dict[str, str]:
    found: dict[str, str] = {}
    at = 0
    while at < len(data):
        named = at + 1 + data[at]
        name, kind, at = data[at + 1 : named].decode(), data[named], named + 1
        size = _SIZES[kind] if kind not in _SIZED else int.from_bytes(data[at : at + 2])
        at += 2 if kind in _SIZED else 0
        if kind == _STRING:
            found[name] = data[at : at + size].decode()
        at += size
    return found
