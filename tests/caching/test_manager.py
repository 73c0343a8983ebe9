"""`CacheManager` as an app sees it: settings, stores, the default cache, the decorator. C48, C122, C123."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
from collections.abc import Sequence
from pathlib import Path

import pydantic
import pytest

import llm_middleware
from llm_middleware import (
    CacheManager,
    ConfigError,
    Event,
    Store,
    StoreError,
    SuspendedInSyncError,
    cached,
    default_cache,
    disable_cache,
    enable_cache,
    update_cache,
)
from llm_middleware.caching import default
from tests.support import chat_stream, completion

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
STREAM = {**BODY, "stream": True}


class Upstream:
    """Each call gets another answer."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, _: object) -> dict:
        self.calls += 1
        return completion(f"answer {self.calls}")


@pytest.fixture
def ask(face):
    """``ask(cache)``: one fetch; what the cache did and which answer it was."""
    upstream = Upstream()

    def fetch(cache: CacheManager, body: object = BODY, **options: object) -> tuple[str, str]:
        answer = face.fetch(cache, body, upstream, **options)
        return answer.cache.status, answer.json()["choices"][0]["message"]["content"]

    return fetch


@pytest.fixture(params=["local", "disk"])
def make(request, tmp_path):
    """``make(**settings)``: a manager in memory and on disk, closed at the end."""
    made: list[CacheManager] = []

    def manager(**settings: object) -> CacheManager:
        places = {"disk_cache_dir": tmp_path} if request.param == "disk" else {}
        made.append(CacheManager(request.param, **places, **settings))
        return made[-1]

    manager.type = request.param
    yield manager
    for cache in made:
        cache.close()


# --- C122: settings

MISSPELT = {
    "tll": "unknown cache setting 'tll'; did you mean 'ttl'?",
    "ttl_jiter": "unknown cache setting 'ttl_jiter'; did you mean 'ttl_jitter'?",
    "name_space": "unknown cache setting 'name_space'; did you mean 'namespace'?",
    "max_byte": "unknown cache setting 'max_byte'; did you mean 'max_bytes'?",
    "supported_calls": "unknown cache setting 'supported_calls'; did you mean 'supported_call_types'?",
    "hook": "unknown cache setting 'hook'; did you mean 'hooks'?",
    "get_caches": "unknown cache setting 'get_caches'; did you mean 'get_cache'?",
    "quux": "unknown cache setting 'quux'",
}


@pytest.mark.parametrize("name", MISSPELT)
def test_c122_a_misspelt_setting_names_the_nearest(name):
    with pytest.raises(ConfigError) as caught:
        CacheManager(**{name: 1})
    assert (caught.value.message, caught.value.param) == (MISSPELT[name], name)
    with pytest.raises(ConfigError) as caught:
        enable_cache(**{name: 1})
    assert caught.value.message == MISSPELT[name]


@pytest.mark.parametrize("name", ["kinds", "controls", "policy"])
def test_c122_what_is_derived_is_no_setting(name):
    with pytest.raises(ConfigError, match=f"unknown cache setting '{name}'"):
        CacheManager(**{name: None})


@pytest.mark.parametrize(
    ("type_", "near"), [("locl", "local"), ("Local", "local"), ("disc", "disk"), ("customs", "custom")]
)
def test_c122_an_unknown_type_names_the_nearest(type_, near):
    with pytest.raises(
        ConfigError, match=rf"^type: expected one of .*, got '{type_}'; did you mean '{near}'\?$"
    ):
        CacheManager(type_)


@pytest.mark.parametrize("type_", ["", "carrier-pigeon", 5, None, b"local", ["local"]])
def test_c122_a_type_that_is_none(type_):
    with pytest.raises(ConfigError) as caught:
        CacheManager(type_)
    assert caught.value.message.startswith("type: expected one of [")
    assert caught.value.message.endswith(f"got {type_!r}")
    assert caught.value.param == "type"


