"""The twins of `views` for ASGI servers: they wait on the event loop, not in a thread each."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import cache

import httpx
from asgiref.sync import async_to_sync
from django.http import HttpRequest, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.urls import URLPattern, path
from django.views.decorators.http import require_POST

from .views import (
    BASE_URL,
    LIMITS,
    TIMEOUT,
    answer_of,
    chat_body,
    error_response,
    healthz,
    sent_back,
    sent_on,
    target,
)


@cache
def client() -> httpx.AsyncClient:
    """One client per process, made on the event loop that is going to use it."""
    return httpx.AsyncClient(timeout=TIMEOUT, limits=LIMITS)


@require_POST
async def ask(request: HttpRequest) -> HttpResponse:
    body = chat_body(request)
    if body is None:
        return error_response(400, 'expected {"question": "..."}')
    return answer_of(await client().post(f"{BASE_URL}/chat/completions", json=body, headers=sent_on(request)))


@require_POST
async def forward(request: HttpRequest) -> HttpResponseBase:
    sent = client().build_request("POST", target(request), content=request.body, headers=sent_on(request))
    upstream = await client().send(sent, stream=True)
    return StreamingHttpResponse(
        AsyncRelay(upstream), status=upstream.status_code, headers=sent_back(upstream)
    )


urlpatterns: list[URLPattern] = [
    path("ask", ask),
    *(path(f"v1/{name}", forward) for name in ("chat/completions", "embeddings", "responses", "messages")),
    path("healthz", healthz),
]


class AsyncRelay:
    """The upstream's answer as it comes in; Django closes it, from a thread, when it is over."""

    def __init__(self, upstream: httpx.Response) -> None:
        self.upstream = upstream
        self.close = async_to_sync(upstream.aclose)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self.upstream.aiter_bytes()
