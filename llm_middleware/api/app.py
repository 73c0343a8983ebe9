"""`LLMApp`: the sub-app with no framework in it. Both fronts give it requests and send what it answers."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

from .._ports.protocol import Port
from ..caching.backends import SEMANTIC
from ..caching.manager import CacheManager
from ..config.load import Config, load_config
from ..errors import ConfigError, InternalError, KeyPermissionError, LLMMiddlewareError
from ..events import Hook
from ..keys.resolver import KeyResolver
from ..routing.router import Router
from ..semantic.settings import MODELS
from . import admin as admin_routes
from . import documents, key_routes
from .front import Front
from .gate import Caller, Gate, Told
from .hooks import Hooks, named_hooks
from .llm import answer
from .message import Head, Request, Response, TooLargeError, error_response
from .routes import ROUTES, Match, Route, find

__all__ = ["LLMApp", "Source"]

logger = logging.getLogger("llm_middleware")

Source = object
"""A path of a configuration, its mapping, or a `Config`."""

Handler = Callable[["LLMApp", Request], Awaitable[Response]]

_MAX_BODY: Final = 32 << 20  # bytes: recordings of 25 MB, and the form around them
_HANDLERS: Final[Mapping[str, Handler]] = {
    **admin_routes.HANDLERS,
    **documents.HANDLERS,
    **key_routes.HANDLERS,
}


class LLMApp:
    """``config``: what `load_config` takes, or its result; None: nothing but what the others say. ``cache``,
    ``router``, ``keys``: in place of those that the configuration describes. ``authorize``: the host's own
    check in place of keys, see `Gate`. ``admin``: whether the admin routes are there. ``hooks``: told how
    each request for a model ended, see `Event`."""

    def __init__(
        self,
        config: Source = None,
        *,
        cache: CacheManager | None = None,
        router: Router | None = None,
        keys: KeyResolver | None = None,
        authorize: Callable[[Head], object] | None = None,
        admin: bool = True,
        hooks: Sequence[Hook] = (),
    ) -> None:
        self.config = read = _config(config)
        os.environ.update(read.environment)  # where the Router finds the keys of providers
        for note in read.notes:
            logger.info("%s", note)
        if read.ignored:
            logger.warning("settings that have no meaning here: %s", ", ".join(read.ignored))
        self.router = Router(read.model_list, **read.router) if router is None else router  # type: ignore[arg-type]
        self._models = self.router if cache is not None else _models_of_cache(read, self.router)
        self.cache = _cache(read, self._models) if cache is None else cache
        self.gate = Gate(_keys(read) if keys is None else keys, authorize, read.share)
        self.admin = admin and read.admin
        self.max_body_bytes = _MAX_BODY if read.max_body_bytes is None else read.max_body_bytes
        routes = {route.path: route.kind for route in ROUTES if route.kind and "{" not in route.path}
        self.front = Front(self.cache, routes, None, self.max_body_bytes, read.header_profile, {})
        self.front.gate = self.gate
        self.hooks = Hooks([*_functions(hooks), *named_hooks(read.hooks)])
        self.front.hooks = self.hooks or None

    def find(self, method: str, path: str) -> Match | Response:
        """The route of a request, or the answer where there is none."""
        match = find("GET" if method == "HEAD" else method, path)
        if match is None or (not self.admin and match.route is not None and match.route.access == "admin"):
            return error_response(_NoRouteError(f"nothing is at {path}"))
        if match.route is None:
            response = error_response(_WrongMethodError(f"{method} is not for {path}"))
            response.headers.append((b"allow", _allow(match.allowed)))
            return response
        return match

    async def handle(
        self, port: Port, head: Head, route: Route, values: Mapping[str, str], body: bytes
    ) -> Response:
        """The answer of any route but those of models."""
        try:
            caller = Caller() if route.access == "open" else await self.gate.enter(port, head)
            if route.access == "admin":
                self._check_admin(caller)
            return await _HANDLERS[route.handler](self, _request(port, head, caller, values, body))
        except LLMMiddlewareError as exc:
            return error_response(exc)
        except Exception:
            return _failed(head)

    async def model(self, port: Port, face: str, head: Head, told: Told, kind: str, body: bytes) -> Response:
        """The answer of a model, which the cache in front does not have."""
        try:
            request = _request(port, head, told.caller, {}, body)
            return await answer(self, face, request, kind, told)
        except LLMMiddlewareError as exc:
            return error_response(exc)
        except Exception:
            return _failed(head)

    def too_large(self) -> Response:
        return error_response(TooLargeError(f"the body has more than {self.max_body_bytes} bytes"))

    def _check_admin(self, caller: Caller) -> None:
        if not caller.admin:
            known = "send an admin's key" if self.gate.guarded else _OPEN
            raise KeyPermissionError(f"this route is for admins: {known}", code="admin_only")

    async def close(self, port: Port, face: str) -> None:
        """Give back connections and files; they are opened again when the app is used again."""
        faces = ("async", "sync") if face == "async" else ("sync",)
        await self.router._close(port, *faces)
        if self._models is not self.router:
            await self._models._close(port, *faces)
        await self.cache._close(port)
        if self.gate.limits is not None:
            await self.gate.limits._close(port)


_OPEN: Final = "configure general_settings.master_key, or authorize= for one's own"


class _NoRouteError(LLMMiddlewareError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class _WrongMethodError(LLMMiddlewareError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


def _allow(methods: Sequence[str]) -> bytes:
    also = ["HEAD"] if "GET" in methods else []
    return ", ".join(dict.fromkeys([*methods, *also])).encode()


def _failed(head: Head) -> Response:
    logger.exception("%s %s failed", head.method, head.path)
    return error_response(InternalError())


def _config(source: Source) -> Config:
    if isinstance(source, Config):
        return source
    return Config() if source is None else load_config(source)  # type: ignore[arg-type]


def _functions(hooks: object) -> Sequence[Hook]:
    if not isinstance(hooks, list | tuple):
        raise ConfigError(f"hooks: expected a list of functions, got {hooks!r}", param="hooks")
    return hooks


_AS_ROUTER: Final = ("http", "providers", "default_litellm_params", "timeout")


def _models_of_cache(config: Config, router: Router) -> Router:
    """The Router that has the models which a semantic cache asks. What is in no list is a provider's name."""
    given = config.cache or {}
    if given.get("type") not in SEMANTIC:
        return router
    named = [value for name, value in given.items() if name in MODELS and isinstance(value, str)]
    missing = [name for name in dict.fromkeys(named) if name != "local" and name not in router]
    if not missing:
        return router
    added = [{"model_name": name, "litellm_params": {"model": name}} for name in missing]
    same = {name: config.router[name] for name in _AS_ROUTER if name in config.router}
    return Router([*config.model_list, *added], **same)  # type: ignore[arg-type]


def _cache(config: Config, router: Router) -> CacheManager:
    if config.cache is None:
        made = CacheManager()
        made.disable()
        return made
    groups = config.router.get("caching_groups")
    settings = config.cache if groups is None else {"caching_groups": groups, **config.cache}
    if settings.get("type") in SEMANTIC:
        settings = {"router": router, **settings}
    return CacheManager(**settings)  # type: ignore[arg-type]


def _keys(config: Config) -> KeyResolver | None:
    if config.master_key is None and not config.keys.get("store"):
        return None
    return KeyResolver(master_key=config.master_key, **config.keys)  # type: ignore[arg-type]


def _request(port: Port, head: Head, caller: Caller, values: Mapping[str, str], body: bytes) -> Request:
    return Request(
        method=head.method,
        path=head.path,
        query=head.query,
        headers=head.headers,
        native=head.native,
        body=body,
        caller=caller,
        port=port,
        values=values,
    )
