"""`Answer`: one HTTP/1.1 answer, read from a connection as its bytes come (RFC 9112).

An answer that ends before it says so is an error. ``http.client`` takes one that broke off in the middle of
its head for a whole one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

__all__ = ["Answer", "MalformedError"]

_PIECE: Final = 2**16  # bytes read at a time
_LONGEST_HEAD: Final = 2**18  # bytes
_LONGEST_LINE: Final = 2**14  # of a chunk's size, or of a trailer


class MalformedError(ValueError):
    """What came is not HTTP, or ended too early."""


class Answer:
    """``receive(n)`` returns up to n bytes, none at the end of the connection.

    ``reusable``: once the body has been read to its end, whether the connection may carry another answer.
    `MalformedError` from every method.
    """

    __slots__ = ("_buffer", "_chunked", "_due", "_left", "_receive", "ended", "headers", "reusable", "status")

    def __init__(self, receive: Callable[[int], bytes], method: str) -> None:
        self._receive = receive
        self._buffer = b""
        self.status = 100
        while 100 <= self.status < 200:  # informational, with another to come
            version = self._read_head()
        self._chunked = self._due = False
        self._left: int | None = None  # of the body or of the chunk; None: until the connection ends
        self.ended = False
        self._frame(version, method)

    def _more(self) -> None:
        data = self._receive(_PIECE)
        if not data:
            raise MalformedError
        self._buffer = self._buffer + data if self._buffer else data

    def _read_head(self) -> bytes:
        """Read one head. Returns the version of HTTP."""
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > _LONGEST_HEAD or not self._buffer[:5] == b"HTTP/"[: len(self._buffer)]:
                raise MalformedError
            self._more()
        line, *rest = self._buffer[:end].decode("latin-1").split("\r\n")
        self._buffer = self._buffer[end + 4 :]
        version, _, after = line.partition(" ")
        self.status = _number(after[:3])
        if version not in ("HTTP/1.1", "HTTP/1.0") or not 100 <= self.status <= 999:
            raise MalformedError
        self.headers = _headers(rest)
        return version.encode("ascii")

    def _frame(self, version: bytes, method: str) -> None:
        """How long the body is (RFC 9112, section 6.3)."""
        headers = self.headers
        asked = {word.strip().lower() for word in headers.get("connection", "").split(",")}
        self.reusable = "close" not in asked and (version == b"HTTP/1.1" or "keep-alive" in asked)
        coding, length = headers.get("transfer-encoding"), headers.get("content-length")
        if method == "HEAD" or self.status in (204, 304) or (method == "CONNECT" and self.status == 200):
            self.ended = True
        elif coding is not None:
            self._chunked = coding.rpartition(",")[2].strip().lower() == "chunked"
            self._left = 0 if self._chunked else None
            self.reusable = self.reusable and self._chunked and length is None
        elif length is not None:
            self._left = _number(length)
            self.ended = self._left == 0
        else:
            self.reusable = False
        if self.ended and self._buffer:
            self.reusable = False  # nobody asked for these bytes

    def next(self) -> bytes:
        """What comes next of the body; nothing at its end."""
        while not self.ended:
            if self._chunked and self._left == 0 and not self._next_chunk():
                break
            data = self._buffer or self._receive(_PIECE)
            self._buffer = b""
            if self._left is None:
                self.ended = not data
                return data
            if not data:
                raise MalformedError
            return self._measured(data, self._left)
        return b""

    def _measured(self, data: bytes, left: int) -> bytes:
        """Of what came, that which belongs to the body or to its chunk."""
        if len(data) > left:
            data, self._buffer = data[:left], data[left:]
        self._left = left - len(data)
        if self._left == 0:
            if self._chunked:
                self._due = True
            else:
                self._end()
        return data

    def _end(self) -> None:
        self.ended = True
        if self._buffer:
            self.reusable = False

    def _next_chunk(self) -> bool:
        """Read the size of the next chunk; False: there is none."""
        if (
            self._due and self._line()
        ):  # the end of the last one's line: not waited for before it is given out
            raise MalformedError
        self._due = False
        text = self._line().partition(b";")[0].strip()
        if not text or not all(digit in b"0123456789abcdefABCDEF" for digit in text):
            raise MalformedError
        self._left = int(text, 16)
        if self._left:
            return True
        while self._line():
            pass  # trailers
        self._end()
        return False

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            if len(self._buffer) > _LONGEST_LINE:
                raise MalformedError
            self._more()
        line, self._buffer = self._buffer[:end], self._buffer[end + 2 :]
        return line


def _number(text: str) -> int:
    values = {value.strip() for value in text.split(",")}
    value = values.pop()
    if values or not (value.isascii() and value.isdigit()):
        raise MalformedError
    return int(value)


def _headers(lines: list[str]) -> dict[str, str]:
    """Names in lower case; the values of a name that comes twice in one."""
    headers: dict[str, str] = {}
    last = ""
    for line in lines:
        if line[:1] in (" ", "\t") and last:  # a value that goes on in another line
            headers[last] += " " + line.strip()
            continue
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise MalformedError
        last = name.lower()
        value = value.strip()
        headers[last] = f"{headers[last]}, {value}" if last in headers else value
    return headers
