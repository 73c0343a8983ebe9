"""`RouterSettings`: every setting of a `Router`, by LiteLLM's names, checked once and then frozen."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from random import Random
from typing import Final

from ..caching.groups import shared_names
from ..caching.manager import CacheManager
from ..errors import ConfigError, LLMMiddlewareError, did_you_mean
from ..providers.messages import Timeouts
from ..providers.registry import registry
from .checks import check_deployments
from .cooldown import CooldownPolicy
from .deployment import Deployment
from .fallback import Fallbacks
from .flow import Routing
from .limits import Limits, MemoryLimits, SharedLimits
from .model_list import Groups, read_model_list
from .retry import Retries
from .state import RouterState
from .strategies import Strategy, named_strategy

__all__ = ["STREAM_ERRORS", "RouterSettings", "check_seconds", "make_settings"]

logger = logging.getLogger("llm_middleware")

STREAM_ERRORS: Final = ("error", "continue")
_REDIS: Final = ("host", "port", "password", "url")
_RENAMED: Final = {"default_max_parallel_requests": "max_parallel_requests"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """Times are seconds. ``timeout``: for a whole call, attempts, waits, fallbacks and the reading of the
    answer included; ``stream_timeout``: for which a stream may say nothing, before its first event or between
    two. ``fallbacks`` and their kin: lists of ``{group: [groups]}``;
    ``max_fallbacks``: how many other groups a call may ask. ``wait_for_capacity``: for how long a call waits
    where every deployment is at its limit or cooling down. ``enable_pre_call_checks``: a prompt goes to no
    model that cannot read it. ``max_parallel_requests``: of each deployment that has none of its own.
    ``on_stream_error``: what becomes of a stream that breaks after its first content: ``error``, or
    ``continue``: another deployment goes on where that is possible. ``caching_groups``: lists of groups that
    share their answers. ``redis_url`` or ``redis_host``, ``redis_port``, ``redis_password``: a Redis by which
    all processes keep limits and cooldowns together; ``redis``: any other settings of it, as for
    ``CacheManager(type="redis")``. ``providers``: rows on top of the built-in table. The others: see
    `CooldownPolicy`, `Retries` and `named_strategy`.
    """

    routing_strategy: str | Strategy = "simple-shuffle"
    routing_strategy_args: Mapping[str, object] = field(default_factory=dict)
    num_retries: int = 2
    retry_after: float = 0.0
    retry_policy: Mapping[str, int | None] | None = None
    allowed_fails: int | None = None
    allowed_fails_policy: Mapping[str, int | None] | None = None
    cooldown_time: float = 5.0
    timeout: float | None = 600.0
    stream_timeout: float | None = None
    fallbacks: object = None
    default_fallbacks: object = None
    context_window_fallbacks: object = None
    content_policy_fallbacks: object = None
    max_fallbacks: int = 5
    model_group_alias: Mapping[str, object] = field(default_factory=dict)
    default_litellm_params: Mapping[str, object] = field(default_factory=dict)
    enable_pre_call_checks: bool = False
    enable_tag_filtering: bool = False
    wait_for_capacity: float = 0.0
    max_parallel_requests: int | None = None
    on_stream_error: str = "error"
    caching_groups: Sequence[Sequence[str]] = ()
    redis_url: str | None = field(default=None, repr=False)
    redis_host: str | None = None
    redis_port: int | str | None = None
    redis_password: str | None = field(default=None, repr=False)
    redis: Mapping[str, object] = field(default_factory=dict, repr=False)
    providers: Mapping[str, Mapping[str, object]] | None = None
    set_verbose: bool = False

    def __post_init__(self) -> None:
        check_seconds("timeout", self.timeout)
        check_seconds("stream_timeout", self.stream_timeout)
        _check_number("num_retries", self.num_retries, int)
        _check_number("max_fallbacks", self.max_fallbacks, int)
        _check_number("wait_for_capacity", self.wait_for_capacity, int, float)
        if self.max_parallel_requests is not None:
            _check_number("max_parallel_requests", self.max_parallel_requests, int)
        if self.on_stream_error not in STREAM_ERRORS:
            expected = f"on_stream_error: expected one of {', '.join(STREAM_ERRORS)}"
            raise ConfigError(f"{expected}, got {self.on_stream_error!r}", param="on_stream_error")
        shared_names(self.caching_groups)
        if self.set_verbose:
            logger.setLevel(logging.DEBUG)

    def cache(self) -> CacheManager:
        """A cache in the shared Redis, or in memory where there is none."""
        redis = self.redis_settings()
        return CacheManager(type="redis", **redis) if redis else CacheManager()  # type: ignore[arg-type]

    def redis_settings(self) -> dict[str, object]:
        """How to reach the Redis that is shared; empty where none is."""
        if not isinstance(self.redis, Mapping):
            raise ConfigError(f"redis: expected a mapping, got {type(self.redis).__name__}", param="redis")
        named = {name: getattr(self, f"redis_{name}") for name in _REDIS}
        return {**self.redis, **{name: value for name, value in named.items() if value is not None}}

    def routing(
        self, model_list: Sequence[Mapping[str, object]], limits: Limits | None, random: Random
    ) -> tuple[tuple[Deployment, ...], Routing]:
        """The deployments of ``model_list``, and what all calls of them share."""
        table = registry(self.providers)
        deployments = read_model_list(
            model_list, default_litellm_params=self.default_litellm_params, providers=table
        )
        check_deployments(deployments, table)
        strategy = self.routing_strategy
        if isinstance(strategy, str):
            strategy = named_strategy(strategy, **self.routing_strategy_args)
        if self.max_parallel_requests is not None:
            deployments = tuple(self._bounded(each) for each in deployments)
        limits = limits or self._limits()
        return deployments, Routing(
            groups=Groups(deployments, self.model_group_alias, table),
            providers=table,
            strategy=strategy,
            limits=limits,
            state=limits.state,
            retries=Retries(
                num_retries=self.num_retries, retry_after=self.retry_after, retry_policy=self.retry_policy
            ),
            fallbacks=Fallbacks.of(
                self.fallbacks,
                self.context_window_fallbacks,
                self.content_policy_fallbacks,
                self.default_fallbacks,
            ),
            timeouts=Timeouts(),
            timeout=self.timeout,
            stream_timeout=self.stream_timeout,
            max_fallbacks=self.max_fallbacks,
            wait_for_capacity=self.wait_for_capacity,
            check_windows=self.enable_pre_call_checks,
            filter_tags=self.enable_tag_filtering,
            random=random,
        )

    def _bounded(self, deployment: Deployment) -> Deployment:
        if deployment.max_parallel_requests is not None:
            return deployment
        return replace(deployment, max_parallel_requests=self.max_parallel_requests)

    def _limits(self) -> Limits:
        state, cooldown, redis = RouterState(), self._cooldown(), self.redis_settings()
        if not redis:
            return MemoryLimits(state, cooldown)
        from ..stores.redis_connect import RedisConnection  # on first use: they bring asyncio
        from ..stores.redis_limits import RedisLimits

        namespace = str(redis.pop("namespace", "llm"))
        connection = RedisConnection.from_settings(redis)
        store = RedisLimits(
            connection, namespace=namespace, probe=cooldown.probe_time, latency_ttl=state.latency_ttl
        )
        return SharedLimits(state, store, cooldown, connection=connection)

    def _cooldown(self) -> CooldownPolicy:
        return CooldownPolicy(
            allowed_fails=self.allowed_fails,
            allowed_fails_policy=self.allowed_fails_policy,
            cooldown_time=self.cooldown_time,
        )


def make_settings(given: Mapping[str, object]) -> RouterSettings:
    """`ConfigError` names an unknown setting and the nearest that there is. None is as good as not given, but
    for a timeout, of which it means that there is none."""
    names = [setting.name for setting in fields(RouterSettings)]
    given = {_RENAMED.get(name, name): value for name, value in given.items()}
    for name in given:
        if name not in names:
            hint = did_you_mean(name, names)
            raise ConfigError(f"unknown Router setting {name!r}{hint}", param=name)
    said = {name: value for name, value in given.items() if value is not None or name == "timeout"}
    return RouterSettings(**said)  # type: ignore[arg-type]


def check_seconds(name: str, value: object, error: type[LLMMiddlewareError] = ConfigError) -> None:
    """``error`` where ``value`` is no number of seconds above zero, nor None."""
    wrong = (
        isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max
    )
    if value is not None and wrong:
        raise error(f"{name}: expected seconds > 0, got {value!r}", param=name)


def _check_number(name: str, value: object, *kinds: type) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value < math.inf:  # type: ignore[operator]
        raise ConfigError(f"{name}: expected a number >= 0, got {value!r}", param=name)
