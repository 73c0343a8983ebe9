"""Allowances: what a key's limits leave room for, and what its calls used.

Rules that hold here:

* A key without limits costs nothing: no store is asked before a call, and after it only to count its cost.
* While the store fails, each process counts for itself, beginning with what it knows of the budget. What
  ended meanwhile is told to the store with the next thing that is told to it.
* An allowance ends once. One that is dropped without an end gives back what it held, with the next call.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import TracebackType
from typing import Final

from .._drive import run_sync
from .._ports.faces import SYNC, async_port
from .._ports.protocol import Port
from ..errors import (
    BudgetExceededError,
    ConfigError,
    InvalidKeyError,
    KeyLimitError,
    StoreError,
    did_you_mean,
)
from ..stores.keys_memory import MemoryKeys
from ..stores.keys_rules import Ask, Ended, Reply
from ..types import Clock
from .asking import Asker, Paused
from .duration import parse_duration
from .fields import money, whole
from .record import KeyRecord

__all__ = ["Allowance", "Counting", "LimitSettings", "limit_settings"]

logger = logging.getLogger("llm_middleware")

_MOST: Final = 10_000  # things to tell that are kept
_LATE: Final = 30.0  # seconds that a store may take to do what nobody waits for any more


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSettings:
    """``minimum_cost``: what a call holds of a budget at least, until it ends. ``first_share``: what it holds
    while no call of the key has had a cost. ``window``: seconds that a minute has. ``hold``: seconds after
    which a call that was not ended holds nothing any more, as its process has died."""

    minimum_cost: float = 0.0
    first_share: float = 0.1
    window: float = 60.0
    hold: float = 600.0


def limit_settings(given: Mapping[str, object] | LimitSettings | None) -> LimitSettings:
    """`ConfigError` names a setting that is unknown or wrong."""
    if isinstance(given, LimitSettings):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"limits: expected a mapping, got a {type(given).__name__}", param="limits")
    known = {
        field.name: 0.0 if field.name in ("minimum_cost", "first_share") else 0.001
        for field in fields(LimitSettings)
    }
    for name, value in (given or {}).items():
        if name not in known:
            raise ConfigError(f"limits: unknown {name!r}{did_you_mean(name, known)}", param=f"limits.{name}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not known[name] <= value < math.inf:  # type: ignore[operator]
            raise ConfigError(
                f"limits.{name}: expected a number >= {known[name]}, got {value!r}", param=f"limits.{name}"
            )
    return LimitSettings(**(given or {}))  # type: ignore[arg-type]


class Allowance:
    """Room for one call that goes upstream. End it once, with what the call used; or use it as a context
    manager, which ends it if nobody else has: the estimate of its tokens then stands, and it cost nothing."""

    __slots__ = ("__weakref__", "_counting", "_ended", "call", "local", "record")

    def __init__(self, counting: Counting, record: KeyRecord, call: str, *, local: bool = False) -> None:
        self.record = record
        self.call = call
        self.local = local
        self._counting = counting
        self._ended = False

    def end(self, *, tokens: int | None = None, cost: float | None = None) -> None:
        """The call is over. ``tokens``: used in all; None: not known. ``cost``: in the budget's money. Only
        the first end counts. Never raises for what a store does; `InvalidRequestError` for what is no
        number."""
        run_sync(self._end(SYNC, tokens, cost))

    async def aend(self, *, tokens: int | None = None, cost: float | None = None) -> None:
        """`end` for async callers."""
        await self._end(async_port(), tokens, cost)

    async def _end(self, port: Port, tokens: int | None = None, cost: float | None = None) -> None:
        used = None if tokens is None else whole("tokens", tokens)
        spent = 0.0 if cost is None else money("cost", cost)
        if self._ended:
            return
        self._ended = True
        await self._counting.end(port, self, used, spent)

    def __enter__(self) -> Allowance:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    async def __aenter__(self) -> Allowance:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aend()

    def __del__(self) -> None:
        if not self._ended and self.call:
            # Nothing may wait in a finalizer, so the next call does it.
            self._counting.dropped.append(self)
            self._ended = True


class Counting:
    """What the keys of one resolver may still do."""

    def __init__(self, asker: Asker, settings: LimitSettings, clock: Clock) -> None:
        self.dropped: deque[Allowance] = deque()
        self._doubtful: deque[tuple[float, str, Ended]] = deque(maxlen=_MOST)
        self._asker, self._settings, self._clock = asker, settings, clock
        self._local: MemoryKeys | None = None  # while the store fails
        self._owed: dict[str, list[Ended]] = {}
        self._lock = threading.Lock()

    async def admit(self, port: Port, record: KeyRecord, count: int) -> None:
        ask = self._question(record, requests=count, rpm=record.rpm_limit)
        await self._counted(port, record, ask)

    async def begin(self, port: Port, record: KeyRecord, tokens: int, cost: float | None) -> Allowance:
        limits = (record.tpm_limit, record.max_parallel_requests, record.max_budget)
        if all(limit is None for limit in limits):
            return Allowance(self, record, "")
        call = secrets.token_hex(8)
        held = None if cost is None else money("cost", cost)
        ask = self._question(
            record,
            call=call,
            tokens=tokens,
            cost=held,
            tpm=record.tpm_limit,
            parallel=record.max_parallel_requests,
            budget=record.max_budget,
        )
        local = await self._counted(port, record, ask)
        return Allowance(self, record, call, local=local)

    async def end(self, port: Port, allowance: Allowance, tokens: int | None, cost: float) -> None:
        """Tell what a call used; what cannot be told now is told later."""
        record = allowance.record
        if not allowance.call and (not cost or not record.stored):
            return
        ended = Ended(allowance.call, tokens, cost)
        if allowance.local:
            self._settle_here(record, ended)
            ended = ended._replace(call="")
        self._owe(record.id, (ended,))
        await self._tell(port, record)

    async def close(self, port: Port) -> None:
        """Tell what is still to be told."""
        self._collect()
        for key_id in list(self._owed):
            await self._tell_owed(port, key_id)

    def _question(self, record: KeyRecord, **asked: object) -> Ask:
        settings = self._settings
        return Ask(
            stored=record.stored,
            minimum=settings.minimum_cost,
            share=settings.first_share,
            window=settings.window,
            hold=settings.hold,
            spend=record.spend,
            resets=record.budget_resets,
            following=self._following(record),
            **asked,  # type: ignore[arg-type]
        )

    def _following(self, record: KeyRecord) -> float | None:
        """When the budget is renewed after the time that runs."""
        duration = parse_duration(record.budget_duration) if record.budget_duration else None
        if duration is None or record.budget_resets is None:
            return None
        return duration.following(record.budget_resets, self._clock())

    async def _counted(self, port: Port, record: KeyRecord, ask: Ask) -> bool:
        """Have the store count; whether this process did instead. Raises where there is no room."""
        self._collect()
        owed = self._take(record.id)
        try:
            reply = await self._asker.ask(port, "count", record.id, _with(ask, owed))
        except Paused:
            self._owe(record.id, owed)
        except BaseException as exc:
            self._owe(record.id, _again(owed))
            if ask.call:  # nobody knows whether it was counted, or still will be: so it is told twice
                ended = Ended(ask.call, None, 0.0, True)
                self._owe(record.id, (ended,))
                self._doubtful.append((self._clock() + _LATE, record.id, ended))
            if not isinstance(exc, StoreError):
                raise
        else:
            self._local = None
            _raise_for(reply, ask)
            await self._tell_another(port)
            return False
        _raise_for(self._here().count(record.id, _with(ask, (), stored=False)), ask)
        return True

    def _here(self) -> MemoryKeys:
        """Where this process counts while the store fails; begun anew each time."""
        local = self._local
        if local is None:
            local = self._local = MemoryKeys(clock=self._clock)
        return local

    def _settle_here(self, record: KeyRecord, ended: Ended) -> None:
        if self._local is not None:
            self._local.count(record.id, _with(self._question(record), (ended,), stored=False))

    async def _tell(self, port: Port, record: KeyRecord) -> None:
        self._collect()
        await self._tell_owed(port, record.id, self._question(record))
        await self._tell_another(port)

    async def _tell_another(self, port: Port) -> None:
        """What another key owes since the store failed."""
        key_id = next(iter(self._owed), None)
        if key_id is not None:
            await self._tell_owed(port, key_id)

    async def _tell_owed(self, port: Port, key_id: str, ask: Ask | None = None) -> None:
        owed = self._take(key_id)
        if not owed:
            return
        try:
            await self._asker.ask(port, "count", key_id, _with(ask or Ask(stored=True), owed))
        except Paused:
            self._owe(key_id, owed)
        except StoreError as exc:
            logger.debug("the use of an API key is told later: %s", exc)
            self._owe(key_id, _again(owed))
        except BaseException:
            self._owe(key_id, _again(owed))
            raise

    def _collect(self) -> None:
        """Allowances that were dropped, and ends that may have been told before the beginning."""
        now = self._clock()
        while self._doubtful and self._doubtful[0][0] <= now:
            try:
                _, key_id, ended = self._doubtful.popleft()
            except IndexError:
                break
            self._owe(key_id, (ended,))
        while self.dropped:
            try:
                allowance = self.dropped.popleft()
            except IndexError:
                return
            ended = Ended(allowance.call, None, 0.0)
            if allowance.local:
                self._settle_here(allowance.record, ended)
            else:
                self._owe(allowance.record.id, (ended,))

    def _take(self, key_id: str) -> tuple[Ended, ...]:
        """What is to be told of this key; it is the caller's now."""
        if not self._owed:
            return ()
        with self._lock:
            return tuple(self._owed.pop(key_id, ()))

    def _owe(self, key_id: str, ended: tuple[Ended, ...]) -> None:
        if not ended:
            return
        with self._lock:
            if len(self._owed) < _MOST or key_id in self._owed:
                owed = self._owed.setdefault(key_id, [])
                owed += ended
                del owed[: len(owed) - _MOST]
                return
        logger.warning("the use of an API key is not counted: the store has failed for too long")