WRONG = [
    ("enabled", "yes", "enabled: expected True or False, got 'yes'"),
    ("enabled", 1, "enabled: expected True or False, got 1"),
    ("ttl", "soon", "ttl: expected seconds >= 0 or None, got 'soon'"),
    ("ttl", -1, "ttl: expected seconds >= 0 or None, got -1"),
    ("ttl", True, "ttl: expected seconds >= 0 or None, got True"),
    ("ttl", float("nan"), "ttl: expected seconds >= 0 or None, got nan"),
    ("ttl", [], "ttl: expected seconds >= 0 or None, got []"),
    ("ttl_jitter", 1.1, "ttl_jitter: expected a share from 0 to 1, got 1.1"),
    ("ttl_jitter", -0.1, "ttl_jitter: expected a share from 0 to 1, got -0.1"),
    ("ttl_jitter", None, "ttl_jitter: expected a share from 0 to 1, got None"),
    ("stale_while_revalidate", -1, "stale_while_revalidate: expected seconds >= 0, got -1"),
    ("stale_if_error", None, "stale_if_error: expected seconds >= 0, got None"),
    ("namespace", "", "namespace: expected a string that is not empty, got ''"),
    ("namespace", b"llm", "namespace: expected a string that is not empty, got b'llm'"),
    ("mode", "off", "mode: expected one of ['default_on', 'default_off'], got 'off'"),
    (
        "mode",
        "default-off",
        "mode: expected one of ['default_on', 'default_off'], got 'default-off'; did you mean 'default_off'?",
    ),
    ("mode", True, "mode: expected one of ['default_on', 'default_off'], got True"),
    ("supported_call_types", "chat", "supported_call_types: expected a list of names, got 'chat'"),
    ("supported_call_types", [1], "supported_call_types: expected a list of names, got [1]"),
    ("supported_call_types", 5, "supported_call_types: expected a list of names, got 5"),
    ("share", "everyone", "share: expected one of ['caller', 'all'], got 'everyone'"),
    ("ignore_fields", "user", "ignore_fields: expected a list of names, got 'user'"),
    ("ignore_fields", None, "ignore_fields: expected a list of names, got None"),
    ("image_content", "x", "image_content: expected a function, got 'x'"),
    ("key", 5, "key: expected a function, got 5"),
    ("admit", True, "admit: expected a function, got True"),
    ("admission", ["empty"], "admission: expected a mapping of reason code to True or False, got ['empty']"),
    ("admission", {"empty": "yes"}, "admission.empty: expected True or False, got 'yes'"),
    ("secret", "", "secret: expected bytes or a string that is not empty, got '...'"),
    ("secret", 5, "secret: expected bytes or a string that is not empty, got '...'"),
    ("on_disconnect", "stop", "on_disconnect: expected one of ['auto', 'cancel', 'finish'], got 'stop'"),
    ("max_bytes", 1.5, "max_bytes: expected a number of bytes >= 0, got 1.5"),
    ("max_bytes", "1GB", "max_bytes: expected a number of bytes >= 0, got '1GB'"),
    ("max_bytes", True, "max_bytes: expected a number of bytes >= 0, got True"),
    ("max_entry_bytes", -1, "max_entry_bytes: expected a number of bytes >= 0, got -1"),
    ("max_body_bytes", None, "max_body_bytes: expected a number of bytes >= 0, got None"),
    ("disk_cache_dir", "", "disk_cache_dir: expected a string that is not empty, got ''"),
    ("disk_cache_dir", 5, "disk_cache_dir: expected a string that is not empty, got 5"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_c122_a_wrong_value_is_told(name, value, message):
    with pytest.raises(ConfigError) as caught:
        CacheManager(**{name: value})
    assert (caught.value.message, caught.value.param) == (message, message.partition(":")[0])


def test_c122_an_unknown_reason_code_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"^admission\.tool-call: expected one of .*; did you mean 'tool-calls'\?$"
    ):
        CacheManager(admission={"tool-call": False})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hooks", 5),
        ("hooks", [5]),
        ("hooks", print),
        ("clock", 5),
        ("get_cache", 5),
        ("add_cache", "x"),
        ("store", 5),
        ("store", object()),
        ("ttl", 10**400),
        ("max_bytes", 0),
    ],
)
def test_c122_every_argument_is_checked_at_the_start(name, value):
    """Not at the first request, and never silently."""
    with pytest.raises(ConfigError, match=f"^{name}"):
        CacheManager(**{name: value})


def test_c122_a_store_goes_with_its_type():
    with pytest.raises(ConfigError, match=r"^store: goes with type='custom' \(or no type\)"):
        CacheManager("disk", store=Shelf())


def test_numbers_in_text_are_numbers():
    settings = CacheManager(ttl="60", ttl_jitter="0.5", stale_if_error="5").settings
    assert (settings.ttl, settings.ttl_jitter, settings.stale_if_error) == (60.0, 0.5, 5.0)


def test_making_a_manager_opens_nothing(tmp_path):
    CacheManager("disk", disk_cache_dir=tmp_path / "cache")
    assert [*tmp_path.iterdir()] == []


def test_a_path_may_be_a_path(tmp_path):
    assert CacheManager("disk", disk_cache_dir=Path(tmp_path)).settings.disk_cache_dir == str(tmp_path)


