"""From settings to the tiers they name. Making them opens nothing and connects to nothing."""

from __future__ import annotations

import difflib

from ..errors import ConfigError
from ..stores.memory import MemoryStore
from ..types import Clock
from .at_rest import AtRest
from .breaker import Breaker
from .entry import Entry, entry_size
from .reporter import Reporter
from .settings import CacheSettings
from .tiers import Tiers

__all__ = ["make_tiers"]

_TYPES = ("local", "disk", "custom")


def make_tiers(settings: CacheSettings, store: object | None, clock: Clock, reporter: Reporter) -> Tiers:
    """The tiers for ``settings.type``; ``store``: the host's own, for ``custom``."""
    kind = settings.type
    if kind not in _TYPES:
        near = difflib.get_close_matches(kind, _TYPES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"type: expected one of {list(_TYPES)}, got {kind!r}{hint}", param="type")
    if (store is not None) != (kind == "custom"):
        raise ConfigError("store: goes with type='custom' (or no type), and that with it", param="store")
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
