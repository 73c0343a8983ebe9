"""The errors of every HTTP client in the two words that callers know, with no address and no key in them."""

from __future__ import annotations

import time

from ..errors import DeadlineError, InvalidRequestError, UpstreamConnectionError
from ..providers.messages import Timeouts

__all__ = [
    "broken_off",
    "deadline_passed",
    "earlier",
    "monotonic_end",
    "no_answer",
    "no_connection",
    "unreachable",
]


def unreachable(exc: BaseException) -> UpstreamConnectionError:
    """No connection came to be. Raise it ``from None``: clients name the host in their errors."""
    return UpstreamConnectionError(f"the provider could not be reached ({_kind(exc)})")


def broken_off(exc: BaseException) -> UpstreamConnectionError:
    """There was a connection, and it ended or spoke no HTTP before the answer was whole."""
    return UpstreamConnectionError(f"the connection to the provider broke off ({_kind(exc)})")


def unsendable() -> InvalidRequestError:
    """The method, the URL or a header has what HTTP does not allow there, a line break for one."""
    return InvalidRequestError("the request cannot be sent: its URL or a header is not one")


def no_connection(timeouts: Timeouts) -> DeadlineError:
    return DeadlineError(f"no connection to the provider within {timeouts.connect} s")


def no_answer(timeouts: Timeouts) -> DeadlineError:
    return DeadlineError(f"nothing came from the provider for {timeouts.read} s")


def deadline_passed(timeouts: Timeouts) -> DeadlineError:
    return DeadlineError(f"the provider's answer was not whole within {timeouts.total} s")


def monotonic_end(timeouts: Timeouts) -> float | None:
    """When ``total`` will have passed, by `time.monotonic`."""
    return None if timeouts.total is None else time.monotonic() + timeouts.total


def earlier(seconds: float | None, until: float | None) -> float | None:
    """``seconds`` from now, but no more than there are left before ``until``. Zero or less: it has passed."""
    if until is None:
        return seconds
    left = until - time.monotonic()
    return left if seconds is None or left < seconds else seconds


def _kind(exc: BaseException) -> str:
    """The name of the class at the root: the reason, and never more than that."""
    seen = {id(exc)}
    while True:
        deeper = exc.__cause__ or exc.__context__
        if deeper is None or id(deeper) in seen:
            return type(exc).__name__
        seen.add(id(deeper))
        exc = deeper
