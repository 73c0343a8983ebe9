"""`HTTPSettings`: how providers are reached, checked once and then frozen; `Route`: what it comes to here."""

from __future__ import annotations

import importlib.util
import math
import os
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from ..errors import ConfigError

if TYPE_CHECKING:
    import ssl

__all__ = ["SOCKS", "HTTPSettings", "Route", "base_headers", "basic", "require_httpx"]

_CLIENTS: Final = ("auto", "aiohttp", "httpx")
SOCKS: Final = frozenset({"socks5", "socks5h"})
"""Schemes of proxies that only httpx can speak to, with ``httpx[socks]``."""
_PROXY_SCHEMES: Final = frozenset({"http", "https", *SOCKS})


@dataclass(frozen=True, slots=True, kw_only=True)
class HTTPSettings:
    """How to reach providers.

    ``proxy``: the URL of one for every request; unless given, ``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY``
    and ``NO_PROXY`` hold. ``verify``: False, a file or directory of the authorities to trust, or an
    ``ssl.SSLContext``; where it is True, ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` hold. ``cert``: the client's
    certificate, a file with its key or ``(certificate, key)`` or ``(certificate, key, password)``.
    ``trust_env``: whether the environment is read at all; it is read when the first request is sent.

    ``max_connections``: how many may be open at a time in one process, and there for one event loop; who
    needs another one waits. ``keepalive``: seconds for which an idle one is kept. ``http2``: speak it where
    the provider does (``httpx[http2]``). ``http_client``: an ``httpx.AsyncClient`` (``httpx.Client`` for sync
    calls) to use as it is; it is not closed, and only the timeouts are ours. ``client``: what sends,
    ``auto``, ``httpx`` or, for async calls, ``aiohttp``; auto takes the fastest that is installed and can do
    what the settings say.

    `ConfigError` for a value that cannot be.
    """

    proxy: str | None = field(default=None, repr=False)  # it may hold a password
    verify: bool | str | ssl.SSLContext = True
    cert: str | tuple[str, ...] | None = field(default=None, repr=False)
    trust_env: bool = True
    max_connections: int = 1000
    keepalive: float = 30.0
    http2: bool = False
    http_client: object = field(default=None, repr=False)
    client: str = "auto"

    def __post_init__(self) -> None:
        for name, (expected, fits) in _CHECKS.items():
            try:
                good = fits(getattr(self, name))
            except (AttributeError, TypeError, ValueError):
                good = False
            if not good:  # the value is not shown: it may be a secret
                raise ConfigError(f"{name}: expected {expected}", param=name)

    @property
    def needs_httpx(self) -> bool:
        """Whether only httpx can do what these say."""
        return self.client == "httpx" or self.http2 or self.http_client is not None


def _is_proxy(value: object) -> bool:
    if value is None:
        return True
    parts = urlsplit(value) if isinstance(value, str) else None
    return parts is not None and parts.scheme in _PROXY_SCHEMES and bool(parts.hostname)


def _is_cert(value: object) -> bool:
    if isinstance(value, tuple):
        return len(value) in (2, 3) and all(isinstance(part, str) and part for part in value)
    return value is None or (isinstance(value, str) and bool(value))


def _is_verify(value: object) -> bool:
    if isinstance(value, bool):
        return True
    return os.path.exists(value) if isinstance(value, str) else hasattr(value, "wrap_socket")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


_CHECKS: Final[dict[str, tuple[str, Callable[[object], bool]]]] = {
    "proxy": ("the URL of an HTTP or SOCKS5 proxy", _is_proxy),
    "verify": ("True, False, a file or directory that exists, or an SSLContext", _is_verify),
    "cert": ("a file, or (certificate, key) or (certificate, key, password)", _is_cert),
    "trust_env": ("True or False", _is_flag),
    "max_connections": ("a whole number above zero", _is_count),
    "keepalive": ("seconds, zero or more", _is_seconds),
    "http2": ("True or False", _is_flag),
    "client": (f"one of {', '.join(_CLIENTS)}", lambda value: value in _CLIENTS),
}


