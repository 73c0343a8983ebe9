"""Semantic caches in configuration files: LiteLLM's examples and the short form, and what they come to."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_middleware import CacheManager
from llm_middleware.api.app import LLMApp
from llm_middleware.cli import main
from llm_middleware.config.load import load_config
from llm_middleware.testing import FakeUpstream
from tests.api.clients import CHAT, chat
from tests.config.elsewhere import FRONTS
from tests.config.files import FILES, problems, written
from tests.semantic.conftest import reworded, toy
from tests.services import HOST

QDRANT = "http://nowhere.invalid:6333"
BASE = "litellm_settings.cache_params"
EMBEDDINGS = {
    "model_name": "embeddings",
    "litellm_params": {"model": "openai/text-embedding-3-small", "api_key": "sk-x"},
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QDRANT_API_BASE", "QDRANT_URL", "QDRANT_API_KEY", "REDIS_HOST", "REDIS_URL", "REDIS_PORT"):
        monkeypatch.delenv(name, raising=False)


def mapped(cache_params: dict[str, object], **sections: object) -> dict[str, object]:
    """LiteLLM's form."""
    return {
        "model_list": [EMBEDDINGS],
        "litellm_settings": {"cache": True, "cache_params": cache_params},
        **sections,
    }


def test_litellms_example_of_qdrant(monkeypatch, capsys):
    """Where Qdrant is, its documentation has in the environment."""
    monkeypatch.setenv("QDRANT_API_BASE", QDRANT)
    config = load_config(FILES / "semantic.yaml")
    assert config.cache == {
        "type": "qdrant-semantic",
        "qdrant_semantic_cache_embedding_model": "embeddings",
        "qdrant_collection_name": "test_collection",
        "similarity_threshold": 0.8,
    }
    assert (config.notes, config.ignored, config.header_profile) == ((), (), "litellm")
    assert main(["config", "check", str(FILES / "semantic.yaml")]) == 0
    assert capsys.readouterr().out.startswith("ok\n")


def test_without_its_place_qdrant_is_a_problem():
    [(path, _, message)] = problems(FILES / "semantic.yaml")
    assert path == f"{BASE}.qdrant_api_base"
    assert message == "expected a URL, here or in QDRANT_API_BASE or QDRANT_URL"


REDIS = {
    "type": "redis-semantic",
    "host": "h",
    "port": 6379,
    "similarity_threshold": 0.8,
    "redis_semantic_cache_embedding_model": "embeddings",
}


def test_litellms_example_of_redis():
    config = load_config(mapped(REDIS), {})
    assert config.cache == REDIS
    assert config.notes == ()
    # The rest of the proxy shares the Redis, as with a cache of type redis.
    assert config.router["redis"] == {"host": "h", "port": 6379, "namespace": "llm"}


def test_a_redis_from_the_environment():
    given = {name: value for name, value in REDIS.items() if name not in ("host", "port")}
    config = load_config(mapped(given), {"REDIS_HOST": "elsewhere", "REDIS_PORT": "6380"})
    assert (config.cache["host"], config.cache["port"]) == ("elsewhere", "6380")


@pytest.mark.parametrize("kind", ["redis-semantic", "qdrant-semantic"])
def test_without_a_model_it_is_litellms_own(kind):
    given = {"type": kind, "host": "h", "qdrant_api_base": QDRANT, "similarity_threshold": 0.8}
    config = load_config(mapped(given), {})
    assert config.cache["embedding_model"] == "text-embedding-ada-002"


def test_names_of_litellms_that_say_the_same():
    given = {
        "type": "qdrant-semantic",
        "qdrant_api_base": QDRANT,
        "qdrant_api_key": "os.environ/QDRANT_SECRET",
        "qdrant_collection_name": "answers",
        "qdrant_quantization_config": "scalar",
        "qdrant_semantic_cache_embedding_model": "embeddings",
        "qdrant_semantic_cache_vector_size": 1536,
        "semantic_cache_embedding_timeout": 2,
        "semantic_cache_embedding_max_input_tokens": 8191,
        "similarity_threshold": "0.8",
        "ttl": 600,
    }
    config = load_config(mapped(given), {"QDRANT_SECRET": "sk-q"})
    assert config.cache == {**given, "qdrant_api_key": "sk-q"}
    assert (config.notes, config.ignored) == ((), ())


def test_what_another_type_would_use_is_told_and_left_out():
    config = load_config(mapped({**REDIS, "disk_cache_dir": "/x", "s3_path": "p", "gcs_path": "g"}), {})
    assert config.cache == REDIS
    assert [note.rpartition(".")[2] for note in config.notes] == [
        f"{name}: a cache of type redis-semantic does not use it"
        for name in ("gcs_path", "disk_cache_dir", "s3_path")
    ]


