"""`RedisConnection`: redis-py clients for one Redis, made when they are used, and what guards their use.

Rules:

* nothing connects before the first operation: not the import, not the constructor;
* a process has its own clients (a forked child never touches its parent's), and so has each event loop;
* an operation has one budget for all it does, and at most ``max_connections`` run at a time: the next one
  waits for its turn within its own budget. An operation takes a fraction of a millisecond, so a short queue
  costs less than the error that redis-py raises, and a longer one less than a thousand connections;
* what redis-py or the network raises becomes `StoreError`, with no secret in its text.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
from collections.abc import AsyncGenerator, Mapping
from types import TracebackType
from typing import Any, Final, NoReturn

from ..errors import CorruptEntryError, LLMMiddlewareError, StoreError
from .redis_clients import async_client, client_arguments, close_async_client, close_sync_client, sync_client
from .redis_credentials import FetchToken, TokenSource, credential_provider, token_source
from .redis_deadline import Turns, begin, end, waiting_for
from .redis_settings import RedisSettings, read_settings

__all__ = ["RedisConnection"]

_BUDGET: Final = 0.25  # seconds
_MAX_CONNECTIONS: Final = 50
# The async clients of every loop that lives.
_OPEN: Final[set[_Loop]] = set()


class RedisConnection:
    """How to reach one Redis, and this process's clients for it.

    ``settings`` are a `RedisSettings`; most callers use `from_settings`. ``budget``: seconds that one
    operation may take in all, unless ``socket_timeout`` is among the settings. ``fetch_token``: from an
    account to its token and when that expires (seconds since the epoch); unless given, by the settings.
    """

    def __init__(
        self,
        settings: RedisSettings,
        *,
        budget: float = _BUDGET,
        fetch_token: FetchToken | None = None,
    ) -> None:
        self.settings = settings
        self.budget = float(settings.arguments.get("socket_timeout", budget))
        self.max_connections = int(settings.arguments.get("max_connections", _MAX_CONNECTIONS))
        self.fetch_token = fetch_token
        self._process = _Process(self)

    @classmethod
    def from_settings(
        cls,
        mapping: Mapping[str, object],
        environ: Mapping[str, str] | None = None,
        *,
        budget: float = _BUDGET,
        fetch_token: FetchToken | None = None,
    ) -> RedisConnection:
        """From arguments and ``REDIS_*`` variables (of ``os.environ`` unless ``environ`` is given).

        `ConfigError` for a setting that is unknown, of the wrong type or contradicts another.
        """
        settings = read_settings(mapping, os.environ if environ is None else environ)
        return cls(settings, budget=budget, fetch_token=fetch_token)

    @property
    def clustered(self) -> bool:
        """Whether keys are spread over slots, so that commands take keys of one slot only."""
        return self.settings.topology == "cluster"

    def sync_client(self) -> Any:
        """This process's ``redis.Redis`` or ``redis.RedisCluster``. Making the latter connects."""
        process = self.mine()
        client = process.client
        if client is None:
            with waiting_for(process.making):
                client = process.client
                if client is None:
                    client = process.client = sync_client(self.settings, process.arguments)
        return client

    def async_client(self) -> Any:
        """The running event loop's ``redis.asyncio`` client, closed by `aclose` or with the loop."""
        return self.mine().here().client

    def use(self, seconds: float | None = None) -> contextlib.AbstractContextManager[Any]:
        """The sync client for one operation of at most ``seconds`` (the budget unless given)::

            with connection.use() as client:
                client.get("key")

        `StoreError` for whatever fails inside.
        """
        return _Use(self, self.budget if seconds is None else seconds)

    def ause(self, seconds: float | None = None) -> contextlib.AbstractAsyncContextManager[Any]:
        """`use`, for a coroutine: the event loop's client."""
        return _AsyncUse(self, self.budget if seconds is None else seconds)

    def close(self) -> None:
        """Close this process's clients: the sync one now, that of each event loop on its loop, when what is
        under way there has ended. Waits for no loop. The next operation makes another client.

        Whoever drops a connection while a loop runs on must call this or `aclose`: the loop holds its client.
        """
        process = self.mine()
        for other in process.leave():
            other.close_soon()
        with process.making:
            client, process.client = process.client, None
        if client is not None:
            close_sync_client(client)

    async def aclose(self) -> None:
        """`close`, and wait for the running event loop's client to be closed."""
        ours = self.mine().leave_here()
        self.close()
        if ours is not None:
            await ours.close()

    def describe(self) -> dict[str, object]:
        """Where this connects to and as whom, with no secret: for logs and health checks."""
        settings, arguments = self.settings, self.settings.arguments
        facts: dict[str, object] = {
            "topology": settings.topology,
            "address": ", ".join(self._addresses()),
            "db": arguments.get("db", 0),
            "tls": bool(arguments.get("ssl", False)),
            "username": arguments.get("username"),
        }
        if settings.topology == "standalone" and "unix_socket_path" not in arguments:
            facts |= {"host": arguments.get("host", "localhost"), "port": arguments.get("port", 6379)}
        if settings.service_name is not None:
            facts["service_name"] = settings.service_name
        return facts

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={value!r}" for name, value in self.describe().items())
        return f"RedisConnection({facts})"

    def _addresses(self) -> list[str]:
        arguments = self.settings.arguments
        if self.settings.nodes:
            return [f"{host}:{port}" for host, port in self.settings.nodes]
        if "unix_socket_path" in arguments:
            return [f"unix://{arguments['unix_socket_path']}"]
        return [f"{arguments.get('host', 'localhost')}:{arguments.get('port', 6379)}"]

    def mine(self) -> _Process:
        """What the running process has of this connection."""
        process = self._process
        if process.pid != os.getpid():
            process = self._process = _Process(self)
        return process

    def fail(self, exc: Exception, seconds: float) -> NoReturn:
        """Raise the error of ours that says what went wrong; its cause only where that holds no secret."""
        from redis.exceptions import AuthenticationError, ResponseError

        if isinstance(exc, LLMMiddlewareError):
            raise exc
        tokens = self._process.tokens
        if isinstance(exc, AuthenticationError) and tokens is not None:
            tokens.reject()
        text = str(exc) or f"no answer within {seconds} s"
        masked = text
        for secret in [*self.settings.secrets(), *(tokens.secrets() if tokens is not None else ())]:
            masked = masked.replace(secret, "***")
        message = f"redis at {', '.join(self._addresses())}: {masked}"
        # Bytes of another kind under our key are damage to one entry, not a failure of the store.
        damaged = isinstance(exc, ResponseError) and "WRONGTYPE" in text
        code = "store_refused" if isinstance(exc, ResponseError) else None
        error = CorruptEntryError(message) if damaged else StoreError(message, code=code)
        raise error from (exc if masked == text else None)