class Route:
    """The proxies and the TLS context of one transport, of the environment as it is when this is made."""

    def __init__(self, settings: HTTPSettings) -> None:
        self._settings = settings
        self._by_scheme: dict[str, str] = {}
        self._bypass: Callable[[str], object] = lambda host: False
        if settings.proxy is None and settings.trust_env:
            self._read_environment()
        self.proxy: Callable[[str, str], str | None] = lru_cache(1024)(self._find)
        """``proxy(scheme, host)``: the URL of the one for a host (with its port, where the URL names one)."""

    def _read_environment(self) -> None:
        from urllib import request

        given = request.getproxies()  # the system's, where no variable is set
        self._by_scheme = {scheme: _with_scheme(url) for scheme, url in given.items() if url}
        environment: Any = request  # its stubs leave these out
        if named := environment.getproxies_environment():
            self._bypass = lambda host: environment.proxy_bypass_environment(host, named)
        else:
            self._bypass = request.proxy_bypass

    @cached_property
    def tls(self) -> ssl.SSLContext:
        """For ``https``; reading the authorities takes some 20 ms, so not before it is needed."""
        return _tls_context(self._settings)

    def proxy_schemes(self) -> set[str]:
        """The schemes of all proxies that there may be."""
        named = (self._settings.proxy, *(self._by_scheme.get(name) for name in ("http", "https", "all")))
        return {urlsplit(url).scheme for url in named if url}

    def _find(self, scheme: str, host: str) -> str | None:
        if self._settings.proxy is not None:
            return self._settings.proxy
        found = self._by_scheme.get(scheme) or self._by_scheme.get("all")
        return None if found is None or self._bypass(host) else found


def _with_scheme(url: str) -> str:
    return url if "://" in url else f"http://{url}"


def _tls_context(settings: HTTPSettings) -> ssl.SSLContext:
    """The TLS context that the settings and the environment ask for.

    The authorities are those of ``verify``, else of ``SSL_CERT_FILE`` and ``SSL_CERT_DIR``, else of certifi
    where it is installed, else the system's. `ConfigError` for files that cannot be read.
    """
    import ssl

    verify = settings.verify
    if isinstance(verify, ssl.SSLContext):
        return verify
    try:
        context = _trusting(settings)
        if settings.cert is not None:
            context.load_cert_chain(*((settings.cert,) if isinstance(settings.cert, str) else settings.cert))
    except OSError as exc:  # ssl.SSLError is one
        raise ConfigError(f"verify or cert: not usable certificates ({type(exc).__name__})") from None
    return context


def _trusting(settings: HTTPSettings) -> ssl.SSLContext:
    import ssl

    verify = settings.verify
    if verify is False:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    file, directory = (verify, None) if isinstance(verify, str) else _authorities(settings.trust_env)
    if file is not None and os.path.isdir(file):
        file, directory = None, file
    return ssl.create_default_context(cafile=file, capath=directory)


def _authorities(trust_env: bool) -> tuple[str | None, str | None]:
    """A file and a directory of authorities; neither: the system's."""
    if trust_env:
        file, directory = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
        if file or directory:
            return file or None, directory or None
    try:
        import certifi
    except ImportError:
        return None, None
    return certifi.where(), None


def base_headers(brotli: bool) -> dict[str, str]:
    """What every request says unless its own headers say otherwise; ``brotli``: whether that is undone."""
    return {
        "accept": "*/*",
        "accept-encoding": "gzip, deflate, br" if brotli else "gzip, deflate",
        "user-agent": "llm-middleware",
    }


def require_httpx(settings: HTTPSettings, route: Route) -> None:
    """`ConfigError` where httpx, or what it needs for these settings, is not installed."""
    wanted = [("httpx", "httpx", True)]
    wanted += [("h2", "httpx[http2]", settings.http2 and settings.http_client is None)]
    wanted += [("socksio", "httpx[socks]", bool(route.proxy_schemes() & SOCKS))]
    for module, package, needed in wanted:
        if needed and importlib.util.find_spec(module) is None:
            raise ConfigError(f"{module} is not installed: pip install '{package}'")


def basic(user: str | None, password: str | None) -> str | None:
    """The value of an authorization header; None where there is no user."""
    if user is None:
        return None
    return f"Basic {b64encode(f'{user}:{password or str()}'.encode()).decode('ascii')}"
