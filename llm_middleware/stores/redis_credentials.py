"""Passwords that expire: tokens of an identity service, fetched beside the requests and kept while they last.

A token is fetched on a thread of its own, once for all who wait, whichever face they use: whoever needs it
waits no longer than its own budget, and the fetch goes on for the next one. A token that is valid but old is
used while its successor is fetched. Google Cloud and Entra ID give tokens; for AWS this process signs them.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import importlib.util
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlencode

from ..errors import ConfigError, StoreError
from ..types import Clock
from .redis_deadline import remaining

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from .redis_settings import RedisSettings

__all__ = [
    "AwsIam",
    "EntraId",
    "FetchToken",
    "TokenSource",
    "credential_provider",
    "fetch_entra_token",
    "fetch_google_token",
    "read_aws_iam",
    "read_entra_id",
    "sign_aws_token",
    "token_source",
]

FetchToken = Callable[[str], tuple[str, float]]
"""From an account's name to its token and the moment (seconds since the epoch) at which that expires."""

_REFRESH: Final = 300.0  # seconds before its end, at most a quarter of its life, when a successor is fetched
_LAST: Final = 10.0  # seconds before its end, at most a tenth of its life, when a token is no longer used
_PAUSE: Final = 1.0  # seconds from one answer of the identity service, good or bad, to the next question
_PATIENCE: Final = 10.0  # seconds that one answer may take
_SCOPE: Final = "https://www.googleapis.com/auth/cloud-platform"
_AWS_LIFE: Final = 900  # seconds, the longest that ElastiCache allows
_ENTRA_RESOURCE: Final = "https://redis.azure.com/"


@dataclass(frozen=True, slots=True, kw_only=True)
class AwsIam:
    """A user of an ElastiCache whose password is signed with this process's AWS credentials.
    ``cache``: the name, not the address, of the replication group or the serverless cache."""

    user: str
    cache: str
    region: str
    serverless: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EntraId:
    """An identity of Microsoft Entra ID: a service principal where there is a secret, else a managed one, of
    which ``client`` picks one."""

    client: str | None = None
    tenant: str | None = None
    secret: str | None = field(default=None, repr=False)


def read_aws_iam(values: Mapping[str, Any]) -> AwsIam | None:
    """What ``aws_iam_auth`` and its companions say. `ConfigError` where one is missing, and without TLS."""
    if not values.get("aws_iam_auth"):
        return None
    for name in ("aws_iam_user_name", "aws_iam_cache_name", "aws_iam_region"):
        if not values.get(name):
            raise ConfigError(f"aws_iam_auth needs {name}", param=name)
    if not values.get("ssl"):
        raise ConfigError("aws_iam_auth needs ssl: the token is for connections over TLS only", param="ssl")
    if importlib.util.find_spec("botocore") is None:
        raise ConfigError("aws_iam_auth needs botocore: pip install 'llm-middleware[s3]'")
    user, cache, region = (values[f"aws_iam_{name}"] for name in ("user_name", "cache_name", "region"))
    return AwsIam(user=user, cache=cache, region=region, serverless=values.get("aws_iam_serverless", False))


def read_entra_id(values: Mapping[str, Any]) -> EntraId | None:
    """What ``azure_redis_ad_token`` and its companions say. `ConfigError` for half a service principal."""
    if not values.get("azure_redis_ad_token"):
        return None
    client, tenant = values.get("azure_client_id"), values.get("azure_tenant_id")
    secret = values.get("azure_client_secret")
    if secret is not None and not (client and tenant):
        missing = "azure_tenant_id" if client else "azure_client_id"
        raise ConfigError(f"azure_client_secret needs {missing}", param=missing)
    return EntraId(client=client, tenant=tenant, secret=secret)


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
                raise self._no_token(exc) from exc
            self._check()

    async def await_(self) -> None:
        """`wait`, for a coroutine; the caller times it."""
        if not self.current():
            try:
                await asyncio.shield(asyncio.wrap_future(self._start()))
            except Exception as exc:
                raise self._no_token(exc) from exc
            self._check()

    def reject(self) -> None:
        """The server refused the token: it is not used again."""
        self._token, self._refresh_at = "", 0.0

    def secrets(self) -> list[str]:
        """What no message may hold: the last token, refused or not."""
        return [self._seen] if self._seen else []

    def _check(self) -> None:
        if not self.current():
            raise StoreError(f"the token for {self._account} was refused or is over")

    def _no_token(self, exc: Exception) -> StoreError:
        return StoreError(f"no token for {self._account}: {type(exc).__name__}: {exc}")

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


