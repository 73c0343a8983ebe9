"""Answers to questions that were asked before in other words, and how sure one can be of them.

A `CacheManager` of type ``semantic``, ``redis-semantic`` or ``qdrant-semantic`` makes all of this itself.
Here are the parts that a host may bring or make: embedders, judges, indexes. Names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .embed_local import LocalEmbedder
    from .embedders import Embedder, callable_embedder, router_embedder
    from .index_numpy import NumpyIndex
    from .index_qdrant import QdrantIndex
    from .index_redis import RedisIndex
    from .judges import Judge, Pair
    from .records import AsyncVectorIndex, Neighbour, Row, VectorIndex

__all__ = [
    "AsyncVectorIndex",
    "Embedder",
    "Judge",
    "LocalEmbedder",
    "Neighbour",
    "NumpyIndex",
    "Pair",
    "QdrantIndex",
    "RedisIndex",
    "Row",
    "VectorIndex",
    "callable_embedder",
    "router_embedder",
]

_HOMES = {
    "LocalEmbedder": "embed_local",
    "NumpyIndex": "index_numpy",
    "QdrantIndex": "index_qdrant",
    "RedisIndex": "index_redis",
    **dict.fromkeys(("Embedder", "callable_embedder", "router_embedder"), "embedders"),
    **dict.fromkeys(("Judge", "Pair"), "judges"),
    **dict.fromkeys(("AsyncVectorIndex", "Neighbour", "Row", "VectorIndex"), "records"),
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
