"""The cache's admin routes on both fronts, over every store (C33, C72, C114-C119)."""

from __future__ import annotations

import json
import logging

import pytest

from llm_middleware import CacheManager
from llm_middleware.api.admin import CHANGEABLE
from llm_middleware.caching.settings import SETTINGS
from llm_middleware.keys.record import KeyRecord
from tests.api.clients import CHAT, MASTER, Client, chat
from tests.services import HOST, redis_server

pytestmark = pytest.mark.usefixtures("environment")

ADMIN_ROUTES = [
    ("GET", "/cache/ping"),
    ("POST", "/cache/delete"),
    ("POST", "/cache/flush"),
    ("GET", "/cache/stats"),
    ("GET", "/cache/entries"),
    ("GET", "/cache/settings"),
    ("POST", "/cache/settings"),
    ("POST", "/key/generate"),
    ("POST", "/key/update"),
    ("POST", "/key/delete"),
    ("POST", "/key/regenerate"),
    ("POST", "/key/block"),
    ("POST", "/key/unblock"),
    ("GET", "/key/list"),
]


def error(answer) -> dict[str, object]:
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()
    assert list(found) == ["error"]
    assert set(found["error"]) == {"message", "type", "param", "code"}
    return found["error"]


def ask(client: Client, text: str = "hi", *, key: str = MASTER, **fields: object) -> tuple[str, str]:
    """Whether the answer was a hit, and its key."""
    answer = client.post(CHAT, chat(text, **fields), key=key)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-llm-cache"], answer.headers["x-llm-cache-key"]


def removed(client: Client, **body: object) -> int:
    answer = client.post("/cache/delete", body)
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "status": "success",
        "count": answer.json()["count"],
        "dry_run": bool(body.get("dry_run")),
    }
    return answer.json()["count"]


# --- ping (C114)


def test_c114_ping_writes_reads_and_deletes(front, cache):
    client = front(cache=cache)
    answer = client.get("/cache/ping")
    assert answer.status_code == 200
    told = answer.json()
    params = json.loads(told.pop("litellm_cache_params"))
    assert params["namespace"] == cache.settings.namespace
    assert isinstance(told.pop("health_check_cache_params"), dict)
    assert 0 < told.pop("latency_ms") < 60_000
    kind = cache.settings.type
    assert told == {
        "status": "healthy",
        "cache_type": kind,
        "ping_response": True,
        "set_cache_response": "success",
        "tier": "memory" if kind == "local" else kind,
    }
    assert client.get("/cache/entries").json() == {"entries": [], "cursor": None}


def test_c114_ping_asks_the_redis_itself(front, cache_of, redis):
    client = front(cache=cache_of("redis"))
    redis.ask("CONFIG", "RESETSTAT")
    told = client.get("/cache/ping").json()
    calls = redis.calls()
    assert (calls["set"], calls["get"]) == (1, 1)
    assert calls.get("unlink", 0) + calls.get("del", 0) == 1
    assert told["health_check_cache_params"]["server"] == "redis"
    assert redis.ask("DBSIZE") == 0


def test_c114_ping_is_503_where_the_store_fails(front, tmp_path):
    (tmp_path / "file").write_text("no directory")
    client = front(cache=CacheManager("disk", disk_cache_dir=str(tmp_path / "file")))
    answer = client.get("/cache/ping")
    assert answer.status_code == 503
    assert error(answer)["message"].startswith("the cache does not answer: disk cache cannot be written")
    assert error(answer)["code"] == "cache_ping_error"


def test_c114_ping_is_503_while_redis_is_down_and_200_when_it_is_back(front):
    with redis_server() as server:
        client = front(cache=CacheManager("redis", host=HOST, port=server.port, store_timeout=2))
        assert client.get("/cache/ping").status_code == 200
        server.stop()
        assert client.get("/cache/ping").status_code == 503
        server.restart()
        assert client.get("/cache/ping").status_code == 200


def test_c114_ping_is_503_where_what_is_read_is_not_what_was_written(front):
    class Forgetful(Unwalkable):
        def get(self, key: str) -> bytes | None:
            return None

    answer = front(cache=CacheManager(store=Forgetful())).get("/cache/ping")
    assert (answer.status_code, error(answer)["code"]) == (503, "cache_ping_error")


def test_ping_is_503_where_the_cache_is_off(front):
    answer = front({"cache": False}).get("/cache/ping")
    assert answer.status_code == 503
    assert "litellm_settings.cache" in error(answer)["message"]


