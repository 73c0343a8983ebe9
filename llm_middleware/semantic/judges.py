"""Judges: whether a stored answer would have answered a new question as well as its own answer does.

A judge is asked behind the request, about a pair whose two answers are both there. What it says is the only
thing that the verified mode learns from, so the bound holds for answers that the judge finds wrong.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import isawaitable, iscoroutinefunction
from operator import mul
from typing import Any, Protocol, runtime_checkable

from .._drive import run_sync
from .._ports.faces import SYNC, async_port
from .._ports.protocol import Port
from ..errors import ConfigError
from .aside import apart
from .embed_cache import CachedEmbedder
from .embedders import UnfitTextError
from .guards import conflict_of

__all__ = ["CallableJudge", "EmbeddingJudge", "Judge", "Pair", "RouterJudge", "made_judge"]

_SHORT = 400  # characters of an answer whose every word counts
_MOST_PIECES = 16
# An answer's first word may be its whole verdict; before a sentence its "no" is not a negation of that.
_VERDICT = re.compile(r"\W*(?:(yes|true)|(no|false))\s*(?:[,.:;!\u2013\u2014-]+\s*|$)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?\u3002\uff01\uff1f])\s+|\n+")


@dataclass(frozen=True, slots=True)
class Pair:
    """A stored ``question`` with its ``answer``, and a new one (``asked``) with its own (``fresh``)."""

    question: str
    answer: str
    asked: str
    fresh: str


@runtime_checkable
class Judge(Protocol):
    """Both faces; one is enough where the other is never used."""

    def judge(self, pair: Pair) -> bool | None:
        """Whether ``pair.answer`` answers ``pair.asked`` too; None where that cannot be said."""
        ...

    async def ajudge(self, pair: Pair) -> bool | None:
        """`judge` for async callers."""
        ...


class EmbeddingJudge:
    """The judge that needs nothing else: two answers are the same where their vectors are near each other and
    they do not contradict each other: one with a yes and one with a no, or, if they are short, as a guard
    finds. ``threshold``: the least cosine.

    An answer longer than the embedder reads is read in pieces, and its vector is their mean."""

    def __init__(self, embedder: CachedEmbedder, threshold: float = 0.85) -> None:
        self._embedder = embedder
        self._threshold = threshold

    def judge(self, pair: Pair) -> bool | None:
        return run_sync(self._judge(SYNC, pair))

    async def ajudge(self, pair: Pair) -> bool | None:
        return await self._judge(async_port(), pair)

    async def _judge(self, port: Port, pair: Pair) -> bool | None:
        if pair.answer.split() == pair.fresh.split():
            return True
        if _contradict(pair.answer, pair.fresh):
            return False
        sides = [self._pieces(text) for text in (pair.answer, pair.fresh)]
        if not all(sides):
            return None
        pieces = [piece for side in sides for piece in side]
        try:
            given: Any = await port.store(self._embedder, "embed", pieces)
        except UnfitTextError:
            return None
        first = len(sides[0])
        return _cosine(_mean(given[:first]), _mean(given[first:])) >= self._threshold

    def _pieces(self, text: str) -> list[str]:
        """The text in pieces that the embedder reads whole; none where that takes too many."""
        text = text.strip()
        if self._embedder.fits(text):
            return [text] if text else []
        pieces: list[str] = []
        for sentence in filter(None, _SENTENCE_END.split(text)):
            joined = f"{pieces[-1]} {sentence}" if pieces else sentence
            if pieces and self._embedder.fits(joined):
                pieces[-1] = joined
            elif self._embedder.fits(sentence) and len(pieces) < _MOST_PIECES:
                pieces.append(sentence)
            else:
                return []
        return pieces


def _contradict(one: str, other: str) -> bool:
    ours, theirs = _VERDICT.match(one), _VERDICT.match(other)
    if ours and theirs and bool(ours[1]) is not bool(theirs[1]):
        return True
    if len(one) > _SHORT or len(other) > _SHORT:
        return False
    return (
        conflict_of(one[ours.end() :] if ours else one, other[theirs.end() :] if theirs else other)
        is not None
    )


def _mean(vectors: Sequence[bytes]) -> list[float]:
    return [math.fsum(column) for column in zip(*map(_floats, vectors), strict=True)]


def _floats(vector: bytes) -> array[float]:
    values = array("f")
    values.frombytes(vector)
    return values


def _cosine(one: Sequence[float], other: Sequence[float]) -> float:
    lengths = math.hypot(*one) * math.hypot(*other)
    return sum(map(mul, one, other)) / lengths if lengths else 0.0


class CallableJudge:
    """A function of the host's own: ``function(pair)``, sync (called in a thread of its own where there is
    an event loop) or async (for async callers only)."""

    def __init__(self, function: Callable[[Pair], object]) -> None:
        self._function = function
        self._is_async = iscoroutinefunction(function)

    def judge(self, pair: Pair) -> bool | None:
        return run_sync(self._judge(SYNC, pair))

    async def ajudge(self, pair: Pair) -> bool | None:
        return await self._judge(async_port(), pair)

    async def _judge(self, port: Port, pair: Pair) -> bool | None:
        said = await (port.call if self._is_async else partial(apart, port))(self._function, pair)
        if isawaitable(said):
            awaitable = said
            said = await port.call(lambda: awaitable)
        return said if isinstance(said, bool) else None


_PROMPT = (
    "Two people asked an assistant. Decide whether the answer to the first would also be a correct and "
    "complete answer to the second. Differences of wording do not matter; differences of what was asked (a "
    "number, a name, a date, a direction, a negation, a condition) do.\n\n"
    "First question: {question}\n\nAnswer to the first question: {answer}\n\n"
    "Second question: {asked}\n\nAnswer to the second question: {fresh}\n\n"
    "Say YES or NO and nothing else."
)


class RouterJudge:
    """Asks ``model`` of a `Router`. ``most``: characters of each text that it is shown; where one is longer
    it has no opinion."""

    def __init__(self, router: Any, model: str, *, most: int = 20_000) -> None:
        if model not in router:
            raise ConfigError(
                f"judge: the router has no model {model!r}; it has {', '.join(router.models)}", param="judge"
            )
        self._router = router
        self._model = model
        self._most = most

    def judge(self, pair: Pair) -> bool | None:
        return run_sync(self._judge(SYNC, pair))

    async def ajudge(self, pair: Pair) -> bool | None:
        return await self._judge(async_port(), pair)

    async def _judge(self, port: Port, pair: Pair) -> bool | None:
        texts = (pair.question, pair.answer, pair.asked, pair.fresh)
        if max(map(len, texts)) > self._most:
            return None
        content = _PROMPT.format(question=texts[0], answer=texts[1], asked=texts[2], fresh=texts[3])
        ask = self._router.completion if port is SYNC else self._router.acompletion
        messages = [{"role": "user", "content": content}]
        answer: Any = await port.call(lambda: ask(model=self._model, messages=messages, temperature=0))
        said = str(answer["choices"][0]["message"]["content"] or "").strip().upper()
        return True if said.startswith("YES") else False if said.startswith("NO") else None


def made_judge(judge: object, embedder: CachedEmbedder, router: object) -> Judge:
    """The judge that a setting names: None for the default, a model of the router's, a function, a
    `Judge`."""
    if judge is None:
        return EmbeddingJudge(embedder)
    if isinstance(judge, str):
        if router is None:
            raise ConfigError(f"judge: {judge!r} is a model: give the router that has it", param="judge")
        return RouterJudge(router, judge)
    if hasattr(judge, "judge") or hasattr(judge, "ajudge"):
        return judge  # type: ignore[return-value]  # one face is enough
    if callable(judge):
        return CallableJudge(judge)
    raise ConfigError(f"judge: expected a function or a model's name, got {judge!r}", param="judge")
