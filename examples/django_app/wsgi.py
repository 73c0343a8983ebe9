"""``gunicorn --worker-class gthread --threads 32 examples.django_app.wsgi:application``"""

from __future__ import annotations

import os

from django.core.wsgi import get_wsgi_application

from llm_middleware.wsgi import LLMCacheMiddleware

from .llm_cache import ROUTES, answers

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "examples.django_app.settings")

app = application = LLMCacheMiddleware(get_wsgi_application(), cache=answers, routes=ROUTES)
