"""LiteLLM's ``config.yaml`` (https://docs.litellm.ai/docs/proxy/configs), read as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from ..errors import did_you_mean
from ..routing.fields import switch
from ..semantic.settings import MODELS
from . import known
from .cache import IN_REDIS, NAMESPACE, read_cache, redis_connection
from .parts import Parts
from .router import NAMES, read_router, set_option
from .values import Section

__all__ = ["SECTIONS", "read_litellm"]

SECTIONS: Final = ("model_list", "litellm_settings", "router_settings", "general_settings", "credential_list")
_TO_ROUTER: Final = {
    "allowed_fails": "allowed_fails",
    "content_policy_fallbacks": "content_policy_fallbacks",
    "context_window_fallbacks": "context_window_fallbacks",
    "default_fallbacks": "default_fallbacks",
    "fallbacks": "fallbacks",
    "max_fallbacks": "max_fallbacks",
    "num_retries": "num_retries",
    "request_timeout": "timeout",
    "set_verbose": "set_verbose",
}
_HTTP: Final = {"ssl_verify": "verify", "ssl_certificate": "cert"}
_LISTS: Final = ("callbacks", "success_callback", "failure_callback")
_BATCHED: Final = "batch_redis_requests"
_EMBEDDING: Final = "text-embedding-ada-002"  # LiteLLM's own default
_SETTINGS: Final = (
    *_TO_ROUTER,
    *_HTTP,
    *_LISTS,
    "cache",
    "cache_params",
    "default_in_memory_ttl",
    "default_redis_ttl",
    "drop_params",
)
_GENERAL: Final = (
    "coordination_redis",
    "database_url",
    "master_key",
    "max_request_size_mb",
    "user_api_key_cache_ttl",
)
_DOTTED: Final = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+\Z")
_PRISMA: Final = frozenset(
    [
        "connection_limit",
        "pgbouncer",
        "pool_timeout",
        "schema",
        "socket_timeout",
        "sslaccept",
        "sslidentity",
        "sslpassword",
        "statement_cache_size",
    ]
)
_MIB: Final = 1 << 20

Environ = Mapping[str, str]


def read_litellm(top: Section, environ: Environ) -> Parts:
    """The parts that the sections of ``top`` come to; those sections are taken."""
    parts = Parts(header_profile="litellm")
    settings = top.section("litellm_settings")
    parts.models = _with_credentials(top)
    callbacks = _callbacks(settings, parts)
    _settings(settings, parts)
    dropped = parts.router.get("default_litellm_params")
    router = top.section("router_settings")
    read_router(router, parts)
    _cooldowns(router, parts)
    _join_defaults(dropped, parts)
    given = _cache(settings, parts, environ, batched=_BATCHED in callbacks)
    _general(top.section("general_settings"), parts, environ, redis_connection(given or {}))
    router.close([*NAMES, "redis_db", "disable_cooldowns"], known.ROUTER)
    settings.close(_SETTINGS, known.SETTINGS)
    return parts


# --- models


def _with_credentials(top: Section) -> object:
    """The list of models, where a credential's values stand for its name."""
    credentials = _credentials(top)
    models = top.take("model_list")
    if not isinstance(models, list):
        return models
    for place, entry in enumerate(models):
        params = entry.get("litellm_params") if isinstance(entry, dict) else None
        if not isinstance(params, dict) or (name := params.get("litellm_credential_name")) is None:
            continue
        if not isinstance(name, str) or name not in credentials:
            path = f"model_list[{place}].litellm_params.litellm_credential_name"
            top.report.problem(path, f"there is no such credential{did_you_mean(name, credentials)}")
            continue
        own = {key: value for key, value in params.items() if key != "litellm_credential_name"}
        entry["litellm_params"] = {**credentials[name], **own}
    return models


def _credentials(top: Section) -> dict[str, Mapping[str, object]]:
    listed = top.take("credential_list")
    found: dict[str, Mapping[str, object]] = {}
    if not isinstance(listed, list | None):
        top.report.problem("credential_list", "expected a list")
        return found
    for place, each in enumerate(listed or []):
        name = each.get("credential_name") if isinstance(each, Mapping) else None
        values = each.get("credential_values") if isinstance(each, Mapping) else None
        if not isinstance(name, str) or not isinstance(values, Mapping):
            top.report.problem(f"credential_list[{place}]", "needs a credential_name and credential_values")
        else:
            found[name] = values
    return found


# --- litellm_settings


def _settings(section: Section, parts: Parts) -> None:
    for name, option in _TO_ROUTER.items():
        set_option(section, name, option, parts)
    if "drop_params" in section and (given := section.take("drop_params")) is not None:
        try:
            dropped = switch(given, "drop_params")
        except ValueError:
            section.report.problem(section.at("drop_params"), "expected true or false")
        else:
            parts.set_router("default_litellm_params", {"drop_params": dropped}, section.at("drop_params"))
    http = {option: section.take(name) for name, option in _HTTP.items() if name in section}
    if http := {option: value for option, value in http.items() if value is not None}:
        parts.set_router("http", http, section.at("ssl_verify"))


def _cooldowns(section: Section, parts: Parts) -> None:
    """LiteLLM has a switch for what is a time of zero here."""
    if section.flag("disable_cooldowns", False):
        parts.set_router("cooldown_time", 0.0, section.at("disable_cooldowns"))


def _join_defaults(dropped: object, parts: Parts) -> None:
    """The Router's defaults for all deployments, with ``drop_params`` among them."""
    given = parts.router.get("default_litellm_params")
    if isinstance(dropped, Mapping) and isinstance(given, Mapping):
        parts.router["default_litellm_params"] = {**dropped, **given}


