"""`Target`: where a request goes and as whom, from a deployment's connection and the caller's own.

The rule about keys: a key goes nowhere but where its owner has sent it.

* A key of the environment (``GROQ_API_KEY``) goes to its provider's own addresses: those of the table, of a
  user's row, and of the environment (``GROQ_API_BASE``). Addresses are compared by scheme, host, port and
  path. It never goes to another address that a deployment names: that one needs an ``api_key``.
* A provider that each user runs or rents at an address of their own (vLLM, Azure, Ollama ...) has no such
  addresses: there the key of the environment goes where the deployment says.
* An ``api_key`` goes where the deployment says.
* A caller who names another server takes nothing there, of the deployment's or of the environment's; and one
  who brings credentials uses these alone.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit

from ..errors import AuthenticationError, ConfigError, InvalidRequestError, ProviderError
from .connection import (
    AWS_IDENTITIES,
    CONNECTION,
    SECRETS,
    brought,
    from_caller,
    joined,
    mapping,
    named,
    names,
    sendable,
    text,
)
from .registry import Provider, Registry, below, origin_of, registry

__all__ = ["CONNECTION", "SECRETS", "Blocking", "Served", "Target", "authorized", "target_of"]

_OTHER_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "aws_region_name": ("AWS_REGION_NAME", "AWS_REGION", "AWS_DEFAULT_REGION"),
    "vertex_project": ("VERTEXAI_PROJECT", "GOOGLE_CLOUD_PROJECT"),
    "vertex_location": ("VERTEXAI_LOCATION", "GOOGLE_CLOUD_LOCATION"),
}
_PLACEHOLDER: Final = re.compile(r"\{(\w+)\}")
_LABEL: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9])?\Z")
_FOUNDRY: Final = (".services.ai.azure.com", ".cognitiveservices.azure.com", ".openai.azure.com")

Environ = Mapping[str, str]
T = TypeVar("T")


class Blocking(Protocol):
    """Runs a function that may block where it holds up nobody but its caller."""

    async def __call__(self, function: Callable[..., T], *args: object) -> T: ...


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
    ``max_output_tokens``: the longest answer of the model, where that is known. ``caller_key``: the
    credentials are the caller's, so that their failure is the caller's too. ``house``: whether credentials of
    this machine may be used. ``connection``: what the deployment and the caller said, all of it.
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
    max_output_tokens: int | None = None
    caller_key: bool = False
    house: bool = True
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


async def _inline(function: Callable[..., T], *args: object) -> T:
    return function(*args)


async def authorized(target: Target, blocking: Blocking = _inline) -> Target:
    """``target`` with the credentials of one request, of its ``token`` where it has one.

    A coroutine function is awaited; any other function may block, and ``blocking`` runs it. What it returns
    may be awaitable; in a sync call it must not be. `AuthenticationError` where it fails.
    """
    if target.token is None:
        return target
    try:
        token = target.token() if _is_async(target.token) else await blocking(target.token)
        if isinstance(token, Awaitable):
            token = await token
    except ProviderError:
        raise
    except Exception as exc:
        raise AuthenticationError("the token provider of the deployment failed", code="no_token") from exc
    if not isinstance(token, str) or not token:
        raise AuthenticationError("the token provider of the deployment gave no token", code="no_token")
    try:
        bearer = sendable({"authorization": f"Bearer {token}"}, "api_key")
    except ConfigError as exc:
        raise AuthenticationError("the token of the deployment cannot be sent", code="no_token") from exc
    return replace(target, headers={**target.headers, **bearer}, token=None)


def _is_async(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object whose __call__ is a coroutine function
    )


def target_of(
    deployment: Served,
    overrides: Mapping[str, object] | None = None,
    *,
    providers: Registry | None = None,
    environ: Environ = os.environ,
) -> Target:
    """Where ``deployment`` is, with what the caller says of it (``overrides``: names of `CONNECTION`).

    `ConfigError` for an address that is missing or no HTTP URL, and for a provider that is not in the table.
    `InvalidRequestError` for what is wrong with the caller's, and for what a caller may not say.
    """
    table = registry() if providers is None else providers
    given = from_caller(overrides or {})
    try:
        return _target(deployment, given, table, environ)
    except ConfigError as exc:
        if exc.param in given or (exc.param == "api_base" and named(given) is not None):
            raise InvalidRequestError(exc.message, param=exc.param) from None
        raise


def _target(deployment: Served, given: Mapping[str, object], table: Registry, environ: Environ) -> Target:
    row = table[deployment.provider]
    elsewhere = _elsewhere(row, deployment.connection, named(given), environ)
    connection = joined(deployment.connection, given, elsewhere=elsewhere)
    there = named(connection)
    row = _owner(row, there, table)
    base, own = _address(row, there, connection, environ)
    house = own and not elsewhere and not brought(given)
    headers, token = _credentials(row, base, connection, environ, house)
    base_model, most = deployment.info.get("base_model"), deployment.info.get("max_output_tokens")
    return Target(
        provider=row,
        model=deployment.model,
        base_url=base,
        base_model=base_model if isinstance(base_model, str) else "",
        api_version=_version(row, connection, environ),
        headers=headers,
        extra_body=mapping(connection, "extra_body"),
        drop_params=connection.get("drop_params") is True,
        drop=frozenset(names(connection, "additional_drop_params")),
        token=token,
        max_output_tokens=most if type(most) is int and most > 0 else None,
        caller_key=bool(SECRETS & given.keys()),
        house=not elsewhere and not brought(given),
        connection=connection,
    )


def _elsewhere(row: Provider, own: Mapping[str, object], theirs: str | None, environ: Environ) -> bool:
    """Whether the caller's address is that of another server than the deployment's."""
    if theirs is None:
        return False
    here = named(own) or next((environ[name] for name in row.api_base_env if environ.get(name)), None)
    if here is not None:
        return origin_of(theirs) != origin_of(here)
    return not (row.serves(theirs) or _at_home(row, theirs, own, environ))


def _owner(row: Provider, there: str | None, table: Registry) -> Provider:
    """Whose server it is: ``openai/grok-4`` at xAI's address is xAI's."""
    if there is None or row.adapter != "openai" or row.serves(there):
        return row
    other = table.at(there)
    return other if other is not None and other.adapter == "openai" else row


def _address(
    row: Provider, there: str | None, connection: Mapping[str, object], environ: Environ
) -> tuple[str, bool]:
    """The base URL, and whether keys of the environment may go there."""
    if there is not None:
        base = _based(row, there, "api_base")
        return base, row.self_hosted or row.serves(base) or _at_home(row, base, connection, environ)
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
    """Whether ``base`` is the table's, with its blanks filled, or the environment's."""
    if any(below(base, environ[name]) for name in row.api_base_env if environ.get(name)):
        return True
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
        value = text(connection, name) or next((environ[one] for one in names if environ.get(one)), None)
        if value is None:
            return None
        # It becomes part of the host, or of the path: no more than one label of it.
        if _LABEL.match(value) is None:
            raise ConfigError(f"{name}: expected letters, digits and dashes", param=name)
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
        value = text(connection, name) or (environ.get("OPENAI_ORG_ID") if _openais(row, name, own) else None)
        if value:
            headers |= sendable({header: value}, name)
    extra = {name.lower(): value for name, value in mapping(connection, "extra_headers").items()}
    sendable(headers, "api_key")
    headers |= sendable({name: str(value) for name, value in extra.items()}, "extra_headers")
    return headers, None if "authorization" in extra else token


def _key(
    row: Provider, connection: Mapping[str, object], environ: Environ, own: bool
) -> tuple[str | None, Callable[[], object] | None]:
    for name in ("api_key", "azure_ad_token_provider", "azure_ad_token"):
        value = connection.get(name)
        if callable(value):
            return None, value
        if isinstance(value, str) and value:
            return value.strip(), None
    # A deployment that says who it is on AWS is nobody else, whoever the environment is.
    signs = row.adapter == "bedrock" and any(connection.get(name) for name in AWS_IDENTITIES)
    if not own or signs:
        return None, None
    if callable(row.auth):
        return None, row.auth
    found = next((environ[name] for name in row.api_key_env if environ.get(name)), None)
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


def _version(row: Provider, connection: Mapping[str, object], environ: Environ) -> str | None:
    named = text(connection, "api_version")
    if named is not None or row.adapter != "azure":
        return named
    return environ.get("AZURE_API_VERSION") or environ.get("OPENAI_API_VERSION") or None
