"""``multipart/form-data`` bodies, read for their cache key and to send them on (RFC 7578; RFC 2046, 5.1.1).

What is read here decides which requests are the same, so anything unusual makes the request uncacheable
rather than guessed at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message

from .cache_key import UnkeyableError

__all__ = ["Part", "form_fields", "form_parts"]

_AS_THEY_ARE = ("7bit", "8bit", "binary")


def _boundary(content_type: str) -> bytes:
    message = Message()
    message["content-type"] = content_type
    boundary = message.get_param("boundary")
    if message.get_content_type() != "multipart/form-data" or not isinstance(boundary, str) or not boundary:
        raise UnkeyableError("not multipart/form-data with a boundary")
    return boundary.encode("latin-1", "replace")


@dataclass(frozen=True, slots=True)
class Part:
    """One field of a form. ``filename``: None where it is no file; ``content_type``: where it tells none."""

    name: str
    filename: str | None
    content_type: str | None
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode("utf-8", "surrogateescape")


def _part(raw: bytes) -> Part:
    head, separator, content = raw.partition(b"\r\n\r\n")
    if not separator:
        raise UnkeyableError("a form part without a blank line")
    message = Message()
    for line in head.decode("utf-8", "replace").split("\r\n"):
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
    return Part(field, message.get_filename(), content_type, content)


def form_parts(body: bytes, content_type: str) -> list[Part]:
    """The fields in their order. `UnkeyableError` for anything unusual."""
    try:
        return [*_parts(body, content_type)]
    except UnkeyableError:
        raise
    except (ValueError, TypeError, LookupError) as exc:  # the header parser's, on parameters in pieces
        raise UnkeyableError(f"a form that is not understood: {exc}") from exc


def _parts(body: bytes, content_type: str) -> Iterator[Part]:
    delimiter = b"\r\n--" + _boundary(content_type)
    first, *parts = (b"\r\n" + body).split(delimiter)
    if first.strip() or not parts or not parts[-1].startswith(b"--"):
        raise UnkeyableError("multipart body is not delimited by its boundary")
    for raw in parts[:-1]:
        if not raw.startswith(b"\r\n"):
            raise UnkeyableError("multipart delimiter is not a line of its own")
        yield _part(raw[2:])


def form_fields(body: bytes, content_type: str) -> dict[str, object]:
    """Field name to value, or to the list of its values where it occurs more than once. Text fields as
    text, files as the SHA-256 of their bytes (their names do not count). `UnkeyableError` as above."""
    fields: dict[str, list[object]] = {}
    for part in form_parts(body, content_type):
        value: object = part.text
        if part.filename is not None:
            value = {"$sha256": hashlib.sha256(part.content).hexdigest()}
        fields.setdefault(part.name, []).append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in fields.items()}
