"""What the learned decision looks at: how a stored question and a new one differ, as numbers between about
0 and 1.

`lexical` compares two texts; `vector_of` puts that beside the similarity, the runner-up and the judgements
known of the candidates. Nothing here knows any data set; what a number is worth is learnt (`decision`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import exp

from .phrases import Phrase
from .words import LIMITERS, QUESTION_WORDS

__all__ = ["DIMENSIONS", "LEXICAL", "PRIOR_MEAN", "PRIOR_SD", "VERSION", "lexical", "vector_of"]

VERSION = 1
"""Of the vectors: a state learnt from others is of no use."""

LEXICAL = (
    "jaccard",
    "missing_stored",
    "missing_asked",
    "letters",
    "one_word",
    "number_one_sided",
    "name_one_sided",
    "question_word",
    "limiter",
    "negators",
    "length",
    "order",
    "first_word",
)
"""The names of what `lexical` gives, in order."""


# What each number is thought to be worth before anything was learnt, and how unsure that is: set by hand.
_PRIOR = (
    ("one", 1.0, 1.5),
    ("similarity", 3.0, 2.0),
    ("similarity above 0.80", 0.0, 2.0),
    ("similarity above 0.90", 0.0, 2.0),
    ("similarity above 0.96", 0.0, 2.0),
    ("gap to the best other answer", 1.5, 1.5),
    ("share of the neighbours with this answer", 1.0, 1.5),
    ("neighbours with this answer", 0.5, 1.0),
    ("nearer ones passed over", 0.0, 1.0),
    ("jaccard", 0.5, 1.0),
    ("missing_stored", -0.7, 1.0),
    ("missing_asked", -0.7, 1.0),
    ("letters", 0.7, 1.0),
    ("one_word", -0.5, 1.0),
    ("number_one_sided", -0.5, 1.0),
    ("name_one_sided", -0.7, 1.0),
    ("question_word", -0.5, 1.0),
    ("limiter", -0.5, 1.0),
    ("negators", -0.5, 1.0),
    ("length", -0.3, 1.0),
    ("order", -0.3, 1.0),
    ("first_word", 0.2, 1.0),
)
PRIOR_MEAN = tuple(mean for _, mean, _ in _PRIOR)
PRIOR_SD = tuple(sd for _, _, sd in _PRIOR)
DIMENSIONS = len(_PRIOR)

_SHARPNESS = 15.0  # how fast a neighbour's vote falls with its similarity
_WIDEST_GAP = 0.3


def vector_of(
    similarity: float,
    same: Sequence[float],
    others: Sequence[float],
    passed: int,
    floor: float,
    stored: Phrase,
    asked: Phrase,
) -> list[float]:
    """A candidate as the model sees it, `DIMENSIONS` numbers.

    ``same``: the similarities of all neighbours that have the candidate's answer, itself included;
    ``others``: of those with other answers; ``passed``: how many nearer ones a guard vetoed; ``floor``:
    the least similarity looked at.
    """
    votes = sum(exp((other - similarity) * _SHARPNESS) for other in same)
    against = sum(exp((other - similarity) * _SHARPNESS) for other in others)
    rival = max(others, default=min(floor, similarity))
    return [
        1.0,
        (similarity - 0.85) * 8.0,
        max(0.0, similarity - 0.8) * 8.0,
        max(0.0, similarity - 0.9) * 10.0,
        max(0.0, similarity - 0.96) * 10.0,
        max(-0.1, min(_WIDEST_GAP, similarity - rival)) * 8.0,
        votes / (votes + against) - 0.5,
        min(4, len(same) - 1) / 4.0,
        min(2, passed) / 2.0,
        *lexical(stored, asked),
    ]


def lexical(a: Phrase, b: Phrase) -> list[float]:
    """How ``a`` (stored) and ``b`` (asked) differ, one number for each of `LEXICAL`."""
    left, right = a.bag - b.bag, b.bag - a.bag
    shared = len(a.bag) - len(left)
    union = shared + len(left) + len(right)
    return [
        shared / union if union else 1.0,
        len(left) / (len(a.bag) or 1),
        len(right) / (len(b.bag) or 1),
        _dice(a, b),
        float(len(left) == 1 and len(right) == 1),
        float(bool(a.numbers) != bool(b.numbers)),
        float(bool(a.names - b.bag) or bool(b.names - a.bag)),
        float(_asks(a) != _asks(b)),
        float(not LIMITERS.isdisjoint(frozenset(a.tokens) ^ frozenset(b.tokens))),
        float(a.negators != b.negators),
        abs(len(a.content) - len(b.content)) / (max(len(a.content), len(b.content)) or 1),
        _turned(a, b),
        float(a.tokens[:1] == b.tokens[:1]),
    ]


def _dice(a: Phrase, b: Phrase) -> float:
    one, other = _grams(a.text), _grams(b.text)
    return 2 * len(one & other) / ((len(one) + len(other)) or 1)


def _asks(phrase: Phrase) -> str:
    for word in phrase.tokens:
        kind = QUESTION_WORDS.get(word)
        if kind:
            return kind
    return ""


def _turned(a: Phrase, b: Phrase) -> float:
    """The share of neighbouring shared words that are not neighbours in the same order on the other side."""
    ours = [word for word in a.content if word in b.bag]
    theirs = [word for word in b.content if word in a.bag]
    if len(ours) < 2 or len(theirs) < 2:
        return 0.0
    pairs = set(pairwise(theirs))
    return sum(pair not in pairs for pair in pairwise(ours)) / (len(ours) - 1)


@lru_cache(maxsize=4096)
def _grams(text: str) -> frozenset[str]:
    """Four letters at a time: for what words cannot tell (spelling, inflection)."""
    low = f" {text.lower()} "
    return frozenset([low[at : at + 4] for at in range(len(low) - 3)])
