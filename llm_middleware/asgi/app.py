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
from ..api.message import Response
from ..api.paths import is_form, openai_path, with_model
from ..api.routes import MODEL_KINDS, Match, Route
from ..caching.manager import CacheManager
from ..caching.results import close_items
from ..events import Hook
from ..keys.resolver import KeyResolver
from ..routing.router import Router
from .authorize import authorizer
from .exchange import Exchange
from .reading import about_body, client_left, head_of, path_below, read_body
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
                await self._exchange(kind, path, scope, receive, send).run()
                return
        found = self.core.find(scope["method"], path)
        if isinstance(found, Response):
            await _send(send, found, head=scope["method"] == "HEAD")
        elif found.route is not None and found.route.kind is not None:
            await self._model(found, found.route, scope, receive, send)
        else:
            await self._other(found, scope, receive, send)

    def _exchange(self, kind: str, path: str, scope: Scope, receive: Receive, send: Send) -> Exchange:
        return Exchange(self.core.front, self._behind[kind], kind, path, scope, receive, send)

    async def _model(self, found: Match, route: Route, scope: Scope, receive: Receive, send: Send) -> None:
        """A request whose model stands in its path."""
        assert route.kind is not None
        exchange = self._exchange(route.kind, openai_path(route.path), scope, receive, send)
        model = found.values["model"]
        if route.kind == "transcription" and is_form(*about_body(scope)):
            exchange.named = model
        else:
            # First who calls: unpacking and reading a body is work.
            if not await exchange.admitted(self.core.gate, scope["headers"]):
                return
            named = await self._named(model, scope, receive)
            if named is None:
                await _send(send, self.core.too_large())
                return
            exchange.scope, exchange.receive = named
        await exchange.run()

    async def _named(self, model: str, scope: Scope, receive: Receive) -> tuple[Scope, Receive] | None:
        """The request as one that has its ``model`` in its body; None where that is too long."""
        body = await read_body(receive, self.core.max_body_bytes)
        if body is None:
            return None
        form, encoding = about_body(scope)
        limit = self.core.max_body_bytes
        named = with_model(model, body, content_type=form, encoding=encoding, limit=limit)
        headers = [
            pair for pair in scope["headers"] if pair[0] not in (b"content-length", b"content-encoding")
        ]
        headers.append((b"content-length", b"%d" % len(named.body)))
        if named.encoding:
            headers.append((b"content-encoding", named.encoding.encode("latin-1")))
        pending: list[Message] = [{"type": "http.request", "body": named.body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        return {**scope, "headers": headers}, replay

    async def _answer(self, kind: str, scope: Scope, receive: Receive, send: Send) -> None:
        """The app behind the cache."""
        told: Told | None = scope.get("llm_middleware")
        # Of a request that says itself that it is too long nobody was asked who sends it.
        body = None if told is None else await read_body(receive, self.core.max_body_bytes)
        if told is None or body is None:
            await _send(send, self.core.too_large())
            return
        await _unless_client_leaves(self._respond(kind, scope, told, body, send), receive)

    async def _respond(self, kind: str, scope: Scope, told: Told, body: bytes, send: Send) -> None:
        await _send(send, await self.core.model(_port, "async", head_of(scope), told, kind, body))

    async def _other(self, found: Match, scope: Scope, receive: Receive, send: Send) -> None:
        assert found.route is not None
        body = await read_body(receive, self.core.max_body_bytes)
        if body is None:
            response = self.core.too_large()
        else:
            response = await self.core.handle(_port, head_of(scope), found.route, found.values, body)
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

    watch = asyncio.create_task(client_left(receive))
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
