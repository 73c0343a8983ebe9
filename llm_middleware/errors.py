"""Every error the library raises, in one tree.

    LLMMiddlewareError                500
      ConfigError                     500   a setting is unknown or has a wrong value
      InvalidRequestError             400   the caller's request is wrong; ``param`` names the field
      CacheMissError                  504   ``only-if-cached`` was asked and nothing is stored
      FlightAbandonedError            503   the shared call ended half-way and cannot be taken over
      UpstreamAnswerError             502   the provider's answer is not one to what it was asked
      StoreError                      503   a store failed; never reaches a user's request
        CorruptEntryError             503   stored bytes that are not an entry of ours
        KeyStoreUnavailable           503   API keys cannot be looked up: nothing is known of the caller
      APIKeyError                     401   the caller's API key does not allow the request:
        InvalidKeyError               401   nobody's, or missing
        ExpiredKeyError               401   its time is over
        BlockedKeyError               403   blocked by an administrator
        KeyPermissionError            403   it may not do this
        KeyNotFoundError              404   an administrator named a key that there is not
        KeyLimitError                 429   its limit of requests, tokens or calls at a time is reached
          BudgetExceededError         429   its budget is used up
      SuspendedInSyncError            500   an async callable was handed to a sync method
      ProviderError                   502   a provider could not answer, in the words of its class:
        BadRequestError               400   the request is wrong, and would be everywhere
          ContextWindowExceededError  400   the prompt is longer than the model reads
          ContentPolicyError          400   the provider's policy refuses the content
          UnprocessableError          422   well-formed, and still not to be processed
        AuthenticationError           401   the credentials are wrong
        PermissionDeniedError         403   the credentials do not allow it
        NotFoundError                 404   the provider does not have it
          ModelNotFoundError          404   no deployment serves a model of this name
        RateLimitError                429   too many requests, or too many tokens
          NoCapacityError             429   every deployment is at its limit or cooling down
        DeadlineError                 504   no answer before the deadline
        UpstreamServerError           500   the provider failed; its own status from 500 to 599
        UpstreamConnectionError       502   the provider could not be reached, or broke off

Each class carries the HTTP ``status`` it is answered with and renders to the body that
OpenAI's SDKs expect: ``{"error": {"message", "type", "param", "code"}}``
(https://platform.openai.com/docs/guides/error-codes).
"""

from __future__ import annotations

import json
from collections.abc import Iterable

__all__ = [
    "NOT_CACHED",
    "APIKeyError",
    "AuthenticationError",
    "BadRequestError",
    "BlockedKeyError",
    "BudgetExceededError",
    "CacheMissError",
    "ConfigError",
    "ContentPolicyError",
    "ContextWindowExceededError",
    "CorruptEntryError",
    "DeadlineError",
    "ExpiredKeyError",
    "FlightAbandonedError",
    "InvalidKeyError",
    "InvalidRequestError",
    "KeyLimitError",
    "KeyNotFoundError",
    "KeyPermissionError",
    "KeyStoreUnavailable",
    "LLMMiddlewareError",
    "ModelNotFoundError",
    "NoCapacityError",
    "NotFoundError",
    "PermissionDeniedError",
    "ProviderError",
    "RateLimitError",
    "StoreError",
    "SuspendedInSyncError",
    "UnprocessableError",
    "UpstreamAnswerError",
    "UpstreamConnectionError",
    "UpstreamServerError",
    "did_you_mean",
    "nearest",
]


