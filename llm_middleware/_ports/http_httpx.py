"""Clients over httpx: for what the faster ones cannot do, and for clients of the user's own.

The total of a call ends an async one at that moment. A sync one is looked at whenever something comes, and
waits for the next piece no longer than the total is: an answer that drips ends in time, one that stops in the
middle may take up to twice as long.
"""

from __future__ import annotations

import asyncio
import ssl
import time
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import LLMMiddlewareError
from ..providers.messages import Outgoing, Pieces, Reply, Timeouts
from .http_body import as_they_are_read
from .http_decode import HAS_BROTLI, Decoder, decoder
from .http_errors import (
    broken_off,
    deadline_passed,
    earlier,
    monotonic_end,
    no_answer,
    no_connection,
    unreachable,
    unsendable,
)
from .http_reply import IteratedReply
from .http_settings import HTTPSettings, Route, base_headers, basic
from .http_turns import LoopTurns, ThreadTurns

if TYPE_CHECKING:
    import httpx

__all__ = ["AsyncHttpxClient", "SyncHttpxClient"]

_LEAST = 0.001  # seconds; httpx takes a timeout of zero for one that has passed before it began


class _Client:
    """What both kinds share: the requests, and a transport for each proxy and scheme.

    httpx's transports are used without its clients: those add redirects, cookies and authentication to each
    call, and none of it is wanted here. A client of the user's own is used whole.
    """

    def __init__(self, settings: HTTPSettings, route: Route) -> None:
        self._settings = settings
        self._route = route
        self._own: Any = settings.http_client
        self._headers = base_headers(HAS_BROTLI)
        self._transports: dict[tuple[str | None, str], Any] = {}

    def _arguments(self, scheme: str) -> dict[str, Any]:
        import httpx

        most = self._settings.max_connections
        return {
            # Without it httpx reads the authorities, for connections that need none.
            "verify": self._route.tls if scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            "http2": self._settings.http2,
            "trust_env": False,  # the environment is read by `Route`
            "limits": httpx.Limits(
                max_connections=most,
                max_keepalive_connections=most,
                keepalive_expiry=self._settings.keepalive,
            ),
        }

    def _request(
        self,
        request: Outgoing,
        timeout: dict[str, float | None],
        streamed: Callable[[Pieces], Iterable[bytes] | AsyncIterable[bytes]],
    ) -> httpx.Request:
        """``streamed``: what the client takes for a body in pieces."""
        import httpx

        body, sent = request.body, request.headers
        if not isinstance(body, bytes):
            # Else it would go out in chunks, which some providers do not take.
            sent = {**sent, "content-length": str(len(body))}
        content = body if isinstance(body, bytes) else streamed(body)
        if self._own is not None:
            made: httpx.Request = self._own.build_request(
                request.method,
                request.url,
                headers=sent,
                content=content,
                timeout=httpx.Timeout(**timeout),
            )
            return made
        url = httpx.URL(request.url)
        headers = {**self._headers, **sent}
        if (credentials := basic(url.username or None, url.password)) is not None:
            headers.setdefault("authorization", credentials)
        return httpx.Request(
            request.method,
            url,
            headers=headers,
            content=content,
            extensions={"timeout": timeout},
        )

    def _transport(self, kind: type[Any], url: httpx.URL) -> Any:
        proxy = self._route.proxy(url.scheme, url.netloc.decode("ascii"))
        found = self._transports.get((proxy, url.scheme))
        if found is None:
            made = kind(proxy=self._with_tls(proxy), **self._arguments(url.scheme))
            found = self._transports.setdefault((proxy, url.scheme), made)
        return found

    def _with_tls(self, proxy: str | None) -> httpx.Proxy | None:
        import httpx

        if proxy is None:
            return None
        return httpx.Proxy(proxy, ssl_context=self._route.tls if proxy.startswith("https") else None)


def _timeout(timeouts: Timeouts, waited: float, until: float | None) -> dict[str, float | None]:
    connect = timeouts.connect if timeouts.connect is None else timeouts.connect - waited
    parts = [earlier(connect, until), earlier(timeouts.read, until)]
    connect, read = (part if part is None else max(part, _LEAST) for part in parts)
    return {"connect": connect, "read": read, "write": read, "pool": connect}


def _translated(exc: Exception, timeouts: Timeouts, until: float | None) -> Exception:
    """The error of ours for one of httpx's; any other as it is."""
    import httpx

    if isinstance(exc, LLMMiddlewareError):
        return exc
    if isinstance(exc, httpx.TimeoutException | TimeoutError):
        if until is not None and time.monotonic() >= until - _LEAST:
            return deadline_passed(timeouts)
        connecting = isinstance(exc, httpx.ConnectTimeout | httpx.PoolTimeout)
        return no_connection(timeouts) if connecting else no_answer(timeouts)
    if isinstance(exc, httpx.ConnectError | httpx.ProxyError | httpx.UnsupportedProtocol | httpx.InvalidURL):
        return unreachable(exc)
    if isinstance(exc, httpx.LocalProtocolError):
        return unsendable()
    if isinstance(exc, httpx.HTTPError | httpx.StreamError | OSError | ValueError):
        return broken_off(exc)
    return exc


def _decoder(response: httpx.Response) -> Decoder | None:
    """Ours, where it knows the encoding: httpx's stops after the first of several gzip members."""
    encoding = response.headers.get("content-encoding")
    return None if encoding is None else decoder(encoding)


