"""A request and its response, as handlers see them on both fronts."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from .._ports.protocol import Port
from ..caching.answer import CacheInfo
from ..caching.headers import add_info
from ..errors import InvalidRequestError, LLMMiddlewareError

if TYPE_CHECKING:
    from .gate import Caller

__all__ = [
    "Head",
    "Pairs",
    "Request",
    "Response",
    "TooLargeError",
    "error_response",
    "json_response",
    "key_in",
    "refusal",
]

Pairs = Sequence[tuple[bytes, bytes]]

_JSON = (b"content-type", b"application/json")
_LONGEST = 86400.0  # seconds that ``Retry-After`` says at most


class TooLargeError(LLMMiddlewareError):
    """The body is longer than the app reads."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


@dataclass(slots=True, kw_only=True)
class Head:
    """What is known of a request before its body. ``path``: below the place where the app is mounted.
    ``headers``: names in lower case. ``native``: the ASGI scope or the WSGI environ."""

    method: str
    path: str
    query: str = ""
    headers: Pairs = ()
    native: Any = field(default=None, repr=False)

    def header(self, name: str) -> str:
        """Its value, several joined with commas; empty where there is none."""
        wanted = name.encode("latin-1")
        return ", ".join([value.decode("latin-1") for found, value in self.headers if found == wanted])

    @property
    def params(self) -> dict[str, str]:
        """Of the query; of several of one name the last."""
        return dict(parse_qsl(self.query, keep_blank_values=True))

    @property
    def bearer(self) -> str:
        """The API key, see `key_in`."""
        return key_in(self.headers)


@dataclass(slots=True, kw_only=True)
class Request(Head):
    """``body``: all of it. ``caller``: who asks. ``port``: how to wait. ``values``: what stands in the path
    for the route's parameters."""

    body: bytes = field(default=b"", repr=False)
    caller: Caller
    port: Port
    values: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """The body's JSON object; empty where there is no body. `InvalidRequestError` for anything else."""
        if not self.body.strip():
            return {}
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError):
            raise InvalidRequestError("the body is not JSON") from None
        if not isinstance(value, dict):
            raise InvalidRequestError("the body is not a JSON object")
        return value


@dataclass(slots=True)
class Response:
    """``body``, or ``stream`` where that is not None: events as bytes. Whoever has it closes the stream."""

    status: int = 200
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    stream: AsyncIterator[bytes] | None = None


def key_in(headers: Pairs) -> str:
    """The API key, from ``Authorization: Bearer``, else ``x-api-key``, else ``api-key``; empty where there is
    none."""
    found: dict[bytes, str] = {}
    for name, value in headers:
        if name == b"authorization":
            scheme, _, credentials = value.decode("latin-1").partition(" ")
            if scheme.lower() == "bearer":
                return credentials.strip()
        elif name in (b"x-api-key", b"api-key"):
            found[name] = value.decode("latin-1").strip()
    return found.get(b"x-api-key") or found.get(b"api-key") or ""


def json_response(value: object, status: int = 200) -> Response:
    return Response(
        status, [_JSON], json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")
    )


def refusal(error: LLMMiddlewareError, profile: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """The headers and the body of a request to a cached endpoint that is refused."""
    response = error_response(error)
    headers = [*response.headers, (b"content-length", b"%d" % len(response.body))]
    return add_info(headers, CacheInfo("bypass", None, error.code, "bypass"), profile), response.body


def error_response(error: LLMMiddlewareError) -> Response:
    """In OpenAI's shape, with ``Retry-After`` where it is known when to come again."""
    headers = [_JSON]
    seconds = getattr(error, "retry_after", None)
    if seconds is not None:
        seconds = min(max(0.0, seconds), _LONGEST)
        headers.append((b"retry-after", b"%d" % -(-seconds // 1)))
        headers.append((b"retry-after-ms", b"%d" % -(-seconds * 1000 // 1)))
    return Response(error.status, headers, error.body())
