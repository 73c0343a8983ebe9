"""Requests that are not for the cache: what a host's other routes pay for the middleware in front."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Sequence

from .harness import Row, compare, in_process, show
from .payloads import http_request
from .servers import UVICORN, serving

__all__ = ["results"]

_BODY = b'{"name": "a thing", "price": 12.5}'
_GOAL = 1.05
_ROUNDS = 15  # the difference is small


def _scopes(count: int) -> list[dict[str, object]]:
    headers = [
        (b"host", b"127.0.0.1"),
        (b"accept", b"*/*"),
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(_BODY)),
    ]
    return [
        {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/items/17",
            "raw_path": b"/items/17",
            "root_path": "",
            "query_string": b"",
            "headers": list(headers),
            "client": ("127.0.0.1", 5000),
            "server": ("127.0.0.1", 80),
        }
        for _ in range(count)
    ]


def _environs(count: int) -> list[dict[str, object]]:
    return [
        {
            "REQUEST_METHOD": "POST",
            "PATH_INFO": "/items/17",
            "SCRIPT_NAME": "",
            "QUERY_STRING": "",
            "SERVER_NAME": "127.0.0.1",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "HTTP_HOST": "127.0.0.1",
            "HTTP_ACCEPT": "*/*",
            "CONTENT_TYPE": "application/json",
            "CONTENT_LENGTH": str(len(_BODY)),
            "wsgi.input": io.BytesIO(_BODY),
            "wsgi.errors": io.StringIO(),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        for _ in range(count)
    ]


async def _receive() -> dict[str, object]:
    return {"type": "http.request", "body": _BODY, "more_body": False}


async def _send(message: dict[str, object]) -> None:
    assert message.get("status", 200) == 200


def _through_asgi(app: Callable[..., object], runner: asyncio.Runner) -> Callable[[Sequence[object]], None]:
    async def each(scopes: Sequence[object]) -> None:
        for scope in scopes:
            await app(scope, _receive, _send)  # type: ignore[misc]

    return lambda scopes: runner.run(each(scopes))


def _through_wsgi(app: Callable[..., object]) -> Callable[[Sequence[object]], None]:
    def start_response(status: str, headers: object, exc_info: object = None) -> None:
        assert status == "200 OK"

    def run(environs: Sequence[object]) -> None:
        for environ in environs:
            b"".join(app(environ, start_response))  # type: ignore[arg-type]

    return run


def _in_process() -> list[Row]:
    from .framework_apps import asgi, cached_asgi, cached_wsgi, wsgi

    with asyncio.Runner() as runner:
        starlette = compare(
            {
                "bare": in_process(_scopes, _through_asgi(asgi, runner)),
                "cached": in_process(_scopes, _through_asgi(cached_asgi, runner)),
            },
            rounds=_ROUNDS,
        )
    flask = compare(
        {
            "bare": in_process(_environs, _through_wsgi(wsgi.wsgi_app)),
            "cached": in_process(_environs, _through_wsgi(cached_wsgi)),
        },
        rounds=_ROUNDS,
    )
    return [
        starlette.row("another route, ASGI, in process", "cached", "bare", "the Starlette app alone", _GOAL),
        flask.row("another route, WSGI, in process", "cached", "bare", "the Flask app alone", _GOAL),
    ]


def results() -> list[Row]:
    request = http_request("/items/17", _BODY)
    apps = {"bare": "benchmarks.framework_apps:asgi", "cached": "benchmarks.framework_apps:cached_asgi"}
    with serving(UVICORN, apps) as servers:
        served = compare(
            {
                name: server.candidate(lambda count: [request] * count, 6000)
                for name, server in servers.items()
            },
            rounds=_ROUNDS,
        )
    row = served.row("another route, uvicorn", "cached", "bare", "the Starlette app alone", _GOAL)
    return [*_in_process(), row]


if __name__ == "__main__":
    show(results)
