"""The S3 clients of one process: boto3's, and `obstore <https://developmentseed.org/obstore/>`_ for reads.

boto3 finds the credentials, the region and the endpoint, and makes every request but one. To read an object
is what a hit costs, and there obstore, a Rust client with a sync and an async face of its own, takes a
fraction of the CPU. It never writes: it has no way to set ``Expires``.

obstore steps aside for boto3 where it would not do the same thing: where its package is missing, where a
setting is one that it does not know, where sockets belong to gevent or eventlet (it would stop all their
tasks), and in a process forked from one that has used it (its threads do not survive that).
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from ..errors import ConfigError, LLMMiddlewareError, StoreError, nearest

if TYPE_CHECKING:
    from obstore.store import S3Store as ObjectStore

    from .s3_settings import S3Settings

__all__ = [
    "Clients",
    "FastReads",
    "Found",
    "check_names",
    "client_config",
    "read_head",
    "read_object",
    "translated",
    "unless_missing",
]

Found = tuple[bytes, Mapping[str, str]]
"""An object's bytes and its metadata."""

_BULK_TIMEOUT: Final = 30.0  # seconds; no server removes a thousand objects in the time of one read
_CHUNK: Final = 2**14
_MISSING: Final = frozenset({"NoSuchKey", "http_404"})  # the latter where there is no body, as of HEAD
_NO_RANGE: Final = frozenset({"InvalidRange", "http_416"})  # of an empty object, not even its first byte
_S3_CODE: Final = re.compile(r"<Code>(\w+)</Code>")
_HTTP_STATUS: Final = re.compile(r"status code: (\d+)")
_BUCKET: Final = re.compile(r"[a-z0-9.-]+(?<!--x-s3)")
_AWS: Final = re.compile(r"://[^/]*\.amazonaws\.com(\.cn)?/?$")
# boto3 renews credentials ten minutes before they end, and obstore asks for others five minutes before.
_TRUSTED: Final = timedelta(minutes=10)

_used_in: int | None = None  # the process that has started obstore's threads


class Clients:
    """What one process holds. No thread and no client is made before it is needed."""

    def __init__(self, settings: S3Settings, config: Any) -> None:
        self.pid = os.getpid()
        self.fast: FastReads | None = None
        self.pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="llm-middleware-s3")
        self._settings = settings
        self._config = config
        self._lock = threading.Lock()
        self._session: Any = None  # boto3 is untyped
        self._made: dict[bool, Any] = {}

    @property
    def ready(self) -> bool:
        """Whether the next read need not make a client."""
        return False in self._made

    def client(self, *, bulk: bool) -> Any:
        """boto3's client for single objects, or the one that waits longer, for many."""
        made = self._made.get(bulk)  # no lock: another thread may be making the other one
        return self._make(bulk) if made is None else made

    def _make(self, bulk: bool) -> Any:
        with self._lock:
            if not self.ready:
                self._session = _session(self._settings)
                client = _client(self._session, self._settings, self._config)
                self.fast = _fast(self._settings, self._session, client)
                self._made[False] = client
            if bulk not in self._made:
                config = self._config.merge(type(self._config)(read_timeout=_BULK_TIMEOUT))
                self._made[bulk] = _client(self._session, self._settings, config)
            return self._made[bulk]

    def close(self) -> None:
        """Wait for what the pool is doing, then close all connections."""
        self.pool.shutdown()
        with self._lock:
            for client in self._made.values():
                client.close()


def read_object(client: Any, bucket: str, timeout: float, name: str, **options: str) -> Found | None:
    """The object ``name`` by boto3, or None where there is none, within some ``timeout`` seconds in all."""
    deadline = time.monotonic() + timeout
    with translated("get"):
        answer = unless_missing(client.get_object, Bucket=bucket, Key=name, **options)
        return None if answer is None else (_body(answer["Body"], deadline), answer["Metadata"])


def read_head(client: Any, bucket: str, name: str, size: int) -> Found | None:
    """The object ``name``, no more than its first ``size`` bytes, with the patience for work on many."""
    try:
        found = read_object(client, bucket, _BULK_TIMEOUT, name, Range=f"bytes=0-{max(size, 1) - 1}")
    except StoreError as exc:
        if exc.code not in _NO_RANGE:
            raise
        found = read_object(client, bucket, _BULK_TIMEOUT, name)
    return None if found is None else (found[0][:size], found[1])


