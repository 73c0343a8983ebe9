"""The WSGI front: `LLMCacheMiddleware` for Flask, Django and any other WSGI app."""

from __future__ import annotations

from .middleware import LLMCacheMiddleware

__all__ = ["LLMCacheMiddleware"]
