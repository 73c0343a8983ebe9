"""Which groups are asked after one that failed.

The rules: a caller's own mistake goes nowhere else; a prompt that is too long goes to the groups named for
that, content that a policy refuses to those named for it, and both, where none are named, to the general
ones; all other failures to the general ones, and where a group has none, to the default ones. A list
that is there and empty says that there are none to ask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import (
    BadRequestError,
    ConfigError,
    ContentPolicyError,
    ContextWindowExceededError,
    InvalidRequestError,
    ProviderError,
)

__all__ = ["Fallbacks", "own_fallbacks"]

Table = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Fallbacks:
    """``general``, ``context_window``, ``content_policy``: from a group to others in their order; ``*``
    stands for every group. ``default``: of groups that have no general ones."""

    general: Table
    context_window: Table
    content_policy: Table
    default: Sequence[str] = ()

    @classmethod
    def of(
        cls, general: object, context_window: object, content_policy: object, default: object
    ) -> Fallbacks:
        """From LiteLLM's lists of one-entry mappings. `ConfigError` names what is wrong."""
        return cls(
            _table("fallbacks", general),
            _table("context_window_fallbacks", context_window),
            _table("content_policy_fallbacks", content_policy),
            _names("default_fallbacks", [] if default is None else default),
        )

    def after(self, error: ProviderError, group: str, own: Sequence[str] | None = None) -> Sequence[str]:
        """The groups to try after ``error`` of ``group``. ``own``: of this request, before all others; empty:
        none at all; None: it says nothing of them."""
        if own is not None and not own:
            return ()
        general = _find(self.general, group, self.default) if own is None else own
        if isinstance(error, ContextWindowExceededError):
            return _find(self.context_window, group, general)
        if isinstance(error, ContentPolicyError):
            return _find(self.content_policy, group, general)
        return () if isinstance(error, BadRequestError) else general


def own_fallbacks(value: object, group: str) -> Sequence[str] | None:
    """Those of one request for ``group``: names, or LiteLLM's list of ``{group: [groups]}``; None where it
    says nothing of this group. `InvalidRequestError` where it is neither."""
    if value is None:
        return None
    try:
        if isinstance(value, Sequence) and value and isinstance(value[0], Mapping):
            table = _table("fallbacks", value)
            return table.get(group, table.get("*"))
        return _names("fallbacks", value)
    except ConfigError as exc:
        raise InvalidRequestError(exc.message, param="fallbacks") from None


def _find(table: Table, group: str, otherwise: Sequence[str]) -> Sequence[str]:
    return table.get(group, table.get("*", otherwise))


def _table(param: str, value: object) -> Table:
    entries = [value] if isinstance(value, Mapping) else ([] if value is None else value)
    if isinstance(entries, str) or not isinstance(entries, Sequence):
        raise ConfigError(f"{param}: expected a list of {{group: [groups]}}, got {value!r}", param=param)
    table: dict[str, Sequence[str]] = {}
    for place, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{param}[{place}]: expected {{group: [groups]}}, got {entry!r}", param=param)
        for group, groups in entry.items():
            table[str(group)] = _names(f"{param}[{place}].{group}", groups)
    return table


def _names(param: str, value: object) -> Sequence[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{param}: expected a list of model names, got {value!r}", param=param)
    return tuple(names)
