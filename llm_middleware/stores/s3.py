"""The S3 tier: one object per entry in a bucket; boto3 writes and lists, obstore reads where it is installed.

An entry ``<namespace>:<name>`` is the object ``<s3_path>/<namespace>/<name>``. Each part is quoted so that it
holds no slash, and a namespace is listed up to the next slash: never a longer name, never what others keep.

When an entry is over is decided by the store's own clock and the object's metadata ``llm-expires`` (seconds
since the epoch). ``Expires`` and ``Cache-Control: max-age`` say the same to whoever serves the bucket. S3
removes nothing by itself: call `S3Store.purge_expired`, or give the prefix a lifecycle rule.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
import re
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any, Final, TypeAlias, TypeVar
from urllib.parse import quote

from ..errors import CorruptEntryError, InvalidRequestError, StoreError
from ..types import Clock
from .s3_fast import (
    Clients,
    FastReads,
    Found,
    check_names,
    client_config,
    read_head,
    read_object,
    translated,
    unless_missing,
)
from .s3_settings import S3Settings

__all__ = ["S3Settings", "S3Store"]

T = TypeVar("T")
Page: TypeAlias = tuple[str | None, list[tuple[str, bytes]]]

_EXPIRES: Final = "llm-expires"
_LAST_DATE: Final = 253_402_300_799.0  # the last second of the year 9999, as far as HTTP dates go
_PAGE: Final = 1000  # objects per request: the most that S3 lists or removes in one
_DIGITS: Final = re.compile(r"[0-9a-f]{64}")


class S3Store:
    """Answers in a bucket, shared by every process on every machine that may use it.

    Neither importing nor making a store connects. The first call of a process, so also after a fork, takes
    some 0.1 s of CPU more: it makes the client. The sync methods wait in the caller's thread, the async ones
    in a bounded pool of the store's own. ``clock`` gives seconds since the epoch.

    The credentials need ``s3:GetObject``, ``s3:PutObject``, ``s3:DeleteObject`` and ``s3:ListBucket``;
    without the last, S3 answers ``AccessDenied`` for an object that does not exist. Needs the ``s3`` extra:
    `ConfigError` without it. Whatever goes wrong is a `StoreError` whose ``code`` is S3's own, such as
    ``AccessDenied``, or ``timeout``, ``unreachable`` or the name of boto3's error.
    """

    tier = "s3"

    def __init__(self, settings: S3Settings, *, clock: Clock = time.time) -> None:
        self.settings = settings
        self._bucket = settings.s3_bucket_name
        self._prefix = f"{settings.s3_path}/" if settings.s3_path else ""
        self._clock = clock
        self._config = client_config(settings)
        self._held = Clients(settings, self._config)

    @classmethod
    def from_settings(cls, settings: Mapping[str, object], *, clock: Clock = time.time) -> S3Store:
        """From settings by name; `ConfigError` names an unknown one and the nearest that there is."""
        check_names(settings, [known.name for known in fields(S3Settings)])
        return cls(S3Settings(**settings), clock=clock)  # type: ignore[arg-type]  # checked there

    def get(self, key: str) -> bytes | None:
        """The bytes under ``key``, or None where there are none or their time is over.

        `CorruptEntryError` for an object that this store did not write.
        """
        client, fast = self._clients()
        name = self._name(key)
        slow = functools.partial(read_object, client, self._bucket, self.settings.timeout)
        return self._alive((slow if fast is None else fast.read)(name))

    def set(self, key: str, value: bytes, ttl: float | None) -> None:
        """Keep ``value`` for ``ttl`` seconds (None: until removed), replacing what was there.

        A value that is out of time still removes the old one.
        """
        client, _ = self._clients()
        target = {"Bucket": self._bucket, "Key": self._name(key)}
        with translated("set"):
            if ttl is not None and ttl <= 0:
                client.delete_object(**target)
            else:
                attributes = {"ContentType": "application/octet-stream", **self._expiry(ttl)}
                client.put_object(**target, **attributes, Body=value)

    def delete(self, keys: Sequence[str]) -> int:
        """Remove ``keys``; how many were there and alive. Takes one request for each, and one for all."""
        names = list(dict.fromkeys(map(self._name, keys)))
        client, _ = self._clients(bulk=len(names) > 1)
        expiries = self._expiries(client, names)
        self._remove(client, names)  # those not found as well: only this says that a bucket is missing
        now = self._clock()
        return sum(expires is not None and not expires <= now for expires in expiries)

    def flush(self, namespace: str) -> int:
        """Remove every object of exactly this namespace; how many, those included whose time was over."""
        return _swept(functools.partial(self._flush_page, self._folder(namespace)))

    def purge_expired(self) -> int:
        """Remove every object below ``s3_path`` whose time is over; how many. Takes a request for each object
        there is. One that is replaced at this very moment may be lost, and is then a miss."""
        return _swept(self._purge_page)

    def heads(self, namespace: str, cursor: str | None, size: int) -> Page:
        """The next page of exactly ``namespace``: its cursor, None at the end, and entries as (key, first
        ``size`` bytes). What is over, and what this store did not write, is left out.

        Up to a thousand objects: a request to list them, and one for each (two where it is empty), as many at
        a time as there are ``threads``. ``cursor``: None to begin, else as the last page gave it;
        `InvalidRequestError` for any other.
        """
        folder = self._folder(namespace)
        token = None if cursor is None else _token(folder, cursor)
        client, _ = self._clients(bulk=True)
        names, following = self._page(client, token, Prefix=folder, Delimiter="/")
        own = [name for name in names if _DIGITS.fullmatch(name, len(folder))]
        found = self._each(lambda name: read_head(client, self._bucket, name, size), own)
        now = self._clock()
        heads = [
            (f"{namespace}:{name[len(folder) :]}", head[0])
            for name, head in zip(own, found, strict=True)
            if head is not None and _expires(head[1]) > now
        ]
        return None if following is None else _seal(folder, following) + following, heads

    def ping(self) -> dict[str, object]:
        """List at most one object: ``latency_ms``, and what is known of the connection, without secrets."""
        client, fast = self._clients()
        began = time.perf_counter()
        with translated("ping"):
            answer = client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
        return {
            "latency_ms": round((time.perf_counter() - began) * 1e3, 3),
            "bucket": self._bucket,
            "path": self.settings.s3_path,
            "endpoint": client.meta.endpoint_url,
            "region": client.meta.region_name,
            "server": answer["ResponseMetadata"]["HTTPHeaders"].get("server"),
            "reads": "boto3" if fast is None else "obstore",
        }

    def close(self) -> None:
        """Close this process's connections once what is under way has ended. The next call opens others."""
        held, self._held = self._mine(), Clients(self.settings, self._config)
        held.close()

    async def aget(self, key: str) -> bytes | None:
        if not self._mine().ready:
            await self._pooled(self._clients, budget=False)
        fast = self._mine().fast
        if fast is None:
            return await self._pooled(self.get, key)
        return self._alive(await fast.aread(self._name(key)))

    async def aset(self, key: str, value: bytes, ttl: float | None) -> None:
        await self._pooled(self.set, key, value, ttl)

    async def adelete(self, keys: Sequence[str]) -> int:
        return await self._pooled(self.delete, keys, budget=len(keys) < 2)

    async def aflush(self, namespace: str) -> int:
        """`flush`, awaited; where the caller is cancelled it ends with the page of objects under way."""
        return await self._aswept(functools.partial(self._flush_page, self._folder(namespace)))

    async def apurge_expired(self) -> int:
        """`purge_expired`, awaited; where the caller is cancelled it ends with the page under way."""
        return await self._aswept(self._purge_page)

    async def aheads(self, namespace: str, cursor: str | None, size: int) -> Page:
        return await self._pooled(self.heads, namespace, cursor, size, budget=False)

    async def aping(self) -> dict[str, object]:
        return await self._pooled(self.ping)

    async def aclose(self) -> None:
        await asyncio.to_thread(self.close)

    def _mine(self) -> Clients:
        """What this process holds. The parent's is kept: to drop it would touch the parent's connections."""
        held = self._held
        if held.pid != os.getpid():
            _INHERITED.append(held)
            held = self._held = Clients(self.settings, self._config)
        return held

    def _clients(self, *, bulk: bool = False) -> tuple[Any, FastReads | None]:
        held = self._mine()
        with translated("connect"):
            return held.client(bulk=bulk), held.fast

    async def _pooled(self, function: Callable[..., T], *args: object, budget: bool = True) -> T:
        """Call in the pool, and wait ``timeout`` seconds for it, in the queue included. To make the client
        takes longer than that, and is no part of it."""
        loop, pool = asyncio.get_running_loop(), self._mine().pool
        with translated("call"):
            if not self._mine().ready:
                await loop.run_in_executor(pool, self._clients)
            async with asyncio.timeout(self.settings.timeout if budget else None):
                return await loop.run_in_executor(pool, function, *args)

    def _folder(self, namespace: str) -> str:
        return f"{self._prefix}{_part(namespace)}/"

    def _name(self, key: str) -> str:
        namespace, _, name = key.rpartition(":")
        return self._folder(namespace) + _part(name)

    def _expiry(self, ttl: float | None) -> dict[str, object]:
        """What an object says of its end; for others it is rounded down to whole seconds."""
        if ttl is None or ttl == math.inf:
            return {"Metadata": {_EXPIRES: "inf"}}
        expires = float(self._clock() + ttl)
        date, age = int(min(expires, _LAST_DATE)), f"max-age={int(ttl)}"
        return {"Metadata": {_EXPIRES: repr(expires)}, "Expires": date, "CacheControl": age}

    def _alive(self, found: Found | None) -> bytes | None:
        if found is None:
            return None
        expires = _expires(found[1])
        if math.isnan(expires):
            raise CorruptEntryError("an object that this store did not write")
        return found[0] if expires > self._clock() else None

    def _expiries(self, client: Any, names: Sequence[str]) -> list[float | None]:
        """When each object is over: None where there is none, NaN where it does not say."""

        def ask(name: str) -> float | None:
            found = unless_missing(client.head_object, Bucket=self._bucket, Key=name)
            return None if found is None else _expires(found["Metadata"])

        with translated("head"):
            return self._each(ask, names)

    def _each(self, ask: Callable[[str], T], names: Sequence[str]) -> list[T]:
        """``ask`` for each name, in as many threads as the settings allow."""
        if len(names) < 2:
            return [ask(name) for name in names]
        with ThreadPoolExecutor(min(len(names), self.settings.threads)) as pool:
            return list(pool.map(ask, names))

    def _remove(self, client: Any, names: Sequence[str]) -> int:
        """Remove objects by name, whether they are there or not."""
        for first in range(0, len(names), _PAGE):
            batch = {"Objects": [{"Key": name} for name in names[first : first + _PAGE]], "Quiet": True}
            with translated("delete"):
                failed = client.delete_objects(Bucket=self._bucket, Delete=batch).get("Errors")
            if failed:
                code = failed[0].get("Code")
                raise StoreError(f"s3 delete failed for {len(failed)} objects: {code}", code=code)
        return len(names)

    def _page(self, client: Any, token: str | None, **options: str) -> tuple[list[str], str | None]:
        """Up to a thousand names, and the token of the next page."""
        start = {} if token is None else {"ContinuationToken": token}
        with translated("list"):
            page = client.list_objects_v2(Bucket=self._bucket, MaxKeys=_PAGE, **options, **start)
        return [item["Key"] for item in page.get("Contents", ())], page.get("NextContinuationToken")

    def _flush_page(self, folder: str, token: str | None) -> tuple[int, str | None]:
        client, _ = self._clients(bulk=True)
        names, following = self._page(client, token, Prefix=folder, Delimiter="/")
        return self._remove(client, names), following

    def _purge_page(self, token: str | None) -> tuple[int, str | None]:
        client, _ = self._clients(bulk=True)
        names, following = self._page(client, token, Prefix=self._prefix)
        own = [name for name in names if name.count("/", len(self._prefix)) == 1]
        now = self._clock()
        ends = zip(own, self._expiries(client, own), strict=True)
        return self._remove(client, [name for name, end in ends if end is not None and end <= now]), following

    async def _aswept(self, step: _Step) -> int:
        count, token = await self._pooled(step, None, budget=False)
        while token is not None:
            more, token = await self._pooled(step, token, budget=False)
            count += more
        return count


