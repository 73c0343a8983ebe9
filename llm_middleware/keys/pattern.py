"""Names of models with ``*`` in them: each star stands for any text, all else for itself, the whole name
long.

No regular expression: a name may come from anybody, and these take no longer than the name is long for each
piece of the pattern.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["matches"]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether ``name`` is one of ``patterns``. ``openai/gpt-4.1*`` is not ``openai/gpt-4x1-foo``."""
    return any(name == pattern or ("*" in pattern and _fits(name, pattern)) for pattern in patterns)


def _fits(name: str, pattern: str) -> bool:
    first, *middle, last = pattern.split("*")
    if len(name) < len(first) + len(last) or not name.startswith(first) or not name.endswith(last):
        return False
    at, end = len(first), len(name) - len(last)
    for piece in middle:
        found = name.find(piece, at, end)
        if found < 0:
            return False
        at = found + len(piece)
    return True
