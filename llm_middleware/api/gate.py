"""`Gate`: who calls, from the request's credentials, and what the cache has to know of them."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from .._ports.protocol import Port
from ..caching.controls import parse_body
from ..caching.headers import IDENTITY
from ..caching.plan import Plan
from ..errors import ConfigError, InternalError, InvalidKeyError, KeyPermissionError, LLMMiddlewareError
from ..events import Event
from ..keys.lookup import MASTER
from ..keys.record import KeyRecord, hashed
from ..keys.resolver import KeyResolver
from .front import credentials_scope
from .message import Head, Pairs, key_in

if TYPE_CHECKING:
    from .uploads import Upload

__all__ = ["Caller", "Gate", "Told"]

logger = logging.getLogger("llm_middleware")

_CONTROLS = {"max_age": "s-maxage"}
_MOST = 10_000  # callers remembered


@dataclass(slots=True, kw_only=True)
class Caller:
    """``scope``: whose answers these are. ``names``: what tells requests of keys apart that call models by
    names of their own. ``record``: the key's; None where keys are not asked for. ``enforced``: cache controls
    that the request cannot undo. ``admin``: may use the admin routes. ``free``: may ask for anything, so that
    a request need not be looked at."""

    scope: str = ""
    names: str = ""
    record: KeyRecord | None = None
    enforced: Mapping[str, object] | None = field(default=None, repr=False)
    admin: bool = False
    free: bool = True

    def may_use(self, model: str) -> bool:
        return self.record is None or self.record.may_use(model)

    def check_model(self, name: str) -> None:
        """`KeyPermissionError` where the key may not use what it calls ``name``."""
        if not self.may_use(self.model(name)):
            raise KeyPermissionError(f"this key may not use the model {name!r}", param="model")

    def model(self, name: str) -> str:
        """What the caller's key calls ``name``."""
        return name if self.record is None else self.record.aliases.get(name, name)


class Told:
    """What a sub-app's endpoint is told by the cache in front of it, and tells it. ``cache_key``: the
    answer's, None where it has none. ``no_store``: the answer is not to be kept. ``upload``: the request's
    body, where that is a form with a file. ``fallback``: an old answer stands in for one that fails;
    ``failed``: what failed then. ``answered``: the client has its answer. ``own``: the answer is this
    caller's affair alone, and nobody's who shares the call."""

    # It lies in the ASGI scope or the WSGI environ, and so must not lead there: a cycle would keep every
    # request until the garbage collector comes.
    __slots__ = ("answered", "cache_key", "caller", "failed", "fallback", "no_store", "own", "upload")

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.cache_key: str | None = None
        self.no_store = False
        self.own = False
        self.upload: Upload | None = None
        self.fallback = False
        self.failed: Event | None = None
        self.answered = False

    def about(self, plan: Plan, query: str) -> None:
        """Take notice of what is asked. `KeyPermissionError` where the caller may not ask for it."""
        self.cache_key = plan.digest or None
        if self.caller.record is not None and not self.caller.free:
            _check(self.caller, self.caller.record, plan, query)

    @property
    def key_id(self) -> str | None:
        """Of the API key that asks."""
        return None if self.caller.record is None else self.caller.record.id