def _seal(folder: str, token: str) -> str:
    """Eight digits before a token, for it to be known again: some servers take what is none for one."""
    return f"{zlib.crc32((folder + token).encode('utf-8', 'surrogatepass')):08x}"


def _token(folder: str, cursor: object) -> str:
    token = cursor[8:] if isinstance(cursor, str) else ""
    if not token or cursor != _seal(folder, token) + token:
        raise InvalidRequestError("cursor: not one that this store gave for this namespace", param="cursor")
    return token


_INHERITED: Final[list[Clients]] = []
_Step = Callable[[str | None], tuple[int, str | None]]


def _part(text: str) -> str:
    """One part of an object key: never empty, no slash, no leading dot, and another one for each text.

    Like percent-encoding with ``=``, as clients disagree on a ``%`` in a key.
    """
    quoted = quote(text, safe="", errors="surrogatepass").replace("%", "=").replace("~", "=7E")
    return f"=2E{quoted[1:]}" if quoted.startswith(".") else quoted or "="


def _expires(metadata: Mapping[str, str]) -> float:
    """Seconds since the epoch, NaN where there is no such number. Some servers change the case of names."""
    for name, value in metadata.items():
        if name.lower() == _EXPIRES:
            with contextlib.suppress(ValueError):
                return float(value)
    return math.nan


def _swept(step: _Step) -> int:
    count, token = step(None)
    while token is not None:
        more, token = step(token)
        count += more
    return count
