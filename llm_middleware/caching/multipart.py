"""``multipart/form-data`` bodies, read for their cache key only (RFC 7578; RFC 2046, section 5.1.1).

The handler gets the body untouched. What is read here decides which requests are the same, so anything
unusual makes the request uncacheable rather than guessed at.
"""

from __future__ import annotations

import hashlib
from email.message import Message

from .cache_key import UnkeyableError

__all__ = ["form_fields"]


def _boundary(content_type: str) -> bytes:
    message = Message()
    message["content-type"] = content_type
    boundary = message.get_param("boundary")
    if message.get_content_type() != "multipart/form-data" or not isinstance(boundary, str) or not boundary:
        raise UnkeyableError("not multipart/form-data with a boundary")
    return boundary.encode("latin-1", "replace")


def _part(raw: bytes) -> tuple[str, bool, bytes]:
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
    is_file = message.get_filename() is not None
    return field, is_file, content


def form_fields(body: bytes, content_type: str) -> dict[str, object]:
    """Field name to value, or to the list of its values where it occurs more than once. Text fields as
    text, files as the SHA-256 of their bytes (their names do not count)."""
    try:
        return _fields(body, content_type)
    except (ValueError, TypeError, LookupError) as exc:  # the header parser's, on parameters in pieces
        raise UnkeyableError(f"a form that is not understood: {exc}") from exc


def _fields(body: bytes, content_type: str) -> dict[str, object]:
    delimiter = b"\r\n--" + _boundary(content_type)
    first, *parts = (b"\r\n" + body).split(delimiter)
    if first.strip() or not parts or not parts[-1].startswith(b"--"):
        raise UnkeyableError("multipart body is not delimited by its boundary")
    fields: dict[str, list[object]] = {}
    for raw in parts[:-1]:
        if not raw.startswith(b"\r\n"):
            raise UnkeyableError("multipart delimiter is not a line of its own")
        name, is_file, content = _part(raw[2:])
        value: object = {"$sha256": hashlib.sha256(content).hexdigest()}
        if not is_file:
            value = content.decode("utf-8", "surrogateescape")
        fields.setdefault(name, []).append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in fields.items()}
