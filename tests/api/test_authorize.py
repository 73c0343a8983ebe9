"""The host's own login as ``authorize=``: neutral functions, FastAPI, Flask and Django."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import fastapi
import flask
import pytest
from fastapi import Depends, Header, HTTPException, Request, Security
from fastapi.responses import JSONResponse
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from llm_middleware.api.message import Head
from llm_middleware.asgi import llm_app as asgi_app
from llm_middleware.errors import ConfigError, InvalidKeyError
from llm_middleware.keys.record import KeyRecord
from llm_middleware.keys.resolver import KeyResolver
from llm_middleware.wsgi import in_flask
from llm_middleware.wsgi import llm_app as wsgi_app
from tests.api import serving
from tests.api.serving import CHAT, chat, refused

served, server, upstream = serving.served, serving.server, serving.upstream
asgi_server, wsgi_server = serving.asgi_server, serving.wsgi_server

ROOT = Path(__file__).parents[2]
UNKNOWN = (401, "invalid_api_key", None)
ANN = KeyRecord(id="ann", user="ann", team="red")


def by_user(**fields: Any) -> Any:
    """Whoever says who it is, with these rights."""

    def authorize(head):
        user = head.header("x-user")
        return KeyRecord(id=user, user=user, **fields) if user else None

    return authorize


def as_user(name: str, **more: str) -> dict[str, str]:
    return {"x-user": name, **more}


@pytest.fixture
def ask(served):
    """``ask(authorize)``: a client of a sub-app with the host's login."""
    return lambda authorize, **sections: served(options={"authorize": authorize}, **sections)


# Functions of the neutral request -------------------------------------------------------------------


def test_a_function_says_who_calls(ask, upstream):
    seen = []

    def authorize(head):
        seen.append((head.method, head.path, head.params, head.bearer, type(head.native)))
        return ANN if head.bearer == "mine" else None

    client = ask(authorize)
    answer = client.post(f"{CHAT}?a=b", json=chat(), headers={"authorization": "Bearer mine"})
    assert answer.status_code == 200
    assert refused(client.chat(headers={"authorization": "Bearer else"})) == UNKNOWN
    assert refused(client.get("/v1/models")) == UNKNOWN
    assert client.get("/v1/models", headers={"x-api-key": "mine"}).status_code == 200
    assert client.get("/health").status_code == 200
    assert upstream.count == 1
    assert seen[0] == ("POST", CHAT, {"a": "b"}, "mine", dict)
    assert len(seen) == 4


def test_an_async_function_says_who_calls(ask):
    """Under WSGI too, as long as it waits for nothing."""

    async def authorize(head: Head) -> KeyRecord | None:
        return ANN if head.header("x-user") else None

    client = ask(authorize)
    assert client.chat(headers=as_user("ann")).status_code == 200
    assert refused(client.chat()) == UNKNOWN


class Object:
    def __call__(self, head: Head) -> KeyRecord:
        return ANN

    def method(self, request) -> KeyRecord:
        return ANN


def two(first: str, head: Head) -> KeyRecord:
    return ANN


@pytest.mark.parametrize(
    "authorize",
    [Object(), Object().method, partial(two, "bound"), lambda anything: ANN],
    ids=["object", "method", "partial", "lambda"],
)
def test_functions_of_every_kind(ask, authorize):
    assert ask(authorize).chat().status_code == 200


@pytest.mark.parametrize("value", [None, False, True, "ann", {"id": "ann"}, object(), 5])
def test_what_is_no_record_refuses(ask, upstream, value):
    client = ask(lambda head: value)
    assert refused(client.chat()) == UNKNOWN
    assert refused(client.get("/cache/stats")) == UNKNOWN
    assert upstream.count == 0


def test_what_a_function_raises(ask, upstream):
    def authorize(head):
        if head.header("x-user") == "late":
            raise InvalidKeyError("log in again")
        raise LookupError("the host's own affair")

    client = ask(authorize)
    late = client.chat(headers=as_user("late"))
    assert refused(late) == UNKNOWN
    assert late.json()["error"]["message"] == "log in again"
    broken = client.chat()
    assert refused(broken) == (500, "internal_error", None)
    assert "affair" not in broken.text
    assert upstream.count == 0


@pytest.mark.parametrize("app", [asgi_app, wsgi_app], ids=["asgi", "wsgi"])
def test_what_is_no_function(upstream, app):
    with pytest.raises(ConfigError, match="authorize: expected a function") as caught:
        app(serving.config(upstream), authorize=5)
    assert caught.value.param == "authorize"