# --- C48, update, disable, enable


def test_c48_caching_off_for_one_call(make, ask):
    cache = make()
    assert ask(cache, caching=False) == ("bypass", "answer 1")
    assert ask(cache) == ("miss", "answer 2")
    assert ask(cache, caching=False) == ("bypass", "answer 3")
    assert ask(cache) == ("hit", "answer 2")


def test_disable_and_enable(make, ask):
    cache = make()
    assert ask(cache) == ("miss", "answer 1")
    cache.disable()
    assert cache.enabled is False
    assert ask(cache) == ("bypass", "answer 2")
    cache.enable()
    assert cache.enabled is True
    assert ask(cache) == ("hit", "answer 1")


def test_a_disabled_cache_gives_and_takes_nothing(make, face):
    cache = make()
    face.set(cache, BODY, completion())
    cache.disable()
    assert face.get(cache, BODY) is None
    assert face.set(cache, STREAM, b"".join(chat_stream("a"))) is None


def test_update_changes_what_follows(make, ask):
    cache = make(ttl_jitter=0)
    assert ask(cache) == ("miss", "answer 1")
    cache.update(ignore_fields=["user"])
    assert ask(cache, {**BODY, "user": "a"}) == ("hit", "answer 1")
    cache.update(mode="default_off")
    assert ask(cache) == ("bypass", "answer 2")
    cache.update(mode="default_on", namespace="other")
    assert ask(cache) == ("miss", "answer 3")
    cache.update(namespace="llm")
    assert ask(cache) == ("hit", "answer 1")


def test_update_changes_what_follows_over_http(front):
    """For bodies that came before, byte for byte, too."""
    cache = CacheManager()
    client = front(lambda seen: completion(), cache=cache)
    assert [client.post(BODY).cache for _ in range(3)] == ["miss", "hit", "hit"]
    cache.update(mode="default_off")
    assert client.post(BODY).cache == "bypass"
    cache.update(mode="default_on", namespace="other")
    assert [client.post(BODY).cache for _ in range(2)] == ["miss", "hit"]
    cache.update(namespace="llm")
    assert client.post(BODY).cache == "hit"


def test_update_keeps_what_it_does_not_name():
    cache = CacheManager(ttl=5, namespace="n")
    cache.update(mode="default_off")
    cache.update()
    assert (cache.settings.ttl, cache.settings.namespace, cache.settings.mode) == (5.0, "n", "default_off")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ttl": -1}, "ttl: expected seconds >= 0 or None, got -1"),
        ({"tll": 1}, "unknown cache setting 'tll'; did you mean 'ttl'?"),
        ({"type": "disk"}, "type: cannot change in use; make a new CacheManager"),
        ({"max_bytes": 5}, "max_bytes: cannot change in use; make a new CacheManager"),
        ({"disk_cache_dir": "x"}, "disk_cache_dir: cannot change in use; make a new CacheManager"),
        ({"namespace": "other", "mode": "x"}, "mode: expected one of ['default_on', 'default_off'], got 'x'"),
    ],
)
def test_a_wrong_update_changes_nothing(ask, changes, message):
    cache = CacheManager()
    ask(cache)
    before = cache.settings
    with pytest.raises(ConfigError) as caught:
        cache.update(**changes)
    assert caught.value.message == message
    assert cache.settings is before
    assert ask(cache) == ("hit", "answer 1")


def test_an_update_to_what_is_already_so():
    cache = CacheManager()
    cache.update(type="local", max_bytes=cache.settings.max_bytes)
    assert cache.settings.type == "local"


# --- get, set, delete, flush, ping, stats, close


def test_set_and_get(make, face):
    cache = make()
    assert face.get(cache, BODY) is None
    key = face.set(cache, BODY, completion("set"))
    assert key == cache.plan("chat", BODY).digest
    answer = face.get(cache, BODY)
    assert answer.json() == completion("set")
    assert (answer.cache.status, answer.cache.key, answer.cache.tier) == (
        "hit",
        key,
        "memory" if make.type == "local" else "disk",
    )
    assert face.get(cache, BODY, controls={"no-cache": True}) is None
    assert face.get(cache, BODY, controls={"namespace": "n"}) is None
    assert face.get(cache, BODY, kind="responses") is None


def test_set_and_get_a_stream(make, face):
    cache = make()
    pieces = chat_stream("a", "b")
    face.set(cache, STREAM, b"".join(pieces))
    answer = face.get(cache, STREAM)
    assert answer.streamed
    assert face.chunks(answer) == pieces


