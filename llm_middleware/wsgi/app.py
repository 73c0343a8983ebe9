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
from ..api.message import Response
from ..api.paths import is_form, openai_path, with_model
from ..api.routes import MODEL_KINDS, Match, Route
from ..caching.headers import as_text
from ..caching.manager import CacheManager
from ..caching.results import close_items
from ..events import Hook
from ..keys.resolver import KeyResolver
from ..routing.router import Router
from .exchange import Body, Exchange, status_line
from .reading import about_body, head_of, path_of, read_input

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
        path = path_of(environ)
        if method == "POST":
            kind = self.core.front.routes.get(path)
            if kind is not None:  # nearly every request, and nothing to look for
                return self._exchange(kind, path, environ, start_response).run()
        found = self.core.find(method, path)
        if isinstance(found, Response):
            return _send(start_response, found, head=method == "HEAD")
        if found.route is not None and found.route.kind is not None:
            return self._model(found, found.route, environ, start_response)
        return self._other(found, environ, start_response)

    def close(self) -> None:
        """Give back connections and files; they are opened again when the app is used again."""
        run_sync(self.core.close(_port, "sync"))

    def _exchange(
        self, kind: str, path: str, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Exchange:
        return Exchange(self.core.front, self._behind[kind], kind, path, environ, start_response)

    def _model(
        self, found: Match, route: Route, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """A request whose model stands in its path."""
        assert route.kind is not None
        exchange = self._exchange(route.kind, openai_path(route.path), environ, start_response)
        model = found.values["model"]
        if route.kind == "transcription" and is_form(*about_body(environ)):
            exchange.named = model
        else:
            # First who calls: unpacking and reading a body is work.
            refused = exchange.admit(self.core.gate)
            if refused is not None:
                return refused
            body = read_input(environ, self.core.max_body_bytes)
            if body is None:
                return _send(start_response, self.core.too_large())
            self._name(model, environ, body)
        return exchange.run()

    def _name(self, model: str, environ: WSGIEnvironment, body: bytes) -> None:
        """Put the ``model`` into the body."""
        form, encoding = about_body(environ)
        limit = self.core.max_body_bytes
        named = with_model(model, body, content_type=form, encoding=encoding, limit=limit)
        environ["wsgi.input"], environ["CONTENT_LENGTH"] = io.BytesIO(named.body), str(len(named.body))
        environ["HTTP_CONTENT_ENCODING"] = named.encoding

    def _answer(self, kind: str, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """The app behind the cache."""
        told: Told = environ["llm_middleware"]
        body = read_input(environ, self.core.max_body_bytes)
        if body is None:
            return _send(start_response, self.core.too_large())
        response = run_sync(self.core.model(_port, "sync", head_of(environ), told, kind, body))
        return _send(start_response, response)

    def _other(
        self, found: Match, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        assert found.route is not None
        head = head_of(environ)
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


def _send(start_response: StartResponse, response: Response, *, head: bool = False) -> Iterable[bytes]:
    headers = response.headers
    if response.stream is None:
        headers = [*headers, (b"content-length", b"%d" % len(response.body))]
        start_response(status_line(response.status), as_text(headers))
        return [] if head else [response.body]
    start_response(status_line(response.status), as_text(headers))
    stream = response.stream
    return Body(iter_sync(stream), lambda: run_sync(close_items(stream)))
