"""Where Redis is and how to reach it: arguments, a URL and the environment, read into one frozen record.

Three sources, the later wins: ``REDIS_*`` variables, the parts of a URL, arguments. An address among the
arguments (one of ``sentinel_nodes``, ``redis_startup_nodes``, ``url``, ``unix_socket_path``, ``host``) makes
every address in the environment void, so that half of one server is never mixed with half of another.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import ssl
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from ..errors import ConfigError, did_you_mean
from .redis_credentials import AwsIam, EntraId, read_aws_iam, read_entra_id

__all__ = ["COMMON_NAMES", "Node", "RedisSettings", "known_names", "read_settings"]

Node = tuple[str, int]
Topology = Literal["standalone", "cluster", "sentinel"]

# They exclude each other as arguments; in the environment the first one counts.
_ADDRESSES: Final = ("sentinel_nodes", "redis_startup_nodes", "url", "unix_socket_path", "host")
_TOPOLOGIES: Final[Mapping[str, Topology]] = {
    "sentinel_nodes": "sentinel",
    "redis_startup_nodes": "cluster",
}
_OWN: Final = (
    "url",
    "redis_startup_nodes",
    "sentinel_nodes",
    "service_name",
    "sentinel_username",
    "sentinel_password",
    "gcp_service_account",
    "gcp_ssl_ca_certs",
    "aws_iam_auth",
    "aws_iam_user_name",
    "aws_iam_cache_name",
    "aws_iam_region",
    "aws_iam_serverless",
    "azure_redis_ad_token",
    "azure_client_id",
    "azure_tenant_id",
    "azure_client_secret",
)
_SWITCHES: Final = frozenset({"aws_iam_auth", "aws_iam_serverless", "azure_redis_ad_token"})
# Who vouches for this process instead of a password. One of them at most.
_IDENTITIES: Final = ("gcp_service_account", "aws_iam_auth", "azure_redis_ad_token")
COMMON_NAMES: Final = frozenset(
    [
        *_OWN,
        "host",
        "port",
        "db",
        "username",
        "password",
        "unix_socket_path",
        "max_connections",
        "socket_timeout",
        "socket_connect_timeout",
        "socket_keepalive",
        "health_check_interval",
        "client_name",
        "protocol",
        "ssl",
        "ssl_ca_certs",
        "ssl_ca_data",
        "ssl_ca_path",
        "ssl_cert_reqs",
        "ssl_certfile",
        "ssl_check_hostname",
        "ssl_ciphers",
        "ssl_keyfile",
        "ssl_min_version",
        "ssl_password",
    ]
)
"""The names of settings that mean a Redis even where redis-py, which knows more, is not installed."""
_VARIABLES: Final = {
    "redis_startup_nodes": ("REDIS_CLUSTER_NODES",),
    "aws_iam_region": ("REDIS_AWS_IAM_REGION", "AWS_REGION", "AWS_DEFAULT_REGION"),
    "azure_redis_ad_token": ("REDIS_AZURE_AD_TOKEN",),
    "azure_client_id": ("AZURE_CLIENT_ID",),
    "azure_tenant_id": ("AZURE_TENANT_ID",),
    "azure_client_secret": ("AZURE_CLIENT_SECRET",),
}
_SECRET: Final = frozenset({"password", "sentinel_password", "ssl_password", "url", "azure_client_secret"})
# The store speaks bytes, over pools of its own: these are not for the caller to set.
_FIXED: Final = frozenset(
    [
        "connection_pool",
        "single_connection_client",
        "decode_responses",
        "encoding",
        "encoding_errors",
        "cache",
        "cache_config",
        "retry",
        "oss_cluster_maint_notifications_handler",
    ]
)
_TRUE: Final = frozenset({"1", "true", "t", "yes", "y", "on"})
_FALSE: Final = frozenset({"0", "false", "f", "no", "n", "off"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisSettings:
    """How to reach one Redis. ``nodes`` are a Cluster's startup nodes or the sentinels; ``arguments`` are
    those of ``redis.Redis`` that were given, in the types it takes. What is secret is not in the ``repr``."""

    topology: Topology
    nodes: tuple[Node, ...] = ()
    service_name: str | None = None
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    gcp_service_account: str | None = None
    aws_iam: AwsIam | None = None
    entra_id: EntraId | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def secrets(self) -> list[str]:
        """The strings that no message may hold."""
        found = [self.sentinel_password, self.arguments.get("password"), self.arguments.get("ssl_password")]
        found += [self.entra_id.secret] if self.entra_id is not None else []
        return [secret for secret in found if isinstance(secret, str) and secret]


def known_names() -> tuple[str, ...]:
    """Every name that `read_settings` knows. `ConfigError` where redis-py is missing."""
    return (*_OWN, *_argument_kinds())


def read_settings(mapping: Mapping[str, object], environ: Mapping[str, str]) -> RedisSettings:
    """The settings in ``mapping`` (None: not given) and ``environ``.

    `ConfigError` for a name that neither this library nor ``redis.Redis`` knows (it says which is nearest),
    for a value of another type, for settings that exclude each other, and where redis-py is missing.
    """
    explicit = {name: value for name, value in mapping.items() if value is not None}
    _check_names(explicit)
    variables = _variables(environ)
    address = _address(explicit) or _address(variables) or "host"
    if _address(explicit):
        variables = {name: value for name, value in variables.items() if name not in _ADDRESSES}
    url = explicit.get("url", variables.get("url")) if address == "url" else None
    values = {**variables, **(_parse_url(url) if url is not None else {}), **explicit}
    values = {name: _convert(name, value) for name, value in values.items() if name != "url"}
    _check_together(address, explicit, values)
    return _settings(address, values)


def _settings(address: str, values: Mapping[str, Any]) -> RedisSettings:
    arguments = {name: value for name, value in values.items() if name not in _OWN and name not in _FIXED}
    if "gcp_ssl_ca_certs" in values:
        arguments = {"ssl": True, "ssl_ca_certs": values["gcp_ssl_ca_certs"], **arguments}
    if address in _TOPOLOGIES:
        arguments = {name: v for name, v in arguments.items() if name not in ("host", "port")}
    if address != "unix_socket_path" and address != "url":
        arguments.pop("unix_socket_path", None)
    aws_iam = read_aws_iam(values)
    if aws_iam is not None:
        arguments["username"] = aws_iam.user
    return RedisSettings(
        topology=_TOPOLOGIES.get(address, "standalone"),
        nodes=values.get(address, ()) if address in _TOPOLOGIES else (),
        service_name=values.get("service_name") if address == "sentinel_nodes" else None,
        sentinel_username=values.get("sentinel_username"),
        sentinel_password=values.get("sentinel_password"),
        gcp_service_account=values.get("gcp_service_account"),
        aws_iam=aws_iam,
        entra_id=read_entra_id(values),
        arguments=MappingProxyType(arguments),
    )


def _address(values: Mapping[str, object]) -> str | None:
    return next((name for name in _ADDRESSES if name in values), None)


def _check_names(explicit: Mapping[str, object]) -> None:
    for name, value in explicit.items():
        if name not in _OWN and name not in _argument_kinds():
            hint = did_you_mean(name, (*_OWN, *_argument_kinds()))
            raise ConfigError(f"unknown Redis setting {name!r}{hint}", param=name)
        if name in _FIXED and value:
            raise ConfigError(f"{name}: the cache sets this itself", param=name)


def _check_together(address: str, explicit: Mapping[str, object], values: Mapping[str, object]) -> None:
    named = [name for name in _ADDRESSES if name in explicit]
    if len(named) > 1:
        raise ConfigError(f"{named[0]} and {named[1]} exclude each other", param=named[1])
    if address == "sentinel_nodes" and "service_name" not in values:
        raise ConfigError("sentinel_nodes needs service_name, the name of the master", param="service_name")
    if address != "sentinel_nodes" and "service_name" in explicit:
        raise ConfigError("service_name needs sentinel_nodes", param="sentinel_nodes")
    if address == "redis_startup_nodes" and values.get("db"):
        raise ConfigError("a Redis Cluster has no database but 0", param="db")
    identities = [name for name in _IDENTITIES if values.get(name)]
    if len(identities) > 1:
        raise ConfigError(f"{identities[0]} and {identities[1]} exclude each other", param=identities[1])
    if identities and ("password" in explicit or "credential_provider" in explicit):
        raise ConfigError(f"{identities[0]} and password exclude each other", param=identities[0])
    if "credential_provider" in values and "password" in explicit:
        raise ConfigError("credential_provider and password exclude each other", param="password")


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    """What the environment says, by setting; empty variables count as unset."""
    texts = [*_OWN, *(name for name, kind in _argument_kinds().items() if kind and name not in _FIXED)]
    found = {name: [environ.get(variable, "") for variable in _variables_of(name)] for name in texts}
    filled = {name: [text for text in texts if text.strip()] for name, texts in found.items()}
    return {name: texts[0] for name, texts in filled.items() if texts}


def _variables_of(name: str) -> tuple[str, ...]:
    return _VARIABLES.get(name, (f"REDIS_{name.upper()}",))


def _parse_url(url: object) -> dict[str, object]:
    """``redis://``, ``rediss://`` and ``unix://`` as in https://www.iana.org/assignments/uri-schemes/prov/redis;
    the query holds further arguments. No message repeats the URL: it may hold the password."""
    try:
        parts = urlsplit(str(url))
        port = parts.port
    except ValueError:
        raise _bad_url("percent-encode what is special in its password, as in p%40ss") from None
    if parts.scheme not in ("redis", "rediss", "unix") or "://" not in str(url):
        raise _bad_url("expected redis://, rediss:// or unix://")
    if parts.fragment:
        raise _bad_url("percent-encode '#' as %23")
    found: dict[str, object] = dict(parse_qsl(parts.query))
    found = {name: value for name, value in found.items() if name not in _FIXED}
    _check_names(found)
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    found |= {name: v for name, v in {"username": user, "password": password}.items() if v}
    if parts.scheme == "unix":
        return {"unix_socket_path": unquote(parts.path), **found}
    path = unquote(parts.path).strip("/")
    if path and not path.isdecimal():
        raise _bad_url("its path is the number of a database; percent-encode '/' in its password as %2F")
    database: dict[str, object] = {"db": path} if path else {}
    ssl_on = parts.scheme == "rediss"
    return {"host": _host(parts), "port": port or 6379, "ssl": ssl_on, **database, **found}


def _host(parts: SplitResult) -> str:
    return unquote(parts.hostname or "localhost")


def _bad_url(reason: str) -> ConfigError:
    return ConfigError(f"url: not the URL of a Redis: {reason}", param="url")


def _convert(name: str, value: object) -> Any:
    """``value`` as the setting wants it; text is read, anything else is left to be what it is."""
    try:
        if name in ("sentinel_nodes", "redis_startup_nodes"):
            return _nodes(value)
        if name == "ssl_cert_reqs":
            return _cert_reqs(value)
        kind = _kind_of(name)
        if not isinstance(value, str) or kind is None or kind is str:
            return _checked(value, kind)
        return kind(value.strip().rpartition("//")[2].rpartition(":")[2] if name == "port" else value.strip())
    except (ValueError, TypeError, KeyError, AttributeError):
        shown = "..." if name in _SECRET else repr(value)
        expected = _EXPECTED.get(name) or _EXPECTED.get(_name_of_kind(name), "a value it can have")
        message = f"{name} (or {_variables_of(name)[0]} in the environment): {shown} is not {expected}"
        raise ConfigError(message, param=name) from None


def _kind_of(name: str) -> Callable[[str], Any] | None:
    if name in _SWITCHES:
        return _boolean
    return str if name in _OWN else _argument_kinds().get(name)


def _name_of_kind(name: str) -> str:
    return getattr(_kind_of(name), "__name__", "str")


def _checked(value: object, kind: Callable[[str], Any] | None) -> object:
    if kind is str and not isinstance(value, str):
        raise TypeError
    if kind is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError
    if kind is float and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise TypeError
    if kind is _boolean and not isinstance(value, bool):
        raise TypeError
    return value


_EXPECTED: Final = {
    "redis_startup_nodes": 'a list of {"host": ..., "port": ...}',
    "sentinel_nodes": "a list of [host, port]",
    "ssl_cert_reqs": "one of 'none', 'optional', 'required'",
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "_boolean": "true or false",
}


def _nodes(value: object) -> tuple[Node, ...]:
    nodes = json.loads(value) if isinstance(value, str) else value
    if not isinstance(nodes, list | tuple) or not nodes:
        raise TypeError
    return tuple(map(_node, nodes))


def _node(node: object) -> Node:
    pair: Any = (node["host"], node.get("port", 6379)) if isinstance(node, Mapping) else node
    host, port = pair
    if not isinstance(host, str) or not host or isinstance(port, bool):
        raise TypeError
    return host, int(port)


def _cert_reqs(value: object) -> str:
    mode = value.name if isinstance(value, ssl.VerifyMode) else str(value)
    name = mode.strip().lower().removeprefix("cert_")
    if name not in ("none", "optional", "required"):
        raise ValueError
    return name


def _boolean(text: str) -> bool:
    lowered = text.lower()
    if lowered not in _TRUE | _FALSE:
        raise ValueError
    return lowered in _TRUE


def _tls_version(text: str) -> ssl.TLSVersion:
    return ssl.TLSVersion(int(text)) if text.isdigit() else ssl.TLSVersion[text.replace(".", "_")]


def _verify_flags(text: str) -> list[ssl.VerifyFlags]:
    return [ssl.VerifyFlags[name] for name in re.findall(r"\w+", text)]


def _socket_options(text: str) -> dict[int, int]:
    return {int(option): int(value) for option, value in json.loads(text).items()}


# Arguments whose annotation does not say how text becomes their value.
_KINDS: Final[Mapping[str, Callable[[str], Any]]] = {
    "ssl_cert_reqs": _cert_reqs,
    "ssl_min_version": _tls_version,
    "ssl_include_verify_flags": _verify_flags,
    "ssl_exclude_verify_flags": _verify_flags,
    "socket_keepalive_options": _socket_options,
}
_WORDS: Final[Mapping[str, Callable[[str], Any]]] = {"bool": _boolean, "int": int, "float": float, "str": str}


@functools.cache
def _argument_kinds() -> Mapping[str, Callable[[str], Any] | None]:
    """Every argument of the installed ``redis.Redis``, and what reads its value from text (None: nothing)."""
    try:
        import redis
    except ImportError as exc:
        raise ConfigError("a Redis cache needs redis-py: pip install 'llm-middleware[redis]'") from exc
    parameters: Iterable[inspect.Parameter] = inspect.signature(redis.Redis.__init__).parameters.values()
    return {p.name: _kind(p) for p in parameters if p.name != "self"}


def _kind(parameter: inspect.Parameter) -> Callable[[str], Any] | None:
    if parameter.name in _KINDS:
        return _KINDS[parameter.name]
    note = parameter.annotation
    if note is inspect.Parameter.empty:
        note = type(parameter.default)
    text = note.__name__ if isinstance(note, type) else str(note).removeprefix("typing.Optional[")
    word = re.match(r"\w+", text)
    return _WORDS.get(word.group()) if word else None
