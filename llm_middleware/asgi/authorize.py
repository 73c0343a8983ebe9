"""A host's own login as ``authorize=``: a function of the neutral request, or a FastAPI dependency."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Awaitable, Callable

from ..api.message import Head
from ..errors import ConfigError
from .types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["authorizer"]

_NEUTRAL = (inspect.Parameter.empty, object, typing.Any, Head, "Head")
_FOUND, _HOST = "llm_middleware.record", "llm_middleware.host"
_METHODS = ["GET", "HEAD", "POST"]


def authorizer(authorize: Callable[..., object]) -> Callable[[Head], object]:
    """``authorize`` as a function of a `Head`. One with one parameter that has no default and no other
    annotation takes that already; anything else is a FastAPI dependency. `ConfigError` for neither."""
    if not callable(authorize):
        raise ConfigError(f"authorize: expected a function, got {authorize!r}", param="authorize")
    return authorize if _is_neutral(authorize) else _dependency(authorize)


def _is_neutral(function: Callable[..., object]) -> bool:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return True
    if len(parameters) != 1 or parameters[0].default is not inspect.Parameter.empty:
        return False
    try:
        hints = typing.get_type_hints(_code(function), include_extras=True)
    except Exception:  # an annotation that is not there at run time
        hints = {}
    return hints.get(parameters[0].name, parameters[0].annotation) in _NEUTRAL


def _code(function: Callable[..., object]) -> Callable[..., object]:
    """What has the annotations of a call."""
    if inspect.isclass(function):
        return function.__init__
    return function if inspect.isroutine(function) else type(function).__call__


class _AsHost:
    """Gives dependencies the host's app as ``request.app``, and what tests of the host put in their place."""

    def __init__(self, app: ASGIApp, own: typing.Any) -> None:
        self._app = app
        self._own = own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = scope[_HOST]
        self._own.dependency_overrides = getattr(host, "dependency_overrides", {})
        await self._app(scope if host is None else {**scope, "app": host}, receive, send)


def _dependency(dependency: Callable[..., object]) -> Callable[[Head], Awaitable[object]]:
    """By an app of one route: what FastAPI documents of dependencies then holds, errors included."""
    try:
        import fastapi
    except ImportError as exc:
        message = "authorize: expected a function of one argument, or FastAPI for a dependency"
        raise ConfigError(message, param="authorize") from exc
    app = fastapi.FastAPI(openapi_url=None)

    async def found(request: fastapi.Request, record: object = fastapi.Depends(dependency)) -> None:
        request.scope[_FOUND].append(record)

    # FastAPI reads annotations, and the name is not one of this module's.
    found.__annotations__ = {"request": fastapi.Request, "record": typing.Any, "return": None}
    app.add_api_route("/{path:path}", found, methods=_METHODS)
    app.add_middleware(_AsHost, own=app)

    async def authorize(head: Head) -> object:
        host = head.native.get("app")
        if app.middleware_stack is None:
            app.exception_handlers.update(getattr(host, "exception_handlers", {}))
        record: list[object] = []
        scope = {**head.native, _FOUND: record, _HOST: host}
        scope.pop("router", None)
        answer: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            answer.append(message)

        await app(scope, receive, send)
        if answer[0]["status"] != 200:
            raise fastapi.HTTPException(*_refusal(answer))
        return record[0] if record else None

    return authorize


def _refusal(answer: list[Message]) -> tuple[int, str]:
    """Status and words. What FastAPI finds missing is 422; a caller without its header is just not known."""
    status = answer[0]["status"]
    if status not in (403, 429) and status < 500:
        status = 401
    try:
        detail = json.loads(b"".join(message.get("body", b"") for message in answer[1:]))["detail"]
    except (ValueError, KeyError, TypeError):
        detail = None
    return status, detail if isinstance(detail, str) else "the request is not authorized"
