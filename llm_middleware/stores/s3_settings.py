"""`S3Settings`: the settings of an S3 store, checked once and then frozen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar
from urllib.parse import urlsplit

from ..errors import ConfigError

__all__ = ["S3Settings"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Settings:
    """The settings of an `S3Store`; text as an environment has it (``"false"``, ``"0.5"``) will do.

    ``s3_path``: the prefix of all object keys. ``s3_verify``: False, or a file of the certificates to trust.
    ``s3_config``: arguments of ``botocore.config.Config``. Credentials that are not given, boto3 finds where
    it always does. ``timeout``: seconds to connect, to wait for an answer, and in all for one object.
    ``threads``: the size of the async methods' pool. ``client``: what reads, ``boto3``, ``obstore`` or
    ``auto``: obstore where it is installed and can do what the settings say.
    """

    s3_bucket_name: str = ""
    s3_region_name: str | None = None
    s3_api_version: str | None = None
    s3_path: str = ""
    s3_use_ssl: bool = True
    s3_verify: bool | str | None = None
    s3_endpoint_url: str | None = None
    s3_aws_access_key_id: str | None = field(default=None, repr=False)
    s3_aws_secret_access_key: str | None = field(default=None, repr=False)
    s3_aws_session_token: str | None = field(default=None, repr=False)
    s3_config: Mapping[str, object] = field(default_factory=dict, repr=False)
    timeout: float = 0.25
    threads: int = 16
    client: str = "auto"

    def __post_init__(self) -> None:
        for name, (expected, parse) in _CHECKS.items():
            try:
                object.__setattr__(self, name, parse(getattr(self, name)))
            except (LookupError, TypeError, ValueError):  # the value is not shown: it may be a secret
                raise ConfigError(f"{name}: expected {expected}", param=name) from None


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _optional(parse: Callable[[object], T]) -> Callable[[object], T | None]:
    return lambda value: None if value is None else parse(value)


def _path(value: object) -> str:
    parts = [part for part in _text(value).split("/") if part] if value else []
    if "." in parts or ".." in parts:  # clients disagree on what these mean
        raise ValueError
    return "/".join(parts)


def _flag(value: object) -> bool:
    return value if isinstance(value, bool) else {"true": True, "false": False}[_text(value).lower()]


def _verify(value: object) -> bool | str:
    return _flag(value) if str(value).lower() in ("true", "false") else _text(str(value))


def _url(value: object) -> str:
    parts = urlsplit(_text(value))
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ValueError
    return parts.geturl()


def _seconds(value: object) -> float:
    seconds = float(value)  # type: ignore[arg-type]  # TypeError is what is wanted
    if not 0 < seconds < math.inf or isinstance(value, bool):
        raise ValueError
    return seconds


def _threads(value: object) -> int:
    if isinstance(value, (bool, float)) or not 0 < int(value) < 1000:  # type: ignore[call-overload]
        raise ValueError
    return int(value)  # type: ignore[call-overload, no-any-return]


def _mapping(value: object) -> Mapping[str, object]:
    return dict(value or {})  # type: ignore[call-overload, no-any-return]


_CLIENTS: Final[Mapping[object, str]] = {name: name for name in ("auto", "boto3", "obstore")}
_TEXTS: Final = (
    "region_name",
    "api_version",
    "aws_access_key_id",
    "aws_secret_access_key",
    "aws_session_token",
)
_CHECKS: Final[Mapping[str, tuple[str, Callable[[object], object]]]] = {
    "s3_bucket_name": ("the name of a bucket", _text),
    **{f"s3_{name}": ("text that is not empty, or None", _optional(_text)) for name in _TEXTS},
    "s3_path": ("a prefix without '.' and '..' in it", _path),
    "s3_use_ssl": ("True or False", _flag),
    "s3_verify": ("True, False or a file of certificates", _optional(_verify)),
    "s3_endpoint_url": ("an http or https URL without credentials", _optional(_url)),
    "s3_config": ("a mapping of botocore's settings", _mapping),
    "timeout": ("seconds > 0", _seconds),
    "threads": ("a number of threads > 0", _threads),
    "client": ("'auto', 'boto3' or 'obstore'", _CLIENTS.__getitem__),
}
