"""The endpoints of models: a request on its way to the Router, and what it comes back with.

What is answered from the cache never comes here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from ..caching.headers import EVENT_STREAM, JSON
from ..caching.plan import decompressed
from ..caching.results import close_items
from ..caching.sse import format_event
from ..errors import InternalError, InvalidRequestError, KeyPermissionError, LLMMiddlewareError, ProviderError
from ..routing.fallback import own_fallbacks
from ..routing.request import read_body
from ..routing.response import ModelStream, RouteInfo
from ..routing.select import prompt_tokens
from .gate import Caller, Told
from .message import Request, Response

if TYPE_CHECKING:
    from .._ports.protocol import Port
    from ..keys.allowance import Allowance
    from .app import LLMApp
    from .hooks import Hooks

__all__ = ["answer"]

_TEXT: Final = b"text/plain; charset=utf-8"
_VISIBLE: Final = "".join(map(chr, range(0x21, 0x7F))).replace("%", "")


async def answer(app: LLMApp, face: str, request: Request, kind: str, told: Told) -> Response:
    """The answer from a deployment. Raises what the client is told."""
    if told.upload is None:
        return await _answer(app, face, request, kind, told, _body(app, request, kind))
    with told.upload as upload:
        return await _answer(app, face, request, kind, told, _for_model(request, dict(upload.values)))


async def _answer(
    app: LLMApp, face: str, request: Request, kind: str, told: Told, body: dict[str, Any]
) -> Response:
    caller = request.caller
    told.own = True
    _check(caller, body)
    ending = _Ending(app.hooks, request.port, told, kind, stream=body.get("stream") is True)
    if caller.record is not None and app.gate.limits is not None:
        tokens = 0 if caller.record.tpm_limit is None else prompt_tokens(body)
        ending.allowance = await app.gate.limits._begin(request.port, caller.record, tokens)
    told.own = False
    options = {"caching": False, "may_use": caller.may_use}
    try:
        result = await app.router._call(request.port, face, kind, body, "", options)
    except LLMMiddlewareError as exc:
        route = getattr(exc, "route", None)
        await ending.tell(route if isinstance(route, RouteInfo) else RouteInfo(str(body.get("model"))), exc)
        raise
    except Exception:
        await ending.tell(RouteInfo(str(body.get("model"))), _internal())
        raise
    except BaseException:
        await ending.release()
        raise
    headers = _headers(result.route)
    if isinstance(result, ModelStream):
        events = _Events(kind, result, ending, told)
        return Response(200, [(b"content-type", EVENT_STREAM), *headers], stream=events)
    await ending.tell(result.route)
    content_type = JSON if result.raw.lstrip()[:1] in (b"{", b"[") else _TEXT
    return Response(200, [(b"content-type", content_type), *headers], result.raw)


class _Ending:
    """What is done once when a call has ended: the caller's allowance is settled, and the hooks are told."""

    def __init__(self, hooks: Hooks, port: Port, told: Told, kind: str, *, stream: bool) -> None:
        self.allowance: Allowance | None = None
        self._hooks = hooks
        self._port = port
        self._told = told
        self._kind = kind
        self._stream = stream

    async def tell(self, route: RouteInfo, error: LLMMiddlewareError | None = None) -> None:
        if self.allowance is not None:
            await self.allowance._end(self._port, tokens=route.tokens, cost=route.cost)
        if self._hooks:
            self._hooks.ended(self._kind, self._told, route, stream=self._stream, error=error)

    async def release(self, route: RouteInfo | None = None) -> None:
        """The caller left. ``route``: what is known of the answer."""
        if self.allowance is not None:
            tokens, cost = (None, None) if route is None else (route.tokens, route.cost)
            await self.allowance._end(self._port, tokens=tokens, cost=cost)
        if self._hooks:
            self._hooks.left(self._kind, self._told, stream=self._stream)


def _body(app: LLMApp, request: Request, kind: str) -> dict[str, Any]:
    data, encoding = request.body, request.header("content-encoding").strip().lower()
    if encoding == "gzip":
        try:
            data = decompressed(data, app.max_body_bytes)
        except ValueError as exc:
            raise InvalidRequestError(str(exc), param="content-encoding") from None
    elif encoding not in ("", "identity"):
        raise InvalidRequestError(
            f"content-encoding: {encoding!r} is not read here", param="content-encoding"
        )
    return _for_model(request, read_body(kind, data, request.header("content-type")))


def _for_model(request: Request, body: dict[str, Any]) -> dict[str, Any]:
    """``body`` with the model that the caller's key calls so."""
    model = body.get("model")
    if isinstance(model, str):
        body["model"] = request.caller.model(model)
    return body


def _check(caller: Caller, body: Mapping[str, object]) -> None:
    """The models that a request names, where the cache in front has not read it."""
    model = body.get("model")
    if not isinstance(model, str):
        return
    if caller.record is not None and caller.record.models and body.get("models") is not None:
        # OpenRouter's: other models to fall back to, by names that are not ours.
        raise KeyPermissionError("models: this key may not name further models", param="models")
    for name in (model, *(own_fallbacks(body.get("fallbacks"), model) or ())):
        if not caller.may_use(name):
            raise KeyPermissionError(f"this key may not use the model {name!r}", param="fallbacks")


def _headers(route: RouteInfo) -> list[tuple[bytes, bytes]]:
    pairs = [
        (b"x-llm-model", _header_text(route.model or route.asked)),
        (b"x-llm-attempts", b"%d" % route.attempts),
        (b"x-llm-fallback", b"true" if route.fallback else b"false"),
    ]
    if route.deployment:
        pairs.append((b"x-llm-deployment", _header_text(route.deployment)))
    return pairs


def _header_text(name: str) -> bytes:
    """A name as a header may have it: clients choose the names of models, and a line break would end it."""
    return quote(name, safe=_VISIBLE, errors="replace").encode("ascii")


class _Events:
    """The events of an answer for a client. What breaks it off is its last event."""

    def __init__(self, kind: str, stream: ModelStream, ending: _Ending, told: Told) -> None:
        self._kind = kind
        self._route = stream.route
        self._chunks: AsyncIterator[bytes] | None = stream.events.chunks()
        self._ending = ending
        self._told = told

    def __aiter__(self) -> _Events:
        return self

    async def __anext__(self) -> bytes:
        chunks = self._chunks
        if chunks is None:
            raise StopAsyncIteration
        try:
            chunk = await anext(chunks)
        except StopAsyncIteration:
            self._chunks = None
            await self._ending.tell(self._route)
            raise
        except LLMMiddlewareError as exc:
            self._chunks = None
            await self._ending.tell(self._route, exc)
            return _error_event(self._kind, exc)
        except Exception:
            self._chunks = None
            await self._ending.tell(self._route, _internal())
            raise
        self._told.no_store = bool(getattr(chunks, "no_store", False))
        return chunk

    async def aclose(self) -> None:
        """The client left before the end, or it is over."""
        chunks, self._chunks = self._chunks, None
        if chunks is not None:
            try:
                await close_items(chunks)
            finally:
                # Clients hang up on the last event, before the provider's connection has come to its end.
                whole = self._route.latency is not None
                await (self._ending.tell(self._route) if whole else self._ending.release(self._route))


def _internal() -> LLMMiddlewareError:
    return InternalError()


def _error_event(kind: str, error: LLMMiddlewareError) -> bytes:
    """As OpenAI's SDKs raise it. There is no ``[DONE]`` after it: the answer did not end."""
    shown = error if isinstance(error, ProviderError) else ProviderError("the answer broke off")
    return format_event(shown.body(), "error" if kind == "responses" else None)
