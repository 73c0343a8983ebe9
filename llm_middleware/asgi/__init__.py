"""The ASGI front: `LLMCacheMiddleware` for Starlette, FastAPI, Django and any other ASGI app."""

from __future__ import annotations

from .middleware import LLMCacheMiddleware

__all__ = ["LLMCacheMiddleware"]