def test_c72_ping_tells_that_a_bucket_is_not_there(front, cache_of):
    answer = front(cache=cache_of("s3", s3_bucket_name="no-such-bucket")).get("/cache/ping")
    assert answer.status_code == 503
    assert "NoSuchBucket" in error(answer)["message"]


# --- secrets (C33)


def test_c33_no_secret_of_redis_is_told_or_logged(front, caplog):
    caplog.set_level(logging.DEBUG)
    secret = "pass-Word/17"
    with redis_server("--requirepass", secret, password=secret) as server:
        for password, status in ((secret, 200), ("wrong-" + secret, 503)):
            quoted = password.replace("/", "%2F")
            url = f"redis://:{quoted}@{HOST}:{server.port}/0"
            cache = CacheManager(
                "redis", url=url, encryption_key="ab" * 32, secret="hush-hush", store_timeout=10
            )
            client = front(cache=cache)
            for path in ("/cache/ping", "/cache/settings", "/cache/stats"):
                answer = client.get(path)
                assert answer.status_code == (status if path == "/cache/ping" else 200)
                for hidden in (secret, quoted, "ab" * 32, "hush-hush"):
                    assert hidden not in answer.text
    for hidden in (secret, secret.replace("/", "%2F"), "ab" * 32, "hush-hush"):
        assert hidden not in caplog.text


def test_c33_settings_hide_what_is_secret(front):
    client = front(cache=CacheManager(secret=b"hush", encryption_key=lambda label: b"k" * 32, key=len))
    settings = client.get("/cache/settings").json()["settings"]
    assert (settings["secret"], settings["encryption_key"], settings["key"]) == ("***", "***", "len")
    assert settings["image_content"] is None


def test_c33_ping_hides_what_the_error_of_a_foreign_store_says(front):
    class Chatty(Unwalkable):
        def set(self, key: str, value: bytes, ttl: float | None) -> None:
            raise RuntimeError("cannot reach db://user:hush@host")

    client = front(cache=CacheManager(store=Chatty()))
    answer = client.get("/cache/ping")
    assert (answer.status_code, error(answer)["message"]) == (503, "the cache does not answer: RuntimeError")


# --- delete by key (C115)


def test_c115_unknown_keys_are_none_and_no_error(front, cache):
    client = front(cache=cache)
    assert ask(client)[0] == "miss"
    unknown = ["0" * 64, "no key at all", "", "other:" + "1" * 64, "\ud800"]
    assert removed(client, keys=unknown) == 0
    assert removed(client, keys=[]) == 0
    assert ask(client)[0] == "hit"


def test_c115_c117_delete_by_key(front, cache):
    client = front(cache=cache)
    first, second = ask(client, "1")[1], ask(client, "2")[1]
    full = f"{cache.settings.namespace}:{second}"
    assert removed(client, keys=[first, full], dry_run=True) == 2
    assert (ask(client, "1")[0], ask(client, "2")[0]) == ("hit", "hit")
    assert removed(client, keys=[first, full, "0" * 64]) == 2
    assert removed(client, keys=[first, full]) == 0
    assert (ask(client, "1")[0], ask(client, "2")[0]) == ("miss", "miss")


def test_c60_delete_reaches_no_other_key_of_the_store(front, cache_of, redis):
    client = front(cache=cache_of("redis"))
    theirs = ["other:session", "other:" + "1" * 64]
    for key in theirs:
        redis.ask("SET", key, "1")
    assert removed(client, keys=theirs) == 0
    assert redis.ask("EXISTS", *theirs) == 2


