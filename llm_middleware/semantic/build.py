"""From settings to the parts that they name. Making them opens nothing and connects to nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..caching.at_rest import AtRest
from ..errors import ConfigError
from ..types import Clock
from .decision import Policy
from .embed_cache import CachedEmbedder
from .embedders import Embedder, callable_embedder, router_embedder
from .indexing import Index
from .judges import made_judge
from .learning import Families
from .modes import Mode, Static, Verified
from .settings import SemanticSettings
from .tally import Tally
from .teaching import Teacher
from .tier import SemanticTier

if TYPE_CHECKING:
    from ..caching.settings import CacheSettings
    from ..caching.tiers import Tiers

__all__ = ["body_type", "make_qdrant_store", "make_tier"]

_SETTING_OF = {"quantization": "qdrant_quantization_config", "collection": "index_name", "name": "index_name"}
_QDRANT_BUDGET = 1.0  # seconds at least: it is asked over HTTP, and makes its collections when first used


def make_tier(
    kind: str,
    settings: SemanticSettings,
    cache: CacheSettings,
    connection: Mapping[str, object],
    tiers: Tiers,
    clock: Clock,
) -> SemanticTier:
    """``kind``: one of `SEMANTIC` of `caching.backends`. ``cache``, ``connection``: the settings of the cache
    whose tiers these are."""
    embedder = CachedEmbedder(make_embedder(settings), budget=settings.embedding_budget)
    budget = cache.store_timeout if kind != "qdrant-semantic" else max(_QDRANT_BUDGET, cache.store_timeout)
    # What is in this process or its own file needs no key; what lies in a network may be read by others.
    hidden = None if kind == "semantic" or cache.encryption_key is None else _sealing(cache)
    with _by_settings_names():
        index = Index(make_index(kind, settings, cache, connection, clock), budget=budget, at_rest=hidden)
    mode, teacher, tally = _mode(settings, embedder, index), None, Tally()
    if isinstance(mode, Verified):
        judge = made_judge(settings.judge, embedder, settings.router)
        teacher = Teacher(judge, mode.families, index, tiers, clock, tally)
    return SemanticTier(
        embedder,
        index,
        mode,
        teacher,
        tiers=tiers,
        tally=tally,
        clock=clock,
        secret=cache.secret,
        context=settings.context,  # type: ignore[arg-type]  # checked there
        question_field=settings.question_field,
        shadow=settings.shadow,
    )


@contextmanager
def _by_settings_names() -> Iterator[None]:
    """A `ConfigError` of an index names the setting that its argument came from."""
    try:
        yield
    except ConfigError as exc:
        name = _SETTING_OF.get(exc.param or "")
        if name is None:
            raise
        raise ConfigError(exc.message.replace(f"{exc.param}:", f"{name}:", 1), param=name) from None


def _sealing(cache: CacheSettings) -> AtRest:
    return AtRest(compress=None, encryption_key=cache.encryption_key)  # type: ignore[arg-type]  # checked there


def _mode(settings: SemanticSettings, embedder: CachedEmbedder, index: Index) -> Mode:
    if settings.static:
        return Static(embedder, settings.similarity_threshold, settings.static_error_target)
    assert settings.max_error_rate is not None
    policy = Policy(settings.max_error_rate, judge_budget=settings.judge_budget)
    if settings.similarity_threshold is not None:
        policy = replace(policy, floor=settings.similarity_threshold)
    return Verified(Families(index), policy, shadow=settings.shadow)


def make_embedder(settings: SemanticSettings) -> Embedder:
    """What ``embedding_model`` names. `ConfigError` where it is not there."""
    model: Any = settings.embedding_model
    limits: dict[str, Any] = {
        "dimensions": settings.embedding_dimensions,
        "max_tokens": settings.embedding_max_tokens,
    }
    if model == "local":
        from .embed_local import LocalEmbedder

        return LocalEmbedder()
    if isinstance(model, str):
        if settings.router is None:
            raise ConfigError(
                f"embedding_model: {model!r} is a model: give the router that has it, or 'local'",
                param="embedding_model",
            )
        options = {"timeout": settings.embedding_timeout}
        return router_embedder(settings.router, model, options=options, **limits)
    if hasattr(model, "embed") or hasattr(model, "aembed"):
        embedder: Embedder = model
        return embedder
    return callable_embedder(model, **limits)


def make_index(
    kind: str,
    settings: SemanticSettings,
    cache: CacheSettings,
    connection: Mapping[str, object],
    clock: Clock,
) -> object:
    """The `VectorIndex` that goes with ``kind``, unless the settings bring one."""
    if settings.vector_index is not None:
        return settings.vector_index
    dimensions = settings.embedding_dimensions
    if kind == "redis-semantic":
        from ..stores.redis_connect import RedisConnection
        from .index_redis import RedisIndex

        reached = RedisConnection.from_settings(connection, budget=cache.store_timeout)
        name = settings.index_name or f"{cache.namespace}-semantic"
        return RedisIndex(reached, name=name, dimensions=dimensions, clock=clock)
    if kind == "qdrant-semantic":
        from .index_qdrant import QdrantIndex

        url, api_key = _qdrant_place(settings)
        return QdrantIndex(
            url,
            api_key=api_key,
            collection=_collection(settings, cache),
            dimensions=dimensions,
            quantization=settings.qdrant_quantization_config,  # type: ignore[arg-type]  # checked there
            timeout=max(_QDRANT_BUDGET, cache.store_timeout),
            clock=clock,
        )
    from .index_numpy import NumpyIndex

    return NumpyIndex(
        max_bytes=settings.index_bytes, dimensions=dimensions, path=settings.index_path, clock=clock
    )


def body_type(kind: str, given: Mapping[str, object]) -> str:
    """The type of the store that keeps the answers themselves, for such a type and a cache's settings:
    for Qdrant a Redis where the settings reach one, else Qdrant too."""
    if kind == "semantic":
        return "disk" if given.get("disk_cache_dir") is not None else "local"
    places = ("host", "url", "redis_startup_nodes", "sentinel_nodes", "unix_socket_path")
    if kind == "redis-semantic" or any(given.get(name) for name in places):
        return "redis"
    return "qdrant"


def make_qdrant_store(settings: SemanticSettings, cache: CacheSettings, clock: Clock) -> object:
    """The store of answers in the Qdrant that has the index."""
    from ..stores.qdrant import QdrantStore

    url, api_key = _qdrant_place(settings)
    name = f"{_collection(settings, cache)}-answers"
    timeout = max(_QDRANT_BUDGET, cache.store_timeout)
    with _by_settings_names():
        return QdrantStore(url, api_key=api_key, collection=name, timeout=timeout, clock=clock)


def _collection(settings: SemanticSettings, cache: CacheSettings) -> str:
    """The index's collection; what Qdrant takes in no name is a hyphen where the name is made here."""
    return settings.index_name or re.sub(r'[<>:"/\\|?*\x00-\x1f]', "-", f"{cache.namespace}-semantic")


def _qdrant_place(settings: SemanticSettings) -> tuple[str, str | None]:
    """(URL, API key) of the Qdrant that the settings or, after them, the environment name."""
    environ = os.environ
    url = settings.qdrant_api_base or environ.get("QDRANT_API_BASE") or environ.get("QDRANT_URL")
    if not url:
        raise ConfigError(
            "qdrant_api_base: expected a URL, here or in QDRANT_API_BASE or QDRANT_URL",
            param="qdrant_api_base",
        )
    return url, settings.qdrant_api_key or environ.get("QDRANT_API_KEY") or None
