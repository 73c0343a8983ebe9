"""The WSGI front: `LLMCacheMiddleware` and `llm_app` for Flask, Django and any other WSGI app."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .middleware import LLMCacheMiddleware

if TYPE_CHECKING:
    from .app import llm_app
    from .authorize import in_flask

__all__ = ["LLMCacheMiddleware", "in_flask", "llm_app"]

_HOMES = {"in_flask": ".authorize", "llm_app": ".app"}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # On first use: the middleware alone needs none of what they bring.
    return getattr(importlib.import_module(home, __name__), name)
