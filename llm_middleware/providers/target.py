"""`Target`: where a request goes and as whom, from a deployment's connection and the caller's own.

The rule about keys: a key goes nowhere but where its owner has sent it.

* A key of the environment (``GROQ_API_KEY``) goes to its provider's own addresses: those of the table, of a
  user's row, and of the environment (``GROQ_API_BASE``). Addresses are compared by scheme, host, port and
  path. It never goes to another address that a deployment names: that one needs an ``api_key``.
* A provider that each user runs or rents at an address of their own (vLLM, Azure, Ollama ...) has no such
  addresses: there the key of the environment goes where the deployment says.
* An ``api_key`` goes where the deployment says.
* A caller who names another address takes nothing of the deployment's there, and nothing of the environment's
  but to a provider's own address.
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol
from urllib.parse import urlsplit, urlunsplit

from ..errors import AuthenticationError, ConfigError
from .registry import Provider, Registry, below, origin_of, registry

__all__ = ["CONNECTION", "SECRETS", "Served", "Target", "authorized", "target_of"]

# Parameters that say where and as whom, and are no part of a request's body.
CONNECTION: Final = frozenset(
    [
        "api_key",
        "api_base",
        "base_url",
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
        "aws_bedrock_runtime_endpoint",
        "vertex_project",
        "vertex_location",
        "extra_headers",
        "extra_body",
        "drop_params",
        "additional_drop_params",
        "max_retries",
        "num_retries",
    ]
)
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
_ADDRESS_NAMES: Final = ("api_base", "base_url", "aws_bedrock_runtime_endpoint")
_NO_ADDRESS: Final = frozenset(["drop_params", "additional_drop_params", "max_retries", "num_retries"])
_OTHER_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "aws_region_name": ("AWS_REGION_NAME", "AWS_REGION", "AWS_DEFAULT_REGION"),
    "vertex_project": ("VERTEXAI_PROJECT", "GOOGLE_CLOUD_PROJECT"),
    "vertex_location": ("VERTEXAI_LOCATION", "GOOGLE_CLOUD_LOCATION"),
}
_PLACEHOLDER: Final = re.compile(r"\{(\w+)\}")
_LABEL: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?\Z")
_HEADER: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
_FOUNDRY: Final = (".services.ai.azure.com", ".cognitiveservices.azure.com", ".openai.azure.com")

Environ = Mapping[str, str]


class Served(Protocol):
    """What a deployment says of itself here."""

    @property
    def provider(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def connection(self) -> Mapping[str, object]: ...
    @property
    def info(self) -> Mapping[str, object]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One address, ready for requests.

    ``adapter``: whose API it has. ``base_url``: with no slash at its end. ``headers``: names in lower case;
    credentials, organization and extra headers. ``token``: gives the credentials of each request instead;
    `authorized` asks it. ``base_model``: the model's own name, where ``model`` is the user's name for it.
    ``caller_key``: the credentials are the caller's, so that their failure is the caller's too.
    ``connection``: what the deployment and the caller said, all of it.
    """

    provider: Provider
    model: str
    base_url: str
    base_model: str = ""
    api_version: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    extra_body: Mapping[str, object] = field(default_factory=dict, repr=False)
    drop_params: bool = False
    drop: frozenset[str] = frozenset()
    token: Callable[[], object] | None = field(default=None, repr=False)
    caller_key: bool = False
    connection: Mapping[str, object] = field(default_factory=dict, repr=False)

    @property
    def adapter(self) -> str:
        return self.provider.adapter

    def secrets(self) -> tuple[str, ...]:
        """Texts that no message may show: credentials, the host, and the user's name for the deployment."""
        parts = urlsplit(self.base_url)
        found = {value for value in self.headers.values() if len(value) > 7}
        found |= {value.partition(" ")[2] for value in found if value.lower().startswith("bearer ")}
        found |= {text for name in SECRETS if isinstance(text := self.connection.get(name), str)}
        found |= {parts.netloc, parts.hostname or ""}
        if self.adapter == "azure":
            found.add(self.model)
        return tuple(sorted((text for text in found if text), key=len, reverse=True))