def test_delete(make, face, ask):
    cache = make()
    ask(cache)
    other = {**BODY, "seed": 1}
    ask(cache, other)
    key = cache.plan("chat", BODY).digest
    assert face.do(cache, "delete", "0" * 64) == 0
    assert face.do(cache, "delete") == 0
    assert face.do(cache, "delete", key, "0" * 64) == 1
    assert face.do(cache, "delete", key) == 0
    assert ask(cache) == ("miss", "answer 3")
    assert ask(cache, other) == ("hit", "answer 2")
    assert face.do(cache, "delete", cache.plan("chat", other).key) == 1


def test_flush_empties_its_own_namespace_only(tmp_path, face, ask):
    one = CacheManager("disk", disk_cache_dir=tmp_path, namespace="one")
    other = CacheManager("disk", disk_cache_dir=tmp_path, namespace="one:more")
    for cache in (one, other):
        ask(cache)
        ask(cache, {**BODY, "seed": 1})
    assert face.do(one, "flush") == 2
    assert ask(one)[0] == "miss"
    assert ask(other)[0] == "hit"
    assert face.do(one, "flush") == 1
    assert face.do(one, "flush") == 0
    one.close()
    other.close()


def test_flush_in_memory(face, ask):
    cache = CacheManager()
    ask(cache)
    ask(cache, BODY, controls={"namespace": "inner"})
    ask(cache, BODY, scope="tenant")
    assert face.do(cache, "flush") == 3
    assert cache.stats()["entries"] == 0


def test_ping(make, face):
    cache = make()
    told = face.do(cache, "ping")
    assert (told["status"], told["tier"]) == ("healthy", "memory" if make.type == "local" else "disk")
    assert told["latency_ms"] >= 0
    assert face.do(cache, "flush") == 0


def test_stats(face, ask):
    cache = CacheManager()
    ask(cache)
    ask(cache)
    ask(cache, caching=False)
    stats = cache.stats()
    size = stats.pop("bytes")
    assert stats == {"miss": 1, "stored": 1, "hit": 1, "bypass": 1, "flights": 0, "entries": 1}
    assert size > len(b"answer 1")


def test_close_and_use_again(make, face, ask):
    cache = make()
    ask(cache)
    face.do(cache, "close")
    face.do(cache, "close")
    assert ask(cache) == ("hit", "answer 1")


def test_entries_on_disk_outlive_the_manager(tmp_path, face, ask):
    for expected in ("miss", "hit"):
        cache = CacheManager("disk", disk_cache_dir=tmp_path)
        assert ask(cache)[0] == expected
        face.do(cache, "close")


def test_both_faces_share_what_is_stored_and_what_is_under_way(make):
    cache, upstream = make(), Upstream()

    async def run() -> None:
        assert (await cache.afetch(BODY, upstream)).cache.status == "miss"
        assert cache.fetch(BODY, upstream).cache.status == "hit"
        assert (await cache.aget(BODY)).json() == completion("answer 1")

    asyncio.run(run())
    assert upstream.calls == 1


def test_a_plain_function_serves_the_async_face(make):
    async def run() -> str:
        return (await make().afetch(BODY, lambda body: completion())).cache.status

    assert asyncio.run(run()) == "miss"


def test_an_async_function_in_a_sync_method_says_what_to_do():
    async def call(body: object) -> dict:
        await asyncio.sleep(0)
        return completion()

    with pytest.raises(SuspendedInSyncError, match="use the async method"):
        CacheManager().fetch(BODY, call)


@pytest.mark.parametrize("value", [b'{"a": 1}', '{"a": 1}', bytearray(b'{"a": 1}'), {"a": 1}])
def test_what_a_call_may_return(face, value):
    cache = CacheManager()
    for status in ("miss", "hit"):
        answer = face.fetch(cache, {"x": 1}, lambda body: value, kind="json")
        assert (answer.cache.status, answer.json()) == (status, {"a": 1})
        assert answer.headers == ((b"content-type", b"application/json"),)


# --- stores


class Shelf:
    """A `Store` of one's own: bytes in a dictionary."""

    tier = "shelf"

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.ttls: dict[str, float | None] = {}
        self.closed = 0

    def get(self, key: str) -> bytes | None:
        return self.values.get(key)

    def set(self, key: str, value: bytes, ttl: float | None) -> None:
        self.values[key], self.ttls[key] = value, ttl

    def delete(self, keys: Sequence[str]) -> int:
        return sum(self.values.pop(key, None) is not None for key in keys)

    def flush(self, namespace: str) -> int:
        return self.delete([key for key in self.values if key.rpartition(":")[0] == namespace])

    def close(self) -> None:
        self.closed += 1


