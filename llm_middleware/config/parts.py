"""What either form of file comes to, while it is put together: arguments, and where each was written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from ..caching.headers import PROFILES
from ..keys.record import SHARES
from .values import Section

__all__ = ["Parts", "read_keys", "read_server"]

KEYS_TTL: Final = 60.0


@dataclass(slots=True)
class Parts:
    """``model_path``: of the list of models. ``router_origins``, ``cache_origins``: from an argument to the
    path of what it was made of, ``redis_origins``: of the Router's Redis; ``router_path``, ``cache_path``: of
    the sections that the others are in. ``implied_store``: ``store`` is where API keys would be kept, if a
    master key says that there are any."""

    models: object = None
    model_path: str = "model_list"
    router: dict[str, object] = field(default_factory=dict)
    router_path: str = "router"
    router_origins: dict[str, str] = field(default_factory=dict)
    redis_origins: dict[str, str] = field(default_factory=dict)
    cache: dict[str, object] | None = None
    cache_path: str = "cache"
    cache_origins: dict[str, str] = field(default_factory=dict)
    store: object = None
    store_path: str = "keys.store"
    implied_store: bool = False
    keys_ttl: float = KEYS_TTL
    master_key: str | None = None
    share: str = "team"
    header_profile: str = "standard"
    admin: bool = True
    show_content: bool = False
    max_body_bytes: int | None = None
    hooks: list[str] = field(default_factory=list)

    def set_router(self, name: str, value: object, path: str) -> None:
        self.router[name] = value
        self.router_origins[name] = path


def read_keys(section: Section, parts: Parts) -> None:
    """``keys``, which either form may have: what is given there wins."""
    names = ("master_key", "share", "store", "ttl")
    if "master_key" in section:
        parts.master_key = section.text("master_key") or parts.master_key
    if "store" in section:
        parts.store, parts.store_path = section.take("store"), section.at("store")
        parts.implied_store = False
    if parts.master_key is None and parts.implied_store:
        parts.store = None
    elif parts.master_key is None and parts.store_path.endswith(".database_url") and parts.store is not None:
        section.report.note(f"{parts.store_path}: keys are asked for, and no master_key can make any")
    parts.keys_ttl = section.number("ttl", parts.keys_ttl, expected="seconds >= 0")
    parts.share = section.choice("share", parts.share, SHARES)
    section.close(names)


def read_server(section: Section, parts: Parts) -> None:
    """``server``, which either form may have."""
    names = ("admin", "header_profile", "max_body_bytes", "show_content")
    parts.header_profile = section.choice("header_profile", parts.header_profile, PROFILES)
    parts.admin = section.flag("admin", parts.admin)
    parts.show_content = section.flag("show_content", parts.show_content)
    if "max_body_bytes" in section:
        least = parts.max_body_bytes or 0
        parts.max_body_bytes = (
            int(section.number("max_body_bytes", least, expected="a number of bytes")) or None
        )
    section.close(names)
