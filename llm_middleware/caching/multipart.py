"""``multipart/form-data`` bodies, read for their cache key and to send them on (RFC 7578; RFC 2046, 5.1.1).

What is read here decides which requests are the same, so anything unusual makes the request uncacheable
rather than guessed at. `FormParser` takes a body in pieces of any size, and whole ones go through it too:
however a form arrives, it is the same form.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from email.message import Message
from typing import Final, NamedTuple, Protocol, TypeVar

from ..providers.messages import Pieces
from .cache_key import UnkeyableError

__all__ = ["File", "FormParser", "Part", "PartHead", "form_fields", "form_parts", "keyed_fields"]

T = TypeVar("T")
U = TypeVar("U")

_AS_THEY_ARE: Final = ("7bit", "8bit", "binary")
_LINE: Final = b"\r\n"
_BLANK: Final = b"\r\n\r\n"
_END: Final = b"--"
_LONGEST_HEAD: Final = 2**14  # bytes of the headers of a part


def _understood(read: Callable[[T], U], given: T) -> U:
    """What ``read`` makes of it. The email parser has other errors for parameters in odd pieces."""
    try:
        return read(given)
    except UnkeyableError:
        raise
    except (ValueError, TypeError, LookupError) as exc:
        raise UnkeyableError(f"a form that is not understood: {exc}") from exc


def _boundary(content_type: str) -> bytes:
    message = Message()
    message["content-type"] = content_type
    boundary = message.get_param("boundary")
    if message.get_content_type() != "multipart/form-data" or not isinstance(boundary, str) or not boundary:
        raise UnkeyableError("not multipart/form-data with a boundary")
    return boundary.encode("latin-1", "replace")


class File(Pieces, Protocol):
    """A file that is not held in memory. ``sha256``: of its bytes, as hex digits."""

    @property
    def sha256(self) -> str: ...


class PartHead(NamedTuple):
    """What the headers of a part say. ``filename``: None where it is no file; ``content_type``: where it
    tells none."""

    name: str
    filename: str | None
    content_type: str | None


@dataclass(frozen=True, slots=True)
class Part:
    """One field of a form. The first three: as in `PartHead`."""

    name: str
    filename: str | None
    content_type: str | None
    content: bytes | File

    @property
    def text(self) -> str:
        assert isinstance(self.content, bytes)
        return self.content.decode("utf-8", "surrogateescape")

    @property
    def sha256(self) -> str:
        content = self.content
        return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else content.sha256


def _head(raw: bytes) -> PartHead:
    message = Message()
    for line in raw.decode("utf-8", "replace").split("\r\n"):
        name, colon, value = line.partition(":")
        if not colon:
            raise UnkeyableError("a form part with a malformed header")
        message[name.strip()] = value.strip()
    field = message.get_param("name", header="content-disposition")
    if not isinstance(field, str):
        raise UnkeyableError("a form part without a name")
    if message.get("content-transfer-encoding", "binary").lower() not in _AS_THEY_ARE:
        raise UnkeyableError("a form part in a transfer encoding")  # RFC 7578, 4.7: nobody sends any
    content_type = message.get_content_type() if "content-type" in message else None
    return PartHead(field, message.get_filename(), content_type)


class FormParser:
    """A form as it arrives: `feed` with what came, `finish` at its end. Nothing but the headers of a part and
    what may be the beginning of a delimiter is kept. `UnkeyableError` for anything unusual."""

    def __init__(self, content_type: str) -> None:
        self._delimiter = _LINE + _END + _understood(_boundary, content_type)
        self._buffer = _LINE  # the first delimiter is at the start of a line too
        self._at = 0
        self._state: Callable[[], PartHead | bytes | None] = self._before

    def feed(self, data: bytes) -> Iterator[PartHead | bytes]:
        """What ``data`` adds: the head of each part that begins, and behind it pieces of its content."""
        self._buffer += data
        while (event := self._state()) is not None:
            if event:
                yield event
        self._buffer, self._at = self._buffer[self._at :], 0

    def finish(self) -> None:
        if self._state != self._after:
            raise UnkeyableError("multipart body is not delimited by its boundary")

    # Each state gives an event, an empty one where there is none but it goes on; None where more must come.

    def _before(self) -> bytes | None:
        before, found = self._up_to_delimiter()
        if before.strip():
            raise UnkeyableError("multipart body is not delimited by its boundary")
        if found:
            self._state = self._delimited
        return b"" if found else None

    def _delimited(self) -> PartHead | bytes | None:
        """Behind a delimiter: a line end and the headers of a part, or the end of the form."""
        buffer, at = self._buffer, self._at
        start = buffer[at : at + 2]
        if len(start) < 2:
            return None
        if start == _END:
            self._at, self._state = at + 2, self._after
            return b""
        if start != _LINE:
            raise UnkeyableError("multipart delimiter is not a line of its own")
        blank = buffer.find(_BLANK, at + 2)
        content = (len(buffer) if blank < 0 else blank) + len(_BLANK)
        if content - at > _LONGEST_HEAD:
            raise UnkeyableError("a form part with too long headers")
        # The next delimiter has a line end of its own, and may not begin within the headers.
        delimiter = buffer.find(self._delimiter, at, content - 1 + len(self._delimiter))
        if delimiter >= 0:
            raise UnkeyableError("a form part without a blank line")
        if blank < 0 or len(buffer) < content - 1 + len(self._delimiter):
            return None
        self._at, self._state = content, self._content
        return _understood(_head, buffer[at + 2 : blank])

    def _content(self) -> bytes | None:
        data, found = self._up_to_delimiter()
        if found:
            self._state = self._delimited
        return data if data or found else None

    def _after(self) -> None:
        if self._up_to_delimiter()[1]:
            raise UnkeyableError("multipart delimiter is not a line of its own")

    def _up_to_delimiter(self) -> tuple[bytes, bool]:
        """Take what stands before the next delimiter, and that; or all that cannot be a part of one."""
        start, found = self._at, self._buffer.find(self._delimiter, self._at)
        if found >= 0:
            self._at = found + len(self._delimiter)
            return self._buffer[start:found], True
        self._at = max(start, len(self._buffer) - len(self._delimiter) + 1)
        return self._buffer[start : self._at], False


def form_parts(body: bytes, content_type: str) -> list[Part]:
    """The fields in their order. `UnkeyableError` for anything unusual."""
    parser = FormParser(content_type)
    found: list[tuple[PartHead, list[bytes]]] = []
    for event in parser.feed(body):
        if isinstance(event, PartHead):
            found.append((event, []))
        else:
            found[-1][1].append(event)
    parser.finish()
    return [Part(*head, b"".join(content)) for head, content in found]


def form_fields(body: bytes, content_type: str) -> dict[str, object]:
    """`keyed_fields` of a whole form. `UnkeyableError` as above."""
    return keyed_fields(form_parts(body, content_type))


def keyed_fields(parts: Iterable[Part]) -> dict[str, object]:
    """Field name to value, or to the list of its values where it occurs more than once. Text fields as
    text, files as the SHA-256 of their bytes (their names do not count)."""
    fields: dict[str, list[object]] = {}
    for part in parts:
        value: object = part.text if part.filename is None else {"$sha256": part.sha256}
        fields.setdefault(part.name, []).append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in fields.items()}
