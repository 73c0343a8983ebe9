"""Take one member out of a JSON object's text and leave every other byte as it was sent."""

from __future__ import annotations

import json
import re
from json.decoder import scanstring  # type: ignore[attr-defined]

__all__ = ["without_member"]

_skip_value = json.JSONDecoder().raw_decode
_space = re.compile(r"[ \t\n\r]*").match


def _after_space(text: str, at: int) -> int:
    match = _space(text, at)
    return match.end() if match else at


def _members(text: str, start: int) -> list[tuple[str, int, int]]:
    """(name, begin, end) of each member of the object whose brace ends at ``start``."""
    spans = []
    at = _after_space(text, start)
    while text[at] != "}":
        begin = at
        name, at = scanstring(text, at + 1, True)
        at = _after_space(text, _after_space(text, at) + 1)
        _, end = _skip_value(text, at)
        spans.append((name, begin, end))
        at = _after_space(text, end)
        if text[at] == ",":
            at = _after_space(text, at + 1)
    return spans


def without_member(body: bytes, name: str) -> bytes:
    """``body`` without its top-level member(s) ``name``.

    ``body`` must be the text of a JSON object, parsed before; UTF-8, UTF-16 and UTF-32 keep their encoding.
    """
    encoding = json.detect_encoding(body)
    text = body.decode(encoding, "surrogatepass")
    start = text.index("{") + 1
    spans = _members(text, start)
    pieces: list[str] = []
    for index, (member, begin, end) in enumerate(spans):
        if member != name:
            # The first member kept stands where the first one stood; the others keep their separator.
            previous = spans[index - 1][2] if pieces else None
            pieces.append(text[start : spans[0][1]] if previous is None else text[previous:begin])
            pieces.append(text[begin:end])
    tail = text[spans[-1][2] :] if spans else text[start:]
    return (text[:start] + "".join(pieces) + tail).encode(encoding, "surrogatepass")
