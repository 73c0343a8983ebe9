"""The hit path: does this entry answer this request, and in which form?

Plain functions with no wait and no I/O. The middlewares, both faces and the slower look-ups all come
through `select`.
"""

from __future__ import annotations

from collections.abc import Callable

from ..types import Headers
from .answer import Found
from .endpoints import ENDPOINTS
from .entry import Entry, Form, pack_ends
from .headers import EVENT_STREAM, JSON, content_type
from .plan import Plan
from .sse import event_ends

__all__ = ["is_failure", "no_header", "select", "usable_on_error"]


def no_header(name: str) -> str:
    """The request headers of a caller that has none."""
    return ""


def select(
    entry: Entry, plan: Plan, now: float, tier: str, header: Callable[[str], str] = no_header
) -> Found | None:
    """``entry`` as the answer to ``plan`` at ``now``, or None where it is too old, varies, or lacks the form.

    RFC 9111, section 4.2.4, for when a stale answer may be given.
    """
    if entry.kind != plan.kind:
        return None
    ttl = entry.expires - now
    age = max(0.0, now - entry.created)
    stale = None
    if ttl <= 0 or not plan.simple:
        controls = plan.controls
        if controls.max_age is not None and age > controls.max_age:
            return None
        if ttl <= 0:
            stale = _staleness(plan, -ttl)
            if stale is None:
                return None
        elif ttl < controls.min_fresh:
            return None
    if entry.vary and any(header(name) != value for name, value in entry.vary):
        return None
    form = entry.stream if plan.stream else entry.plain
    if form is not None and not plan.stream:
        chunks = None if form.ends is None else form.chunks()
        return Found(form.headers, form.body, chunks, age, ttl, tier, stale, form.status)
    form = _streamed(entry, plan) if plan.stream else _plain(entry)
    if form is None:
        return None
    chunks = None if form.ends is None else form.chunks()
    return Found(form.headers, form.body, chunks, age, ttl, tier, stale, form.status)


def _staleness(plan: Plan, late: float) -> str | None:
    controls = plan.controls
    if controls.stale_while_revalidate > 0 and late <= controls.stale_while_revalidate:
        return "stale-while-revalidate"
    return "max-stale" if controls.max_stale > 0 and late <= controls.max_stale else None


def is_failure(status: int) -> bool:
    """Answers that a stale one may stand in for (RFC 5861, section 4), and 429: out of quota is down too."""
    return status >= 500 or status == 429


def usable_on_error(
    entry: Entry, plan: Plan, now: float, tier: str, header: Callable[[str], str] = no_header
) -> Found | None:
    """``entry`` as the answer when the call failed (RFC 5861, section 4), or None."""
    from dataclasses import replace

    late = now - entry.expires
    allowed = plan.controls.stale_if_error
    if not (plan.lookup and allowed > 0 and late <= allowed):
        return None
    any_age = replace(plan.controls, max_age=None, min_fresh=0.0, max_stale=max(late, 0.0) + 1.0)
    found = select(entry, replace(plan, simple=True, controls=any_age), now, tier, header)
    if found is not None:
        found.stale = "stale-if-error"
    return found


def _streamed(entry: Entry, plan: Plan) -> Form | None:
    from .streaming import explode, without_usage

    form = entry.stream
    if form is not None:
        if form.usage == plan.usage or form.ends is None or not ENDPOINTS[entry.kind].convertible:
            return form
        if plan.usage:
            # Asked for usage that the recording may lack: only the provider can give it.
            return form if b'"usage":{' in form.body.replace(b" ", b"") else None
        return _stream_form(form.headers, without_usage(form.body))
    plain = entry.plain
    if plain is None or plain.status != 200 or plain.ends is not None or content_type(plain.headers) != JSON:
        return None
    body = explode(entry.kind, plain.body, usage=plan.usage)
    return None if body is None else _stream_form(_typed(plain.headers, EVENT_STREAM), body)


def _plain(entry: Entry) -> Form | None:
    from .streaming import assemble

    stream = entry.stream
    if stream is None or stream.status != 200 or not ENDPOINTS[entry.kind].convertible:
        return None
    if content_type(stream.headers) != b"text/event-stream":
        return None
    body = assemble(entry.kind, stream.body)
    return None if body is None else Form(_typed(stream.headers, JSON), body)


def _stream_form(headers: Headers, body: bytes) -> Form:
    return Form(headers, body, pack_ends(event_ends(body)))


def _typed(headers: Headers, kind: bytes) -> Headers:
    return tuple((name, kind if name == b"content-type" else value) for name, value in headers)