# --- what is no wish (C116)


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, None, "nothing to delete: give keys, or any of tags"),
        ({"dry_run": True}, None, "nothing to delete"),
        ({"tags": []}, None, "nothing to look for"),
        ({"keys": None, "tags": None}, None, "nothing to delete"),
        ({"key": ["a"]}, "key", "key: unknown field; did you mean 'keys'?"),
        ({"keys": "a"}, "keys", "keys: expected a list of strings"),
        ({"keys": [1]}, "keys", "keys: expected a list of strings"),
        ({"keys": ["a"], "tags": ["b"]}, "keys", "keys: goes alone"),
        ({"tags": "blue"}, "tags", "tags: expected a list of strings"),
        ({"tags": {"blue": 1}}, "tags", "tags: expected a list of strings"),
        ({"tags": [1]}, "tags", "tags: expected a list of strings"),
        ({"model": 7}, "model", "model: expected a string"),
        ({"kind": "chatt"}, "kind", "kind: unknown call type"),
        ({"prefix": 7}, "prefix", "prefix: expected a string"),
        ({"tags": ["a"], "dry_run": "yes"}, "dry_run", "dry_run: expected true or false"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_c116_a_wish_that_is_none_is_422_with_its_reason(front, body, param, says):
    client = front()
    ask(client)
    answer = client.post("/cache/delete", body)
    assert answer.status_code == 422
    assert error(answer)["type"] == "invalid_request_error"
    assert error(answer)["param"] == param
    assert says in error(answer)["message"]
    assert ask(client)[0] == "hit"


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"{", b'"keys"', b"[" * 100_000, b"\xff"])
def test_c116_a_body_that_is_no_object_is_refused(front, body):
    answer = front().post("/cache/delete", body)
    assert answer.status_code == (422 if not body else 400)
    assert error(answer)["type"] == "invalid_request_error"


