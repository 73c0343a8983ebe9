"""OpenAI's API, as OpenAI and everyone in the table speaks it: a request's body in, one `Outgoing` out.

Answers are not touched: their bytes are what the caller gets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

from ..errors import BadRequestError
from .messages import Outgoing
from .multipart import form
from .target import Target

__all__ = ["PATHS", "build", "dumps", "parameters", "path", "request", "url"]

PATHS: Final[Mapping[str, str]] = {
    "chat": "chat/completions",
    "text": "completions",
    "embedding": "embeddings",
    "transcription": "audio/transcriptions",
    "responses": "responses",
}
# OpenAI's reasoning models (o1, o3-mini, gpt-5 ...; not gpt-5-chat) refuse these: they have one value there.
_REASONING: Final = re.compile(r"(?:o[1-9](?:-|\Z)|gpt-5(?!.*-chat))")
_NOT_REASONING: Final = frozenset(
    [
        "temperature",
        "top_p",
        "presence_penalty",
        "frequency_penalty",
        "logprobs",
        "top_logprobs",
        "logit_bias",
    ]
)
# Made once: `json.dumps` makes an encoder for each call that has options.
_encode: Final = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


def build(target: Target, kind: str, body: Mapping[str, object], stream: bool) -> Outgoing:
    """The request of ``kind`` (``chat``, ``text``, ``embedding``, ``transcription``, ``responses``).

    ``body`` is as the caller has it, in OpenAI's words; it is not changed. Its ``model`` gives way to the
    target's and its ``stream`` to the argument. `BadRequestError` names the field that cannot be sent.
    """
    return request(target, kind, url(target.base_url, path(kind)), parameters(target, kind, body, stream))


def path(kind: str) -> str:
    found = PATHS.get(kind)
    if found is None:
        raise BadRequestError(f"this provider has no {kind!r} requests", param="kind")
    return found


@lru_cache(1024)
def url(base: str, path: str, query: str = "") -> str:
    """``path`` below ``base``, whose own query stays. A base that has the path at its end keeps it."""
    parts = urlsplit(base)
    joined = parts.path.rstrip("/")
    if not joined.endswith(f"/{path}"):
        joined = f"{joined}/{path}"
    both = "&".join(filter(None, (parts.query, query)))
    return urlunsplit((parts.scheme, parts.netloc, joined, both, ""))


def request(target: Target, kind: str, address: str, fields: dict[str, Any]) -> Outgoing:
    """``fields`` on their way to ``address``: as JSON, or as a form where they hold a file."""
    if kind == "transcription":
        content_type, content = form(fields)
    else:
        content_type, content = "application/json", dumps(fields)
    accept = "text/event-stream" if fields.get("stream") else "application/json"
    headers = {"content-type": content_type, "accept": accept, **target.headers}
    if kind == "transcription":
        headers["content-type"] = content_type  # it holds the boundary
    return Outgoing(address, headers, content)


def dumps(fields: Mapping[str, object]) -> bytes:
    """Compact JSON. `BadRequestError` names the field that JSON cannot hold."""
    try:
        text = _encode(fields)
    except (TypeError, ValueError, RecursionError):
        raise _unsendable(fields) from None
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair: it has an escape, and no UTF-8
        return json.dumps(fields, separators=(",", ":")).encode()


def _unsendable(fields: Mapping[str, object]) -> BadRequestError:
    for name, value in fields.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            return BadRequestError(f"{name} has a value that JSON cannot hold", param=str(name))
    return BadRequestError("the request cannot be written as JSON")


def parameters(target: Target, kind: str, body: Mapping[str, object], stream: bool) -> dict[str, Any]:
    """``body`` with the names and values that the provider takes."""
    row = target.provider
    fields: dict[str, Any] = {**body, "model": target.model}
    fields.pop("stream", None)
    if stream:
        fields["stream"] = True
    else:
        fields.pop("stream_options", None)
    for name in target.drop:
        fields.pop(name, None)
    if kind == "chat":
        fields = _fitting(target, fields)
    if row.force and kind in ("chat", "text"):
        fields.update(row.force)
    if target.extra_body:
        fields.update(target.extra_body)
    return fields


def _fitting(target: Target, fields: dict[str, Any]) -> dict[str, Any]:
    row = target.provider
    renames, unsupported = row.renames, row.unsupported
    if row.name in ("openai", "azure") and _REASONING.match(target.base_model or target.model):
        renames = {"max_tokens": "max_completion_tokens", **renames}
        unsupported |= _NOT_REASONING
    if target.drop_params:
        fields = {name: value for name, value in fields.items() if name not in unsupported}
    fields = _renamed(fields, renames)
    for name, most in row.maximum.items():
        value = fields.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > most:
            fields[name] = most
    if row.text_content and isinstance(fields.get("messages"), list):
        fields["messages"] = [_as_text(message) for message in fields["messages"]]
    return fields


def _renamed(fields: dict[str, Any], renames: Mapping[str, str]) -> dict[str, Any]:
    """Under their other names; a caller who has used both has the newer one's value sent."""
    if renames.keys().isdisjoint(fields):
        return fields
    renamed = {name: value for name, value in fields.items() if name not in renames}
    return renamed | {new: fields[old] for old, new in renames.items() if old in fields}


def _as_text(message: object) -> object:
    """A message whose text parts are one text; one with other parts stays what it is."""
    if not isinstance(message, Mapping):
        return message
    parts = message.get("content")
    if not isinstance(parts, list) or not all(_is_text(part) for part in parts):
        return message
    return {**message, "content": "".join(part["text"] for part in parts)}


def _is_text(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