async def authorized(target: Target) -> Target:
    """``target`` with the credentials of one request. Asks its ``token`` where it has one, which may be
    awaitable; in a sync call it must not be. `AuthenticationError` where it fails."""
    if target.token is None:
        return target
    try:
        token = target.token()
        if isinstance(token, Awaitable):
            token = await token
    except Exception as exc:
        raise AuthenticationError("the token provider of the deployment failed", code="no_token") from exc
    if not isinstance(token, str) or not token:
        raise AuthenticationError("the token provider of the deployment gave no token", code="no_token")
    bearer = _checked({"authorization": f"Bearer {token}"})
    return replace(target, headers={**target.headers, **bearer}, token=None)


def target_of(
    deployment: Served,
    overrides: Mapping[str, object] | None = None,
    *,
    providers: Registry | None = None,
    environ: Environ = os.environ,
) -> Target:
    """Where ``deployment`` is, with what the caller says of it (``overrides``: names of `CONNECTION`).

    `ConfigError` for an address that is missing or no HTTP URL, and for a provider that is not in the table.
    """
    table = registry() if providers is None else providers
    row = table[deployment.provider]
    connection, elsewhere = _joined(deployment.connection, overrides or {})
    named = _named(connection)
    row = _owner(row, named, table)
    base, own = _address(row, named, connection, environ, elsewhere)
    headers, token = _credentials(row, base, connection, environ, own)
    info = deployment.info.get("base_model")
    return Target(
        provider=row,
        model=deployment.model,
        base_url=base,
        base_model=info if isinstance(info, str) else "",
        api_version=_version(row, connection, environ),
        headers=headers,
        extra_body=_mapping(connection, "extra_body"),
        drop_params=connection.get("drop_params") is True,
        drop=frozenset(_names(connection, "additional_drop_params")),
        token=token,
        caller_key=any((overrides or {}).get(name) is not None for name in SECRETS),
        connection=connection,
    )


def _joined(
    connection: Mapping[str, object], overrides: Mapping[str, object]
) -> tuple[dict[str, object], bool]:
    """Both as one, and whether the caller names an address of another server."""
    own = {name: value for name, value in connection.items() if value is not None}
    given = {name: value for name, value in overrides.items() if value is not None}
    theirs, here = _named(given), _named(own)
    elsewhere = theirs is not None and (here is None or origin_of(theirs) != origin_of(here))
    if elsewhere:
        own = {name: value for name, value in own.items() if name in _NO_ADDRESS}
    elif theirs is not None:
        own = {name: value for name, value in own.items() if name not in _ADDRESS_NAMES}
    if SECRETS & given.keys() - {"extra_headers"}:
        own = {name: value for name, value in own.items() if name not in SECRETS}
    for name in ("extra_headers", "extra_body"):
        if name in own and name in given:
            given[name] = {**_mapping(own, name), **_mapping(given, name)}
    return {**own, **given}, elsewhere


def _owner(row: Provider, named: str | None, table: Registry) -> Provider:
    """Whose server it is: ``openai/grok-4`` at xAI's address is xAI's."""
    if named is None or row.adapter != "openai" or row.serves(named):
        return row
    other = table.at(named)
    return other if other is not None and other.adapter == "openai" else row


def _address(
    row: Provider, named: str | None, connection: Mapping[str, object], environ: Environ, elsewhere: bool
) -> tuple[str, bool]:
    """The base URL, and whether keys of the environment may go there."""
    if named is not None:
        base = _based(row, named, "api_base")
        own = row.serves(base) or _at_home(row, base, connection, environ)
        return base, own or (row.self_hosted and not elsewhere)
    for name in row.api_base_env:
        if environ.get(name):
            return _based(row, environ[name], name), True
    home = _home(row, connection, environ)
    if home is not None:
        return _based(row, home, "base_url"), True
    if row.adapter == "bedrock":
        return "", True  # boto3 finds it
    blanks = dict.fromkeys(_PLACEHOLDER.findall(row.base_url or ""))
    needs = " and ".join(blanks) if blanks else " or ".join(["api_base", *row.api_base_env[:1]])
    raise ConfigError(f"{row.name} needs {needs}", param=next(iter(blanks), "api_base"))


def _at_home(row: Provider, base: str, connection: Mapping[str, object], environ: Environ) -> bool:
    """Whether ``base`` is the table's, with its blanks filled."""
    if "{" not in (row.base_url or ""):
        return False
    home = _home(row, connection, environ)
    return home is not None and below(base, home)


