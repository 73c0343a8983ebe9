"""Server-sent events as bytes: where events end, what they say, and how a stream is recorded.

The format is the WHATWG event stream, https://html.spec.whatwg.org/multipage/server-sent-events.html.
One rule differs on purpose: a last event that no blank line ends still counts, because providers do
leave the blank line out and a client that reads to the end of the body has seen that event.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

__all__ = [
    "DONE",
    "Event",
    "dump_json",
    "event_ends",
    "format_event",
    "load_json",
    "parse_events",
    "split_events",
]

DONE = "[DONE]"
"""The data of the event that ends OpenAI's chat and text streams."""

# What ends an event. A pattern that begins with a literal is searched for as fast as that literal,
# so streams that keep to one line end, which all but a few do, have a pattern of their own.
_LF = re.compile(rb"\n\n+")
_CRLF = re.compile(rb"\r\n\r\n(?:\r\n)*")
# Atomic: CRLF is one line end and must never be taken for CR and LF, which would be a blank line.
_MIXED = re.compile(rb"(?>\r\n|\r|\n){2,}")
_BLANK_LINES = (b"\n\n", b"\r\n\r\n", b"\r\r")
_LINE_END = re.compile("\r\n|\r|\n")


def event_ends(data: bytes) -> list[int]:
    """The offset just after every event, so that the slices between them make up ``data`` again.

    Blank lines belong to the event before them, a block of comments is a piece of its own, and the
    last piece ends with the data whether or not a blank line does. Empty data has no pieces.
    """
    start = len(data) - len(data.lstrip(b"\r\n")) if data[:1] in (b"\r", b"\n") else 0
    ends = [blank.end() for blank in _blank_lines(data).finditer(data, start)]
    if data and (not ends or ends[-1] != len(data)):
        ends.append(len(data))
    return ends


def split_events(data: bytes) -> tuple[bytes, bytes]:
    """The whole events at the beginning of ``data``, and the bytes of the one that has not ended."""
    end = max(data.rfind(blank) + len(blank) if blank in data else 0 for blank in _BLANK_LINES)
    return data[:end], data[end:]


def _blank_lines(data: bytes) -> re.Pattern[bytes]:
    returns = data.count(b"\r")
    if not returns:
        return _LF
    return _CRLF if returns == data.count(b"\n") == data.count(b"\r\n") else _MIXED


@dataclass(slots=True)
class Event:
    """One event. ``event`` is its type where one was given, ``id`` the last event ID in force."""

    event: str | None
    data: str
    id: str | None = None


def parse_events(data: bytes) -> list[Event]:
    """The events of a stream, in order: comments, ``retry`` and events without a data line left out.

    Data lines are joined by a line feed; bytes that are not UTF-8 become U+FFFD.
    """
    events: list[Event] = []
    lines: list[str] = []
    kind: str | None = None
    last_id: str | None = None
    for line in [*_lines(data), ""]:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if lines:
                events.append(Event(kind, "\n".join(lines), last_id))
            lines, kind = [], None
        elif name == "data":
            lines.append(value)
        elif name == "event":
            kind = value or None
        elif name == "id" and "\0" not in value:
            last_id = value or None
    return events


_HOLE = re.compile(rb'"(?:content|text|delta|obfuscation)": ?"(?=[^"])')
_text = re.compile(rb'(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+').match


_UNLIKE_ALL = (b"\n\n",)  # what no event has in it


def thinned(data: bytes) -> bytes:
    """The stream without the events that differ from the one before in nothing but the characters of a text.

    A stream is mostly such events, and about all of them the same can be said: that text came. An event with
    pieces of arguments is never left out, for those count as a whole.
    """
    if b"\r" in data:
        return data
    kept: list[bytes] = []
    rest: list[bytes]
    head, *rest = _UNLIKE_ALL
    for piece in data.split(b"\n\n"):
        if piece.startswith(head):
            at = len(head)
            for part in rest:
                at = _text(piece, at).end()  # type: ignore[union-attr]  # it matches nothing, too
                if not piece.startswith(part, at):
                    break
                at += len(part)
            else:
                if at == len(piece):
                    continue
        kept.append(piece)
        head, *rest = _around_text(piece) or _UNLIKE_ALL
    return b"\n\n".join(kept)


def _around_text(piece: bytes) -> list[bytes]:
    """What stands around the texts of an event; nothing where it has none or more than texts may count."""
    parts: list[bytes] = []
    start = 0
    for hole in _HOLE.finditer(piece):
        match = _text(piece, hole.end())
        if hole.start() < start or match is None:
            return []
        parts.append(piece[start : hole.end()])
        start = match.end()
    if parts:
        parts.append(piece[start:])
    rest = b"".join(parts)
    return [] if b"\\" in rest or b"arguments" in rest or b"partial_json" in rest else parts


def _lines(data: bytes) -> list[str]:
    # Not str.splitlines: U+2028 and its like are ordinary characters inside JSON text.
    text = data.decode("utf-8", "replace").removeprefix("\ufeff")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.split("\n")


def format_event(payload: bytes | str, event: str | None = None) -> bytes:
    """``payload`` as one event, under the type ``event``; each of its lines becomes a data line."""
    text = payload.decode() if isinstance(payload, bytes) else payload
    head = "" if event is None else f"event: {event}\n"
    data = "\n".join(f"data: {line}" for line in _LINE_END.split(text))
    return f"{head}{data}\n\n".encode()


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_no_constant)


def load_json(data: bytes | str) -> object:
    """The JSON value (RFC 8259) that ``data`` holds; `ValueError` for anything else, however deep or odd."""
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        value: object = _decoder.decode(text)
    except RecursionError as exc:
        raise ValueError("nested too deep") from exc
    return value


def dump_json(value: object) -> bytes:
    """``value`` as compact JSON; `ValueError` for a number that JSON does not have."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return text.encode()
    except UnicodeEncodeError:
        # Half a surrogate pair, as where a character was split over two deltas: only an escape can say
        # it, and two neighbouring halves read as the whole character again.
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    except RecursionError as exc:
        raise ValueError("nested too deep") from exc