def nearest(name: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Of the ``known`` names the one most like ``name``, if one is; ``cutoff`` as in `difflib`."""
    import difflib  # only where something is wrong

    return next(iter(difflib.get_close_matches(str(name), known, 1, cutoff)), None)


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """What an error that names ``name`` ends with; nothing where no known name is like it."""
    near = nearest(name, known)
    return "" if near is None else f"; did you mean {near!r}?"


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
        return json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", "backslashreplace")


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


class KeyStoreUnavailable(StoreError):  # noqa: N818 - it says what is so
    """API keys cannot be looked up at this moment, so nobody can say whether this one is right."""

    code = "key_store_unavailable"


class APIKeyError(LLMMiddlewareError):
    """The caller's API key does not allow the request. No message holds a key."""

    status = 401
    type = "authentication_error"


class InvalidKeyError(APIKeyError):
    """The API key is nobody's, or there is none."""

    type = "invalid_request_error"  # with this code, what OpenAI says
    code = "invalid_api_key"


class InternalError(LLMMiddlewareError):
    """Something failed that nobody foresaw; the log says what, and the client nothing of it."""

    code = "internal_error"

    def __init__(self) -> None:
        super().__init__("internal error")


class ExpiredKeyError(APIKeyError):
    """The time of the API key is over."""

    code = "expired_key"


class BlockedKeyError(APIKeyError):
    """An administrator has blocked the API key."""

    status = 403
    type = "permission_error"
    code = "blocked_key"


class KeyPermissionError(APIKeyError):
    """The API key does not allow this model, this control or this operation; ``param`` names the field."""

    status = 403
    type = "permission_error"
    code = "key_not_allowed"


class KeyNotFoundError(APIKeyError):
    """There is no such API key to be managed."""

    status = 404
    type = "invalid_request_error"
    code = "key_not_found"


class KeyLimitError(APIKeyError):
    """A limit of the API key is reached. ``retry_after``: seconds until there is room again; None where
    nobody knows, or there never will be for a request of this size."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: float | None = None, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after = retry_after


class BudgetExceededError(KeyLimitError):
    """The budget of the API key is used up, or may be by the calls in flight; ``retry_after``: until it is
    renewed."""

    type = "insufficient_quota"
    code = "insufficient_quota"


class SuspendedInSyncError(LLMMiddlewareError, RuntimeError):
    """A sync method met something that must be awaited; use the async twin (``afetch``, ``aget`` ...)."""

    code = "suspended_in_sync"


class ProviderError(LLMMiddlewareError):
    """What a provider said instead of an answer.

    ``status``: the provider's own where it gave one. ``code``, ``type`` and ``param`` likewise.
    ``retry_after``: seconds until it may be asked again, where that is known. ``route``: from a Router, what
    was tried (`RouteInfo`). ``message`` names no URL, key or deployment.
    """

    status = 502
    code = "provider_error"
    route: object = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int | None = None,
        type: str | None = None,  # noqa: A002 - the name in OpenAI's error body
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        if status is not None:
            self.status = status
        if type is not None:
            self.type = type
        self.retry_after = retry_after


class BadRequestError(ProviderError):
    """The request is wrong: no other deployment would answer it."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class ContextWindowExceededError(BadRequestError):
    """The prompt, or the prompt and the answer asked for, is longer than the model's window."""

    code = "context_length_exceeded"


class ContentPolicyError(BadRequestError):
    """The provider's policy refuses the prompt or the answer."""

    code = "content_policy_violation"


class UnprocessableError(BadRequestError):
    """The request is well-formed and still not to be processed."""

    status = 422
    code = "unprocessable_entity"


class AuthenticationError(ProviderError):
    """The provider does not know the credentials."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDeniedError(ProviderError):
    """The credentials do not allow this."""

    status = 403
    type = "permission_error"
    code = "permission_denied"


class NotFoundError(ProviderError):
    """The provider does not have what the request names."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFoundError(NotFoundError):
    """No deployment serves a model of this name."""

    code = "model_not_found"


class RateLimitError(ProviderError):
    """Too many requests or tokens; ``retry_after`` says for how long."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class NoCapacityError(RateLimitError):
    """Every deployment is at its limit or cooling down; ``retry_after``: until the first is free again."""

    code = "no_capacity"


class DeadlineError(ProviderError):
    """No answer before the deadline of the call."""

    status = 504
    type = "timeout_error"
    code = "timeout"


class UpstreamServerError(ProviderError):
    """The provider failed."""

    status = 500
    code = "upstream_error"


class UpstreamConnectionError(ProviderError):
    """The provider could not be reached, or the connection broke off."""

    status = 502
    code = "connection_error"
