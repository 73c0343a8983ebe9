"""`failure`: what a provider said instead of an answer, as one error of our tree.

What decides, in this order: the ``code`` and ``type`` that the provider gave, where they say more than the
status; the status; and only within a status of 400, 413 or 422 the text, by the sentences in which providers
say that a prompt is too long or refused. A text that quotes other words changes nothing.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from ..errors import (
    AuthenticationError,
    BadRequestError,
    ContentPolicyError,
    ContextWindowExceededError,
    DeadlineError,
    NotFoundError,
    PermissionDeniedError,
    ProviderError,
    RateLimitError,
    UnprocessableError,
    UpstreamServerError,
)
from .masking import masked

__all__ = ["failure", "retry_after"]

_LARGEST: Final = 1 << 18  # bytes of a body that are looked at
_PLAIN: Final = 300  # bytes of a plain text that are told
_BY_STATUS: Final[Mapping[int, type[ProviderError]]] = {
    401: AuthenticationError,
    402: PermissionDeniedError,
    403: PermissionDeniedError,
    404: NotFoundError,
    408: DeadlineError,
    409: ProviderError,
    422: UnprocessableError,
    424: UpstreamServerError,
    425: UpstreamServerError,
    429: RateLimitError,
    498: RateLimitError,  # Groq: no capacity in the flex tier
    504: DeadlineError,
}
# Codes, types and reasons, in lower case and without separators.
_BY_CODE: Final[Mapping[str, type[ProviderError]]] = {
    "contextlengthexceeded": ContextWindowExceededError,
    "contextwindowexceeded": ContextWindowExceededError,
    "exceedcontextsizeerror": ContextWindowExceededError,
    "modelcontextwindowexceeded": ContextWindowExceededError,
    "prompttoolong": ContextWindowExceededError,
    "tokenslimitreached": ContextWindowExceededError,
    "contentfilter": ContentPolicyError,
    "contentfiltered": ContentPolicyError,
    "contentpolicyviolation": ContentPolicyError,
    "datainspectionfailed": ContentPolicyError,
    "moderationblocked": ContentPolicyError,
    "responsibleaipolicyviolation": ContentPolicyError,
    "apikeyinvalid": AuthenticationError,
    "invalidapikey": AuthenticationError,
    "authenticationerror": AuthenticationError,
    "unrecognizedclientexception": AuthenticationError,
    "insufficientquota": RateLimitError,
    "ratelimiterror": RateLimitError,
    "ratelimitexceeded": RateLimitError,
    "resourceexhausted": RateLimitError,
    "throttlingexception": RateLimitError,
}
# What an error inside an answer of status 200 says, which is all that there is.
_STATUS_OF_TYPE: Final[Mapping[str, int]] = {
    "apierror": 500,
    "authenticationerror": 401,
    "billingerror": 402,
    "conflicterror": 409,
    "gatewaytimeouterror": 504,
    "invalidrequesterror": 400,
    "notfounderror": 404,
    "overloadederror": 529,
    "permissionerror": 403,
    "requesttoolarge": 413,
    "servererror": 500,
    "timeouterror": 504,
}
_TOO_LONG: Final = re.compile(
    r"prompt is too long(?::|\Z)"  # Anthropic
    r"|input is too long for (?:the )?requested model"  # Bedrock
    r"|input length and `?max_tokens`? exceed context limit"
    r"|(?:the )?input token count \W?\d+\W? exceeds the maximum number of tokens"  # Gemini
    r"|too many tokens: "  # Cohere
    r"|.{0,120}\bmaximum context length (?:is|of) \d"  # OpenAI and those who run vLLM
    r"|.{0,120}\bexceeds? (?:the )?(?:model's |available )?(?:maximum )?context (?:length|size|window)"
    r"|.{0,120}\bis longer than the model's context length"
    r"|.{0,120}\breduce the length of the messages",
    re.IGNORECASE | re.DOTALL,
)
_REFUSED: Final = re.compile(
    r"output blocked by content filtering policy"  # Anthropic
    r"|your request was rejected as a result of our safety system"  # OpenAI
    r"|the response was filtered due to the prompt triggering",  # Azure
    re.IGNORECASE,
)
_WORD: Final = re.compile(r"[A-Za-z_][\w.-]{0,63}\Z")
_FIELD: Final = re.compile(r"[\w.\[\]-]{1,128}\Z")
_SECONDS: Final = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)s\Z")


def failure(
    status: int, headers: Mapping[str, str], body: bytes, *, secrets: Iterable[str] = ()
) -> ProviderError:
    """The error that an answer is, or that an event of a stream with status 200 is.

    ``headers``: names in lower case. ``secrets``: texts to mask in the message besides what looks like one;
    `Target.secrets` has them. Takes any bytes, and never raises.
    """
    error = _error(body)
    words = [*_words(error)]
    status = _status(status, error, words)
    text = _message(error)
    kind = _kind(status, words, text)
    told = text if text is not None else _plain(headers, body)
    message = masked(told, secrets) or f"the provider answered with status {status}"
    found = kind(message, param=_safe(error.get("param"), _FIELD), retry_after=_wait(headers, error))
    if kind in (ContextWindowExceededError, ContentPolicyError):
        return found  # one code and one type for all who say it
    found.code = _safe(error.get("code"), _WORD) or found.code
    found.type = _safe(error.get("type"), _WORD) or found.type
    if _natural(status) is kind:
        found.status = status
    return found


def retry_after(headers: Mapping[str, str], clock: Callable[[], float] = time.time) -> float | None:
    """Seconds until the provider may be asked again: ``retry-after-ms``, else ``retry-after`` as seconds,
    fractions included, or as a date (RFC 9110, section 10.2.3). None where it does not say."""
    for name, per_second in (("retry-after-ms", 1000), ("retry-after", 1)):
        value = _number(headers.get(name, ""))
        if value is not None:
            return value / per_second
    return _until(headers.get("retry-after", ""), headers.get("date", ""), clock)


# --- what kind of error it is


def _kind(status: int, words: list[str], text: str | None) -> type[ProviderError]:
    if status < 500:
        for word in words:
            if word in _BY_CODE and not (status == 429 and _BY_CODE[word] is AuthenticationError):
                return _BY_CODE[word]
    if status in (400, 413, 422) and text is not None:
        if _TOO_LONG.match(text):
            return ContextWindowExceededError
        if _REFUSED.match(text):
            return ContentPolicyError
    return _natural(status)


def _natural(status: int) -> type[ProviderError]:
    """The class of a status alone."""
    return _BY_STATUS.get(status) or (BadRequestError if status < 500 else UpstreamServerError)


def _status(status: int, error: Mapping[str, Any], words: list[str]) -> int:
    """The answer's; of one that was no failure by its status, the error's own."""
    if 400 <= status <= 599:
        return status
    for name in ("code", "status", "status_code"):
        value = error.get(name)
        if isinstance(value, int) and 400 <= value <= 599:
            return value
    for word in words:
        if word in _STATUS_OF_TYPE:
            return _STATUS_OF_TYPE[word]
        if word in _BY_CODE:
            return _BY_CODE[word].status
    return 502


def _words(error: Mapping[str, Any]) -> Iterator[str]:
    """What the error says for machines, the closest to the matter first."""
    inner = error.get("innererror")
    inner = inner if isinstance(inner, Mapping) else {}
    reasons = [one.get("reason") for one in _details(error)]
    named = [error.get(name) for name in ("code", "type", "status", "__type", "error_type")]
    for word in [inner.get("code"), *reasons, *named]:
        if isinstance(word, str):
            yield re.sub(r"[\s_.-]", "", word.rpartition("#")[2][:100]).lower()


def _details(error: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Google's (https://google.aip.dev/193)."""
    details = error.get("details")
    return [one for one in details if isinstance(one, Mapping)] if isinstance(details, list) else []


