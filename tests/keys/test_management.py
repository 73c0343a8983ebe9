"""What an administrator does with keys, on both faces and in several stores."""

from __future__ import annotations

import json
import re
from datetime import datetime

import pytest

from llm_middleware.errors import (
    BlockedKeyError,
    ConfigError,
    InvalidKeyError,
    InvalidRequestError,
    KeyNotFoundError,
)
from llm_middleware.keys.resolver import KeyResolver

OWN = "sk-my-own-key-0123456789"


def test_a_key_is_made_and_works(place, face) -> None:
    """R67: with no database."""
    resolver = place.resolver()
    now = place.clock()
    made = face.do(
        resolver,
        "generate",
        key_alias="ci",
        user_id="ann",
        team_id="red",
        models=["openai/gpt-4.1*"],
        aliases={"fast": "openai/gpt-4.1-mini"},
        metadata={"cache": {"no-store": True}, "cost_centre": 7},
        allowed_cache_controls=["no-cache", "ttl"],
        duration="1h30m",
        rpm_limit=10,
        tpm_limit=1000,
        max_parallel_requests=3,
        max_budget=2,
        budget_duration="7d",
        config={"early": True},
    )
    assert re.fullmatch(r"sk-[A-Za-z0-9_-]{43}", made["key"])
    assert made["key_name"] == "sk-..." + made["key"][-4:]
    assert made["token"] == made["token_id"]
    assert datetime.fromisoformat(made["expires"]).timestamp() == now + 5400
    assert datetime.fromisoformat(made["budget_reset_at"]).timestamp() == now + 604800
    record = face.do(resolver, "resolve", made["key"])
    assert (record.id, record.alias, record.user, record.team) == (made["token"], "ci", "ann", "red")
    assert record.may_use("openai/gpt-4.1-nano")
    assert not record.may_use("openai/gpt-4x1")
    assert record.aliases == {"fast": "openai/gpt-4.1-mini"}
    assert record.cache == {"no-store": True}
    assert record.metadata["cost_centre"] == 7
    assert record.allowed_cache_controls == frozenset({"no-cache", "ttl"})
    assert (record.expires, record.budget_resets) == (now + 5400, now + 604800)
    assert (record.rpm_limit, record.tpm_limit, record.max_parallel_requests) == (10, 1000, 3)
    assert (record.max_budget, record.budget_duration, record.spend) == (2.0, "7d", 0.0)
    assert (record.blocked, record.admin, record.stored) == (False, False, True)
    assert record.config == {"early": True}


def test_the_early_form(place, face) -> None:
    made = face.do(place.resolver(), "generate", config={"a": 1}, duration="30d")
    assert made["key"].startswith("sk-")
    assert datetime.fromisoformat(made["expires"]).timestamp() == place.clock() + 30 * 86400
    assert made["expires"].endswith("Z")


def test_a_key_for_ever(place, face) -> None:
    """R70: null."""
    resolver = place.resolver()
    for fields in ({}, {"duration": None}):
        made = face.do(resolver, "generate", **fields)
        assert made["expires"] is None
        place.clock.advance(3e9)
        assert face.do(resolver, "resolve", made["key"]).expires is None


def test_info_by_key_or_id(place, face) -> None:
    """R79: the id, which is no secret, does as well as the key."""
    resolver = place.resolver()
    made = face.do(resolver, "generate", key_alias="x")
    by_key = face.do(resolver, "info", made["key"])
    assert face.do(resolver, "info", made["token"]) == by_key
    expected = {name: value for name, value in made.items() if name != "key"}
    assert by_key == {"key": made["token"], "info": expected}
    assert made["key"] not in json.dumps(by_key)


