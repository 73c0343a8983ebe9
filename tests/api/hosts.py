"""Hosts of the sub-app for servers in processes of their own. ``FAKE_UPSTREAM_URL`` says where models are.

Each host answers ``GET /pid`` with the number of the process that answers, and has the sub-app at ``/llm``.
"""

from __future__ import annotations

import os
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.wrappers import Response

from llm_middleware.asgi import llm_app as asgi_llm
from llm_middleware.wsgi import llm_app as wsgi_llm

CONFIG = {
    "models": [
        {
            "model_name": "m",
            "litellm_params": {
                "model": "openai/m-up",
                "api_base": "os.environ/FAKE_UPSTREAM_URL",
                "api_key": "sk-upstream",
            },
        }
    ],
    "cache": {"type": "local"},
}


def pid(environ: Any, start_response: Any) -> Any:
    return Response(f"{os.getpid()}")(environ, start_response)


async def apid(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"{os.getpid()}")


def wsgi_host(host: Any = None) -> DispatcherMiddleware:
    return DispatcherMiddleware(host or pid, {"/llm": wsgi_llm(CONFIG), "/pid": pid})


def preloaded() -> DispatcherMiddleware:
    """A host that has made calls, and has connections, when the server forks its workers."""
    host = wsgi_host()
    sub_app: Any = host.mounts["/llm"]
    for text in ("before", "the fork"):
        sub_app.core.router.completion("m", [{"role": "user", "content": text}])
    return host


def asgi_host(*routes: Any) -> Starlette:
    return Starlette(routes=[Route("/pid", apid), Mount("/llm", asgi_llm(CONFIG)), *routes])


asgi = asgi_host()
wsgi = wsgi_host()


def __getattr__(name: str) -> Any:
    """What a server is told to run, made when it asks."""
    if name == "wsgi_preloaded":
        return preloaded()
    if name == "django_wsgi":
        from examples.django_app.wsgi import application

        return wsgi_host(application)
    if name == "django_asgi":
        from examples.django_app.asgi import application as django

        return asgi_host(Mount("/", django))
    raise AttributeError(name)
