"""`QdrantHTTP`: requests to one Qdrant's REST API, with clients that are made when they are used.

Rules:

* nothing connects before the first operation: not the import, not the constructor;
* a process has its own sync client (a forked child never touches its parent's), and so has each event loop;
* a request has one budget for all it does. On the sync face it is looked at whenever something comes, so an
  answer that stops half-way may take up to twice as long;
* what Qdrant or the network says against it becomes `StoreError`, with no API key in its text.

What is asked is written once, as coroutines that await only an `Ask`: `QdrantHTTP.ask`, which blocks, or
`QdrantHTTP.aask`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math
import os
import re
import ssl
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlsplit

from ..errors import ConfigError, LLMMiddlewareError, StoreError

if TYPE_CHECKING:
    import httpx

__all__ = ["Ask", "QdrantHTTP", "RefusedError", "broken_answer"]

_BULK_TIMEOUT: Final = 30.0  # seconds: what is removed by a filter may be a million points
_MAX_CONNECTIONS: Final = 50
_KEEP_S: Final = 4.0  # Qdrant closes a connection that was idle for 5 seconds
_SHOWN: Final = 200  # characters of the server's own words in an error
# What a forked child has of its parent's: collected, its sockets would say that they were not closed.
_LEFT_BEHIND: Final[list[object]] = []
# What every event loop that lives has: see `_Loop`.
_OPEN: Final[set[object]] = set()


class Ask(Protocol):
    """One request; ``bulk``: it may take longer. What Qdrant gives as the result, or `RefusedError`."""

    def __call__(
        self, method: str, path: str, body: Mapping[str, object] | None = None, *, bulk: bool = False
    ) -> Awaitable[Any]: ...


class RefusedError(StoreError):
    """Qdrant answered, with an error; ``answered``: its HTTP status."""

    def __init__(self, message: str, answered: int) -> None:
        super().__init__(message, code=f"http_{answered}")
        self.answered = answered


class QdrantHTTP:
    """How to reach one Qdrant, and this process's clients for it.

    ``url``: ``http(s)://host[:port][/prefix]``. ``timeout``: seconds for one request. `ConfigError` names
    ``qdrant_api_base``, ``qdrant_api_key`` or ``timeout``; it is one too where httpx is not installed.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 5.0) -> None:
        self.url = _checked_url(url)
        self.timeout = _checked_timeout(timeout)
        self._key = _checked_key(api_key)
        self._scheme, self._where = urlsplit(self.url)[:2]
        self._process = _Process()
        try:
            import httpx  # noqa: F401
        except ImportError as exc:
            raise ConfigError("Qdrant needs httpx: pip install 'llm-middleware[qdrant]'") from exc

    def __repr__(self) -> str:
        return f"QdrantHTTP({self.url!r})"

    async def ask(
        self, method: str, path: str, body: Mapping[str, object] | None = None, *, bulk: bool = False
    ) -> Any:
        """`Ask` that blocks: it awaits nothing."""
        seconds = self._seconds(bulk)
        until = time.monotonic() + seconds
        content = bytearray()
        with self._translated(seconds):
            client = self._sync_client()
            request = client.stream(method, self.url + path, content=_encoded(body), timeout=seconds)
            with request as response:
                for piece in response.iter_bytes():
                    content += piece
                    if time.monotonic() > until:
                        raise TimeoutError
        return self._result(response.status_code, bytes(content))

    async def aask(
        self, method: str, path: str, body: Mapping[str, object] | None = None, *, bulk: bool = False
    ) -> Any:
        """`Ask`, awaited."""
        seconds = self._seconds(bulk)
        with self._translated(seconds):
            client = self._mine().here(self._async_client)
            async with asyncio.timeout(seconds):
                response = await client.request(
                    method, self.url + path, content=_encoded(body), timeout=seconds
                )
        return self._result(response.status_code, response.content)

    def close(self) -> None:
        """Close this process's sync client now, and have each event loop close its own. The next request
        makes others."""
        process = self._mine()
        for ours in process.leave():
            ours.close_soon()
        with process.making:
            closing, process.client, process.closing = process.closing, None, None
        if closing is not None:
            closing()

    async def aclose(self) -> None:
        """`close`, and wait for the running event loop's client to be closed."""
        ours = self._mine().leave_here()
        self.close()
        if ours is not None:
            await ours.guard.aclose()

    def _mine(self) -> _Process:
        process = self._process
        if process.pid != os.getpid():
            _LEFT_BEHIND.append(process)
            process = self._process = _Process()
        return process

    def _sync_client(self) -> httpx.Client:
        import httpx

        process = self._mine()
        client = process.client
        if client is None:
            with process.making:
                client = process.client
                if client is None:
                    client = process.client = httpx.Client(**self._arguments())
                    # For one that nobody closes; also when the interpreter ends.
                    process.closing = weakref.finalize(self, _close_in, process.pid, client)
        return client

    def _async_client(self) -> httpx.AsyncClient:
        import httpx

        return httpx.AsyncClient(**self._arguments())

    def _arguments(self) -> dict[str, Any]:
        import httpx

        headers = {"content-type": "application/json"}
        if self._key is not None:
            headers["api-key"] = self._key
        limits = httpx.Limits(
            max_connections=_MAX_CONNECTIONS,
            max_keepalive_connections=_MAX_CONNECTIONS,
            keepalive_expiry=_KEEP_S,
        )
        return {"headers": headers, "limits": limits, "verify": self._tls}

    @functools.cached_property
    def _tls(self) -> ssl.SSLContext:
        """Made once for all clients: to read the authorities takes long, and plain HTTP needs none."""
        import httpx

        if self._scheme == "https":
            return httpx.create_ssl_context()
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    def _seconds(self, bulk: bool) -> float:
        return max(self.timeout, _BULK_TIMEOUT) if bulk else self.timeout

    @contextlib.contextmanager
    def _translated(self, seconds: float) -> Iterator[None]:
        """Without a cause: httpx's errors hold the request, and so the API key."""
        import httpx

        try:
            yield
        except LLMMiddlewareError:
            raise
        except (httpx.TimeoutException, TimeoutError):
            message = f"qdrant at {self._where}: no answer within {seconds:g} s"
            raise StoreError(message, code="timeout") from None
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError, RuntimeError) as exc:
            message = f"qdrant at {self._where}: {type(exc).__name__}"
            raise StoreError(message, code="unreachable") from None

    def _result(self, status: int, content: bytes) -> Any:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if status != 200:
            message = f"qdrant at {self._where}: {status} {self._said(answer, content)}"
            raise RefusedError(message.strip(), status)
        if not isinstance(answer, dict) or "result" not in answer:
            raise broken_answer(self._where)
        return answer["result"]

    def _said(self, answer: Any, content: bytes) -> str:
        """The server's reason, or what whoever answered instead says."""
        try:
            text = str(answer["status"]["error"])
        except (KeyError, TypeError):
            text = content.decode("utf-8", "replace")
        if self._key is not None:
            text = text.replace(self._key, "***")
        return text[:_SHOWN]


