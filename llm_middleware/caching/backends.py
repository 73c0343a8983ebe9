"""From settings to the tiers they name. Making them opens nothing and connects to nothing."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ..errors import ConfigError
from ..stores.memory import MemoryStore
from ..types import Clock
from .at_rest import AtRest
from .breaker import Breaker
from .entry import Entry, entry_size
from .reporter import Reporter
from .settings import CacheSettings
from .tiers import Tiers

__all__ = ["check_arguments", "make_tiers"]

_TYPES = ("local", "disk", "custom")


def check_arguments(
    kind: object, store: object, hooks: object, clock: object, get_cache: object, add_cache: object
) -> None:
    """`ConfigError` for an argument of `CacheManager` that is no setting and cannot be what it is."""
    if not isinstance(kind, str):
        raise ConfigError(f"type: expected one of {list(_TYPES)}, got {kind!r}", param="type")
    for name, value in {"clock": clock, "get_cache": get_cache, "add_cache": add_cache}.items():
        if not callable(value) and (name == "clock" or value is not None):
            raise ConfigError(f"{name}: expected a function, got {value!r}", param=name)
    if not isinstance(hooks, Sequence) or isinstance(hooks, str) or not all(map(callable, hooks)):
        raise ConfigError(f"hooks: expected a list of functions, got {hooks!r}", param="hooks")
    faces = (("get", "set"), ("aget", "aset"))
    if store is not None and not any(all(hasattr(store, name) for name in face) for face in faces):
        raise ConfigError(f"store: expected a Store or an AsyncStore, got {store!r}", param="store")


def make_tiers(settings: CacheSettings, store: object | None, clock: Clock, reporter: Reporter) -> Tiers:
    """The tiers for ``settings.type``; ``store``: the host's own, for ``custom``."""
    kind = settings.type
    if kind not in _TYPES:
        near = difflib.get_close_matches(kind, _TYPES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"type: expected one of {list(_TYPES)}, got {kind!r}{hint}", param="type")
    if (store is not None) != (kind == "custom"):
        raise ConfigError("store: goes with type='custom' (or no type) only", param="store")
    memory: MemoryStore[Entry] | None = None
    if kind == "local":
        memory = MemoryStore(max_bytes=settings.max_bytes, size_of=entry_size, clock=clock)
    elif kind == "disk":
        from ..stores.disk import DiskStore

        store = DiskStore(settings.disk_cache_dir, max_bytes=settings.max_bytes, clock=clock)
    return Tiers(
        memory,
        store,
        clock=clock,
        reporter=reporter,
        at_rest=AtRest(compress=None),
        breaker=Breaker(),
        budget=settings.store_timeout,
        memory_ttl=settings.default_in_memory_ttl,
    )