def _callbacks(section: Section, parts: Parts) -> list[str]:
    """All that are named. Of the host's own code: into ``parts``; the others are LiteLLM's, and ignored."""
    named: list[str] = []
    for kind in _LISTS:
        value = section.take(kind)
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | None):
            section.report.problem(section.at(kind), "expected a list of names")
            continue
        for place, name in enumerate(names or []):
            path = section.at(kind) if isinstance(value, str) else f"{section.at(kind)}[{place}]"
            if not isinstance(name, str):
                section.report.problem(path, "expected a name")
            elif _DOTTED.match(name):
                parts.hooks += [] if name in parts.hooks else [name]
            elif name != _BATCHED:
                section.report.ignored.append(path)
            named.append(str(name))
    return named


# --- the cache


def _cache(section: Section, parts: Parts, environ: Environ, *, batched: bool) -> dict[str, object] | None:
    switched = section.flag("cache", False)
    ttls = {name: section.take(name) for name in ("default_in_memory_ttl", "default_redis_ttl")}
    params = section.raw("cache_params")
    if not switched:
        if params is not None:
            section.report.note(f"{section.at('cache_params')}: not used, as cache is not true")
        return None
    inner = Section(section.values, section.at("cache_params"), _without_null(params, section))
    given = read_cache(inner, parts, environ, switch="cache: true")
    for name, value in ttls.items():
        if value is not None and (name != "default_redis_ttl" or given["type"] in IN_REDIS):
            given.setdefault(name, value)
            parts.cache_origins.setdefault(name, section.at(name))
    if given["type"] == "local" and "default_in_memory_ttl" in given:
        given["ttl"] = given.pop("default_in_memory_ttl")
        path = parts.cache_origins.get("default_in_memory_ttl", inner.at("default_in_memory_ttl"))
        parts.cache_origins["ttl"] = path
    if given["type"] in ("redis-semantic", "qdrant-semantic") and not (MODELS - {"judge"}) & given.keys():
        given["embedding_model"] = _EMBEDDING
    if batched and given["type"] in IN_REDIS:
        given.setdefault("batch_redis_requests", True)
    return given


def _without_null(params: object, section: Section) -> object:
    """Null is as good as not given, but for ``ssl_cert_reqs``, of which it means that none is asked for."""
    if not isinstance(params, Mapping):
        return params
    given = {name: value for name, value in params.items() if value is not None}
    if params.get("ssl_cert_reqs", "") is None:
        given["ssl_cert_reqs"] = "none"
        section.report.note(f"{section.at('cache_params.ssl_cert_reqs')}: null: no certificate is verified")
    return given


# --- general_settings


def _general(section: Section, parts: Parts, environ: Environ, redis: Mapping[str, object] | None) -> None:
    parts.master_key = section.text("master_key")
    if parts.master_key is None and (found := environ.get("LITELLM_MASTER_KEY", "").strip()):
        parts.master_key = found
        section.report.secret(found)
        section.report.note("master_key: that of LITELLM_MASTER_KEY")
    if parts.master_key is not None:
        section.report.secret(parts.master_key)
    parts.keys_ttl = section.number("user_api_key_cache_ttl", parts.keys_ttl, expected="seconds >= 0")
    if "max_request_size_mb" in section:
        size = section.number("max_request_size_mb", 0, expected="a number of MB >= 0")
        parts.max_body_bytes = int(min(size * _MIB, 2**53)) or None
    coordination = section.section("coordination_redis").all()
    if "startup_nodes" in coordination:
        coordination["redis_startup_nodes"] = coordination.pop("startup_nodes")
    coordination = {name: value for name, value in coordination.items() if value is not None}
    own = section.at("coordination_redis") if coordination else parts.cache_path
    _share(section, parts, coordination or redis, own)
    section.close(_GENERAL, known.GENERAL)


def _share(section: Section, parts: Parts, redis: Mapping[str, object] | None, path: str) -> None:
    """The Redis of the cache is also that of limits and cooldowns, unless these name their own; keys are in
    the database, else in that Redis. A Redis alone asks nobody for a key: a master key does."""
    named = any(name.startswith("redis") for name in parts.router)
    if redis and not named:
        parts.set_router("redis", dict(redis), path)
    url = section.text("database_url")
    parts.store_path = section.at("database_url") if url else path
    if url is not None:
        parts.store = {"type": "sql", "url": _without_prisma(url, section)}
    elif redis:
        namespace = {"namespace": f"{redis.get('namespace') or NAMESPACE}:keys"}
        parts.store, parts.implied_store = {"type": "redis", **redis, **namespace}, True
    elif parts.master_key is not None and section.values.environ.get("DATABASE_URL"):
        hint = f"name it as {section.at('database_url')} to keep API keys there"
        section.report.note(f"DATABASE_URL is not used; {hint}")


def _without_prisma(url: str, section: Section) -> str:
    """``url`` without what only Prisma, LiteLLM's own client, knows in a URL; other drivers refuse it."""
    base, _, query = url.partition("?")
    given = [part for part in query.split("&") if part]
    kept = [part for part in given if part.partition("=")[0] not in _PRISMA]
    left = sorted({part.partition("=")[0] for part in given if part not in kept})
    if left:
        section.report.note(
            f"{section.at('database_url')}: without {', '.join(left)}, which only Prisma knows"
        )
    return base + (f"?{'&'.join(kept)}" if kept else "")
