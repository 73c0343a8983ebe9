"""The settings of the response cache, the same for both forms of file: which type is meant where none is
named, what of the environment belongs to it, and what only another type of cache would use."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Final

from ..caching.backends import SEMANTIC
from ..caching.settings import SETTINGS
from ..errors import did_you_mean
from ..semantic.settings import LITELLM_NAMES, NAMES
from ..stores.redis_settings import COMMON_NAMES
from ..stores.s3_settings import S3Settings
from .known import OTHER_CACHES
from .parts import Parts
from .values import Section, Values

__all__ = ["IN_REDIS", "NAMESPACE", "TYPES", "read_cache", "redis_connection"]

TYPES: Final = ("local", "disk", "redis", "s3", *SEMANTIC)
_ALIASES: Final = {"memory": "local"}
_ELSEWHERE: Final = ("gcs", "azure-blob", "valkey-semantic")
IN_REDIS: Final = ("redis", "redis-semantic")
NAMESPACE: Final = "llm"
_STORE: Final = {"type", "store", "hooks", "clock", "get_cache", "add_cache"}
# An address names a whole server: with one of them none of the others counts. In the order of precedence.
_ADDRESSES: Final = {
    "sentinel_nodes": "REDIS_SENTINEL_NODES",
    "redis_startup_nodes": "REDIS_CLUSTER_NODES",
    "url": "REDIS_URL",
    "unix_socket_path": "REDIS_UNIX_SOCKET_PATH",
    "host": "REDIS_HOST",
}
_IN_URL: Final = {"port", "db", "username", "password", "ssl"}
_IDENTITIES: Final = {"gcp_service_account", "aws_iam_auth", "azure_redis_ad_token", "credential_provider"}
_S3: Final = frozenset(each.name for each in fields(S3Settings) if each.name.startswith("s3_"))
_REDIS: Final = COMMON_NAMES | {
    "batch_redis_requests",
    "default_in_redis_ttl",
    "default_redis_ttl",
    "redis_flush_interval",
    "redis_flush_size",
}
_MEANING: Final = frozenset([*NAMES, *LITELLM_NAMES])
_DISK: Final = frozenset(["disk_cache_dir"])
_USED_BY: Final[Mapping[str, Collection[str]]] = {
    "redis": _REDIS,
    "s3": _S3,
    "disk": _DISK,
    "semantic": _MEANING | _DISK,
    "redis-semantic": _MEANING | _REDIS,
    "qdrant-semantic": _MEANING | _REDIS,
}


def read_cache(
    section: Section, parts: Parts, environ: Mapping[str, str], *, switch: str
) -> dict[str, object]:
    """The arguments of a `CacheManager` by ``section``, also put into ``parts`` unless no answer is to be
    kept. ``switch``: what turned the cache on, for the note that says which type was chosen."""
    parts.cache_path = section.path
    given = {name: section.take(name) for name in section.names()}
    given = {
        "type": _type(given, section, environ, switch),
        **{n: v for n, v in given.items() if n != "type"},
    }
    kind = given["type"]
    _let_go(given, section)
    if kind in IN_REDIS:
        _add_environment(given, section.values, parts)
    types = given.get("supported_call_types")
    if isinstance(types, list) and not types:
        section.report.note(f"{section.at('supported_call_types')}: empty, so no answers are kept")
    else:
        parts.cache = given
    return given


def redis_connection(given: Mapping[str, object]) -> dict[str, object] | None:
    """How the Redis of a cache is reached, for others who may share it; None where it is in no Redis."""
    if given.get("type") not in IN_REDIS:
        return None
    own = (*SETTINGS, *_STORE, *_MEANING)
    named = {name: value for name, value in given.items() if name not in own and value is not None}
    return {**named, "namespace": given.get("namespace") or NAMESPACE}


def _type(given: Mapping[str, object], section: Section, environ: Mapping[str, str], switch: str) -> object:
    kind = given.get("type")
    if kind is None:
        return _chosen(given, section, environ, switch)
    if isinstance(kind, str):
        kind = _ALIASES.get(kind, kind)
    if not isinstance(kind, str) or kind not in (*TYPES, "custom"):
        section.report.problem(section.at("type"), _refusal(kind))
    return kind


def _refusal(kind: object) -> str:
    known = ", ".join(TYPES)
    if kind in _ELSEWHERE:
        return f"{kind}: there is no such store here; expected one of {known}"
    shown = (
        f"got {kind!r}{did_you_mean(kind, TYPES)}" if isinstance(kind, str) else f"not {type(kind).__name__}"
    )
    return f"expected one of {known}, {shown}"


def _chosen(given: Mapping[str, object], section: Section, environ: Mapping[str, str], switch: str) -> str:
    """A Redis where the file or the environment names one, else this process's memory."""
    address = next((name for name in _ADDRESSES if given.get(name)), None)
    variable = next((name for name in _ADDRESSES.values() if environ.get(name, "").strip()), None)
    found = address or variable
    chosen = f"redis ({found})" if found else "memory"
    section.report.note(f"{switch} without a type: {chosen}")
    return "redis" if found else "local"


def _let_go(given: dict[str, object], section: Section) -> None:
    """What only another type would use: told, and not handed on."""
    kind = str(given["type"])
    idle = [name for name in given if name in OTHER_CACHES]
    known = {name for names in _USED_BY.values() for name in names}
    if kind in TYPES:
        idle += [name for name in given if name in known and name not in _USED_BY.get(kind, ())]
    for name in dict.fromkeys(idle):
        if given.pop(name) is not None:
            section.report.note(f"{section.at(name)}: a cache of type {kind} does not use it")


def _add_environment(given: dict[str, object], values: Values, parts: Parts) -> None:
    """``REDIS_*`` variables that the process itself does not have: of ``environment_variables``, or of an
    environment of the caller's. The file's settings win, and an address among them makes other ones void."""
    own = {
        name: text for name, text in values.environ.items() if os.environ.get(name) != text and text.strip()
    }
    found = {_setting(name): (name, text) for name, text in own.items() if name.startswith("REDIS_")}
    explicit = {name for name, value in given.items() if value is not None}
    written = next((name for name in _ADDRESSES if name in explicit), None)
    address = written or next((name for name in _ADDRESSES if name in found), None)
    void = set(_ADDRESSES) - ({address} if address and not written else set())
    if address == "url":
        void |= _IN_URL
    if address != "sentinel_nodes":
        void.add("service_name")
    if explicit & _IDENTITIES:
        void.add("password")
    for name, (variable, text) in found.items():
        if name not in void and name not in explicit and name in COMMON_NAMES:
            values.report.secret(text)
            given[name] = text
            parts.cache_origins[name] = values.origins.get(variable, variable)


def _setting(variable: str) -> str:
    named = {name: setting for setting, name in _ADDRESSES.items()}
    return named.get(variable, variable.removeprefix("REDIS_").lower())