def _with(ask: Ask, ended: tuple[Ended, ...], *, stored: bool | None = None) -> Ask:
    return replace(ask, ended=(*ask.ended, *ended), stored=ask.stored if stored is None else stored)


def _again(ended: tuple[Ended, ...]) -> tuple[Ended, ...]:
    """What the store may have heard although it did not answer. What held nothing cannot be told apart."""
    return tuple(each._replace(again=True) if each.call else each for each in ended)


_LIMITS: Final = {
    "rpm": ("rpm_limit", "requests per minute"),
    "tpm": ("tpm_limit", "tokens per minute"),
    "parallel": ("max_parallel_requests", "requests at a time"),
}


def _raise_for(reply: Reply, ask: Ask) -> None:
    if not reply.refused:
        return
    if reply.refused == "gone":
        raise InvalidKeyError("the API key is not valid any more")
    if reply.refused in ("budget", "held"):
        used = "is used up" if reply.refused == "budget" else "may be used up by the calls in flight"
        raise BudgetExceededError(
            f"the budget of this API key {used}: {ask.budget}",
            retry_after=reply.retry_after,
            param="max_budget",
        )
    field, what = _LIMITS[reply.refused]
    limit = {"rpm": ask.rpm, "tpm": ask.tpm, "parallel": ask.parallel}[reply.refused]
    raise KeyLimitError(
        f"the limit of this API key is reached: {limit} {what}", retry_after=reply.retry_after, param=field
    )