def _home(row: Provider, connection: Mapping[str, object], environ: Environ) -> str | None:
    """The table's base URL with its blanks filled; None where one stays empty."""
    if row.base_url is None or "{" not in row.base_url:
        return row.base_url
    filled = {}
    for name in set(_PLACEHOLDER.findall(row.base_url)):
        names = _OTHER_NAMES.get(name, (name.upper(),))
        value = _text(connection, name) or next((environ[one] for one in names if environ.get(one)), None)
        if value is None:
            return None
        # It becomes part of the host: no more than a label of it.
        if _LABEL.match(value) is None:
            raise ConfigError(f"{name}: expected letters, digits, dots and dashes", param=name)
        filled[name] = value
    return _PLACEHOLDER.sub(lambda match: filled[match[1]], row.base_url)


def _based(row: Provider, url: str, param: str) -> str:
    url = url.strip()
    if origin_of(url) is None:
        raise ConfigError(f"{param}: expected an http:// or https:// URL with no user name", param=param)
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    if row.suffix and f"{row.suffix}/" not in f"{path}/":
        path += row.suffix
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


# --- credentials


def _credentials(
    row: Provider, base: str, connection: Mapping[str, object], environ: Environ, own: bool
) -> tuple[dict[str, str], Callable[[], object] | None]:
    """The headers, and what gives a token for each request."""
    headers: dict[str, str] = dict(row.headers)
    key, token = _key(row, connection, environ, own)
    strategy = _strategy(row, base)
    if connection.get("azure_ad_token") and connection.get("api_key") is None:
        strategy = "bearer"
    if key is not None and strategy == "bearer":
        headers["authorization"] = f"Bearer {key}"
    elif key is not None and strategy != "none":
        headers[strategy] = key
    for name, header in (("organization", "openai-organization"), ("project", "openai-project")):
        value = _text(connection, name) or (
            environ.get("OPENAI_ORG_ID") if _openais(row, name, own) else None
        )
        if value:
            headers[header] = value
    extra = {name.lower(): value for name, value in _mapping(connection, "extra_headers").items()}
    headers |= {name: str(value) for name, value in extra.items()}
    return _checked(headers), None if "authorization" in extra else token


def _key(
    row: Provider, connection: Mapping[str, object], environ: Environ, own: bool
) -> tuple[str | None, Callable[[], object] | None]:
    for name in ("api_key", "azure_ad_token_provider", "azure_ad_token"):
        value = connection.get(name)
        if callable(value):
            return None, value
        if isinstance(value, str) and value:
            return value.strip(), None
    if own and callable(row.auth):
        return None, row.auth
    found = next((environ[name] for name in row.api_key_env if environ.get(name)), None) if own else None
    return (found.strip() if found else None), None


def _strategy(row: Provider, base: str) -> str:
    """How the key is sent there: ``bearer``, ``none`` or the name of a header."""
    if callable(row.auth):
        return "bearer"
    if row.auth == "azure_ai":
        host = urlsplit(base).hostname or ""
        return "api-key" if host.endswith(_FOUNDRY) else "bearer"
    return row.auth.lower()


def _openais(row: Provider, name: str, own: bool) -> bool:
    return own and name == "organization" and row.name == "openai"


def _checked(headers: dict[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        if _HEADER.match(name) is None or any(ch < " " and ch != "\t" for ch in value) or "\x7f" in value:
            raise ConfigError("a header has a name or a value that it cannot have", param="extra_headers")
        if not value.isascii():
            raise ConfigError(f"the header {name} has a value that is not ASCII", param="extra_headers")
    return headers


def _version(row: Provider, connection: Mapping[str, object], environ: Environ) -> str | None:
    named = _text(connection, "api_version")
    if named is not None or row.adapter != "azure":
        return named
    return environ.get("AZURE_API_VERSION") or environ.get("OPENAI_API_VERSION") or None


# --- values of a connection


def _named(connection: Mapping[str, object]) -> str | None:
    """The address that it names."""
    return next(filter(None, (_text(connection, name) for name in _ADDRESS_NAMES)), None)


def _text(connection: Mapping[str, object], name: str) -> str | None:
    value = connection.get(name)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{name}: expected text, not {type(value).__name__}", param=name)
    return value or None


def _mapping(connection: Mapping[str, object], name: str) -> dict[str, Any]:
    value = connection.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}: expected a mapping, not {type(value).__name__}", param=name)
    return {str(key): item for key, item in value.items()}


def _names(connection: Mapping[str, object], name: str) -> list[str]:
    value = connection.get(name) or []
    if isinstance(value, str) or not isinstance(value, list | tuple | set | frozenset):
        raise ConfigError(f"{name}: expected a list of names", param=name)
    return [str(item) for item in value]