class AsyncShelf:
    """An `AsyncStore` of one's own."""

    tier = "ashelf"

    def __init__(self) -> None:
        self._shelf = Shelf()

    async def aget(self, key: str) -> bytes | None:
        await asyncio.sleep(0)
        return self._shelf.get(key)

    async def aset(self, key: str, value: bytes, ttl: float | None) -> None:
        await asyncio.sleep(0)
        self._shelf.set(key, value, ttl)

    async def adelete(self, keys: Sequence[str]) -> int:
        return self._shelf.delete(keys)

    async def aflush(self, namespace: str) -> int:
        return self._shelf.flush(namespace)

    async def aclose(self) -> None:
        self._shelf.close()


def test_a_store_of_ones_own(face, ask):
    shelf = Shelf()
    assert isinstance(shelf, Store)
    cache = CacheManager(store=shelf, ttl=60, ttl_jitter=0, stale_if_error=5)
    assert cache.settings.type == "custom"
    assert [ask(cache), ask(cache)] == [("miss", "answer 1"), ("hit", "answer 1")]
    ((key, value),) = shelf.values.items()
    assert (key, shelf.ttls[key]) == (cache.plan("chat", BODY).key, 65.0)
    assert type(value) is bytes
    assert face.get(cache, BODY).cache.tier == "shelf"
    told = face.do(cache, "ping")
    assert (told["status"], told["tier"]) == ("healthy", "shelf")
    assert face.do(cache, "delete", cache.plan("chat", BODY).digest) == 1
    ask(cache)
    assert face.do(cache, "flush") == 1
    face.do(cache, "close")
    assert shelf.closed == 1


def test_an_async_store_of_ones_own():
    async def run() -> list:
        shelf = AsyncShelf()
        cache, upstream = CacheManager(store=shelf), Upstream()
        told = [(await cache.afetch(BODY, upstream)).cache.status for _ in range(2)]
        told += [(await cache.aping())["status"], await cache.aflush()]
        await cache.aclose()
        return [*told, upstream.calls, shelf._shelf.closed]

    assert asyncio.run(run()) == ["miss", "hit", "healthy", 1, 1, 1]


def test_an_async_store_in_a_sync_method_is_a_miss_and_told(caplog):
    cache = CacheManager(store=AsyncShelf())
    assert cache.fetch(BODY, Upstream()).cache.detail == "backend-down"
    assert "AsyncShelf has no sync get(): use the async methods" in caplog.text


def test_what_a_store_holds_that_is_not_ours_is_a_miss(ask, face):
    shelf = Shelf()
    cache = CacheManager(store=shelf)
    ask(cache)
    (key,) = shelf.values
    good = shelf.values[key]
    planted = pickle.dumps(completion())
    flipped = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in (0, 5, 9, 20, 60)]
    for number, bad in enumerate([b"", b"LLMC", planted, good[:-1], good + b"x", *flipped], 2):
        shelf.values[key] = bad
        assert ask(cache) == ("miss", f"answer {number}")
        assert ask(cache) == ("hit", f"answer {number}")
    assert cache.stats()["store-error"] == 10


@pytest.mark.parametrize("bad", ["text", 5, {"a": 1}, [b"x"], memoryview(b"x")])
def test_what_a_store_returns_that_is_no_bytes_is_a_miss(ask, bad):
    shelf = Shelf()
    shelf.get = lambda key: bad
    assert ask(CacheManager(store=shelf)) == ("miss", "answer 1")


class Broken(Shelf):
    """Every method of it fails."""

    tier = "broken"

    def __init__(self, error: Exception, *methods: str) -> None:
        super().__init__()

        def fail(*_: object) -> object:
            raise error

        for method in methods:
            setattr(self, method, fail)


ERRORS = [
    StoreError("down"),
    OSError("down"),
    ValueError("down"),
    KeyError("x"),
    RuntimeError("down"),
    TimeoutError(),
]


@pytest.mark.parametrize(
    "methods", [("get",), ("set",), ("delete",), ("get", "set", "delete", "flush", "close")]
)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_store_that_fails_fails_no_request(ask, error, methods, caplog):
    caplog.set_level(logging.DEBUG, "llm_middleware")
    events: list[Event] = []
    cache = CacheManager(store=Broken(error, *methods), hooks=[events.append])
    answers = [ask(cache) for _ in range(2)]
    if methods == ("delete",):
        assert answers == [("miss", "answer 1"), ("hit", "answer 1")]
        return
    assert answers == [("miss", "answer 1"), ("miss", "answer 2")]
    failed = [event for event in events if event.name == "store-error"]
    assert failed
    assert {(type(event.error), event.tier, event.cache_hit) for event in failed} == {
        (type(error), "broken", None)
    }
    assert cache.stats()["store-error"] == len(failed)
    assert logged(caplog)[0] == "WARNING"


