"""A form with a file in it (``multipart/form-data``, RFC 7578), as transcriptions are asked for.

A file that comes as `Pieces` and is large goes out in pieces; any other is a part of the body's bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final

from ..errors import BadRequestError
from .messages import Pieces

__all__ = ["form", "read_file"]

_WHOLE: Final = 2**18  # bytes of a file that is put into the body
_OCTETS: Final = "application/octet-stream"
# Their names tell some providers what they are.
_TYPES: Final = {
    "flac": "audio/flac",
    "m4a": "audio/mp4",
    "mp3": "audio/mpeg",
    "mp4": "audio/mp4",
    "mpeg": "audio/mpeg",
    "mpga": "audio/mpeg",
    "oga": "audio/ogg",
    "ogg": "audio/ogg",
    "wav": "audio/wav",
    "webm": "audio/webm",
}
_ESCAPES: Final = str.maketrans({'"': "%22", "\r": "%0D", "\n": "%0A"})


def form(fields: Mapping[str, object]) -> tuple[str, bytes | Pieces]:
    """The content type and the body. ``file``: see `read_file`; a list is sent as ``name[]``, once per item.

    `BadRequestError` names the field that a form cannot hold.
    """
    if "file" not in fields:
        raise BadRequestError("a transcription needs a file", param="file")
    boundary = f"form-{os.urandom(16).hex()}"
    parts = [part for name, value in fields.items() for part in _parts(str(name), value)]
    pieces = [
        piece for head, content in parts for piece in (f"--{boundary}\r\n".encode(), head, content, b"\r\n")
    ]
    pieces.append(f"--{boundary}--\r\n".encode())
    return f"multipart/form-data; boundary={boundary}", _joined(pieces)


def _joined(pieces: Sequence[bytes | Pieces]) -> bytes | Pieces:
    if any(not isinstance(piece, bytes) and len(piece) > _WHOLE for piece in pieces):
        return _Body(pieces)
    try:
        return b"".join([data for piece in pieces for data in _data(piece)])
    except OSError:
        raise BadRequestError("the file cannot be read", param="file") from None


def _data(piece: bytes | Pieces) -> Iterator[bytes]:
    return iter((piece,)) if isinstance(piece, bytes) else piece.pieces()


class _Body:
    """What stands around a file, and the file."""

    def __init__(self, pieces: Sequence[bytes | Pieces]) -> None:
        self._pieces = pieces

    def __len__(self) -> int:
        return sum(map(len, self._pieces))

    def pieces(self) -> Iterator[bytes]:
        return filter(None, chain.from_iterable(map(_data, self._pieces)))


def _parts(name: str, value: object) -> Iterator[tuple[bytes, bytes | Pieces]]:
    label = name.translate(_ESCAPES)
    if name == "file":
        filename, content, content_type = read_file(value)
        about = f'form-data; name="{label}"; filename="{filename.translate(_ESCAPES)}"'
        yield _head(f"{about}\r\nContent-Type: {content_type}"), content
    elif isinstance(value, list | tuple):
        for item in value:
            yield _head(f'form-data; name="{label}[]"'), _scalar(name, item)
    elif value is not None:
        yield _head(f'form-data; name="{label}"'), _scalar(name, value)


def _head(disposition: str) -> bytes:
    return f"Content-Disposition: {disposition}\r\n\r\n".encode("utf-8", "replace")


def _scalar(name: str, value: object) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "replace")
    if isinstance(value, bytes):
        return value
    try:
        return json.dumps(value, allow_nan=False).encode()  # true, 0.5, a mapping
    except (TypeError, ValueError, RecursionError):
        raise BadRequestError(f"{name} has a value that a form cannot hold", param=name) from None


def read_file(value: object) -> tuple[str, bytes | Pieces, str]:
    """Its name, its bytes and its content type, from what OpenAI's SDK takes: bytes, an open file, or a tuple
    of a name, one of these and perhaps a content type. `Pieces` stay what they are.

    An open file is read from where it stands and put back there, so that a request can be sent again.
    `BadRequestError` for anything else.
    """
    name, content_type = "", None
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
        if not 2 <= len(value) <= 4 or not (value[0] is None or isinstance(value[0], str)):
            raise _no_file()
        name, content_type, value = value[0] or "", value[2] if len(value) > 2 else None, value[1]
    content = bytes(value) if isinstance(value, bytes | bytearray | memoryview) else _content(value)
    # A file that was opened by number has a number for a name.
    given = name or getattr(value, "name", None)
    name = os.path.basename(given) if isinstance(given, str) and given else "audio.wav"
    if not isinstance(content_type, str) or any(ch < " " or ch > "~" for ch in content_type):
        content_type = _TYPES.get(name.rpartition(".")[2].lower(), _OCTETS)
    return name, content, content_type


def _content(value: Any) -> bytes | Pieces:
    if isinstance(value, Pieces):
        return value
    if not hasattr(value, "read"):
        raise _no_file()
    try:
        place = value.tell() if hasattr(value, "seek") else None
        content = value.read()
        if place is not None:
            value.seek(place)
    except (OSError, ValueError):
        raise BadRequestError("the file cannot be read", param="file") from None
    if not isinstance(content, bytes):
        raise _no_file()
    return content


def _no_file() -> BadRequestError:
    return BadRequestError(
        "expected bytes, a file opened in binary mode, or a name and one of these", param="file"
    )