class _Use:
    """One operation of a thread: its deadline and its turn. Written out: generators would double its cost."""

    __slots__ = ("_connection", "_outer", "_process", "_seconds")

    def __init__(self, connection: RedisConnection, seconds: float) -> None:
        self._connection = connection
        self._process = connection.mine()
        self._seconds = seconds

    def __enter__(self) -> Any:
        process = self._process
        self._outer = begin(self._seconds)
        try:
            if process.tokens is not None:
                process.tokens.wait()
            process.turns.take()
            try:
                return process.client if process.client is not None else self._connection.sync_client()
            except BaseException:
                process.turns.give()
                raise
        except BaseException as exc:
            end(self._outer)
            if isinstance(exc, Exception):
                self._connection.fail(exc, self._seconds)
            raise

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        self._process.turns.give()
        end(self._outer)
        if isinstance(exc, Exception):
            self._connection.fail(exc, self._seconds)


class _AsyncUse:
    """One operation of a coroutine."""

    __slots__ = ("_connection", "_ours", "_seconds", "_timeout")

    def __init__(self, connection: RedisConnection, seconds: float) -> None:
        self._connection = connection
        self._seconds = seconds

    async def __aenter__(self) -> Any:
        try:
            process = self._connection.mine()
            self._timeout = await asyncio.timeout(self._seconds).__aenter__()
            try:
                if process.tokens is not None:
                    await process.tokens.await_()
                # No wait between these two: who closes the client waits for those in the queue for it.
                self._ours = process.here()
                await self._ours.turns.acquire()
            except BaseException as exc:
                await self._timeout.__aexit__(type(exc), exc, exc.__traceback__)
                raise
        except Exception as exc:
            self._connection.fail(exc, self._seconds)
        return self._ours.client

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ours.turns.release()
        try:
            await self._timeout.__aexit__(kind, exc, trace)
        except TimeoutError as over:
            self._connection.fail(over, self._seconds)
        if isinstance(exc, Exception):
            self._connection.fail(exc, self._seconds)


