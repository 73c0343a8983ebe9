"""LiteLLM's files, as its documentation has them: what each of them comes to, exactly."""

from __future__ import annotations

import pytest

from llm_middleware import CacheManager, Router
from llm_middleware.config.load import Config, load_config
from llm_middleware.keys.resolver import KeyResolver
from tests.config.files import FILES, MODEL, SECRETS, load, problems

CONNECTION = {"host": "localhost", "port": 6379, "password": "redis-secret", "max_connections": 100}
NODES = [{"host": "127.0.0.1", "port": "7001"}, {"host": "node-2.example", "port": 7002}]
GCP = {
    "redis_startup_nodes": [{"host": "10.128.0.2", "port": 6379}, {"host": "10.128.0.2", "port": 11008}],
    "gcp_service_account": "projects/-/serviceAccounts/your-sa@project.iam.gserviceaccount.com",
    "ssl": True,
}
TLS = {
    "host": "cache.example",
    "port": "6380",
    "ssl": True,
    "ssl_cert_reqs": "none",
    "ssl_check_hostname": False,
}
SENTINEL = {
    "service_name": "mymaster",
    "sentinel_nodes": [["localhost", 26379]],
    "sentinel_password": "password",
}
URL = {"url": "rediss://app:p%40ss@cache.example:6380/1"}
IN_MEMORY = {"store": None, "ttl": 60.0}


def expected(name: str, **fields: object) -> Config:
    return Config(model_list=(MODEL,), header_profile="litellm", source=str(FILES / name), **fields)


def with_redis(name: str, connection: dict, *, namespace: str = "llm", router=None, **fields) -> Config:
    """Limits and cooldowns are in the cache's Redis, and keys, where a master key says that there are any."""
    shared = {**connection, "namespace": namespace}
    store = {"type": "redis", **shared, "namespace": f"{namespace}:keys"} if "master_key" in fields else None
    return expected(
        name, router={**(router or {}), "redis": shared}, keys={"store": store, "ttl": 60.0}, **fields
    )


