"""Which models a key may use, for whom its answers are kept, and what is told of it."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_middleware.errors import ConfigError
from llm_middleware.keys.pattern import matches
from llm_middleware.keys.record import KeyRecord, id_of, masked, new_key


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("openai/gpt-4.1*", "openai/gpt-4.1", True),
        ("openai/gpt-4.1*", "openai/gpt-4.1-mini", True),
        ("openai/gpt-4.1*", "openai/gpt-4x1-foo", False),  # R74
        ("openai/gpt-4.1*", "xopenai/gpt-4.1", False),
        ("openai/gpt-4.1", "openai/gpt-4.1-mini", False),
        ("openai/gpt-4*-mini", "openai/gpt-4o-mini", True),
        ("openai/gpt-4*-mini", "openai/gpt-4o-mini-2024-x", False),
        ("openai/*", "openai/a/b", True),
        ("*", "anything", True),
        ("a*a", "a", False),
        ("a*a", "aa", True),
        ("*a*b*", "xxayyb", True),
        ("*ab*ba*", "aba", False),
        ("gpt-[45]", "gpt-4", False),
        ("gpt.", "gptx", False),
        ("gpt?", "gptx", False),
        ("GPT", "gpt", False),
        ("gpt*", "gpt\nx", True),
    ],
)
def test_patterns(pattern: str, name: str, fits: bool) -> None:
    """R74."""
    assert matches(name, [pattern]) is fits
    assert KeyRecord(id="x", models=(pattern,)).may_use(name) is fits


@given(st.text("ab*.", max_size=8), st.text("ab.\n", max_size=10))
def test_a_star_is_any_text_and_nothing_else_is(pattern: str, name: str) -> None:
    expected = re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), name, re.DOTALL) is not None
    assert matches(name, [pattern]) is expected


def test_no_name_takes_long() -> None:
    started = time.process_time()
    assert matches("a" * 100_000, ["*a" * 100 + "b"]) is False
    assert time.process_time() - started < 2


def test_no_models_are_all() -> None:
    assert KeyRecord(id="x").may_use("gpt") is True
    assert KeyRecord(id="x", models=("all-proxy-models",)).may_use("gpt") is True
    assert KeyRecord(id="x", models=("a", "b")).may_use("b") is True
    assert KeyRecord(id="x", models=("a", "b")).may_use("c") is False
    assert KeyRecord(id="x", models=("a",)).may_use("") is False


@pytest.mark.parametrize(
    ("known", "scopes"),
    [
        ({"team": "t", "user": "u"}, ["", "team:t", "user:u", "key:i"]),
        ({"user": "u"}, ["", "user:u", "user:u", "key:i"]),
        ({"team": "t"}, ["", "team:t", "key:i", "key:i"]),
        ({}, ["", "key:i", "key:i", "key:i"]),
    ],
)
def test_scopes(known: dict[str, str], scopes: list[str]) -> None:
    record = KeyRecord(id="i", **known)
    assert [record.scope(share) for share in ("all", "team", "user", "key")] == scopes


def test_a_team_is_no_user_of_its_name() -> None:
    assert KeyRecord(id="i", team="x").scope("team") != KeyRecord(id="i", user="x").scope("team")


def test_an_unknown_share() -> None:
    with pytest.raises(ConfigError, match="'teams'") as caught:
        KeyRecord(id="x").scope("teams")
    assert caught.value.param == "share"


def test_keys_are_random_and_known_by_their_hash() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(re.fullmatch(r"sk-[A-Za-z0-9_-]{43}", key) for key in keys)
    assert id_of("sk-1234") == "88dc28d0f030c55ed4ab77ed8faf098196cb1c05df778539800c9f1243fe6b4b"
    assert id_of(id_of("sk-1234")) == id_of("sk-1234")
    assert masked("sk-abcdefghijkl") == "sk-...ijkl"
