"""The ASGI front: `LLMCacheMiddleware` and `llm_app`, for Starlette, FastAPI, Django and others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .middleware import LLMCacheMiddleware

if TYPE_CHECKING:
    from .app import llm_app

__all__ = ["LLMCacheMiddleware", "llm_app"]


def __getattr__(name: str) -> object:
    if name != "llm_app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .app import llm_app  # on first use: the middleware alone needs none of what it brings

    return llm_app