class _Process:
    """What one process has: its sync client, and an async one for each event loop."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.client: httpx.Client | None = None
        self.closing: Callable[[], object] | None = None
        self.making = threading.Lock()
        self._joining = threading.Lock()
        self._loops: dict[asyncio.AbstractEventLoop, _Loop] = {}

    def here(self, make: Callable[[], httpx.AsyncClient]) -> httpx.AsyncClient:
        """The running event loop's client."""
        loop = asyncio.get_running_loop()
        ours = self._loops.get(loop)
        if ours is None:
            ours = _Loop(loop, make())
            with self._joining:
                for other in [other for other in self._loops if other.is_closed()]:
                    del self._loops[other]
                self._loops[loop] = ours
        return ours.client

    def leave(self) -> list[_Loop]:
        with self._joining:
            left = list(self._loops.values())
            self._loops.clear()
        return left

    def leave_here(self) -> _Loop | None:
        with self._joining:
            return self._loops.pop(asyncio.get_running_loop(), None)


class _Loop:
    """One event loop's client, closed with the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient) -> None:
        self.loop = loop
        self.client = client
        self._closing: asyncio.Task[None] | None = None
        # A loop that ends closes the asynchronous generators begun on it, and so this client. It is held
        # until then: for one that the garbage collector found first, that may come too late.
        self.guard = self._guarding()
        with contextlib.suppress(StopIteration):
            self.guard.__anext__().send(None)  # begins it without a wait
        _OPEN.add(self)

    def close_soon(self) -> None:
        """Have the loop close it; from any thread. A loop that has ended has done so already."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._begin_closing)

    def _begin_closing(self) -> None:
        self._closing = self.loop.create_task(self._close())

    async def _close(self) -> None:
        await self.guard.aclose()

    async def _guarding(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            _OPEN.discard(self)
            await self.client.aclose()


def _close_in(pid: int, client: httpx.Client) -> None:
    if pid == os.getpid():
        client.close()


def broken_answer(where: str) -> StoreError:
    """For what came in the place of an answer."""
    return StoreError(f"qdrant at {where}: not an answer of Qdrant's", code="broken_answer")


def _encoded(body: Mapping[str, object] | None) -> bytes | None:
    return None if body is None else json.dumps(body, separators=(",", ":"), allow_nan=False).encode()


def _checked_url(url: object) -> str:
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        valid = valid and "@" not in parts.netloc and not parts.query and not parts.fragment
    except ValueError:
        valid = False
    if not valid or not isinstance(url, str) or not url.isascii() or re.search(r"[\s\\]", url):
        # Not shown: it may hold a password.
        raise ConfigError("qdrant_api_base: expected http(s)://host[:port][/prefix]", param="qdrant_api_base")
    return url.rstrip("/?#")


def _checked_timeout(timeout: object) -> float:
    number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not number or not 0 < timeout < math.inf:  # type: ignore[operator]  # it is a number
        raise ConfigError(f"timeout: expected seconds > 0, got {timeout!r}", param="timeout")
    return float(timeout)  # type: ignore[arg-type]


def _checked_key(api_key: object) -> str | None:
    if api_key is None:
        return None
    if not isinstance(api_key, str) or not re.fullmatch(r"[\x21-\x7e]+", api_key):
        raise ConfigError("qdrant_api_key: expected text without spaces", param="qdrant_api_key")
    return api_key
