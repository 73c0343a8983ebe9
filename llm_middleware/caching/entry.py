"""The stored record and its byte codec.

An `Entry` holds an answer in up to two forms: the one given to requests that asked for a plain body
and the one given to requests that asked for a stream. Bytes on the wire (all integers little-endian):

    magic "LLMC" | version u8 | crc32 u32 of all that follows
    created f64 | expires f64 | meta length u32 | then per form: body length u32, ends length u32
    meta (JSON) | plain body | plain ends | stream body | stream ends

A reader accepts exactly its own version with a right checksum and exact lengths; everything else is
`CorruptEntryError`, which callers treat as a miss. Nothing is ever unpickled or evaluated.
"""

from __future__ import annotations

import functools
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import CorruptEntryError
from ..types import Headers

__all__ = [
    "VERSION",
    "About",
    "Entry",
    "Form",
    "about",
    "decode",
    "encode",
    "entry_size",
    "pack_ends",
    "peek",
]

VERSION = 1
_MAGIC = b"LLMC"
_HEAD = struct.Struct("<4sBI")
_FIXED = struct.Struct("<ddIIIII")
# What one entry costs beside its payload in a CPython process: objects, key and table slots, measured
# by benchmarks/memory_store.py. Byte budgets count it so that they hold for small entries too.
_OVERHEAD = 600
_JSON = json.JSONDecoder()


@dataclass(slots=True)
class Form:
    """One recorded form of an answer.

    ``headers``: end-to-end response headers to replay. ``body``: the whole payload. ``ends``: for an
    answer that was streamed, the offset after each event or chunk as packed u32; None for a plain body.
    ``usage``: the recorded request asked for ``stream_options.include_usage``. ``status``: 200, but where
    the host chose to keep errors too.
    """

    headers: Headers
    body: bytes
    ends: bytes | None = None
    usage: bool = False
    status: int = 200

    def chunks(self) -> list[bytes]:
        """The payload cut where it was cut when it was recorded."""
        if self.ends is None:
            return [self.body]
        start, out = 0, []
        for end in memoryview(self.ends).cast("I"):
            out.append(self.body[start:end])
            start = end
        return out


@dataclass(slots=True)
class Entry:
    """An answer as it is kept. Times are seconds since the epoch; ``expires`` ends its freshness.

    ``labels``: what it may be found by beside its key; they stand in front of the encoded entry, not in it.
    """

    kind: str
    created: float
    expires: float
    plain: Form | None = None
    stream: Form | None = None
    model: str | None = None
    tags: tuple[str, ...] = ()
    vary: tuple[tuple[str, str], ...] = ()
    labels: bytes = b""


def pack_ends(ends: Sequence[int]) -> bytes:
    return struct.pack(f"={len(ends)}I", *ends)


def entry_size(value: object) -> int:
    """Bytes that an entry takes in this process, for byte budgets."""
    assert isinstance(value, Entry)
    size = _OVERHEAD
    for form in (value.plain, value.stream):
        if form is not None:
            size += len(form.body) + len(form.ends or b"")
    return size


def encode(entry: Entry) -> bytes:
    """The entry as self-contained bytes."""
    forms: list[object] = []
    sizes: list[int] = []
    parts: list[bytes] = []
    for form in (entry.plain, entry.stream):
        if form is None:
            forms.append(None)
            sizes += (0, 0)
            continue
        headers = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in form.headers]
        forms.append([headers, form.ends is not None, form.usage, form.status])
        parts += (form.body, form.ends or b"")
        sizes += (len(form.body), len(form.ends or b""))
    meta = json.dumps(
        [entry.kind, entry.model, entry.tags, entry.vary, forms], ensure_ascii=True, separators=(",", ":")
    ).encode()
    rest = b"".join((_FIXED.pack(entry.created, entry.expires, len(meta), *sizes), meta, *parts))
    return _HEAD.pack(_MAGIC, VERSION, zlib.crc32(rest)) + rest


