"""``uvicorn examples.django_app.asgi:application``"""

from __future__ import annotations

import os

from django.core.asgi import get_asgi_application

from llm_middleware.asgi import LLMCacheMiddleware

from .llm_cache import ROUTES, answers

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "examples.django_app.settings")

app = application = LLMCacheMiddleware(get_asgi_application(), cache=answers, routes=ROUTES)
