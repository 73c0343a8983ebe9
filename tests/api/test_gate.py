"""What the gate knows at once of who calls, and that it knows it no longer than the resolver does."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from llm_middleware.api.gate import Caller, Gate
from llm_middleware.api.message import key_in
from llm_middleware.keys.record import KeyRecord
from llm_middleware.keys.resolver import KeyResolver
from llm_middleware.testing import FakeClock, FakeUpstream
from tests.api.clients import CHAT, MASTER, AsgiClient, WsgiClient, chat, config

Pairs = list[tuple[bytes, bytes]]


class Keys:
    """A resolver with a gate in front. ``ttl``: as long as any test."""

    def __init__(self, **options: Any) -> None:
        self.clock = FakeClock()
        self.resolver = KeyResolver(master_key=MASTER, clock=self.clock, ttl=1e6, **options)
        self.gate = Gate(self.resolver)

    def new(self, **fields: object) -> str:
        key: str = self.resolver.generate(**fields)["key"]
        self.resolver.resolve(key)
        return key

    def at_once(self, key: str, header: str = "authorization") -> Caller | None:
        value = f"Bearer {key}" if header == "authorization" else key
        return self.gate.at_once([(header.encode(), value.encode())])


@pytest.fixture
def keys() -> Keys:
    return Keys()


def test_the_same_caller_each_time(keys: Keys) -> None:
    key = keys.new(user_id="u", team_id="t")
    first = keys.at_once(key)
    assert first is not None
    assert (first.scope, first.admin, first.free) == ("team:t", False, True)
    assert [keys.at_once(key) for _ in range(3)] == [first] * 3
    assert keys.at_once(key, "x-api-key") is first


@pytest.mark.parametrize("change", ["delete", "block"])
def test_r71_a_key_that_is_taken_back_is_not_known(keys: Keys, change: str) -> None:
    """R71, behind the gate."""
    key, other = keys.new(), keys.new()
    keys.resolver.resolve(key)
    assert keys.at_once(key) is keys.at_once(key) is not None
    assert keys.at_once(other) is not None
    getattr(keys.resolver, change)(key)
    assert keys.at_once(key) is None
    assert keys.at_once(key) is None
    keys.resolver.resolve(other)
    assert keys.at_once(other) is not None


def test_a_key_that_expires_is_not_known(keys: Keys) -> None:
    key = keys.new(duration="60s")
    assert keys.at_once(key) is keys.at_once(key) is not None
    keys.clock.advance(59)
    assert keys.at_once(key) is not None
    keys.clock.advance(1)
    assert keys.at_once(key) is None


def test_what_is_believed_for_its_time_only() -> None:
    asked = []

    def resolve(key: str) -> KeyRecord:
        asked.append(key)
        return KeyRecord(id=f"id {len(asked)}", user=f"u{len(asked)}")

    clock = FakeClock()
    resolver = KeyResolver(clock=clock, ttl=60, resolve=resolve)
    gate, credentials = Gate(resolver, share="user"), [(b"authorization", b"Bearer of the host's own")]
    assert gate.at_once(credentials) is None
    resolver.resolve("of the host's own")
    scopes = [caller.scope for _ in range(2) if (caller := gate.at_once(credentials)) is not None]
    assert scopes == ["user:u1", "user:u1"]
    clock.advance(60)
    assert gate.at_once(credentials) is None
    resolver.resolve("of the host's own")
    caller = gate.at_once(credentials)
    assert caller is not None
    assert caller.scope == "user:u2"


def test_a_change_is_seen_at_once(keys: Keys) -> None:
    key = keys.new(team_id="old")
    assert [keys.at_once(key), keys.at_once(key)] == [keys.at_once(key)] * 2
    keys.resolver.update(key, team_id="new", models=["gpt"])
    keys.resolver.resolve(key)
    caller = keys.at_once(key)
    assert caller is not None
    assert (caller.scope, caller.free) == ("team:new", False)
    keys.resolver.update(key, rpm_limit=5)
    keys.resolver.resolve(key)
    assert keys.at_once(key) is None


def test_the_master_key_is_known(keys: Keys) -> None:
    first, second = keys.at_once(MASTER), keys.at_once(MASTER)
    assert first is second
    assert first is not None
    assert first.admin


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([], ""),
        ([(b"authorization", b"Bearer  one ")], "one"),
        ([(b"authorization", b"Basic one"), (b"api-key", b"two")], "two"),
        ([(b"x-api-key", b"one"), (b"api-key", b"two")], "one"),
        ([(b"api-key", b"two"), (b"x-api-key", b"one")], "one"),
        ([(b"api-key", b"two"), (b"x-api-key", b"one"), (b"authorization", b"bearer three")], "three"),
    ],
)
def test_which_header_has_the_key(headers: Pairs, key: str) -> None:
    assert key_in(headers) == key


def test_two_headers_with_two_keys(keys: Keys) -> None:
    """What was remembered of one header is not for a request whose key is another's."""
    first, second = keys.new(user_id="one"), keys.new(user_id="two")
    keys.resolver.resolve(first)
    basic = (b"authorization", b"Basic one")
    for _ in range(2):
        for key, scope in ((first, "user:one"), (second, "user:two")):
            caller = keys.gate.at_once([basic, (b"x-api-key", key.encode())])
            assert caller is not None
            assert caller.scope == scope


# --- nothing of a request stays


class _Watched(dict[str, Any]):
    """A scope or an environ that can be watched."""


@contextmanager
def _without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _asgi(app: Any, path: str, key: str, body: bytes) -> weakref.ref[_Watched]:
    headers = [(b"authorization", f"Bearer {key}".encode()), (b"content-type", b"application/json")]
    scope = _Watched(
        type="http", method="POST", path=path, root_path="", query_string=b"", headers=headers, state={}
    )
    sent: list[Any] = []

    async def answered() -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)

    asyncio.run(answered())
    assert sent[0]["status"] == 200
    assert dict(sent[0]["headers"])[b"x-llm-cache"] == b"hit"
    return weakref.ref(scope)


def _wsgi(app: Any, path: str, key: str, body: bytes) -> weakref.ref[_Watched]:
    environ = _Watched(
        {
            "REQUEST_METHOD": "POST",
            "PATH_INFO": path,
            "CONTENT_TYPE": "application/json",
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_AUTHORIZATION": f"Bearer {key}",
            "wsgi.input": io.BytesIO(body),
        }
    )
    sent: list[Any] = []
    for _ in app(environ, lambda status, headers, exc_info=None: sent.append((status, dict(headers)))):
        pass
    assert sent[0][0] == "200 OK"
    assert sent[0][1]["x-llm-cache"] == "hit"
    return weakref.ref(environ)


@pytest.mark.parametrize(("kind", "ask"), [(AsgiClient, _asgi), (WsgiClient, _wsgi)], ids=["asgi", "wsgi"])
def test_a_request_is_gone_with_its_answer(
    kind: type[AsgiClient] | type[WsgiClient], ask: Callable[..., weakref.ref[_Watched]]
) -> None:
    """No cycle keeps it until the garbage collector comes."""
    with FakeUpstream() as upstream:
        client = kind(config(upstream.url))
        try:
            key, body = client.new_key(), chat()
            assert client.post(CHAT, body, key=key).status_code == 200
            with _without_collector():
                assert ask(client._app, CHAT, key, json.dumps(body).encode())() is None
        finally:
            client.close()