def decode(data: bytes) -> Entry:
    """The entry that `encode` made; `CorruptEntryError` for any other bytes."""
    try:
        magic, version, crc = _HEAD.unpack_from(data)
        if magic != _MAGIC or version != VERSION:
            raise CorruptEntryError(f"not an entry of version {VERSION}")
        if zlib.crc32(memoryview(data)[_HEAD.size :]) != crc:
            raise CorruptEntryError("checksum does not match")
        created, expires, meta_size, *sizes = _FIXED.unpack_from(data, _HEAD.size)
        at = _HEAD.size + _FIXED.size
        if len(data) != at + meta_size + sum(sizes):
            raise CorruptEntryError("lengths do not add up")
        meta = data[at : at + meta_size]
        known = _known(meta) if meta_size <= _KNOWN_SIZE else _parsed(meta)
        at += meta_size
        plain = _form(known.plain, data, at, sizes[0], sizes[1])
        stream = _form(known.stream, data, at + sizes[0] + sizes[1], sizes[2], sizes[3])
        return Entry(known.kind, created, expires, plain, stream, known.model, known.tags, known.vary)
    except CorruptEntryError:
        raise
    except (struct.error, ValueError, TypeError, AttributeError) as exc:
        raise CorruptEntryError(f"not an entry: {type(exc).__name__}") from exc


class About(NamedTuple):
    """What an entry is about, without its content. ``size``: the bytes of the answer in all its forms. None:
    not known."""

    kind: str | None = None
    model: str | None = None
    tags: tuple[str, ...] | None = None
    created: float | None = None
    expires: float | None = None
    size: int | None = None


def about(entry: Entry) -> About:
    size = entry_size(entry) - _OVERHEAD
    return About(entry.kind, entry.model, entry.tags, entry.created, entry.expires, size)


def peek(data: bytes) -> About:
    """What the first bytes of an encoded entry tell of it, as far as they go. They are not checked, and
    nothing is told of other bytes."""
    if len(data) < _HEAD.size + _FIXED.size or not data.startswith(_MAGIC + bytes((VERSION,))):
        return About()
    created, expires, meta_size, *sizes = _FIXED.unpack_from(data, _HEAD.size)
    at = _HEAD.size + _FIXED.size
    kind, model, tags = _first(data[at : at + meta_size].decode("ascii", "replace"), (str, str, list))
    return About(kind, model, None if tags is None else tuple(tags), created, expires, sum(sizes))


def _first(text: str, types: tuple[type, ...]) -> list[Any]:
    """The first items of a JSON array that may be cut short; None for what is not whole, or another type."""
    items: list[Any] = []
    at = 1
    try:
        for kind in types:
            item, at = _JSON.raw_decode(text, at)
            items.append(item if isinstance(item, kind) else None)
            at += 1  # the comma
    except (ValueError, RecursionError):
        pass
    return items + [None] * (len(types) - len(items))


_Recorded = tuple[Headers, bool, bool, int]


class _Meta(NamedTuple):
    kind: str
    model: str | None
    tags: tuple[str, ...]
    vary: tuple[tuple[str, str], ...]
    plain: _Recorded | None
    stream: _Recorded | None


def _parsed(meta: bytes) -> _Meta:
    kind, model, tags, vary, forms = json.loads(meta.decode("ascii"))
    plain, stream = (None if form is None else _recorded(*form) for form in forms)
    return _Meta(kind, model, tuple(tags), tuple((name, value) for name, value in vary), plain, stream)


def _recorded(headers: list[list[str]], streamed: bool, usage: bool, status: int) -> _Recorded:
    pairs = tuple((name.encode("latin-1"), value.encode("latin-1")) for name, value in headers)
    return pairs, streamed, usage, status


# Many answers of one upstream have the same meta, and it is most of the work of decoding them: 6.4 µs against
# 2.5.
_KNOWN_SIZE = 1024
_known = functools.lru_cache(512)(_parsed)


def _form(recorded: _Recorded | None, data: bytes, at: int, size: int, ends: int) -> Form | None:
    if recorded is None:
        return None
    headers, streamed, usage, status = recorded
    end = at + size
    return Form(headers, data[at:end], data[end : end + ends] if streamed else None, usage, status)
