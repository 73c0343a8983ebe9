"""The one table of the sub-app's routes, for both fronts: method and path, handler, and who may ask."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..caching.endpoints import OPENAI_ROUTES

__all__ = ["LLM", "MODEL_KINDS", "ROUTES", "Match", "Route", "find"]

Access = Literal["open", "key", "admin"]

LLM = "llm"
"""The handler of all endpoints whose answers are cached."""

_PARAMETER = re.compile(r"\{(\w+)\}")
_ENDPOINTS = ("/chat/completions", "/completions", "/embeddings", "/audio/transcriptions", "/responses")


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """``path``: with ``{name}`` for a part of any kind. ``handler``: its name in `llm_middleware.api.app`.
    ``kind``: of endpoint, for those of models. ``summary``: for people."""

    method: str
    path: str
    handler: str
    access: Access = "key"
    kind: str | None = None
    summary: str = ""


@dataclass(frozen=True, slots=True)
class Match:
    """``route`` is None where the path is there for other methods only: ``allowed``."""

    route: Route | None
    values: Mapping[str, str] = field(default_factory=dict)
    allowed: tuple[str, ...] = ()


def _models() -> Iterator[Route]:
    for endpoint in _ENDPOINTS:
        kind = OPENAI_ROUTES[f"/v1{endpoint}"]
        for before in ("/v1", ""):
            yield Route(
                method="POST", path=before + endpoint, handler=LLM, kind=kind, summary=f"OpenAI: {kind}"
            )
        for before in ("/engines/{model}", "/openai/deployments/{model}"):
            yield Route(
                method="POST",
                path=before + endpoint,
                handler=LLM,
                kind=kind,
                summary=f"{kind}, model in the path",
            )
    for before in ("/v1", ""):
        yield Route(method="GET", path=f"{before}/models", handler="models", summary="The models of this key")
        yield Route(method="GET", path=f"{before}/models/{{id}}", handler="model", summary="One model")


def _cache() -> Iterator[Route]:
    for method, name, summary in (
        ("GET", "ping", "Write, read and delete an entry"),
        ("POST", "delete", "Delete entries by key, tag, namespace or model"),
        ("POST", "flush", "Delete all entries of the cache's namespace"),
        ("POST", "report", "Say that an answer was wrong: it is deleted, and a semantic cache learns"),
        ("GET", "stats", "Counters"),
        ("GET", "entries", "List entries"),
        ("GET", "settings", "Show the settings"),
        ("POST", "settings", "Change settings at run time"),
    ):
        handler = f"cache_{name}" if method == "GET" or name != "settings" else "cache_change"
        yield Route(method=method, path=f"/cache/{name}", handler=handler, access="admin", summary=summary)


def _keys() -> Iterator[Route]:
    for method, name, access, summary in (
        ("POST", "generate", "admin", "Make a key"),
        ("GET", "info", "key", "Show the caller's key, or one by its id"),
        ("POST", "info", "key", "Show the caller's key, or one named in the body"),
        ("POST", "update", "admin", "Change a key"),
        ("POST", "delete", "admin", "Delete keys"),
        ("POST", "regenerate", "admin", "Give a key another secret"),
        ("POST", "block", "admin", "Refuse a key"),
        ("POST", "unblock", "admin", "Accept a key again"),
        ("GET", "list", "admin", "List keys"),
    ):
        handler = f"key_{name}"
        yield Route(method=method, path=f"/key/{name}", handler=handler, access=access, summary=summary)  # type: ignore[arg-type]


ROUTES: tuple[Route, ...] = (
    *_models(),
    *_cache(),
    *_keys(),
    Route(method="GET", path="/openapi.json", handler="openapi", access="open", summary="This document"),
    Route(method="GET", path="/health", handler="health", access="open", summary="Whether the app is there"),
)

_EXACT: dict[str, dict[str, Route]] = {}
_PATTERNS: list[tuple[re.Pattern[str], Route]] = []
for _route in ROUTES:
    if "{" in _route.path:
        # A model's name may have slashes in it.
        _pattern = "".join(
            f"(?P<{part}>.+)" if index % 2 else re.escape(part)
            for index, part in enumerate(_PARAMETER.split(_route.path))
        )
        _PATTERNS.append((re.compile(_pattern), _route))
    else:
        _EXACT.setdefault(_route.path, {})[_route.method] = _route


MODEL_KINDS = frozenset(route.kind for route in ROUTES if route.kind is not None)
"""Of all endpoints whose answers are cached."""


def find(method: str, path: str) -> Match | None:
    """The route of a request; None where nothing is at ``path``."""
    methods = _EXACT.get(path)
    if methods is not None:
        route = methods.get(method) or (methods.get("GET") if method == "HEAD" else None)
        return Match(route, allowed=tuple(methods))
    allowed: list[str] = []
    for pattern, route in _PATTERNS:
        match = pattern.fullmatch(path)
        if match is not None:
            if route.method == method:
                return Match(route, match.groupdict())
            allowed.append(route.method)
    return Match(None, allowed=tuple(allowed)) if allowed else None
