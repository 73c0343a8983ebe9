"""What a host's call may return, and how it becomes bytes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping

from ..types import Headers
from .answer import Answer
from .headers import JSON
from .keeper import Recorded
from .sse import format_event

__all__ = ["Relay", "as_json", "close_items", "recorded"]

_END = object()
_JSON_HEADERS: Headers = ((b"content-type", JSON),)


def as_json(value: object) -> bytes:
    dump = getattr(value, "model_dump_json", None)
    if dump is not None:
        # What the provider did not send must not be in the replay either.
        return str(dump(exclude_unset=True)).encode()
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def recorded(result: object) -> Recorded:
    """A call's plain result as an answer: bytes, text, JSON values, pydantic models, an `Answer`, or a
    response object of httpx or requests. `TypeError` for anything else."""
    if isinstance(result, Recorded):
        return result
    if isinstance(result, Answer):
        return Recorded(result.status, result.headers, result.body)
    if isinstance(result, (bytes, bytearray)):
        return Recorded(200, _JSON_HEADERS, bytes(result))
    if isinstance(result, str):
        return Recorded(200, _JSON_HEADERS, result.encode("utf-8", "surrogatepass"))
    if hasattr(result, "status_code") and hasattr(result, "content"):
        pairs = getattr(result, "headers", {}).items()
        sent = tuple((name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in pairs)
        # The client has decoded the content already.
        plain = tuple(pair for pair in sent if pair[0] not in (b"content-encoding", b"content-length"))
        return Recorded(result.status_code, plain, result.content)
    return Recorded(200, _JSON_HEADERS, as_json(result))


def _chunk(kind: str, item: object) -> bytes:
    if isinstance(item, (bytes, bytearray)):
        return bytes(item)
    if isinstance(item, str):
        return item.encode("utf-8", "surrogatepass")
    event = item.get("type") if isinstance(item, Mapping) else getattr(item, "type", None)
    named = kind in ("responses", "messages") and isinstance(event, str)
    return format_event(as_json(item), event if named else None)


def _last(kind: str, item: object) -> bytes | None:
    """What ends a stream whose items were objects: SDKs swallow the provider's own end."""
    if isinstance(item, (bytes, bytearray, str)) or kind not in ("chat", "text"):
        return None
    return format_event(b"[DONE]")


class Relay:
    """A stream that a call returned, as bytes: `pull` reads a sync one, ``async for`` reads either."""

    def __init__(self, kind: str, items: AsyncIterator[object] | Iterator[object]) -> None:
        self._kind = kind
        self._items = items
        self._item: object = b""

    def pull(self) -> bytes | None:
        """The next chunk of a sync stream; None at its end."""
        assert isinstance(self._items, Iterator)
        return self._chunk(next(self._items, _END))

    def _chunk(self, item: object) -> bytes | None:
        if item is _END:
            end, self._item = _last(self._kind, self._item), b""
            return end
        self._item = item
        return _chunk(self._kind, item)

    def __aiter__(self) -> Relay:
        return self

    async def __anext__(self) -> bytes:
        items = self._items
        item = next(items, _END) if isinstance(items, Iterator) else await anext(items, _END)
        chunk = self._chunk(item)
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        await close_items(self._items)


async def close_items(items: object) -> None:
    """Close a stream by whichever method it has."""
    close = getattr(items, "aclose", None) or getattr(items, "close", None)
    if close is not None:
        result = close()
        if hasattr(result, "__await__"):
            await result