# --- reading the body


def _error(body: bytes) -> Mapping[str, Any]:
    """The innermost mapping that tells of the error; empty where the body is no JSON that does."""
    try:
        read = json.loads(body) if len(body) <= _LARGEST else None
    except (ValueError, RecursionError):
        return {}
    if isinstance(read, list) and read:  # Gemini's streams
        read = read[0]
    if not isinstance(read, Mapping):
        return {}
    inner = read.get("error") or read.get("errors") or read.get("detail")
    if isinstance(inner, list) and inner and isinstance(inner[0], Mapping):
        inner = inner[0]
    if isinstance(inner, str):
        return {**read, "message": inner}
    return inner if isinstance(inner, Mapping) else read


def _message(error: Mapping[str, Any]) -> str | None:
    for name in ("message", "msg", "Message", "detail", "error"):
        value = error.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip()
    return None


def _plain(headers: Mapping[str, str], body: bytes) -> str:
    """The first of a body that is plain text; nothing of JSON or of a proxy's page."""
    start = body[:_PLAIN].lstrip()
    if "html" in headers.get("content-type", "").lower() or start[:1] in (b"<", b"{", b"["):
        return ""
    try:
        text = body[:_PLAIN].decode()
    except UnicodeDecodeError as exc:
        if len(body) <= _PLAIN or exc.start < _PLAIN - 3:
            return ""
        text = body[: exc.start].decode()  # only its last character is cut
    return text if len(body) <= _PLAIN else text.rpartition(" ")[0]


def _safe(value: object, form: re.Pattern[str]) -> str | None:
    """A word for machines that is nothing else."""
    if isinstance(value, str) and form.match(value) and masked(value) == value:
        return value
    return None


# --- when to come again


def _wait(headers: Mapping[str, str], error: Mapping[str, Any]) -> float | None:
    told = retry_after(headers)
    if told is not None:
        return told
    delays = [one.get("retryDelay") for one in _details(error)]
    found = [match for delay in delays if isinstance(delay, str) and (match := _SECONDS.match(delay))]
    return float(found[0][1]) if found else None  # google.rpc.RetryInfo


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _until(text: str, date: str, clock: Callable[[], float]) -> float | None:
    """Seconds from the answer's own date to the one in ``text``: clocks differ, and its two dates do not."""
    from email.utils import parsedate_to_datetime

    try:
        then = parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    try:
        now = parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        now = clock()
    return max(0.0, then - now)
