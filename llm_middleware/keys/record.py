"""`KeyRecord`: what is known of one API key, and the row that a store keeps of it. Never the key itself.

A key is known by the SHA-256 of its text, in hex. Keys made here have 256 random bits, so that nobody finds
the key by its hash, and looking one up by hash tells nothing through the time it takes.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from ..errors import BlockedKeyError, ConfigError, ExpiredKeyError
from .duration import parse_duration
from .pattern import matches

__all__ = ["SHARES", "KeyRecord", "id_of", "masked", "new_key", "record_of"]

SHARES: Final = ("all", "team", "user", "key")
_EVERY: Final = frozenset({"*", "all-proxy-models"})
_ID: Final = re.compile(r"[0-9a-f]{64}")
_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


def new_key() -> str:
    return "sk-" + secrets.token_urlsafe(32)


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def id_of(key_or_id: str) -> str:
    """The id of a key, given that or the key."""
    return key_or_id if _ID.fullmatch(key_or_id) else hashed(key_or_id)


def masked(key: str) -> str:
    return f"sk-...{key[-4:]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """What a caller may do. Times are seconds since the epoch; None is: no limit, never, nobody.

    ``id``: the SHA-256 of the key in hex, which is no secret. ``name``: the key as it may be shown.
    ``models``: names and patterns (``openai/gpt-4.1*``); empty: all. ``aliases``: for this key, from the
    name of a model to that of another. ``cache``: the cache controls that hold whatever the caller says.
    ``allowed_cache_controls``: which ones the caller may set; None: all. ``spend``, ``budget_resets``: when
    the record was read. ``stored``: it is a row of the resolver's store, not one that the host's function
    made.
    """

    id: str
    name: str = ""
    alias: str | None = None
    user: str | None = None
    team: str | None = None
    models: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    metadata: Mapping[str, object] = field(default_factory=lambda: _NOTHING)
    cache: Mapping[str, object] = field(default_factory=lambda: _NOTHING)
    allowed_cache_controls: frozenset[str] | None = None
    expires: float | None = None
    rpm_limit: int | None = None
    tpm_limit: int | None = None
    max_parallel_requests: int | None = None
    max_budget: float | None = None
    budget_duration: str | None = None
    spend: float = 0.0
    budget_resets: float | None = None
    blocked: bool = False
    admin: bool = False
    created: float = 0.0
    updated: float = 0.0
    config: Mapping[str, object] = field(default_factory=lambda: _NOTHING)
    stored: bool = field(default=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:  # all without one would share their answers
            raise ConfigError("id: expected a string that is not empty", param="id")

    def usable(self, now: float) -> bool:
        """Whether it may be used at ``now``, seconds since the epoch."""
        return not self.blocked and (self.expires is None or self.expires > now)

    def check_usable(self, now: float) -> None:
        """`BlockedKeyError`, `ExpiredKeyError` where it is not `usable`."""
        if self.blocked:
            raise BlockedKeyError("this API key is blocked")
        if not self.usable(now):
            raise ExpiredKeyError("this API key has expired")

    def may_use(self, model: str) -> bool:
        """Whether it may call ``model``, by the name that is called in the end: apply `aliases` before."""
        models = self.models
        return not models or not _EVERY.isdisjoint(models) or matches(model, models)

    def scope(self, share: str) -> str:
        """For whom answers are kept, with those who ``share`` them: ``all`` (the empty scope), ``team`` (the
        team, else as ``user``), ``user`` (the user, else as ``key``), ``key``."""
        if share not in SHARES:
            raise ConfigError(f"share: expected one of {list(SHARES)}, got {share!r}", param="share")
        if share == "all":
            return ""
        if share == "team" and self.team:
            return f"team:{self.team}"
        if share in ("team", "user") and self.user:
            return f"user:{self.user}"
        return f"key:{self.id}"


def record_of(row: Mapping[str, Any], now: float) -> KeyRecord:
    """The record in a row of a store; a budget whose time is over is shown renewed."""
    spend, resets = float(row.get("spend") or 0.0), row.get("budget_resets") or None
    if resets is not None and resets <= now:
        duration = parse_duration(row["budget_duration"])
        spend, resets = 0.0, None if duration is None else duration.following(resets, now)
    metadata, controls = row["metadata"], row["allowed_cache_controls"]
    return KeyRecord(
        id=row["id"],
        name=row["name"],
        alias=row["alias"],
        user=row["user"],
        team=row["team"],
        models=tuple(row["models"]),
        aliases=MappingProxyType(dict(row["aliases"])),
        metadata=MappingProxyType(dict(metadata)),
        cache=MappingProxyType(dict(metadata.get("cache") or {})),
        allowed_cache_controls=None if controls is None else frozenset(controls),
        expires=row["expires"],
        rpm_limit=row["rpm_limit"],
        tpm_limit=row["tpm_limit"],
        max_parallel_requests=row["max_parallel_requests"],
        max_budget=row["max_budget"],
        budget_duration=row["budget_duration"],
        spend=spend,
        budget_resets=resets,
        blocked=row["blocked"],
        admin=row["admin"],
        created=row["created"],
        updated=row["updated"],
        config=MappingProxyType(dict(row["config"])),
        stored=True,
    )
