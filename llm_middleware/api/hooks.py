"""`Hooks`: tells the host's observers how each request for a model ended: ``success`` or ``failure``."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from ..caching.answer import CacheInfo, Found
from ..caching.fastlane import is_failure
from ..caching.flight import ABANDONED, FAILED, Flight
from ..caching.plan import Plan
from ..caching.reporter import Reporter
from ..errors import ConfigError, LLMMiddlewareError
from ..events import Event, Hook
from ..routing.response import RouteInfo
from .gate import Told

__all__ = ["Hooks", "named_hooks", "until_closed"]

_LEFT: Final = "client-disconnected"

logger = logging.getLogger("llm_middleware")


class Hooks:
    """``hooks``: sync or async callables; one that raises is logged and counted, and the request goes on."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        for hook in hooks:
            if not callable(hook):
                raise ConfigError(f"hooks: expected functions, got {hook!r}", param="hooks")
        self._reporter = Reporter(hooks)

    def __bool__(self) -> bool:
        return bool(self._reporter.hooks)

    @property
    def failed(self) -> int:
        """How often a hook raised."""
        return self._reporter.counts["hook-error"]

    def hit(self, plan: Plan, found: Found, told: Told) -> None:
        failed, told.failed, told.answered = told.failed, None, True
        self._reporter.emit(
            Event(
                "success",
                plan.kind,
                plan.digest,
                cache_hit=True,
                stream=plan.stream,
                model=plan.model,
                detail=found.like or found.stale,
                tier=found.tier,
                age=found.age,
                similarity=None if found.like is None else found.similarity,
                error=None if failed is None else failed.error,
                deployment=None if failed is None else failed.deployment,
                caller=told.key_id,
            )
        )

    def shared(self, plan: Plan, told: Told, flight: Flight, *, whole: bool) -> None:
        """The answer of a call that another request made: the client has the ``whole`` of it, or left."""
        detail = _broken(flight) or (None if whole else _LEFT)
        self._reporter.emit(
            Event(
                "success" if detail is None else "failure",
                plan.kind,
                plan.digest,
                cache_hit=False,
                stream=plan.stream,
                model=plan.model,
                detail=detail or "collapsed",
                error=flight.error,
                caller=told.key_id,
            )
        )

    def left(self, kind: str, told: Told, *, stream: bool) -> None:
        """The client left before its answer was whole."""
        self._reporter.emit(
            Event(
                "failure",
                kind,
                told.cache_key,
                cache_hit=False,
                stream=stream,
                detail=_LEFT,
                caller=told.key_id,
            )
        )

    def ended(
        self,
        kind: str,
        told: Told,
        route: RouteInfo,
        *,
        stream: bool,
        error: LLMMiddlewareError | None = None,
    ) -> None:
        """A call of the Router ended, or broke off with ``error``. Where an old answer stands in for it, this
        is told with that one: each request ends once."""
        done = "refresh" if told.answered else None
        event = Event(
            "success" if error is None else "failure",
            kind,
            told.cache_key,
            cache_hit=False,
            stream=stream,
            model=route.asked,
            detail=done if error is None else error.code,
            error=error,
            deployment=route.deployment,
            caller=told.key_id,
            tokens=route.tokens,
            output_tokens=route.output_tokens if route.tokens is not None else None,
            cost=route.cost,
            latency=route.latency,
        )
        if error is not None and told.fallback and is_failure(error.status):
            told.failed = event
        else:
            self._reporter.emit(event)


def until_closed(
    chunks: Iterator[bytes], leave: Callable[[], object], tell: Callable[[bool], object]
) -> tuple[Iterator[bytes], Callable[[], None]]:
    """``chunks``, and what closes them: it leaves them and tells whether they were read to their end."""
    whole = False

    def to_the_end() -> Iterator[bytes]:
        nonlocal whole
        yield from chunks
        whole = True

    def close() -> None:
        leave()
        tell(whole)

    return to_the_end(), close


def _broken(flight: Flight) -> str | None:
    """Why the answer that others read along with is none."""
    outcome = flight.outcome
    detail = outcome.detail if isinstance(outcome, CacheInfo) else None
    failed = flight.state in (FAILED, ABANDONED) or (flight.head is not None and flight.head.status >= 400)
    if failed:
        return "upstream-error"
    return detail if detail in ("error-event", "unterminated") else None


def named_hooks(names: Iterable[str]) -> list[Hook]:
    """The functions of dotted names (``package.module.name``) in a file of settings. One that is not there,
    or no function, such as a logger of LiteLLM's, is left out with a warning: the file starts as it is."""
    found = [_named(name) for name in names]
    return [hook for hook in found if hook is not None]


def _named(name: str) -> Hook | None:
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as exc:
        logger.warning("the callback %r is left out: %s", name, exc)
        return None
    if not callable(found):
        logger.warning("the callback %r is left out: it is no function of an Event", name)
        return None
    hook: Hook = found
    return hook
