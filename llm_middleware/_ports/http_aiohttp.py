"""`AiohttpClient`: an event loop's client over aiohttp, a tenth of httpx's cost at many concurrent calls."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import LLMMiddlewareError
from ..providers.messages import Outgoing, Pieces, Reply, Timeouts
from .http_body import as_they_are_read
from .http_decode import HAS_BROTLI
from .http_errors import broken_off, deadline_passed, no_answer, no_connection, unreachable, unsendable
from .http_reply import IteratedReply
from .http_settings import HTTPSettings, Route, base_headers, basic
from .http_stale import staleness

if TYPE_CHECKING:
    import aiohttp
    from multidict import CIMultiDictProxy

__all__ = ["AiohttpClient"]

_BUFFER = 2**16  # bytes of a body that wait for their reader, before the provider is made to wait
_AT_ONCE = 2**20  # bytes; aiohttp warns of larger bodies that are given to it whole
_LONGEST_LINE = 2**16  # of a head; 8190 unless given, which some providers' cookies and policies exceed


class AiohttpClient:
    """One event loop's client."""

    def __init__(self, settings: HTTPSettings, route: Route) -> None:
        import aiohttp

        self._route = route
        self._timeout = aiohttp.ClientTimeout
        self._session = aiohttp.ClientSession(
            connector=_connector_class()(
                limit=settings.max_connections,
                keepalive_timeout=settings.keepalive,
            ),
            headers=base_headers(HAS_BROTLI),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,  # the environment is read by `Route`
            read_bufsize=_BUFFER,
            max_line_size=_LONGEST_LINE,
            max_field_size=_LONGEST_LINE,
        )

    async def send(self, request: Outgoing, timeouts: Timeouts) -> Reply:
        try:
            url, credentials = _url(request.url)
            if url.scheme not in ("http", "https") or not url.host:
                raise unreachable(ValueError())
            proxy = self._route.proxy(url.scheme, url.host_port_subcomponent or "")
            response = await self._session.request(
                request.method,
                url,
                data=_payload(request.body),
                headers=_headers(request, credentials),
                skip_auto_headers=None if "content-type" in request.headers else ("content-type",),
                allow_redirects=False,
                timeout=self._limits(timeouts),
                ssl=self._route.tls if url.scheme == "https" or (proxy or "").startswith("https") else True,
                proxy=proxy,
            )
        except Exception as exc:
            raise _translated(exc, timeouts) from None
        return _Reply(response, timeouts)

    def _limits(self, timeouts: Timeouts) -> aiohttp.ClientTimeout:
        read, total = timeouts.read, timeouts.total
        return self._timeout(
            total=total,
            connect=timeouts.connect,
            # Not where the total ends first: it is a timer more for each piece that comes.
            sock_read=None if read is not None and total is not None and total <= read else read,
            ceil_threshold=math.inf,  # a timeout is what it says, not rounded up to a second
        )

    async def aclose(self) -> None:
        await self._session.close()


class _Reply(IteratedReply):
    """A `Reply`, and the iterator over its own body."""

    __slots__ = ("_response", "_timeouts", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse, timeouts: Timeouts) -> None:
        self._response = response
        self._timeouts = timeouts
        self.status = response.status
        self.headers: Mapping[str, str] = _Headers(response.headers)

    async def read(self) -> bytes:
        try:
            return await self._response.read()
        except Exception as exc:
            self._response.close()
            raise _translated(exc, self._timeouts) from None
        except BaseException:
            self._response.close()
            raise

    async def __anext__(self) -> bytes:
        try:
            chunk = await self._response.content.readany()
        except Exception as exc:
            self._response.close()
            raise _translated(exc, self._timeouts) from None
        except BaseException:
            self._response.close()
            raise
        if not chunk:
            self._response.close()
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        # Of an answer that is whole the connection went back already; any other is dropped with it.
        self._response.close()


class _Headers(Mapping[str, str]):
    """Names in lower case; the values of a name that comes twice in one. Made when they are looked at:
    most answers are read without them."""

    __slots__ = ("_given",)

    def __init__(self, given: CIMultiDictProxy[str]) -> None:
        self._given = given

    def __getitem__(self, name: str) -> str:
        return ", ".join(self._given.getall(name))

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(map(str.lower, self._given)))

    def __len__(self) -> int:
        return len(set(map(str.lower, self._given)))


def _payload(body: bytes | Pieces) -> bytes | io.BytesIO | AsyncIterator[bytes]:
    if isinstance(body, bytes):
        return body if len(body) < _AT_ONCE else io.BytesIO(body)
    return as_they_are_read(body)


def _headers(request: Outgoing, credentials: dict[str, str]) -> dict[str, str]:
    headers, body = request.headers, request.body
    if credentials:
        headers = {**credentials, **headers}
    # Else it would go out in chunks, which some providers do not take.
    return headers if isinstance(body, bytes) else {**headers, "content-length": str(len(body))}


@functools.lru_cache(256)
def _url(text: str) -> tuple[Any, dict[str, str]]:
    """As it is, what is quoted in it stays so; and the header that its user and password come to."""
    from yarl import URL

    url = URL(text, encoded=True)
    value = basic(url.user, url.password)
    return (url, {}) if value is None else (url.with_user(None), {"authorization": value})


@functools.cache
def _connector_class() -> type[aiohttp.TCPConnector]:
    import aiohttp

    class Connector(aiohttp.TCPConnector):
        """Does not send over a connection that the provider has closed, though the loop has not seen it yet:
        aiohttp would say that the provider broke off, and whether it got the request."""

        async def connect(self, req: Any, traces: Any, timeout: Any) -> Any:
            while True:
                connection = await super().connect(req, traces, timeout)
                protocol: Any = connection.protocol
                transport = connection.transport
                if transport is None:
                    return connection
                stale = getattr(protocol, "llm_stale", None)
                if stale is None:  # a new one
                    sock = transport.get_extra_info("socket")
                    protocol.llm_stale = _never if sock is None else staleness(sock)
                    return connection
                if not stale():
                    return connection
                connection.close()

    return Connector


def _never() -> bool:
    return False


def _translated(exc: Exception, timeouts: Timeouts) -> Exception:
    """The error of ours for one of aiohttp's; any other as it is."""
    import aiohttp

    if isinstance(exc, LLMMiddlewareError):
        return exc
    if isinstance(exc, aiohttp.ConnectionTimeoutError):
        return no_connection(timeouts)
    if isinstance(exc, aiohttp.ServerTimeoutError):
        return no_answer(timeouts)
    if isinstance(exc, TimeoutError):
        return deadline_passed(timeouts)
    if isinstance(exc, aiohttp.ClientConnectorError | aiohttp.ClientHttpProxyError | aiohttp.InvalidURL):
        return unreachable(exc)
    if isinstance(exc, aiohttp.ClientError | OSError):
        return broken_off(exc)
    return unsendable() if isinstance(exc, ValueError) else exc
