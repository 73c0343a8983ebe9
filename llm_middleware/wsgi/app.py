"""`llm_app`: the sub-app for WSGI hosts, an application that can be mounted anywhere."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from .._drive import iter_sync, run_sync
from .._ports.sync import SyncPort
from ..api.app import LLMApp, Source
from ..api.gate import Told
from ..api.message import Head, Response
from ..api.paths import is_form, openai_path, with_model
from ..api.routes import MODEL_KINDS, Match
from ..caching.headers import as_text
from ..caching.manager import CacheManager
from ..caching.results import close_items
from ..events import Hook
from ..keys.resolver import KeyResolver
from ..routing.router import Router
from .exchange import Body, Exchange, header_pairs, read_input, status_line

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

__all__ = ["LLMWSGIApp", "llm_app"]

_port = SyncPort()


class LLMWSGIApp:
    """See `llm_app`. ``core``: the `LLMApp`, with the cache, the Router and the keys that it uses."""

    def __init__(self, core: LLMApp) -> None:
        self.core = core
        self._behind = {kind: partial(self._answer, kind) for kind in MODEL_KINDS}

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        path = _path(environ)
        if method == "POST":
            kind = self.core.front.routes.get(path)
            if kind is not None:  # nearly every request, and nothing to look for
                return self._exchange(kind, path, environ, start_response)
        found = self.core.find(method, path)
        if isinstance(found, Response):
            return _send(start_response, found, head=method == "HEAD")
        if found.route is not None and found.route.kind is not None:
            return self._model(found, path, environ, start_response)
        return self._other(found, path, environ, start_response)

    def close(self) -> None:
        """Give back connections and files; they are opened again when the app is used again."""
        run_sync(self.core.close(_port, "sync"))

    def _model(
        self, found: Match, path: str, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        assert found.route is not None
        kind = found.route.kind
        assert kind is not None
        if found.values:
            path = openai_path(found.route.path)
        exchange = Exchange(self.core.front, self._behind[kind], kind, path, environ, start_response)
        if found.values and kind == "transcription" and is_form(*_about_body(environ)):
            exchange.named = found.values["model"]
        elif found.values:
            # First who calls: unpacking and reading a body is work.
            refused = exchange.admit(self.core.gate)
            if refused is not None:
                return refused
            body = read_input(environ, self.core.max_body_bytes)
            if body is None:
                return _send(start_response, self.core.too_large())
            self._named(found, environ, body)
        return exchange.run()

    def _exchange(
        self, kind: str, path: str, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        exchange = Exchange(self.core.front, self._behind[kind], kind, path, environ, start_response)
        return exchange.run()

    def _named(self, found: Match, environ: WSGIEnvironment, body: bytes) -> str:
        """Put the model that stands in the path into the body; the path without it."""
        assert found.route is not None
        form, encoding = _about_body(environ)
        named = with_model(
            found.route.path,
            found.values["model"],
            body,
            content_type=form,
            encoding=encoding,
            limit=self.core.max_body_bytes,
        )
        environ["wsgi.input"], environ["CONTENT_LENGTH"] = io.BytesIO(named.body), str(len(named.body))
        environ["HTTP_CONTENT_ENCODING"] = named.encoding
        return named.path

    def _answer(self, kind: str, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """The app behind the cache."""
        told: Told = environ["llm_middleware"]
        body = read_input(environ, self.core.max_body_bytes)
        if body is None:
            return _send(start_response, self.core.too_large())
        head = _head(environ, _path(environ))
        return _send(start_response, run_sync(self.core.model(_port, "sync", head, told, kind, body)))

    def _other(
        self, found: Match, path: str, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        assert found.route is not None
        head = _head(environ, path)
        body = read_input(environ, self.core.max_body_bytes)
        if body is None:
            return _send(start_response, self.core.too_large())
        response = run_sync(self.core.handle(_port, head, found.route, found.values, body))
        return _send(start_response, response, head=head.method == "HEAD")


def llm_app(
    config: Source = None,
    *,
    cache: CacheManager | None = None,
    router: Router | None = None,
    keys: KeyResolver | None = None,
    authorize: Callable[..., object] | None = None,
    admin: bool = True,
    hooks: Sequence[Hook] = (),
) -> LLMWSGIApp:
    """OpenAI's endpoints, cached and routed, with API keys and admin routes, to mount into a WSGI host.

        app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/llm": llm_app("config.yaml")})

    ``config``: the path of a LiteLLM ``config.yaml`` or of a file in our own shorter form, a mapping of
    either, or a `Config`. ``cache``, ``router``, ``keys``: your own, in place of those that it describes.
    ``authorize``: your own check in place of API keys: from a `Head` to a `KeyRecord`; None refuses;
    `in_flask` makes one of a function of Flask's request. ``admin=False`` leaves the admin routes out.
    ``hooks``: sync or async functions that get an `Event` for each request for a model, ``success`` or
    ``failure``. `ConfigError` lists all that is wrong.

    Connections are opened when they are first used, by each process for itself; ``close`` gives them back.
    """
    return LLMWSGIApp(
        LLMApp(config, cache=cache, router=router, keys=keys, authorize=authorize, admin=admin, hooks=hooks)
    )


def _about_body(environ: WSGIEnvironment) -> tuple[str, str]:
    """The content type and the encoding that the headers tell."""
    return environ.get("CONTENT_TYPE", ""), environ.get("HTTP_CONTENT_ENCODING", "").strip().lower()


def _path(environ: WSGIEnvironment) -> str:
    """PEP 3333: bytes as if they were Latin-1."""
    return str(environ.get("PATH_INFO", "").encode("latin-1", "replace").decode("utf-8", "replace"))


def _head(environ: WSGIEnvironment, path: str) -> Head:
    return Head(
        method=environ["REQUEST_METHOD"],
        path=path,
        query=environ.get("QUERY_STRING", ""),
        headers=header_pairs(environ),
        native=environ,
    )


def _send(start_response: StartResponse, response: Response, *, head: bool = False) -> Iterable[bytes]:
    headers = response.headers
    if response.stream is None:
        headers = [*headers, (b"content-length", b"%d" % len(response.body))]
        start_response(status_line(response.status), as_text(headers))
        return [] if head else [response.body]
    start_response(status_line(response.status), as_text(headers))
    stream = response.stream
    return Body(iter_sync(stream), lambda: run_sync(close_items(stream)))
