"""`llm_app`: the sub-app for ASGI hosts, a Starlette app that can be mounted anywhere.

Starlette gives it its lifespan and its place among other apps; requests go straight to the table of routes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from starlette.applications import Starlette

from .._ports.async_ import AsyncPort
from ..api.app import LLMApp, Source
from ..api.gate import Told
from ..api.message import Head, Response
from ..api.paths import is_form, openai_path, with_model
from ..api.routes import MODEL_KINDS, Match
from ..caching.headers import get_header
from ..caching.manager import CacheManager
from ..caching.results import close_items
from ..events import Hook
from ..keys.resolver import KeyResolver
from ..routing.router import Router
from .authorize import authorizer
from .exchange import Exchange, path_below
from .types import Message, Receive, Scope, Send

__all__ = ["LLMStarlette", "llm_app"]

_port = AsyncPort()


class LLMStarlette(Starlette):
    """See `llm_app`. ``core``: the `LLMApp`, with the cache, the Router and the keys that it uses."""

    def __init__(self, core: LLMApp) -> None:
        self.core = core
        self._behind = {kind: partial(self._answer, kind) for kind in MODEL_KINDS}
        super().__init__(lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: object) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Give back connections and files; they are opened again when the app is used again."""
        await self.core.close(_port, "async")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        path = path_below(scope)
        if scope["method"] == "POST":
            kind = self.core.front.routes.get(path)
            if kind is not None:  # nearly every request, and nothing to look for
                await self._exchange(kind, path, scope, receive, send)
                return
        found = self.core.find(scope["method"], path)
        if isinstance(found, Response):
            await _send(send, found, head=scope["method"] == "HEAD")
        elif found.route is not None and found.route.kind is not None:
            await self._model(found, path, scope, receive, send)
        else:
            await self._other(found, path, scope, receive, send)

    async def _model(self, found: Match, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        assert found.route is not None
        kind = found.route.kind
        assert kind is not None
        if found.values:
            path = openai_path(found.route.path)
        exchange = Exchange(self.core.front, self._behind[kind], kind, path, scope, receive, send)
        if found.values and kind == "transcription" and is_form(*_about_body(scope)):
            exchange.named = found.values["model"]
        elif found.values:
            # First who calls: unpacking and reading a body is work.
            if not await exchange.admitted(self.core.gate, scope["headers"]):
                return
            named = await self._named(found, scope, receive)
            if named is None:
                await _send(send, self.core.too_large())
                return
            exchange.scope, exchange.receive, _ = named
        await exchange.run()

    def _exchange(
        self, kind: str, path: str, scope: Scope, receive: Receive, send: Send
    ) -> Coroutine[Any, Any, None]:
        return Exchange(self.core.front, self._behind[kind], kind, path, scope, receive, send).run()

    async def _named(self, found: Match, scope: Scope, receive: Receive) -> tuple[Scope, Receive, str] | None:
        """A request whose model stands in its path, as one that has it in its body; None where that is too
        long."""
        assert found.route is not None
        body = await _read(receive, self.core.max_body_bytes)
        if body is None:
            return None
        form, encoding = _about_body(scope)
        named = with_model(
            found.route.path,
            found.values["model"],
            body,
            content_type=form,
            encoding=encoding,
            limit=self.core.max_body_bytes,
        )
        headers = [
            pair for pair in scope["headers"] if pair[0] not in (b"content-length", b"content-encoding")
        ]
        headers.append((b"content-length", b"%d" % len(named.body)))
        if named.encoding:
            headers.append((b"content-encoding", named.encoding.encode("latin-1")))
        pending: list[Message] = [{"type": "http.request", "body": named.body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        return {**scope, "headers": headers}, replay, named.path

    async def _answer(self, kind: str, scope: Scope, receive: Receive, send: Send) -> None:
        """The app behind the cache."""
        told: Told | None = scope.get("llm_middleware")
        # Of a request that says itself that it is too long nobody was asked who sends it.
        body = None if told is None else await _read(receive, self.core.max_body_bytes)
        if told is None or body is None:
            await _send(send, self.core.too_large())
            return
        await _unless_client_leaves(self._respond(kind, scope, told, body, send), receive)

    async def _respond(self, kind: str, scope: Scope, told: Told, body: bytes, send: Send) -> None:
        head = _head(scope, path_below(scope))
        await _send(send, await self.core.model(_port, "async", head, told, kind, body))

    async def _other(self, found: Match, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        assert found.route is not None
        head = _head(scope, path)
        body = await _read(receive, self.core.max_body_bytes)
        if body is None:
            response = self.core.too_large()
        else:
            response = await self.core.handle(_port, head, found.route, found.values, body)
        await _send(send, response, head=scope["method"] == "HEAD")


def llm_app(
    config: Source = None,
    *,
    cache: CacheManager | None = None,
    router: Router | None = None,
    keys: KeyResolver | None = None,
    authorize: Callable[..., object] | None = None,
    admin: bool = True,
    hooks: Sequence[Hook] = (),
) -> LLMStarlette:
    """OpenAI's endpoints, cached and routed, with API keys and admin routes, to mount into an ASGI host.

        app.mount("/llm", llm_app("config.yaml"))

    ``config``: the path of a LiteLLM ``config.yaml`` or of a file in our own shorter form, a mapping of
    either, or a `Config`. ``cache``, ``router``, ``keys``: your own, in place of those that it describes.
    ``authorize``: your own check in place of API keys: from a `Head` to a `KeyRecord`, sync or async, or a
    FastAPI dependency; None refuses. ``admin=False`` leaves the admin routes out. ``hooks``: sync or async
    functions that get an `Event` for each request for a model, ``success`` or ``failure``. `ConfigError`
    lists all that is wrong.

    Connections are opened when they are first used and closed with the app's lifespan, or by its ``aclose``
    where a host runs none for it: hosts of Starlette's kind run none for what they mount.
    """
    authorize = None if authorize is None else authorizer(authorize)
    return LLMStarlette(
        LLMApp(config, cache=cache, router=router, keys=keys, authorize=authorize, admin=admin, hooks=hooks)
    )


def _about_body(scope: Scope) -> tuple[str, str]:
    """The content type and the encoding that the headers tell."""
    form, encoding = (get_header(scope["headers"], name) for name in (b"content-type", b"content-encoding"))
    return form.decode("latin-1"), encoding.decode("latin-1").strip().lower()


def _head(scope: Scope, path: str) -> Head:
    query = scope.get("query_string", b"").decode("latin-1")
    return Head(method=scope["method"], path=path, query=query, headers=scope["headers"], native=scope)


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The body; None where it is longer than ``limit`` bytes."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"".join(parts)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


async def _send(send: Send, response: Response, *, head: bool = False) -> None:
    headers = response.headers
    if response.stream is None:
        headers = [*headers, (b"content-length", b"%d" % len(response.body))]
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if head else response.body})
        return
    try:
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        async for chunk in response.stream:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    finally:
        await close_items(response.stream)


async def _unless_client_leaves(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Do ``work``, in the task that runs; where the client leaves first, it is cancelled."""
    task = asyncio.current_task()
    assert task is not None
    left, before = False, task.cancelling()

    def leave(watch: asyncio.Task[None]) -> None:
        nonlocal left
        left = True
        task.cancel()

    watch = asyncio.create_task(_left(receive))
    watch.add_done_callback(leave)
    try:
        await work
    except asyncio.CancelledError:
        # Somebody else may have cancelled the task as well, and is then to see it.
        if not left or task.cancelling() > before + 1:
            raise
    finally:
        watch.remove_done_callback(leave)
        watch.cancel()
        if left:
            task.uncancel()


async def _left(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        await asyncio.sleep(0)  # a server that has more to say than the body must not hold the loop
