"""Reading what a client sends (PEP 3333): no more than it has said, and no more than is wanted."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Protocol

from ..api.message import Head

if TYPE_CHECKING:
    from wsgiref.types import WSGIEnvironment

__all__ = [
    "Chain",
    "about_body",
    "content_length",
    "head_of",
    "path_of",
    "pieces_of",
    "read_exactly",
    "read_input",
]

_PIECE: Final = 2**16  # bytes


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


class Chain:
    """What was read of a request body, and then the rest of it."""

    def __init__(self, head: bytes, rest: _Readable) -> None:
        self._head = io.BytesIO(head)
        self._rest = rest

    def read(self, size: int = -1) -> bytes:
        data = self._head.read(size)
        if size < 0:
            return data + self._rest.read()
        return data if len(data) == size else data + self._rest.read(size - len(data))

    def readline(self, size: int = -1) -> bytes:
        line = self._head.readline(size)
        if line.endswith(b"\n") or (0 <= size <= len(line)):
            return line
        rest: bytes = self._rest.readline(size - len(line) if size >= 0 else -1)  # type: ignore[attr-defined]
        return line + rest

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")

    def readlines(self, hint: int = -1) -> list[bytes]:
        return list(self)


def path_of(environ: WSGIEnvironment) -> str:
    """The path below the place where the app is mounted: bytes as if they were Latin-1."""
    return str(environ.get("PATH_INFO", "").encode("latin-1", "replace").decode("utf-8", "replace"))


def head_of(environ: WSGIEnvironment) -> Head:
    """What is known of a request before its body."""
    return Head(
        method=environ["REQUEST_METHOD"],
        path=path_of(environ),
        query=environ.get("QUERY_STRING", ""),
        headers=_header_pairs(environ),
        native=environ,
    )


def _header_pairs(environ: WSGIEnvironment) -> list[tuple[bytes, bytes]]:
    """The request's headers as ASGI has them."""
    pairs = [
        (name[5:].replace("_", "-").lower().encode("latin-1"), value.encode("latin-1", "replace"))
        for name, value in environ.items()
        if name.startswith("HTTP_")
    ]
    for name, key in ((b"content-type", "CONTENT_TYPE"), (b"content-length", "CONTENT_LENGTH")):
        if environ.get(key):
            pairs.append((name, environ[key].encode("latin-1", "replace")))
    return pairs


def about_body(environ: WSGIEnvironment) -> tuple[str, str]:
    """The content type and the encoding that the headers tell."""
    return environ.get("CONTENT_TYPE", ""), environ.get("HTTP_CONTENT_ENCODING", "").strip().lower()


def content_length(environ: WSGIEnvironment) -> int | None:
    """The length that the client says, 0 where it says none; None for what is no number."""
    text = environ.get("CONTENT_LENGTH") or "0"
    if not text.isascii() or not text.isdigit():
        return None
    return int(text) if len(text) <= 18 else sys.maxsize


def read_input(environ: WSGIEnvironment, limit: int) -> bytes | None:
    """The request's body; None where it is longer than ``limit`` bytes."""
    size, stream = content_length(environ) or 0, environ["wsgi.input"]
    if size > limit:
        return None
    if not size and environ.get("wsgi.input_terminated"):
        size = limit + 1  # chunked: the length is not known before the end
    body = read_exactly(stream, size)
    return None if len(body) > limit else body


def read_exactly(stream: _Readable, size: int) -> bytes:
    """``size`` bytes, fewer only at the end: one ``read`` may return less on some servers."""
    parts: list[bytes] = []
    while size > 0:
        data = stream.read(size)
        if not data:
            break
        parts.append(data)
        size -= len(data)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def pieces_of(environ: WSGIEnvironment) -> Iterator[bytes]:
    """The request's body as it arrives."""
    left, stream = content_length(environ) or 0, environ["wsgi.input"]
    chunked = not left and environ.get("wsgi.input_terminated")
    while (chunked or left > 0) and (data := stream.read(_PIECE if chunked else min(left, _PIECE))):
        left -= len(data)
        yield data
