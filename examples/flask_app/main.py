"""A Flask app with LLM endpoints of its own and the cache in front of them, and the sub-app at ``/llm``.

Run it from the repository's root::

    OPENAI_API_KEY=sk-... gunicorn --worker-class gthread --threads 32 examples.flask_app.main:app

Set ``LLM_CACHE_DIR`` to keep the answers on disk (which several workers can share), ``OPENAI_BASE_URL``
to talk to another provider; with neither that nor a key a fake provider answers. The sub-app reads the file
that ``LLM_MIDDLEWARE_CONFIG`` names; without one, the ``config.yaml`` beside this module.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import httpx
from flask import Flask, Response, abort, jsonify, request
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from examples.upstream import fake_upstream
from llm_middleware import CacheManager
from llm_middleware.wsgi import LLMCacheMiddleware, llm_app

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

app = Flask(__name__)
app.wsgi_app = LLMCacheMiddleware(app.wsgi_app, cache=answers, routes=ROUTES)  # type: ignore[method-assign]

config = os.environ.get("LLM_MIDDLEWARE_CONFIG")
if config is None:
    config = str(Path(__file__).with_name("config.yaml"))
    fake_upstream()
app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/llm": llm_app(config)})  # type: ignore[method-assign]


@cache
def client() -> httpx.Client:
    """One client per process: made on the first request, so after a pre-forking server has forked."""
    return httpx.Client(timeout=httpx.Timeout(120, connect=5), limits=httpx.Limits(max_connections=500))


@app.post("/ask")
def ask() -> Response:
    """An endpoint of the app's own shape; the cache needs to know nothing about it."""
    asked = request.get_json()
    if not isinstance(asked, dict) or not isinstance(asked.get("question"), str):
        abort(400, 'expected {"question": "..."}')
    messages = [{"role": "user", "content": asked["question"]}]
    body = {"model": os.environ.get("OPENAI_MODEL", "gpt-4o-mini"), "messages": messages}
    response = client().post(f"{BASE_URL}/chat/completions", json=body, headers=credentials())
    if response.is_error:
        return Response(
            response.content, response.status_code, content_type=response.headers.get("content-type")
        )
    return jsonify(answer=response.json()["choices"][0]["message"]["content"])


@app.post("/v1/chat/completions")
@app.post("/v1/embeddings")
@app.post("/v1/responses")
@app.post("/v1/messages")
def forward() -> Response:
    """Pass the request on, and whatever comes back with it: status, body, stream."""
    headers = {name: request.headers[name] for name in SENT_ON if name in request.headers} | credentials()
    url = BASE_URL + request.path.removeprefix("/v1")
    sent = client().build_request("POST", url, content=request.get_data(), headers=headers)
    upstream = client().send(sent, stream=True)
    sent_back = {name: upstream.headers[name] for name in SENT_BACK if name in upstream.headers}
    response = Response(upstream.iter_bytes(), upstream.status_code, sent_back)
    # The server closes the response when it is over or its client has left: hang up on the upstream then.
    response.call_on_close(upstream.close)
    return response


@app.errorhandler(httpx.TransportError)
def unreachable(error: httpx.TransportError) -> tuple[Response, int]:
    return jsonify(error={"message": f"no answer from upstream: {type(error).__name__}"}), 502


@app.get("/healthz")
def healthz() -> Response:
    return jsonify(status="ok")


def credentials() -> dict[str, str]:
    """The caller's own key, or the app's where the caller has none."""
    own = {name: request.headers[name] for name in ("authorization", "x-api-key") if name in request.headers}
    key = os.environ.get("OPENAI_API_KEY")
    return own or ({"authorization": f"Bearer {key}"} if key else {})
