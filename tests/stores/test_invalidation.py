"""Removing entries on every store (C60, C115, C117, C118): by key, by what they are about, all of a
namespace, what is over; on both faces."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llm_middleware import CacheManager
from llm_middleware.caching.labels import label, labelled, unlabelled
from llm_middleware.errors import ConfigError, StoreError
from llm_middleware.testing import FakeClock
from tests import s3_services
from tests.services import HOST, RedisServer, redis_server, wait_for
from tests.support import SyncFace, chat_stream, completion

moto = s3_services.moto  # a fixture

STORES = ["local", "disk", "redis", "s3"]
SHARED = ["disk", "redis", "s3"]


def body(text: str = "hi", model: str = "m", **cache: object) -> dict[str, object]:
    request = {"model": model, "messages": [{"role": "user", "content": text}]}
    return {**request, "cache": cache} if cache else request


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
    """``make_for(type)(**changes)``: managers of that type that share one store and one namespace."""
    made: list[CacheManager] = []
    name = f"n{secrets.token_hex(6)}"

    def settings(kind: str) -> dict[str, object]:
        if kind == "disk":
            return {"disk_cache_dir": str(tmp_path / "cache")}
        if kind == "redis":
            return {"host": HOST, "port": request.getfixturevalue("server").port, "store_timeout": 10}
        if kind == "s3":
            moto = request.getfixturevalue("moto")
            if not made:
                moto.client().create_bucket(Bucket=name)
            return {**moto.settings(name), "store_timeout": 30}
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


@pytest.fixture(params=SHARED)
def shared(request: pytest.FixtureRequest, make_for) -> Make:
    return make_for(request.param)


def do(face: SyncFace, cache: CacheManager, method: str, *args: object, **options: object) -> Any:
    if face.name == "sync":
        return getattr(cache, method)(*args, **options)
    return face.run(getattr(cache, "a" + method)(*args, **options))


def put(face: SyncFace, cache: CacheManager, request: dict[str, object], **options: object) -> str:
    """Store an answer; its key."""
    answer = face.fetch(cache, request, lambda _: completion(), **options)
    assert answer.cache.stored is True
    return answer.cache.key


def there(face: SyncFace, cache: CacheManager, request: dict[str, object], **options: object) -> bool:
    return face.get(cache, request, **options) is not None


# --- by key (C115)


def test_c115_delete_counts_what_was_there(face, make):
    cache = make()
    keys = [put(face, cache, body(str(number))) for number in range(4)]
    nobody = "0" * 64
    assert do(face, cache, "delete", keys[0], nobody, dry_run=True) == 1
    assert there(face, cache, body("0"))
    assert do(face, cache, "delete", keys[0], nobody) == 1
    assert do(face, cache, "delete", keys[0], nobody) == 0
    assert do(face, cache, "delete") == 0
    assert do(face, cache, "delete", dry_run=True) == 0
    assert do(face, cache, "delete", *keys) == 3
    assert not any(there(face, cache, body(str(number))) for number in range(4))


def test_c115_a_key_that_is_given_twice_counts_once(face, make):
    cache = make()
    key = put(face, cache, body())
    full = f"{cache.settings.namespace}:{key}"
    assert do(face, cache, "delete", key, key, full, dry_run=True) == 1
    assert do(face, cache, "delete", key, key, full) == 1


# --- by what they are about (C117)

ABOUT: dict[str, tuple[dict[str, object], set[str]]] = {
    "a tag": ({"tags": ["blue"]}, {"blue", "both"}),
    "one of two tags": ({"tags": ["blue", "red"]}, {"blue", "red", "both"}),
    "a tag of none": ({"tags": ["green"]}, set()),
    "a model": ({"model": "n"}, {"other model"}),
    "a scope": ({"scope": "tenant"}, {"tenant"}),
    "nobody's scope": ({"scope": ""}, {"blue", "red", "both", "other model", "part", "text"}),
    "a namespace": ({"namespace": "part"}, {"part"}),
    "a kind": ({"kind": "text"}, {"text"}),
    "a kind by its other name": ({"kind": "atext_completion"}, {"text"}),
    "a tag and a model": ({"tags": ["blue"], "model": "m"}, {"blue", "both"}),
    "a tag of another model": ({"tags": ["blue"], "model": "n"}, set()),
    "all of it": ({"tags": ["red"], "model": "m", "scope": "", "kind": "chat"}, {"red", "both"}),
}


def filled(face: SyncFace, cache: CacheManager) -> dict[str, str]:
    """Entries by what is special about them, and their keys."""
    keys = {
        "blue": put(face, cache, body("1", tags=["blue"])),
        "red": put(face, cache, body("2", tags=["red"])),
        "both": put(face, cache, body("3", tags=["red", "blue"])),
        "other model": put(face, cache, body("4", "n")),
        "tenant": put(face, cache, body("5"), scope="tenant"),
        "part": put(face, cache, body("6", namespace="part")),
    }
    text = {"object": "text_completion", "choices": [{"index": 0, "text": "a", "finish_reason": "stop"}]}
    answer = face.fetch(cache, {"model": "m", "prompt": "7"}, lambda _: text, kind="text")
    assert answer.cache.stored is True
    return {**keys, "text": answer.cache.key}


def left(face: SyncFace, cache: CacheManager, keys: dict[str, str]) -> set[str]:
    return {name for name, key in keys.items() if do(face, cache, "delete", key, dry_run=True)}


@pytest.mark.parametrize("about", ABOUT)
def test_c117_invalidate_removes_what_it_is_about_and_no_more(face, make, about):
    cache = make()
    keys = filled(face, cache)
    criteria, expected = ABOUT[about]
    assert do(face, cache, "invalidate", **criteria, dry_run=True) == len(expected)
    assert left(face, cache, keys) == set(keys)
    assert do(face, cache, "invalidate", **criteria) == len(expected)
    assert left(face, cache, keys) == set(keys) - expected
    assert do(face, cache, "invalidate", **criteria) == 0


def test_c117_invalidate_by_the_beginning_of_the_key(face, make):
    cache = make()
    keys = [put(face, cache, body(str(number))) for number in range(8)]
    first = keys[0][:2]
    matching = [key for key in keys if key.startswith(first)]
    assert do(face, cache, "invalidate", prefix=first, dry_run=True) == len(matching)
    assert do(face, cache, "invalidate", prefix=keys[0]) == 1
    assert do(face, cache, "invalidate", prefix=keys[0]) == 0
    assert do(face, cache, "invalidate", prefix=first) == len(matching) - 1
    assert do(face, cache, "delete", *keys, dry_run=True) == len(keys) - len(matching)


def test_c117_tags_of_the_call_count_as_those_of_the_body_do(face, make):
    cache = make()
    put(face, cache, body("1"), controls={"tags": ["mine"]})
    put(face, cache, body("2", tags=["theirs"]), controls={"tags": ["mine"]})
    put(face, cache, body("3", tags=["theirs"]))
    assert (
        do(face, cache, "invalidate", tags=["theirs"], dry_run=True) == 1
    )  # the call's come before the body's
    assert do(face, cache, "invalidate", tags=["mine"]) == 2
    assert there(face, cache, body("3", tags=["theirs"]))


def test_c117_two_forms_of_one_entry_unite_their_tags(face, make):
    cache = make()
    stream = {**body(tags=["streamed"]), "stream": True}
    face.chunks(face.fetch(cache, stream, lambda _: iter(chat_stream("a", "b"))))
    put(face, cache, body(tags=["plain"]))
    for tag in ("streamed", "plain"):
        assert do(face, cache, "invalidate", tags=[tag], dry_run=True) == 1
    assert do(face, cache, "invalidate", tags=["streamed"]) == 1
    assert not there(face, cache, body())
    assert not there(face, cache, {**body(), "stream": True})


def test_c117_as_many_tags_as_there_may_be(face, make):
    cache = make()
    tags = [f"tag {number} {'x' * 200}" for number in range(64)]
    put(face, cache, body(tags=tags, namespace="part"), scope="tenant")
    for tag in (tags[0], tags[63]):
        assert do(face, cache, "invalidate", tags=[tag], dry_run=True) == 1
    assert do(face, cache, "invalidate", namespace="part", scope="tenant", kind="chat", model="m") == 1


@pytest.mark.parametrize("kind", ["redis", "s3"])
@pytest.mark.parametrize("at_rest", ["compressed", "encrypted"])
def test_c117_what_lies_compressed_or_encrypted_is_found_too(face, make_for, kind, at_rest):
    changes = {"compress": "zlib", "compress_above": 0}
    if at_rest == "encrypted":
        changes["encryption_key"] = base64.b64encode(bytes(range(32))).decode()
    make = make_for(kind)
    one, other = make(**changes), make()  # the other one has no key
    key = put(face, one, body("secret words", tags=["blue"]))
    value = other._flow.tiers.store.get(f"{one.settings.namespace}:{key}")
    assert b"chat.completion" not in value
    assert b"blue" not in value
    assert do(face, other, "invalidate", tags=["blue"], dry_run=True) == 1
    assert do(face, other, "invalidate", tags=["blue"]) == 1
    assert do(face, one, "delete", key, dry_run=True) == 0


def test_c117_what_is_no_entry_is_found_by_its_key_alone(face, shared):
    cache = shared()
    store, namespace = cache._flow.tiers.store, cache.settings.namespace
    key = "ab" + "0" * 62
    store.set(f"{namespace}:{key}", b"something else", None)
    assert do(face, cache, "invalidate", kind="chat") == 0
    assert do(face, cache, "invalidate", prefix="ac") == 0
    assert do(face, cache, "invalidate", prefix="ab") == 1
    assert store.get(f"{namespace}:{key}") is None


def test_c117_entries_are_stored_with_their_labels_in_front(face, shared):
    cache = shared()
    key = put(face, cache, body(tags=["blue"]), scope="tenant")
    value = cache._flow.tiers.store.get(f"{cache.settings.namespace}:{key}")
    expected = [label("kind", "chat"), label("scope", "tenant"), label("model", "m"), label("tag", "blue")]
    assert unlabelled(value)[0] == b"".join(expected)


def test_c117_other_managers_entries_are_left_alone(face, shared):
    cache, other = shared(), shared(namespace="other")
    put(face, cache, body(tags=["blue"]))
    put(face, other, body(tags=["blue"]))
    assert do(face, cache, "invalidate", tags=["blue"], model="m") == 1
    assert do(face, other, "invalidate", tags=["blue"], dry_run=True) == 1
    assert there(face, other, body())
    assert do(face, other, "flush") == 1


@pytest.mark.parametrize("kind", ["local", "disk"])  # elsewhere it cannot change in use
def test_c117_a_namespace_that_was_changed_in_use_leaves_the_old_entries_alone(face, make_for, kind):
    cache = make_for(kind)()
    before = cache.settings.namespace
    put(face, cache, body(tags=["blue"]))
    cache.update(namespace="later")
    put(face, cache, body(tags=["blue"]))
    assert do(face, cache, "invalidate", tags=["blue"]) == 1
    cache.update(namespace=before)
    assert there(face, cache, body())
    assert do(face, cache, "invalidate", tags=["blue"]) == 1


def test_c117_many_pages_are_walked_and_other_entries_stay(face, shared):
    cache = shared()
    store, namespace = cache._flow.tiers.store, cache.settings.namespace
    pages = 30 if store.tier == "s3" else 2500  # each entry is a request there
    blue = labelled(label("tag", "blue"), b"x")
    red = labelled(label("tag", "red"), b"x")
    for number in range(pages):
        store.set(f"{namespace}:{number:064x}", red if number % 10 else blue, None)
    assert do(face, cache, "invalidate", tags=["blue"], dry_run=True) == pages // 10
    assert do(face, cache, "invalidate", tags=["blue"]) == pages // 10
    assert do(face, cache, "invalidate", tags=["blue", "red"], dry_run=True) == pages * 9 // 10
    assert do(face, cache, "flush") == pages * 9 // 10


@pytest.mark.parametrize("kind", ["redis", "s3"])
def test_c117_what_only_memory_has_goes_too_and_not_when_it_is_only_counted(
    face, make_for, kind, monkeypatch
):
    cache = make_for(kind)()
    store, memory = cache._flow.tiers.store, cache._flow.tiers.memory

    def broken(*args: object) -> None:
        raise StoreError("not written")

    with monkeypatch.context() as patch:
        patch.setattr(store, "set", broken)
        patch.setattr(store, "aset", broken)
        answer = face.fetch(cache, body(tags=["blue"]), lambda _: completion())
        assert answer.cache.stored is False
    assert len(memory) == 1
    assert do(face, cache, "invalidate", tags=["blue"], dry_run=True) == 0
    assert do(face, cache, "invalidate", tags=["red"]) == 0
    assert len(memory) == 1
    assert do(face, cache, "invalidate", tags=["blue"]) == 0
    assert len(memory) == 0


def test_c117_invalidate_without_anything_to_look_for_names_what_may_be_given(face, make):
    with pytest.raises(ConfigError, match="give tags, model, scope, namespace, kind or prefix"):
        do(face, make(), "invalidate")
    with pytest.raises(ConfigError, match="tags: expected a list of strings, got 'blue'") as caught:
        do(face, make(), "invalidate", tags="blue")
    assert caught.value.param == "tags"


class Simple:
    """A host's own store, without a way to walk it."""

    tier = "simple"
    inline = True

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def get(self, key: str) -> bytes | None:
        return self.values.get(key)

    def set(self, key: str, value: bytes, ttl: float | None) -> None:
        self.values[key] = value

    def delete(self, keys: list[str]) -> int:
        return sum(self.values.pop(key, None) is not None for key in keys)

    def flush(self, namespace: str) -> int:
        mine = [key for key in self.values if key[:-65] == namespace]
        return self.delete(mine)

    def close(self) -> None:
        pass