def logged(caplog) -> list[str]:
    return [record.levelname for record in caplog.records if record.name == "llm_middleware"]


@pytest.mark.parametrize("methods", [("set",), ("get", "set", "delete", "flush", "close")])
def test_a_store_that_fails_is_logged_once_for_a_burst(ask, methods, caplog):
    """A full disk or a read-only replica too, where every read is well and every write fails."""
    cache = CacheManager(store=Broken(OSError("down"), *methods))
    for _ in range(5):
        assert ask(cache)[0] == "miss"
    assert logged(caplog) == ["WARNING"]


@pytest.mark.parametrize("methods", [("get",), ("set",), ("get", "set")])
def test_a_store_that_fails_fails_no_stream(face, methods):
    cache = CacheManager(store=Broken(OSError("down"), *methods))
    pieces = chat_stream("a", "b")
    for _ in range(2):
        assert face.chunks(face.fetch(cache, STREAM, lambda body: iter(pieces))) == pieces


def test_an_administrator_is_told_that_the_store_fails(face):
    """Deleting, flushing and pinging are about the store: they raise what it raises."""
    cache = CacheManager(store=Broken(OSError("down"), "get", "set", "delete", "flush", "close"))
    for method, arguments in (("delete", ["a" * 64]), ("flush", []), ("ping", []), ("close", [])):
        with pytest.raises(OSError, match=r"^down$"):
            face.do(cache, method, *arguments)


def test_a_ping_of_a_store_that_forgets(face):
    shelf = Shelf()
    shelf.get = lambda key: None
    assert face.do(CacheManager(store=shelf), "ping")["status"] == "unhealthy"


def test_a_directory_that_cannot_be_used(ask, tmp_path):
    (tmp_path / "file").write_text("x")
    cache = CacheManager("disk", disk_cache_dir=tmp_path / "file" / "cache")
    assert [ask(cache), ask(cache)] == [("miss", "answer 1"), ("miss", "answer 2")]
    assert cache.stats()["store-error"] > 0


# --- hooks


@pytest.mark.parametrize("error", [ValueError("hook"), StoreError("hook")])
def test_a_hook_that_raises_is_counted_and_logged_once(ask, error, caplog):
    events: list[str] = []

    def fails(event: Event) -> None:
        raise error

    cache = CacheManager(hooks=[fails, lambda event: events.append(event.name)])
    assert [ask(cache), ask(cache)] == [("miss", "answer 1"), ("hit", "answer 1")]
    assert events == ["stored", "miss", "hit"]
    assert cache.stats()["hook-error"] == 3
    assert len([record for record in caplog.records if record.name == "llm_middleware"]) == 1


# --- C123: the default cache


@pytest.fixture
def fresh_default(monkeypatch):
    monkeypatch.setattr(default, "_default", None)


@pytest.mark.usefixtures("fresh_default")
class TestDefault:
    def test_one_is_made_on_first_use(self):
        assert default_cache() is default_cache()
        assert default_cache().settings.type == "local"

    def test_c123_a_second_call_wins(self, tmp_path):
        first = enable_cache(ttl=5)
        second = enable_cache("disk", disk_cache_dir=tmp_path, ttl=6)
        assert default_cache() is second is not first
        assert (first.settings.ttl, second.settings.ttl, second.settings.type) == (5.0, 6.0, "disk")
        second.close()

    def test_c123_what_the_first_held_is_closed(self):
        shelf = Shelf()
        enable_cache(store=shelf)
        assert shelf.closed == 0
        enable_cache()
        assert shelf.closed == 1

    @pytest.mark.parametrize("wrong", [{"ttl": -1}, {"tll": 1}, {"type": "redos"}])
    def test_c123_wrong_settings_leave_the_first_in_place(self, wrong):
        shelf = Shelf()
        first = enable_cache(store=shelf)
        with pytest.raises(ConfigError):
            enable_cache(**wrong)
        assert default_cache() is first
        assert shelf.closed == 0

    def test_disable_and_enable_again(self, ask):
        cache = enable_cache()
        ask(cache)
        disable_cache()
        assert ask(default_cache())[0] == "bypass"
        assert ask(enable_cache())[0] == "miss"

    def test_update(self):
        cache = enable_cache(ttl=5)
        assert update_cache(ttl=7) is cache
        assert cache.settings.ttl == 7.0
        with pytest.raises(ConfigError, match="did you mean 'ttl'"):
            update_cache(tll=1)

    def test_a_middleware_without_a_cache_uses_it(self, front):
        cache = enable_cache(mode="default_off")
        client = front(lambda seen: completion())
        assert client.post(BODY).cache_status == "llm-middleware; fwd=bypass; detail=default-off"
        assert cache.stats()["bypass"] == 1
        enable_cache()
        assert [client.post(BODY).cache for _ in range(2)] == ["miss", "hit"]

    def test_the_decorator_uses_it(self):
        calls = []

        @cached
        def double(x: int) -> int:
            calls.append(x)
            return 2 * x

        assert [double(2), double(2)] == [4, 4]
        enable_cache()
        assert double(2) == 4
        assert calls == [2, 2]