def test_a_record_that_is_blocked_or_over_is_refused(ask, upstream):
    records = {
        "blocked": KeyRecord(id="a", blocked=True),
        "over": KeyRecord(id="b", expires=time.time() - 1),
        "good": KeyRecord(id="c", expires=time.time() + 60),
    }
    client = ask(lambda head: records[head.header("x-user")])
    found = {name: client.chat(headers=as_user(name)).status_code for name in records}
    assert found == {"blocked": 403, "over": 401, "good": 200}


# What a record allows -------------------------------------------------------------------------------


def test_models_of_a_record(ask, upstream):
    client = ask(by_user(models=("m",), aliases={"mine": "m"}))
    headers = as_user("ann")
    assert client.chat(headers=headers).status_code == 200
    assert client.chat("else", model="mine", headers=headers).status_code == 200
    assert refused(client.chat(model=serving.SLASHES, headers=headers)) == (403, "key_not_allowed", "model")
    assert [each["id"] for each in client.get("/v1/models", headers=headers).json()["data"]] == ["m"]
    assert upstream.count == 2


def test_cache_controls_of_a_record(ask, upstream):
    """What the record says holds whatever the caller says; what it does not allow is refused."""
    client = ask(by_user(cache={"no-store": True}, allowed_cache_controls=frozenset({"ttl"})))
    headers = as_user("ann")
    states = [client.chat(headers=headers, cache={"ttl": 60}).headers["x-llm-cache"] for _ in range(2)]
    assert states == ["miss", "miss"]
    assert refused(client.chat(headers=headers, cache={"no-cache": True}))[:2] == (403, "key_not_allowed")
    assert upstream.count == 2


def test_limits_of_a_record_hold_without_keys(ask, upstream):
    client = ask(by_user(rpm_limit=2))
    answers = [client.chat(f"{place}", headers=as_user("ann")) for place in range(3)]
    assert [each.status_code for each in answers] == [200, 200, 429]
    assert 0 < int(answers[2].headers["retry-after"]) <= 60
    assert client.chat(headers=as_user("bob")).status_code == 200
    assert upstream.count == 3


def test_other_limits_of_a_record(ask, upstream):
    client = ask(by_user(max_parallel_requests=1))
    upstream.hold()
    first = client.together(1, lambda: client.chat("one", headers=as_user("ann")))
    upstream.wait_for(1)
    assert refused(client.chat("two", headers=as_user("ann")))[:2] == (429, "rate_limit_exceeded")
    upstream.release()
    assert first()[0].status_code == 200
    assert client.chat("three", headers=as_user("ann")).status_code == 200


def test_limits_are_counted_by_the_keys_that_are_given(served, upstream):
    """Where several processes share a store of keys, they share what is counted of ``authorize``, too."""
    keys = KeyResolver()
    clients = [
        served(options={"authorize": by_user(rpm_limit=2), "keys": keys}, cache=None) for _ in range(2)
    ]
    assert clients[0].core.gate.limits is keys
    answers = [clients[-1].chat(headers=as_user("ann")) for _ in range(3)]
    assert [each.status_code for each in answers] == [200, 200, 429]


@pytest.mark.parametrize(
    ("share", "states"),
    [
        ("all", ["miss", "hit", "hit", "hit"]),
        ("team", ["miss", "hit", "miss", "miss"]),
        ("user", ["miss", "miss", "miss", "miss"]),
        ("key", ["miss", "miss", "miss", "miss"]),
    ],
)
def test_whose_answers_are_shared(ask, share, states):
    teams = {"ann": "red", "bob": "red", "cid": "blue", "dan": None}

    def authorize(head):
        user = head.header("x-user")
        return KeyRecord(id=user, user=user, team=teams[user])

    client = ask(authorize, keys={"share": share})
    assert [client.chat(headers=as_user(user)).headers["x-llm-cache"] for user in teams] == states
    again = [client.chat(headers=as_user(user)).headers["x-llm-cache"] for user in teams]
    assert again == ["hit"] * 4


def test_credentials_do_not_part_those_whom_the_host_knows(ask):
    """Two sessions of one user are one user."""
    client = ask(by_user())
    answers = [client.chat(headers=as_user("ann", cookie=f"session={place}")) for place in range(2)]
    assert [each.headers["x-llm-cache"] for each in answers] == ["miss", "hit"]


