"""Hosts of the sub-app of ``LLM_MIDDLEWARE_CONFIG`` for servers with several workers: every answer says in
``x-pid`` which process gave it."""

from __future__ import annotations

import os
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Mount
from werkzeug.exceptions import NotFound
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from llm_middleware.asgi import llm_app as asgi_llm
from llm_middleware.wsgi import llm_app as wsgi_llm

CONFIG = os.environ["LLM_MIDDLEWARE_CONFIG"]


def __getattr__(name: str) -> Any:
    """What a server is told to run, made when it asks."""
    if name == "asgi":
        return _asgi(Starlette(routes=[Mount("/llm", asgi_llm(CONFIG))]))
    if name == "wsgi":
        return _wsgi(DispatcherMiddleware(NotFound(), {"/llm": wsgi_llm(CONFIG)}))
    raise AttributeError(name)


def _asgi(host: Any) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def tell(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-pid", b"%d" % os.getpid())]
            await send(message)

        await host(scope, receive, tell)

    return app


def _wsgi(host: Any) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        def tell(status: str, headers: Any, *more: Any) -> Any:
            return start_response(status, [*headers, ("x-pid", str(os.getpid()))], *more)

        return host(environ, tell)

    return app
