"""redis-py's clients, blocking and async, for a server, a Cluster and a master that sentinels know.

redis-py 8 retries ten times with pauses (a refused connection costs four seconds), waits five seconds for
each read, introduces itself with three commands on every new connection and asks to be told of maintenance.
None of that is for a cache, so all of it is set here. A part of redis-py is untyped: hence ``Any``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

from ..errors import ConfigError
from .redis_deadline import timed
from .redis_settings import Node, RedisSettings

__all__ = ["async_client", "client_arguments", "close_async_client", "close_sync_client", "sync_client"]

# Connections beyond those of operations: for who holds one for long, like a subscription.
_SPARE: Final = 4
# A Cluster's client notices that slots have moved, or a node is gone, by one attempt that fails.
_CLUSTER_RETRIES: Final = 1


def client_arguments(
    settings: RedisSettings, budget: float, max_connections: int, provider: object
) -> dict[str, Any]:
    """What each client is made with: a cache's defaults and, over them, what was configured."""
    import redis

    # A node that hangs must leave time to learn from the others who has taken its place, and to ask that.
    wait = budget if settings.topology == "standalone" else budget / 2
    defaults = {
        "socket_connect_timeout": wait,
        "health_check_interval": 0,
        "driver_info": None,
        "maint_notifications_config": _no_maintenance(),
    }
    accepted = _parameters(redis.Redis)
    arguments = {name: value for name, value in defaults.items() if name in accepted}
    arguments |= settings.arguments
    arguments["socket_timeout"] = wait
    arguments["max_connections"] = max_connections + _SPARE
    if provider is not None:
        arguments["credential_provider"] = provider
        arguments.pop("password", None)
        arguments.pop("username", None)
    return arguments


def sync_client(settings: RedisSettings, arguments: Mapping[str, Any]) -> Any:
    """A ``redis.Redis`` or ``redis.RedisCluster`` whose sockets keep to the thread's deadline."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    single = {**arguments, "retry": Retry(NoBackoff(), 0)}
    if settings.topology == "sentinel":
        return _sync_master(settings, single)
    if settings.topology == "cluster":
        return _sync_cluster(settings, single, Retry(NoBackoff(), _CLUSTER_RETRIES))
    client = redis.Redis(**single)
    _time(client)
    return client


def _time(client: Any) -> None:
    pool = client.connection_pool
    pool.connection_class = timed(pool.connection_class)


def _sync_master(settings: RedisSettings, arguments: dict[str, Any]) -> Any:
    from redis import sentinel

    sentinel_class: Any = sentinel.Sentinel
    manager = sentinel_class(settings.nodes, sentinel_kwargs=_sentinel_arguments(settings, arguments))
    for one in manager.sentinels:
        _time(one)
    client = manager.master_for(settings.service_name, **_plain(arguments))
    _time(client)
    return client


def _sync_cluster(settings: RedisSettings, arguments: dict[str, Any], retry: object) -> Any:
    """With a pool class of our own: the only way in for a connection class, and it needs the URL form."""
    import redis
    from redis import cluster

    node_class: Any = cluster.ClusterNode
    template = redis.Redis(**arguments).connection_pool
    connection_class = timed(template.connection_class)

    def pool(**given: Any) -> redis.ConnectionPool:
        merged = {**template.connection_kwargs, "max_connections": template.max_connections, **given}
        return redis.ConnectionPool(connection_class=connection_class, **merged)

    first, *others = settings.nodes
    return redis.RedisCluster(
        url=_address(first),
        startup_nodes=[node_class(host, port) for host, port in others],
        connection_pool_class=pool,
        retry=retry,  # type: ignore[arg-type]
        **{name: arguments[name] for name in ("protocol", "maint_notifications_config") if name in arguments},
    )


def _address(node: Node) -> str:
    host = f"[{node[0]}]" if ":" in node[0] else node[0]
    return f"redis://{host}:{node[1]}"


def async_client(settings: RedisSettings, arguments: Mapping[str, Any]) -> Any:
    """A ``redis.asyncio.Redis`` or ``RedisCluster``. `ConfigError` for an argument that it does not know."""
    from redis import asyncio as redis
    from redis.asyncio.cluster import ClusterNode
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    clustered = settings.topology == "cluster"
    known = _parameters(redis.RedisCluster if clustered else redis.Redis)
    for name in settings.arguments:
        if name not in known:
            raise ConfigError(f"{name}: redis-py's async client does not take it", param=name)
    arguments = {name: value for name, value in arguments.items() if name in known}
    if clustered:
        nodes = [ClusterNode(host, port) for host, port in settings.nodes]
        retry = Retry(NoBackoff(), _CLUSTER_RETRIES)
        return redis.RedisCluster(startup_nodes=nodes, retry=retry, **arguments)
    single = {**arguments, "retry": Retry(NoBackoff(), 0)}
    if settings.topology == "sentinel":
        return _async_master(settings, single)
    return redis.Redis(**single)


def _async_master(settings: RedisSettings, arguments: dict[str, Any]) -> Any:
    from redis.asyncio import sentinel

    sentinel_class: Any = sentinel.Sentinel
    manager = sentinel_class(settings.nodes, sentinel_kwargs=_sentinel_arguments(settings, arguments))
    return manager.master_for(str(settings.service_name), **_plain(arguments))


def _sentinel_arguments(settings: RedisSettings, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Sentinels have credentials of their own, no databases, and TLS where the master has it. They are asked
    in turn: two that hang take half of the time."""
    shared = {
        name: value
        for name, value in _plain(arguments).items()
        if name not in ("username", "password", "credential_provider", "db")
    }
    shared["socket_timeout"] = shared["socket_connect_timeout"] = arguments["socket_timeout"] / 2
    own = {"username": settings.sentinel_username, "password": settings.sentinel_password}
    return {**shared, **{name: value for name, value in own.items() if value is not None}}


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Without the TLS options where TLS is off: a plain connection class refuses them."""
    if arguments.get("ssl"):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if not name.startswith("ssl")}


def close_sync_client(client: Any) -> None:
    """Close the client's connections, and those to the sentinels."""
    client.close()
    for sentinel in _sentinels(client):
        sentinel.close()
    # A Cluster's client leaves open the pools whose class it was told.
    for node in client.get_nodes() if hasattr(client, "get_nodes") else ():
        if node.redis_connection is not None:
            node.redis_connection.connection_pool.disconnect()


async def close_async_client(client: Any) -> None:
    """Close the client's connections, and those to the sentinels."""
    await client.aclose()
    for sentinel in _sentinels(client):
        await sentinel.aclose()


def _sentinels(client: Any) -> list[Any]:
    manager = getattr(getattr(client, "connection_pool", None), "sentinel_manager", None)
    return [] if manager is None else list(manager.sentinels)


def _no_maintenance() -> object:
    try:
        from redis.maint_notifications import MaintNotificationsConfig
    except ImportError:  # redis-py before 7
        return None
    return MaintNotificationsConfig(enabled=False)


def _parameters(cls: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(cls.__init__).parameters  # type: ignore[misc]
