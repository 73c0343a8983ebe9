"""The parameters that say where a request goes and as whom: their names, their values, and what of them a
caller may set for one request.

What a caller brings is never looked up: no variable of the environment, no profile and no role of this
machine, no file. And it cannot make a deployment's own credentials go to another place than the deployment's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

from ..errors import ConfigError, InvalidRequestError

__all__ = [
    "ADDRESSES",
    "AWS_IDENTITIES",
    "CONNECTION",
    "SECRETS",
    "UNSERVED",
    "brought",
    "from_caller",
    "joined",
    "mapping",
    "named",
    "names",
    "sendable",
    "text",
]

ADDRESSES: Final = ("api_base", "base_url", "aws_bedrock_runtime_endpoint")
# Credentials that are not known here. To leave one out in silence would be another deployment.
UNSERVED: Final = frozenset(
    [
        "aws_external_id",
        "aws_sts_endpoint",
        "aws_web_identity_token",
        "azure_password",
        "azure_username",
        "client_id",
        "client_secret",
        "tenant_id",
        "vertex_credentials",
    ]
)
# Parameters that say where and as whom, and are no part of a request's body.
CONNECTION: Final = UNSERVED | {
    *ADDRESSES,
    "api_key",
    "api_version",
    "organization",
    "project",
    "azure_ad_token",
    "azure_ad_token_provider",
    "azure_deployment",
    "aws_access_key_id",
    "aws_secret_access_key",
    "aws_session_token",
    "aws_region_name",
    "aws_profile_name",
    "aws_role_name",
    "aws_session_name",
    "vertex_project",
    "vertex_location",
    "extra_headers",
    "extra_body",
    "drop_params",
    "additional_drop_params",
    "max_retries",
    "num_retries",
}
# Those of them that are secrets, or may hold one.
SECRETS: Final = frozenset(
    [
        "api_key",
        "azure_ad_token",
        "azure_ad_token_provider",
        "aws_access_key_id",
        "aws_secret_access_key",
        "aws_session_token",
        "extra_headers",
    ]
)
AWS_IDENTITIES: Final = ("aws_access_key_id", "aws_profile_name", "aws_role_name")
_MACHINES: Final = frozenset(["aws_profile_name", "aws_role_name", "aws_session_name"])
_CREDENTIALS: Final = SECRETS - {"extra_headers"}
# Of the deployment's account: nothing for a caller with credentials of another one.
_ACCOUNT: Final = SECRETS | _MACHINES | {"organization", "project"}
_NO_ADDRESS: Final = frozenset(["drop_params", "additional_drop_params", "max_retries", "num_retries"])
_CALLABLE: Final = frozenset(["api_key", "azure_ad_token", "azure_ad_token_provider"])
_COUNTS: Final = ("max_retries", "num_retries")
_ENVIRONMENT: Final = "os.environ/"
_HEADER: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
# They would lead a request, and the credentials with it, to another server, or end it where it does not end.
_REFUSED_HEADERS: Final = frozenset(
    [
        "connection",
        "content-encoding",
        "content-length",
        "expect",
        "helicone-openai-api-base",
        "helicone-target-url",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-portkey-custom-host",
    ]
)
_REFUSED_FIELDS: Final = ("model", "stream")


# --- what a caller brings


def from_caller(overrides: Mapping[str, object]) -> dict[str, Any]:
    """What ``overrides`` say, checked: names of `CONNECTION`; None and empty texts say nothing.

    `InvalidRequestError` names the field that is wrong, or that is not a caller's to set.
    """
    given = {name: value for name, value in overrides.items() if value is not None and value != ""}
    for name, value in given.items():
        if name not in CONNECTION:
            _refuse(name, "there is no such parameter of a connection")
        if name in _MACHINES or name in UNSERVED:
            _refuse(name, "this cannot be set by a request")
        _CHECKS.get(name, _check_text)(name, value)
    for name, other in _PAIRS:
        if name in given and other not in given:
            _refuse(other, f"is missing beside {name}")
    return given


def _refuse(name: str, message: str) -> NoReturn:
    """No value is shown: it may be a secret."""
    raise InvalidRequestError(f"{name}: {message}", param=name)


def _check_text(name: str, value: object) -> None:
    if callable(value) and name in _CALLABLE:
        return
    if not isinstance(value, str):
        _refuse(name, f"expected text, not {type(value).__name__}")
    if value.strip().startswith(_ENVIRONMENT):
        _refuse(name, f"{_ENVIRONMENT} is for settings; a request reads no environment")


def _check_headers(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        _refuse(name, f"expected a mapping, not {type(value).__name__}")
    for header, said in value.items():
        if not isinstance(header, str) or not isinstance(said, str):
            _refuse(name, "expected texts as names and as values")
        if header.lower() in _REFUSED_HEADERS or header.lower().startswith("proxy-"):
            _refuse(name, f"the header {header} cannot be set by a request")
        _check_text(name, said)


def _check_body(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        _refuse(name, f"expected a mapping, not {type(value).__name__}")
    for field in _REFUSED_FIELDS:
        if field in value:
            _refuse(name, f"{field} cannot be set here")


def _check_switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        _refuse(name, f"expected true or false, not {type(value).__name__}")


def _check_names(name: str, value: object) -> None:
    listed = isinstance(value, list | tuple | set | frozenset)
    if not listed or not all(isinstance(item, str) for item in value):  # type: ignore[attr-defined]
        _refuse(name, "expected a list of names")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        _refuse(name, "expected a whole number >= 0")


_CHECKS: Final[Mapping[str, Callable[[str, object], None]]] = {
    "extra_headers": _check_headers,
    "extra_body": _check_body,
    "drop_params": _check_switch,
    "additional_drop_params": _check_names,
    **dict.fromkeys(_COUNTS, _check_count),
}
_PAIRS: Final = (
    ("aws_access_key_id", "aws_secret_access_key"),
    ("aws_secret_access_key", "aws_access_key_id"),
    ("aws_session_token", "aws_access_key_id"),
)


def brought(given: Mapping[str, object]) -> bool:
    """Whether a caller brings credentials: then nobody else's are used."""
    return bool(_CREDENTIALS & given.keys())