class Walkable(Simple):
    """One entry a page, some of them twice, as Redis may tell them."""

    def heads(self, namespace: str, cursor: str | None, size: int):
        mine = sorted(key for key in self.values if key[:-65] == namespace)
        at = int(cursor or 0)
        page = [(key, self.values[key][:size]) for key in (mine * 2)[at : at + 1]]
        return str(at + 1) if at + 1 < 2 * len(mine) else None, page


def test_c117_a_store_that_cannot_be_walked_says_so(face):
    cache = CacheManager(store=Simple())
    put(face, cache, body(tags=["blue"]))
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match=r"Simple cannot be searched: it has no heads\(\)") as caught:
            do(face, cache, "invalidate", tags=["blue"], dry_run=dry_run)
        assert caught.value.param == "store"
    assert there(face, cache, body())


def test_c117_a_store_that_is_told_twice_of_an_entry_counts_it_once(face):
    cache = CacheManager(store=Walkable())
    for number in range(3):
        put(face, cache, body(str(number), tags=["blue"]))
    assert do(face, cache, "invalidate", tags=["blue"], dry_run=True) == 3
    assert do(face, cache, "invalidate", prefix=put(face, cache, body("more", tags=["red"]))) == 1


# --- all of it (C60), what is over


def test_c60_flush_empties_every_tier_of_this_namespace(face, make):
    cache = make()
    for number in range(5):
        put(face, cache, body(str(number)))
    assert do(face, cache, "flush") == 5
    assert do(face, cache, "flush") == 0
    assert face.fetch(cache, body("0"), lambda _: completion("new")).cache.status == "miss"


