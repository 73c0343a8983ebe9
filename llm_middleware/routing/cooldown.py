"""When a deployment is left alone for a while, and how it comes back.

The rules, all of them:

* Only faults of the deployment count: see `blames`.
* ``allowed_fails`` given: the failure that exceeds it within a minute cools; the minute begins with its first
  failure. ``allowed_fails_policy`` gives some error classes a number, and a count, of their own.
* ``allowed_fails`` not given, as with LiteLLM: 429, 401, 403 and 404 cool at once; so does any failure where
  more than half of a minute's calls have failed, of at least five.
* The only deployment of its group is not benched by a 429 or a 404, nor by the share of its failures.
* A cooldown lasts ``cooldown_time`` seconds, or what the provider's ``Retry-After`` says. Another failure
  meanwhile may extend it and never shortens it. ``cooldown_time=0``: there are no cooldowns.
* After its end the deployment is *half-open*: one call is let through, the probe, the others go elsewhere. It
  succeeds: closed. It fails: cooling again. It ends without telling anything of the deployment, or is lost:
  the next call takes its place, the latter after ``probe_time`` seconds at most.

Nothing here waits, locks or reads a clock: `RouterState.lock` is held by whoever calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from ..errors import (
    AuthenticationError,
    BadRequestError,
    DeadlineError,
    NoCapacityError,
    NotFoundError,
    PermissionDeniedError,
    ProviderError,
    RateLimitError,
)
from .fields import check_number
from .retry import policy_names, read_policy

__all__ = ["CooldownPolicy", "Health", "blames"]

_MINUTE: Final = 60.0
_LONGEST: Final = 3600.0  # seconds that a provider's word is believed
_PROBE: Final = 30.0
# What providers say of a model that they do not have, and not of something that the request names.
_NO_MODEL: Final = frozenset({"model_not_found", "DeploymentNotFound", "ModelNotFound", "not_found_error"})


class Health:
    """Of one deployment. ``until``: the end of its cooldown, 0 while it has none; ``prober``: the call that
    probes it, 0 where none does, believed until ``probe_ends``."""

    __slots__ = ("calls", "calls_end", "failed", "fails", "fails_end", "probe_ends", "prober", "until")

    def __init__(self) -> None:
        self.until = 0.0
        self.prober = 0
        self.probe_ends = 0.0
        self.fails_end = self.calls_end = float("-inf")
        self.fails: dict[str, int] | None = None  # by the name that a policy has for them; "" for the rest
        self.calls = self.failed = 0

    def admits(self, now: float) -> Literal["yes", "probe", "no"]:
        """Whether a call may go there, and if so whether it is the probe."""
        if not self.until:
            return "yes"
        if now < self.until or (self.prober and now < self.probe_ends):
            return "no"
        return "probe"

    def wait(self, now: float) -> float:
        """Seconds until a call may go there, at most."""
        if self.admits(now) != "no":
            return 0.0
        return self.until - now if now < self.until else self.probe_ends - now

    def count(self, name: str, now: float) -> int:
        """One failure more; how many that makes in the minute that runs."""
        if now >= self.fails_end or self.fails is None:
            self.fails, self.fails_end = {}, now + _MINUTE
        self.fails[name] = self.fails.get(name, 0) + 1
        return self.fails[name]

    def called(self, now: float, failed: bool) -> None:
        if now >= self.calls_end:
            self.calls, self.failed, self.calls_end = 0, 0, now + _MINUTE
        self.calls += 1
        self.failed += failed

    def cool(self, until: float) -> None:
        self.until = max(self.until, until)
        self.prober = 0
        self.forget()

    def close(self) -> None:
        self.until, self.prober = 0.0, 0
        self.forget()

    def forget(self) -> None:
        """Begin to count anew."""
        self.fails = None
        self.fails_end = self.calls_end = float("-inf")


def blames(error: ProviderError, *, own_key: bool = False, own_timeout: bool = False) -> bool:
    """Whether ``error`` is the deployment's fault: 429, 401, 403, a model that is not there, timeouts, 5xx,
    connections. Not what is wrong with the request; nor anything under a key that the caller brought
    (``own_key``), nor a timeout that the caller chose (``own_timeout``)."""
    if own_key or isinstance(error, BadRequestError | NoCapacityError):
        return False
    if isinstance(error, DeadlineError) or error.status == 408:
        return not own_timeout
    if isinstance(error, NotFoundError):
        return error.code in _NO_MODEL
    status = error.status
    return isinstance(error, RateLimitError) or status in (401, 403) or status >= 500


@dataclass(frozen=True, slots=True, kw_only=True)
class CooldownPolicy:
    """``allowed_fails``: failures within a minute that do not cool yet; None: see above. ``cooldown_time``,
    ``probe_time``: seconds. ``allowed_fails_policy``: by error class (``{"TimeoutErrorAllowedFails": 5}``).
    ``failure_share``, ``failure_calls``: which share of failures cools, of how many calls at least.

    `ConfigError` for what is no number from zero on, and for unknown names.
    """

    allowed_fails: int | None = None
    cooldown_time: float = 5.0
    allowed_fails_policy: Mapping[str, int | None] | None = None
    failure_share: float = 0.5
    failure_calls: int = 5
    probe_time: float = _PROBE
    _by_name: Mapping[str, int] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("allowed_fails", "cooldown_time", "failure_share", "failure_calls", "probe_time"):
            whole, optional = name in ("allowed_fails", "failure_calls"), name == "allowed_fails"
            check_number(name, getattr(self, name), whole=whole, optional=optional)
        numbers = read_policy(self.allowed_fails_policy, "AllowedFails", "allowed_fails_policy")
        object.__setattr__(self, "_by_name", numbers)

    def succeeded(self, health: Health, now: float, *, probe: bool = False) -> bool:
        """A call went well. True if that closed it: only a probe's success does, unless it cools anew."""
        health.called(now, failed=False)
        if not probe or not health.until or now < health.until:
            return False
        health.close()
        return True

    def failed(
        self, health: Health, error: ProviderError, now: float, *, alone: bool = False, probe: bool = False
    ) -> float:
        """A call failed by the deployment's fault (`blames`): the seconds for which that cools it, or 0.

        ``alone``: there is no other deployment in its group.
        """
        health.called(now, failed=True)
        if not self.cooldown_time:
            return 0.0
        if alone and isinstance(error, RateLimitError | NotFoundError):
            if probe:
                health.close()  # it answers, and there is nobody else to ask
            return 0.0
        name = self.bucket(error)
        count = health.count(name, now)
        if not (probe or self._too_many(health, error, name, count, alone)):
            return 0.0
        seconds = self._time(error)
        health.cool(now + seconds)
        return seconds

    def bucket(self, error: ProviderError) -> str:
        """The name under which ``error`` is counted."""
        return next((name for name in policy_names(error) if name in self._by_name), "")

    def _too_many(self, health: Health, error: ProviderError, name: str, count: int, alone: bool) -> bool:
        allowed = self._by_name[name] if name else self.allowed_fails
        if allowed is not None:
            return count > allowed
        if isinstance(error, RateLimitError | AuthenticationError | PermissionDeniedError | NotFoundError):
            return True
        many = health.calls >= self.failure_calls and health.failed > self.failure_share * health.calls
        return many and not alone

    def _time(self, error: ProviderError) -> float:
        if isinstance(error, RateLimitError) and error.retry_after:
            return min(error.retry_after, _LONGEST)
        return self.cooldown_time
