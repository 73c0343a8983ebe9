"""One request to a cached endpoint, from its body to its answer (PEP 3333)."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING

from .._drive import iter_sync, run_sync
from .._ports.sync import SyncPort
from ..api.front import Front, credentials_scope, identified_scope
from ..api.gate import Caller, Gate, Told
from ..api.hooks import until_closed
from ..api.message import refusal
from ..api.paths import is_form
from ..caching.answer import CacheInfo, Found
from ..caching.flight import DONE, Flight, FlightReader
from ..caching.headers import IDENTITY, Pairs, add_info, as_text, found_headers, shared, stream_headers
from ..caching.lookup import Opened
from ..caching.plan import Asked, Plan
from ..errors import NOT_CACHED, CacheMissError, LLMMiddlewareError
from .reading import Chain, about_body, content_length, head_of, read_exactly

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["Body", "Exchange", "status_line"]

logger = logging.getLogger("llm_middleware")

_port = SyncPort()

_CREDENTIALS = tuple((f"HTTP_{name.decode().upper().replace('-', '_')}", name) for name in sorted(IDENTITY))


class Body:
    """A response body: an iterable, and what to do when the server closes it."""

    def __init__(self, chunks: Iterable[bytes], close: Callable[[], object] | None = None) -> None:
        self._iterator = iter(chunks)
        self._close = close

    def __iter__(self) -> Iterator[bytes]:
        return self._iterator

    def close(self) -> None:
        close, self._close = self._close, None
        if close is not None:
            close()


def _credentials(environ: WSGIEnvironment) -> list[tuple[bytes, bytes]]:
    return [(name, environ[key].encode("latin-1", "replace")) for key, name in _CREDENTIALS if key in environ]


def status_line(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return f"{status} Unknown"


class Exchange:
    """The state of one request; nothing of it lives on the middleware."""

    def __init__(
        self,
        front: Front,
        app: WSGIApplication,
        kind: str,
        path: str,
        environ: WSGIEnvironment,
        start_response: StartResponse,
    ) -> None:
        self.front = front
        self.cache = front.cache
        self.flow = self.cache._flow
        self.app = app
        self.kind = kind
        self.query = environ.get("QUERY_STRING", "")
        self.route = front.own[path] + (f"?{self.query}" if self.query else "")
        self.environ = environ
        self.start_response = start_response
        self.body = b""
        self.caller: Caller | None = None
        self.told: Told | None = None
        self.named = ""  # the model of a form, where it stands in the path

    def header(self, name: str) -> str:
        name = name.upper().replace("-", "_")
        if name not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
            name = "HTTP_" + name
        return str(self.environ.get(name, ""))

    def run(self) -> Iterable[bytes]:
        if self.told is None and self.front.gate is not None:
            refused = self.admit(self.front.gate)
            if refused is not None:
                return refused
        told = self.told
        if self.kind == "transcription" and told is not None and is_form(*about_body(self.environ)):
            from .uploads import answer_upload  # on first use: it brings the email parser

            return answer_upload(self, told)
        reason = self._read()
        if reason is not None:
            return self._pass_on(reason)
        environ = self.environ
        try:
            scope = self._caller() if self.caller is None else self.caller.scope
            if scope is None:
                plan = self.cache.plan(self.kind, self.body)
                self.give(self.body if plan.forward is None else plan.forward)
                return self._pass_on("identify-failed")
            control, planner = environ.get("HTTP_CACHE_CONTROL", ""), self.cache.planner
            encoding = environ.get("HTTP_CONTENT_ENCODING", "").strip().lower()
            enforced = None if self.caller is None else self.caller.enforced
            if planner.key is None and not (encoding or enforced) and self.kind != "transcription":
                plan = planner.quick(self.kind, self.route, self.body, scope, control)
            else:
                form = environ.get("CONTENT_TYPE", "")
                asked = Asked(self.kind, self.body, scope, self.route, control, form, encoding, enforced)
                plan = run_sync(planner.planned(_port, asked))
            if self.told is not None:
                self.told.about(plan, self.query)
        except LLMMiddlewareError as exc:
            return self.refuse(exc)
        return self.answer(plan)

    def admit(self, gate: Gate) -> Iterable[bytes] | None:
        """Ask who calls; the answer where that one may not."""
        try:
            self._admit(gate)
        except LLMMiddlewareError as exc:
            return self.refuse(exc)
        return None

    def _admit(self, gate: Gate) -> None:
        caller = gate.at_once(_credentials(self.environ)) or run_sync(
            gate.enter(_port, head_of(self.environ))
        )
        self.caller = caller
        self.route = caller.names + self.route  # in front: behind it a query could say the same
        self.told = self.environ["llm_middleware"] = Told(caller)

    # --- the request body

    def _read(self) -> str | None:
        """Read the body; the reason code where the app must read it itself."""
        environ, limit = self.environ, self.front.max_body_bytes
        size, stream = content_length(environ), environ["wsgi.input"]
        if size is None:
            return "unparsable-body"
        if size > limit:
            return "body-too-large"
        if size:
            self.body = read_exactly(stream, size)
            if len(self.body) < size:
                environ["wsgi.input"] = io.BytesIO(self.body)
                return "client-disconnected"
        elif environ.get("wsgi.input_terminated"):
            # Chunked: the length is not known before the end.
            self.body = read_exactly(stream, limit + 1)
            if len(self.body) > limit:
                environ["wsgi.input"] = Chain(self.body, stream)
                return "body-too-large"
        return None

    def give(self, body: bytes) -> None:
        """The body that the app reads."""
        self.environ["wsgi.input"] = io.BytesIO(body)
        self.environ["CONTENT_LENGTH"] = str(len(body))

    def _caller(self) -> str | None:
        """The scope of the answer; None where the host's ``identify`` failed: then nothing is shared."""
        if self.cache.settings.share == "all":
            return ""
        environ, identify = self.environ, self.front.identify
        if identify is None:
            return credentials_scope(_credentials(environ))
        try:
            return identified_scope(identify(environ))
        except Exception as exc:
            logger.warning("identify failed: %s: %s", type(exc).__name__, exc)
            return None

    # --- without the cache

    def _pass_on(self, reason: str, plan: Plan | None = None) -> Iterable[bytes]:
        """Call the app; only the headers tell that the cache was there."""
        info = CacheInfo("bypass", None, reason, "bypass")
        self.flow.tell(plan or Plan(self.kind), info)
        extra = add_info((), info, self.front.profile)

        def start(status: str, headers: list[tuple[str, str]], exc_info: object = None) -> object:
            own = {name.lower() for name, _ in headers}
            added = [pair for pair in as_text(extra) if pair[0] != "cache-control" or pair[0] not in own]
            if exc_info is None:
                return self.start_response(status, headers + added)
            return self.start_response(status, headers + added, exc_info)  # type: ignore[arg-type]

        return self.app(self.environ, start)  # type: ignore[arg-type]

    def refuse(self, error: LLMMiddlewareError) -> Iterable[bytes]:
        headers, body = refusal(error, self.front.profile)
        self.start_response(status_line(error.status), as_text(headers))
        return [body]

    # --- with it

    def answer(self, plan: Plan) -> Iterable[bytes]:
        if plan.bypass is None:
            found = self.flow.now(plan, self.header)
            if found is not None and found.stale is None:
                return self.found(plan, found)
        self.give(self.body if plan.forward is None else plan.forward)
        if plan.bypass is not None:
            if plan.controls.only_if_cached:
                return self.refuse(CacheMissError(NOT_CACHED))
            return self._pass_on(plan.bypass, plan)
        try:
            return self._slow(plan)
        except CacheMissError as exc:
            return self.refuse(exc)

    def _slow(self, plan: Plan) -> Iterable[bytes]:
        from .leader import Leader

        while True:
            opened = run_sync(self.flow.open(_port, plan, self.header))
            if opened.found is not None:
                refresh = None
                if opened.found.stale == "stale-while-revalidate" and plan.store:
                    refresh = self._refresh(plan)
                return self.found(plan, opened.found, refresh)
            assert opened.flight is not None
            if opened.leads:
                return Leader(self, plan, opened.flight, opened).run()
            answer = self._follow(plan, opened.flight)
            if answer is not None:
                return answer

    def start(self, status: str, headers: Pairs) -> None:
        self.start_response(status, as_text(headers))

    def found(self, plan: Plan, found: Found, close: Callable[[], object] | None = None) -> Iterable[bytes]:
        self.flow.tell_found(plan, found)
        if self.front.hooks and self.told is not None:
            self.front.hooks.hit(plan, found, self.told)
        headers = found_headers(found, plan.key, self.front.profile)
        if found.chunks is not None:
            self.start(status_line(found.status), stream_headers(headers))
            return Body(iter(found.chunks), close)
        headers.append((b"content-length", b"%d" % len(found.body)))
        self.start(status_line(found.status), headers)
        return [found.body] if close is None else Body([found.body], close)

    def _follow(self, plan: Plan, flight: Flight) -> Iterable[bytes] | None:
        """The answer that another request is getting; None where that one was abandoned."""
        from .leader import Leader

        reader: FlightReader | None = None
        try:
            head = run_sync(flight.begun(_port))
            if head is None:
                return None
            if flight.vary is None or any(self.header(name) != value for name, value in flight.vary):
                # What the leader got was made for its own headers: this request calls for itself.
                return Leader(self, plan, self.flow.flights.solo(plan.key), Opened()).run()
            info = CacheInfo("collapsed", plan.digest, forward="miss")
            self.flow.tell(plan, info)
            headers = add_info(shared(head.headers), info, self.front.profile)
            headers = [pair for pair in headers if pair[0] != b"content-length"]
            if head.streamed:
                reader = FlightReader(flight, _port)
                self.start(status_line(head.status), stream_headers(headers))
                chunks = iter_sync(reader)
                leave, tell = reader_close(chunks, reader), partial(self._tell_shared, plan, flight)
                return Body(*until_closed(chunks, leave, tell))
            body = run_sync(flight.body(_port))
            self._tell_shared(plan, flight, True)
            headers.append((b"content-length", b"%d" % len(body)))
            self.start(status_line(head.status), headers)
            return [body]
        except Exception:
            self._tell_shared(plan, flight, False)
            raise
        finally:
            if reader is None:
                flight.leave()

    def _tell_shared(self, plan: Plan, flight: Flight, whole: bool) -> None:
        if self.front.hooks and self.told is not None:
            self.front.hooks.shared(plan, self.told, flight, whole=whole)

    def _refresh(self, plan: Plan) -> Callable[[], None] | None:
        """What refreshes a stale entry once its answer has been sent; one refresh at a time for each key."""
        from .leader import Leader

        flights = self.flow.flights
        guard, leads = flights.join(f"{plan.key}/revalidate")
        if not leads:
            guard.leave()
            return None

        keeping = ExitStack()
        if self.told is not None and self.told.upload is not None:
            keeping.enter_context(self.told.upload)  # this exchange ends before

        def refresh() -> None:
            self.start_response = _ignore
            fresh = replace(plan, lookup=False)
            try:
                body = Leader(self, fresh, flights.solo(plan.key), Opened()).run()
                try:
                    for _ in body:
                        pass
                finally:
                    close = getattr(body, "close", None)
                    if close is not None:
                        close()
            except Exception as exc:
                self.flow.reporter.background_failed(plan, exc)
            finally:
                keeping.close()
                guard.end(DONE)
                flights.land(guard)

        return refresh


def reader_close(chunks: Iterator[bytes], reader: FlightReader) -> Callable[[], None]:
    """Leave the flight, whether the stream was begun or not."""

    def close() -> None:
        chunks.close()  # type: ignore[attr-defined]
        run_sync(reader.aclose())

    return close


def _ignore(
    status: str, headers: list[tuple[str, str]], exc_info: object = None
) -> Callable[[bytes], object]:
    return lambda data: None
