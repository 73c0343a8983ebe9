"""The schemas in the sub-app's OpenAPI document: what each route takes, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ..caching.admission import REASONS
from ..caching.endpoints import CALL_TYPES
from .admin import CHANGEABLE, MOST_ENTRIES, SOUGHT

__all__ = ["ANSWERS", "PARAMETERS", "REQUESTS", "SCHEMAS", "ref"]

Schema = Mapping[str, Any]


def ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(
    properties: Mapping[str, Schema], required: tuple[str, ...] = (), *, closed: bool = False
) -> Schema:
    schema: dict[str, Any] = {"type": "object", "properties": dict(properties)}
    if required:
        schema["required"] = list(required)
    if closed:
        schema["additionalProperties"] = False
    return schema


def _list(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


TEXT: Final[Schema] = {"type": "string"}
NAME: Final[Schema] = {"type": "string", "minLength": 1}
FLAG: Final[Schema] = {"type": "boolean"}
WHOLE: Final[Schema] = {"type": "integer", "minimum": 0}
NUMBER: Final[Schema] = {"type": "number", "minimum": 0}
ANY: Final[Schema] = {"type": "object"}
TAG: Final[Schema] = {"type": "string", "minLength": 1, "maxLength": 256}
KIND: Final[Schema] = {"enum": sorted(CALL_TYPES)}
FLAGS: Final[Schema] = {
    "type": "object",
    "additionalProperties": FLAG,
    "propertyNames": {"enum": sorted(REASONS)},
}

# --- models

_CACHE = _object(
    {
        "ttl": NUMBER,
        "s-maxage": NUMBER,
        "s-max-age": NUMBER,
        "no-cache": FLAG,
        "no-store": FLAG,
        "use-cache": FLAG,
        "namespace": TAG,
        "tags": _list(TAG, maxItems=64),
        "stale-while-revalidate": NUMBER,
        "stale-if-error": NUMBER,
    },
    closed=True,
)
_WAY: Final[Mapping[str, Schema]] = {
    "timeout": {"type": "number", "exclusiveMinimum": 0},
    "num_retries": {"type": "integer", "minimum": 0, "maximum": 100},
    "fallbacks": _list(NAME),
}
_COMMON: Final[Mapping[str, Schema]] = {"cache": _or_null(ref("CacheControls")), **_WAY}
_STREAM: Final[Mapping[str, Schema]] = {"stream": FLAG}
_MESSAGE = _object(
    {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool", "function"]},
        "content": {"anyOf": [TEXT, _list(ANY), {"type": "null"}]},
    },
    ("role",),
)
_PROMPT: Final[Schema] = {"anyOf": [TEXT, _list(TEXT, minItems=1), _list(WHOLE, minItems=1)]}

_MODELS: Final[Mapping[str, tuple[Mapping[str, Schema], tuple[str, ...]]]] = {
    "ChatRequest": ({"messages": _list(_MESSAGE, minItems=1), **_STREAM, **_COMMON}, ("messages",)),
    "TextRequest": ({"prompt": _PROMPT, **_STREAM, **_COMMON}, ("prompt",)),
    "EmbeddingRequest": (
        {"input": _PROMPT, "encoding_format": {"enum": ["float", "base64"]}, **_COMMON},
        ("input",),
    ),
    "ResponsesRequest": ({"input": {"anyOf": [TEXT, _list(ANY)]}, **_STREAM, **_COMMON}, ("input",)),
    "TranscriptionRequest": (
        {
            "file": {"type": "string", "contentMediaType": "application/octet-stream"},
            "language": TEXT,
            "prompt": TEXT,
            "response_format": {"enum": ["json", "text", "srt", "verbose_json", "vtt"]},
            "temperature": {"type": "number"},
        },
        ("file",),
    ),
}


def _requests() -> dict[str, Schema]:
    """Each with the model in the body, and with the model in the path."""
    found: dict[str, Schema] = {}
    for name, (properties, required) in _MODELS.items():
        found[name] = _object({"model": NAME, **properties}, ("model", *required))
        found[f"{name}InPath"] = _object(properties, required)
    return found


# --- keys

# Of the grammar of keys/duration.py what is usual.
DURATION: Final[Schema] = {
    "type": "string",
    "pattern": "^([1-9][0-9]{0,3}(mo|[wd])|[1-9][0-9]{0,3}h([1-9][0-9]?m)?|[1-9][0-9]{0,3}[ms])$",
    "examples": ["30d", "1h30m"],
}
_LIMIT: Final[Schema] = {"type": "integer", "minimum": 0, "maximum": 2**53 - 1}
_KEY: Final[Schema] = {"type": "string", "minLength": 1, "description": "the key, or its id (`token`)"}
_KEY_FIELDS: Final[Mapping[str, Schema]] = {
    "key_alias": _or_null(TAG),
    "user_id": _or_null(TAG),
    "team_id": _or_null(TAG),
    "models": _list(TAG),
    "aliases": {"type": "object", "additionalProperties": TAG},
    "metadata": _object({"cache": _or_null(ref("CacheControls"))}),
    "allowed_cache_controls": _or_null(_list({"enum": sorted(_CACHE["properties"])})),
    "duration": _or_null(DURATION),
    **{name: _or_null(_LIMIT) for name in ("rpm_limit", "tpm_limit", "max_parallel_requests")},
    "max_budget": _or_null(NUMBER),
    "budget_duration": _or_null(DURATION),
    "spend": NUMBER,
    "blocked": FLAG,
    "admin": FLAG,
    "config": ANY,
}
_ONE_KEY = _object({"key": _KEY}, ("key",), closed=True)

# --- the cache

_ENTRY = _object(
    {
        "key": TEXT,
        "kind": _or_null(TEXT),
        "model": _or_null(TEXT),
        "tags": _or_null(_list(TEXT)),
        "age": _or_null({"type": "number"}),
        "ttl": _or_null({"type": "number"}),
        "size": _or_null(WHOLE),
        "content": _or_null(TEXT),
    },
    ("key", "kind", "model", "tags", "age", "ttl", "size"),
)
_ABOUT: Final[Mapping[str, Schema]] = {
    "tags": _list(TEXT, minItems=1),
    "model": TEXT,
    "scope": TEXT,
    "namespace": TEXT,
    "kind": KIND,
    "prefix": NAME,
}
_ANSWER: Final[Schema] = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_BY_KEY = _object({"keys": _list(TEXT), "dry_run": FLAG}, ("keys",), closed=True)
_BY_ABOUT = _object({**_ABOUT, "dry_run": FLAG}, closed=True)
_SECONDS: Final = {"stale_while_revalidate", "stale_if_error", "single_flight_wait"}
_SETTINGS: Final[Mapping[str, Schema]] = {
    **{name: NUMBER if name in _SECONDS else _or_null(NUMBER) for name in CHANGEABLE},
    "enabled": FLAG,
    "mode": {"enum": ["default_on", "default_off"]},
    "supported_call_types": _or_null(_list(KIND)),
    "ttl_jitter": {"type": "number", "minimum": 0, "maximum": 1},
    "ignore_fields": _list(NAME),
    "admission": FLAGS,
    "on_disconnect": {"enum": ["auto", "cancel", "finish"]},
    "max_entry_bytes": WHOLE,
}

SCHEMAS: Final[Mapping[str, Schema]] = {
    "CacheControls": _CACHE,
    **_requests(),
    "Error": _object(
        {
            "error": _object(
                {"message": TEXT, "type": TEXT, "param": _or_null(TEXT), "code": _or_null(TEXT)},
                ("message", "type", "param", "code"),
            )
        },
        ("error",),
    ),
    "Model": _object(
        {"id": TEXT, "object": {"const": "model"}, "created": WHOLE, "owned_by": TEXT},
        ("id", "object", "created", "owned_by"),
    ),
    "Models": _object({"object": {"const": "list"}, "data": _list(ref("Model"))}, ("object", "data")),
    "CacheDelete": {"oneOf": [_BY_KEY, {**_BY_ABOUT, "anyOf": [{"required": [name]} for name in SOUGHT]}]},
    "CacheReport": {
        "oneOf": [_object({name: _ANSWER}, (name,), closed=True) for name in ("key", "cache_key")]
    },
    "CacheRemoved": _object({"status": {"const": "success"}, "count": WHOLE}, ("status", "count")),
    "CacheEntries": _object({"entries": _list(_ENTRY), "cursor": _or_null(TEXT)}, ("entries", "cursor")),
    "CacheSettings": {**_object(_SETTINGS, closed=True), "minProperties": 1},
    "CachePing": _object(
        {
            "status": {"const": "healthy"},
            "cache_type": TEXT,
            "ping_response": FLAG,
            "set_cache_response": TEXT,
            "litellm_cache_params": TEXT,
            "health_check_cache_params": ANY,
            "tier": TEXT,
            "latency_ms": NUMBER,
        },
        ("status", "cache_type"),
    ),
    "KeyNew": _object({"key": TEXT, **_KEY_FIELDS}, closed=True),
    "KeyChange": _object({"key": _KEY, **_KEY_FIELDS}, ("key",), closed=True),
    "KeyReplaced": _object({"key": _KEY, "new_key": TEXT, **_KEY_FIELDS}, ("key",), closed=True),
    "KeyNamed": _ONE_KEY,
    "KeyOrOwn": _object({"key": _KEY}, closed=True),
    "KeysNamed": _object({"keys": _list(_KEY)}, ("keys",), closed=True),
    "KeyMade": _object({"key": TEXT, "expires": _or_null(TEXT)}, ("key", "expires")),
    "KeyInfo": _object({"key": TEXT, "info": ANY}, ("key", "info")),
    "KeysDeleted": _object({"deleted_keys": _list(TEXT)}, ("deleted_keys",)),
    "KeyList": _object({"keys": _list(ANY), "total_count": WHOLE}, ("keys", "total_count")),
}

REQUESTS: Final[Mapping[str, tuple[str, bool]]] = {
    "chat": ("ChatRequest", True),
    "text": ("TextRequest", True),
    "embedding": ("EmbeddingRequest", True),
    "transcription": ("TranscriptionRequest", True),
    "responses": ("ResponsesRequest", True),
    "cache_delete": ("CacheDelete", True),
    "cache_report": ("CacheReport", True),
    "cache_change": ("CacheSettings", True),
    "key_generate": ("KeyNew", False),
    "key_info": ("KeyOrOwn", False),
    "key_update": ("KeyChange", True),
    "key_delete": ("KeysNamed", True),
    "key_regenerate": ("KeyReplaced", True),
    "key_block": ("KeyNamed", True),
    "key_unblock": ("KeyNamed", True),
}
"""By handler or kind: the schema of the body, and whether there has to be one."""

_JSON: Final = "application/json"
_EVENTS: Final[Mapping[str, Schema]] = {_JSON: ANY, "text/event-stream": {}}
_NAMED: Final[Mapping[str, tuple[str, str]]] = {
    "models": ("The models that the caller may use", "Models"),
    "model": ("The model", "Model"),
    "cache_ping": ("An entry was written, read and deleted", "CachePing"),
    "cache_delete": ("How many entries were removed", "CacheRemoved"),
    "cache_flush": ("How many entries were removed", "CacheRemoved"),
    "cache_report": ("How many entries were removed", "CacheRemoved"),
    "cache_entries": ("A page of entries, and the cursor of the next", "CacheEntries"),
    "key_generate": ("The key, which is shown this once", "KeyMade"),
    "key_regenerate": ("The new key, which is shown this once", "KeyMade"),
    "key_info": ("What the key may do", "KeyInfo"),
    "key_delete": ("The keys that were there", "KeysDeleted"),
    "key_list": ("A page of keys", "KeyList"),
}
_PLAIN: Final[Mapping[str, str]] = {
    "cache_stats": "Counters since the start",
    "cache_settings": "The settings, without secrets",
    "cache_change": "The settings from now on",
    "key_update": "The key as it is now",
    "key_block": "The key as it is now",
    "key_unblock": "The key as it is now",
    "openapi": "This document",
    "health": "The app is there",
}
ANSWERS: Final[Mapping[str, tuple[str, Mapping[str, Schema]]]] = {
    "chat": ("A chat completion, or its events", _EVENTS),
    "text": ("A completion, or its events", _EVENTS),
    "embedding": ("Embeddings", {_JSON: ANY}),
    "transcription": ("The text", {_JSON: ANY, "text/plain": TEXT}),
    "responses": ("A response, or its events", _EVENTS),
    **{name: (text, {_JSON: ref(schema)}) for name, (text, schema) in _NAMED.items()},
    **{name: (text, {_JSON: ANY}) for name, text in _PLAIN.items()},
}
"""By handler or kind: what a 200 means, and what it has by content type."""


def _query(name: str, schema: Schema, text: str) -> Schema:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": text}


PARAMETERS: Final[Mapping[str, tuple[Schema, ...]]] = {
    "cache_entries": (
        _query("prefix", TEXT, "what keys begin with"),
        _query("cursor", TEXT, "from the page before"),
        _query("limit", {"type": "integer", "minimum": 1, "maximum": MOST_ENTRIES}, "entries of a page"),
    ),
    "key_info": (_query("key", NAME, "the id (`token`) of a key; the caller's own where there is none"),),
    "key_list": (
        _query("page", {"type": "integer", "minimum": 1}, "from 1"),
        _query("size", {"type": "integer", "minimum": 1, "maximum": 100}, "keys of a page"),
        _query("user_id", TEXT, "keys of this user"),
        _query("team_id", TEXT, "keys of this team"),
    ),
}