class Unwalkable:
    """A store that a host wrote: it has nothing to be walked by."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def get(self, key: str) -> bytes | None:
        return self.held.get(key)

    def set(self, key: str, value: bytes, ttl: float | None) -> None:
        self.held[key] = value

    def delete(self, keys: list[str]) -> int:
        return sum(self.held.pop(key, None) is not None for key in keys)

    def flush(self, namespace: str) -> int:
        raise OSError("/home/secret/path")

    def close(self) -> None: ...


def test_what_a_store_cannot_do_is_422_and_what_fails_in_it_503(front, caplog):
    client = front(cache=CacheManager(store=Unwalkable()))
    for answer in (client.post("/cache/delete", {"tags": ["a"]}), client.get("/cache/entries")):
        assert answer.status_code == 422
        assert "Unwalkable cannot be searched" in error(answer)["message"]
    answer = client.post("/cache/flush")
    assert (answer.status_code, error(answer)["message"]) == (503, "the cache's store failed: OSError")
    assert removed(client, keys=[ask(client)[1]]) == 1
    assert "/home/secret/path" in caplog.text


def test_a_store_that_is_down_is_503(front):
    with redis_server() as server:
        client = front(cache=CacheManager("redis", host=HOST, port=server.port, store_timeout=2))
    for method, path, body in (
        ("POST", "/cache/delete", {"keys": ["0" * 64]}),
        ("POST", "/cache/delete", {"tags": ["a"]}),
        ("POST", "/cache/flush", None),
        ("GET", "/cache/entries", None),
    ):
        answer = client.request(method, path, body)
        assert (answer.status_code, error(answer)["code"]) == (503, "store_unavailable")


# --- flush (C117), and delete by what entries are about (C118)


def test_c117_flush_empties_this_namespace_and_no_other(front, cache_of, cache):
    client, other = front(cache=cache), front(cache=cache_of(cache.settings.type, namespace="another"))
    for text in ("1", "2", "3"):
        ask(client, text)
    ask(other, "1")
    answer = client.post("/cache/flush")
    assert (answer.status_code, answer.json()) == (200, {"status": "success", "count": 3})
    assert ask(client, "1")[0] == "miss"
    assert ask(other, "1")[0] == "hit"


def test_c118_delete_by_tag_model_tenant_kind_and_prefix(front, cache):
    client = front(cache=cache)
    red, blue = client.new_key(team_id="red"), client.new_key(team_id="blue")
    tag, model = {"tags": ["t"]}, "other"

    def fill() -> dict[str, str]:
        return {
            "tag": ask(client, "1", key=red, cache=tag)[1],
            "model": ask(client, "1", key=red, model=model)[1],
            "blue": ask(client, "1", key=blue)[1],
        }

    def left() -> set[str]:
        entries = client.get("/cache/entries").json()["entries"]
        names = {key: name for name, key in keys.items()}
        return {names[row["key"]] for row in entries}

    keys = fill()
    assert left() == {"tag", "model", "blue"}
    for body, gone in (
        ({"tags": ["t", "u"]}, {"tag"}),
        ({"model": model}, {"model"}),
        ({"scope": "team:blue"}, {"blue"}),
        ({"scope": "team:red", "model": "gpt"}, {"tag"}),
        ({"prefix": keys["blue"][:20]}, {"blue"}),
        ({"prefix": f"{cache.settings.namespace}:{keys['model']}"}, {"model"}),
        ({"kind": "completion"}, {"tag", "model", "blue"}),
        ({"kind": "embedding"}, set()),
        ({"namespace": "none"}, set()),
    ):
        assert removed(client, **body, dry_run=True) == len(gone)
        assert left() == set(keys)
        assert removed(client, **body) == len(gone)
        assert left() == set(keys) - gone
        assert fill() == keys


# --- who may (C119)


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
def test_c119_a_key_that_is_no_admins_is_403(front, method, path):
    client = front()
    answer = client.request(method, path, key=client.new_key())
    assert (answer.status_code, error(answer)["code"]) == (403, "admin_only")


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
def test_c119_without_any_admin_the_answer_says_what_to_configure(front, method, path):
    client = front({"keys": None})
    answer = client.request(method, path, key=None)
    assert answer.status_code == 403
    assert "general_settings.master_key" in error(answer)["message"]
    assert client.request(method, path, key=MASTER).status_code == 403


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
def test_r68_admin_routes_want_a_key_that_is_one(front, method, path):
    client = front()
    for key in (None, "", "sk-wrong", MASTER[:-1], MASTER + "x"):
        answer = client.request(method, path, key=key)
        assert (answer.status_code, error(answer)["code"]) == (401, "invalid_api_key")


def test_c119_the_hosts_own_check_decides(front):
    def authorize(head):
        name = head.header("x-user")
        return KeyRecord(id=name, admin=name == "root") if name else None

    client = front({"keys": None}, authorize=authorize)
    statuses = {
        name: client.get("/cache/stats", key=None, headers={"x-user": name}).status_code
        for name in ("root", "joe", "")
    }
    assert statuses == {"root": 200, "joe": 403, "": 401}


def test_c119_a_key_may_be_made_an_admins(front):
    client = front()
    assert client.get("/cache/stats", key=client.new_key(admin=True)).status_code == 200


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
def test_admin_routes_can_be_left_out(front, method, path):
    assert front(admin=False).request(method, path).status_code == 404
    assert front({"server": {"admin": False}}).request(method, path).status_code == 404


def test_a_method_that_a_route_does_not_have_is_405_and_says_which_it_has(front):
    answer = front().get("/cache/delete")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


# --- entries


def test_entries_are_told_without_their_content(front, cache):
    client = front(cache=cache)
    key = ask(client, "a secret wish", cache={"tags": ["t"], "ttl": 500})[1]
    answer = client.get("/cache/entries")
    (row,) = answer.json()["entries"]
    assert (row["key"], row["kind"], row["model"], row["tags"]) == (key, "chat", "gpt", ["t"])
    assert 0 <= row["age"] < 60
    assert 400 < row["age"] + row["ttl"] <= 525  # with the jitter
    assert row["size"] == len(client.post(CHAT, chat("a secret wish")).content)
    assert "content" not in row
    assert "secret wish" not in answer.text


def test_entries_show_content_where_that_is_configured(front, cache):
    client = front({"server": {"show_content": True}}, cache=cache)
    ask(client, "a secret wish")
    (row,) = client.get("/cache/entries").json()["entries"]
    assert row["content"] == client.post(CHAT, chat("a secret wish")).text


def test_entries_come_in_pages(front, cache):
    client = front(cache=cache)
    keys = sorted(ask(client, str(number))[1] for number in range(5))
    seen, cursor, pages = [], "", 0
    while cursor is not None:
        page = client.get(f"/cache/entries?limit=2&cursor={cursor}").json()
        assert len(page["entries"]) <= 2
        seen += [row["key"] for row in page["entries"]]
        cursor, pages = page["cursor"], pages + 1
    assert sorted(seen) == keys
    assert 3 <= pages <= 4
    one = client.get(f"/cache/entries?prefix={cache.settings.namespace}:{keys[0][:16]}").json()["entries"]
    assert [row["key"] for row in one] == [keys[0]]


def test_of_an_encrypted_entry_the_models_of_the_router_are_recognised(front, cache_of):
    client = front(cache=cache_of("redis", encryption_key="ab" * 32))
    key = ask(client)[1]
    unknown = {"tags": None, "age": None, "ttl": None, "size": None}
    assert client.get("/cache/entries").json()["entries"] == [
        {"key": key, "kind": "chat", "model": "gpt", **unknown}
    ]


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=-1", "limit=x", "limit=1e2", "limit=²"])
def test_a_limit_that_is_none_is_400(front, query):
    answer = front().get(f"/cache/entries?{query}")
    assert (answer.status_code, error(answer)["param"]) == (400, "limit")


def test_a_cursor_that_is_none_is_400(front, cache):
    answer = front(cache=cache).get("/cache/entries?cursor=nonsense")
    assert (answer.status_code, error(answer)["param"]) == (400, "cursor")


# --- stats


def test_stats_count_what_happened(front):
    client = front()
    for _ in range(3):
        ask(client)
    told = client.get("/cache/stats").json()
    assert (told["cache_type"], told["enabled"]) == ("local", True)
    assert (told["hit"], told["miss"], told["entries"]) == (2, 1, 1)


# --- settings


def test_settings_change_at_run_time_and_hold_from_then_on(front):
    client = front({"cache": {"type": "local", "ttl_jitter": 0}})
    answer = client.post("/cache/settings", {"ttl": 77, "supported_call_types": ["acompletion"]})
    assert answer.status_code == 200
    assert answer.json()["status"] == "success"
    shown = client.get("/cache/settings").json()["settings"]
    assert answer.json()["settings"] == shown
    assert (shown["ttl"], shown["supported_call_types"]) == (77, ["acompletion"])
    ask(client)
    (row,) = client.get("/cache/entries").json()["entries"]
    assert round(row["ttl"] + row["age"], 2) == 77
    client.post("/cache/settings", {"mode": "default_off"})
    assert client.post(CHAT, chat()).headers["x-llm-cache"] == "bypass"
    assert client.post(CHAT, chat(cache={"use-cache": True})).headers["x-llm-cache"] == "hit"
    client.post("/cache/settings", {"mode": "default_on", "supported_call_types": []})
    assert client.post(CHAT, chat()).headers["x-llm-cache"] == "bypass"


def test_settings_are_switched_off_and_on(front):
    client = front()
    ask(client)
    assert client.post("/cache/settings", {"enabled": False}).status_code == 200
    assert client.post(CHAT, chat()).headers["x-llm-cache"] == "bypass"
    assert client.post("/cache/settings", {"enabled": True}).status_code == 200
    assert ask(client)[0] == "hit"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"ttl": -1}, "ttl: expected seconds >= 0"),
        ({"ttl": float("nan")}, "ttl: expected seconds >= 0"),
        ({"mode": "of"}, "mode: expected one of"),
        ({"mode": ["default_on"]}, "mode: expected one of"),
        ({"supported_call_types": ["complete"]}, "supported_call_types: unknown call type"),
        ({"supported_call_types": "completion"}, "supported_call_types: expected a list"),
        ({"tll": 5}, "tll: unknown field; did you mean 'ttl'?"),
        ({"type": "redis"}, "type: cannot change at run time"),
        ({"namespace": "x"}, "namespace: cannot change at run time"),
        ({"share": "all"}, "share: cannot change at run time"),
        ({"encryption_key": "ab" * 32}, "encryption_key: cannot change at run time"),
        ({"mode": "os.environ/HOME"}, "os.environ/ is for files of settings"),
        ({"ignore_fields": ["os.environ/HOME"]}, "os.environ/ is for files of settings"),
        ({"admission": {"empty": "os.environ/HOME"}}, "os.environ/ is for files of settings"),
        ({"admission": {"emty": True}}, "admission.emty"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_wrong_setting_is_422_and_changes_nothing(front, wrong, says):
    client = front()
    before = client.get("/cache/settings").json()["settings"]
    answer = client.post("/cache/settings", {"ttl_jitter": 0.5, **wrong})
    assert answer.status_code == 422
    assert says in error(answer)["message"]
    assert error(answer)["param"].partition(".")[0] == next(iter(wrong))
    assert client.get("/cache/settings").json()["settings"] == before


def test_no_setting_at_all_is_422(front):
    answer = front().post("/cache/settings", {})
    assert (answer.status_code, "nothing to change" in error(answer)["message"]) == (422, True)


def test_every_setting_that_can_change_is_one():
    assert set(CHANGEABLE) <= set(SETTINGS)


def test_settings_are_json_whatever_they_are(front, tmp_path):
    cache = CacheManager(ttl=float("inf"), admission={"empty": True}, supported_call_types=("chat",))
    told = front(cache=cache).get("/cache/settings")
    settings = json.loads(told.text, parse_constant=pytest.fail)["settings"]
    assert (settings["ttl"], settings["admission"]) == ("inf", {"empty": True})
    assert told.json()["changeable"] == list(CHANGEABLE)
