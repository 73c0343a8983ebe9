"""What an operator does with a cache: remove entries, ask how it is, close it. Both faces of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .._drive import run_sync
from .._ports.faces import SYNC, async_port
from .._ports.protocol import Port
from .flow import Flow
from .invalidation import Wanted, invalidate, wanted
from .listing import Page, list_entries
from .ping import ping
from .settings import CacheSettings

__all__ = ["Operations"]


class Operations:
    """The half of `CacheManager` that no request needs."""

    settings: CacheSettings
    _flow: Flow

    def delete(self, *keys: str, dry_run: bool = False) -> int:
        """Remove entries by cache key, as ``x-llm-cache-key`` tells it; how many there were. ``dry_run``:
        only count them."""
        return run_sync(self._delete(SYNC, keys, dry_run))

    async def adelete(self, *keys: str, dry_run: bool = False) -> int:
        """`delete` for async callers."""
        return await self._delete(async_port(), keys, dry_run)

    async def _delete(self, port: Port, keys: Sequence[str], dry_run: bool) -> int:
        namespace, tiers = self.settings.namespace, self._flow.tiers
        full = [key if ":" in key else f"{namespace}:{key}" for key in keys]
        return await (tiers.count(port, full) if dry_run else tiers.delete(port, full))

    def invalidate(
        self,
        *,
        tags: Sequence[str] = (),
        model: str | None = None,
        scope: str | None = None,
        namespace: str | None = None,
        kind: str | None = None,
        prefix: str = "",
        dry_run: bool = False,
    ) -> int:
        """Remove the entries that have one of ``tags`` and are of this ``model``, ``scope``, request's
        ``namespace`` and ``kind``, and whose cache key begins with ``prefix``: of each only what is given.
        How many there were; ``dry_run``: only count them. Walks through all entries of the store.

        ``scope`` is that of `fetch`; a middleware's is ``"id:" +`` what its ``identify`` returned.
        `ConfigError` where nothing is given, or the store cannot be walked.
        """
        want = wanted(tags, model, scope, namespace, kind, prefix)
        return run_sync(self._invalidate(SYNC, want, dry_run))

    async def ainvalidate(
        self,
        *,
        tags: Sequence[str] = (),
        model: str | None = None,
        scope: str | None = None,
        namespace: str | None = None,
        kind: str | None = None,
        prefix: str = "",
        dry_run: bool = False,
    ) -> int:
        """`invalidate` for async callers."""
        want = wanted(tags, model, scope, namespace, kind, prefix)
        return await self._invalidate(async_port(), want, dry_run)

    async def _invalidate(self, port: Port, want: Wanted, dry_run: bool) -> int:
        return await invalidate(port, self._flow.tiers, self.settings.namespace, want, dry_run=dry_run)

    def entries(
        self, *, prefix: str = "", cursor: str | None = None, limit: int = 100, content: bool = False
    ) -> Page:
        """The entries whose cache keys begin with ``prefix``, page by page: the cursor of the next page, None
        at the end, and at most ``limit`` entries, each a mapping with ``key``, ``kind``, ``model``, ``tags``,
        ``age`` and ``ttl`` in seconds, ``size`` in bytes, and with ``content`` the answer's first 4000
        characters. None where that is not known: of what is encrypted, only ``kind`` and ``content`` are.

        A page may be empty without being the last. What is there all the time is listed, perhaps twice.
        `ConfigError` where the store cannot be walked.
        """
        return run_sync(self._entries(SYNC, prefix, cursor, limit, content=content))

    async def aentries(
        self, *, prefix: str = "", cursor: str | None = None, limit: int = 100, content: bool = False
    ) -> Page:
        """`entries` for async callers."""
        return await self._entries(async_port(), prefix, cursor, limit, content=content)

    async def _entries(
        self,
        port: Port,
        prefix: str,
        cursor: str | None,
        limit: int,
        *,
        content: bool = False,
        models: Iterable[str] = (),
    ) -> Page:
        return await list_entries(
            port,
            self._flow.tiers,
            self.settings.namespace,
            now=self._flow.lookup.clock(),
            prefix=prefix,
            cursor=cursor,
            limit=limit,
            models=models,
            content=content,
        )

    def report(self, key: str) -> bool:
        """Somebody found the answer under this cache key wrong: it is removed, and where it is a semantic
        cache that keeps to a bound, the bar rises. Whether there was one."""
        return run_sync(self._report(SYNC, key))

    async def areport(self, key: str) -> bool:
        """`report` for async callers."""
        return await self._report(async_port(), key)

    async def _report(self, port: Port, key: str) -> bool:
        flow = self._flow
        full = key if ":" in key else f"{self.settings.namespace}:{key}"
        if flow.semantic is not None:
            entry = await flow.tiers.read(port, full)
            about = (None, None) if entry is None else (entry.kind, entry.model)
            await flow.semantic.report(port, full, *about)
        return await flow.tiers.delete(port, [full]) > 0

    def flush(self) -> int:
        """Remove everything in this manager's namespace, and nothing else; how many entries there were."""
        return run_sync(self._flush(SYNC))

    async def aflush(self) -> int:
        """`flush` for async callers."""
        return await self._flush(async_port())

    async def _flush(self, port: Port) -> int:
        return await self._flow.tiers.flush(port, self.settings.namespace)

    def purge_expired(self) -> int:
        """Remove what is over from a store that keeps it until it is removed (memory, disk, S3); how many."""
        return run_sync(self._purge_expired(SYNC))

    async def apurge_expired(self) -> int:
        """`purge_expired` for async callers."""
        return await self._purge_expired(async_port())

    async def _purge_expired(self, port: Port) -> int:
        if self._flow.semantic is not None:
            await self._flow.semantic.purge(port)
        return await self._flow.tiers.purge_expired(port)

    def ping(self) -> dict[str, object]:
        """Write, read and delete a probe on the real store: ``{"status", "tier", "latency_ms"}``, and what
        the store tells of its server and connection, without secrets. Raises what the store raises."""
        return run_sync(self._ping(SYNC))

    async def aping(self) -> dict[str, object]:
        """`ping` for async callers."""
        return await self._ping(async_port())

    async def _ping(self, port: Port) -> dict[str, object]:
        return await ping(port, self._flow, self.settings.namespace)

    def stats(self) -> dict[str, object]:
        """Counters since the start, by event name, the sizes of the memory store, and, of a semantic cache,
        ``semantic``: what look-ups by meaning came to, see `SemanticTier.stats`."""
        memory = self._flow.tiers.memory
        sizes = {} if memory is None else {"entries": len(memory), "bytes": memory.bytes}
        semantic = self._flow.semantic
        by_meaning = {} if semantic is None else {"semantic": semantic.stats()}
        return {**self._flow.reporter.counts, "flights": len(self._flow.flights), **sizes, **by_meaning}

    def close(self) -> None:
        """Release what the store holds; the manager opens it again when it is used again."""
        run_sync(self._close(SYNC))

    async def aclose(self) -> None:
        """`close` for async callers."""
        await self._close(async_port())

    async def _close(self, port: Port) -> None:
        await self._flow.tiers.close(port)