class Gate:
    """``keys``: from keys to callers. ``authorize``: the host's own, in their place: from a `Head` to a
    `KeyRecord`; None or an exception refuses. With neither everybody may call, and nobody administer.
    ``share``: who shares answers: ``all``, or everybody of one ``team``, ``user`` or ``key``. ``limits``:
    what counts callers' requests; None where nobody has limits."""

    def __init__(
        self,
        keys: KeyResolver | None,
        authorize: Callable[[Head], object] | None = None,
        share: str = "team",
    ) -> None:
        if authorize is not None and not callable(authorize):
            raise ConfigError(f"authorize: expected a function, got {authorize!r}", param="authorize")
        self.keys = keys
        self.limits = KeyResolver() if keys is None and authorize is not None else keys
        self._authorize = authorize
        self._share = share
        self._callers: dict[str, tuple[KeyRecord, Caller]] = {}
        # From what stood in ``Authorization`` to the key's id, and what was made of its record: that one is
        # asked for anew each time, but reading and hashing the header is not.
        self._seen: dict[bytes, tuple[str, KeyRecord, Caller]] = {}

    @property
    def guarded(self) -> bool:
        """Whether anybody is asked who they are."""
        return self.keys is not None or self._authorize is not None

    def at_once(self, headers: Pairs) -> Caller | None:
        """The caller, from the request's headers, of which those in `IDENTITY` count, where nothing has to be
        asked or waited for: every hit comes through here."""
        if self._authorize is not None:
            return None
        keys = self.keys
        if keys is None:
            return self._anybody(headers)
        for name, value in headers:
            if name == b"authorization":
                seen = self._seen.get(value)
                if seen is None:
                    break
                if keys._believed(seen[0]) is seen[1]:
                    return seen[2]
                self._seen.pop(value, None)
                break
        return self._known(keys, headers)

    def _known(self, keys: KeyResolver, headers: Pairs) -> Caller | None:
        key = key_in(headers)
        record = keys.known(key)
        if record is None or record.rpm_limit is not None:
            return None
        caller = self._caller(record)
        for name, value in headers:
            if name == b"authorization":
                # Not where the key is another header's, and not the master key, which has no row.
                if key_in([(name, value)]) == key and record.id != MASTER:
                    self._remember(value, hashed(key), record, caller)
                break
        return caller

    def _remember(self, value: bytes, key_id: str, record: KeyRecord, caller: Caller) -> None:
        if len(self._seen) >= _MOST:
            self._seen.clear()
        self._seen[value] = key_id, record, caller

    async def enter(self, port: Port, head: Head) -> Caller:
        """The caller, counted. `LLMMiddlewareError` refuses it."""
        try:
            return await self._enter(port, head)
        except LLMMiddlewareError:
            raise
        except Exception as exc:
            logger.exception("nobody could say who calls")
            raise InternalError() from exc

    async def _enter(self, port: Port, head: Head) -> Caller:
        if self._authorize is not None:
            record = await self._authorized(port, head)
            assert self.limits is not None
            await self.limits._admit(port, record)
            return self._caller(record)
        if self.keys is None:
            return self._anybody(head.headers)
        key = head.bearer
        if not key:
            raise InvalidKeyError("no API key: send it as Authorization: Bearer sk-...")
        record = self.keys.known(key) or await self.keys._resolve(port, key)
        await self.keys._admit(port, record)
        return self._caller(record)

    async def _authorized(self, port: Port, head: Head) -> KeyRecord:
        assert self._authorize is not None
        try:
            record = await port.call(self._authorize, head)
        except LLMMiddlewareError:
            raise
        except Exception as exc:
            raise _refusal(exc) from exc
        if not isinstance(record, KeyRecord):
            raise InvalidKeyError("the request is not authorized")
        record.check_usable(time.time())
        return record

    def _anybody(self, headers: Pairs) -> Caller:
        if self._share == "all":
            return _ANYBODY
        return Caller(scope=credentials_scope([pair for pair in headers if pair[0] in IDENTITY]))

    def _caller(self, record: KeyRecord) -> Caller:
        known = self._callers.get(record.id)
        if known is not None and known[0] is record:
            return known[1]
        if len(self._callers) >= _MOST:
            self._callers.clear()
        caller = Caller(
            scope=record.scope(self._share),
            names=_names(record),
            record=record,
            enforced=parse_body(record.cache) if record.cache else None,
            admin=record.admin,
            free=not record.models and record.allowed_cache_controls is None,
        )
        self._callers[record.id] = record, caller
        return caller


_ANYBODY = Caller()


def _names(record: KeyRecord) -> str:
    if not record.aliases:
        return ""
    names = repr(sorted(record.aliases.items())).encode("utf-8", "surrogatepass")
    return f"#{hashlib.sha256(names).hexdigest()[:16]}"


def _check(caller: Caller, record: KeyRecord, plan: Plan, query: str) -> None:
    if plan.model is not None:
        caller.check_model(plan.model)
    if "model=" in query:
        for model in parse_qs(query).get("model", ()):
            caller.check_model(model)
    allowed = record.allowed_cache_controls
    if allowed is not None:
        for name in plan.asked:
            control = _CONTROLS.get(name) or name.replace("_", "-")
            if control not in allowed and not (control == "s-maxage" and "s-max-age" in allowed):
                raise KeyPermissionError(f"this key may not set cache.{control}", param=f"cache.{control}")


def _refusal(exc: Exception) -> LLMMiddlewareError:
    """What the caller is told of what the host's function raised: frameworks' errors have a status."""
    status = getattr(exc, "status_code", None) or getattr(exc, "code", None)
    detail = getattr(exc, "detail", None) or getattr(exc, "description", None)
    if status == 403:
        return KeyPermissionError(str(detail or "forbidden"))
    if status == 401:
        return InvalidKeyError(str(detail or "the request is not authorized"))
    if isinstance(status, int) and isinstance(detail, str) and 300 <= status < 600:
        return _refused_with(status, detail)
    logger.error("authorize failed", exc_info=exc)
    return InternalError()


def _refused_with(status: int, detail: str) -> LLMMiddlewareError:
    """An answer that says no more than that the caller is not known is 401; one to come back for stays."""
    if status != 429 and status < 500:
        return InvalidKeyError(detail)
    error = LLMMiddlewareError(detail, code="rate_limit_exceeded" if status == 429 else "not_authorized")
    error.status = status
    if status == 429:
        error.type = "rate_limit_error"
    return error
