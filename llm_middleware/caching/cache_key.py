"""Canonical form v1 of a request, and the cache key made of it.

The canonical form is JSON text: object keys sorted by code point, no white space, characters as they
are, numbers by value (``1``, ``1.0`` and ``1e0`` are one number; ``1``, ``"1"`` and ``true`` are three
values), without the fields that cannot change the answer and without those that only state a default.
JSON delimits itself, so no two different values share a text.

The key is SHA-256 (HMAC-SHA-256 where a secret is configured) over, each behind its length: the version
of the form, the caller's scope, the namespace, the endpoint kind, and then the canonical form. A change
of the form is a new version, and entries under the old one are never found again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from enum import Enum
from functools import lru_cache

from .endpoints import Endpoint

__all__ = [
    "FORM_VERSION",
    "UnkeyableError",
    "canonical",
    "digest",
    "image_fields",
    "jsonable",
    "parse",
    "significant",
]

FORM_VERSION = b"v1"


class UnkeyableError(ValueError):
    """The request has no canonical form: it is served, but not cached."""


def _number(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _constant(text: str) -> object:
    raise UnkeyableError(f"{text} is not JSON")


_decoder = json.JSONDecoder(parse_float=_number, parse_constant=_constant)
_scan: Callable[[str, int], tuple[object, int]] = _decoder.scan_once  # type: ignore[attr-defined]
_encoder = json.JSONEncoder(
    sort_keys=True, ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":")
)


def _encode_function() -> Callable[[object], str]:
    # `JSONEncoder.encode` builds its C encoder anew for each call: a tenth of the time of a short body.
    make, text = getattr(json.encoder, "c_make_encoder", None), json.encoder.encode_basestring
    if make is None:
        return _encoder.encode
    chunks = make(None, _encoder.default, text, None, ":", ",", True, False, False)
    return lambda value: "".join(chunks(value, 0))


_encode = _encode_function()


def _decode(text: str) -> object:
    try:
        value, end = _scan(text, 0)
        if end == len(text):
            return value
    except StopIteration:
        pass
    return _decoder.decode(text)  # white space around it, or an error to tell


def parse(body: bytes) -> object:
    """The JSON value of ``body`` with its numbers in canonical form; `UnkeyableError` if there is none."""
    try:
        try:
            return _decode(body.decode())
        except ValueError:  # UTF-16, UTF-32, a byte order mark, lone surrogates: what json.loads accepts
            return _decode(body.decode(json.detect_encoding(body), "surrogatepass"))
    except UnkeyableError:
        raise
    except (ValueError, RecursionError) as exc:
        raise UnkeyableError(f"not JSON: {exc}") from exc


def _file_digest(value: object) -> dict[str, object]:
    # An upload is what its bytes are; its name and its position in a file are not part of it.
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"$sha256": hashlib.sha256(value).hexdigest()}
    try:
        at = value.tell()  # type: ignore[attr-defined]
        value.seek(at)  # type: ignore[attr-defined]  # before it is read: a pipe must stay whole
        data = value.read()  # type: ignore[attr-defined]
        value.seek(at)  # type: ignore[attr-defined]
        return {"$sha256": hashlib.sha256(data).hexdigest()}
    except (OSError, ValueError, TypeError) as exc:
        raise UnkeyableError(f"a file that cannot be read again: {exc}") from exc


def _object(value: object) -> object:
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        return {"$schema": value.model_json_schema()}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclass_fields(value)}
    if hasattr(value, "read") and hasattr(value, "seek"):
        return _file_digest(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise UnkeyableError(f"a {type(value).__name__} has no canonical form")


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return _plain(value.value)
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(value)
    if isinstance(value, Mapping):
        return {_name(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _file_digest(value)
    return _plain(_object(value))


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise UnkeyableError(f"object key {name!r} is not a string")
    return name


def jsonable(value: object) -> object:
    """A Python value as the JSON it stands for, numbers canonical: dictionaries, lists, pydantic models and
    classes (by their schema), dataclasses, arrays, and bytes or open files (by content).
    `UnkeyableError` for what has no such form."""
    try:
        return _plain(value)
    except RecursionError as exc:
        raise UnkeyableError("nested too deeply, or contains itself") from exc


def _states_default(value: object, default: object) -> bool:
    # `is` on the type: True == 1 in Python, and `n: true` is not `n: 1`.
    return type(value) is type(default) and value == default


def significant(
    endpoint: Endpoint, fields: Mapping[str, object], ignored: Collection[str] = ()
) -> dict[str, object]:
    """The fields that can change the answer: not ignored, not null, not merely stating a default."""
    skip = endpoint.ignored
    if endpoint.null_is_absent:
        defaults = endpoint.defaults
        kept = {
            n: v
            for n, v in fields.items()
            if v is not None and n not in skip and not (n in defaults and _states_default(v, defaults[n]))
        }
    else:
        kept = {n: v for n, v in fields.items() if n not in skip}
    for name in ignored:
        kept.pop(name, None)
    return kept


def canonical(value: object) -> bytes:
    """Canonical form v1 of a value that `parse` or `jsonable` returned."""
    try:
        return _encode(value).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError) as exc:
        raise UnkeyableError(f"no canonical form: {exc}") from exc


@lru_cache(1024)
def _lead(version: bytes, kind: str, scope: str, namespaces: tuple[str, ...]) -> bytes:
    parts = [version, kind.encode(), scope.encode("utf-8", "surrogatepass")]
    parts += [name.encode("utf-8", "surrogatepass") for name in namespaces]
    sizes = struct.pack(f"<{len(parts) + 1}I", len(parts), *map(len, parts))
    return b"".join((sizes, *parts))


def digest(kind: str, scope: str, namespaces: tuple[str, ...], form: bytes, secret: bytes | None) -> str:
    """The cache key: 64 hex digits."""
    data = _lead(FORM_VERSION, kind, scope, namespaces) + form
    if secret is not None:
        return hmac.digest(secret, data, "sha256").hex()
    return hashlib.sha256(data).hexdigest()


def image_fields(value: object, resolve: Callable[[str], bytes | str | None]) -> object:
    """``value`` with every ``image_url`` replaced by its content: data URLs by their bytes, others by what
    ``resolve(url)`` returns (bytes: the image; text: a name for it; None: leave the URL)."""
    try:
        return _with_images(value, resolve)
    except UnkeyableError:
        raise
    except Exception as exc:  # the host's own function's, or nested too deeply
        raise UnkeyableError(f"an image without content: {type(exc).__name__}: {exc}") from exc


def _with_images(value: object, resolve: Callable[[str], bytes | str | None]) -> object:
    if isinstance(value, list):
        return [_with_images(item, resolve) for item in value]
    if not isinstance(value, dict):
        return value
    out = {name: _with_images(item, resolve) for name, item in value.items()}
    image = out.get("image_url")
    if isinstance(image, str):
        out["image_url"] = _image(image, resolve)
    elif isinstance(image, dict) and isinstance(image.get("url"), str):
        out["image_url"] = {**image, "url": _image(image["url"], resolve)}
    return out


def _image(url: str, resolve: Callable[[str], bytes | str | None]) -> object:
    content: bytes | str | None
    if url.startswith("data:"):
        import urllib.request

        try:
            with urllib.request.urlopen(url) as opened:  # RFC 2397; no I/O
                content = opened.read()
        except (ValueError, OSError):
            return url
    else:
        content = resolve(url)
    if content is None:
        return url
    return _file_digest(content) if isinstance(content, bytes) else {"$image": content}
