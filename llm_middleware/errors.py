"""Every error the library raises, in one tree.

    LLMMiddlewareError                500
      ConfigError                     500   a setting is unknown or has a wrong value
      InvalidRequestError             400   the caller's request is wrong; ``param`` names the field
      CacheMissError                  504   ``only-if-cached`` was asked and nothing is stored
      FlightAbandonedError            503   the shared call ended half-way and cannot be taken over
      UpstreamAnswerError             502   the provider's answer is not one to what it was asked
      StoreError                      503   a store failed; never reaches a user's request
        CorruptEntryError             503   stored bytes that are not an entry of ours
      SuspendedInSyncError            500   an async callable was handed to a sync method

Each class carries the HTTP ``status`` it is answered with and renders to the body that
OpenAI's SDKs expect: ``{"error": {"message", "type", "param", "code"}}``
(https://platform.openai.com/docs/guides/error-codes).
"""

from __future__ import annotations

import json

__all__ = [
    "NOT_CACHED",
    "CacheMissError",
    "ConfigError",
    "CorruptEntryError",
    "FlightAbandonedError",
    "InvalidRequestError",
    "LLMMiddlewareError",
    "StoreError",
    "SuspendedInSyncError",
    "UpstreamAnswerError",
]


class LLMMiddlewareError(Exception):
    """Base class. ``param`` names the field at fault, ``code`` is stable and machine-readable."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def body(self) -> bytes:
        """The error as OpenAI's JSON error body."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", "surrogatepass")


class ConfigError(LLMMiddlewareError, ValueError):
    """A setting is unknown, misspelt or has a value it cannot have."""

    code = "invalid_configuration"


class InvalidRequestError(LLMMiddlewareError, ValueError):
    """The caller's request is wrong. Nothing was read, stored or sent upstream."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


NOT_CACHED = "only-if-cached: no stored answer fits this request"


class CacheMissError(LLMMiddlewareError):
    """``Cache-Control: only-if-cached`` and no stored answer fits (RFC 9111, section 5.2.1.7)."""

    status = 504
    code = "only_if_cached"


class FlightAbandonedError(LLMMiddlewareError):
    """The call that others were reading along with was cancelled after it had begun to answer."""

    status = 503
    code = "upstream_cancelled"


class UpstreamAnswerError(LLMMiddlewareError):
    """The provider answered, but not to what it was asked."""

    status = 502
    code = "unexpected_upstream_answer"


class StoreError(LLMMiddlewareError):
    """A store could not do what it was asked. Counted and logged; the user's call goes on."""

    status = 503
    code = "store_unavailable"


class CorruptEntryError(StoreError):
    """Stored bytes that do not decode to an entry: another version, damage, or not ours at all."""

    code = "corrupt_entry"


class SuspendedInSyncError(LLMMiddlewareError, RuntimeError):
    """A sync method met something that must be awaited; use the async twin (``afetch``, ``aget`` ...)."""

    code = "suspended_in_sync"
