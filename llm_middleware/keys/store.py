"""`KeyStore`: where API keys and their use are kept, and `make_store`, which makes the one that is meant.

Stores trade in plain rows. A store in this process has ``inline = True`` and is asked directly; others may
have an async face (``aget`` ...), else they are asked in a thread. How a process hears of what others
changed: a store with ``attend`` tells of it while it is ``live``, all others have a ``generation`` to be
looked at.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

from ..caching.environ import resolved
from ..errors import ConfigError, did_you_mean
from ..stores.keys_memory import MemoryKeys
from ..stores.keys_rules import Ask, Reply
from ..types import Clock

__all__ = ["KeyStore", "Row", "make_store"]

Row = dict[str, Any]

_TYPES: Final = ("memory", "sqlite", "redis", "sql")
_SCHEMES: Final = {"redis": "redis", "rediss": "redis", "unix": "redis", "sqlite": "sqlite"}


@runtime_checkable
class KeyStore(Protocol):
    """What a store does; `stores.keys_memory.MemoryKeys` says what each method means. All may raise
    `StoreError`, and are safe for threads."""

    inline: bool

    @property
    def live(self) -> bool:
        """Whether it tells of changes at this moment."""
        ...

    def add(self, row: Mapping[str, Any], spend: float, resets: float | None) -> bool: ...

    def get(self, key_id: str) -> Row | None: ...

    def change(self, key_id: str, fields: Mapping[str, Any], use: Mapping[str, Any]) -> Row | None: ...

    def replace(self, key_id: str, fields: Mapping[str, Any], use: Mapping[str, Any]) -> Row | None: ...

    def remove(self, ids: Sequence[str]) -> list[str]: ...

    def page(self, offset: int, size: int, where: Mapping[str, str]) -> tuple[list[Row], int]: ...

    def count(self, key_id: str, ask: Ask) -> Reply: ...

    def close(self) -> None: ...


def make_store(setting: object, clock: Clock, environ: Mapping[str, str] = os.environ) -> KeyStore:
    """The store that ``setting`` means: None or ``"memory"``; the URL of a Redis, of a PostgreSQL or of a
    file (``sqlite:///keys.db``); ``{"type": "sqlite", "path": ...}``, ``{"type": "redis", ...}`` with the
    settings of a Redis connection, ``{"type": "sql", "url": ...}``; or a store. Nothing is opened.
    `ConfigError` names what is wrong."""
    if setting is None:
        return MemoryKeys(clock=clock)
    if isinstance(setting, KeyStore):
        return setting
    setting = resolved(setting, param="store", environ=environ)
    if isinstance(setting, str):
        setting = _from_text(setting)
    if not isinstance(setting, Mapping) or "type" not in setting:
        shown = f"a value of type {type(setting).__name__}"
        raise ConfigError(f"store: expected one of {list(_TYPES)}, or a mapping, got {shown}", param="store")
    given = {name: value for name, value in setting.items() if value is not None}
    kind = given.pop("type")
    if kind not in _TYPES:
        hint = did_you_mean(kind, _TYPES)
        raise ConfigError(
            f"store.type: expected one of {list(_TYPES)}, got {kind!r}{hint}", param="store.type"
        )
    try:
        return _made(kind, given, clock, environ)
    except ConfigError as exc:
        param = "store" if exc.param is None else f"store.{exc.param}"
        raise ConfigError(f"store: {exc.message}", param=param) from None


def _from_text(text: str) -> dict[str, object]:
    scheme, colon, rest = text.partition("://")
    if not colon:
        return {"type": text}
    kind = _SCHEMES.get(scheme, "sql")
    if kind == "sqlite":
        return {"type": kind, "path": rest.removeprefix("/")}
    return {"type": kind, "url": text}


def _made(kind: str, given: dict[str, Any], clock: Clock, environ: Mapping[str, str]) -> KeyStore:
    if kind == "memory":
        _check_names(given, ())
        return MemoryKeys(clock=clock)
    if kind == "redis":
        return _redis(given, environ)
    _check_names(given, ("path" if kind == "sqlite" else "url", "timeout"))
    timeout = _seconds(given.pop("timeout", 5.0))
    if kind == "sqlite":
        from ..stores.keys_sqlite import SQLiteKeys

        return SQLiteKeys(_text(given, "path"), timeout=timeout, clock=clock)
    from ..stores.keys_sql import SQLKeys

    return SQLKeys(_text(given, "url"), timeout=timeout, clock=clock)


def _redis(given: dict[str, Any], environ: Mapping[str, str]) -> KeyStore:
    from ..stores.keys_redis import RedisKeys
    from ..stores.redis_connect import RedisConnection

    timeout = _seconds(given.pop("timeout", 0.5))
    namespace = _text({"namespace": given.pop("namespace", "llm:keys")}, "namespace")
    if "{" in namespace or "}" in namespace:
        raise ConfigError("namespace: may have no braces", param="namespace")
    return RedisKeys(RedisConnection.from_settings(given, environ, budget=timeout), namespace=namespace)


def _check_names(given: Mapping[str, object], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}{did_you_mean(name, known)}", param=str(name))


def _text(given: Mapping[str, object], name: str) -> str:
    value = given.get(name)
    value = str(value) if isinstance(value, Path) else value
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name}: expected a string that is not empty", param=name)
    return value


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"timeout: expected seconds > 0, got {value!r}", param="timeout")
    return float(value)
