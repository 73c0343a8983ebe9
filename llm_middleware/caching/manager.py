"""`CacheManager`: the cache as an app sees it. Faces only: every method has a sync and an async name for the
same flow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from .._drive import run_sync
from .._ports.faces import SYNC, async_port
from .._ports.protocol import Port
from ..errors import ConfigError
from ..events import Hook
from ..stores.functions import Functions, FunctionStore
from ..types import Clock
from .answer import Answer, CacheInfo
from .backends import NETWORK, SEMANTIC, check_arguments, make_tiers
from .controls import parse_body
from .endpoints import kind_of
from .environ import resolved
from .fetch import Call, Fetch, answer_found
from .flow import Flow
from .headers import EVENT_STREAM
from .keeper import Recorded
from .lookup import Opened
from .operations import Operations
from .plan import Asked, Body, Plan
from .planner import Planner
from .reporter import Reporter
from .results import recorded
from .settings import make_settings, parse_settings
from .sse import event_ends

__all__ = ["CacheManager"]

T = TypeVar("T")

# What the store and the tiers were made with.
_FIXED = (
    "type",
    "max_bytes",
    "disk_cache_dir",
    "memory_tier",
    "default_in_memory_ttl",
    "store_timeout",
    "compress",
    "compress_above",
    "encryption_key",
    "redis_flush_size",
    "redis_flush_interval",
    "batch_redis_requests",
    "single_flight_lease",
)


class CacheManager(Operations):
    """Keeps answers of LLM endpoints and gives them back.

    ``type``: ``"local"`` (this process's memory, the default), ``"disk"`` (``disk_cache_dir``, shared by the
    processes of this machine), ``"redis"`` or ``"s3"`` (with the settings of their connections; memory in
    front) or ``"custom"`` with ``store=`` (a `Store` of your own). ``"semantic"`` (in this process),
    ``"redis-semantic"`` and ``"qdrant-semantic"`` also answer questions that were asked before in other
    words, by the settings of `SemanticSettings`. All other settings are those of `CacheSettings`;
    `ConfigError` names one that is unknown or wrong. ``hooks`` are called with an `Event` for everything that
    happens; ``clock`` gives seconds since the epoch.

    One manager serves threads and event loops at once. Making one opens nothing.
    """

    def __init__(
        self,
        type: str = "local",  # noqa: A002 - the name that LiteLLM's users know
        *,
        store: object | None = None,
        hooks: Sequence[Hook] = (),
        clock: Clock = time.time,
        get_cache: Callable[[str], object] | None = None,
        add_cache: Callable[..., object] | None = None,
        **settings: object,
    ) -> None:
        type = resolved(type, param="type")  # noqa: A001
        check_arguments(type, store, hooks, clock, get_cache, add_cache)
        own: tuple[str, ...] = ("type", "store", "hooks", "clock", "get_cache", "add_cache")
        self.type, self._clock, by_meaning = type, clock, None
        if type in SEMANTIC:
            from ..semantic import build  # on first use: it brings numpy
            from ..semantic.settings import NAMES, read_settings

            by_meaning, settings = read_settings(resolved(settings, param=""))
            type, own = build.body_type(type, settings), (*own, *NAMES)  # noqa: A001
        if store is not None or get_cache is not None or add_cache is not None:
            type = "custom" if type == "local" else type  # noqa: A001
        self.settings, connection = parse_settings(type, settings, known=own)
        self._functions = Functions(get_cache, add_cache)
        if store is None and self._functions.given:
            store = FunctionStore(self._functions)
        if type == "qdrant" and by_meaning is not None:
            store = build.make_qdrant_store(by_meaning, self.settings, clock)
        reporter, semantic = Reporter(hooks), None
        tiers = make_tiers(self.settings, store, clock, reporter, connection)
        if by_meaning is not None:
            semantic = build.make_tier(self.type, by_meaning, self.settings, connection, tiers, clock)
            tiers.semantic = semantic
        self._flow = Flow(self.settings, tiers, clock=clock, reporter=reporter, semantic=semantic)
        self.planner = Planner(self.settings, reporter, keep_form=semantic is not None)
        self._lock = threading.Lock()

    @property
    def get_cache(self) -> Callable[[str], object] | None:
        """The host's own ``get_cache(key) -> bytes | None``, sync or async; assign one to replace it."""
        return self._functions.get_cache

    @get_cache.setter
    def get_cache(self, function: Callable[[str], object] | None) -> None:
        self._functions.get_cache = function
        self._use_functions()

    @property
    def add_cache(self) -> Callable[..., object] | None:
        """The host's own ``add_cache(key, value, ttl)``, sync or async; assign one to replace it."""
        return self._functions.add_cache

    @add_cache.setter
    def add_cache(self, function: Callable[..., object] | None) -> None:
        self._functions.add_cache = function
        self._use_functions()

    def _use_functions(self) -> None:
        """From now on the host's own functions are the store; what was stored before is no longer asked."""
        if not isinstance(self._flow.tiers.store, FunctionStore):
            self._flow.tiers.replace(FunctionStore(self._functions))

    # --- settings at run time

    @property
    def enabled(self) -> bool:
        return self.settings.enabled

    def enable(self) -> None:
        self.update(enabled=True)

    def disable(self) -> None:
        """Neither read nor write from now on; what is stored stays."""
        self.update(enabled=False)

    def update(self, **changes: object) -> None:
        """Change settings while in use. Requests under way keep those they began with. ``type`` and what
        belongs to the store cannot change: make a new manager for that."""
        with self._lock:
            settings = make_settings(changes, self.settings)
            for name in _FIXED if self.settings.type not in NETWORK else (*_FIXED, "namespace"):
                if getattr(settings, name) != getattr(self.settings, name):
                    raise ConfigError(f"{name}: cannot change in use; make a new CacheManager", param=name)
            self.settings = settings
            self._flow.update(self.settings)
            self.planner.update(self.settings)

    # --- planning

    @property
    def get_cache_key(self) -> Callable[..., object] | None:
        """The host's own key function, if any; assign one to replace it."""
        return self.planner.key

    @get_cache_key.setter
    def get_cache_key(self, function: Callable[..., object] | None) -> None:
        self.planner.key = function

    def plan(
        self,
        kind: str,
        body: Body,
        *,
        scope: str = "",
        route: str = "",
        cache_control: str = "",
        content_type: str = "",
        content_encoding: str = "",
        enforced: Mapping[str, object] | None = None,
    ) -> Plan:
        """What the cache will do for a request; `InvalidRequestError` where its controls are wrong."""
        return self.planner.plan(
            Asked(kind, body, scope, route, cache_control, content_type, content_encoding, enforced)
        )

    async def _direct(
        self,
        port: Port,
        kind: str,
        body: Body,
        scope: str,
        controls: Mapping[str, object] | None,
        caching: bool,
    ) -> Plan:
        kind = kind_of(kind, param="kind")
        enforced = parse_body(controls) if controls else None
        plan = await self.planner.planned(port, Asked(kind, body, scope, enforced=enforced))
        return plan if caching else replace(plan, bypass="disabled", key="")

    # --- fetch

    def fetch(
        self,
        body: Body,
        call: Call,
        *,
        kind: str = "chat",
        scope: str = "",
        controls: Mapping[str, object] | None = None,
        caching: bool = True,
    ) -> Answer:
        """Look up, else call and store.

        ``body``: the request, as bytes or as a mapping. ``call(body)`` makes the call; it gets the body as it
        was given, less its ``cache`` field, and returns bytes, text, JSON values, a model of an SDK, a
        response of httpx, or an iterator of those for a stream. ``scope``: whose answer it is (a tenant, a
        user); answers never cross scopes. ``controls``: as in the body's ``cache`` field, and before it.
        Concurrent identical fetches share one call. What ``call`` raises is raised here.
        """
        return run_sync(self._fetch(SYNC, body, call, kind, scope, controls, caching))

    async def afetch(
        self,
        body: Body,
        call: Call,
        *,
        kind: str = "chat",
        scope: str = "",
        controls: Mapping[str, object] | None = None,
        caching: bool = True,
    ) -> Answer:
        """`fetch` for async callers; ``call`` may be async and may return an async iterator."""
        return await self._fetch(async_port(), body, call, kind, scope, controls, caching)

    async def _fetch(
        self,
        port: Port,
        body: Body,
        call: Call,
        kind: str,
        scope: str,
        controls: Mapping[str, object] | None,
        caching: bool,
    ) -> Answer:
        plan = await self._direct(port, kind, body, scope, controls, caching)
        if plan.bypass is None:
            found = self._flow.now(plan)
            if found is not None and found.stale is None:
                answer = answer_found(plan, found)
                self._flow.tell(plan, answer.cache)
                return answer
        return await Fetch(self._flow, port, plan, call, _forwarded(body, plan)).run()

    # --- get and set

    def get(
        self, body: Body, *, kind: str = "chat", scope: str = "", controls: Mapping[str, object] | None = None
    ) -> Answer | None:
        """The stored answer to this request, or None."""
        return run_sync(self._get(SYNC, body, kind, scope, controls))

    async def aget(
        self, body: Body, *, kind: str = "chat", scope: str = "", controls: Mapping[str, object] | None = None
    ) -> Answer | None:
        """`get` for async callers."""
        return await self._get(async_port(), body, kind, scope, controls)

    async def _get(
        self, port: Port, body: Body, kind: str, scope: str, controls: Mapping[str, object] | None
    ) -> Answer | None:
        plan = await self._direct(port, kind, body, scope, controls, True)
        if plan.bypass is not None or not plan.lookup:
            return None
        found = await self._flow.find(port, plan)
        answer = None if found is None else answer_found(plan, found)
        self._flow.tell(plan, CacheInfo("miss", plan.digest) if answer is None else answer.cache)
        return answer

    def set(
        self,
        body: Body,
        answer: object,
        *,
        kind: str = "chat",
        scope: str = "",
        controls: Mapping[str, object] | None = None,
    ) -> str | None:
        """Store ``answer`` for this request: whatever a ``call`` of `fetch` may return, but a stream as its
        whole bytes. The cache key, or None where the answer may not be kept."""
        return run_sync(self._set(SYNC, body, answer, kind, scope, controls))

    async def aset(
        self,
        body: Body,
        answer: object,
        *,
        kind: str = "chat",
        scope: str = "",
        controls: Mapping[str, object] | None = None,
    ) -> str | None:
        """`set` for async callers."""
        return await self._set(async_port(), body, answer, kind, scope, controls)

    async def _set(
        self,
        port: Port,
        body: Body,
        answer: object,
        kind: str,
        scope: str,
        controls: Mapping[str, object] | None,
    ) -> str | None:
        plan = await self._direct(port, kind, body, scope, controls, True)
        if plan.bypass is not None:
            return None
        record = recorded(answer)
        if plan.stream and plan.kind != "json":
            headers = ((b"content-type", EVENT_STREAM),)
            record = Recorded(200, headers, record.body, event_ends(record.body))
        info = await self._flow.keeper.settle(port, plan, record, Opened())
        return info.key if info.stored else None

    def cached(self, function: Callable[..., T] | None = None, **options: object) -> object:
        """Decorate a function, coroutine, generator or async generator: see `llm_middleware.cached`."""
        from .decorator import cached

        return cached(function, cache=self, **options)  # type: ignore[call-overload]


def _forwarded(body: Body, plan: Plan) -> object:
    """The body for the host's call: as it was given, less ``cache``."""
    if isinstance(body, bytes):
        return body if plan.forward is None else plan.forward
    return {name: value for name, value in body.items() if name != "cache"} if "cache" in body else body
