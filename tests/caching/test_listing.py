"""Listing the entries of every store, page by page, on both faces."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llm_middleware import CacheManager
from llm_middleware.caching.entry import About, Entry, Form, about, encode, pack_ends, peek
from llm_middleware.errors import ConfigError, InvalidRequestError
from llm_middleware.testing import FakeClock
from tests import s3_services
from tests.services import HOST, RedisServer, redis_server
from tests.support import SyncFace, completion

moto = s3_services.moto  # a fixture

STORES = ["local", "disk", "redis", "s3"]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    s3_services.without_aws(monkeypatch)


Make = Callable[..., CacheManager]


@pytest.fixture
def make_for(request: pytest.FixtureRequest, tmp_path) -> Iterator[Callable[[str], Make]]:
    made: list[CacheManager] = []
    name = f"n{secrets.token_hex(6)}"

    def settings(kind: str) -> dict[str, object]:
        if kind == "disk":
            return {"disk_cache_dir": str(tmp_path / "cache")}
        if kind == "redis":
            port = request.getfixturevalue("server").port
            return {"host": HOST, "port": port, "store_timeout": 10, "memory_tier": False}
        if kind == "s3":
            moto = request.getfixturevalue("moto")
            if not made:
                moto.client().create_bucket(Bucket=name)
            return {**moto.settings(name), "store_timeout": 30, "memory_tier": False}
        return {}

    def maker(kind: str) -> Make:
        def make(**changes: object) -> CacheManager:
            cache = CacheManager(kind, **{"namespace": name, **settings(kind), **changes})
            made.append(cache)
            return cache

        return make

    yield maker
    for cache in made:
        cache.close()


@pytest.fixture(params=STORES)
def make(request: pytest.FixtureRequest, make_for) -> Make:
    return make_for(request.param)


def body(text: str, **cache: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], "cache": cache}


def listed(face: SyncFace, cache: CacheManager, **options: object) -> tuple[str | None, list[dict[str, Any]]]:
    if face.name == "sync":
        return cache.entries(**options)
    return face.run(cache.aentries(**options))


def walked(face: SyncFace, cache: CacheManager, **options: object) -> list[list[dict[str, Any]]]:
    """All pages."""
    pages, cursor = [], None
    while True:
        cursor, rows = listed(face, cache, cursor=cursor, **options)
        pages.append(rows)
        if cursor is None:
            return pages


def put(face: SyncFace, cache: CacheManager, request: dict[str, object], answer: object = None) -> str:
    return face.fetch(cache, request, lambda _: answer or completion()).cache.key


def test_an_entry_is_told_by_what_it_is_about(face, make):
    clock = FakeClock()
    cache = make(clock=clock, ttl=600, ttl_jitter=0)
    key = put(face, cache, body("hi", tags=["blue", "red"]))
    clock.advance(100)
    size = len(face.get(cache, body("hi")).body)
    row = {
        "key": key,
        "kind": "chat",
        "model": "m",
        "tags": ["blue", "red"],
        "age": 100,
        "ttl": 500,
        "size": size,
    }
    assert listed(face, cache) == (None, [row])


def test_the_content_is_told_where_it_is_asked_for(face, make):
    cache = make()
    put(face, cache, body("hi"), completion("a long answer " * 1000))
    (row,) = listed(face, cache, content=True)[1]
    assert row["content"] == face.get(cache, body("hi")).body.decode()[:4000]
    assert len(row["content"]) == 4000


def test_pages_have_at_most_what_was_asked_for_and_all_there_is_once(face, make):
    cache = make()
    keys = sorted(put(face, cache, body(str(number))) for number in range(7))
    pages = walked(face, cache, limit=3)
    assert max(map(len, pages)) == 3
    assert sorted(row["key"] for page in pages for row in page) == keys
    assert [row["key"] for page in walked(face, cache, limit=100) for row in page] == keys
    assert [len(page) for page in walked(face, cache, limit=7) if page] == [7]


def test_a_prefix_chooses(face, make):
    cache = make()
    keys = [put(face, cache, body(str(number))) for number in range(5)]
    pages = walked(face, cache, prefix=keys[2][:12], limit=1)
    assert [row["key"] for page in pages for row in page] == [keys[2]]
    assert walked(face, cache, prefix="x") == [[]]


def test_other_namespaces_are_not_listed(face, make):
    cache, other = make(), make(namespace="other")
    put(face, other, body("theirs"))
    key = put(face, cache, body("ours"))
    assert [row["key"] for row in listed(face, cache)[1]] == [key]


@pytest.mark.parametrize("cursor", ["", "x", ".", "a.b", f"{'0' * 64}.x", ".-1", f"{'0' * 64}"])
def test_a_cursor_that_is_none_is_refused(face, make, cursor):
    cache = make()
    put(face, cache, body("hi"))
    if cursor == ".":  # the beginning
        assert len(listed(face, cache, cursor=cursor)[1]) == 1
        return
    with pytest.raises(InvalidRequestError, match="cursor: not one that this"):
        listed(face, cache, cursor=cursor)


@pytest.mark.parametrize("kind", ["redis", "s3"])
def test_of_a_compressed_entry_all_is_known(face, make_for, kind):
    cache = make_for(kind)(compress_above=0, ttl=600, ttl_jitter=0)
    key = put(face, cache, body("hi", tags=["blue"]), completion("la " * 5000))
    (row,) = listed(face, cache)[1]
    assert (row["key"], row["kind"], row["model"], row["tags"]) == (key, "chat", "m", ["blue"])
    assert row["size"] == len(face.get(cache, body("hi")).body)
    assert 0 <= row["age"] < 600
    assert row["age"] + row["ttl"] == pytest.approx(600, abs=0.01)


def test_of_an_encrypted_entry_what_its_labels_tell_is_known(face, make_for):
    cache = make_for("redis")(encryption_key="11" * 32)
    key = put(face, cache, body("hi", tags=["blue"]))
    unknown = {"tags": None, "age": None, "ttl": None, "size": None}
    assert listed(face, cache)[1] == [{"key": key, "kind": "chat", "model": None, **unknown}]
    (row,) = listed(face, cache, content=True)[1]
    assert (row["model"], row["tags"]) == ("m", ["blue"])
    assert row["content"] == face.get(cache, body("hi")).body.decode()


def test_what_is_no_entry_is_listed_by_its_key(face, make_for, server):
    cache = make_for("redis")()
    for number, value in enumerate([b"", b"junk", b"LBL1", b"LLMC" + bytes(100)]):
        server.ask("SET", f"{cache.settings.namespace}:{number:064d}", value)
    rows = listed(face, cache, content=True)[1]
    assert [row["key"] for row in rows] == [f"{number:064d}" for number in range(4)]
    assert {row["kind"] for row in rows} == {row["content"] for row in rows} == {None}


class Unwalkable:
    def get(self, key: str) -> bytes | None: ...

    def set(self, key: str, value: bytes, ttl: float | None) -> None: ...

    def delete(self, keys: list[str]) -> int: ...

    def close(self) -> None: ...


def test_a_store_that_cannot_be_walked_says_so(face):
    with pytest.raises(ConfigError, match="Unwalkable cannot be searched: it has no heads"):
        listed(face, CacheManager(store=Unwalkable()))


def entry(**changes: Any) -> Entry:
    form = Form(((b"content-type", b"application/json"),), b"12345")
    return Entry(**{"kind": "chat", "created": 1.0, "expires": 9.0, "plain": form, "model": "m", **changes})


def test_an_answer_in_two_forms_is_as_long_as_both():
    stream = Form(((b"content-type", b"text/event-stream"),), b"data: 1\n\n", pack_ends([9]))
    both = entry(stream=stream)
    assert about(both) == peek(encode(both)) == About("chat", "m", (), 1.0, 9.0, 5 + 9 + 4)


def test_peek_tells_as_much_as_the_bytes_do():
    whole = encode(entry(tags=("a", "b")))
    assert peek(whole) == About("chat", "m", ("a", "b"), 1.0, 9.0, 5)
    known = [peek(whole[:size]) for size in range(len(whole))]
    assert known[44] == About()
    assert known[45] == About(None, None, None, 1.0, 9.0, 5)
    kinds = [each.kind for each in known]
    assert set(kinds) == {None, "chat"}
    assert kinds == sorted(kinds, key=lambda kind: kind is not None)
    assert peek(b"x" + whole[1:]) == About()
    assert peek(encode(entry(model=None))).model is None
