"""`Registry`: which provider a model's name or a base URL means, from one table that a user's rows extend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Final, NamedTuple
from urllib.parse import SplitResult, urlsplit

from ..errors import ConfigError, did_you_mean
from .table import ALIASES, ROWS

__all__ = ["GENERIC", "Origin", "Provider", "Registry", "below", "origin_of", "registry"]

GENERIC: Final = "openai_like"
_ADAPTERS: Final = ("openai", "azure", "azure_ai", "anthropic", "bedrock")
_KINDS: Final = ("chat", "text", "embedding", "transcription", "responses")
_PORTS: Final = {"http": 80, "https": 443}
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


class Origin(NamedTuple):
    """Scheme, host and port of a URL: the same ones are the same server."""

    scheme: str
    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One row of the table.

    ``base_url``: where it is served; None where only the deployment knows. Names in braces are filled from
    the connection or the environment. ``bases``: its other addresses, which are as much its own.
    ``api_key_env``, ``api_base_env``: variables, the first one that is set counts. ``auth``: how the key is
    sent: ``bearer``, ``none`` or the name of a header; or a function that gives a bearer token for each call.
    ``adapter``: which module speaks to it. ``suffix``: what its base URLs end in, added where it is missing.
    ``kinds``: what it is known to serve: a hint, not a gate.

    ``renames``: parameters that have another name there. ``force``: parameters that are always sent so.
    ``maximum``: the largest value of a parameter. ``unsupported``: parameters left out under ``drop_params``.
    ``text_content``: messages have their content as one text. ``headers``: sent with every request.
    """

    name: str
    base_url: str | None = None
    bases: tuple[str, ...] = ()
    api_key_env: tuple[str, ...] = ()
    api_base_env: tuple[str, ...] = ()
    auth: str | Callable[[], object] = "bearer"
    adapter: str = "openai"
    suffix: str = ""
    kinds: frozenset[str] = frozenset({"chat"})
    renames: Mapping[str, str] = field(default_factory=dict)
    force: Mapping[str, object] = field(default_factory=dict)
    maximum: Mapping[str, float] = field(default_factory=dict)
    unsupported: frozenset[str] = frozenset()
    text_content: bool = False
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def self_hosted(self) -> bool:
        """Whether there is no address of its own: each user has another one."""
        return self.base_url is None or (urlsplit(self.base_url).hostname or "") in _LOOPBACK

    def serves(self, url: str) -> bool:
        """Whether ``url`` is at an address of its own: same scheme, host and port, and below its path."""
        return any(below(url, base) for base in (self.base_url, *self.bases) if base and "{" not in base)


@dataclass(frozen=True, slots=True)
class Registry:
    """Providers by name, and by address. `registry` makes one."""

    providers: Mapping[str, Provider]
    _by_origin: Mapping[Origin, tuple[Provider, ...]] = field(repr=False)

    def __getitem__(self, name: str) -> Provider:
        """The provider of that name. `ConfigError` names the nearest where there is none."""
        found = self.get(name)
        if found is None:
            hint = did_you_mean(name, [*self.providers, *ALIASES])
            raise ConfigError(f"there is no provider {name!r}{hint}", param="provider")
        return found

    def __iter__(self) -> Iterator[Provider]:
        return iter(self.providers.values())

    def get(self, name: str) -> Provider | None:
        return self.providers.get(name) or self.providers.get(ALIASES.get(name, ""))

    def at(self, url: str) -> Provider | None:
        """Whose address ``url`` is: the one with the longest path that fits. None for an unknown one."""
        origin = origin_of(url)
        rows = self._by_origin.get(origin, ()) if origin is not None else ()
        fitting = [
            (len(urlsplit(base).path.rstrip("/")), -place, row)
            for place, row in enumerate(rows)
            for base in (row.base_url, *row.bases)
            if base and below(url, base)
        ]
        return max(fitting, key=lambda found: found[:2])[2] if fitting else None

    def resolve(
        self, model: str, api_base: str | None = None, provider: str | None = None
    ) -> tuple[Provider, str]:
        """Whose ``model`` is, and what it is called there.

        ``provider`` decides where it is given; else the prefix, as in ``groq/llama-3``; else whose address
        ``api_base`` is, where an unknown one is a server that speaks OpenAI's API. A bare name with no
        address is Anthropic's if it begins with ``claude``, and OpenAI's otherwise. `ConfigError` for a
        prefix that is nobody's.
        """
        prefix, slash, rest = model.partition("/")
        if provider is not None:
            row = self[provider]
            return row, rest if slash and self.get(prefix) is row else model
        named = self.get(prefix) if slash else None
        if named is not None:
            return named, rest
        if api_base is not None:
            return self.at(api_base) or self[GENERIC], model
        if slash:
            return self[prefix], rest  # raises
        return self["anthropic" if model.startswith("claude") else "openai"], model


