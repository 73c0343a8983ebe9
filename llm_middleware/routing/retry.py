"""What comes after a failed attempt: another one at once, one after a wait, or none.

The rules:

* The caller's own mistakes are not repeated; other deployments would say the same.
* Wrong credentials and a model that is not there are tried elsewhere, never again at the same deployment.
* While another deployment is free the next attempt goes there at once.
* Otherwise it waits: for as long as the provider said; without its word, after a 429, for a random time below
  a bound that doubles with every retry (full jitter); after other errors not at all. Never less than
  ``retry_after``.
* No attempt begins at or after the deadline. Who gives up for that tells the caller the provider's word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Final, Literal

from ..errors import (
    AuthenticationError,
    BadRequestError,
    ConfigError,
    ContentPolicyError,
    DeadlineError,
    NotFoundError,
    PermissionDeniedError,
    ProviderError,
    RateLimitError,
    UpstreamConnectionError,
    UpstreamServerError,
    did_you_mean,
)
from .fields import check_number

__all__ = ["Decision", "Retries", "policy_names", "read_policy", "repeatable"]

_LONGEST: Final = 60.0  # seconds that a call waits which has no deadline
_TOLERANCE: Final = 0.1  # of a wait that is added at most, so that not all who wait come at once
_MOST_ADDED: Final = 0.25  # seconds

# LiteLLM's names of error classes, and ours; the first that fits.
_NAMES: Final[tuple[tuple[type[ProviderError], str], ...]] = (
    (ContentPolicyError, "ContentPolicyViolationError"),
    (BadRequestError, "BadRequestError"),
    (AuthenticationError, "AuthenticationError"),
    (PermissionDeniedError, "AuthenticationError"),
    (NotFoundError, "NotFoundError"),
    (RateLimitError, "RateLimitError"),
    (DeadlineError, "TimeoutError"),
    (UpstreamServerError, "InternalServerError"),
    (UpstreamConnectionError, "InternalServerError"),
)
_BY_STATUS: Final = {408: "TimeoutError", 502: "BadGatewayError", 503: "ServiceUnavailableError"}
_KNOWN: Final = sorted({name for _, name in _NAMES} | set(_BY_STATUS.values()))


def policy_names(error: ProviderError) -> list[str]:
    """What a policy per error class may call ``error``, the closest name first."""
    narrow = _BY_STATUS.get(error.status)
    broad = [name for kind, name in _NAMES if isinstance(error, kind)][:1]
    return ([narrow] if narrow is not None and narrow not in broad else []) + broad


def read_policy(policy: Mapping[str, int | None] | None, suffix: str, param: str) -> dict[str, int]:
    """``policy`` without the ``suffix`` that its names have; entries that are None are left out.

    `ConfigError` for a name that is unknown, and for what is no whole number from zero on.
    """
    numbers: dict[str, int] = {}
    names = [name + suffix for name in _KNOWN]
    if policy is not None and not isinstance(policy, Mapping):
        raise ConfigError(f"{param}: expected a mapping of names to numbers, got {policy!r}", param=param)
    for name, number in (policy or {}).items():
        if name not in names:
            hint = did_you_mean(name, names)
            raise ConfigError(f"{param}: unknown name {name!r}{hint}", param=param)
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ConfigError(f"{param}: {name}: expected a number >= 0, got {number!r}", param=param)
        numbers[name.removesuffix(suffix)] = number
    return numbers


@dataclass(frozen=True, slots=True)
class Decision:
    """``retry``: make another attempt at once; ``wait``: after ``seconds``; ``give up``: make none.
    ``retry_after``: seconds after which the provider wants to be asked again, as far as it said."""

    action: Literal["retry", "wait", "give up"]
    seconds: float = 0.0
    retry_after: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """``num_retries``: attempts after the first. ``retry_after``: seconds that a wait lasts at least.
    ``retry_policy``: attempts after the first by error class (``{"TimeoutErrorRetries": 3}``).
    ``backoff``, ``longest_backoff``: seconds that bound the first random wait, and all.

    `ConfigError` for what is no number from zero on, and for unknown names.
    """

    num_retries: int = 2
    retry_after: float = 0.0
    retry_policy: Mapping[str, int | None] | None = None
    backoff: float = 0.5
    longest_backoff: float = 8.0
    _by_name: Mapping[str, int] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_retries", "retry_after", "backoff", "longest_backoff"):
            check_number(name, getattr(self, name), whole=name == "num_retries")
        numbers = read_policy(self.retry_policy, "Retries", "retry_policy")
        object.__setattr__(self, "_by_name", numbers)

    def allowed(self, error: ProviderError) -> int:
        """How many retries a call may make whose last attempt ended with ``error``."""
        for name in policy_names(error):
            if name in self._by_name:
                return self._by_name[name]
        # Only a policy that names them repeats the caller's own mistakes.
        return 0 if isinstance(error, BadRequestError) else self.num_retries

    def after(
        self,
        error: ProviderError,
        *,
        made: int,
        another: bool,
        now: float,
        random: Random,
        deadline: float | None = None,
    ) -> Decision:
        """What to do after ``error``. ``made``: retries so far. ``another``: whether a deployment is free
        that this call has not tried. ``deadline``: on the scale of ``now``; None: there is none."""
        give_up = Decision("give up", retry_after=error.retry_after)
        if made >= self.allowed(error) or not (another or repeatable(error)):
            return give_up
        seconds = 0.0 if another else self._wait(error, made, random)
        longest = max(_LONGEST, self.retry_after) * (1 + _TOLERANCE)
        if (deadline is None and seconds > longest) or (deadline is not None and now + seconds >= deadline):
            return give_up
        return Decision("wait" if seconds > 0 else "retry", seconds, error.retry_after)

    def _wait(self, error: ProviderError, made: int, random: Random) -> float:
        least = self.retry_after
        if error.retry_after is not None:
            least = max(least, error.retry_after)
        elif isinstance(error, RateLimitError):
            bound = min(self.longest_backoff, self.backoff * 2.0 ** min(made, 60))
            return max(least, random.uniform(0.0, bound))
        return least + random.uniform(0.0, min(_MOST_ADDED, least * _TOLERANCE))


def repeatable(error: ProviderError) -> bool:
    """Whether the same deployment may answer the second time."""
    return not isinstance(error, AuthenticationError | PermissionDeniedError | NotFoundError)
