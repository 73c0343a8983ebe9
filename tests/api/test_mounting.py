"""The sub-app inside hosts of every kind, under real servers, and in the example apps."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flask
import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Mount
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from tests.api import serving
from tests.api.serving import SLASHES, chat
from tests.servers.conftest import COMMANDS, GUNICORN, read, run_server, start, stop

served, server, upstream = serving.served, serving.server, serving.upstream
asgi_server, wsgi_server = serving.asgi_server, serving.wsgi_server

CHAT = "/v1/chat/completions"


def states(client: httpx.Client, path: str, **fields: object) -> list[str]:
    """Ask twice; both answers are the same."""
    answers = [client.post(path, json=chat(**fields)) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    assert answers[0].content == answers[1].content
    return [answer.headers["x-llm-cache"] for answer in answers]


# Below a prefix -----------------------------------------------------------------------------------


def at(*prefixes: str):
    """A host with nothing but apps at these prefixes."""

    def mount(*apps):
        if isinstance(apps[0], Starlette):
            return Starlette(routes=[Mount(prefix, app) for prefix, app in zip(prefixes, apps, strict=True)])
        return DispatcherMiddleware(not_here, dict(zip(prefixes, apps, strict=True)))

    return mount


def not_here(environ, start_response):
    start_response("404 Not Found", [("content-type", "text/plain")])
    return [b"not here"]


@pytest.mark.parametrize("prefix", ["/llm", "/deep/er", "/v1", "/engines"])
def test_below_a_prefix(served, upstream, prefix):
    client = served(mount=at(prefix))
    assert states(client, f"{prefix}{CHAT}") == ["miss", "hit"]
    assert states(client, f"{prefix}/chat/completions") == ["hit", "hit"]
    in_path = f"{prefix}/engines/{SLASHES}/chat/completions"
    assert states(client, in_path) == ["miss", "hit"]
    assert [each["id"] for each in client.get(f"{prefix}/v1/models").json()["data"]] == ["m", SLASHES]
    assert client.get(f"{prefix}/health").json() == {"status": "ok"}
    for path in (prefix, f"{prefix}/", f"{prefix}{prefix}/v1/models"):
        lost = client.get(path, follow_redirects=True)
        assert lost.status_code == 404
    assert client.get("/v1/models" if prefix != "/v1" else "/health").status_code == 404
    assert upstream.count == 2


def test_a_mount_in_a_mount(asgi_server, upstream):
    app = asgi_server.sub_app(serving.config(upstream))
    asgi_server.app = Starlette(routes=[Mount("/a", routes=[Mount("/b", app)])])
    with serving.Client(asgi_server.url, "asgi", app.core) as client:
        assert states(client, f"/a/b{CHAT}") == ["miss", "hit"]
        assert states(client, f"/a/b/engines/{SLASHES}/chat/completions") == ["miss", "hit"]
        assert client.get(f"/a/b/models/{SLASHES}").json()["id"] == SLASHES


@pytest.mark.parametrize("mounted", [False, True])
def test_uvicorn_with_a_root_path(upstream, mounted):
    app = serving.asgi_app(serving.config(upstream))
    host, prefix = (Starlette(routes=[Mount("/llm", app)]), "/llm") if mounted else (app, "")
    server = serving.AsgiServer(host, root_path="/behind/proxy")
    with serving.Client(server.url, "asgi", app.core) as client:
        assert states(client, f"{prefix}{CHAT}") == ["miss", "hit"]
        assert states(client, f"{prefix}/engines/{SLASHES}/chat/completions") == ["miss", "hit"]
        assert client.get(f"{prefix}/models").status_code == 200
    server.close(app)
    server.stop()


def test_two_sub_apps_of_one_host_are_independent(served, server, upstream):
    first = server.sub_app(serving.config(upstream))
    second = server.sub_app(
        serving.config(upstream, models=[serving.model("m", upstream, model="openai/else")], cache=None)
    )
    server.app = at("/one", "/two")(first, second)
    with serving.Client(server.url, server.front, None) as client:
        assert states(client, f"/one{CHAT}") == ["miss", "hit"]
        other = client.post(f"/two{CHAT}", json=chat())
        assert other.headers["x-llm-cache"] == "bypass"
        assert [call.json["model"] for call in upstream.calls] == ["m-up", "else"]
        listed = [client.get(f"{prefix}/models").json()["data"] for prefix in ("/one", "/two")]
        assert [[model["id"] for model in models] for models in listed] == [["m", SLASHES], ["m"]]
    server.close(second)
    with serving.Client(server.url, server.front, None) as client:
        assert states(client, f"/one{CHAT}") == ["hit", "hit"]
    server.close(first)


def test_authorize_sees_the_path_below_the_prefix(served):
    seen = []

    def authorize(head):
        seen.append((head.method, head.path, head.query))
        raise PermissionError("the host's own affair")

    client = served(mount=at("/llm"), options={"authorize": authorize})
    for answer in (client.post(f"/llm{CHAT}?a=b", json=chat()), client.get("/llm/models")):
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
        assert "affair" not in answer.text
    assert seen == [("POST", CHAT, "a=b"), ("GET", "/models", "")]


def test_an_app_that_was_closed_can_be_used_again(served, server, upstream):
    client = served()
    app = server.app
    assert client.chat("a").status_code == 200
    server.close(app)
    serving.until(lambda: serving.nobody_is_connected(upstream), "the connections are closed")
    assert client.chat("b").status_code == 200
    server.close(app)


# FastAPI, Starlette -------------------------------------------------------------------------------


class Item(BaseModel):
    name: str


def test_fastapi(upstream):
    app = serving.asgi_app(serving.config(upstream))
    seen = []

    @contextlib.asynccontextmanager
    async def lifespan(host):
        seen.append("up")
        yield
        await app.aclose()
        seen.append("down")

    host = FastAPI(lifespan=lifespan)
    host.mount("/llm", app)

    @host.post("/v1/items")
    async def items(item: Item) -> Item:
        return item

    server = serving.AsgiServer(host, lifespan="on")
    with serving.Client(server.url, "asgi", app.core) as client:
        assert states(client, f"/llm{CHAT}") == ["miss", "hit"]
        assert states(client, f"/llm{CHAT}", text="streamed", stream=True) == ["miss", "hit"]
        # The host's own routes and document are what they were.
        assert client.post("/v1/items", json={"name": "a"}).json() == {"name": "a"}
        assert client.post("/v1/items", json={}).status_code == 422
        assert "x-llm-cache" not in client.post("/v1/items", json={}).headers
        assert list(client.get("/openapi.json").json()["paths"]) == ["/v1/items"]
        assert client.get("/docs").status_code == 200
        assert CHAT in client.get("/llm/openapi.json").json()["paths"]
        assert seen == ["up"]
        assert not serving.nobody_is_connected(upstream)
    server.stop()
    assert seen == ["up", "down"]
    serving.until(lambda: serving.nobody_is_connected(upstream), "the connections are closed")


def test_the_lifespan_of_an_app_by_itself_closes_its_connections(upstream):
    app = serving.asgi_app(serving.config(upstream))
    server = serving.AsgiServer(app, lifespan="on")
    with serving.Client(server.url, "asgi", app.core) as client:
        assert states(client, CHAT) == ["miss", "hit"]
    assert not serving.nobody_is_connected(upstream)
    server.stop()
    serving.until(lambda: serving.nobody_is_connected(upstream), "the connections are closed")


def test_a_server_that_stops_in_the_middle_of_a_stream_ends_the_call(upstream):
    app = serving.asgi_app(serving.config(upstream))
    server = serving.AsgiServer(app, lifespan="on", timeout_graceful_shutdown=1)
    upstream.hold(after_events=3)
    leaving = serving.Leaving(server.url, CHAT, chat(stream=True))
    leaving.read_until(b"data: ")
    server.stop()
    serving.until(lambda: serving.nobody_is_connected(upstream), "the connections are closed")
    assert serving.in_flight(app.core) == 0
    leaving.leave()


async def tagged(request, call_next):
    response = await call_next(request)
    response.headers["x-host"] = "was here"
    return response


MIDDLEWARE = [
    Middleware(
        CORSMiddleware, allow_origins=["https://app.example"], allow_methods=["*"], allow_headers=["*"]
    ),
    Middleware(GZipMiddleware, minimum_size=100),
    Middleware(BaseHTTPMiddleware, dispatch=tagged),
]


@pytest.fixture
def behind_middleware(asgi_server, upstream) -> Iterator[serving.Client]:
    app = asgi_server.sub_app(serving.config(upstream))
    asgi_server.app = Starlette(routes=[Mount("/llm", app)], middleware=MIDDLEWARE)
    with serving.Client(asgi_server.url, "asgi", app.core) as client:
        yield client
        upstream.release()
    asgi_server.close(app)


def test_behind_the_hosts_middleware(behind_middleware, upstream):
    client = behind_middleware
    origin = {"origin": "https://app.example"}
    answers = [client.post(f"/llm{CHAT}", json=chat(), headers=origin) for _ in range(2)]
    assert [answer.headers["x-llm-cache"] for answer in answers] == ["miss", "hit"]
    assert answers[0].json() == answers[1].json()
    for answer in answers:
        assert answer.headers["x-host"] == "was here"
        assert answer.headers["content-encoding"] == "gzip"
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert states(client, f"/llm{CHAT}", text="streamed", stream=True) == ["miss", "hit"]
    asked = {
        **origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    preflight = client.options(f"/llm{CHAT}", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-headers"] == "authorization"
    refused = client.post(f"/llm{CHAT}", content=b"{", headers=origin)
    assert refused.status_code == 400
    assert refused.headers["access-control-allow-origin"] == "https://app.example"
    assert upstream.count == 2


def test_the_hosts_middleware_holds_no_event_back(behind_middleware, upstream):
    upstream.hold(after_events=3)
    with behind_middleware.stream("POST", f"/llm{CHAT}", json=chat(stream=True)) as answer:
        chunks = answer.iter_raw()
        got = b""
        while got.count(b"\n\n") < 3:
            got += next(chunks)
        upstream.release()
        got += b"".join(chunks)
    assert got.endswith(b"data: [DONE]\n\n")


def test_r53_a_client_that_leaves_a_host_with_middleware(behind_middleware, upstream):
    upstream.hold(after_events=3)
    leaving = serving.Leaving(behind_middleware.url, f"/llm{CHAT}", chat(stream=True))
    leaving.read_until(b"data: ")
    leaving.leave()
    took = serving.until(lambda: upstream.disconnected == 1, "the upstream's connection is closed")
    took += serving.until(lambda: serving.in_flight(behind_middleware.core) == 0, "the call is over")
    assert took < 1.0


# Flask --------------------------------------------------------------------------------------------


def test_flask(wsgi_server, upstream):
    host = flask.Flask(__name__)

    @host.post("/v1/items")
    def items():
        return flask.jsonify(flask.request.get_json())

    sub_app = serving.wsgi_app(serving.config(upstream))
    host.wsgi_app = DispatcherMiddleware(host.wsgi_app, {"/llm": sub_app})
    wsgi_server.app = host
    with serving.Client(wsgi_server.url, "wsgi", sub_app.core) as client:
        assert states(client, f"/llm{CHAT}") == ["miss", "hit"]
        assert states(client, f"/llm{CHAT}", text="streamed", stream=True) == ["miss", "hit"]
        assert client.post("/v1/items", json={"name": "a"}).json() == {"name": "a"}
        assert client.get("/llm/nowhere").json()["error"]["code"] == "not_found"
        assert client.get("/nowhere").headers["content-type"] == "text/html; charset=utf-8"
    test = host.test_client()
    assert test.post(f"/llm{CHAT}", json=chat()).headers["x-llm-cache"] == "hit"
    sub_app.close()


# Servers ------------------------------------------------------------------------------------------

ROOT_PATH = "hypercorn --bind 127.0.0.1:{port} --graceful-timeout 1 --root-path /behind {app}"
ONE = GUNICORN.replace("--workers 1 ", "")
SERVERS = {
    "uvicorn": ("uvicorn", "asgi", COMMANDS["uvicorn"]),
    "hypercorn": ("hypercorn", "asgi", ROOT_PATH),
    "daphne": ("daphne", "asgi", COMMANDS["daphne"]),
    "granian-asgi": ("granian-asgi", "asgi", COMMANDS["granian-asgi"]),
    "granian-wsgi": ("granian-wsgi", "wsgi", COMMANDS["granian-wsgi"]),
    "gunicorn-sync": ("gunicorn-sync", "wsgi", COMMANDS["gunicorn-sync"]),
    "gunicorn-gthread": ("gunicorn-gthread", "wsgi", COMMANDS["gunicorn-gthread"]),
    "gunicorn-gevent": ("gunicorn-gevent", "wsgi", COMMANDS["gunicorn-gevent"]),
    "django-asgi": ("uvicorn", "django_asgi", COMMANDS["uvicorn"]),
    "django-wsgi": ("gunicorn-gthread", "django_wsgi", COMMANDS["gunicorn-gthread"]),
}
PRELOADED = f"{ONE} --workers 2 --preload --worker-class sync {{app}}"


@contextlib.contextmanager
def running(command: str, app: str, upstream, tmp_path: Path, monkeypatch) -> Iterator[serving.Client]:
    """A client of a server that runs ``app`` of `hosts`; at the end it is asked to stop, and does."""
    monkeypatch.setitem(COMMANDS, "this", command)
    with (tmp_path / "log").open("w+") as log:
        env = {"FAKE_UPSTREAM_URL": upstream.url}
        process, port = start("this", f"tests.api.hosts:{app}", env, log.fileno())
        try:
            with serving.Client(f"http://127.0.0.1:{port}", app, None) as client:
                yield client
                process.terminate()
                process.wait(serving.PATIENCE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the server did not stop: {read(log.fileno())}")
        finally:
            stop(process)
        assert "Traceback" not in read(log.fileno())


@pytest.mark.parametrize("name", SERVERS)
def test_servers(upstream, tmp_path, monkeypatch, name):
    _, app, command = SERVERS[name]
    with running(command, app, upstream, tmp_path, monkeypatch) as client:
        assert int(client.get("/pid").text) > 0
        assert states(client, f"/llm{CHAT}") == ["miss", "hit"]
        assert states(client, f"/llm{CHAT}", text="streamed", stream=True) == ["miss", "hit"]
        assert client.get("/llm/v1/models").json()["data"][0]["id"] == "m"
        assert client.post(f"/llm{CHAT}", content=b"{").json()["error"]["code"] == "invalid_request"
        if name == "gunicorn-sync":  # one at a time
            return
        upstream.hold()
        answers = client.together(4, lambda: client.post(f"/llm{CHAT}", json=chat("together")))
        upstream.wait_for(3)
        upstream.release()
        assert {answer.status_code for answer in answers()} == {200}
        assert upstream.count == 3
        if name.startswith("django"):
            assert client.get("/healthz").json() == {"status": "ok"}


def test_workers_forked_from_an_app_in_use_have_connections_of_their_own(upstream, tmp_path, monkeypatch):
    """gunicorn --preload: the app has made calls before its workers are there."""
    upstream.latency = 0.02
    with running(PRELOADED, "wsgi_preloaded", upstream, tmp_path, monkeypatch) as client:
        assert upstream.count == 2

        def ask(number: int) -> tuple[str, str]:
            text = f"number {number}."
            answer = client.post(f"/llm{CHAT}", json=chat(text, stream=number % 2 == 0))
            assert answer.status_code == 200
            return text, answer.text

        with ThreadPoolExecutor(4) as pool:
            asked = list(pool.map(ask, range(40)))
            pids = set(pool.map(lambda _: client.get("/pid").text, range(40)))
        for text, answer in asked:
            whole = answer if answer.startswith("{") else serving.text_of(answer.encode())
            assert f"You said: {text}" in whole
        assert len(pids) == 2
        assert upstream.count == 42


# The examples -------------------------------------------------------------------------------------

EXAMPLES = {
    "fastapi": ("uvicorn", "examples.fastapi_app.main:app"),
    "flask": ("gunicorn-sync", "examples.flask_app.main:app"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_with_no_environment(name, monkeypatch):
    for variable in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "LLM_MIDDLEWARE_CONFIG", "FAKE_UPSTREAM_URL"):
        monkeypatch.delenv(variable, raising=False)
    with run_server(*EXAMPLES[name], {}) as url, serving.Client(url, name, None) as client:
        assert states(client, f"/llm{CHAT}", model="gpt-4o-mini") == ["miss", "hit"]
        answer = client.post(f"/llm{CHAT}", json=chat(model="gpt-4o-mini"))
        assert answer.json()["choices"][0]["message"]["content"].startswith("You said: hi")
        listed = {model["id"] for model in client.get("/llm/v1/models").json()["data"]}
        assert listed == {"gpt-4o-mini", "text-embedding-3-small", "whisper-1"}
        assert client.get("/healthz").json() == {"status": "ok"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_with_another_configuration(upstream, tmp_path, name):
    file = tmp_path / "other.yaml"
    file.write_text(
        "models: [{model_name: mine, litellm_params: {model: openai/mine-up, api_key: sk-x,"
        f" api_base: '{upstream.url}'}}}}]\ncache: false\n"
    )
    env = {"OPENAI_BASE_URL": upstream.url, "LLM_MIDDLEWARE_CONFIG": str(file)}
    with run_server(*EXAMPLES[name], env) as url, serving.Client(url, name, None) as client:
        assert [each["id"] for each in client.get("/llm/models").json()["data"]] == ["mine"]
        answer = client.post(f"/llm{CHAT}", json=chat(model="mine"))
        assert answer.headers["x-llm-cache"] == "bypass"
        assert upstream.calls[0].json["model"] == "mine-up"
        asked = [client.post("/ask", json={"question": "why?"}) for _ in range(2)]
        assert [each.headers["x-llm-cache"] for each in asked] == ["miss", "hit"]
        assert asked[1].json()["answer"].startswith("You said: why?")
        assert upstream.count == 2
