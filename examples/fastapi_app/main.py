"""A FastAPI app with LLM endpoints of its own and the cache in front of them, and the sub-app at ``/llm``.

Run it from the repository's root::

    OPENAI_API_KEY=sk-... uvicorn examples.fastapi_app.main:app

Set ``LLM_CACHE_DIR`` to keep the answers on disk, ``OPENAI_BASE_URL`` to talk to another provider; with
neither that nor a key a fake provider answers. The sub-app reads the file that ``LLM_MIDDLEWARE_CONFIG``
names; without one, the ``config.yaml`` beside this module.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from examples.upstream import fake_upstream
from llm_middleware import CacheManager
from llm_middleware.asgi import LLMCacheMiddleware, llm_app

if os.environ.get("OPENAI_API_KEY"):
    BASE_URL = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1")
else:
    BASE_URL = os.environ.get("OPENAI_BASE_URL") or fake_upstream().url
SENT_ON = ("content-type", "anthropic-version", "anthropic-beta")
SENT_BACK = ("content-type", "retry-after", "retry-after-ms", "x-request-id")

ROUTES = {
    "/v1/chat/completions": "chat",
    "/v1/embeddings": "embedding",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/ask": "json",
}

cache_dir = os.environ.get("LLM_CACHE_DIR")
answers = CacheManager(type="disk", disk_cache_dir=cache_dir) if cache_dir else CacheManager(type="local")

app = FastAPI(title="LLM endpoints with a cache in front")
app.add_middleware(LLMCacheMiddleware, cache=answers, routes=ROUTES)

config = os.environ.get("LLM_MIDDLEWARE_CONFIG")
if config is None:
    config = str(Path(__file__).with_name("config.yaml"))
    fake_upstream()
app.mount("/llm", llm_app(config))


@cache
def client() -> httpx.AsyncClient:
    """One client per process, made on the event loop that is going to use it."""
    return httpx.AsyncClient(timeout=httpx.Timeout(120, connect=5), limits=httpx.Limits(max_connections=500))


class Question(BaseModel):
    question: str


@app.post("/ask")
async def ask(asked: Question, request: Request) -> Response:
    """An endpoint of the app's own shape; the cache needs to know nothing about it."""
    messages = [{"role": "user", "content": asked.question}]
    body = {"model": os.environ.get("OPENAI_MODEL", "gpt-4o-mini"), "messages": messages}
    response = await client().post(f"{BASE_URL}/chat/completions", json=body, headers=credentials(request))
    if response.is_error:
        return Response(
            response.content, response.status_code, media_type=response.headers.get("content-type")
        )
    return JSONResponse({"answer": response.json()["choices"][0]["message"]["content"]})


@app.post("/v1/chat/completions")
@app.post("/v1/embeddings")
@app.post("/v1/responses")
@app.post("/v1/messages")
async def forward(request: Request) -> Response:
    """Pass the request on, and whatever comes back with it: status, body, stream."""
    headers = {name: request.headers[name] for name in SENT_ON if name in request.headers}
    headers |= credentials(request)
    url = BASE_URL + request.url.path.removeprefix("/v1")
    sent = client().build_request("POST", url, content=await request.body(), headers=headers)
    upstream = await client().send(sent, stream=True)
    return Relay(upstream)


@app.exception_handler(httpx.TransportError)
async def unreachable(request: Request, error: httpx.TransportError) -> Response:
    return JSONResponse({"error": {"message": f"no answer from upstream: {type(error).__name__}"}}, 502)


@app.get("/healthz")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


def credentials(request: Request) -> dict[str, str]:
    """The caller's own key, or the app's where the caller has none."""
    own = {name: request.headers[name] for name in ("authorization", "x-api-key") if name in request.headers}
    key = os.environ.get("OPENAI_API_KEY")
    return own or ({"authorization": f"Bearer {key}"} if key else {})


class Relay(StreamingResponse):
    """The upstream's answer as it comes in. When the client leaves, the upstream is hung up on too."""

    def __init__(self, upstream: httpx.Response) -> None:
        headers = {name: upstream.headers[name] for name in SENT_BACK if name in upstream.headers}
        super().__init__(upstream.aiter_bytes(), upstream.status_code, headers)
        self.upstream = upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.upstream.aclose()