def joined(
    connection: Mapping[str, object], given: Mapping[str, object], *, elsewhere: bool
) -> dict[str, object]:
    """A deployment's and a caller's as one. ``elsewhere``: the caller's address is another server's."""
    own = {name: value for name, value in connection.items() if value is not None}
    if elsewhere:
        own = {name: value for name, value in own.items() if name in _NO_ADDRESS}
    elif named(given) is not None:
        own = {name: value for name, value in own.items() if name not in ADDRESSES}
    if brought(given):
        own = {name: value for name, value in own.items() if name not in _ACCOUNT}
    both: dict[str, object] = {
        name: {**mapping(own, name), **mapping(given, name)}
        for name in ("extra_headers", "extra_body")
        if name in own and name in given
    }
    return {**own, **given, **both}


# --- values


def named(connection: Mapping[str, object]) -> str | None:
    """The address that it names."""
    return next(filter(None, (text(connection, name) for name in ADDRESSES)), None)


def text(connection: Mapping[str, object], name: str) -> str | None:
    value = connection.get(name)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{name}: expected text, not {type(value).__name__}", param=name)
    return value or None


def mapping(connection: Mapping[str, object], name: str) -> dict[str, Any]:
    value = connection.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}: expected a mapping, not {type(value).__name__}", param=name)
    return {str(key): item for key, item in value.items()}


def names(connection: Mapping[str, object], name: str) -> list[str]:
    value = connection.get(name) or []
    if isinstance(value, str) or not isinstance(value, list | tuple | set | frozenset):
        raise ConfigError(f"{name}: expected a list of names", param=name)
    return [str(item) for item in value]


def sendable(headers: dict[str, str], param: str) -> dict[str, str]:
    """``headers`` where all are one line of ASCII each. `ConfigError` for ``param``, with no value in it."""
    for name, value in headers.items():
        if _HEADER.match(name) is None or any(ch < " " and ch != "\t" for ch in value) or "\x7f" in value:
            raise ConfigError(f"{param}: a header has a name or a value that it cannot have", param=param)
        if not value.isascii():
            raise ConfigError(f"{param}: the header {name} has a value that is not ASCII", param=param)
    return headers
