"""The process's default cache: what the decorator and a middleware without ``cache=`` use."""

from __future__ import annotations

import logging
import threading

from .decorator import cached
from .manager import CacheManager
from .settings import SETTINGS

__all__ = ["cached", "default_cache", "disable_cache", "enable_cache", "update_cache"]

logger = logging.getLogger("llm_middleware")

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
        _close(before)
    return cache


def _close(before: CacheManager) -> None:
    try:
        before.close()
    except Exception as exc:  # such as a store that has async methods only; its successor serves already
        logger.warning("the former default cache was not closed: %s: %s", type(exc).__name__, exc)


def disable_cache() -> None:
    """Neither read nor write through the default cache until `enable_cache` is called again."""
    default_cache().disable()


def update_cache(type: str | None = None, **settings: object) -> CacheManager:  # noqa: A002
    """Change settings of the default cache while it is in use, and return it.

    With ``type``, or with what is not one of `CacheSettings` (a connection's settings, ``store``, ``hooks``),
    another cache takes its place, as by `enable_cache`: the type in use unless given, these settings, and all
    others as they are by default. Wrong settings are a `ConfigError` and leave everything as it was.
    """
    cache = default_cache()
    if type is None and all(name in SETTINGS for name in settings):
        cache.update(**settings)
        return cache
    return enable_cache(cache.settings.type if type is None else type, **settings)
