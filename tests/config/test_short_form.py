"""The shorter form of file."""

from __future__ import annotations

import pytest

from llm_middleware import CacheManager, Router
from llm_middleware.config.load import Config, load_config
from tests.config.files import FILES, load, problems


def test_every_section_is_read():
    config = load("short.yaml")
    assert config == Config(
        model_list=(
            {
                "model_name": "gpt",
                "litellm_params": {"model": "openai/gpt-4o-mini", "api_key": "sk-openai"},
                "rpm": 100,
            },
        ),
        router={"num_retries": 1, "timeout": None, "http": {"http2": False, "max_connections": 50}},
        cache={"type": "redis", "host": "localhost", "ttl": 600},
        keys={"store": {"type": "sqlite", "path": "keys.db"}, "ttl": 30.0},
        master_key="sk-master",
        share="user",
        header_profile="standard",
        admin=False,
        show_content=True,
        max_body_bytes=1048576,
        hooks=("my_package.hooks.on_event",),
        source=str(FILES / "short.yaml"),
    )
    assert Router(config.model_list, **config.router).settings.timeout is None
    assert config.cache is not None
    assert CacheManager(**config.cache).settings.ttl == 600


def test_nothing_is_a_configuration_too(tmp_path):
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing\n")
    assert load_config({}, {}) == Config()
    assert load_config(empty, {}) == Config(source=str(empty))


@pytest.mark.parametrize(
    ("cache", "expected", "notes"),
    [
        (None, None, ()),
        (False, None, ()),
        (True, {"type": "local"}, ("cache: true without a type: memory",)),
        ({"ttl": 5}, {"type": "local", "ttl": 5}, ("cache without a type: memory",)),
        ({"type": "memory", "ttl": None}, {"type": "local", "ttl": None}, ()),
        ({"url": "redis://h"}, {"type": "redis", "url": "redis://h"}, ("cache without a type: redis (url)",)),
    ],
)
def test_the_cache_is_a_switch_or_settings(cache, expected, notes):
    config = load_config({"models": [], "cache": cache}, {})
    assert (config.cache, config.notes) == (expected, notes)


STORES = "['memory', 'sqlite', 'redis', 'sql']"
TEAMS = "expected one of all, team, user, key, got 'teams'; did you mean 'team'?"


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"store": "memory"}, []),
        ({"store": "sqlite:///keys.db"}, []),
        ({"store": {"type": "redis", "host": "h", "namespace": "n"}}, []),
        ({"store": {"type": "sqlite"}}, [("keys.store.path", "expected a string that is not empty")]),
        (
            {"store": {"type": "sql", "url": "nowhere"}},
            [
                (
                    "keys.store.url",
                    "not the URL of a database, such as postgresql://user:password@host/database",
                )
            ],
        ),
        (
            {"store": {"type": "redis", "hots": "h"}},
            [("keys.store.hots", "unknown Redis setting 'hots'; did you mean 'host'?")],
        ),
        (
            {"store": {"type": "sqlit"}, "ttl": "x"},
            [
                ("keys.ttl", "expected seconds >= 0"),
                ("keys.store.type", f"expected one of {STORES}, got 'sqlit'; did you mean 'sqlite'?"),
            ],
        ),
        ({"store": 5}, [("keys.store", f"expected one of {STORES}, or a mapping, got a value of type int")]),
        ({"ttl": -1}, [("keys.ttl", "expected seconds >= 0")]),
        ({"share": "teams"}, [("keys.share", TEAMS)]),
        ({"master": "m"}, [("keys.master", "there is no such setting; did you mean 'master_key'?")]),
    ],
)
def test_keys_have_a_store(keys, found):
    assert [(path, message) for path, _, message in problems({"models": [], "keys": keys})] == found


def test_the_two_forms_do_not_mix():
    [(path, _, message)] = problems({"models": [], "router": {}, "litellm_settings": {}})
    assert path == "litellm_settings"
    assert (
        message == "is of the other form of file; sections of LiteLLM's form and of the short one do not mix"
    )
