"""Requests whose model stands in their path, as Azure's and the oldest of OpenAI's clients send them."""

from __future__ import annotations

import json
from typing import NamedTuple

from ..caching.cache_key import UnkeyableError
from ..caching.plan import decompressed

__all__ = ["Named", "is_form", "openai_path", "with_model"]


class Named(NamedTuple):
    """``body``: with the model in it. ``encoding``: of that, its ``Content-Encoding``."""

    body: bytes
    encoding: str


def is_form(content_type: str, encoding: str) -> bool:
    """Whether such a body is a form that can be read as it arrives."""
    plain = encoding in ("", "identity")
    return plain and content_type.partition(";")[0].strip().lower() == "multipart/form-data"


def openai_path(template: str) -> str:
    """What a path with the model in it is at OpenAI."""
    return "/v1" + template.partition("{model}")[2]


def with_model(model: str, body: bytes, *, content_type: str, encoding: str, limit: int) -> Named:
    """The request's body as one that names its ``model``; where both name one, the path's counts. A body
    that is neither a JSON object nor a form, or too long for ``limit`` bytes, stays as it is: what reads it
    says so."""
    try:
        plain = decompressed(body, limit) if encoding == "gzip" else body
        named = _in_form(model, plain, content_type) if is_form(content_type, "") else _in_json(model, plain)
    except (ValueError, RecursionError):
        return Named(body, encoding)
    return Named(named, "" if encoding == "gzip" else encoding)


def _in_json(model: str, body: bytes) -> bytes:
    fields = json.loads(body)
    if not isinstance(fields, dict):
        raise UnkeyableError("not a JSON object")
    return json.dumps({**fields, "model": model}, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _in_form(model: str, body: bytes, content_type: str) -> bytes:
    from ..caching.multipart import form_parts  # on first use: it brings the email parser

    parts = form_parts(body, content_type)
    body = body.lstrip()
    line = body.partition(b"\r\n")[0]  # which parts them
    _, *raw, end = (b"\r\n" + body).split(b"\r\n" + line)
    text = model.encode("utf-8", "surrogatepass")
    own = b'\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + text
    kept = [data for part, data in zip(parts, raw, strict=True) if part.name != "model"]
    return (b"\r\n" + line).join([b"", own, *kept, end])[2:]