def test_c60_another_managers_memory_is_empty_after_a_flush(face, make_for):
    make = make_for("redis")
    one, other = make(), make()
    other._flow.tiers.peers.listen()
    wait_for(lambda: other._flow.tiers.peers.live, "the channel is live")
    put(face, one, body())
    assert face.fetch(other, body(), None).cache.status == "hit"
    assert do(face, one, "flush") == 1
    wait_for(lambda: len(other._flow.tiers.memory) == 0, "the other's memory is empty")


@pytest.mark.parametrize("kind", ["local", "disk", "s3"])
def test_c118_what_is_over_is_removed_and_counted(face, make_for, kind):
    clock = FakeClock()
    cache = make_for(kind)(clock=clock, ttl_jitter=0)
    put(face, cache, body("1", ttl=10))
    put(face, cache, body("2", ttl=100))
    assert do(face, cache, "purge_expired") == 0
    clock.advance(11)
    assert do(face, cache, "purge_expired") == 1
    assert do(face, cache, "purge_expired") == 0
    assert there(face, cache, body("2"))


def test_c118_what_is_over_is_gone_from_redis_by_itself(face, make_for):
    cache = make_for("redis")()
    put(face, cache, body())
    assert do(face, cache, "purge_expired") == 0
    assert there(face, cache, body())


# --- the next request after an answer (C58)


@pytest.mark.parametrize("stream", [False, True])
def test_c58_an_immediate_repeat_is_a_hit_here_and_in_another_process(face, shared, stream):
    one, other = shared(), shared()
    for number in range(10):
        request = {**body(str(number)), "stream": stream}
        answer = face.fetch(one, request, lambda _: iter(chat_stream("a")) if stream else completion())
        if stream:
            assert face.chunks(answer) == chat_stream("a")
        assert face.fetch(one, request, None).cache.status == "hit"
        assert face.fetch(other, request, None).cache.status == "hit"
