"""Small apps of a Starlette and a Flask user, and the same ones behind the cache."""

from __future__ import annotations

from flask import Flask, request
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from llm_middleware import CacheManager
from llm_middleware.asgi import LLMCacheMiddleware as ASGIMiddleware
from llm_middleware.wsgi import LLMCacheMiddleware as WSGIMiddleware

__all__ = ["asgi", "cached_asgi", "cached_wsgi", "wsgi"]


async def _item(request: Request) -> JSONResponse:
    body = await request.json()
    return JSONResponse({"id": request.path_params["id"], "name": body["name"], "tags": ["a", "b"]})


asgi = Starlette(routes=[Route("/items/{id:int}", _item, methods=["POST"])])
wsgi = Flask(__name__)


@wsgi.post("/items/<int:id>")
def _flask_item(id: int) -> dict[str, object]:  # noqa: A002 - the route's name for it
    return {"id": id, "name": request.get_json()["name"], "tags": ["a", "b"]}


cached_asgi = ASGIMiddleware(asgi, cache=CacheManager())
cached_wsgi = WSGIMiddleware(wsgi, cache=CacheManager())