class _Process:
    """What one process has of a connection: its sync client, and one async client for each event loop."""

    def __init__(self, connection: RedisConnection) -> None:
        self.pid = os.getpid()
        self.settings = connection.settings
        self.budget = connection.budget
        self.max_connections = connection.max_connections
        self.making = threading.Lock()
        self.turns = Turns(connection.max_connections)
        self.client: Any = None
        self.tokens: TokenSource | None = token_source(connection.settings, connection.fetch_token)
        self._loops: dict[asyncio.AbstractEventLoop, _Loop] = {}
        self._joining = threading.Lock()

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        provider = None if self.tokens is None else credential_provider(self.tokens, self.settings)
        return client_arguments(self.settings, self.budget, self.max_connections, provider)

    def here(self) -> _Loop:
        """What the running event loop has."""
        loop = asyncio.get_running_loop()
        ours = self._loops.get(loop)
        if ours is None:
            ours = _Loop(loop, async_client(self.settings, self.arguments), self)
            with self._joining:
                for other in [other for other in self._loops if other.is_closed()]:
                    del self._loops[other]
                self._loops[loop] = ours
        return ours

    def leave(self) -> list[_Loop]:
        """What every event loop had."""
        with self._joining:
            left = list(self._loops.values())
            self._loops.clear()
        return left

    def leave_here(self) -> _Loop | None:
        """What the running event loop had."""
        with self._joining:
            return self._loops.pop(asyncio.get_running_loop(), None)


class _Loop:
    """One event loop's client, and the turns at it."""

    __slots__ = ("_all", "_closed", "_closing", "_ended", "_patience", "client", "guard", "loop", "turns")

    def __init__(self, loop: asyncio.AbstractEventLoop, client: Any, process: _Process) -> None:
        self.loop = loop
        self.client = client
        self.turns = asyncio.Semaphore(process.max_connections)
        self._all = process.max_connections
        self._patience = process.budget
        self._closing: asyncio.Task[Any] | None = None
        self._closed = self._ended = False
        # A loop that ends closes the asynchronous generators begun on it, and so this client. It is held
        # until then: for one that the garbage collector found first, that may come too late.
        self.guard = self._guarding()
        with contextlib.suppress(StopIteration):
            self.guard.__anext__().send(None)  # begins it without a wait
        for other in [other for other in list(_OPEN) if other.loop.is_closed()]:
            _OPEN.discard(other)
        _OPEN.add(self)

    def close_soon(self) -> None:
        """Have the loop `close` this; from any thread. A loop that has ended has done so already."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._begin_closing)

    def _begin_closing(self) -> None:
        if not self._ended:
            self._closing = self.loop.create_task(self.close())
            self._closing.add_done_callback(_seen)

    async def close(self) -> None:
        """Close the client once those who have or await a turn are done, at most a budget from now."""
        self._closing = asyncio.current_task()
        try:
            await self._take_all_turns()
        finally:
            try:
                await close_async_client(self.client)
                self._closed = True
            finally:
                if not self._ended:
                    await self.guard.aclose()

    async def _take_all_turns(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._patience):
                for _ in range(self._all):
                    await self.turns.acquire()

    async def _guarding(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self._ended = True
            _OPEN.discard(self)
            if not self._closed:
                await self._close_at_the_end()

    async def _close_at_the_end(self) -> None:
        closing = self._closing
        if closing is not None and closing is not asyncio.current_task():
            await asyncio.wait([closing])  # a loop that ends must leave no task behind
        if not self._closed:
            await close_async_client(self.client)


def _seen(task: asyncio.Task[Any]) -> None:
    """A failure to close is nobody's concern: the client is gone either way."""
    if not task.cancelled():
        task.exception()
