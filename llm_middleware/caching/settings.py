"""`CacheSettings`: every setting of a `CacheManager`, checked once and then frozen."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType

from ..errors import ConfigError, did_you_mean
from .admission import REASONS
from .checked import boolean, choice, fail, function, number, path, text, whole
from .controls import Controls, merge
from .endpoints import kind_of
from .environ import resolved
from .groups import shared_names

__all__ = ["SETTINGS", "CacheSettings", "make_settings", "parse_settings"]

logger = logging.getLogger("llm_middleware")

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
    store on the network; see `AtRest`. ``redis_flush_size``: writes to Redis are sent together once there are
    so many, or ``redis_flush_interval`` after the first (None: each at once). ``batch_redis_requests``: so
    are reads that come together. ``single_flight``: concurrent identical requests share one call in all
    processes that share the store (``shared``) or in each process. ``single_flight_lease``: for how long
    others believe that a process that says no more is making the call; ``single_flight_wait``: how long to
    wait for another process's answer before making the call oneself. ``caching_groups``: lists of models that
    share their answers; ``stands_for``: from each of them to the one in the keys.

    Numbers, and ``true``, ``false``, ``1`` and ``0``, may be text, as an environment has it.
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
    secret: bytes | None = field(default=None, repr=False)
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
    encryption_key: object = field(default=None, repr=False)
    redis_flush_size: int | None = None
    redis_flush_interval: float = 1.0
    batch_redis_requests: bool = False
    single_flight: str = "shared"
    single_flight_lease: float = 2.0
    single_flight_wait: float = 60.0
    caching_groups: Sequence[Sequence[str]] = ()
    kinds: frozenset[str] | None = field(default=None, init=False)
    controls: Mapping[str, object] = field(default_factory=dict, init=False)
    own_controls: Controls = field(default_factory=Controls, init=False)
    policy: Mapping[str, bool] = field(default_factory=dict, init=False)
    stands_for: Mapping[str, str] = field(default_factory=dict, init=False)

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
        object.__setattr__(self, "stands_for", MappingProxyType(shared_names(self.caching_groups)))
        in_redis = self.default_redis_ttl if self.default_in_redis_ttl is None else self.default_in_redis_ttl
        controls = {
            "ttl": in_redis if self.type == "redis" and in_redis is not None else self.ttl,
            "stale_while_revalidate": self.stale_while_revalidate,
            "stale_if_error": self.stale_if_error,
        }
        object.__setattr__(self, "controls", MappingProxyType(controls))
        object.__setattr__(self, "own_controls", merge(controls))
        object.__setattr__(self, "policy", MappingProxyType({**REASONS, **self.admission}))


def _ttl(name: str, value: object) -> object:
    return None if value is None else number("seconds >= 0 or None", 0)(name, value)


def _flush_size(name: str, value: object) -> object:
    return None if value is None else whole("a number of entries >= 1 or None", 1)(name, value)


def _names(name: str, value: object) -> object:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise fail(name, "a list of names", value)
    names = tuple(value)
    if not all(isinstance(item, str) for item in names):
        raise fail(name, "a list of names", value)
    return names


def _names_or_none(name: str, value: object) -> object:
    return None if value is None else _names(name, value)


def _secret(name: str, value: object) -> object:
    if isinstance(value, str):
        value = value.encode()
    if value is not None and (not isinstance(value, bytes) or not value):
        raise fail(name, "bytes or a string that is not empty", "...")  # never show a secret
    return value


def _policy(name: str, value: object) -> object:
    if not isinstance(value, Mapping):
        raise fail(name, "a mapping of reason code to True or False", value)
    for reason in value:
        choice(*REASONS)(f"{name}.{reason}", reason)
    stored = {reason: boolean(f"{name}.{reason}", stored) for reason, stored in value.items()}
    return MappingProxyType(stored)


_seconds = number("seconds >= 0", 0)
_bytes = whole("a number of bytes >= 0", 0)
_LONGEST = 1e9  # seconds: some thirty years, where servers and waits take any number at all

_CHECKS: Mapping[str, Callable[[str, object], object]] = {
    "enabled": boolean,
    "ttl": _ttl,
    "ttl_jitter": number("a share from 0 to 1", 0, 1),
    "stale_while_revalidate": _seconds,
    "stale_if_error": _seconds,
    "namespace": text,
    "mode": choice("default_on", "default_off"),
    "supported_call_types": _names_or_none,
    "share": choice("caller", "all"),
    "ignore_fields": _names,
    "image_content": function,
    "key": function,
    "admit": function,
    "admission": _policy,
    "secret": _secret,
    "on_disconnect": choice("auto", "cancel", "finish"),
    "max_bytes": _bytes,
    "max_entry_bytes": _bytes,
    "max_body_bytes": _bytes,
    "disk_cache_dir": path,
    "memory_tier": boolean,
    "default_in_memory_ttl": _seconds,
    "default_in_redis_ttl": _ttl,
    "default_redis_ttl": _ttl,
    "compress_above": _bytes,
    "store_timeout": _seconds,
    "redis_flush_size": _flush_size,
    "redis_flush_interval": number("seconds > 0", math.ulp(0.0), _LONGEST),
    "batch_redis_requests": boolean,
    "single_flight": choice("shared", "process"),
    "single_flight_lease": number("seconds >= 0.1", 0.1, _LONGEST),
    "single_flight_wait": _seconds,
}

SETTINGS = tuple(setting.name for setting in fields(CacheSettings) if setting.init)
_USED_BY = {
    "disk_cache_dir": "disk",
    "default_in_redis_ttl": "redis",
    "default_redis_ttl": "redis",
    "redis_flush_size": "redis",
    "redis_flush_interval": "redis",
    "batch_redis_requests": "redis",
}


def parse_settings(
    kind: str, given: Mapping[str, object], *, known: tuple[str, ...] = ()
) -> tuple[CacheSettings, dict[str, object]]:
    """The settings of a manager whose type is ``kind``, and those that the connection of its store takes.

    ``os.environ/NAME`` stands for that variable. What only another type of store uses is let go with one
    warning that names it, so that a file of settings may be used with any type. `ConfigError` names an
    unknown setting and the nearest valid one; ``known`` lists names that the caller takes itself.
    """
    given = resolved(given, param="")
    mine = _connection_names(kind) if any(name not in SETTINGS for name in given) else ()
    every = {*SETTINGS, *mine}
    others = _others(kind) if any(name not in every for name in given) else frozenset()
    idle = [name for name in given if name in others - every]
    _check_names([name for name in given if name not in idle], (*SETTINGS, *known, *mine), every)
    own = {name: value for name, value in given.items() if name in SETTINGS}
    settings = CacheSettings(**{**own, "type": kind})  # type: ignore[arg-type]  # checked there
    idle += [name for name in own if _USED_BY.get(name, kind) != kind]
    if idle := [name for name in idle if given[name] is not None]:
        logger.warning("type=%r does not use these cache settings: %s", kind, ", ".join(idle))
    return settings, {name: value for name, value in given.items() if name in mine}


def _connection_names(kind: str) -> tuple[str, ...]:
    """What the store of this type takes beside the settings here."""
    if kind == "redis":
        from ..stores.redis_settings import known_names

        return known_names()
    if kind == "s3":
        from ..stores.s3 import S3Settings

        return tuple(setting.name for setting in fields(S3Settings))
    return ()


def _others(kind: str) -> frozenset[str]:
    """Names that are known to be those of another type's store, whether or not that could be used here."""
    from ..stores.redis_settings import COMMON_NAMES

    s3 = [name for name in _connection_names("s3") if name.startswith("s3_")] if kind != "s3" else []
    return frozenset([*s3, *(COMMON_NAMES if kind != "redis" else ())])


def make_settings(
    changes: Mapping[str, object], base: CacheSettings | None = None, *, known: tuple[str, ...] = ()
) -> CacheSettings:
    """``base`` (or the defaults) with ``changes``, in which ``os.environ/NAME`` stands for that variable.
    `ConfigError` names an unknown setting and the nearest valid one; ``known`` lists names that the caller
    takes itself, so that they are suggested too."""
    _check_names(changes, (*SETTINGS, *known), SETTINGS)
    changes = resolved(changes, param="")
    return replace(base, **changes) if base is not None else CacheSettings(**changes)  # type: ignore[arg-type]


def _check_names(given: Iterable[str], near: Sequence[str], valid: Container[str]) -> None:
    for name in given:
        if name not in valid:
            hint = did_you_mean(name, near)
            raise ConfigError(f"unknown cache setting {name!r}{hint}", param=name)
