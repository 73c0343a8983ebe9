"""The process's default cache: what the decorator and a middleware without ``cache=`` use."""

from __future__ import annotations

import threading

from .decorator import cached
from .manager import CacheManager

__all__ = ["cached", "default_cache", "disable_cache", "enable_cache", "update_cache"]

_lock = threading.Lock()
_default: CacheManager | None = None


def default_cache() -> CacheManager:
    """The default cache; one in memory is made on first use."""
    global _default
    with _lock:
        if _default is None:
            _default = CacheManager()
        return _default


def enable_cache(type: str = "local", **settings: object) -> CacheManager:  # noqa: A002
    """Make a `CacheManager` the default and return it. A second call wins: what the first one held is closed.
    Wrong settings are a `ConfigError` and leave the first one in place."""
    global _default
    cache = CacheManager(type, **settings)  # type: ignore[arg-type]
    with _lock:
        before, _default = _default, cache
    if before is not None:
        before.close()
    return cache


def disable_cache() -> None:
    """Neither read nor write through the default cache until `enable_cache` is called again."""
    default_cache().disable()


def update_cache(**settings: object) -> CacheManager:
    """Change settings of the default cache while it is in use."""
    cache = default_cache()
    cache.update(**settings)
    return cache