def test_a_key_of_ones_own(place, face) -> None:
    resolver = place.resolver(master_key="sk-master-0123456789-0123")
    assert face.do(resolver, "generate", key=OWN)["key"] == OWN
    assert face.do(resolver, "resolve", OWN).name == "sk-...6789"
    for key, says in [
        (OWN, "there is such a key"),
        ("sk-master-0123456789-0123", "the master key"),
        ("sk-short", "20 to 256"),
        ("pk-" + "x" * 40, "expected"),
        ("sk-" + "x" * 300, "expected"),
        ("sk-with a space in it 123", "visible ASCII"),
        ("sk-ümläut-0123456789-0123", "visible ASCII"),
        (17, "expected"),
    ]:
        with pytest.raises(InvalidRequestError, match=re.escape(says)) as caught:
            face.do(resolver, "generate", key=key)
        assert caught.value.param == "key"
        assert str(key) not in caught.value.message


def test_update_changes_what_is_given(place, face) -> None:
    resolver = place.resolver()
    made = face.do(resolver, "generate", rpm_limit=5, key_alias="a", max_budget=1.0, duration="1h")
    place.clock.advance(1)
    changed = face.do(resolver, "update", made["key"], rpm_limit=None, team_id="t", duration=None)
    assert (changed["rpm_limit"], changed["team_id"], changed["expires"]) == (None, "t", None)
    assert (changed["key_alias"], changed["max_budget"]) == ("a", 1.0)
    assert changed["created_at"] == made["created_at"] < changed["updated_at"]
    record = face.do(resolver, "resolve", made["key"])
    assert (record.rpm_limit, record.team, record.expires, record.max_budget) == (None, "t", None, 1.0)
    assert face.do(resolver, "update", made["token"], spend=3, budget_duration="1d")["spend"] == 3.0
    assert face.do(resolver, "info", made["key"])["info"]["budget_reset_at"] is not None


def test_delete(place, face) -> None:
    resolver = place.resolver()
    made = [face.do(resolver, "generate") for _ in range(3)]
    gone = face.do(resolver, "delete", [made[0]["key"], made[1]["token"], "sk-nobody-0123456789"])
    assert gone == sorted([made[0]["token"], made[1]["token"]], key=gone.index)
    assert len(gone) == 2
    for each in made[:2]:
        assert resolver.known(each["key"]) is None
        with pytest.raises(InvalidKeyError):
            face.do(resolver, "resolve", each["key"])
    assert face.do(resolver, "resolve", made[2]["key"]).id == made[2]["token"]
    assert face.do(resolver, "delete", made[2]["key"]) == [made[2]["token"]]
    assert face.do(resolver, "delete", []) == []


def test_regenerate(place, face) -> None:
    resolver = place.resolver()
    made = face.do(resolver, "generate", user_id="u", max_budget=5, spend=2, models=["gpt"])
    face.do(resolver, "resolve", made["key"])
    place.clock.advance(5)
    new = face.do(resolver, "regenerate", made["key"], max_budget=9)
    assert new["key"] != made["key"]
    assert (new["user_id"], new["max_budget"], new["spend"], new["models"]) == ("u", 9.0, 2.0, ["gpt"])
    assert new["created_at"] == made["created_at"]
    assert new["key_name"] == "sk-..." + new["key"][-4:]
    with pytest.raises(InvalidKeyError):
        face.do(resolver, "resolve", made["key"])
    assert face.do(resolver, "resolve", new["key"]).max_budget == 9.0
    assert face.do(resolver, "regenerate", new["token"], new_key=OWN)["key"] == OWN
    other = face.do(resolver, "generate")
    with pytest.raises(InvalidRequestError, match="there is such a key") as caught:
        face.do(resolver, "regenerate", other["key"], new_key=OWN)
    assert caught.value.param == "new_key"
    assert face.do(resolver, "resolve", other["key"]).id == other["token"]


def test_block_and_unblock(place, face) -> None:
    resolver = place.resolver()
    key = face.do(resolver, "generate")["key"]
    face.do(resolver, "resolve", key)
    assert face.do(resolver, "block", key)["blocked"] is True
    assert resolver.known(key) is None
    with pytest.raises(BlockedKeyError) as caught:
        face.do(resolver, "resolve", key)
    assert (caught.value.status, caught.value.code) == (403, "blocked_key")
    assert face.do(resolver, "unblock", key)["blocked"] is False
    assert face.do(resolver, "resolve", key).blocked is False


