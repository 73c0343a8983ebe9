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
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlsplit

from ..errors import ConfigError, CorruptEntryError, StoreError
from ..types import Clock
from .s3_fast import (
    Clients,
    FastReads,
    Found,
    check_names,
    client_config,
    read_object,
    translated,
    unless_missing,
)

__all__ = ["S3Settings", "S3Store"]

T = TypeVar("T")

_EXPIRES: Final = "llm-expires"
_LAST_DATE: Final = 253_402_300_799.0  # the last second of the year 9999, as far as HTTP dates go
_PAGE: Final = 1000  # objects per request: the most that S3 lists or removes in one


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Settings:
    """The settings of an `S3Store`; text as an environment has it (``"false"``, ``"0.5"``) will do.

    ``s3_path``: the prefix of all object keys. ``s3_verify``: False, or a file of the certificates to trust.
    ``s3_config``: arguments of ``botocore.config.Config``. Credentials that are not given, boto3 finds where
    it always does. ``timeout``: seconds to connect, to wait for an answer, and in all for one object.
    ``threads``: the size of the async methods' pool. ``client``: what reads, ``boto3``, ``obstore`` or
    ``auto``: obstore where it is installed and can do what the settings say.
    """

    s3_bucket_name: str = ""
    s3_region_name: str | None = None
    s3_api_version: str | None = None
    s3_path: str = ""
    s3_use_ssl: bool = True
    s3_verify: bool | str | None = None
    s3_endpoint_url: str | None = None
    s3_aws_access_key_id: str | None = field(default=None, repr=False)
    s3_aws_secret_access_key: str | None = field(default=None, repr=False)
    s3_aws_session_token: str | None = field(default=None, repr=False)
    s3_config: Mapping[str, object] = field(default_factory=dict, repr=False)
    timeout: float = 0.25
    threads: int = 16
    client: str = "auto"

    def __post_init__(self) -> None:
        for name, (expected, parse) in _CHECKS.items():
            try:
                object.__setattr__(self, name, parse(getattr(self, name)))
            except (LookupError, TypeError, ValueError):  # the value is not shown: it may be a secret
                raise ConfigError(f"{name}: expected {expected}", param=name) from None


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


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _optional(parse: Callable[[object], T]) -> Callable[[object], T | None]:
    return lambda value: None if value is None else parse(value)


def _path(value: object) -> str:
    parts = [part for part in _text(value).split("/") if part] if value else []
    if "." in parts or ".." in parts:  # clients disagree on what these mean
        raise ValueError
    return "/".join(parts)


def _flag(value: object) -> bool:
    return value if isinstance(value, bool) else {"true": True, "false": False}[_text(value).lower()]


def _verify(value: object) -> bool | str:
    return _flag(value) if str(value).lower() in ("true", "false") else _text(str(value))


def _url(value: object) -> str:
    parts = urlsplit(_text(value))
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ValueError
    return parts.geturl()


def _seconds(value: object) -> float:
    seconds = float(value)  # type: ignore[arg-type]  # TypeError is what is wanted
    if not 0 < seconds < math.inf or isinstance(value, bool):
        raise ValueError
    return seconds


def _threads(value: object) -> int:
    if isinstance(value, (bool, float)) or not 0 < int(value) < 1000:  # type: ignore[call-overload]
        raise ValueError
    return int(value)  # type: ignore[call-overload, no-any-return]


def _mapping(value: object) -> Mapping[str, object]:
    return dict(value or {})  # type: ignore[call-overload, no-any-return]


_CLIENTS: Final[Mapping[object, str]] = {name: name for name in ("auto", "boto3", "obstore")}
_TEXTS: Final = (
    "region_name",
    "api_version",
    "aws_access_key_id",
    "aws_secret_access_key",
    "aws_session_token",
)
_CHECKS: Final[Mapping[str, tuple[str, Callable[[object], object]]]] = {
    "s3_bucket_name": ("the name of a bucket", _text),
    **{f"s3_{name}": ("text that is not empty, or None", _optional(_text)) for name in _TEXTS},
    "s3_path": ("a prefix without '.' and '..' in it", _path),
    "s3_use_ssl": ("True or False", _flag),
    "s3_verify": ("True, False or a file of certificates", _optional(_verify)),
    "s3_endpoint_url": ("an http or https URL without credentials", _optional(_url)),
    "s3_config": ("a mapping of botocore's settings", _mapping),
    "timeout": ("seconds > 0", _seconds),
    "threads": ("a number of threads > 0", _threads),
    "client": ("'auto', 'boto3' or 'obstore'", _CLIENTS.__getitem__),
}
