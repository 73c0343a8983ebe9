"""Finding entries by what they are about, on every store that can be walked, and removing them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

from .._ports.protocol import Port
from ..errors import ConfigError, CorruptEntryError, InvalidRequestError
from .endpoints import kind_of
from .labels import HEAD_BYTES, carries, label, unlabelled
from .tiers import Tiers

__all__ = ["Wanted", "heads", "invalidate", "wanted"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which entries: those that carry each label of ``every``, one of ``some`` if there are any, and whose
    cache key begins with ``prefix``."""

    every: tuple[bytes, ...] = ()
    some: tuple[bytes, ...] = ()
    prefix: str = ""

    def matches(self, key: str, labels: bytes) -> bool:
        return key[-64:].startswith(self.prefix) and carries(labels, self.every, self.some)


def wanted(
    tags: Iterable[str],
    model: str | None,
    scope: str | None,
    namespace: str | None,
    kind: str | None,
    prefix: str,
) -> Wanted:
    """`ConfigError` names what is no criterion, or says that none is given."""
    names = None if isinstance(tags, str) or not isinstance(tags, Iterable) else tuple(tags)
    if names is None or not all(isinstance(tag, str) for tag in names):
        raise ConfigError(f"tags: expected a list of strings, got {tags!r}", param="tags")
    named = {"model": model, "scope": scope, "namespace": namespace, "kind": kind}
    for name, value in {**named, "prefix": prefix}.items():
        if not isinstance(value, str) and (value is not None or name == "prefix"):
            raise ConfigError(f"{name}: expected a string, got {value!r}", param=name)
    if kind is not None:
        named["kind"] = kind_of(kind, param="kind")
    every = tuple(label(name, value) for name, value in named.items() if value is not None)
    some = tuple(label("tag", tag) for tag in names)
    if not every and not some and not prefix:
        raise ConfigError("nothing to look for: give tags, model, scope, namespace, kind or prefix")
    return Wanted(every, some, prefix)


async def invalidate(port: Port, tiers: Tiers, namespace: str, want: Wanted, *, dry_run: bool) -> int:
    """Remove the entries that are ``want``ed, page by page; how many. ``dry_run``: only count them."""
    near = _in_memory(tiers, namespace, want)
    if tiers.store is None:
        return len(near) if dry_run else await tiers.delete(port, near)
    removed = 0
    async for keys in _found(port, tiers, namespace, want):
        removed += len(keys) if dry_run else await tiers.delete(port, keys)
    if tiers.near is not None and not dry_run:
        # What only memory has, since the store failed when it was to be written.
        tiers.near.drop(near)
    return removed


async def _found(port: Port, tiers: Tiers, namespace: str, want: Wanted) -> AsyncIterator[list[str]]:
    """The store's keys, page by page, none of them twice."""
    seen: set[str] = set()
    cursor: str | None = None
    while True:
        try:
            page = await heads(port, tiers, namespace, cursor)
        except InvalidRequestError:
            if cursor is None:
                raise
            cursor = None  # a Cluster that has other masters since: begin again
            continue
        cursor = page[0]
        keys = [key for key, head in page[1] if key not in seen and want.matches(key, _labels(head))]
        seen.update(keys)
        if keys:
            yield keys
        if cursor is None:
            return


async def heads(
    port: Port, tiers: Tiers, namespace: str, cursor: str | None
) -> tuple[str | None, list[tuple[str, bytes]]]:
    """A page of the store's entries: the next page's cursor, and of each entry its key and its first
    `HEAD_BYTES`. `ConfigError` where the store cannot be walked."""
    if not (hasattr(tiers.store, "heads") or hasattr(tiers.store, "aheads")):
        raise ConfigError(
            f"{type(tiers.store).__name__} cannot be searched: it has no heads()", param="store"
        )
    page: Any = await port.store(tiers.store, "heads", namespace, cursor, HEAD_BYTES)
    following, found = page
    return following, list(found)


def _labels(head: bytes) -> bytes:
    try:
        return unlabelled(head)[0]
    except CorruptEntryError:
        return b""


def _in_memory(tiers: Tiers, namespace: str, want: Wanted) -> list[str]:
    if tiers.memory is None:
        return []
    mine = [key for key in tiers.memory.keys() if key[:-65] == namespace]  # noqa: SIM118 - no mapping
    entries = [(key, tiers.memory.get(key)) for key in mine]
    return [key for key, entry in entries if entry is not None and want.matches(key, entry.labels)]