def test_the_public_names_are_there():
    assert {*llm_middleware.__all__} <= {*dir(llm_middleware)} | {"__version__"}
    for name in llm_middleware.__all__:
        assert getattr(llm_middleware, name) is not None


# --- the decorator


class Decorated:
    """A function of the host's in its four kinds, each counting its calls."""

    def __init__(self, kind: str, cache: CacheManager, **options: object) -> None:
        self.kind = kind
        self.calls: list[tuple] = []
        self.function = cache.cached(**options)(getattr(self, "_" + kind)())

    def _function(self):
        def f(x: object, y: object = 1, *more: object, z: object = None) -> object:
            """What it does."""
            self.calls.append((x, y, more, z))
            return [x, len(self.calls)]

        return f

    def _coroutine(self):
        function = self._function()

        async def f(x: object, y: object = 1, *more: object, z: object = None) -> object:
            """What it does."""
            await asyncio.sleep(0)
            return function(x, y, *more, z=z)

        return f

    def _generator(self):
        function = self._function()

        def f(x: object, y: object = 1, *more: object, z: object = None):
            """What it does."""
            yield from function(x, y, *more, z=z)

        return f

    def _async_generator(self):
        function = self._function()

        async def f(x: object, y: object = 1, *more: object, z: object = None):
            """What it does."""
            for item in function(x, y, *more, z=z):
                await asyncio.sleep(0)
                yield item

        return f

    def __call__(self, *args: object, **kwargs: object) -> object:
        result = self.function(*args, **kwargs)
        if self.kind == "coroutine":
            return asyncio.run(_awaited(result))
        if self.kind == "generator":
            return [*result]
        if self.kind == "async_generator":
            return asyncio.run(_collected(result))
        return result


async def _awaited(coroutine) -> object:
    return await coroutine


async def _collected(items) -> list:
    return [item async for item in items]


KINDS = ["function", "coroutine", "generator", "async_generator"]


@pytest.fixture(params=KINDS)
def decorated(request):
    return lambda cache=None, **options: Decorated(request.param, cache or CacheManager(), **options)


def test_a_repeat_is_not_called(decorated):
    f = decorated()
    assert [f("a"), f("a"), f("b"), f("a")] == [["a", 1], ["a", 1], ["b", 2], ["a", 1]]
    assert len(f.calls) == 2


def test_arguments_are_the_same_however_they_are_given(decorated):
    f = decorated()
    for args, kwargs in [((1,), {}), ((), {"x": 1}), ((1, 1), {}), ((1,), {"y": 1, "z": None}), ((1.0,), {})]:
        assert f(*args, **kwargs) == [1, 1]
    assert len(f.calls) == 1


def test_different_arguments_are_different(decorated):
    f = decorated()
    calls = [
        ((1,), {}),
        (("1",), {}),
        ((True,), {}),
        ((1, 2), {}),
        ((1, 1, 2), {}),
        ((1,), {"z": 2}),
        (([1],), {}),
    ]
    calls += [((None,), {}), (({"cache": 1},), {}), (({"cache": 2},), {})]
    for args, kwargs in calls:
        f(*args, **kwargs)
    assert len(f.calls) == len(calls)


def test_arguments_without_a_json_form_are_passed_on_uncached(decorated):
    f = decorated()
    thing = object()
    assert f(thing)[0] is thing
    assert f(thing)[0] is thing
    assert f(float("nan"), {1, 2})[1] == 3
    assert f(lambda: 1)[1] == 4
    assert f.calls[0] == (thing, 1, (), None)


def test_pydantic_models_as_arguments(decorated):
    class Query(pydantic.BaseModel):
        text: str

    f = decorated(load=lambda value: value)
    first = f(1, Query(text="a"))
    assert f(1, Query(text="a")) == first
    assert f(1, Query(text="b")) != first


