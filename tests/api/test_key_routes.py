"""API keys over HTTP on both fronts: made, shown, changed, refused (R67-R80), and what they say of the cache
(C26-C28, C50)."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path

import pytest

from llm_middleware.keys.record import KeyRecord
from llm_middleware.keys.resolver import KeyResolver
from llm_middleware.testing import FakeClock
from tests.api.clients import CHAT, MASTER, Client, chat
from tests.services import HOST

pytestmark = pytest.mark.usefixtures("environment")

STORES = ["memory", "sqlite", "redis"]


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> object:
    if request.param == "sqlite":
        return {"type": "sqlite", "path": str(tmp_path / "keys.db")}
    if request.param == "redis":
        return {"type": "redis", "host": HOST, "port": request.getfixturevalue("redis").port}
    return None


def error(answer) -> dict[str, object]:
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def status(client: Client, key: str | None, text: str = "hi", **fields: object) -> int:
    return client.post(CHAT, chat(text, **fields), key=key).status_code


def cached(client: Client, key: str, text: str = "hi", **options: object) -> str:
    answer = client.post(CHAT, chat(text, **options.pop("fields", {})), key=key, **options)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-llm-cache"]


def token(client: Client, key: str) -> str:
    return client.get("/key/info", key=key).json()["key"]


# --- making and refusing keys


def test_r67_a_key_is_made_without_a_database_and_works(front, store):
    client = front({"keys": {"master_key": MASTER, "store": store}})
    assert status(client, client.new_key()) == 200


def test_r67_a_key_is_answered_with_litellms_fields(front):
    client = front()
    wish = {
        "key_alias": "app",
        "user_id": "u",
        "team_id": "t",
        "models": ["gpt"],
        "aliases": {"mine": "gpt"},
        "metadata": {"a": 1},
        "max_budget": 2.5,
        "budget_duration": "30d",
        "rpm_limit": 10,
        "tpm_limit": 1000,
        "max_parallel_requests": 3,
        "duration": None,
    }
    answer = client.post("/key/generate", wish)
    told = answer.json()
    assert answer.headers["cache-control"] == "no-store"
    assert told["key"].startswith("sk-")
    assert len(told["key"]) == 46
    assert told["key_name"] == f"sk-...{told['key'][-4:]}"
    assert told["expires"] is None
    assert told["token"] == told["token_id"]
    assert {name: told[name] for name in wish if name != "duration"} == {
        name: value for name, value in wish.items() if name != "duration"
    }


def test_the_early_form_makes_a_key(front):
    client = front()
    told = client.post("/key/generate", {"config": {"any": "thing"}, "duration": "30d"}).json()
    assert told["key"].startswith("sk-")
    left = datetime.fromisoformat(told["expires"]).timestamp() - datetime.now().timestamp()
    assert round(left / 86400) == 30
    assert told["config"] == {"any": "thing"}
    assert status(client, told["key"]) == 200


def test_a_key_of_ones_own_choice_is_taken_once(front):
    client = front()
    mine = "sk-my-own-key-0123456789"
    assert client.new_key(key=mine) == mine
    assert status(client, mine) == 200
    for key, code in ((mine, "key_exists"), ("abc", "invalid_request"), (MASTER, "invalid_request")):
        answer = client.post("/key/generate", {"key": key})
        assert (answer.status_code, error(answer)["code"]) == (400, code)
        assert key not in answer.text


def test_r68_a_wrong_or_missing_key_is_401(front, store):
    client = front({"keys": {"master_key": MASTER, "store": store}})
    good = client.new_key()
    for key in (None, "", "x", "sk-", "sk-wrong", good[:-1], good + "x", good.upper(), "sk-" + "a" * 5000):
        answer = client.post(CHAT, chat(), key=key)
        assert (answer.status_code, error(answer)["code"]) == (401, "invalid_api_key")
        assert good[:-1] not in answer.text
    assert status(client, good) == 200


@pytest.mark.parametrize("header", ["x-api-key", "api-key"])
def test_keys_may_come_in_other_headers(front, header):
    client = front()
    key = client.new_key()
    assert client.post(CHAT, chat(), key=None, headers={header: key}).status_code == 200
    assert client.get("/key/info", key=None, headers={header: key}).status_code == 200


def test_r69_a_key_is_over_after_its_duration(front):
    clock = FakeClock()
    client = front(keys=KeyResolver(master_key=MASTER, clock=clock))
    key = client.new_key(duration="1s")
    assert status(client, key) == 200
    clock.advance(2)
    answer = client.post(CHAT, chat(), key=key)
    assert (answer.status_code, error(answer)["code"]) == (401, "expired_key")


@pytest.mark.parametrize("duration", ["1d2h", "5minutes", "1m3x", "0s", "-1s", "", "1.5h", 60, " 1h", "1h "])
def test_r70_a_duration_that_is_none_is_400(front, duration):
    answer = front().post("/key/generate", {"duration": duration})
    assert (answer.status_code, error(answer)["param"]) == (400, "duration")


def test_r70_hours_and_minutes_are_one_duration(front):
    clock = FakeClock()
    client = front(keys=KeyResolver(master_key=MASTER, clock=clock))
    told = client.post("/key/generate", {"duration": "1h30m"}).json()
    assert datetime.fromisoformat(told["expires"]).timestamp() == clock.now + 5400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"modles": ["gpt"]}, "modles"),
        ({"models": "gpt"}, "models"),
        ({"rpm_limit": -1}, "rpm_limit"),
        ({"metadata": {"cache": {"no-stor": True}}}, "metadata.cache.no-stor"),
        ({"guardrails": ["x"]}, "guardrails"),
        ({"aliases": {"a": 1}}, "aliases.a"),
    ],
)
def test_a_wrong_field_is_400_and_makes_no_key(front, fields, param):
    client = front()
    answer = client.post("/key/generate", fields)
    assert (answer.status_code, error(answer)["param"]) == (400, param)
    assert client.get("/key/list").json()["total_count"] == 0


# --- what a key may use


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat(model="other")),
        (CHAT + "?model=other", chat()),
        (CHAT, chat(model="alias")),
        (CHAT, chat(fallbacks=["other"])),
        (CHAT, chat(fallbacks=["nobodys", "other"])),
        (CHAT, chat(model="other", stream=True)),
        ("/engines/other/chat/completions", chat()),
        ("/openai/deployments/other/chat/completions", chat()),
        ("/v1/completions", {"model": "other", "prompt": "hi"}),
        ("/v1/embeddings", {"model": "other", "input": "hi"}),
        ("/v1/responses", {"model": "other", "input": "hi"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_r73_a_key_reaches_no_model_but_its_own(front, upstream, path, body):
    client = front()
    key = client.new_key(models=["gpt"], aliases={"alias": "other"})
    before = upstream.count
    answer = client.post(path, body, key=key)
    assert (answer.status_code, error(answer)["type"]) == (403, "permission_error")
    assert upstream.count == before
    assert status(client, key) == 200


def test_r73_a_stored_answer_of_another_model_is_not_given_either(front):
    client = front()
    full, narrow = client.new_key(team_id="t"), client.new_key(team_id="t", models=["gpt"])
    assert cached(client, full, fields={"model": "other"}) == "miss"
    assert cached(client, full, fields={"model": "other"}) == "hit"
    assert status(client, narrow, model="other") == 403


def test_r73_an_alias_of_the_keys_own_is_followed(front, upstream):
    client = front()
    key = client.new_key(models=["gpt"], aliases={"mine": "gpt"})
    assert status(client, key, "by its alias", model="mine") == 200
    assert upstream.calls[-1].json["model"] == "gpt-up"


def test_models_are_listed_by_what_the_key_may_use(front):
    client = front()
    key = client.new_key(models=["g*"])
    told = client.get("/v1/models", key=key).json()
    assert [model["id"] for model in told["data"]] == ["gpt"]
    assert client.get("/v1/models/gpt", key=key).status_code == 200
    answer = client.get("/v1/models/other", key=key)
    assert (answer.status_code, error(answer)["code"]) == (404, "model_not_found")
    assert len(client.get("/models").json()["data"]) == 2


# --- showing, changing, removing


def test_r79_the_callers_key_is_shown_without_naming_it(front):
    client = front()
    key = client.new_key(key_alias="mine", models=["gpt"])
    for answer in (
        client.get("/key/info", key=key),
        client.post("/key/info", key=key),
        client.post("/key/info", {}, key=key),
    ):
        told = answer.json()
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "no-store"
        assert (told["info"]["key_alias"], told["info"]["models"]) == ("mine", ["gpt"])
        assert told["key"] == told["info"]["token"]
        assert key not in answer.text


def test_r79_an_admin_names_a_key_by_its_id_or_in_the_body(front):
    client = front()
    key = client.new_key(key_alias="mine")
    named = token(client, key)
    for answer in (
        client.get(f"/key/info?key={named}"),
        client.post("/key/info", {"key": key}),
        client.post("/key/info", {"key": named}),
    ):
        assert answer.json()["info"]["key_alias"] == "mine"
        assert key not in answer.text
    answer = client.get(f"/key/info?key={'0' * 64}")
    assert (answer.status_code, error(answer)["code"]) == (404, "key_not_found")


def test_r79_who_is_no_admin_sees_only_the_own_key(front):
    client = front()
    mine, theirs = client.new_key(), client.new_key()
    own, other = token(client, mine), token(client, theirs)
    for answer in (
        client.get(f"/key/info?key={own}", key=mine),
        client.post("/key/info", {"key": mine}, key=mine),
    ):
        assert answer.json()["key"] == own
    for answer in (
        client.get(f"/key/info?key={other}", key=mine),
        client.get(f"/key/info?key={'0' * 64}", key=mine),
        client.post("/key/info", {"key": theirs}, key=mine),
        client.post("/key/info", {"key": MASTER}, key=mine),
    ):
        assert (answer.status_code, error(answer)["type"]) == (403, "permission_error")


def test_r79_the_master_key_shows_itself(front):
    client = front()
    told = client.get("/key/info").json()
    assert (told["info"]["admin"], told["info"]["models"]) == (True, [])


def test_a_key_is_changed_and_holds_what_is_not_named(front, store):
    client = front({"keys": {"master_key": MASTER, "store": store}})
    key = client.new_key(models=["gpt"], user_id="u")
    assert status(client, key, model="other") == 403
    told = client.post("/key/update", {"key": key, "models": ["gpt", "other"]}).json()
    assert (told["key"], told["models"], told["user_id"]) == (token(client, key), ["gpt", "other"], "u")
    assert status(client, key, model="other") == 200
    assert client.post("/key/update", {"key": told["key"], "models": []}).json()["models"] == []
    for body, code, param in (
        ({"models": []}, 400, "key"),
        ({"key": 7, "models": []}, 400, "key"),
        ({"key": "0" * 64, "models": []}, 404, "key"),
        ({"key": key, "modles": []}, 400, "modles"),
    ):
        answer = client.post("/key/update", body)
        assert (answer.status_code, error(answer)["param"]) == (code, param)


def test_r71_a_deleted_key_is_refused_at_once(front, store):
    client = front({"keys": {"master_key": MASTER, "store": store}})
    first, second = client.new_key(), client.new_key()
    assert (status(client, first), status(client, second)) == (200, 200)
    ids = [token(client, first), token(client, second)]
    answer = client.post("/key/delete", {"keys": [first, ids[1], "0" * 64]})
    assert (answer.status_code, sorted(answer.json()["deleted_keys"])) == (200, sorted(ids))
    assert (status(client, first), status(client, second)) == (401, 401)
    assert client.post("/key/delete", {"keys": [first]}).json() == {"deleted_keys": []}


@pytest.mark.parametrize(
    "body", [{}, {"keys": "sk-a"}, {"keys": [7]}, {"keys": [""]}, {"keys": [], "key": "a"}]
)
def test_a_wrong_wish_to_delete_is_400(front, body):
    answer = front().post("/key/delete", body)
    assert (answer.status_code, error(answer)["type"]) == (400, "invalid_request_error")


def test_a_blocked_key_is_403_until_it_is_unblocked(front):
    client = front()
    key = client.new_key()
    assert client.post("/key/block", {"key": key}).json()["blocked"] is True
    answer = client.post(CHAT, chat(), key=key)
    assert (answer.status_code, error(answer)["code"]) == (403, "blocked_key")
    assert client.post("/key/unblock", {"key": key}).json()["blocked"] is False
    assert status(client, key) == 200
    answer = client.post("/key/block", {"key": key, "blocked": False})
    assert (answer.status_code, error(answer)["param"]) == (400, "blocked")


def test_a_key_gets_another_secret_and_keeps_the_rest(front):
    client = front()
    old = client.new_key(models=["gpt"], key_alias="mine")
    told = client.post("/key/regenerate", {"key": old, "rpm_limit": 7}).json()
    assert told["key"] != old
    assert (told["models"], told["key_alias"], told["rpm_limit"]) == (["gpt"], "mine", 7)
    assert (status(client, old), status(client, told["key"])) == (401, 200)


def test_keys_are_listed_in_pages(front):
    client = front()
    for number in range(5):
        client.new_key(user_id=f"u{number % 2}", team_id="t", key_alias=str(number))
    told = client.get("/key/list?page=2&size=2").json()
    assert [key["key_alias"] for key in told["keys"]] == ["2", "1"]
    assert (told["total_count"], told["current_page"], told["total_pages"]) == (5, 2, 3)
    assert client.get("/key/list?user_id=u1").json()["total_count"] == 2
    assert client.get("/key/list?team_id=none").json()["keys"] == []
    for query in ("page=0", "size=x", "size=100000", "page=-1", "size=²"):
        answer = client.get(f"/key/list?{query}")
        assert (answer.status_code, error(answer)["param"]) == (400, query.partition("=")[0])


def test_r80_no_key_is_kept_or_logged(front, store, tmp_path, redis, caplog):
    caplog.set_level(logging.DEBUG)
    client = front({"keys": {"master_key": MASTER, "store": store}})
    keys = [client.new_key(), client.new_key(key="sk-my-own-key-0123456789")]
    keys.append(client.post("/key/regenerate", {"key": keys[0]}).json()["key"])
    for key in keys:
        status(client, key)
        client.post("/key/info", {"key": key})
    client.close()
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    kept += b"".join(redis.ask("DUMP", name) or b"" for name in redis.ask("KEYS", "*"))
    for key in (*keys, MASTER):
        assert key.encode() not in kept
        assert key not in caplog.text
    assert not isinstance(store, dict) or kept


def test_without_keys_the_answer_says_what_to_configure(front):
    client = front({"keys": None})
    for answer in (client.get("/key/info", key=None), client.post("/key/info", {"key": "sk-a"}, key=None)):
        assert (answer.status_code, error(answer)["code"]) == (404, "keys_not_configured")
        assert "general_settings.master_key" in error(answer)["message"]


def test_whom_the_host_lets_in_is_shown_and_manages_no_keys(front):
    client = front(
        {"keys": None}, authorize=lambda head: KeyRecord(id="root", alias="the host's", admin=True)
    )
    told = client.get("/key/info", key=None).json()
    assert (told["key"], told["info"]["key_alias"]) == ("root", "the host's")
    answer = client.post("/key/generate", key=None)
    assert (answer.status_code, error(answer)["code"]) == (404, "keys_not_configured")


def test_a_key_of_the_hosts_own_function_is_shown(front):
    known = {"sk-of-the-host-0123456789": KeyRecord(id="h", alias="host", models=("gpt",))}
    client = front(keys=KeyResolver(master_key=MASTER, resolve=known.get))
    key = next(iter(known))
    assert client.get("/key/info", key=key).json()["info"]["key_alias"] == "host"
    assert (status(client, key), status(client, key, model="other")) == (200, 403)


# --- what keys say of the cache


def test_c26_r78_a_control_that_the_key_does_not_allow_is_403(front):
    client = front()
    key = client.new_key(allowed_cache_controls=["no-cache"])
    assert status(client, key, cache={"no-cache": True}) == 200
    for control in (
        {"ttl": 60},
        {"no-store": True},
        {"s-maxage": 1},
        {"namespace": "x"},
        {"no-cache": True, "ttl": 1},
    ):
        answer = client.post(CHAT, chat(cache=control), key=key)
        assert (answer.status_code, error(answer)["param"]) == (403, f"cache.{list(control)[-1]}")
    answer = client.post(CHAT, chat(), key=key, headers={"cache-control": "no-store"})
    assert (answer.status_code, error(answer)["param"]) == (403, "cache.no-store")


def test_c27_what_the_key_forbids_the_client_cannot_allow(front, upstream):
    client = front()
    key = client.new_key(metadata={"cache": {"no-cache": True}})
    before = upstream.count
    for _ in range(2):
        assert cached(client, key, fields={"cache": {"no-cache": False}}) == "miss"
    assert upstream.count == before + 2


def test_c28_r77_a_namespace_of_the_keys_own_is_applied(front):
    client = front()
    plain = client.new_key(team_id="t")
    apart = client.new_key(team_id="t", metadata={"cache": {"namespace": "apart"}})
    assert cached(client, plain) == "miss"
    assert cached(client, apart) == "miss"
    assert cached(client, apart, fields={"cache": {"namespace": "elsewhere"}}) == "hit"
    assert cached(client, plain, fields={"cache": {"namespace": "apart"}}) == "hit"


def test_c28_r77_a_key_uses_the_cache_where_others_do_not(front):
    client = front({"cache": {"type": "local", "mode": "default_off"}})
    plain = client.new_key(team_id="t")
    using = client.new_key(team_id="t", metadata={"cache": {"use-cache": True}})
    assert (cached(client, plain), cached(client, plain)) == ("bypass", "bypass")
    assert (cached(client, using), cached(client, using)) == ("miss", "hit")


def test_r77_the_controls_of_key_and_request_both_apply(front):
    client = front({"cache": {"type": "local", "ttl_jitter": 0}})
    key = client.new_key(metadata={"cache": {"no-store": True}})
    wish = {"cache": {"ttl": 600, "no-store": False}}
    assert (cached(client, key, fields=wish), cached(client, key, fields=wish)) == ("miss", "miss")
    key = client.new_key(metadata={"cache": {"namespace": "n"}})
    assert cached(client, key, fields=wish) == "miss"
    (row,) = client.get("/cache/entries").json()["entries"]
    assert round(row["age"] + row["ttl"], 2) == 600


def test_c50_the_keys_word_goes_before_the_bodys_and_that_before_the_headers(front):
    client = front()
    plain, key = client.new_key(), client.new_key(metadata={"cache": {"no-cache": True}})
    fresh = {"cache-control": "no-cache"}
    assert cached(client, plain) == "miss"
    assert cached(client, plain, headers=fresh) == "miss"
    assert cached(client, plain, headers=fresh, fields={"cache": {"no-cache": False}}) == "hit"
    assert cached(client, plain, headers={"cache-control": "max-age=600"}) == "hit"
    assert (
        cached(client, plain, headers={"cache-control": "max-age=600"}, fields={"cache": {"s-maxage": 0}})
        == "miss"
    )
    assert cached(client, key) == "miss"
    assert (
        cached(client, key, headers={"cache-control": "max-age=600"}, fields={"cache": {"no-cache": False}})
        == "miss"
    )


def test_r76_a_limit_of_requests_is_429_and_says_for_how_long(front):
    clock = FakeClock()
    client = front(keys=KeyResolver(master_key=MASTER, clock=clock))
    key = client.new_key(rpm_limit=2)
    assert status(client, key, "1") == 200
    clock.advance(20)
    assert status(client, key, "1") == 200
    answer = client.post(CHAT, chat("1"), key=key)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "40")
    assert error(answer)["code"] == "rate_limit_exceeded"
    clock.advance(40)
    assert status(client, key, "1") == 200
