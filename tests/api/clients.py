"""Clients of the sub-app in process, mounted below ``/llm`` in a host of each kind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.routing import Mount
from werkzeug.exceptions import NotFound
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from llm_middleware.api.app import LLMApp
from llm_middleware.asgi.app import llm_app as asgi_app
from llm_middleware.wsgi.app import llm_app as wsgi_app

PREFIX = "/llm"
MASTER = "sk-master-of-the-tests-0123456789"
CHAT = "/v1/chat/completions"


def chat(text: str = "hi", model: str = "gpt", **fields: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}


def config(url: str, **sections: object) -> dict[str, object]:
    """Two models at the upstream whose base URL is ``url``, a cache and a master key; or ``sections``."""

    def model(name: str) -> dict[str, object]:
        params = {"model": f"openai/{name}-up", "api_base": url, "api_key": "sk-upstream-secret"}
        return {"model_name": name, "litellm_params": params}

    models = [model("gpt"), model("other")]
    made = {"models": models, "cache": {"type": "local"}, "keys": {"master_key": MASTER}, **sections}
    return {name: section for name, section in made.items() if section is not None}


class Client:
    """What both kinds have in common. ``core``: the `LLMApp` behind it."""

    name: str
    core: LLMApp
    host: Any

    def send(self, request: httpx.Request) -> httpx.Response:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        key: str | None = MASTER,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """``body``: bytes, or JSON. ``key``: as a bearer; None for none."""
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {} if content is None else {"content-type": "application/json"}
        if key is not None:
            sent["authorization"] = f"Bearer {key}"
        url = f"http://host{PREFIX}{path}"
        return self.send(httpx.Request(method, url, content=content, headers={**sent, **(headers or {})}))

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, body: object = None, **options: Any) -> httpx.Response:
        return self.request("POST", path, body, **options)

    def new_key(self, **fields: object) -> str:
        answer = self.post("/key/generate", fields)
        assert answer.status_code == 200, answer.text
        key: str = answer.json()["key"]
        return key


class AsgiClient(Client):
    """On one event loop that lives as long as the client."""

    name = "asgi"

    def __init__(self, settings: object, **options: Any) -> None:
        app = asgi_app(settings, **options)
        self.core = app.core
        self.host = Starlette(routes=[Mount(PREFIX, app)])
        self._app = app
        self._runner = asyncio.Runner()
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(self.host))

    def send(self, request: httpx.Request) -> httpx.Response:
        return self._runner.run(self._client.send(request))

    def close(self) -> None:
        if self._client.is_closed:
            return
        self._runner.run(self._client.aclose())
        self._runner.run(_lifespan(self._app))
        self._runner.close()


async def _lifespan(app: Any) -> None:
    async with app.router.lifespan_context(app):
        """Begins, and ends, which closes."""


class WsgiClient(Client):
    name = "wsgi"

    def __init__(self, settings: object, **options: Any) -> None:
        app = wsgi_app(settings, **options)
        self.core = app.core
        self.host = DispatcherMiddleware(NotFound(), {PREFIX: app})
        self._app = app
        self._client = httpx.Client(transport=httpx.WSGITransport(self.host))

    def send(self, request: httpx.Request) -> httpx.Response:
        return self._client.send(request)

    def close(self) -> None:
        self._client.close()
        self._app.close()
