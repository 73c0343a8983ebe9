"""A small set of questions for tests of the evaluation, and an embedder that knows words only."""

from __future__ import annotations

import math
import zlib
from array import array
from collections.abc import Iterable, Iterator
from random import Random

__all__ = ["DIMENSIONS", "Near", "embed", "questions"]

DIMENSIONS = 96
_ASKED = ("How do I {}?", "How can I {}?", "What must I do to {}?", "Please tell me how to {}.")
_DEEDS = ("reset", "change", "delete", "share", "print", "export", "rename", "lock")
_THINGS = ("password", "address", "invoice", "calendar", "photo", "contract", "account", "report")
_WHERE = ("", " on my phone", " at work", " for a friend", " in the app")


def embed(texts: list[str]) -> list[list[float]]:
    """The words of each text, counted in places that their letters give."""
    return [_vector(text.lower().replace("?", "").replace(".", "").split()) for text in texts]


def _vector(words: Iterable[str]) -> list[float]:
    vector = array("d", [0.0] * DIMENSIONS)
    for word in words:
        vector[zlib.crc32(word.encode()) % DIMENSIONS] += 1.0
    length = math.hypot(*vector)
    return [value / length for value in vector]


def questions(count: int, seed: int = 5) -> tuple[list[str], list[str]]:
    """(questions, the class of each one's answer): what is to be done with what; the rest does not matter."""
    random = Random(seed)
    asked: dict[str, str] = {}
    while len(asked) < count:
        deed, thing = random.choice(_DEEDS), random.choice(_THINGS)
        text = random.choice(_ASKED).format(f"{deed} my {thing}{random.choice(_WHERE)}")
        asked.setdefault(text, f"{deed} {thing}")
    return list(asked), list(asked.values())


class Near:
    """Which earlier requests are near, as a test says it."""

    def __init__(self, near: dict[int, list[tuple[int, float]]]) -> None:
        self._near = near

    def of(self, at: int) -> Iterator[tuple[int, float]]:
        yield from self._near.get(at, ())