def _body(stream: Any, deadline: float) -> bytes:
    """The whole body. Each wait for more of it has a limit, but there may be many."""
    parts = []
    for part in stream.iter_chunks(_CHUNK):
        parts.append(part)
        if time.monotonic() > deadline:
            stream.close()
            raise TimeoutError
    return b"".join(parts)


def unless_missing(request: Callable[..., Any], **arguments: str) -> Any:
    """boto3's answer, or None where there is no such object."""
    try:
        return request(**arguments)
    except Exception as exc:
        if _error_code(exc) in _MISSING:
            return None
        raise


class FastReads:
    """Reads objects with obstore, within ``timeout`` seconds in all; its errors are `StoreError`."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def read(self, name: str) -> Found | None:
        """The object ``name``, or None where there is none."""
        _mark_used()
        try:
            answer = self._store.get(name)
            return answer.bytes().to_bytes(), answer.attributes
        except Exception as exc:
            _raise_unless_missing(exc)
            return None

    async def aread(self, name: str) -> Found | None:
        """`read`, awaited. A caller that is cancelled ends the request."""
        _mark_used()
        try:
            answer = await self._store.get_async(name)
            return (await answer.bytes_async()).to_bytes(), answer.attributes
        except Exception as exc:
            _raise_unless_missing(exc)
            return None


def _mark_used() -> None:
    global _used_in
    if _used_in is None:
        _used_in = os.getpid()


def _raise_unless_missing(exc: Exception) -> None:
    """A `StoreError` for anything but S3's word that there is no such object.

    obstore's message quotes the whole answer, in which S3 may quote the request's headers: it is not shown.
    """
    text = str(exc)
    found = _S3_CODE.search(text) or _HTTP_STATUS.search(text)
    if found is not None:
        code = _named(found[1])
    elif "kind: " in text:
        code = "timeout" if "kind: Timeout" in text else "unreachable"
    else:
        code = type(exc).__name__
    if code != "NoSuchKey":
        raise StoreError(f"s3 get failed: {code}", code=code) from None


def _fast(settings: S3Settings, session: Any, client: Any) -> FastReads | None:
    """obstore as these settings, or boto3's own sources, say; None where boto3 is to read."""
    if settings.client == "boto3":
        return None
    reason = _reason_against(settings, session, client)
    if reason is None:
        return FastReads(_object_store(settings, session, client))
    if settings.client == "obstore":
        raise ConfigError(f"client='obstore': {reason}", param="client")
    return None


def _reason_against(settings: S3Settings, session: Any, client: Any) -> str | None:
    """Why obstore cannot read here as boto3 would."""
    try:
        import obstore.store  # noqa: F401
    except ImportError:
        return "needs obstore: pip install 'llm-middleware[s3-fast]'"
    secure = client.meta.endpoint_url.startswith("https:")
    reasons = {
        "it does not work in a process forked from one that has used it": _used_in not in (None, os.getpid()),
        "it would block gevent and eventlet": not socket.socket.__module__.startswith("socket"),
        "it cannot do what s3_config says": not _is_simple(settings.s3_config),
        "it trusts other certificates than s3_verify or AWS_CA_BUNDLE say": secure
        and (isinstance(settings.s3_verify, str) or bool(session._session.get_config_variable("ca_bundle"))),
        "it knows no such bucket": _BUCKET.fullmatch(settings.s3_bucket_name) is None,
        "there are no credentials": session.get_credentials() is None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _is_simple(config: Mapping[str, object]) -> bool:
    """Whether boto3 would send the same request without this ``s3_config``, but for the form of the URL."""
    known = {"max_pool_connections", "signature_version", "s3"}
    return (
        known.issuperset(config)
        and config.get("signature_version", "s3v4") == "s3v4"
        and config.get("s3") in (None, {}, {"addressing_style": "path"})
    )


def _object_store(settings: S3Settings, session: Any, client: Any) -> ObjectStore:
    from obstore.store import S3Store as ObjectStore

    endpoint, virtual = _endpoint(settings, client.meta.endpoint_url)
    timeout = timedelta(seconds=settings.timeout)
    return ObjectStore(
        settings.s3_bucket_name,
        config={
            "endpoint": endpoint,
            "region": client.meta.region_name,
            "virtual_hosted_style_request": virtual,
        },
        client_options={
            "allow_http": True,
            "allow_invalid_certificates": settings.s3_verify is False,
            "connect_timeout": timeout,
            "timeout": timeout,
        },
        retry_config={"max_retries": 0},
        credential_provider=_provider(session.get_credentials()),
    )


def _endpoint(settings: S3Settings, url: str) -> tuple[str, bool]:
    """As boto3 has it: the bucket is in the host's name at AWS, in the path elsewhere."""
    bucket = settings.s3_bucket_name
    if _AWS.search(url) is None or "." in bucket or settings.s3_config.get("s3"):
        return url, False
    return url.replace("://", f"://{bucket}."), True


def _provider(credentials: Any) -> Callable[[], Any]:
    """boto3's credentials, asked for again before boto3 would renew them."""

    def provide() -> dict[str, object]:
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _TRUSTED,
        }

    return provide


