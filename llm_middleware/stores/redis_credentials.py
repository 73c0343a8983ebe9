"""Passwords that expire: tokens of an identity service, fetched beside the requests and kept while they last.

A token is fetched on a thread of its own, once for all who wait, whichever face they use: whoever needs it
waits no longer than its own budget, and the fetch goes on for the next one. A token that is valid but old is
used while its successor is fetched. The default asks Google Cloud; the same seam serves AWS and Entra ID.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from ..errors import StoreError
from ..types import Clock
from .redis_deadline import remaining

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

__all__ = ["FetchToken", "TokenSource", "credential_provider", "fetch_google_token"]

FetchToken = Callable[[str], tuple[str, float]]
"""From an account's name to its token and the moment (seconds since the epoch) at which that expires."""

_REFRESH: Final = 300.0  # seconds before its end, at most a quarter of its life, when a successor is fetched
_LAST: Final = 10.0  # seconds before its end, at most a tenth of its life, when a token is no longer used
_PAUSE: Final = 1.0  # seconds from one answer of the identity service, good or bad, to the next question
_PATIENCE: Final = 10.0  # seconds that one answer may take
_SCOPE: Final = "https://www.googleapis.com/auth/cloud-platform"


class TokenSource:
    """The current token of one account. Safe for threads and any number of event loops; one per process."""

    def __init__(self, fetch: FetchToken, account: str, *, clock: Clock = time.time) -> None:
        self._fetch = fetch
        self._account = account
        self._clock = clock
        self._lock = threading.Lock()
        self._seen = ""
        self._token = ""
        self._refresh_at = self._ends_at = self._next_fetch = 0.0
        self._pending: Future[None] | None = None

    def current(self) -> str:
        """The token in hand, while a successor is fetched if need be; empty where there is none."""
        now = self._clock()
        if now >= self._refresh_at:
            self._start()
        return self._token if now < self._ends_at else ""

    def wait(self) -> None:
        """Until there is a token, at most to the thread's deadline. `StoreError` where none comes."""
        if not self.current():
            try:
                self._start().result(remaining())
            except Exception as exc:
                raise _no_token(exc) from exc
            self._check()

    async def await_(self) -> None:
        """`wait`, for a coroutine; the caller times it."""
        if not self.current():
            try:
                await asyncio.shield(asyncio.wrap_future(self._start()))
            except Exception as exc:
                raise _no_token(exc) from exc
            self._check()

    def reject(self) -> None:
        """The server refused the token: it is not used again."""
        self._token, self._refresh_at = "", 0.0

    def secrets(self) -> list[str]:
        """What no message may hold: the last token, refused or not."""
        return [self._seen] if self._seen else []

    def _check(self) -> None:
        if not self.current():
            raise StoreError("the service account's token was refused or is over")

    def _start(self) -> Future[None]:
        """The fetch under way; the last one while it is too early for another."""
        with self._lock:
            pending = self._pending
            if pending is None or (pending.done() and self._clock() >= self._next_fetch):
                pending = self._pending = Future()
                thread = threading.Thread(target=self._run, args=(pending,), name="redis-token", daemon=True)
                thread.start()
            return pending

    def _run(self, pending: Future[None]) -> None:
        try:
            token, expires = self._fetch(self._account)
        except BaseException as exc:
            self._next_fetch = self._clock() + _PAUSE
            pending.set_exception(exc)
        else:
            now = self._clock()
            life = expires - now
            self._seen = self._token = token
            self._ends_at = expires - min(_LAST, life / 10)
            self._refresh_at = expires - min(_REFRESH, life / 4)
            self._next_fetch = now + _PAUSE
            pending.set_result(None)


def _no_token(exc: Exception) -> StoreError:
    return StoreError(f"no token for the service account: {type(exc).__name__}: {exc}")


def credential_provider(tokens: TokenSource, username: str | None) -> CredentialProvider:
    """redis-py's view of a token source: what is in hand, without waiting.

    redis-py would keep a connection whose handshake is cancelled half-way, so waiting is done before it.
    """
    from redis.credentials import CredentialProvider
    from redis.exceptions import AuthenticationError

    class TokenProvider(CredentialProvider):
        def get_credentials(self) -> tuple[str, str]:
            token = tokens.current()
            if not token:
                raise AuthenticationError("no token for the service account yet")
            return username or "default", token

        async def get_credentials_async(self) -> tuple[str, str]:
            return self.get_credentials()

    return TokenProvider()


def fetch_google_token(
    account: str,
    *,
    metadata: str | None = None,
    credentials: str = "https://iamcredentials.googleapis.com",
) -> tuple[str, float]:
    """A Google Cloud access token for ``account`` and when it expires.

    The machine's own identity, from the metadata server (``GCE_METADATA_HOST``), asks the IAM Credentials API
    to impersonate the account
    (https://cloud.google.com/iam/docs/reference/credentials/rest/v1/projects.serviceAccounts/generateAccessToken).
    ``account``: its e-mail address, or ``projects/-/serviceAccounts/<address>``.
    """
    host = metadata or "http://" + os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    own = _call(
        f"{host}/computeMetadata/v1/instance/service-accounts/default/token", {"Metadata-Flavor": "Google"}
    )
    name = account if account.startswith("projects/") else f"projects/-/serviceAccounts/{account}"
    answer = _call(
        f"{credentials}/v1/{quote(name, safe='/@-.')}:generateAccessToken",
        {"Authorization": f"Bearer {own['access_token']}", "Content-Type": "application/json"},
        json.dumps({"scope": [_SCOPE]}).encode(),
    )
    return answer["accessToken"], datetime.fromisoformat(answer["expireTime"]).timestamp()


def _call(url: str, headers: dict[str, str], body: bytes | None = None) -> Any:
    request = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as exc:
        with exc:  # it holds the connection
            raise OSError(f"HTTP {exc.code} from {url}") from None
