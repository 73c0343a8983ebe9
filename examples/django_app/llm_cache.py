"""The cache and its routes, for ``wsgi.py`` and ``asgi.py`` alike."""

from __future__ import annotations

import os

from llm_middleware import CacheManager

__all__ = ["ROUTES", "answers"]

ROUTES = {
    "/v1/chat/completions": "chat",
    "/v1/embeddings": "embedding",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/ask": "json",
}

cache_dir = os.environ.get("LLM_CACHE_DIR")
answers = CacheManager(type="disk", disk_cache_dir=cache_dir) if cache_dir else CacheManager(type="local")
