"""Cached LLM endpoints inside the ASGI or WSGI app you already have.

    app.add_middleware(LLMCacheMiddleware, cache=CacheManager())      # llm_middleware.asgi
    app.wsgi_app = LLMCacheMiddleware(app.wsgi_app)                    # llm_middleware.wsgi
    answer = await cache.afetch(body, call)                            # in a handler

Names are loaded on first use: importing the package loads nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .caching.answer import Answer, CacheInfo
    from .caching.default import cached, default_cache, disable_cache, enable_cache, update_cache
    from .caching.manager import CacheManager
    from .errors import (
        CacheMissError,
        ConfigError,
        InvalidRequestError,
        LLMMiddlewareError,
        StoreError,
        SuspendedInSyncError,
    )
    from .events import Event
    from .keys.record import KeyRecord
    from .keys.resolver import KeyResolver
    from .routing.response import ModelResponse, ModelStream, RouteInfo
    from .routing.router import Router
    from .stores.disk import DiskStore
    from .stores.memory import MemoryStore
    from .types import Store

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "CacheInfo",
    "CacheManager",
    "CacheMissError",
    "ConfigError",
    "DiskStore",
    "Event",
    "InvalidRequestError",
    "KeyRecord",
    "KeyResolver",
    "LLMMiddlewareError",
    "MemoryStore",
    "ModelResponse",
    "ModelStream",
    "RouteInfo",
    "Router",
    "Store",
    "StoreError",
    "SuspendedInSyncError",
    "__version__",
    "cached",
    "default_cache",
    "disable_cache",
    "enable_cache",
    "update_cache",
]

_HOMES = {
    "Answer": ".caching.answer",
    "CacheInfo": ".caching.answer",
    "CacheManager": ".caching.manager",
    "DiskStore": ".stores.disk",
    "Event": ".events",
    "MemoryStore": ".stores.memory",
    "KeyRecord": ".keys.record",
    "KeyResolver": ".keys.resolver",
    "Router": ".routing.router",
    **dict.fromkeys(("ModelResponse", "ModelStream", "RouteInfo"), ".routing.response"),
    "Store": ".types",
    **dict.fromkeys(
        ("cached", "default_cache", "disable_cache", "enable_cache", "update_cache"), ".caching.default"
    ),
    **dict.fromkeys(
        (
            "CacheMissError",
            "ConfigError",
            "InvalidRequestError",
            "LLMMiddlewareError",
            "StoreError",
            "SuspendedInSyncError",
        ),
        ".errors",
    ),
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(home, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
