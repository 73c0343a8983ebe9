"""Every setting of a semantic cache: what it takes, under which names, what is said of one that is wrong."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from llm_middleware import CacheManager, ConfigError, Router
from llm_middleware.semantic.embed_local import LocalEmbedder
from llm_middleware.semantic.index_numpy import NumpyIndex
from llm_middleware.semantic.modes import Static, Verified
from llm_middleware.semantic.settings import LITELLM_NAMES, NAMES, SemanticSettings, read_settings
from llm_middleware.testing import FakeUpstream
from tests.semantic.conftest import PATIENT, asked, reworded, toy

SHARE = "a share over 0 and under 1"
SECONDS = "seconds > 0"
WHOLE = "a whole number >= 1"
TEXT = "a string that is not empty"
COSINE = "a cosine from 0 to 1"
WRONG = [
    *[("similarity_threshold", COSINE, value) for value in (-0.1, 1.1, "high", True, math.nan, [0.5])],
    *[("max_error_rate", SHARE, value) for value in (0, 1, -1, "none", math.nan, False)],
    *[("static_error_target", SHARE, value) for value in (0.0, 1.0, "x")],
    *[("shadow", "True or False", value) for value in ("perhaps", 2, 0.0, None)],
    *[("judge_budget", "calls per thousand, 0 to 1000", value) for value in (-1, 1001, math.inf, "x", None)],
    *[("embedding_model", "a model's name, a function or an embedder", value) for value in ("", 5, None)],
    *[("embedding_budget", SECONDS, value) for value in (0, -1, math.inf, math.nan, "soon", None)],
    *[("embedding_timeout", SECONDS, value) for value in (0, math.inf, "x")],
    *[("embedding_max_tokens", WHOLE, value) for value in (0, -1, 1.5, "x", True)],
    *[("embedding_dimensions", WHOLE, value) for value in (0, "1.5", True)],
    *[("context", "one of ['all', 'questions']", value) for value in ("none", None, 5)],
    *[("question_field", TEXT, value) for value in ("", 5)],
    *[("index_name", TEXT, value) for value in ("", 5)],
    *[("index_bytes", WHOLE, value) for value in (0, "x", 1.5)],
    *[("index_path", TEXT, value) for value in ("", 5)],
    *[("qdrant_api_base", TEXT, value) for value in ("", 5)],
    *[("qdrant_api_key", TEXT, value) for value in ("", 5)],
    *[("vector_index", "a vector index", value) for value in ("redis", 5, {})],
]


@pytest.mark.parametrize(("name", "expected", "value"), WRONG, ids=lambda value: str(value)[:20])
def test_a_value_that_is_wrong_is_named(name, expected, value):
    with pytest.raises(ConfigError) as caught:
        SemanticSettings(**{name: value})
    assert (str(caught.value), caught.value.param) == (f"{name}: expected {expected}, got {value!r}", name)


def test_every_setting_is_checked():
    checked = {name for name, _, _ in WRONG}
    assert set(NAMES) - checked == {"judge", "router", "qdrant_quantization_config"}  # where they are used


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("similarity_threshold", "0.8", 0.8),
        ("similarity_threshold", 1, 1.0),
        ("similarity_threshold", 0, 0.0),
        ("max_error_rate", "0.01", 0.01),
        ("shadow", "true", True),
        ("shadow", " False ", False),
        ("judge_budget", "50", 50.0),
        ("embedding_budget", "0.5", 0.5),
        ("embedding_max_tokens", "512", 512),
        ("embedding_dimensions", 384, 384),
        ("index_bytes", "1000000", 1_000_000),
        ("index_path", Path("/tmp/index"), "/tmp/index"),
    ],
)
def test_text_of_files_and_variables_is_read(name, value, read):
    got = getattr(SemanticSettings(**{name: value}), name)
    assert (got, type(got)) == (read, type(read))


def test_which_mode():
    assert SemanticSettings().max_error_rate == 0.01
    assert not SemanticSettings().static
    assert SemanticSettings(similarity_threshold=0.8).static
    assert SemanticSettings(static_error_target=0.02).static
    both = SemanticSettings(similarity_threshold=0.8, max_error_rate=0.02)
    assert (both.static, both.similarity_threshold, both.max_error_rate) == (False, 0.8, 0.02)


@pytest.mark.parametrize("other", ["similarity_threshold", "max_error_rate"])
def test_targets_that_contradict_each_other(other):
    with pytest.raises(ConfigError) as caught:
        SemanticSettings(**{"static_error_target": 0.02, other: 0.5})
    assert caught.value.param == "static_error_target"
    assert str(caught.value) == ("static_error_target: goes without similarity_threshold and max_error_rate")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("embedding_budget", 10**400),
        ("router", object()),
        ("router", {1: 2}),
        ("qdrant_quantization_config", {"binary": {}}),
    ],
)
def test_odd_values_are_refused_by_name(name, value):
    with pytest.raises(ConfigError) as caught:
        SemanticSettings(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize("static", ["similarity_threshold", "static_error_target"])
def test_a_judge_has_nothing_to_do_in_static_mode(static):
    with pytest.raises(ConfigError) as caught:
        SemanticSettings(**{static: 0.5}, judge="gpt-4o-mini")
    assert (caught.value.param, str(caught.value)) == (
        "judge",
        "judge: goes with max_error_rate, which needs one",
    )


# --- LiteLLM's names

LITELLM = {
    "redis_semantic_cache_embedding_model": ("embedding_model", toy, 5),
    "redis_semantic_cache_index_name": ("index_name", "idx", 5),
    "redis_semantic_cache_use_async": (None, True, None),
    "qdrant_semantic_cache_embedding_model": ("embedding_model", toy, 5),
    "qdrant_semantic_cache_vector_size": ("embedding_dimensions", 1536, "x"),
    "qdrant_collection_name": ("index_name", "c", 5),
    "semantic_cache_embedding_max_input_tokens": ("embedding_max_tokens", 512, 0),
    "semantic_cache_embedding_timeout": ("embedding_timeout", 2.0, 0),
}


@pytest.mark.parametrize(("name", "case"), LITELLM.items(), ids=LITELLM)
def test_litellms_names(name, case):
    own, value, wrong = case
    settings, rest = read_settings({name: value, "ttl": 5})
    assert rest == {"ttl": 5}
    if own is None:
        assert settings == SemanticSettings()
        return
    assert getattr(settings, own) == value
    with pytest.raises(ConfigError) as caught:
        read_settings({name: wrong})
    assert caught.value.param == name
    assert str(caught.value).startswith(f"{name}: expected ")


def test_all_of_litellms_names_are_known():
    assert set(LITELLM) == set(LITELLM_NAMES)


def test_our_name_counts_before_litellms():
    for given in (
        {"index_name": "ours", "qdrant_collection_name": "theirs"},
        {"qdrant_collection_name": "theirs", "index_name": "ours"},
    ):
        assert read_settings(given)[0].index_name == "ours"
    assert read_settings({"qdrant_collection_name": "theirs", "index_name": None})[0].index_name == "theirs"


# --- the manager's

UNKNOWN = {
    "similarity_treshol": "unknown cache setting 'similarity_treshol'; did you mean 'similarity_threshold'?",
    "max_errors_rate": "unknown cache setting 'max_errors_rate'; did you mean 'max_error_rate'?",
    "embeding_model": "unknown cache setting 'embeding_model'; did you mean 'embedding_model'?",
    "tll": "unknown cache setting 'tll'; did you mean 'ttl'?",
}


@pytest.mark.parametrize(("name", "message"), UNKNOWN.items(), ids=UNKNOWN)
def test_a_misspelt_setting_suggests_the_nearest(name, message):
    with pytest.raises(ConfigError) as caught:
        CacheManager("semantic", embedding_model=toy, **{name: 0.5})
    assert (str(caught.value), caught.value.param) == (message, name)


def test_a_setting_of_meaning_does_not_go_with_another_type():
    with pytest.raises(ConfigError, match="similarity_threshold"):
        CacheManager("local", similarity_threshold=0.8)


@pytest.mark.parametrize("kind", ["semantics", "redis_semantic", "qdrant-semantik"])
def test_a_type_that_is_misspelt(kind):
    with pytest.raises(
        ConfigError, match=r"did you mean '(semantic|redis-semantic|qdrant-semantic)'"
    ) as caught:
        CacheManager(kind)
    assert caught.value.param == "type"


def test_values_from_the_environment(monkeypatch):
    monkeypatch.setenv("THRESHOLD", "0.83")
    monkeypatch.setenv("KIND", "semantic")
    cache = CacheManager("os.environ/KIND", embedding_model=toy, similarity_threshold="os.environ/THRESHOLD")
    assert (cache.type, cache.stats()["semantic"]["threshold"]) == ("semantic", 0.83)
    monkeypatch.setenv("THRESHOLD", "much")
    with pytest.raises(ConfigError) as caught:
        CacheManager("semantic", embedding_model=toy, similarity_threshold="os.environ/THRESHOLD")
    assert caught.value.param == "similarity_threshold"
    with pytest.raises(ConfigError, match="the environment has no NOT_THERE") as caught:
        CacheManager("semantic", similarity_threshold="os.environ/NOT_THERE")
    assert caught.value.param == "similarity_threshold"


def test_by_default_it_is_local_verified_and_in_memory():
    cache = CacheManager("semantic")
    tier = cache._flow.semantic
    assert isinstance(tier.mode, Verified)
    assert tier.mode.policy.max_error_rate == 0.01
    assert isinstance(tier.embedder._embedder, LocalEmbedder)
    assert isinstance(tier.index.index, NumpyIndex)
    assert (cache.type, cache.settings.type) == ("semantic", "local")


def test_a_threshold_alone_is_the_static_mode():
    cache = CacheManager("semantic", similarity_threshold=0.9)
    assert isinstance(cache._flow.semantic.mode, Static)
    assert cache._flow.semantic.teacher is None


@pytest.mark.parametrize("kind", ["semantic", "redis-semantic", "qdrant-semantic"])
def test_making_one_connects_to_nothing(kind, monkeypatch):
    for name in ("QDRANT_API_BASE", "QDRANT_URL"):
        monkeypatch.delenv(name, raising=False)
    places = {
        "semantic": {},
        "redis-semantic": {"host": "nowhere.invalid"},
        "qdrant-semantic": {"qdrant_api_base": "http://nowhere.invalid:6333"},
    }
    cache = CacheManager(kind, embedding_model=toy, **places[kind])
    stores = {"semantic": "local", "redis-semantic": "redis", "qdrant-semantic": "qdrant"}
    assert (cache.type, cache.settings.type) == (kind, stores[kind])


def test_qdrant_without_a_place(monkeypatch):
    for name in ("QDRANT_API_BASE", "QDRANT_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError) as caught:
        CacheManager("qdrant-semantic", embedding_model=toy)
    assert caught.value.param == "qdrant_api_base"
    monkeypatch.setenv("QDRANT_URL", "http://nowhere.invalid:6333")
    assert CacheManager("qdrant-semantic", embedding_model=toy).type == "qdrant-semantic"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("qdrant_quantization_config", "octal"),
        ("qdrant_api_base", "no-url"),
        ("index_name", "a/b"),
    ],
)
def test_what_qdrant_cannot_use_is_named_too(name, value):
    settings = {"qdrant_api_base": "http://nowhere.invalid:6333", name: value}
    with pytest.raises(ConfigError) as caught:
        CacheManager("qdrant-semantic", embedding_model=toy, **settings)
    assert caught.value.param == name


# --- the embedding model


def test_a_model_without_a_router():
    with pytest.raises(ConfigError) as caught:
        CacheManager("semantic", embedding_model="text-embedding-3-small")
    assert caught.value.param == "embedding_model"
    assert str(caught.value) == (
        "embedding_model: 'text-embedding-3-small' is a model: give the router that has it, or 'local'"
    )


def test_a_model_that_the_router_does_not_have():
    router = Router([{"model_name": "e", "litellm_params": {"model": "openai/e", "api_key": "k"}}])
    with pytest.raises(ConfigError, match="the router has no model 'f'; it has e") as caught:
        CacheManager("semantic", embedding_model="f", router=router)
    assert caught.value.param == "embedding_model"


def test_a_model_of_the_routers(make, face):
    """Asked over HTTP, once for each question."""
    with FakeUpstream() as upstream:
        params = {"model": "openai/e-up", "api_base": upstream.url, "api_key": "sk-x"}
        router = Router([{"model_name": "e", "litellm_params": params}])
        asking = make(embedding_model="e", router=router, similarity_threshold=1.0)
        for way in ("briefly", "slowly", "briefly"):
            asking(reworded("gardens", way))
        assert asking.status(reworded("gardens", "briefly") + "?") == ("semantic-hit", "normalized")
        sent = [(call.path, call.json["model"], call.json["input"]) for call in upstream.calls]
        assert sent == [
            ("/v1/embeddings", "e-up", [reworded("gardens", way)]) for way in ("briefly", "slowly")
        ]
        assert asking.cache._flow.semantic.embedder.id == "e-up"
        face.do(router, "close")


def test_vectors_of_another_length_than_said(make):
    asking = make(embedding_model=toy, embedding_dimensions=7)
    assert asking.status(reworded("gardens", "briefly")) == ("miss", "embedding-failed")


def test_texts_longer_than_said(make):
    asking = make(embedding_model=toy, embedding_max_tokens=3)
    assert asking.status(reworded("gardens", "briefly")) == ("miss", "too-long")


def test_earlier_answers_may_be_left_out_of_the_comparison(make):
    def chat(said: str, text: str) -> dict:
        turns = [("user", "Hello."), ("assistant", said), ("user", text)]
        return {"model": "m", "messages": [{"role": role, "content": each} for role, each in turns]}

    for context, status in (("all", "miss"), ("questions", "semantic-hit")):
        asking = make(context=context)
        asking(chat("Hello!", reworded("gardens", "briefly")))
        assert asking(chat("Hi, how are you?", reworded("gardens", "slowly")))[0] == status


def test_an_index_that_is_kept_in_a_file(make, tmp_path):
    """With answers on disk a restart finds them by meaning."""
    places = {"index_path": tmp_path / "index", "disk_cache_dir": str(tmp_path / "answers")}
    before = make(**places)
    assert (before.cache.type, before.cache.settings.type) == ("semantic", "disk")
    before(reworded("gardens", "briefly"))
    before.face.do(before.cache, "close")
    after = make(**places)
    after.cache._flow.semantic.index.index.load()
    assert after(reworded("gardens", "slowly"))[0] == "semantic-hit"


def test_a_budget_is_what_a_request_waits():
    cache = CacheManager("semantic", embedding_model=toy, embedding_budget=PATIENT)
    assert cache._flow.semantic.embedder.budget == PATIENT
    assert CacheManager("semantic", embedding_model=toy)._flow.semantic.embedder.budget == 0.25
    assert cache.plan("chat", asked("x")).form is not None