def _session(settings: S3Settings) -> Any:
    import boto3.session

    return boto3.session.Session(
        aws_access_key_id=settings.s3_aws_access_key_id,
        aws_secret_access_key=settings.s3_aws_secret_access_key,
        aws_session_token=settings.s3_aws_session_token,
        region_name=settings.s3_region_name,
    )


def _client(session: Any, settings: S3Settings, config: Any) -> Any:
    client = session.client(
        "s3",
        api_version=settings.s3_api_version,
        use_ssl=settings.s3_use_ssl,
        verify=settings.s3_verify,
        endpoint_url=settings.s3_endpoint_url,
        config=config,
    )
    client.meta.events.register_last("before-call.s3", _at_once)
    return client


def _at_once(params: dict[str, Any], **_: object) -> None:
    """Send the body without asking first: that takes a round trip, and with a server that hangs a second."""
    params["headers"].pop("Expect", None)


def client_config(settings: S3Settings) -> Any:
    """botocore's own settings: ours, and over them the user's ``s3_config``."""
    try:
        import boto3.session  # noqa: F401  # now rather than in the first request: it takes some 0.2 s
        from botocore.config import Config
    except ImportError as exc:
        raise ConfigError("an S3 cache needs boto3: pip install 'llm-middleware[s3]'") from exc
    check_names(settings.s3_config, Config.OPTION_DEFAULTS, "s3_config.")
    ours = Config(
        connect_timeout=settings.timeout,
        read_timeout=settings.timeout,
        retries={"total_max_attempts": 1},
        signature_version="s3v4",
        max_pool_connections=max(64, settings.threads),
        # Many servers that speak S3 know none of the newer checksums; the signature covers the body.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        return ours.merge(Config(**settings.s3_config))
    except Exception as exc:  # botocore has an error of its own for each option
        raise ConfigError(f"s3_config: {exc}", param="s3_config") from exc


def check_names(given: Iterable[str], known: Iterable[str], where: str = "") -> None:
    """`ConfigError` for the first name that is not known, with the nearest that is."""
    names = list(known)
    for name in given:
        if name not in names:
            near = nearest(name, names)
            hint = "" if near is None else f"; did you mean {where + near!r}?"
            raise ConfigError(f"unknown S3 setting {where + name!r}{hint}", param=where + name)


@contextlib.contextmanager
def translated(operation: str) -> Iterator[None]:
    """Whatever goes wrong inside is a `StoreError` with a code."""
    try:
        yield
    except LLMMiddlewareError:
        raise
    except Exception as exc:
        code = _error_code(exc)
        raise StoreError(f"s3 {operation} failed: {code}", code=code) from exc


def _error_code(exc: Exception) -> str:
    """S3's own code, or a name for what kept it from answering; never a message, which may quote a secret."""
    answer = getattr(exc, "response", None)
    if isinstance(answer, dict):
        return _named(str(answer["Error"]["Code"]))
    name = type(exc).__name__
    return "timeout" if "Timeout" in name else "unreachable" if "Connection" in name else name


def _named(code: str) -> str:
    return f"http_{code}" if code.isdigit() else code