def registry(rows: Mapping[str, Mapping[str, object]] | None = None) -> Registry:
    """The table with ``rows`` on top: by prefix, the fields of `Provider` that differ or are new.

    A row for a prefix that is known keeps what it does not name. LiteLLM's ``param_mappings`` is read as
    ``renames``. `ConfigError` names the row and the field that is wrong.
    """
    if rows is not None and not isinstance(rows, Mapping):
        raise ConfigError("providers: expected a mapping of prefixes to rows", param="providers")
    if not rows:
        return _builtin()
    providers: dict[str, Provider] = {}
    for name, row in rows.items():
        known = _builtin().get(str(name))
        begin = replace(known, name=str(name)) if known is not None else Provider(name=str(name))
        providers[str(name)] = _read(begin, row, f"providers.{name}")
    # A user's rows come first: where two have one address, it is theirs.
    return _indexed({**providers, **{k: v for k, v in _builtin().providers.items() if k not in providers}})


@functools.cache
def _builtin() -> Registry:
    return _indexed({name: _read(Provider(name=name), row, name) for name, row in ROWS.items()})


def _indexed(providers: dict[str, Provider]) -> Registry:
    by_origin: dict[Origin, list[Provider]] = {}
    for row in providers.values():
        for base in (row.base_url, *row.bases):
            origin = origin_of(base) if base and "{" not in base else None
            if origin is not None and row not in by_origin.setdefault(origin, []):
                by_origin[origin].append(row)
    return Registry(
        MappingProxyType(providers),
        MappingProxyType({origin: tuple(rows) for origin, rows in by_origin.items()}),
    )


def origin_of(url: str) -> Origin | None:
    """The server that ``url`` means; None where it is not a plain HTTP URL.

    A user name, a backslash, white space or a control character makes it none: clients disagree on them.
    """
    parts = _parts(url)
    if parts is None:
        return None
    return Origin(parts.scheme, parts.hostname or "", parts.port or _PORTS[parts.scheme])


def _parts(url: str) -> SplitResult | None:
    if any(ch <= " " or ch in "\\\x7f" for ch in url) or not url.isascii():
        return None
    try:
        parts = urlsplit(url)
        if parts.scheme not in _PORTS or not parts.hostname or "@" in parts.netloc or parts.port == 0:
            return None
    except ValueError:
        return None
    return parts


def below(url: str, base: str) -> bool:
    """Whether ``url`` is at the server of ``base``, and its path that of ``base`` or below it."""
    mine, theirs = _parts(url), _parts(base)
    if mine is None or theirs is None or origin_of(url) != origin_of(base):
        return False
    within, path = theirs.path.rstrip("/"), mine.path
    if "%2e" in path.lower() or any(part in (".", "..") for part in path.split("/")):
        return False
    return path == within or path.startswith(within + "/")


# --- a row from a mapping


def _read(begin: Provider, row: object, param: str) -> Provider:
    if not isinstance(row, Mapping):
        raise ConfigError(f"{param}: expected a mapping", param=param)
    changes: dict[str, Any] = {}
    for key, value in row.items():
        name = "renames" if key == "param_mappings" else str(key)
        reader = _READERS.get(name)
        where = f"{param}.{key}"
        if reader is None:
            hint = did_you_mean(name, _READERS)
            raise ConfigError(f"{where}: there is no such field{hint}", param=where)
        try:
            changes[name] = reader(value)
        except (TypeError, ValueError) as exc:
            raise ConfigError(f"{where}: {exc}", param=where) from None
    return replace(begin, **changes)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, not {type(value).__name__}")
    return value


def _base(value: object) -> str | None:
    if value is None:
        return None
    text = _text(value)
    if origin_of(text.replace("{", "").replace("}", "")) is None:
        raise ValueError("expected an http:// or https:// URL")
    return text.rstrip("/")


def _texts(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        raise TypeError(f"expected a text or a list of texts, not {type(value).__name__}")
    return tuple(_text(item) for item in value)


def _bases(value: object) -> tuple[str, ...]:
    return tuple(base for base in map(_base, _texts(value)) if base is not None)


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"expected a mapping, not {type(value).__name__}")
    return {_text(key): item for key, item in value.items()}


def _text_mapping(value: object) -> dict[str, str]:
    return {key: _text(item) for key, item in _mapping(value).items()}


def _headers(value: object) -> dict[str, str]:
    return {name.lower(): text for name, text in _text_mapping(value).items()}


def _maximum(value: object) -> dict[str, float]:
    limits = _mapping(value)
    for name, limit in limits.items():
        if isinstance(limit, bool) or not isinstance(limit, int | float):
            raise TypeError(f"{name}: expected a number")
    return limits


def _one_of(names: tuple[str, ...]) -> Callable[[object], str]:
    def read(value: object) -> str:
        if value not in names:
            raise ValueError(f"expected one of {', '.join(names)}")
        return _text(value)

    return read


def _kinds(value: object) -> frozenset[str]:
    return frozenset(map(_one_of(_KINDS), _texts(value)))


def _auth(value: object) -> str | Callable[[], object]:
    return value if callable(value) else _text(value)


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError("expected true or false")
    return value


_READERS: Final[Mapping[str, Callable[[object], object]]] = {
    "base_url": _base,
    "bases": _bases,
    "api_key_env": _texts,
    "api_base_env": _texts,
    "auth": _auth,
    "adapter": _one_of(_ADAPTERS),
    "suffix": _text,
    "kinds": _kinds,
    "renames": _text_mapping,
    "force": _mapping,
    "maximum": _maximum,
    "unsupported": lambda value: frozenset(_texts(value)),
    "text_content": _switch,
    "headers": _headers,
}
assert set(_READERS) == {one.name for one in fields(Provider)} - {"name"}