def test_an_admin_of_the_hosts(ask):
    def authorize(head):
        user = head.header("x-user")
        return KeyRecord(id=user, user=user, alias=user, admin=user == "root")

    client = ask(authorize)
    assert client.get("/cache/stats", headers=as_user("root")).status_code == 200
    assert refused(client.get("/cache/stats", headers=as_user("ann"))) == (403, "admin_only", None)
    own = client.get("/key/info", headers=as_user("ann")).json()
    assert (own["key"], own["info"]["key_alias"]) == ("ann", "ann")
    missing = client.post("/key/generate", json={}, headers=as_user("root"))
    assert refused(missing) == (404, "keys_not_configured", None)


# FastAPI dependencies -------------------------------------------------------------------------------


BEARER = HTTPBearer()
TOKEN = APIKeyHeader(name="x-user")


def plain(x_user: Annotated[str, Header()]) -> KeyRecord:
    return KeyRecord(id=x_user)


def old_style(x_user: str = Header()) -> KeyRecord:
    return KeyRecord(id=x_user)


async def nested(found: Annotated[KeyRecord, Depends(plain)]) -> KeyRecord:
    return found


def secured(token: Annotated[str, Security(TOKEN)]) -> KeyRecord:
    return KeyRecord(id=token)


def of_the_request(request: Request) -> KeyRecord | None:
    user = request.headers.get("x-user")
    return KeyRecord(id=user) if user else None


LEFT: list[str] = []


async def with_clean_up(x_user: Annotated[str, Header()]):
    try:
        yield KeyRecord(id=x_user)
    finally:
        LEFT.append(x_user)


class Login:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, request: Request) -> KeyRecord | None:
        user = request.headers.get(self.name)
        return KeyRecord(id=user) if user else None


class Session:
    def __init__(self, x_user: Annotated[str, Header()]) -> None:
        self.user = x_user


def of_a_class(session: Annotated[Session, Depends()]) -> KeyRecord:
    return KeyRecord(id=session.user)


def of_anything(user: Annotated[Any, Depends(TOKEN)]) -> KeyRecord:
    return KeyRecord(id=user)


DEPENDENCIES = {
    "class": of_a_class,
    "Any": of_anything,
    "Header": plain,
    "default": old_style,
    "nested": nested,
    "Security": secured,
    "Request": of_the_request,
    "yield": with_clean_up,
    "object": Login("x-user"),
    "method": Login("x-user").__call__,
}


@pytest.fixture
def mounted(asgi_server, upstream):
    """``mounted(authorize)``: a client of a FastAPI host with the sub-app at ``/llm``."""
    made = []

    def make(authorize, host=None, **sections):
        app = asgi_app(serving.config(upstream, **sections), authorize=authorize)
        host = host or fastapi.FastAPI()
        host.mount("/llm", app)
        asgi_server.app = host
        client = serving.Client(f"{asgi_server.url}/llm", "asgi", app.core)
        made.append((app, client))
        return client

    yield make
    for app, client in made:
        client.close()
        asgi_server.close(app)


@pytest.mark.parametrize("name", DEPENDENCIES)
def test_dependencies_of_every_kind(mounted, upstream, name):
    client = mounted(DEPENDENCIES[name])
    LEFT.clear()
    assert refused(client.chat()) == UNKNOWN
    answers = [client.chat(headers=as_user(user)) for user in ("ann", "ann", "bob")]
    assert [each.headers["x-llm-cache"] for each in answers] == ["miss", "hit", "miss"]
    assert client.get("/v1/models", headers=as_user("ann")).status_code == 200
    assert client.head("/v1/models", headers=as_user("ann")).status_code == 200
    assert upstream.count == 2
    if name == "yield":
        assert LEFT == ["ann", "ann", "bob", "ann", "ann"]


def test_a_bearer_token_of_fastapis(mounted):
    def login(sent: Annotated[Any, Depends(HTTPBearer())]) -> KeyRecord | None:
        return ANN if sent.credentials == "mine" else None

    client = mounted(login)
    assert refused(client.chat()) == UNKNOWN
    assert refused(client.chat(headers={"authorization": "Basic mine"})) == UNKNOWN
    assert refused(client.chat(headers={"authorization": "Bearer else"})) == UNKNOWN
    assert client.chat(headers={"authorization": "Bearer mine"}).status_code == 200


