"""The cache's admin routes: ask how it is, look into it, remove from it, change its settings."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Awaitable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ..caching.invalidation import Wanted, wanted
from ..caching.settings import SETTINGS, CacheSettings
from ..errors import ConfigError, InvalidRequestError, LLMMiddlewareError, StoreError, did_you_mean
from .message import Request, Response, json_response

if TYPE_CHECKING:
    from .app import LLMApp

__all__ = ["CHANGEABLE", "HANDLERS", "MOST_ENTRIES", "SOUGHT", "UnprocessableRequestError"]

logger = logging.getLogger("llm_middleware")

T = TypeVar("T")

SOUGHT: Final = ("tags", "model", "scope", "namespace", "kind", "prefix")
"""By what entries are removed, beside their keys."""

CHANGEABLE: Final = (
    "enabled",
    "ttl",
    "default_in_redis_ttl",
    "default_redis_ttl",
    "ttl_jitter",
    "stale_while_revalidate",
    "stale_if_error",
    "mode",
    "supported_call_types",
    "ignore_fields",
    "admission",
    "on_disconnect",
    "max_entry_bytes",
    "single_flight_wait",
)
"""Settings that take effect at run time, and widen nobody's access to what others asked."""

MOST_ENTRIES: Final = 1000

_SECRET: Final = frozenset({"secret", "encryption_key"})
_HIDDEN: Final = "***"
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_VARIABLE: Final = "os.environ/"


class UnprocessableRequestError(InvalidRequestError):
    """The body is JSON, and says something that cannot be done."""

    status = 422


class _UnhealthyError(LLMMiddlewareError):
    status = 503
    code = "cache_ping_error"


# --- how it is


async def _ping(app: LLMApp, request: Request) -> Response:
    settings = app.cache.settings
    if not settings.enabled:
        raise _UnhealthyError("the cache is off: litellm_settings.cache turns it on", param="cache_ping")
    try:
        told = await app.cache._ping(request.port)
    except Exception as exc:
        logger.warning("the ping of the cache failed: %s: %s", type(exc).__name__, exc)
        raise _UnhealthyError(f"the cache does not answer: {_reason(exc)}", param="cache_ping") from None
    if told["status"] != "healthy":
        raise _UnhealthyError("the cache gave back other bytes than were written", param="cache_ping")
    own = ("status", "tier", "latency_ms")
    answer = {
        "status": "healthy",
        "cache_type": app.cache.type,
        "ping_response": True,
        "set_cache_response": "success",
        "litellm_cache_params": json.dumps(_shown(settings)),  # text, as LiteLLM's clients expect it
        "health_check_cache_params": {name: value for name, value in told.items() if name not in own},
        "tier": told["tier"],
        "latency_ms": told["latency_ms"],
    }
    return json_response(answer)


def _reason(exc: Exception) -> str:
    """Stores of ours mask what is secret; nobody knows what those of others say."""
    return exc.message if isinstance(exc, LLMMiddlewareError) else type(exc).__name__


async def _stats(app: LLMApp, request: Request) -> Response:
    settings = app.cache.settings
    return json_response({"cache_type": app.cache.type, "enabled": settings.enabled, **app.cache.stats()})


# --- removing


async def _delete(app: LLMApp, request: Request) -> Response:
    body = request.json()
    _check_fields(body, ("keys", *SOUGHT, "dry_run"))
    given = {name: value for name, value in body.items() if value is not None}
    dry_run = given.pop("dry_run", False)
    if not isinstance(dry_run, bool):
        raise _wrong("dry_run", "true or false")
    if not given:
        raise UnprocessableRequestError(f"nothing to delete: give keys, or any of {', '.join(SOUGHT)}")
    if "keys" not in given:
        count = await _told(app.cache._invalidate(request.port, _wanted(app, given), dry_run))
    elif len(given) > 1:
        raise UnprocessableRequestError("keys: goes alone", param="keys")
    else:
        count = await _told(app.cache._delete(request.port, _full_keys(app, given["keys"]), dry_run))
    return json_response({"status": "success", "count": count, "dry_run": dry_run})


def _wanted(app: LLMApp, given: Mapping[str, Any]) -> Wanted:
    tags, prefix = given.get("tags", []), given.get("prefix", "")
    if not isinstance(tags, list):
        raise _wrong("tags", "a list of strings")
    if isinstance(prefix, str):
        prefix = prefix.removeprefix(_namespace(app))
    model, scope, namespace, kind = (given.get(name) for name in ("model", "scope", "namespace", "kind"))
    try:
        return wanted(tags, model, scope, namespace, kind, prefix)
    except ConfigError as exc:
        raise UnprocessableRequestError(exc.message, param=exc.param) from None


