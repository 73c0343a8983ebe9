"""Sub-apps, alone and mounted in a host, each as one variant of who is asked who it is; and their floors.

``BENCHMARK_UPSTREAM_PORT``: where the model is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.routing import Mount
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from llm_middleware.api.message import Head
from llm_middleware.asgi import llm_app as asgi_llm
from llm_middleware.keys.record import KeyRecord
from llm_middleware.keys.resolver import KeyResolver
from llm_middleware.wsgi import llm_app as wsgi_llm

from .upstream import BODY, KEY

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

    from llm_middleware.asgi.types import Receive, Scope, Send

__all__ = [
    "asgi",
    "asgi_authorized",
    "asgi_limited",
    "asgi_mounted",
    "asgi_open",
    "bare_asgi",
    "bare_asgi_mounted",
    "bare_proxy",
    "bare_wsgi",
    "bare_wsgi_mounted",
    "wsgi",
    "wsgi_authorized",
    "wsgi_limited",
    "wsgi_mounted",
    "wsgi_open",
]

_PORT = os.environ.get("BENCHMARK_UPSTREAM_PORT", "8001")
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(BODY))]
_HEADERS_TEXT = [(name.decode(), value.decode()) for name, value in _HEADERS]
_CALLER = "sk-proj-0123456789abcdefghijklmnopqrstuvwxyz"  # whose requests `payloads.http_request` makes
_PLENTY = 10**9  # requests a minute
_RECORD = KeyRecord(id="a" * 64)


async def bare_asgi(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body and answers."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body", False):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": BODY})


def bare_wsgi(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Reads the body and answers."""
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    start_response("200 OK", list(_HEADERS_TEXT))
    return [BODY]


class _Proxy:
    """Passes the body on and the answer back, and does nothing else."""

    def __init__(self) -> None:
        self._session: Any = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        import aiohttp

        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if self._session is None:
            jar = aiohttp.DummyCookieJar()
            connector = aiohttp.TCPConnector(limit=1000)
            self._session = aiohttp.ClientSession(connector=connector, cookie_jar=jar)
        headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        url = f"http://127.0.0.1:{_PORT}/v1/chat/completions"
        async with self._session.post(url, data=body, headers=headers) as response:
            answer = await response.read()
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": answer})


def _config(**sections: object) -> Mapping[str, object]:
    params = {"model": "openai/gpt-4o", "api_key": KEY, "api_base": f"http://127.0.0.1:{_PORT}/v1"}
    return {
        "models": [{"model_name": "gpt-4o-mini", "litellm_params": params}],
        "cache": {"type": "local"},
        **sections,
    }


def _keys(**limits: object) -> KeyResolver:
    """One key, which all requests come with, beside a master key."""
    keys = KeyResolver(master_key="sk-the-administrators-own-key")
    keys.generate(key=_CALLER, **limits)
    return keys


def _authorize(head: Head) -> KeyRecord | None:
    return _RECORD if head.bearer == _CALLER else None


asgi = asgi_llm(_config(), keys=_keys())
asgi_mounted = Starlette(routes=[Mount("/llm", asgi)])
asgi_limited = asgi_llm(_config(), keys=_keys(rpm_limit=_PLENTY))
asgi_open = asgi_llm(_config())
asgi_authorized = asgi_llm(_config(), authorize=_authorize)
bare_asgi_mounted = Starlette(routes=[Mount("/llm", bare_asgi)])
bare_proxy = _Proxy()

wsgi = wsgi_llm(_config(), keys=_keys())
wsgi_mounted = DispatcherMiddleware(bare_wsgi, {"/llm": wsgi})
wsgi_limited = wsgi_llm(_config(), keys=_keys(rpm_limit=_PLENTY))
wsgi_open = wsgi_llm(_config())
wsgi_authorized = wsgi_llm(_config(), authorize=_authorize)
bare_wsgi_mounted = DispatcherMiddleware(bare_wsgi, {"/llm": bare_wsgi})
