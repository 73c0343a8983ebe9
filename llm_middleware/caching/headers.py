"""Every header the cache reads or writes: names, builders, and which response headers are kept.

`Cache-Status` follows RFC 9211, `Age` and `Vary` RFC 9111. Names are lower case and values bytes, as ASGI
has them; `as_text` gives what WSGI wants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from math import floor, inf

from ..types import Headers
from .answer import CacheInfo, Found

__all__ = [
    "EVENT_STREAM",
    "IDENTITY",
    "JSON",
    "PROFILES",
    "add_info",
    "as_text",
    "content_encoding",
    "content_type",
    "found_headers",
    "get_header",
    "info_headers",
    "kept",
    "shared",
    "stream_headers",
    "varies",
]

Pairs = list[tuple[bytes, bytes]]

IDENTITY = frozenset({b"api-key", b"authorization", b"cookie", b"x-api-key", b"x-goog-api-key"})
"""Request headers that say who is calling; two of them are those of Azure's and Google's clients."""

READ = IDENTITY | {b"cache-control", b"content-type", b"content-encoding", b"content-length"}
"""Request headers that are looked at before the plan."""

PROFILES = ("standard", "litellm")

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"

_HIT, _STALE = (b"x-llm-cache", b"hit"), (b"x-llm-cache", b"stale")
_PRIVATE = (b"cache-control", b"private, no-store")

# Not kept with an answer: about the connection, about one response, or about one caller.
_DROPPED = frozenset(
    b"age alt-svc cache-status connection content-encoding content-length date keep-alive"
    b" proxy-authenticate proxy-connection request-id retry-after server server-timing set-cookie trailer"
    b" transfer-encoding upgrade via x-request-id".split()
)
# Of those, what is true for everybody who shares the call.
_SHARED = frozenset(b"retry-after x-llm-attempts x-llm-deployment x-llm-fallback x-llm-model".split())
_DROPPED_PREFIXES = (b"x-llm-", b"x-litellm-", b"x-ratelimit-", b"anthropic-ratelimit-")


def get_header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    """The value of ``name``, its occurrences joined with commas; empty where it is absent."""
    return b", ".join([value for found, value in headers if found == name])


def content_type(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    return get_header(headers, b"content-type").partition(b";")[0].strip().lower()


def content_encoding(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    value = get_header(headers, b"content-encoding").strip().lower()
    return b"" if value == b"identity" else value


def kept(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """The response headers that are stored and replayed."""
    return tuple(
        (name, value)
        for name, value in headers
        if name not in _DROPPED and not name.startswith(_DROPPED_PREFIXES)
    )


def shared(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """The response headers that those get who read along while the call is made."""
    headers = tuple(headers)
    return kept(headers) + tuple(pair for pair in headers if pair[0] in _SHARED)


def varies(
    headers: Iterable[tuple[bytes, bytes]], request: Callable[[str], str]
) -> tuple[tuple[str, str], ...] | None:
    """(header, its value in this request) for every header that ``Vary`` names, ``Accept-Encoding`` aside
    since stored answers are not encoded. None for ``Vary: *``."""
    names = {name.strip().lower() for name in get_header(headers, b"vary").decode("latin-1").split(",")}
    if "*" in names:
        return None
    return tuple((name, request(name)) for name in sorted(names - {"", "accept-encoding"}))


def _status(info: CacheInfo) -> str:
    parts = ["llm-middleware"]
    parts.append(f"fwd={info.forward or 'miss'}" if info.ttl is None else "hit")
    if info.ttl is not None and info.ttl < math.inf:
        parts.append(f"ttl={math.floor(info.ttl)}")
    if info.stored:
        parts.append("stored")
    if info.status == "collapsed":
        parts.append("collapsed")
    if info.detail:
        # RFC 8941: what does not begin with a letter is no token but a string.
        parts.append(f"detail={info.detail}" if info.detail[0].isalpha() else f'detail="{info.detail}"')
    return "; ".join(parts)


def info_headers(info: CacheInfo, profile: str = "standard") -> Pairs:
    """The headers that tell what the cache did."""
    pairs = [(b"cache-status", _status(info).encode("latin-1")), (b"x-llm-cache", info.status.encode())]
    if info.key:
        key = info.key.encode()
        pairs.append((b"x-llm-cache-key", key))
        if profile == "litellm":
            pairs.append((b"x-litellm-cache-key", key))
    if info.age is not None:
        pairs.append((b"age", str(max(0, int(info.age))).encode()))
    if info.tier:
        pairs.append((b"x-llm-cache-tier", info.tier.encode()))
    if info.similarity is not None:
        similarity = b"%.4f" % info.similarity
        pairs.append((b"x-llm-cache-similarity", similarity))
        if profile == "litellm":
            pairs.append((b"x-litellm-semantic-similarity", similarity))
    return pairs


def add_info(headers: Iterable[tuple[bytes, bytes]], info: CacheInfo, profile: str = "standard") -> Pairs:
    """A response's headers and what the cache did. Answers to POST stay out of every other cache, unless
    the host said otherwise."""
    pairs = list(headers)
    if not any(name == b"cache-control" for name, _ in pairs):
        pairs.append(_PRIVATE)
    return pairs + info_headers(info, profile)


def found_headers(found: Found, key: str, profile: str = "standard") -> Pairs:
    """What `add_info` gives for a stored answer, in one go: every hit comes through here."""
    if found.like is not None:
        return add_info(found.headers, found.info(""), profile)
    status = b"llm-middleware; hit; ttl=%d" % floor(found.ttl) if found.ttl < inf else b"llm-middleware; hit"
    if found.stale:
        status += b"; detail=" + found.stale.encode()
    digest = key[-64:].encode()
    pairs = [
        *found.headers,
        (b"cache-status", status),
        _STALE if found.stale else _HIT,
        (b"x-llm-cache-key", digest),
        (b"age", b"%d" % found.age if found.age > 0 else b"0"),
        (b"x-llm-cache-tier", found.tier.encode()),
    ]
    if profile == "litellm":
        pairs.append((b"x-litellm-cache-key", digest))
    for name, _ in found.headers:
        if name == b"cache-control":
            return pairs
    pairs.append(_PRIVATE)
    return pairs


def as_text(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]


def stream_headers(headers: Iterable[tuple[bytes, bytes]]) -> Pairs:
    """The headers of an answer sent in pieces: no length, and no proxy that holds an event stream back."""
    pairs = [pair for pair in headers if pair[0] != b"content-length"]
    if content_type(pairs) == b"text/event-stream" and not get_header(pairs, b"x-accel-buffering"):
        pairs.append((b"x-accel-buffering", b"no"))
    return pairs
