"""JSON schemas as Anthropic's structured outputs take them.

Objects are closed, and limits that the grammar cannot hold (``minimum``, ``maxLength``, ``pattern`` ...) are
told in the description instead, as Anthropic's own SDKs do
(https://platform.claude.com/docs/en/build-with-claude/structured-outputs).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

__all__ = ["fitted"]

_KEPT: Final = frozenset(
    ["$ref", "const", "default", "description", "enum", "required", "title", "type"],
)
_NAMED: Final = frozenset(["$defs", "definitions", "properties"])
_LISTS: Final = {"allOf": "allOf", "anyOf": "anyOf", "oneOf": "anyOf"}
_LEFT_OUT: Final = frozenset(["$id", "$schema", "additionalProperties"])
_FORMATS: Final = frozenset(
    ["date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"]
)


def fitted(schema: object) -> Any:
    """A schema that Anthropic takes and that means the same, or somewhat more."""
    if not isinstance(schema, Mapping):
        return schema
    kept: dict[str, Any] = {}
    told: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _NAMED and isinstance(value, Mapping):
            kept[name] = {key: fitted(item) for key, item in value.items()}
        elif name in _LISTS and isinstance(value, list):
            kept[_LISTS[name]] = [fitted(item) for item in value]
        elif name == "items":
            kept[name] = fitted(value)
        elif _fits(name, value):
            kept[name] = value
        elif name not in _LEFT_OUT:
            told[name] = value
    if "properties" in kept or kept.get("type") == "object":
        kept["additionalProperties"] = False
    if told:
        kept["description"] = _told(kept.get("description"), told)
    return kept


def _fits(name: str, value: object) -> bool:
    if name == "minItems":
        return value in (0, 1)
    return name in _KEPT or (name == "format" and isinstance(value, str) and value in _FORMATS)


def _told(description: object, limits: Mapping[str, Any]) -> str:
    text = ", ".join(f"{name}: {_plain(value)}" for name, value in limits.items())
    return f"{description}\n\n{{{text}}}" if description else f"{{{text}}}"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