def test_list(place, face) -> None:
    resolver = place.resolver()
    for number in range(5):
        face.do(resolver, "generate", key_alias=str(number), user_id="ann" if number % 2 else "bob")
        place.clock.advance(1)
    first = face.do(resolver, "list", 1, 2)
    assert [key["key_alias"] for key in first["keys"]] == ["4", "3"]
    assert (first["total_count"], first["current_page"], first["total_pages"]) == (5, 1, 3)
    assert [key["key_alias"] for key in face.do(resolver, "list", 3, 2)["keys"]] == ["0"]
    anns = face.do(resolver, "list", user_id="ann")
    assert ([key["key_alias"] for key in anns["keys"]], anns["total_count"]) == (["3", "1"], 2)
    assert face.do(resolver, "list", team_id="none")["keys"] == []
    assert "key" not in first["keys"][0]


@pytest.mark.parametrize(
    ("page", "size", "param"),
    [(0, 1, "page"), (1, 0, "size"), (1, 1001, "size"), ("1", 1, "page"), (True, 1, "page")],
)
def test_a_wrong_page(page, size, param, face) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        face.do(KeyResolver(), "list", page, size)
    assert caught.value.param == param


def test_a_key_that_there_is_not(place, face) -> None:
    resolver = place.resolver()
    for method in ("info", "update", "block", "unblock", "regenerate"):
        with pytest.raises(KeyNotFoundError) as caught:
            face.do(resolver, method, "sk-nobody-0123456789")
        assert (caught.value.status, caught.value.code) == (404, "key_not_found")
    assert face.do(resolver, "list")["keys"] == []
    for method in ("info", "update", "block", "regenerate"):
        with pytest.raises(InvalidRequestError):
            face.do(resolver, method, "")


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"key_alais": "x"}, "key_alais", "did you mean 'key_alias'"),
        ({"modles": []}, "modles", "did you mean 'models'"),
        ({"expires": "2030"}, "expires", "unknown field"),
        ({"permissions": {"pii": False}}, "permissions", "not supported"),
        ({"guardrails": ["x"]}, "guardrails", "not supported"),
        ({"tags": ["x"]}, "tags", "not supported"),
        ({"model_rpm_limit": {"a": 1}}, "model_rpm_limit", "not supported"),
        ({"models": "gpt"}, "models", "a list"),
        ({"models": [1]}, "models[]", "string"),
        ({"models": [""]}, "models[]", "string"),
        ({"models": ["all-team-models"]}, "models", "not supported"),
        ({"aliases": {"a": 1}}, "aliases.a", "name of a model"),
        ({"aliases": ["a"]}, "aliases", "an object"),
        ({"metadata": {"cache": {"no-stor": True}}}, "metadata.cache.no-stor", "no-store"),
        ({"metadata": {"cache": {"ttl": "soon"}}}, "metadata.cache.ttl", "seconds"),
        ({"metadata": {"x": object()}}, "metadata", "not JSON"),
        ({"metadata": {"x": float("nan")}}, "metadata", "not JSON"),
        ({"metadata": {"x": "y" * 70000}}, "metadata", "65536"),
        ({"config": 3}, "config", "an object"),
        ({"allowed_cache_controls": ["no-cash"]}, "allowed_cache_controls.no-cash", "no-cache"),
        ({"allowed_cache_controls": "no-cache"}, "allowed_cache_controls", "a list"),
        ({"rpm_limit": -1}, "rpm_limit", "whole number"),
        ({"rpm_limit": 1.5}, "rpm_limit", "whole number"),
        ({"tpm_limit": True}, "tpm_limit", "whole number"),
        ({"max_parallel_requests": "3"}, "max_parallel_requests", "whole number"),
        ({"max_budget": -0.1}, "max_budget", "a number"),
        ({"max_budget": float("inf")}, "max_budget", "a number"),
        ({"max_budget": float("nan")}, "max_budget", "a number"),
        ({"spend": "1"}, "spend", "a number"),
        ({"blocked": "yes"}, "blocked", "true or false"),
        ({"admin": 1}, "admin", "true or false"),
        ({"key_alias": 5}, "key_alias", "string"),
        ({"user_id": "x" * 300}, "user_id", "256"),
        ({"team_id": "a\x00b"}, "team_id", "printable"),
        ({"team_id": "\ud800"}, "team_id", "printable"),
        ({"duration": "1d2h"}, "duration", "expected"),
        ({"duration": 3600}, "duration", "expected"),
        ({"budget_duration": "0s"}, "budget_duration", "expected"),
    ],
)
def test_wrong_fields_are_named_before_anything_is_written(fields, param, says, face) -> None:
    resolver = KeyResolver()
    key = resolver.generate(key_alias="kept")["key"]
    before = resolver.info(key)
    for method, target in (("generate", ()), ("update", (key,)), ("regenerate", (key,))):
        with pytest.raises(InvalidRequestError) as caught:
            face.do(resolver, method, *target, **fields)
        assert caught.value.param == param
        assert says in caught.value.message
        assert caught.value.status == 400
    assert resolver.info(key) == before
    assert resolver.list()["total_count"] == 1


