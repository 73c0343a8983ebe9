"""`Planner`: from a request to its `Plan`, with a memo for bodies that come again byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .._ports.protocol import Port
from ..events import Event
from .memo import Memo
from .plan import Asked, Plan, Request, make_plan, read_request
from .reporter import Reporter
from .settings import CacheSettings

__all__ = ["Planner"]

# Bodies longer than this are parsed each time: the memo is for the many small repeats.
_MEMO_BODY = 256 << 10
_FORM = 6  # times the size of its text, which a parsed body takes


class Planner:
    """``key``: the host's own key function ``key(kind, form)``, sync or async; it may be replaced.
    ``keep_form``: whether plans have the form that is keyed."""

    def __init__(self, settings: CacheSettings, reporter: Reporter, *, keep_form: bool = False) -> None:
        self.settings = settings
        self.key = settings.key
        self._reporter = reporter
        self._keep_form = keep_form
        self._memo: Memo[tuple[str, str, str, str, bytes], Plan] = Memo(4096, 16 << 20)

    def update(self, settings: CacheSettings) -> None:
        if settings.key is not self.settings.key:
            self.key = settings.key
        self.settings = settings
        # Not cleared: a request that is being planned with the old settings must not leave its plan behind.
        self._memo = Memo(4096, 16 << 20)

    def plan(self, asked: Asked) -> Plan:
        """What the cache will do for a request; `InvalidRequestError` where its controls are wrong."""
        request = read_request(self.settings, asked)
        return make_plan(self.settings, request, asked, keep_form=self._keep_form)

    def quick(self, kind: str, route: str, body: bytes, scope: str, cache_control: str) -> Plan:
        """`plan` for a JSON body that may have come before, byte for byte."""
        at = (kind, route, scope, cache_control, body)
        memo = self._memo
        plan = memo.get(at, len(body))
        if plan is None:
            plan = self.plan(Asked(kind, body, scope=scope, route=route, cache_control=cache_control))
            if len(body) <= _MEMO_BODY:
                memo.put(at, plan, len(body) if plan.form is None else _FORM * len(body))
        return plan

    async def planned(self, port: Port, asked: Asked) -> Plan:
        """`plan`, with the host's own key function, which may be async, where there is one."""
        settings, function, body = self.settings, self.key, asked.body
        if function is None and not asked.enforced and isinstance(body, bytes) and asked.is_plain_json:
            return self.quick(asked.kind, asked.route, body, asked.scope, asked.cache_control)
        request = read_request(settings, asked)
        custom = None
        if function is not None and request.problem is None:
            request, custom = await self._custom_key(port, function, request)
        return make_plan(settings, request, asked, custom_key=custom, keep_form=self._keep_form)

    async def _custom_key(
        self, port: Port, function: Callable[..., object], request: Request
    ) -> tuple[Request, str | None]:
        try:
            key = await port.call(function, request.kind, request.form)
        except Exception as exc:
            self._reporter.emit(Event("key-error", request.kind, error=exc))
            return replace(request, problem="key-failed"), None
        if not isinstance(key, str) or not key:
            return replace(request, problem="key-failed"), None
        return request, key
