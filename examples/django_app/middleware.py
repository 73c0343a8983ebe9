"""The app's own Django middleware: which views serve a request, and what to say when upstream is down."""

from __future__ import annotations

from collections.abc import Callable

import httpx
from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.http import HttpRequest, HttpResponse, HttpResponseBase

from .views import error_response


class UpstreamMiddleware:
    """Async views under an ASGI server, sync ones under WSGI: a stream needs the kind its server awaits."""

    sync_capable = async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response
        self.is_async = iscoroutinefunction(get_response)
        if self.is_async:
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        if self.is_async:
            request.urlconf = "examples.django_app.async_views"
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        if isinstance(exception, httpx.TransportError):
            return error_response(502, f"no answer from upstream: {type(exception).__name__}")
        return None