@pytest.mark.parametrize(
    ("status", "detail", "expected", "message"),
    [
        (401, "log in", UNKNOWN, "log in"),
        (403, "not yours", (403, "key_not_allowed", None), "not yours"),
        (403, {"not": "a string"}, (403, "key_not_allowed", None), "the request is not authorized"),
        (404, "who?", UNKNOWN, "who?"),
        (429, "slower", (429, "rate_limit_exceeded", None), "slower"),
        (503, "no database", (503, "not_authorized", None), "no database"),
    ],
)
def test_what_a_dependency_raises(mounted, upstream, status, detail, expected, message):
    def login() -> KeyRecord:
        raise HTTPException(status, detail)

    client = mounted(login)
    for answer in (client.chat(), client.get("/v1/models")):
        assert refused(answer) == expected
        assert answer.json()["error"]["message"] == message
    assert upstream.count == 0


def test_a_dependency_that_breaks(mounted, upstream):
    def login() -> KeyRecord:
        raise LookupError("the host's own affair")

    answer = mounted(login).chat()
    assert refused(answer) == (500, "internal_error", None)
    assert "affair" not in answer.text
    assert upstream.count == 0


@pytest.mark.parametrize("value", [None, False, "ann", {"id": "ann"}])
def test_a_dependency_that_gives_no_record_refuses(mounted, value):
    assert refused(mounted(lambda: value).chat()) == UNKNOWN


def test_a_dependency_sees_the_hosts_request(mounted):
    """The host's app and what its middleware left, the path as it came, and no body."""
    seen = []

    async def login(request: Request) -> KeyRecord:
        session = request.session
        seen.append((request.method, request.url.path, request.query_params["a"], request.app.state.name))
        return KeyRecord(id=session.get("user", "nobody"))

    host = fastapi.FastAPI(middleware=[Middleware(SessionMiddleware, secret_key="s")])
    host.state.name = "the host"

    @host.get("/login/{user}")
    def log_in(request: Request, user: str) -> str:
        request.session["user"] = user
        return user

    client = mounted(login, host)
    assert client.post(f"{CHAT}?a=1", json=chat()).headers["x-llm-cache"] == "miss"
    assert seen == [("POST", f"/llm{CHAT}", "1", "the host")]
    url = str(client.base_url).removesuffix("/llm/")
    client.get(f"{url}/login/ann")
    assert client.post(f"{CHAT}?a=1", json=chat()).headers["x-llm-cache"] == "miss"
    assert client.post(f"{CHAT}?a=1", json=chat()).headers["x-llm-cache"] == "hit"


def test_overrides_and_error_handlers_of_the_host_hold(mounted):
    class NotLoggedInError(Exception):
        pass

    def login() -> KeyRecord:
        raise NotLoggedInError

    host = fastapi.FastAPI()

    @host.exception_handler(NotLoggedInError)
    def not_logged_in(request: Request, error: NotLoggedInError) -> JSONResponse:
        return JSONResponse({"detail": "log in"}, 401)

    client = mounted(login, host)
    answer = client.chat()
    assert refused(answer) == UNKNOWN
    assert answer.json()["error"]["message"] == "log in"
    host.dependency_overrides[login] = lambda: ANN
    assert client.chat().status_code == 200


# Flask's request ------------------------------------------------------------------------------------


def flask_host() -> flask.Flask:
    """With a session in a signed cookie, as flask-login has it: the user is loaded into ``g``."""
    app = flask.Flask(__name__)
    app.secret_key = "secret"

    @app.get("/login/<user>")
    def log_in(user: str) -> str:
        flask.session["_user_id"] = user
        return user

    return app


def current_user() -> KeyRecord | None:
    if "user" not in flask.g:
        flask.g.user = flask.session.get("_user_id")
    if flask.g.user == "banned":
        flask.abort(403, "not you")
    return None if flask.g.user is None else KeyRecord(id=flask.g.user, user=flask.g.user)


@pytest.fixture
def in_host(wsgi_server, upstream):
    """``in_host(function)``: a client of a Flask host whose own login is ``function``."""
    made = []

    def make(function, host=None):
        host = host or flask_host()
        app = wsgi_app(serving.config(upstream), authorize=in_flask(host, function))
        wsgi_server.app = DispatcherMiddleware(host, {"/llm": app})
        client = serving.Client(f"{wsgi_server.url}/llm", "wsgi", app.core)
        made.append((app, client))
        return client

    yield make
    for app, client in made:
        client.close()
        app.close()


def log_in(client: serving.Client, user: str) -> None:
    client.get(f"{str(client.base_url).removesuffix('/llm/')}/login/{user}")


