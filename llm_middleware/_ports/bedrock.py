"""`BedrockSigner`: requests to Bedrock with AWS's signature, by the credentials that boto3 finds. It is the
`Signer` of `providers.adapters`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final
from urllib.parse import urlsplit

from ..errors import AuthenticationError, ConfigError
from ..providers.connection import AWS_IDENTITIES
from ..providers.messages import Outgoing
from ..providers.target import Target

__all__ = ["BedrockSigner"]

_NAMES: Final = (
    "aws_access_key_id",
    "aws_secret_access_key",
    "aws_session_token",
    "aws_profile_name",
    "aws_region_name",
    "aws_role_name",
    "aws_session_name",
)
_MOST: Final = 256  # sessions that are kept
_AWS: Final = (".amazonaws.com", ".amazonaws.com.cn", ".api.aws")
_ELSEWHERE: Final = "credentials of the environment go to AWS only: the deployment needs its own"
_NOT_YOURS: Final = "a request with an address or a key of its own needs all of its AWS credentials"
_SIGNED: Final = ("authorization", "x-amz-date", "x-amz-security-token")


class BedrockSigner:
    """Signs for any number of deployments, from any thread. Nothing is imported before it is used, and
    credentials that expire are renewed in time.

    It may block while credentials are fetched, unless `ready` says that they are here: call it in a thread
    where that matters.
    """

    def __init__(self) -> None:
        self._sessions: dict[tuple[object, ...], tuple[Any, Any]] = {}
        self._opening: dict[tuple[object, ...], threading.Lock] = {}
        self._lock = threading.Lock()  # held for no longer than a look takes

    def ready(self, target: Target) -> bool:
        """Whether `located` and `signed` return at once."""
        if "authorization" in target.headers and (target.base_url or _region_named(target)):
            return True
        found = self._sessions.get(_key(target))
        if found is None:
            return False
        renewed = getattr(found[1], "refresh_needed", None)  # credentials that do not expire have none
        return renewed is None or not renewed()

    def located(self, target: Target) -> Target:
        """``target`` with an address: its own, or its region's, which may come from AWS's configuration.
        `ConfigError` where there is no region."""
        if target.base_url:
            return target
        return replace(target, base_url=f"https://bedrock-runtime.{self._region(target)}.amazonaws.com")

    def signed(self, target: Target, request: Outgoing) -> Outgoing:
        """``request`` with a signature (AWS Signature Version 4); as it is where it has an API key.
        `AuthenticationError` where there are no credentials."""
        if "authorization" in request.headers:
            return request
        _check_owner(target)
        _, credentials = self._session(target)
        from botocore.auth import SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            frozen = credentials.get_frozen_credentials() if credentials is not None else None
        except (BotoCoreError, ClientError) as exc:
            raise AuthenticationError("the deployment's AWS credentials could not be had") from exc
        if frozen is None or not frozen.access_key:
            raise AuthenticationError("the deployment has no AWS credentials", code="no_credentials")
        # Only what no proxy changes is signed.
        content = {"content-type": request.headers["content-type"]}
        signing = AWSRequest(request.method, request.url, content, request.body)
        SigV4Auth(frozen, "bedrock", self._region(target)).add_auth(signing)
        made = {name.lower(): value for name, value in signing.headers.items()}
        headers = request.headers | {name: made[name] for name in _SIGNED if name in made}
        return replace(request, headers=headers)

    def _region(self, target: Target) -> str:
        region = _region_named(target) or self._session(target)[0].region_name
        if not isinstance(region, str) or not (region.isascii() and region.replace("-", "").isalnum()):
            raise ConfigError("bedrock needs aws_region_name", param="aws_region_name")
        return region

    def _session(self, target: Target) -> tuple[Any, Any]:
        """The session of a deployment, and its credentials, which renew themselves."""
        key = _key(target)
        found = self._sessions.get(key)
        if found is not None:
            return found
        # One opens it, and the others wait for that; nobody waits for another deployment's.
        with self._lock:
            opening = self._opening.setdefault(key, threading.Lock())
        with opening:
            found = self._sessions.get(key)
            if found is None:
                try:
                    found = _opened(target.connection)
                    self._keep(key, found)
                finally:
                    self._opening.pop(key, None)
            return found

    def _keep(self, key: tuple[object, ...], found: tuple[Any, Any]) -> None:
        if found[1] is None:  # what gives them may be there the next time
            return
        with self._lock:
            if len(self._sessions) >= _MOST:
                del self._sessions[next(iter(self._sessions))]  # callers may bring credentials of their own
            self._sessions[key] = found


def _key(target: Target) -> tuple[object, ...]:
    return tuple(target.connection.get(name) for name in _NAMES)


def _check_owner(target: Target) -> None:
    """Credentials of this machine go nowhere but to AWS, and not for a caller who says where, or who."""
    if any(target.connection.get(name) for name in AWS_IDENTITIES):
        return
    if not target.house:
        raise AuthenticationError(_NOT_YOURS, code="no_credentials")
    if not (urlsplit(target.base_url).hostname or "").endswith(_AWS):
        raise AuthenticationError(_ELSEWHERE, code="no_credentials")


def _region_named(target: Target) -> object:
    return target.connection.get("aws_region_name") or _region_in(target.base_url)


def _region_in(url: str) -> str | None:
    """``https://bedrock-runtime.eu-west-1.amazonaws.com``, and the like of a VPC endpoint, name one."""
    words = (urlsplit(url).hostname or "").split(".")
    at = next((place for place, word in enumerate(words) if word.startswith("bedrock-runtime")), None)
    return words[at + 1] if at is not None and len(words) > at + 3 else None


def _opened(connection: Mapping[str, object]) -> tuple[Any, Any]:
    try:
        import boto3
    except ImportError as exc:
        message = "bedrock needs boto3: pip install 'llm-middleware[bedrock]'"
        raise ConfigError(message, param="provider") from exc
    from botocore.exceptions import BotoCoreError

    try:
        session = boto3.Session(
            aws_access_key_id=connection.get("aws_access_key_id"),
            aws_secret_access_key=connection.get("aws_secret_access_key"),
            aws_session_token=connection.get("aws_session_token"),
            profile_name=connection.get("aws_profile_name"),
            region_name=connection.get("aws_region_name"),
        )
        role = connection.get("aws_role_name")
        return session, session.get_credentials() if role is None else _assumed(session, connection)
    except BotoCoreError as exc:
        raise ConfigError("the deployment's AWS settings are wrong", param="aws_profile_name") from exc


def _assumed(session: Any, connection: Mapping[str, object]) -> Any:
    """Credentials of a role, renewed through STS before they expire."""
    from botocore.credentials import DeferredRefreshableCredentials, create_assume_role_refresher

    named = connection.get("aws_session_name") or "llm-middleware"
    params = {"RoleArn": connection["aws_role_name"], "RoleSessionName": named}
    client = session.client("sts", region_name=session.region_name or "us-east-1")
    refresher = create_assume_role_refresher(client, params)
    return DeferredRefreshableCredentials(refresh_using=refresher, method="sts-assume-role")
