"""`CacheSettings`: every setting of a `CacheManager`, checked once and then frozen."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType

from ..errors import ConfigError
from .admission import REASONS
from .controls import Controls, merge
from .endpoints import kind_of

__all__ = ["CacheSettings", "make_settings", "own_settings"]

_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """The settings of one cache. Sizes are bytes, times are seconds.

    ``kinds``: the endpoint kinds that are cached (None: all). ``controls``: the settings' own controls in the
    form that requests' controls have. ``policy``: reason code to whether such answers are stored.
    ``memory_tier``: this process's memory in front of a store on the network; ``default_in_memory_ttl``: the
    longest that it keeps what that store has. ``default_in_redis_ttl`` (``default_redis_ttl``): ``ttl`` for
    ``type="redis"``. ``store_timeout``: what one operation on a store outside the process may take.
    ``compress`` (``zlib``, ``zstd`` or None), ``compress_above`` and ``encryption_key``: how entries lie in a
    store on the network; see `AtRest`.
    """

    type: str = "local"
    enabled: bool = True
    ttl: float | None = 3600.0
    ttl_jitter: float = 0.05
    stale_while_revalidate: float = 0.0
    stale_if_error: float = 0.0
    namespace: str = "llm"
    mode: str = "default_on"
    supported_call_types: tuple[str, ...] | None = None
    share: str = "caller"
    ignore_fields: tuple[str, ...] = ()
    image_content: Callable[[str], bytes | str | None] | None = None
    key: Callable[..., object] | None = None
    admit: Callable[..., object] | None = None
    admission: Mapping[str, bool] = field(default_factory=dict)
    secret: bytes | None = None
    on_disconnect: str = "auto"
    max_bytes: int = 256 * _MIB
    max_entry_bytes: int = 8 * _MIB
    max_body_bytes: int = 10 * _MIB
    disk_cache_dir: str = ".llm_cache"
    memory_tier: bool = True
    default_in_memory_ttl: float = 60.0
    default_in_redis_ttl: float | None = None
    default_redis_ttl: float | None = None
    store_timeout: float = 0.25
    compress: str | None = "zlib"
    compress_above: int = 4096
    encryption_key: object = None
    kinds: frozenset[str] | None = field(default=None, init=False)
    controls: Mapping[str, object] = field(default_factory=dict, init=False)
    own_controls: Controls = field(default_factory=Controls, init=False)
    policy: Mapping[str, bool] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for setting in fields(self):
            check = _CHECKS.get(setting.name)
            if check is not None:
                object.__setattr__(self, setting.name, check(setting.name, getattr(self, setting.name)))
        kinds = self.supported_call_types
        if kinds is not None:
            object.__setattr__(
                self, "kinds", frozenset(kind_of(name, param="supported_call_types") for name in kinds)
            )
        in_redis = self.default_redis_ttl if self.default_in_redis_ttl is None else self.default_in_redis_ttl
        controls = {
            "ttl": in_redis if self.type == "redis" and in_redis is not None else self.ttl,
            "stale_while_revalidate": self.stale_while_revalidate,
            "stale_if_error": self.stale_if_error,
        }
        object.__setattr__(self, "controls", MappingProxyType(controls))
        object.__setattr__(self, "own_controls", merge(controls))
        object.__setattr__(self, "policy", MappingProxyType({**REASONS, **self.admission}))


def _fail(name: str, expected: str, value: object) -> ConfigError:
    return ConfigError(f"{name}: expected {expected}, got {value!r}", param=name)


def _number(expected: str, low: float, high: float) -> Callable[[str, object], object]:
    def check(name: str, value: object) -> object:
        number = value
        if isinstance(value, str):
            try:
                number = float(value)
            except ValueError:
                raise _fail(name, expected, value) from None
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not low <= number <= high:
            raise _fail(name, expected, value)
        try:
            return float(number)
        except OverflowError:
            raise _fail(name, expected, "a number without end") from None

    return check


def _ttl(name: str, value: object) -> object:
    return None if value is None else _number("seconds >= 0 or None", 0, math.inf)(name, value)


def _bytes(name: str, value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _fail(name, "a number of bytes >= 0", value)
    return value


def _choice(*choices: str) -> Callable[[str, object], object]:
    def check(name: str, value: object) -> object:
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{name}: expected one of {list(choices)}, got {value!r}{hint}", param=name)
        return value

    return check


def _names(name: str, value: object) -> object:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise _fail(name, "a list of names", value)
    names = tuple(value)
    if not all(isinstance(item, str) for item in names):
        raise _fail(name, "a list of names", value)
    return names


def _names_or_none(name: str, value: object) -> object:
    return None if value is None else _names(name, value)


def _boolean(name: str, value: object) -> object:
    if not isinstance(value, bool):
        raise _fail(name, "True or False", value)
    return value


def _text(name: str, value: object) -> object:
    if not isinstance(value, str) or not value:
        raise _fail(name, "a string that is not empty", value)
    return value


def _path(name: str, value: object) -> object:
    return _text(name, str(value) if isinstance(value, Path) else value)


def _secret(name: str, value: object) -> object:
    if isinstance(value, str):
        value = value.encode()
    if value is not None and (not isinstance(value, bytes) or not value):
        raise _fail(name, "bytes or a string that is not empty", "...")  # never show a secret
    return value


def _function(name: str, value: object) -> object:
    if value is not None and not callable(value):
        raise _fail(name, "a function", value)
    return value


def _policy(name: str, value: object) -> object:
    if not isinstance(value, Mapping):
        raise _fail(name, "a mapping of reason code to True or False", value)
    for reason, stored in value.items():
        _choice(*REASONS)(f"{name}.{reason}", reason)
        _boolean(f"{name}.{reason}", stored)
    return MappingProxyType(dict(value))


_seconds = _number("seconds >= 0", 0, math.inf)

_CHECKS: Mapping[str, Callable[[str, object], object]] = {
    "enabled": _boolean,
    "ttl": _ttl,
    "ttl_jitter": _number("a share from 0 to 1", 0, 1),
    "stale_while_revalidate": _seconds,
    "stale_if_error": _seconds,
    "namespace": _text,
    "mode": _choice("default_on", "default_off"),
    "supported_call_types": _names_or_none,
    "share": _choice("caller", "all"),
    "ignore_fields": _names,
    "image_content": _function,
    "key": _function,
    "admit": _function,
    "admission": _policy,
    "secret": _secret,
    "on_disconnect": _choice("auto", "cancel", "finish"),
    "max_bytes": _bytes,
    "max_entry_bytes": _bytes,
    "max_body_bytes": _bytes,
    "disk_cache_dir": _path,
    "memory_tier": _boolean,
    "default_in_memory_ttl": _seconds,
    "default_in_redis_ttl": _ttl,
    "default_redis_ttl": _ttl,
    "compress_above": _bytes,
    "store_timeout": _seconds,
}

_NAMES = tuple(setting.name for setting in fields(CacheSettings) if setting.init)


def own_settings(settings: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """``settings`` parted into those of `CacheSettings` and the rest, which a store on the network reads."""
    own = {name: value for name, value in settings.items() if name in _NAMES}
    return own, {name: value for name, value in settings.items() if name not in own}


def make_settings(
    changes: Mapping[str, object], base: CacheSettings | None = None, *, known: tuple[str, ...] = ()
) -> CacheSettings:
    """``base`` (or the defaults) with ``changes``. `ConfigError` names an unknown setting and the nearest
    valid one; ``known`` lists names that the caller takes itself, so that they are suggested too."""
    for name in changes:
        if name not in _NAMES:
            near = difflib.get_close_matches(name, (*_NAMES, *known), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown cache setting {name!r}{hint}", param=name)
    return replace(base, **changes) if base is not None else CacheSettings(**changes)  # type: ignore[arg-type]
