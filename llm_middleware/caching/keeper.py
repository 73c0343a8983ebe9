"""`Keeper`: which finished answers are stored, for how long, and in which form."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .._ports.protocol import Port
from ..errors import UpstreamAnswerError
from ..events import Event
from ..types import Clock, Headers
from . import admission, headers
from .answer import CacheInfo
from .batch import Batch, joined, split
from .entry import Entry, Form, pack_ends
from .fastlane import no_header
from .labels import MOST, count, union
from .lookup import Header, Opened
from .plan import Plan
from .reporter import Reporter
from .settings import CacheSettings
from .tiers import Tiers

if TYPE_CHECKING:
    from ..semantic.tier import SemanticTier

__all__ = ["Keeper", "Recorded"]

logger = logging.getLogger("llm_middleware")


@dataclass(frozen=True, slots=True)
class Recorded:
    """A finished answer, as it goes into admission. ``ends``: chunk offsets of a streamed one."""

    status: int
    headers: Headers
    body: bytes
    ends: Sequence[int] | None = None


class Keeper:
    """``semantic``: what is told of answers that were kept, so that questions of like meaning find them."""

    def __init__(
        self,
        settings: CacheSettings,
        tiers: Tiers,
        clock: Clock,
        reporter: Reporter,
        semantic: SemanticTier | None = None,
    ) -> None:
        self.semantic = semantic
        self.settings = settings
        self.tiers = tiers
        self.clock = clock
        self.reporter = reporter

    def _reasons(
        self, plan: Plan, answer: Recorded, header: Header, judged: set[str] | None
    ) -> set[str] | str:
        """Why the answer should not be kept: reason codes to weigh, or one that no switch lifts."""
        if not plan.store:
            return "ttl-zero" if plan.controls.ttl == 0 else "no-store"
        if len(answer.body) > self.settings.max_entry_bytes:
            return "answer-too-large"
        if answer.status != 200:
            return {"upstream-error"}
        if headers.content_encoding(answer.headers):
            return "encoded-answer"
        if headers.varies(answer.headers, header) is None:
            return "vary"
        kind = headers.content_type(answer.headers)
        if judged is not None:
            reasons = judged
        elif kind == b"text/event-stream":
            reasons = admission.stream_reasons(plan.kind, answer.body)
        else:
            reasons = admission.body_reasons(plan.kind, answer.body, kind)
        return reasons | ({"sampled"} if plan.sampled else set())

    async def refusal(
        self,
        port: Port,
        plan: Plan,
        answer: Recorded,
        header: Header = no_header,
        judged: set[str] | None = None,
    ) -> str | None:
        """The reason code why ``answer`` is not kept, or None."""
        reasons = self._reasons(plan, answer, header, judged)
        if isinstance(reasons, str):
            return reasons
        verdict = admission.verdict(reasons, self.settings.policy)
        if verdict is not None or self.settings.admit is None:
            return verdict
        try:
            admitted = await port.call(self.settings.admit, plan, answer)
        except Exception as exc:
            logger.warning("the admit predicate failed: %s: %s", type(exc).__name__, exc)
            admitted = False
        return None if admitted else "not-admitted"

    def _lifetime(self, plan: Plan, now: float) -> tuple[float, float | None]:
        """When the entry stops being fresh, and for how many seconds the store keeps it."""
        ttl = plan.controls.ttl
        if ttl is None:
            return float("inf"), None
        # Spread by the key itself: entries stored together expire apart, and each as often as it is asked.
        spread = int(plan.key[-8:], 16) / 0xFFFFFFFF
        ttl *= 1 - self.settings.ttl_jitter * spread
        grace = max(
            plan.controls.stale_while_revalidate,
            plan.controls.stale_if_error,
        )
        return now + ttl, ttl + grace

    async def complete(
        self, port: Port, plan: Plan, answer: Recorded, opened: Opened, header: Header = no_header
    ) -> tuple[CacheInfo, Recorded]:
        """Settle a plain answer; what to tell of it, and the answer as it goes to everybody who waits."""
        answer = _decoded(answer, self.settings.max_entry_bytes)
        if opened.batch is None:
            return await self.settle(port, plan, answer, opened, header=header), answer
        return await self._complete_batch(port, plan, answer, opened.batch, header)

    async def _complete_batch(
        self, port: Port, plan: Plan, answer: Recorded, batch: Batch, header: Header
    ) -> tuple[CacheInfo, Recorded]:
        info = plan.miss()
        if batch.found:
            info.status, info.forward, info.detail = "partial", "partial", batch.share
        parts = split(answer.body, batch, plan.inputs) if answer.status == 200 else None
        refusal = await self.refusal(port, plan, answer, header)
        if parts is None:
            info.detail = refusal or "unexpected-body"
            return info, answer if batch.whole or answer.status != 200 else _unmatched(answer)
        if refusal is None:
            stored = [
                await self.keep(port, replace(plan, key=key), replace(answer, body=body), header=header)
                for key, body in parts.items()
            ]
            info.stored = all(stored)
        info.detail = refusal or info.detail
        self.tell_stored(plan, info)
        if batch.whole:
            return info, answer
        headers_ = tuple(pair for pair in answer.headers if pair[0] != b"content-length")
        return info, replace(answer, headers=headers_, body=joined(batch.keys, {**batch.found, **parts}))

    def tell_stored(self, plan: Plan, info: CacheInfo) -> None:
        # What broke off may still be answered, by another call.
        if self.tiers.peers is not None and info.detail != "unterminated":
            self.tiers.peers.settled(plan.key, stored=info.stored)
        name = "stored" if info.stored else "not-stored"
        self.reporter.emit(
            Event(name, plan.kind, info.key, None, plan.stream, plan.model, info.detail, self.reporter.tier)
        )

    async def settle(
        self,
        port: Port,
        plan: Plan,
        answer: Recorded,
        opened: Opened,
        *,
        header: Header = no_header,
        reasons: set[str] | None = None,
    ) -> CacheInfo:
        """Admit and store a finished answer; what to tell the caller of it. ``reasons``: what its body was
        judged to be, where that was done before."""
        info = opened.miss(plan)
        sought, info.detail = info.detail, await self.refusal(port, plan, answer, header, reasons)
        if info.detail is None:
            info.stored = await self.keep(port, plan, answer, beside=opened.beside, header=header)
            if not info.stored:
                info.detail = "backend-down"
        self.tell_stored(plan, info)
        info.detail = info.detail or sought
        if info.stored and self.semantic is not None and plan.form is not None:
            _, kept_for = self._lifetime(plan, self.clock())
            await self.semantic.stored(port, plan, answer, opened.sought, kept_for)
        return info

    async def keep(
        self,
        port: Port,
        plan: Plan,
        answer: Recorded,
        *,
        beside: Entry | None = None,
        header: Header = no_header,
    ) -> bool:
        """Store an answer that was admitted; False where the store fails."""
        now = self.clock()
        expires, kept_for = self._lifetime(plan, now)
        ends = None if answer.ends is None else pack_ends(answer.ends)
        form = Form(headers.kept(answer.headers), answer.body, ends, plan.usage, answer.status)
        vary = headers.varies(answer.headers, header) or ()
        tags, labels = plan.controls.tags, plan.labels
        entry = Entry(plan.kind, now, expires, None, None, plan.model, tags, vary, labels)
        if beside is not None:
            # As it is now: during a long call it may have been removed or replaced.
            beside, _ = await self.tiers.get(port, plan.kind, plan.key)
        joined = labels if beside is None else union(beside.labels, labels)
        if beside is not None and beside.vary == vary and count(joined) <= MOST:
            # The entry gains its second form and keeps the shorter life: neither form may outlive its time.
            tags, labels = tuple(dict.fromkeys((*beside.tags, *tags))), joined
            entry = replace(beside, expires=min(beside.expires, expires), tags=tags, labels=labels)
            kept_for = None if kept_for is None else min(kept_for, max(0.0, entry.expires - now))
        if plan.stream:
            entry.stream = form
        else:
            entry.plain = form
        return await self.tiers.set(port, plan, entry, kept_for)


def _unmatched(answer: Recorded) -> Recorded:
    """What to answer where the provider did not answer the inputs that it was asked for."""
    error = UpstreamAnswerError("the provider's answer does not match the inputs it was asked for")
    return Recorded(error.status, ((b"content-type", headers.JSON),), error.body())


def _decoded(answer: Recorded, limit: int) -> Recorded:
    """A gzip-encoded plain answer as its content, so that it serves clients that do not accept the encoding.
    Returned as it is where it is not gzip, is damaged, or is longer than ``limit`` bytes."""
    if headers.content_encoding(answer.headers) != b"gzip":
        return answer
    decoder = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        body = decoder.decompress(answer.body, limit + 1)
    except zlib.error:
        return answer
    if len(body) > limit or not decoder.eof:
        return answer
    plain = tuple(pair for pair in answer.headers if pair[0] not in (b"content-encoding", b"content-length"))
    return replace(answer, headers=plain, body=body)
