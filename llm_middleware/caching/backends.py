"""From settings to the tiers they name. Making them opens nothing and connects to nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import ConfigError, did_you_mean
from ..stores.memory import MemoryStore
from ..types import Clock
from .at_rest import AtRest
from .breaker import Breaker
from .entry import Entry, entry_size
from .reporter import Reporter
from .settings import CacheSettings
from .tiers import Tiers

__all__ = ["NETWORK", "SEMANTIC", "TYPES", "check_arguments", "make_tiers"]

NETWORK = ("redis", "s3", "qdrant")  # the last one behind a semantic cache only
SEMANTIC = ("semantic", "redis-semantic", "qdrant-semantic")
TYPES = ("local", "disk", "redis", "s3", "custom", *SEMANTIC)


def check_arguments(
    kind: object, store: object, hooks: object, clock: object, get_cache: object, add_cache: object
) -> None:
    """`ConfigError` for an argument of `CacheManager` that is no setting and cannot be what it is."""
    if not isinstance(kind, str) or kind not in TYPES:
        hint = did_you_mean(kind, TYPES) if isinstance(kind, str) else ""
        raise ConfigError(f"type: expected one of {list(TYPES)}, got {kind!r}{hint}", param="type")
    for name, value in {"clock": clock, "get_cache": get_cache, "add_cache": add_cache}.items():
        if not callable(value) and (name == "clock" or value is not None):
            raise ConfigError(f"{name}: expected a function, got {value!r}", param=name)
    if not isinstance(hooks, Sequence) or isinstance(hooks, str) or not all(map(callable, hooks)):
        raise ConfigError(f"hooks: expected a list of functions, got {hooks!r}", param="hooks")
    faces = (("get", "set"), ("aget", "aset"))
    if store is not None and not any(all(hasattr(store, name) for name in face) for face in faces):
        raise ConfigError(f"store: expected a Store or an AsyncStore, got {store!r}", param="store")


def make_tiers(
    settings: CacheSettings,
    store: object | None,
    clock: Clock,
    reporter: Reporter,
    connection: Mapping[str, object],
) -> Tiers:
    """The tiers for ``settings.type``.

    ``store``: the host's own, for ``custom``. ``connection``: the settings of a store on the network.
    """
    kind = settings.type
    if (store is not None) != (kind in ("custom", "qdrant")):
        raise ConfigError("store: goes with type='custom' (or no type) only", param="store")
    memory: MemoryStore[Entry] | None = None
    network = kind in NETWORK
    if network and store is None:
        store = _network_store(settings, clock, connection)
    if kind == "local" or (network and settings.memory_tier):
        memory = MemoryStore(max_bytes=settings.max_bytes, size_of=entry_size, clock=clock)
    elif kind == "disk":
        from ..stores.disk import DiskStore

        store = DiskStore(settings.disk_cache_dir, max_bytes=settings.max_bytes, clock=clock)
    return Tiers(
        memory,
        store,
        clock=clock,
        reporter=reporter,
        at_rest=AtRest(
            compress=settings.compress,
            compress_above=settings.compress_above,
            encryption_key=settings.encryption_key,  # type: ignore[arg-type]  # checked there
        )
        if network
        else AtRest(compress=None),
        breaker=Breaker(),
        # The disk store waits for locks, and S3 for answers, with timeouts of their own: what comes before, a
        # busy machine's turn or the making of a client, must not cost entries.
        budget=None if kind in ("disk", "s3", "qdrant") else settings.store_timeout,
        memory_ttl=settings.default_in_memory_ttl,
        recents=kind == "redis" and settings.batch_redis_requests and settings.memory_tier,
    )


def _network_store(settings: CacheSettings, clock: Clock, connection: Mapping[str, object]) -> object:
    if settings.type == "redis":
        from ..stores.redis import RedisStore
        from ..stores.redis_buffer import BufferedRedisStore
        from ..stores.redis_connect import RedisConnection
        from ..stores.redis_peers import RedisPeers
        from ..stores.redis_recent import RecentEntries

        reached = RedisConnection.from_settings(connection, budget=settings.store_timeout)
        size, peers, recents = settings.redis_flush_size, None, None
        if settings.memory_tier or (settings.single_flight == "shared" and size is None):
            peers = RedisPeers(reached, settings.namespace, lease=settings.single_flight_lease)
        if settings.batch_redis_requests and settings.memory_tier:
            recents = RecentEntries(reached, settings.namespace)
        made = RedisStore(reached, clock=clock, peers=peers, recents=recents)
        if size is None:
            return made
        return BufferedRedisStore(made, size=size, interval=settings.redis_flush_interval, clock=clock)
    from ..stores.s3 import S3Store

    return S3Store.from_settings({"timeout": settings.store_timeout, **connection}, clock=clock)