def _full_keys(app: LLMApp, keys: object) -> list[str]:
    """Of the keys given those that can be of this cache: nobody else's are touched."""
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise _wrong("keys", "a list of strings")
    namespace = _namespace(app)
    digests = [key.removeprefix(namespace) for key in keys]
    return [namespace + digest for digest in digests if _DIGEST.fullmatch(digest)]


def _namespace(app: LLMApp) -> str:
    """What the full keys of entries begin with."""
    return f"{app.cache.settings.namespace}:"


async def _flush(app: LLMApp, request: Request) -> Response:
    return json_response({"status": "success", "count": await _told(app.cache._flush(request.port))})


async def _report(app: LLMApp, request: Request) -> Response:
    """One answer, by its cache key: it is removed, and what served it learns."""
    body = request.json()
    _check_fields(body, ("key", "cache_key"))
    given = [value for value in body.values() if value is not None]
    if len(given) != 1 or not isinstance(given[0], str):
        raise UnprocessableRequestError("key: expected a cache key, as x-llm-cache-key tells it", param="key")
    keys = _full_keys(app, given)
    if not keys:
        raise UnprocessableRequestError("key: expected 64 hex digits of a cache key", param="key")
    found = await _told(app.cache._report(request.port, keys[0]))
    return json_response({"status": "success", "count": int(found)})


# --- looking into it


async def _entries(app: LLMApp, request: Request) -> Response:
    params = request.params
    limit = params.get("limit") or "100"
    if not limit.isascii() or not limit.isdecimal() or not 1 <= int(limit[:9]) <= MOST_ENTRIES:
        raise InvalidRequestError(f"limit: expected a number from 1 to {MOST_ENTRIES}", param="limit")
    found = app.cache._entries(
        request.port,
        params.get("prefix", "").removeprefix(_namespace(app)),
        params.get("cursor") or None,
        int(limit[:9]),
        content=app.config.show_content,
        models=tuple(app.router.models),
    )
    cursor, rows = await _told(found)
    return json_response({"entries": rows, "cursor": cursor})


async def _told(work: Awaitable[T]) -> T:
    """What ``work`` returns. What it cannot do is the caller's affair (422) or the store's (503)."""
    try:
        return await work
    except ConfigError as exc:
        raise UnprocessableRequestError(exc.message, param=exc.param) from None
    except LLMMiddlewareError:
        raise
    except Exception as exc:
        logger.exception("the cache's store failed")
        raise StoreError(f"the cache's store failed: {type(exc).__name__}") from None


# --- settings


async def _settings(app: LLMApp, request: Request) -> Response:
    return json_response({"settings": _shown(app.cache.settings), "changeable": CHANGEABLE})


async def _change(app: LLMApp, request: Request) -> Response:
    body = request.json()
    if not body:
        raise UnprocessableRequestError(f"nothing to change: give any of {', '.join(CHANGEABLE)}")
    for name, value in body.items():
        if name in SETTINGS and name not in CHANGEABLE:
            raise UnprocessableRequestError(f"{name}: cannot change at run time", param=name)
        # The server's own variables are not for those who may call it.
        if _VARIABLE in _json(name, value):
            raise UnprocessableRequestError(f"{name}: {_VARIABLE} is for files of settings", param=name)
    _check_fields(body, CHANGEABLE)
    try:
        app.cache.update(**body)
    except ConfigError as exc:
        raise UnprocessableRequestError(exc.message, param=exc.param) from None
    return json_response({"status": "success", "settings": _shown(app.cache.settings)})


def _json(name: str, value: object) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        raise UnprocessableRequestError(f"{name}: is nested too deeply", param=name) from None


def _shown(settings: CacheSettings) -> dict[str, object]:
    return {
        each.name: _plain(each.name, getattr(settings, each.name)) for each in fields(settings) if each.init
    }


def _plain(name: str, value: object) -> object:
    """A setting as JSON has it, without what is secret."""
    if value is not None and name in _SECRET:
        return _HIDDEN
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple):
        return list(value)
    return getattr(value, "__qualname__", type(value).__qualname__)  # a function of the host's


def _check_fields(body: Mapping[str, object], known: tuple[str, ...]) -> None:
    for name in body:
        if name not in known:
            hint = did_you_mean(name, known) or f"; known: {', '.join(known)}"
            raise UnprocessableRequestError(f"{name}: unknown field{hint}", param=name)


def _wrong(name: str, expected: str) -> UnprocessableRequestError:
    return UnprocessableRequestError(f"{name}: expected {expected}", param=name)


HANDLERS = {
    "cache_ping": _ping,
    "cache_delete": _delete,
    "cache_flush": _flush,
    "cache_report": _report,
    "cache_stats": _stats,
    "cache_entries": _entries,
    "cache_settings": _settings,
    "cache_change": _change,
}