def test_load_gives_results_their_type(decorated):
    """On a miss as on a hit."""
    f = decorated(load=lambda value: ("loaded", value))
    whole = f.kind in ("function", "coroutine")
    expected = ("loaded", ["a", 1]) if whole else [("loaded", "a"), ("loaded", 1)]
    assert [f("a"), f("a")] == [expected, expected]


def test_a_scope_keeps_results_apart(decorated):
    cache = CacheManager()
    one, other = decorated(cache, scope="one"), decorated(cache, scope="other")
    assert [one("a"), other("a"), one("a")] == [["a", 1], ["a", 1], ["a", 1]]
    assert (len(one.calls), len(other.calls)) == (1, 1)


def test_a_scope_of_the_arguments(decorated):
    """Asked with the arguments as they were given."""
    given: list = []
    tenants = iter("aabb")

    def tenant(*args: object, **kwargs: object) -> str:
        given.append((args, kwargs))
        return next(tenants)

    f = decorated(scope=tenant)
    assert [f(1, z=2)[1] for _ in range(4)] == [1, 1, 2, 2]
    assert given == [((1,), {"z": 2})] * 4


def test_controls_of_a_decorator(decorated, clock):
    cache = CacheManager(clock=clock, ttl_jitter=0)
    f = decorated(cache, controls={"ttl": 5})
    f("a")
    clock.advance(5)
    f("a")
    assert len(f.calls) == 2
    f = decorated(cache, controls={"no-cache": True})
    f("a")
    f("a")
    assert len(f.calls) == 2


def test_a_decorator_looks_like_its_function(decorated):
    f = decorated()
    assert (f.function.__name__, f.function.__doc__) == ("f", "What it does.")
    assert f.function.__wrapped__ is not f.function


def test_a_wrong_call_is_a_type_error(decorated):
    f = decorated()
    with pytest.raises(TypeError):
        f()
    with pytest.raises(TypeError):
        f(1, w=2)


def test_two_functions_share_nothing():
    cache = CacheManager()

    @cache.cached
    def one(x: int) -> str:
        return "one"

    @cache.cached
    def other(x: int) -> str:
        return "other"

    assert [one(1), other(1), one(1)] == ["one", "other", "one"]


def test_a_function_that_fails_is_called_again():
    cache, calls = CacheManager(), []

    @cache.cached
    def f(x: int) -> int:
        calls.append(x)
        if len(calls) == 1:
            raise ValueError("first")
        return x

    with pytest.raises(ValueError, match=r"^first$"):
        f(1)
    assert [f(1), f(1)] == [1, 1]
    assert len(calls) == 2


def test_a_generator_that_is_left_is_not_kept():
    cache, ended = CacheManager(), []

    @cache.cached
    def count():
        try:
            yield from range(3)
        finally:
            ended.append(1)

    items = count()
    assert next(items) == 0
    items.close()
    assert ended == [1]
    assert [*count()] == [0, 1, 2]
    assert [*count()] == [0, 1, 2]
    assert ended == [1, 1]


def test_an_async_generator_that_is_left_is_not_kept():
    cache, begun, ended = CacheManager(), [], []

    @cache.cached
    async def count():
        begun.append(1)
        try:
            yield 0
            if len(begun) == 1:
                await asyncio.Event().wait()
            yield 1
        finally:
            ended.append(1)

    async def run() -> list:
        async with contextlib.aclosing(count()) as items:
            first = await anext(items)
        return [first, [item async for item in count()], [item async for item in count()]]

    assert asyncio.run(run()) == [0, [0, 1], [0, 1]]
    assert (len(begun), len(ended)) == (2, 2)


@pytest.mark.parametrize("value", [None, True, 0, "", "text", [], {}, [1, {"a": None}], "é😀", 1.5, 10**30])
def test_results_come_back_as_they_were(value):
    cache = CacheManager()

    @cache.cached
    def f() -> object:
        return value

    for _ in range(2):
        result = f()
        assert (type(result), result) == (type(value), value)


def test_a_disabled_cache_calls_the_function(decorated):
    cache = CacheManager(enabled=False)
    f = decorated(cache)
    assert [f("a")[1], f("a")[1]] == [1, 2]


def test_a_store_that_fails_fails_no_decorated_function(decorated):
    cache = CacheManager(store=Broken(OSError("down"), "get", "set", "delete"))
    f = decorated(cache)
    assert [f("a")[1], f("a")[1]] == [1, 2]