WRONG = {
    "similarity_threshold": (2, "expected a cosine from 0 to 1, got 2"),
    "semantic_cache_embedding_timeout": (0, "expected seconds > 0, got 0"),
    "qdrant_semantic_cache_vector_size": ("big", "expected a whole number >= 1, got 'big'"),
    "max_error_rate": (1.5, "expected a share over 0 and under 1, got 1.5"),
    "context": ("none", "expected one of ['all', 'questions'], got 'none'"),
    "shadow": ("perhaps", "expected True or False, got 'perhaps'"),
}


@pytest.mark.parametrize(("name", "case"), WRONG.items(), ids=WRONG)
def test_a_value_that_is_wrong_is_named_with_its_place(tmp_path, name, case):
    value, message = case
    file = written(
        tmp_path,
        f"""
litellm_settings:
  cache: true
  cache_params:
    type: redis-semantic
    host: h
    embedding_model: local
    {name}: {value}
""",
    )
    assert problems(file) == [(f"{BASE}.{name}", 8, message)]


def test_everything_that_is_wrong_is_told_at_once():
    given = {**REDIS, "similarity_threshold": 2, "shadow": "perhaps", "ttl": -1}
    assert {path for path, _, _ in problems(mapped(given))} == {
        f"{BASE}.{name}" for name in ("similarity_threshold", "shadow", "ttl")
    }


def test_a_name_that_is_misspelt():
    given = {"type": "qdrant-semantic", "qdrant_api_base": QDRANT, "similarity_treshold": 0.8}
    [(path, _, message)] = problems(mapped(given))
    assert path == f"{BASE}.similarity_treshold"
    assert "did you mean 'similarity_threshold'?" in message


def short(**cache: object) -> dict[str, object]:
    return {"models": [EMBEDDINGS], "cache": cache}


def test_the_short_form():
    given = {
        "type": "semantic",
        "max_error_rate": 0.02,
        "judge": "embeddings",
        "judge_budget": 50,
        "shadow": True,
    }
    config = load_config(short(**given), {})
    assert config.cache == given
    assert config.header_profile == "standard"
    cache = LLMApp(short(**given)).cache
    assert cache.type == "semantic"
    assert cache._flow.semantic.mode.policy.judge_budget == 50.0


def test_a_cache_on_disk_with_its_index_in_a_file(tmp_path):
    given = {
        "type": "semantic",
        "similarity_threshold": 0.9,
        "disk_cache_dir": str(tmp_path / "answers"),
        "index_path": str(tmp_path / "index"),
    }
    app = LLMApp(short(**given))
    assert app.cache.settings.type == "disk"
    assert app.cache._flow.semantic.index.index._path == Path(tmp_path / "index")


def test_redis_of_the_configuration_has_the_index(tmp_path):
    app = LLMApp(mapped({**REDIS, "host": HOST, "redis_semantic_cache_index_name": "idx"}))
    cache = app.cache
    assert (cache.type, cache.settings.type) == ("redis-semantic", "redis")
    assert cache._flow.semantic.index.index.__class__.__name__ == "RedisIndex"
    assert cache._flow.semantic.embedder.id == "text-embedding-3-small"


@pytest.mark.parametrize("name", sorted(FRONTS))
def test_a_configured_sub_app_serves_by_meaning(name, tmp_path, monkeypatch):
    """LiteLLM's form, with a cache in this process."""
    with FakeUpstream() as upstream:
        monkeypatch.setenv("OPENAI_BASE_URL", upstream.url)
        file = written(
            tmp_path,
            """
model_list:
  - model_name: gpt
    litellm_params: { model: openai/gpt-up, api_key: sk-x }
litellm_settings:
  cache: true
  cache_params:
    type: semantic
    similarity_threshold: 0.8
    embedding_budget: 60
""",
        )
        client = FRONTS[name](file)
        try:
            questions = ("How do I reset the password of my account?", "How can I reset my account password?")
            answers = [client.post(CHAT, chat(text), key=None) for text in questions]
        finally:
            client.close()
    assert [each.headers["x-llm-cache"] for each in answers] == ["miss", "semantic-hit"]
    similarity = answers[1].headers["x-llm-cache-similarity"]
    assert answers[1].headers["x-litellm-semantic-similarity"] == similarity
    assert upstream.count == 1


def test_what_the_check_passes_can_be_made():
    """A check makes the cache without its models; with them it is the same cache."""
    config = load_config(short(type="semantic", embedding_model="embeddings", similarity_threshold=0.5), {})
    cache = CacheManager(**{**config.cache, "embedding_model": toy})
    assert cache.plan("chat", chat(reworded("gardens", "briefly"))).form is not None