def token_source(settings: RedisSettings, fetch: FetchToken | None = None) -> TokenSource | None:
    """The source for the identity in ``settings``, if any. ``fetch``: used instead of the identity's own."""
    if settings.gcp_service_account is not None:
        return TokenSource(fetch or fetch_google_token, settings.gcp_service_account)
    if settings.aws_iam is not None:
        sign = functools.partial(sign_aws_token, identity=settings.aws_iam)
        return TokenSource(fetch or sign, settings.aws_iam.user)
    if settings.entra_id is not None:
        ask = functools.partial(fetch_entra_token, identity=settings.entra_id)
        return TokenSource(fetch or ask, settings.entra_id.client or "this machine")
    return None


def credential_provider(tokens: TokenSource, settings: RedisSettings) -> CredentialProvider:
    """redis-py's view of a token source: what is in hand, without waiting.

    redis-py would keep a connection whose handshake is cancelled half-way, so waiting is done before it.
    """
    from redis.credentials import CredentialProvider
    from redis.exceptions import AuthenticationError

    username: str | None = settings.arguments.get("username")

    class TokenProvider(CredentialProvider):
        def get_credentials(self) -> tuple[str, str]:
            token = tokens.current()
            if not token:
                raise AuthenticationError("no token yet")
            if username is None and settings.entra_id is not None:
                return _object_id(token), token
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


def sign_aws_token(user: str, *, identity: AwsIam) -> tuple[str, float]:
    """A token for an ElastiCache and when it expires: a presigned request, less its scheme
    (https://docs.aws.amazon.com/AmazonElastiCache/latest/dg/auth-iam.html). botocore finds the credentials
    where it always does."""
    from botocore.model import ServiceId
    from botocore.session import get_session
    from botocore.signers import RequestSigner

    session = get_session()
    credentials = session.get_credentials()
    if credentials is None:
        raise OSError("no AWS credentials found")
    events = session.get_component("event_emitter")
    signer = RequestSigner(
        ServiceId("elasticache"), identity.region, "elasticache", "v4", credentials, events
    )
    asked = {"Action": "connect", "User": user}
    if identity.serverless:
        asked["ResourceType"] = "ServerlessCache"
    url = f"https://{identity.cache.lower()}/?{urlencode(asked)}"
    request = {"method": "GET", "url": url, "body": {}, "headers": {}, "context": {}}
    expires = time.time() + _AWS_LIFE
    signed: str = signer.generate_presigned_url(
        request, operation_name="connect", expires_in=_AWS_LIFE, region_name=identity.region
    )
    return signed.removeprefix("https://"), expires


def fetch_entra_token(
    account: str,
    *,
    identity: EntraId,
    metadata: str = "http://169.254.169.254",
    authority: str = "https://login.microsoftonline.com",
) -> tuple[str, float]:
    """A token of Entra ID for an Azure Redis and when it expires.

    A service principal's by its secret
    (https://learn.microsoft.com/entra/identity-platform/v2-oauth2-client-creds-grant-flow), a managed
    identity's from the machine's metadata service
    (https://learn.microsoft.com/entra/identity/managed-identities-azure-resources/how-to-use-vm-token).
    """
    now = time.time()
    if identity.secret is not None:
        form = {
            "grant_type": "client_credentials",
            "client_id": identity.client,
            "client_secret": identity.secret,
            "scope": f"{_ENTRA_RESOURCE}.default",
        }
        url = f"{authority}/{quote(str(identity.tenant), safe='')}/oauth2/v2.0/token"
        answer = _call(url, {}, urlencode(form).encode())
    else:
        query = {"api-version": "2018-02-01", "resource": _ENTRA_RESOURCE}
        query |= {"client_id": identity.client} if identity.client else {}
        url = f"{metadata}/metadata/identity/oauth2/token?{urlencode(query)}"
        answer = _call(url, {"Metadata": "true"})
    return answer["access_token"], now + float(answer["expires_in"])


def _object_id(token: str) -> str:
    """Whose token of Entra ID this is: the name that an Azure Redis knows the identity by."""
    claims = token.split(".")[1]
    oid: str = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["oid"]
    return oid


def _call(url: str, headers: dict[str, str], body: bytes | None = None) -> Any:
    request = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as exc:
        with exc:  # it holds the connection
            raise OSError(f"HTTP {exc.code} from {url}") from None
