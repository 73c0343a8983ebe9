"""LLM endpoints of a Django app under a WSGI server; `async_views` has their twins for ASGI."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache

import httpx
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse, StreamingHttpResponse
from django.urls import URLPattern, path
from django.views.decorators.http import require_GET, require_POST

BASE_URL = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1")
TIMEOUT = httpx.Timeout(120, connect=5)
LIMITS = httpx.Limits(max_connections=500)
SENT_ON = ("content-type", "authorization", "x-api-key", "anthropic-version", "anthropic-beta")
SENT_BACK = ("content-type", "retry-after", "retry-after-ms", "x-request-id")


@cache
def client() -> httpx.Client:
    """One client per process: made on the first request, so after a pre-forking server has forked."""
    return httpx.Client(timeout=TIMEOUT, limits=LIMITS)


@require_POST
def ask(request: HttpRequest) -> HttpResponse:
    """An endpoint of the app's own shape; the cache needs to know nothing about it."""
    body = chat_body(request)
    if body is None:
        return error_response(400, 'expected {"question": "..."}')
    return answer_of(client().post(f"{BASE_URL}/chat/completions", json=body, headers=sent_on(request)))


@require_POST
def forward(request: HttpRequest) -> HttpResponseBase:
    """Pass the request on, and whatever comes back with it: status, body, stream."""
    sent = client().build_request("POST", target(request), content=request.body, headers=sent_on(request))
    upstream = client().send(sent, stream=True)
    return StreamingHttpResponse(Relay(upstream), status=upstream.status_code, headers=sent_back(upstream))


@require_GET
def healthz(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"status": "ok"})


urlpatterns: list[URLPattern] = [
    path("ask", ask),
    *(path(f"v1/{name}", forward) for name in ("chat/completions", "embeddings", "responses", "messages")),
    path("healthz", healthz),
]


class Relay:
    """The upstream's answer as it comes in; Django closes it when it is over or its client has left."""

    def __init__(self, upstream: httpx.Response) -> None:
        self.upstream = upstream
        self.close = upstream.close

    def __iter__(self) -> Iterator[bytes]:
        return self.upstream.iter_bytes()


# What the views here and the async ones have in common: everything but the waiting.


def target(request: HttpRequest) -> str:
    return BASE_URL + request.path.removeprefix("/v1")


def sent_on(request: HttpRequest) -> dict[str, str]:
    """The caller's headers that are meant for the upstream, and the app's own key if there is none."""
    headers = {name: request.headers[name] for name in SENT_ON if name in request.headers}
    key = os.environ.get("OPENAI_API_KEY")
    if key and not headers.keys() & {"authorization", "x-api-key"}:
        headers["authorization"] = f"Bearer {key}"
    return headers


def sent_back(upstream: httpx.Response) -> dict[str, str]:
    return {name: upstream.headers[name] for name in SENT_BACK if name in upstream.headers}


def chat_body(request: HttpRequest) -> dict[str, object] | None:
    """The chat request that a question stands for; None where there is no question."""
    try:
        question = json.loads(request.body)["question"]
    except (ValueError, TypeError, KeyError):
        return None
    messages = [{"role": "user", "content": question}]
    return {"model": os.environ.get("OPENAI_MODEL", "gpt-4o-mini"), "messages": messages}


def answer_of(upstream: httpx.Response) -> HttpResponse:
    if upstream.is_error:
        return HttpResponse(upstream.content, status=upstream.status_code, headers=sent_back(upstream))
    return JsonResponse({"answer": upstream.json()["choices"][0]["message"]["content"]})


def error_response(status: int, message: str) -> HttpResponse:
    return JsonResponse({"error": {"message": message}}, status=status)
