"""One request to a cached endpoint, from its body to its answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import ExitStack
from dataclasses import replace

from .._ports.async_ import AsyncPort
from ..api.front import Front, credentials_scope, identified_scope
from ..api.gate import Caller, Gate, Told
from ..api.message import refusal
from ..api.paths import is_form
from ..caching.answer import CacheInfo, Found
from ..caching.flight import DONE, Flight
from ..caching.headers import IDENTITY, READ, add_info, found_headers, shared, stream_headers
from ..caching.lookup import Opened
from ..caching.plan import Asked, Plan
from ..errors import NOT_CACHED, CacheMissError, LLMMiddlewareError
from .reading import client_left, head_of
from .types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Exchange"]

logger = logging.getLogger("llm_middleware")

_port = AsyncPort()

# What became of reading along: the client has its answer, or this request makes a call of its own, behind a
# flight that another may lead, or beside all flights.
_DONE, _AGAIN, _ALONE = "done", "again", "alone"


class Exchange:
    """The state of one request; nothing of it lives on the middleware."""

    def __init__(
        self,
        front: Front,
        app: ASGIApp,
        kind: str,
        path: str,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        self.front = front
        self.cache = front.cache
        self.flow = self.cache._flow
        self.app = app
        self.kind = kind
        self.query = scope.get("query_string", b"").decode("latin-1")
        self.route = front.own[path] + (f"?{self.query}" if self.query else "")
        self.scope = scope
        self.receive = receive
        self.send = send
        self.body = b""
        self.limit = front.max_body_bytes
        self.caller: Caller | None = None
        self.told: Told | None = None
        self.named = ""  # the model of a form, where it stands in the path

    def header(self, name: str) -> str:
        wanted = name.encode("latin-1")
        return ", ".join(
            [value.decode("latin-1") for found, value in self.scope["headers"] if found == wanted]
        )

    def _headers(self) -> tuple[list[tuple[bytes, bytes]], bytes, bytes, bytes] | None:
        """Credentials, ``Cache-Control``, content type and encoding; None where the body is too long."""
        credentials: list[tuple[bytes, bytes]] = []
        cache_control = content_type = content_encoding = b""
        for name, value in self.scope["headers"]:
            if name not in READ:
                continue
            if name in IDENTITY:
                credentials.append((name, value))
            elif name == b"cache-control":
                cache_control = cache_control + b", " + value if cache_control else value
            elif name == b"content-type":
                content_type = value
            elif name == b"content-encoding":
                content_encoding = value.strip().lower()
            elif name == b"content-length" and value.isdigit() and int(value) > self.limit:
                return None
        return credentials, cache_control, content_type, content_encoding

    async def run(self) -> None:
        headers = self._headers()
        if headers is None:
            await self._pass_on([], "body-too-large")
            return
        credentials, cache_control, content_type, content_encoding = headers
        gate = self.front.gate
        if self.told is None and gate is not None and not await self.admitted(gate, credentials):
            return
        if self.kind == "transcription" and self.told is not None:
            form, encoding = content_type.decode("latin-1"), content_encoding.decode("latin-1")
            if is_form(form, encoding):
                from .uploads import answer_upload  # on first use: it brings the email parser

                await answer_upload(self, self.told, cache_control.decode("latin-1"), form)
                return
        message = await self.receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self.body = message.get("body", b"")
            if len(self.body) > self.limit:
                await self._pass_on([message], "body-too-large")
                return
        elif not await self._read(message):
            return
        try:
            scope = await self._whose(credentials) if self.caller is None else self.caller.scope
            if scope is None:
                plan = self.cache.plan(self.kind, self.body)
                await self._pass_on([self._request(plan.forward)], "identify-failed", plan)
                return
            control, planner = cache_control.decode("latin-1"), self.cache.planner
            enforced = None if self.caller is None else self.caller.enforced
            if planner.key is None and not (content_encoding or enforced) and self.kind != "transcription":
                plan = planner.quick(self.kind, self.route, self.body, scope, control)
            else:
                encoding = content_encoding.decode("latin-1")
                form = content_type.decode("latin-1")
                asked = Asked(self.kind, self.body, scope, self.route, control, form, encoding, enforced)
                plan = await planner.planned(_port, asked)
            if self.told is not None:
                self.told.about(plan, self.query)
        except LLMMiddlewareError as exc:
            await self.refuse(exc)
            return
        await self.answer(plan)

    async def _whose(self, credentials: list[tuple[bytes, bytes]]) -> str | None:
        """The scope of the answer; None where nothing may be shared."""
        if self.front.identify is not None:
            return await self._caller(self.front.identify)
        return "" if self.cache.settings.share == "all" else credentials_scope(credentials)

    async def admitted(self, gate: Gate, headers: list[tuple[bytes, bytes]]) -> bool:
        """Whether the caller, by ``headers``, may call at all; otherwise it has been told."""
        try:
            self.caller = gate.at_once(headers) or await gate.enter(_port, head_of(self.scope))
        except LLMMiddlewareError as exc:
            await self.refuse(exc)
            return False
        self.route = self.caller.names + self.route  # in front: behind it a query could say the same
        self.told = self.scope["llm_middleware"] = Told(self.caller)
        return True

    async def _read(self, message: Message) -> bool:
        """The rest of a body in pieces, unless the client left or sends more than is read: then the app has
        been called."""
        messages, parts, size = [message], [], 0
        while message["type"] == "http.request":
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.limit:
                await self._pass_on(messages, "body-too-large")
                return False
            if not message.get("more_body", False):
                self.body = b"".join(parts)
                return True
            message = await self.receive()
            messages.append(message)
        await self._pass_on(messages, "client-disconnected")
        return False

    async def _caller(self, identify: Callable[..., object]) -> str | None:
        """The scope of the answer; None where the host's ``identify`` failed: then nothing is shared."""
        if self.cache.settings.share == "all":
            return ""
        try:
            identity = identify(self.scope)
            return identified_scope(await identity if isinstance(identity, Awaitable) else identity)
        except Exception as exc:
            logger.warning("identify failed: %s: %s", type(exc).__name__, exc)
            return None

    def _request(self, body: bytes | None = None) -> Message:
        return {"type": "http.request", "body": self.body if body is None else body, "more_body": False}

    # --- without the cache

    async def _pass_on(self, messages: Iterable[Message], reason: str, plan: Plan | None = None) -> None:
        """Call the app with what was received so far; only the headers tell that the cache was there."""
        pending = list(messages)[::-1]
        info = CacheInfo("bypass", None, reason, "bypass")
        self.flow.tell(plan or Plan(self.kind), info)

        async def receive() -> Message:
            return pending.pop() if pending else await self.receive()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = add_info(message.get("headers", ()), info, self.front.profile)
                message = {**message, "headers": headers}
            await self.send(message)

        with self.forwarding(plan):
            await self.app(self.scope, receive, send)

    def forwarding(self, plan: Plan | None) -> _Forwarding:
        return _Forwarding(self.scope, None if plan is None else plan.forward)

    async def refuse(self, error: LLMMiddlewareError) -> None:
        headers, body = refusal(error, self.front.profile)
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    # --- with it

    async def answer(self, plan: Plan) -> None:
        if plan.bypass is not None:
            if plan.controls.only_if_cached:
                error = CacheMissError(NOT_CACHED)
                await self.refuse(error)
                return
            forward = self.body if plan.forward is None else plan.forward
            await self._pass_on([self._request(forward)], plan.bypass, plan)
            return
        found = self.flow.now(plan, self.header)
        if found is not None and found.stale is None:
            await self.send_found(plan, found)
            return
        try:
            while not await self._slow(plan):
                pass
        except CacheMissError as exc:
            await self.refuse(exc)

    async def _slow(self, plan: Plan) -> bool:
        """Any way but the fast lane; False where a flight that was joined was abandoned: once more."""
        from .leader import Leader

        opened = await self.flow.open(_port, plan, self.header)
        if opened.found is not None:
            await self.send_found(plan, opened.found)
            if opened.found.stale == "stale-while-revalidate" and plan.store:
                self._revalidate(plan)
            return True
        assert opened.flight is not None
        if opened.leads:
            await Leader(self, plan, opened.flight, opened).run()
            return True
        return await self._follow(plan, opened.flight)

    async def send_found(self, plan: Plan, found: Found) -> None:
        self.flow.tell_found(plan, found)
        if self.front.hooks and self.told is not None:
            self.front.hooks.hit(plan, found, self.told)
        headers = found_headers(found, plan.key, self.front.profile)
        if found.chunks is None:
            headers.append((b"content-length", b"%d" % len(found.body)))
            await self.send({"type": "http.response.start", "status": found.status, "headers": headers})
            await self.send({"type": "http.response.body", "body": found.body})
            return
        start = {"type": "http.response.start", "status": found.status, "headers": stream_headers(headers)}
        await self.send(start)
        for chunk in found.chunks:
            await self.send({"type": "http.response.body", "body": chunk, "more_body": True})
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _follow(self, plan: Plan, flight: Flight) -> bool:
        try:
            outcome = await self._unless_client_leaves(self._read_along(plan, flight))
        except Exception:
            self._tell_shared(plan, flight, whole=False)
            raise
        finally:
            flight.leave()
        if outcome is None or outcome == _DONE:
            self._tell_shared(plan, flight, whole=outcome == _DONE)
        if outcome == _ALONE:
            from .leader import Leader

            await Leader(self, plan, self.flow.flights.solo(plan.key), Opened()).run()
        return outcome != _AGAIN

    def _tell_shared(self, plan: Plan, flight: Flight, *, whole: bool) -> None:
        if self.front.hooks and self.told is not None:
            self.front.hooks.shared(plan, self.told, flight, whole=whole)

    async def _read_along(self, plan: Plan, flight: Flight) -> str:
        """Give the client what the flight gets; or say that this request must call, again or by itself."""
        head = await flight.begun(_port)
        if head is None:
            return _AGAIN
        if flight.vary is None or any(self.header(name) != value for name, value in flight.vary):
            # What the leader got was made for its own headers.
            return _ALONE
        info = CacheInfo("collapsed", plan.digest, forward="miss")
        self.flow.tell(plan, info)
        headers = add_info(shared(head.headers), info, self.front.profile)
        if not head.streamed:
            body = await flight.body(_port)
            headers = [pair for pair in headers if pair[0] != b"content-length"]
            headers.append((b"content-length", b"%d" % len(body)))
            await self.send({"type": "http.response.start", "status": head.status, "headers": headers})
            await self.send({"type": "http.response.body", "body": body})
            return _DONE
        start = {"type": "http.response.start", "status": head.status, "headers": stream_headers(headers)}
        await self.send(start)
        async for chunk in flight.read(_port):
            await self.send({"type": "http.response.body", "body": chunk, "more_body": True})
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})
        return _DONE

    async def _unless_client_leaves(self, work: Coroutine[object, object, str]) -> str | None:
        """``work``'s result; None where the client left first and it was cancelled."""
        task = asyncio.ensure_future(work)
        watch = asyncio.ensure_future(client_left(self.receive))
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                return None
            return task.result()
        finally:
            watch.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    def _revalidate(self, plan: Plan) -> None:
        """Refresh a stale entry behind the answer just given; one refresh at a time for each key."""
        from .leader import Leader

        flights = self.flow.flights
        guard, leads = flights.join(f"{plan.key}/revalidate")
        if not leads:
            guard.leave()
            return

        keeping = ExitStack()
        if self.told is not None and self.told.upload is not None:
            keeping.enter_context(self.told.upload)  # this exchange ends before

        async def refresh() -> None:
            fresh = replace(plan, lookup=False)
            try:
                with keeping:
                    await Leader(self, fresh, flights.solo(plan.key), Opened()).refresh()
            except Exception as exc:
                self.flow.reporter.background_failed(plan, exc)
            finally:
                guard.end(DONE)
                flights.land(guard)

        _port.spawn(refresh)


class _Forwarding:
    """While the app runs: a scope whose content-length is that of the body it is given.

    The scope itself is changed and put back, since routers leave what they find in it for the layers outside.
    """

    def __init__(self, scope: Scope, body: bytes | None) -> None:
        self._scope = scope
        self._sent = scope["headers"]
        self._body = body

    def __enter__(self) -> None:
        if self._body is not None:
            size = b"%d" % len(self._body)
            self._scope["headers"] = [
                (name, size if name == b"content-length" else value) for name, value in self._sent
            ]

    def __exit__(self, *exc_info: object) -> None:
        if self._body is not None:
            self._scope["headers"] = self._sent