class AsyncHttpxClient(_Client):
    """One event loop's client."""

    def __init__(self, settings: HTTPSettings, route: Route) -> None:
        super().__init__(settings, route)
        self._turns = LoopTurns(settings.max_connections)

    async def send(self, request: Outgoing, timeouts: Timeouts) -> Reply:
        until = monotonic_end(timeouts)
        began = time.monotonic()
        try:
            await self._turns.take(earlier(timeouts.connect, until))
        except TimeoutError:
            total = until is not None and time.monotonic() >= until
            raise (deadline_passed if total else no_connection)(timeouts) from None
        try:
            limits = _timeout(timeouts, time.monotonic() - began, until)
            made = self._request(request, limits, as_they_are_read)
            async with asyncio.timeout(earlier(None, until)):
                response = await self._answer(made)
        except Exception as exc:
            self._turns.give()
            raise _translated(exc, timeouts, until) from None
        except BaseException:
            self._turns.give()
            raise
        return _AsyncReply(response, timeouts, until, self._turns)

    async def _answer(self, made: httpx.Request) -> httpx.Response:
        import httpx

        if self._own is not None:
            answer: httpx.Response = await self._own.send(made, stream=True, follow_redirects=False)
            return answer
        answer = await self._transport(httpx.AsyncHTTPTransport, made.url).handle_async_request(made)
        answer.request = made
        return answer

    async def aclose(self) -> None:
        transports, self._transports = self._transports, {}
        for transport in transports.values():
            await transport.aclose()


class _AsyncReply(IteratedReply):
    """A `Reply`, and the iterator over its own body."""

    def __init__(
        self, response: httpx.Response, timeouts: Timeouts, until: float | None, turns: LoopTurns
    ) -> None:
        self.status = response.status_code
        self.headers: Mapping[str, str] = dict(response.headers)
        self._response = response
        self._timeouts = timeouts
        self._until = until
        self._turns: LoopTurns | None = turns
        self._decoder = _decoder(response)
        self._body: AsyncIterator[bytes] = response.aiter_raw() if self._decoder else response.aiter_bytes()

    async def __anext__(self) -> bytes:
        try:
            async with asyncio.timeout(earlier(None, self._until)):
                chunk = await self._next()
            if not chunk:
                await self.aclose()
                raise StopAsyncIteration
            return chunk
        except StopAsyncIteration:
            raise
        except Exception as exc:
            await self.aclose()
            raise _translated(exc, self._timeouts, self._until) from None
        except BaseException:
            await self.aclose()
            raise

    async def _next(self) -> bytes:
        """What comes next; nothing at the end."""
        async for data in self._body:
            plain = data if self._decoder is None else self._decoder.decode(data)
            if plain:  # a decoder may have nothing yet
                return plain
        if self._decoder is not None:
            self._decoder.finish()
        return b""

    async def aclose(self) -> None:
        turns, self._turns = self._turns, None
        if turns is not None:
            try:
                await self._response.aclose()
            finally:
                turns.give()


class SyncHttpxClient(_Client):
    """One process's client, for all its threads."""

    def __init__(self, settings: HTTPSettings, route: Route) -> None:
        super().__init__(settings, route)
        self._turns = ThreadTurns(settings.max_connections)
        # For a client that nobody closes; also when the interpreter ends.
        weakref.finalize(self, _close_all, self._transports)

    def send(self, request: Outgoing, timeouts: Timeouts) -> Reply:
        until = monotonic_end(timeouts)
        began = time.monotonic()
        try:
            self._turns.take(earlier(timeouts.connect, until))
        except TimeoutError:
            total = until is not None and time.monotonic() >= until
            raise (deadline_passed if total else no_connection)(timeouts) from None
        try:
            limits = _timeout(timeouts, time.monotonic() - began, until)
            made = self._request(request, limits, lambda body: body.pieces())
            response = self._answer(made)
        except Exception as exc:
            self._turns.give()
            raise _translated(exc, timeouts, until) from None
        except BaseException:
            self._turns.give()
            raise
        return _SyncReply(response, timeouts, until, self._turns)

    def _answer(self, made: httpx.Request) -> httpx.Response:
        import httpx

        if self._own is not None:
            answer: httpx.Response = self._own.send(made, stream=True, follow_redirects=False)
            return answer
        answer = self._transport(httpx.HTTPTransport, made.url).handle_request(made)
        answer.request = made
        return answer

    def close(self) -> None:
        _close_all(self._transports)


def _close_all(transports: dict[Any, Any]) -> None:
    while transports:
        transports.popitem()[1].close()


class _SyncReply(IteratedReply):
    """A `Reply` whose coroutines never suspend, and the iterator over its own body."""

    def __init__(
        self, response: httpx.Response, timeouts: Timeouts, until: float | None, turns: ThreadTurns
    ) -> None:
        self.status = response.status_code
        self.headers: Mapping[str, str] = dict(response.headers)
        self._response = response
        self._timeouts = timeouts
        self._until = until
        self._turns: ThreadTurns | None = turns
        self._decoder = _decoder(response)
        self._body: Iterator[bytes] = response.iter_raw() if self._decoder else response.iter_bytes()

    async def __anext__(self) -> bytes:
        try:
            chunk = self._next()
        except Exception as exc:
            await self.aclose()
            raise _translated(exc, self._timeouts, self._until) from None
        except BaseException:
            await self.aclose()
            raise
        if not chunk:
            await self.aclose()
            raise StopAsyncIteration
        return chunk

    def _next(self) -> bytes:
        """What comes next; nothing at the end."""
        for data in self._body:
            if self._until is not None and time.monotonic() >= self._until:
                raise deadline_passed(self._timeouts)
            plain = data if self._decoder is None else self._decoder.decode(data)
            if plain:  # a decoder may have nothing yet
                return plain
        if self._decoder is not None:
            self._decoder.finish()
        return b""

    async def aclose(self) -> None:
        turns, self._turns = self._turns, None
        if turns is not None:
            try:
                self._response.close()
            finally:
                turns.give()