def test_a_session_of_flasks(in_host, upstream):
    client = in_host(current_user)
    assert refused(client.chat()) == UNKNOWN
    log_in(client, "ann")
    states = [client.chat(stream=stream).headers["x-llm-cache"] for stream in (False, False, True, True)]
    assert states == ["miss", "hit", "hit", "hit"]
    log_in(client, "bob")
    assert client.chat().headers["x-llm-cache"] == "miss"
    log_in(client, "banned")
    answer = client.chat()
    assert refused(answer) == (403, "key_not_allowed", None)
    assert answer.json()["error"]["message"] == "not you"
    assert upstream.count == 2


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (401, UNKNOWN),
        (403, (403, "key_not_allowed", None)),
        (404, UNKNOWN),
        (429, (429, "rate_limit_exceeded", None)),
        (503, (503, "not_authorized", None)),
    ],
)
def test_what_flask_aborts_with(in_host, upstream, status, expected):
    client = in_host(lambda: flask.abort(status))
    for answer in (client.chat(), client.get("/v1/models")):
        assert refused(answer) == expected
    assert upstream.count == 0


@pytest.mark.parametrize(
    "given",
    [None, False, "ann", flask.Response("log in", 302)],
    ids=["nothing", "false", "text", "redirect"],
)
def test_what_flask_gives_that_is_no_record_refuses(in_host, given):
    assert refused(in_host(lambda: given).chat()) == UNKNOWN


def test_a_function_that_breaks_in_flask(in_host):
    answer = in_host(lambda: {}["the host's own affair"]).chat()
    assert refused(answer) == (500, "internal_error", None)
    assert "affair" not in answer.text


def test_flasks_request_is_the_clients_without_its_body(in_host, upstream):
    """What reads the body must not take it from the request itself."""
    seen = []

    def function() -> KeyRecord:
        request = flask.request
        seen.append(
            (request.method, request.script_root, request.path, request.args["a"], request.get_data())
        )
        return ANN

    assert in_host(function).post(f"{CHAT}?a=1", json=chat("the body")).status_code == 200
    assert seen == [("POST", "/llm", CHAT, "1", b"")]
    assert upstream.calls[0].json["messages"] == [{"role": "user", "content": "the body"}]


def test_an_async_function_in_flask(in_host):
    async def function() -> KeyRecord | None:
        user = flask.request.headers.get("x-user")
        return KeyRecord(id=user) if user else None

    client = in_host(function)
    assert refused(client.chat()) == UNKNOWN
    assert client.chat(headers=as_user("ann")).status_code == 200


# Django's request -----------------------------------------------------------------------------------


def test_a_user_of_djangos():
    """As docs/keys.md has it, in a process of its own: Django's settings are the process's."""
    code = DJANGO.replace("# authorize", documented())
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert done.stdout.split() == ["401", "miss", "hit"], done.stderr


def documented() -> str:
    text = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
    (block,) = [each for each in text.split("```python\n")[1:] if "WSGIRequest" in each]
    return block.partition("```")[0]


DJANGO = """
import sys
import types

import django
import httpx
from django.conf import settings

settings.configure(
    SECRET_KEY="secret",
    ALLOWED_HOSTS=["*"],
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions"],
    SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    MIDDLEWARE=[
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
    ],
    ROOT_URLCONF="urls",
)
django.setup()

from django.contrib.auth import get_user_model, login
from django.core.management import call_command
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.urls import path
from werkzeug.middleware.dispatcher import DispatcherMiddleware

call_command("migrate", verbosity=0)
ann = get_user_model().objects.create_user("ann")


def log_in(request):
    login(request, ann)
    return HttpResponse("")


urls = sys.modules["urls"] = types.ModuleType("urls")
urls.urlpatterns = [path("login", log_in)]

# authorize

from llm_middleware.testing import FakeUpstream
from llm_middleware.wsgi import llm_app

upstream = FakeUpstream().start()
params = {"model": "openai/m", "api_base": upstream.url, "api_key": "sk-x"}
config = {"models": [{"model_name": "m", "litellm_params": params}], "cache": {"type": "local"}}
app = DispatcherMiddleware(get_wsgi_application(), {"/llm": llm_app(config, authorize=current_user)})
body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
with httpx.Client(transport=httpx.WSGITransport(app), base_url="http://host") as client:
    print(client.post("/llm/v1/chat/completions", json=body).status_code)
    client.get("/login")
    for _ in range(2):
        print(client.post("/llm/v1/chat/completions", json=body).headers["x-llm-cache"])
upstream.stop()
"""