CONFIGS = {
    "memory.yaml": {"cache": {"type": "local", "ttl": 600}},
    "memory_ttl.yaml": {"cache": {"type": "local", "ttl": 30}},  # LiteLLM: the latter wins
    "disk.yaml": {"cache": {"type": "disk", "disk_cache_dir": "/var/tmp/llm-cache"}},
    "s3.yaml": {
        "cache": {
            "type": "s3",
            "s3_bucket_name": "cache-bucket",
            "s3_region_name": "us-west-2",
            "s3_api_version": "2006-03-01",
            "s3_use_ssl": True,
            "s3_aws_access_key_id": "AKID-of-the-environment",
            "s3_aws_secret_access_key": "aws-secret-of-the-environment",
            "s3_endpoint_url": "https://s3.amazonaws.com",
            "s3_path": "answers",
        }
    },
    "default_off.yaml": {
        "router": {"set_verbose": True},
        "cache": {"type": "local", "mode": "default_off"},
        "notes": ("cache: true without a type: memory",),
    },
    "key_level.yaml": {
        "cache": {"type": "local"},
        "keys": {
            "store": {"type": "sql", "url": "postgres://keys:database-password@db.example/keys"},
            "ttl": 10.0,
        },
        "master_key": "sk-master",
    },
}
REDIS_CONFIGS = {
    "redis.yaml": with_redis(
        "redis.yaml",
        CONNECTION,
        namespace="litellm.caching.caching",
        router={"set_verbose": False},
        cache={
            "type": "redis",
            **CONNECTION,
            "namespace": "litellm.caching.caching",
            "ttl": 600,
            "default_in_memory_ttl": 30,
            "default_in_redis_ttl": 900,
            "redis_flush_size": 50,
        },
    ),
    "redis_url.yaml": with_redis(
        "redis_url.yaml", URL, cache={"type": "redis", **URL, "default_redis_ttl": 300}
    ),
    "redis_cluster.yaml": with_redis(
        "redis_cluster.yaml",
        {"redis_startup_nodes": NODES},
        cache={"type": "redis", "redis_startup_nodes": NODES},
    ),
    "redis_sentinel.yaml": with_redis("redis_sentinel.yaml", SENTINEL, cache={"type": "redis", **SENTINEL}),
    "redis_tls.yaml": with_redis(
        "redis_tls.yaml",
        TLS,
        cache={"type": "redis", **TLS},
        notes=("litellm_settings.cache_params.ssl_cert_reqs: null: no certificate is verified",),
    ),
    "redis_gcp.yaml": with_redis("redis_gcp.yaml", GCP, cache={"type": "redis", **GCP}),
    "call_types.yaml": with_redis(
        "call_types.yaml",
        {"host": "localhost"},
        cache={
            "type": "redis",
            "host": "localhost",
            "supported_call_types": ["acompletion", "atext_completion", "aembedding", "atranscription"],
        },
    ),
    "no_call_types.yaml": with_redis(
        "no_call_types.yaml",
        {"host": "localhost"},
        namespace="proxy",
        cache=None,
        master_key="sk-1234",
        notes=("litellm_settings.cache_params.supported_call_types: empty, so no answers are kept",),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_documented_configuration_is_read_as_it_is(name):
    assert load(name) == expected(name, **CONFIGS[name])


@pytest.mark.parametrize("name", REDIS_CONFIGS)
def test_a_documented_redis_is_that_of_the_cache_the_router_and_the_keys(name):
    assert load(name) == REDIS_CONFIGS[name]


def test_a_whole_proxy_is_read_as_it_is():
    """C120, C121: variables of the file's own are those of ``os.environ/NAME`` and name the Redis."""
    cache = {"type": "redis", "ttl": 60, "host": "cache.internal", "port": "6390"}
    azure_eu = {
        "model": "azure/gpt-4o-eu",
        "api_base": "https://europe.openai.azure.com/",
        "api_key": "eu-secret-from-the-file",
        "api_version": "2023-07-01-preview",
        "rpm": 6,
    }
    azure_ca = {
        "model": "azure/gpt-4o-ca",
        "api_base": "https://canada.openai.azure.com/",
        "api_key": "ca-secret",
        "api_version": "2023-05-15",
        "rpm": 6,
    }
    claude = {"model": "bedrock/anthropic.claude-3-haiku-20240307-v1:0", "aws_region_name": "us-east-1"}
    assert load("proxy.yaml") == Config(
        model_list=(
            {"model_name": "gpt-4o", "litellm_params": azure_eu, "model_info": {"id": "eu", "version": 2}},
            {"model_name": "gpt-4o", "litellm_params": azure_ca},
            {"model_name": "claude", "litellm_params": claude},
            {"model_name": "*", "litellm_params": {"model": "*"}},
        ),
        router={
            "num_retries": 2,
            "timeout": 30,
            "fallbacks": [{"gpt-4o": ["claude"]}],
            "context_window_fallbacks": [{"gpt-4o": ["claude"]}],
            "default_fallbacks": ["claude"],
            "allowed_fails": 3,
            "default_litellm_params": {"drop_params": True},
            "routing_strategy": "usage-based-routing",
            "model_group_alias": {"gpt-4": "gpt-4o"},
            "enable_pre_call_checks": True,
            "default_max_parallel_requests": 20,
            "retry_policy": {"TimeoutErrorRetries": 3},
            "allowed_fails_policy": {"RateLimitErrorAllowedFails": 10},
            "redis_host": "router.example",
            "redis_port": 1992,
            "redis_password": "router-secret",
            "redis": {"db": 3},
        },
        cache=cache,
        keys={
            "store": {"type": "redis", "host": "cache.internal", "port": "6390", "namespace": "llm:keys"},
            "ttl": 60.0,
        },
        master_key="sk-1234",
        header_profile="litellm",
        max_body_bytes=2 * 1024 * 1024,
        hooks=("custom_callbacks.proxy_handler_instance", "my_package.hooks.on_success"),
        environment={
            "REDIS_HOST": "cache.internal",
            "REDIS_PORT": "6390",
            "AZURE_KEY_EU": "eu-secret-from-the-file",
        },
        ignored=(
            "litellm_settings.success_callback[0]",
            "litellm_settings.service_callbacks",
            "litellm_settings.json_logs",
            "router_settings.debug_level",
            "general_settings.alerting",
            "general_settings.store_model_in_db",
            "guardrails",
        ),
        source=str(FILES / "proxy.yaml"),
    )


@pytest.mark.parametrize("name", [*CONFIGS, *REDIS_CONFIGS, "proxy.yaml"])
def test_a_router_a_cache_and_a_resolver_can_be_made_of_it(name):
    config = load(name)
    router = Router(config.model_list, **config.router)
    assert len(router.deployments) == len(config.model_list)
    KeyResolver(**config.keys, master_key=config.master_key)
    if config.cache is not None:
        assert CacheManager(**config.cache).settings.type == config.cache["type"]


@pytest.mark.parametrize(
    ("environ", "kind", "found"),
    [
        ({}, "local", "memory"),
        ({"REDIS_URL": " "}, "local", "memory"),
        ({"REDIS_HOST": "h"}, "redis", "redis (REDIS_HOST)"),
        ({"REDIS_HOST": "h", "REDIS_URL": "redis://u"}, "redis", "redis (REDIS_URL)"),
        ({"REDIS_CLUSTER_NODES": '[{"host": "n"}]'}, "redis", "redis (REDIS_CLUSTER_NODES)"),
    ],
)
def test_a_cache_without_a_type_is_in_redis_where_there_is_one(environ, kind, found):
    config = load("redis_from_environment.yaml", {**SECRETS, **environ})
    assert config.cache is not None
    assert config.cache["type"] == kind
    assert config.notes == (f"cache: true without a type: {found}",)
    assert ("redis" in config.router) == (kind == "redis")


def mapped(cache_params: object = None, **litellm_settings: object) -> dict:
    return {"litellm_settings": {"cache": True, "cache_params": cache_params, **litellm_settings}}


def test_explicit_settings_win_over_the_environment():
    """C121"""
    environ = {"REDIS_URL": "redis://elsewhere", "REDIS_PASSWORD": "of-the-environment", "REDIS_PORT": "1"}
    given = {"type": "redis", "host": "here", "password": "of-the-file"}
    assert load_config(mapped(given), environ).cache == {**given, "port": "1"}
    own = {"type": "redis", "url": "redis://:of-the-url@here:7"}
    assert load_config(mapped(own), environ).cache == own
    named = load_config(
        {**mapped({"type": "redis"}), "environment_variables": {"REDIS_URL": "redis://file"}}, environ
    )
    assert named.cache == {"type": "redis", "url": "redis://file"}


def test_a_default_redis_ttl_has_two_names():
    """C126"""
    for name in ("default_redis_ttl", "default_in_redis_ttl"):
        cache = load_config(mapped({"type": "redis", "host": "h", name: 5, "ttl": 9}), {}).cache
        assert cache is not None
        assert CacheManager(**cache).settings.controls["ttl"] == 5
    module = load_config(mapped({"type": "redis", "host": "h"}, default_redis_ttl=7), {}).cache
    assert module == {"type": "redis", "host": "h", "default_redis_ttl": 7}


@pytest.mark.parametrize("cache", [None, False, "false"])
def test_without_cache_no_answers_are_kept(cache):
    config = load_config({"litellm_settings": {"cache": cache, "cache_params": {"type": "nonsense"}}}, {})
    assert config.cache is None
    assert config.notes == ("litellm_settings.cache_params: not used, as cache is not true",)


def test_settings_of_another_type_of_cache_are_told_and_left_out():
    config = load_config(
        mapped({"type": "local", "host": "h", "s3_path": "p", "similarity_threshold": 0.8}), {}
    )
    assert config.cache == {"type": "local"}
    assert [note.rpartition(".")[2] for note in config.notes] == [
        f"{name}: a cache of type local does not use it"
        for name in ("host", "s3_path", "similarity_threshold")
    ]


def test_batched_reads_are_a_callback_of_litellms():
    config = load_config(mapped({"type": "redis", "host": "h"}, callbacks=["batch_redis_requests"]), {})
    assert config.cache == {"type": "redis", "host": "h", "batch_redis_requests": True}
    assert (config.hooks, config.ignored) == ((), ())


def test_a_store_for_meanings_that_is_not_here_is_refused():
    [(path, _, message)] = problems(mapped({"type": "valkey-semantic", "similarity_threshold": 0.8}))
    assert path == "litellm_settings.cache_params.type"
    assert message.startswith("valkey-semantic: there is no such store here; expected one of local, ")


def test_a_variable_for_the_master_key_is_not_overlooked():
    config = load_config(
        {"model_list": []}, {"LITELLM_MASTER_KEY": "sk-env", "DATABASE_URL": "postgresql://h/d"}
    )
    assert config.master_key == "sk-env"
    assert config.notes == (
        "master_key: that of LITELLM_MASTER_KEY",
        "DATABASE_URL is not used; name it as general_settings.database_url to keep API keys there",
    )
    assert load_config(
        {"general_settings": {"master_key": "sk-file"}}, {"LITELLM_MASTER_KEY": "x"}
    ).master_key == ("sk-file")


@pytest.mark.parametrize("sections", [{}, {"keys": {"master_key": "sk-master"}}])
def test_a_redis_of_the_caches_asks_for_keys_where_there_is_a_master_key(sections):
    config = load_config({**mapped({"type": "redis", "host": "h"}), **sections}, {})
    store = {"type": "redis", "host": "h", "namespace": "llm:keys"}
    assert config.keys["store"] == (store if sections else None)


def test_coordination_has_a_redis_of_its_own():
    config = load_config(
        {
            **mapped({"type": "redis", "host": "answers"}),
            "general_settings": {
                "coordination_redis": {"host": "limits", "port": 1},
                "master_key": "sk-master",
            },
        },
        {},
    )
    assert config.cache == {"type": "redis", "host": "answers"}
    assert config.router == {"redis": {"host": "limits", "port": 1}}
    store = {"type": "redis", "host": "limits", "port": 1, "namespace": "llm:keys"}
    assert config.keys == {"store": store, "ttl": 60.0}


def test_numbers_and_switches_of_a_router_may_be_variables():
    """C120"""
    environ = {"N": "4", "T": "2.5", "ON": "True", "P": "6380"}
    settings = {
        "num_retries": "os.environ/N",
        "timeout": "os.environ/T",
        "enable_tag_filtering": "os.environ/ON",
        "redis_host": "h",
        "redis_port": "os.environ/P",
        "fallbacks": [{"a": ["os.environ/N"]}],
        "disable_cooldowns": True,
        "cache_kwargs": {"ssl": True},
    }
    assert load_config({"router_settings": settings}, environ).router == {
        "num_retries": 4,
        "timeout": 2.5,
        "enable_tag_filtering": True,
        "redis_host": "h",
        "redis_port": "6380",
        "fallbacks": [{"a": ["4"]}],
        "cooldown_time": 0.0,
        "redis": {"ssl": True},
    }


def test_this_librarys_own_sections_may_stand_beside_litellms():
    config = load_config(
        {
            "model_list": [],
            "keys": {"share": "all"},
            "server": {"show_content": True, "header_profile": "standard"},
        },
        {},
    )
    assert (config.share, config.show_content, config.header_profile) == ("all", True, "standard")


def test_a_fallback_to_nobody_is_told():
    models = [{"model_name": "claude", "litellm_params": {"model": "anthropic/claude-sonnet-4-5"}}]
    config = load_config(
        {"model_list": models, "router_settings": {"fallbacks": [{"claude": ["claud"]}]}}, {}
    )
    assert config.notes == (
        "router_settings.fallbacks: no deployment serves 'claud'; did you mean 'claude'?",
    )


def test_a_database_is_named_without_what_only_prisma_knows():
    url = "postgresql://u:p@h/d?schema=public&sslmode=require&connection_limit=5"
    config = load_config({"general_settings": {"database_url": url, "master_key": "sk-master"}}, {})
    assert config.keys["store"] == {"type": "sql", "url": "postgresql://u:p@h/d?sslmode=require"}
    assert config.notes == (
        "general_settings.database_url: without connection_limit, schema, which only Prisma knows",
    )
    alone = load_config({"general_settings": {"database_url": "postgresql://h/d"}}, {})
    assert alone.notes == (
        "general_settings.database_url: keys are asked for, and no master_key can make any",
    )
    assert problems({"general_settings": {"database_url": "nowhere"}}) == [
        (
            "general_settings.database_url",
            None,
            "not the URL of a database, such as postgresql://user:password@host/database",
        )
    ]


def test_defaults_of_all_deployments_keep_drop_params():
    config = load_config(
        {
            "litellm_settings": {"drop_params": True},
            "router_settings": {"default_litellm_params": {"max_tokens": 5}},
        },
        {},
    )
    assert config.router == {"default_litellm_params": {"drop_params": True, "max_tokens": 5}}
    assert problems({"litellm_settings": {"drop_params": "some"}}) == [
        ("litellm_settings.drop_params", None, "expected true or false")
    ]