def test_what_is_not_supported_may_be_empty(face) -> None:
    made = face.do(
        KeyResolver(),
        "generate",
        permissions={},
        tags=[],
        guardrails=None,
        soft_budget=None,
        send_invite_email=False,
    )
    assert "permissions" not in made


def test_no_controls_are_all_of_them(face) -> None:
    resolver = KeyResolver()
    key = face.do(resolver, "generate", allowed_cache_controls=[])["key"]
    assert face.do(resolver, "resolve", key).allowed_cache_controls is None


def test_what_was_given_is_not_shared(face) -> None:
    resolver = KeyResolver()
    metadata = {"list": [1]}
    made = face.do(resolver, "generate", metadata=metadata)
    metadata["list"].append(2)
    face.do(resolver, "info", made["key"])["info"]["metadata"]["list"].append(3)
    assert face.do(resolver, "info", made["key"])["info"]["metadata"] == {"list": [1]}


def test_no_raw_key_is_anywhere(everywhere, face, caplog) -> None:
    """R80: the whole store is dumped; and nothing is logged."""
    caplog.set_level(0)
    resolver = everywhere.resolver(master_key="sk-master-0123456789-0123")
    keys = [
        face.do(resolver, "generate", key_alias="a", rpm_limit=9, max_budget=1.0)["key"] for _ in range(3)
    ]
    keys.append(face.do(resolver, "generate", key=OWN)["key"])
    keys.append(face.do(resolver, "regenerate", keys[0])["key"])
    for key in keys[1:]:
        record = face.do(resolver, "resolve", key)
        face.do(resolver, "admit", record)
        face.do(face.do(resolver, "begin", record, 5), "end", tokens=1, cost=0.1)
    for wrong in (keys[0], "sk-somebody-else-0123456789"):
        with pytest.raises(InvalidKeyError) as caught:
            face.do(resolver, "resolve", wrong)
        assert wrong[3:] not in repr(caught.value) + caught.value.body().decode()
    dump = everywhere.dump() + caplog.text.encode() + repr(vars(resolver)).encode()
    assert keys[1][-4:].encode() in dump  # it is the right place
    for key in [*keys, "sk-master-0123456789-0123", "sk-somebody-else-0123456789"]:
        assert key.encode() not in dump
        assert key[3:].encode() not in dump


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"master_key": ""}, "master_key"),
        ({"master_key": 5}, "master_key"),
        ({"ttl": -1}, "ttl"),
        ({"ttl": "60"}, "ttl"),
        ({"negative_ttl": float("inf")}, "negative_ttl"),
        ({"resolve": "f"}, "resolve"),
        ({"limits": {"hodl": 5}}, "limits.hodl"),
        ({"limits": {"hold": 0}}, "limits.hold"),
        ({"limits": {"first_share": -1}}, "limits.first_share"),
        ({"limits": 5}, "limits"),
        ({"store": {"type": "sqlit"}}, "store.type"),
        ({"master_key": "os.environ/NO_SUCH_VARIABLE"}, "master_key"),
    ],
)
def test_wrong_settings(options, param) -> None:
    with pytest.raises(ConfigError) as caught:
        KeyResolver(**options)
    assert caught.value.param == param
