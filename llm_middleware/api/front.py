"""`Front`: the options that the ASGI and the WSGI middleware have in common, checked once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..caching.endpoints import OPENAI_ROUTES, kind_of
from ..caching.headers import PROFILES
from ..caching.manager import CacheManager
from ..errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from .gate import Gate
    from .hooks import Hooks

__all__ = ["Front"]

ANONYMOUS = "caller:anonymous"


class Front:
    """Which paths are cached endpoints, for whom answers are kept, and how headers are named.

    ``cache``: the manager; the process's default cache where None is given. ``routes``: path to kind (or to
    LiteLLM's name of a call type). ``identify``: from the request (ASGI scope, WSGI environ) to the caller's
    id. ``max_body_bytes``: longer bodies pass through uncached; the manager's setting where None is given.
    """

    def __init__(
        self,
        cache: CacheManager | None,
        routes: Mapping[str, str] | None,
        identify: Callable[..., object] | None,
        max_body_bytes: int | None,
        header_profile: str,
        settings: Mapping[str, object],
    ) -> None:
        if cache is not None and not isinstance(cache, CacheManager):
            raise ConfigError(f"cache: expected a CacheManager, got {cache!r}", param="cache")
        if settings:
            if cache is not None:
                name = next(iter(settings))
                raise ConfigError(f"{name}: give it to the CacheManager that is passed as cache=", param=name)
            cache = CacheManager(**settings)  # type: ignore[arg-type]
        self._cache = cache
        self.routes = _routes(OPENAI_ROUTES if routes is None else routes)
        # Two endpoints of the host's own may answer the same body differently; OpenAI's are what they are.
        self.own = {
            path: "" if OPENAI_ROUTES.get(path) == kind else path for path, kind in self.routes.items()
        }
        if identify is not None and not callable(identify):
            raise ConfigError(f"identify: expected a function, got {identify!r}", param="identify")
        self.identify = identify
        if max_body_bytes is not None and (not isinstance(max_body_bytes, int) or max_body_bytes < 0):
            raise ConfigError(
                f"max_body_bytes: expected bytes >= 0, got {max_body_bytes!r}", param="max_body_bytes"
            )
        self._max_body_bytes = max_body_bytes
        if header_profile not in PROFILES:
            hint = did_you_mean(header_profile, PROFILES)
            raise ConfigError(
                f"header_profile: expected one of {list(PROFILES)}, got {header_profile!r}{hint}",
                param="header_profile",
            )
        self.profile = header_profile
        # Of a sub-app:
        self.gate: Gate | None = None
        self.hooks: Hooks | None = None

    @property
    def cache(self) -> CacheManager:
        if self._cache is None:
            from ..caching.default import default_cache

            return default_cache()
        return self._cache

    @property
    def max_body_bytes(self) -> int:
        return self.cache.settings.max_body_bytes if self._max_body_bytes is None else self._max_body_bytes


def _routes(routes: Mapping[str, str]) -> dict[str, str]:
    checked = {}
    for path, kind in routes.items():
        if not isinstance(path, str) or not path.startswith("/"):
            raise ConfigError(f'routes: expected a path that begins with "/", got {path!r}', param="routes")
        checked[path] = kind_of(kind, param=f"routes[{path!r}]")
    return checked


def credentials_scope(credentials: Sequence[tuple[bytes, bytes]]) -> str:
    """The scope of whoever sent these credential headers; without any, of all who sent none."""
    if not credentials:
        return ANONYMOUS
    data = b""
    for name, value in sorted(credentials):
        data += b"%d:%b%d:%b" % (len(name), name, len(value), value)
    return "caller:" + hashlib.sha256(data).hexdigest()


def identified_scope(identity: object) -> str:
    """The scope of the caller that ``identify`` named."""
    if identity is None:
        return ANONYMOUS
    if isinstance(identity, bytes):
        identity = identity.decode("utf-8", "backslashreplace")
    if not isinstance(identity, str):
        raise TypeError(f"identify returned {type(identity).__name__}, not a string")
    return "id:" + identity
